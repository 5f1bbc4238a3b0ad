"""Sampling: keyed by (seed, position) alone, filters as vLLM has them, log-probabilities from raw logits."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.errors import RequestError
from tidepool.common.wire import Sampling, TokenLogprob
from tidepool.kernels.sample_tokens import uniforms
from tidepool.model.output import OutputBuffers, OutputRow, choose_tokens
from tidepool.model.sampling import (
    SAMPLING_KINDS,
    SamplingBuffers,
    SamplingRow,
    kind_of,
    sample,
    sample_into,
)

LOGITS_V = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
INF = float("inf")


def sampling(**fields: object) -> Sampling:
    return Sampling(max_tokens=100, **fields)


def draw(
    logits_BV: torch.Tensor,
    rows: list[tuple[Sampling, int]],
    banned: tuple[Collection[int], ...] | None = None,
) -> list[int]:
    banned = banned or ((),) * len(rows)
    named = [SamplingRow(*row, ids) for row, ids in zip(rows, banned, strict=True)]
    return sample(logits_BV, named).tolist()


def logprobs(
    logits_BV: torch.Tensor, token_B: torch.Tensor, top_ns: list[int]
) -> list[TokenLogprob | None]:
    buffers = OutputBuffers(*logits_BV.shape, "cpu")
    buffers.token_B.copy_(token_B)
    buffers.write_logprobs(logits_BV, token_B)
    tokens = buffers.start_read(len(top_ns), with_logprobs=True).tokens(top_ns)
    assert [token.token_id for token in tokens] == token_B.tolist()
    return [token.logprob for token in tokens]


def support(count: int = 400, logits_V: torch.Tensor = LOGITS_V, **fields: object) -> set[int]:
    """Tokens that come up at `count` positions."""
    rows = [(sampling(seed=5, **fields), position) for position in range(count)]
    return set(draw(logits_V.expand(count, -1), rows))


def splitmix64(state: int) -> int:
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_splitmix64_gives_its_published_first_value():
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_uniforms_are_splitmix64_of_seed_and_position(seed, position):
    value = uniforms(torch.tensor([seed]), torch.tensor([position])).item()
    assert value == (splitmix64((splitmix64(seed % 2**64) + position) % 2**64) >> 11) / 2**53
    assert 0 <= value < 1


def test_uniforms_are_spread_evenly_over_positions_and_seeds():
    count = 20_000
    for seeds, positions in (
        (torch.zeros(count, dtype=torch.int64), torch.arange(count)),
        (torch.arange(count), torch.zeros(count, dtype=torch.int64)),
    ):
        shares = torch.histc(uniforms(seeds, positions), bins=20, min=0, max=1) / count
        assert (shares - 0.05).abs().max() < 0.006


def test_frequencies_follow_the_probabilities():
    count = 20_000
    rows = [(sampling(seed=1), position) for position in range(count)]
    counts = torch.bincount(torch.tensor(draw(LOGITS_V.expand(count, -1), rows)), minlength=5)
    assert (counts / count - LOGITS_V.exp()).abs().max() < 0.012


def test_temperature_sharpens_and_flattens():
    count = 20_000
    for temperature in (0.5, 2.0):
        rows = [(sampling(seed=2, temperature=temperature), p) for p in range(count)]
        counts = torch.bincount(torch.tensor(draw(LOGITS_V.expand(count, -1), rows)), minlength=5)
        expected = (LOGITS_V / temperature).softmax(-1)
        assert (counts / count - expected).abs().max() < 0.012


def test_temperature_zero_takes_the_lowest_id_among_the_best():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-INF, -INF, 0.0]])
    rows = [(sampling(temperature=0.0), 0)] * 3
    assert draw(logits, rows) == [1, 0, 2]
    assert draw(logits, [(sampling(temperature=1e-6), 0), *rows[:2]]) == [1, 0, 2]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    count = data.draw(st.integers(2, 6))
    logits = torch.randn(count, 33, generator=generator) * 3
    rows = [
        (
            sampling(
                temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
                top_k=data.draw(st.sampled_from([0, 1, 5, 100])),
                top_p=data.draw(st.sampled_from([1.0, 0.9, 0.1])),
                min_p=data.draw(st.sampled_from([0.0, 0.2])),
                seed=data.draw(st.integers(-(2**63), 2**64)),
            ),
            data.draw(st.integers(0, 10**6)),
        )
        for _ in range(count)
    ]
    together = draw(logits, rows)
    alone = [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone
    assert draw(logits.flip(0), rows[::-1]) == together[::-1]


def test_seed_and_position_both_matter():
    flat = torch.zeros(1, 1000)
    base = draw(flat, [(sampling(seed=1), 1)])
    assert draw(flat, [(sampling(seed=1), 1)]) == base
    assert draw(flat, [(sampling(seed=2), 1)]) != base
    assert draw(flat, [(sampling(seed=1), 2)]) != base
    assert draw(flat, [(sampling(seed=2), 0)]) != base


def test_top_k_keeps_the_k_best_and_ties_with_the_last():
    assert support(top_k=1) == {0}
    assert support(top_k=3) == {0, 1, 2}
    assert support(top_k=99) == {0, 1, 2, 3, 4}
    tied = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    assert support(top_k=2, logits_V=tied) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert support(top_p=0.4) == {0}
    assert support(top_p=0.6) == {0, 1}
    assert support(top_p=0.72) == {0, 1, 2}
    assert support(top_p=0.0) == {0}
    assert support(top_p=1.0) == {0, 1, 2, 3, 4}


def test_min_p_compares_with_the_best_probability():
    assert support(min_p=0.25) == {0, 1, 2}
    assert support(min_p=1.0) == {0}


def test_top_p_counts_what_top_k_and_min_p_left():
    assert support(top_k=2, top_p=0.7) == {0}
    assert support(top_p=0.7) == {0, 1}
    assert support(min_p=0.35, top_p=0.72) == {0, 1}
    assert support(min_p=0.35, top_p=0.7) == {0}


def test_filters_see_the_distribution_behind_the_temperature():
    assert support(temperature=4.0, min_p=0.6) == {0, 1, 2, 3}
    assert support(temperature=0.25, min_p=0.3) == {0}


def test_tokens_without_probability_are_never_drawn():
    logits = torch.tensor([-INF, 0.0, -INF, 0.0, -INF])
    assert support(logits_V=logits) == {1, 3}
    assert support(logits_V=logits, top_p=0.99) == {1, 3}


def test_huge_logits_and_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([3e38, -3e38, 2.9e38])
    assert support(logits_V=logits, temperature=1e-4) == {0}
    assert support(logits_V=logits, temperature=1e6) == {0}


def test_a_row_without_a_token_to_choose_is_marked_and_harms_no_other():
    nan, none = torch.full((5,), float("nan")), torch.full((5,), -INF)
    logits = torch.stack([nan, LOGITS_V, none, LOGITS_V, torch.tensor([0, INF, 0, 0, 0])])
    for temperature in (0.0, 1.0):
        rows = [(sampling(temperature=temperature, top_p=0.1), 3)] * 5
        assert draw(logits, rows) == [-1, 0, -1, 0, -1]


def test_banned_tokens_are_not_chosen_and_the_logits_stay():
    logits = LOGITS_V.repeat(2, 1)
    greedy = [(sampling(temperature=0.0), 0)] * 2
    assert draw(logits, greedy, banned=((0, 1, 77, -3), ())) == [2, 0]
    assert torch.equal(logits, LOGITS_V.repeat(2, 1))
    assert draw(logits, greedy, banned=(range(5), ())) == [-1, 0]


def test_log_probabilities_are_of_the_raw_logits():
    logits = LOGITS_V.repeat(3, 1) + 7
    rows = logprobs(logits, torch.tensor([1, 4, 0]), [0, 3, -1])
    assert rows[2] is None
    assert rows[0].logprob == pytest.approx(math.log(0.2), abs=1e-5)
    assert rows[0].top_ids == ()
    assert rows[1].logprob == pytest.approx(math.log(0.05), abs=1e-5)
    assert rows[1].top_ids == (0, 1, 2)
    assert rows[1].top_logprobs == pytest.approx([math.log(p) for p in (0.5, 0.2, 0.15)], abs=1e-5)


def test_more_log_probabilities_than_tokens_are_all_tokens_lowest_id_first_on_ties():
    rows = logprobs(torch.zeros(1, 3), torch.tensor([2]), [20])
    assert rows[0].top_ids == (0, 1, 2)
    assert logprobs(torch.zeros(1, 3), torch.tensor([2]), [-1]) == [None]


def test_stop_tokens_cannot_come_before_min_tokens():
    row = sampling(temperature=0.0, min_tokens=2, stop_token_ids=(1,), logprobs=1)
    for num_output, expected in ((1, 2), (2, 0)):
        token = choose_tokens(LOGITS_V[None], [OutputRow(row, 9, num_output)], {0})[0]
        assert token.token_id == expected
        assert token.logprob.top_ids == (0,)


def random_rows(generator: torch.Generator, count: int) -> list[SamplingRow]:
    """Greedy, plain and filtered rows, some with banned ids."""
    draws = torch.rand(count, 6, generator=generator).tolist()
    return [
        SamplingRow(
            sampling(
                temperature=0.0 if is_greedy < 0.3 else 0.2 + 2 * temperature,
                top_k=int(60 * top_k) if top_k < 0.5 else 0,
                top_p=top_p if top_p > 0.4 else 1.0,
                min_p=min_p / 10 if min_p < 0.5 else 0.0,
                seed=row,
            ),
            1000 + row,
            (row, 3 * row) if banned < 0.3 else (),
        )
        for row, (is_greedy, temperature, top_k, top_p, min_p, banned) in enumerate(draws)
    ]


def sample_as_published(logits_BV: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """Row by row, with the filters as masks over weights sorted by themselves."""
    tokens = []
    for logits_V, (parameters, position, banned) in zip(logits_BV.clone(), rows, strict=True):
        logits_V[list(banned)] = -INF
        if parameters.temperature < 1e-5:
            tokens.append(int(logits_V.argmax()))
            continue
        weight_V = ((logits_V - logits_V.max()).double() / parameters.temperature).exp()
        sorted_V, order_V = weight_V.sort(descending=True, stable=True)
        kept_V = sorted_V >= parameters.min_p
        if parameters.top_k > 0:
            kept_V &= sorted_V >= sorted_V[min(parameters.top_k, len(sorted_V)) - 1]
        cdf_V = (sorted_V * kept_V).cumsum(0)
        if parameters.top_p < 1:
            kept_V &= cdf_V - sorted_V < parameters.top_p * cdf_V[-1]
        kept_V[0] = True
        weight_V *= torch.zeros_like(kept_V).scatter_(0, order_V, kept_V)
        cdf_V = weight_V.cumsum(0)
        uniform = uniforms(torch.tensor([parameters.seed]), torch.tensor([position]))
        tokens.append(int(torch.searchsorted(cdf_V, uniform * cdf_V[-1], right=True)))
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_fixed_buffers_choose_what_the_published_filters_choose(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, 400, generator=generator) * 3
    rows = random_rows(generator, 24)
    expected = sample_as_published(logits, rows)
    buffers = SamplingBuffers(32, 400, "cpu", max_banned=2)
    kind = buffers.fill(rows)
    tokens = torch.empty(24, dtype=torch.int64)
    sample_into(logits, buffers, kind, tokens)
    assert kind == "filtered"
    assert tokens.tolist() == expected


def test_kinds_that_do_more_choose_the_same_tokens():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    chosen = {}
    for fields in ({"temperature": 0.0}, {"temperature": 1.0}):
        rows = [SamplingRow(sampling(seed=i, **fields), i) for i in range(4)]
        kind = kind_of([row.sampling for row in rows])
        for stronger in SAMPLING_KINDS[SAMPLING_KINDS.index(kind) :]:
            buffers = SamplingBuffers(4, 50, "cpu")
            assert buffers.fill(rows) == kind
            tokens = torch.empty(4, dtype=torch.int64)
            sample_into(logits, buffers, stronger, tokens)
            chosen.setdefault(kind, set()).add(tuple(tokens.tolist()))
    assert chosen["greedy"] != chosen["plain"]
    assert all(len(tokens) == 1 for tokens in chosen.values())


def test_greedy_rows_with_filters_make_no_filtered_step():
    assert kind_of([sampling(temperature=0.0, top_k=5)]) == "greedy"
    assert kind_of([sampling(temperature=0.0, top_k=5), sampling()]) == "plain"
    assert kind_of([sampling(top_k=5), sampling()]) == "filtered"
    assert kind_of([]) == "greedy"


def test_padding_is_greedy_and_old_rows_leave_nothing():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    buffers = SamplingBuffers(3, 40, "cpu", max_banned=4)
    best = logits.argmax(-1)
    strange = sampling(temperature=50.0, seed=3)
    buffers.fill([SamplingRow(strange, 5, (int(best[row]),)) for row in range(3)])
    buffers.fill([SamplingRow(sampling(temperature=0.0), 0)], 3)
    tokens = torch.empty(3, dtype=torch.int64)
    sample_into(logits, buffers, "filtered", tokens)
    assert torch.equal(tokens, best)


def test_more_banned_ids_than_there_is_room_for_are_refused():
    buffers = SamplingBuffers(1, 40, "cpu", max_banned=2)
    buffers.fill([SamplingRow(sampling(), 0, (1, 2, 40, -1))])
    with pytest.raises(RequestError, match="bans 3 tokens"):
        buffers.fill([SamplingRow(sampling(), 0, (1, 2, 3))])
