"""Sampling: keyed by (seed, position) alone, filters as vLLM has them, log-probabilities from raw logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.wire import Sampling
from tidepool.model.output import OutputRow, choose_tokens
from tidepool.model.sampling import SamplingBatch, logprobs, sample, uniforms

LOGITS_V = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
INF = float("inf")


def sampling(**fields: object) -> Sampling:
    return Sampling(max_tokens=100, **fields)


def draw(logits_BV: torch.Tensor, rows: list[tuple[Sampling, int]], **options: object) -> list[int]:
    return sample(logits_BV, SamplingBatch.build(rows), **options).tolist()


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
    assert draw(logits, greedy, banned=[(0, 1, 77, -3), ()]) == [2, 0]
    assert torch.equal(logits, LOGITS_V.repeat(2, 1))
    assert draw(logits, greedy, banned=[range(5), ()]) == [-1, 0]


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
