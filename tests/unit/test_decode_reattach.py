"""A decode engine is killed anywhere; the next one goes on with every sequence, token for token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from helpers.kept import Life
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common.errors import SegmentError
from tidepool.common.wire import UNKNOWN_ATTEMPT, Finish, OutputToken, PageRun, Resume
from tidepool.decode_node.journal import Journal
from tidepool.decode_node.keeper_watch import KeeperWatch
from tidepool.decode_node.kept import PROOF_STEPS, KeptMemory
from tidepool.decode_node.reattach import MAX_UNKNOWN_S, Aftermath, reattach
from tidepool.deploy.local import FRONT_ID

SEED = VETTED_SEEDS["glm52"][0]
SETTINGS: dict[str, Any] = {
    "decode.hot_rows": INDEX_TOPK,
    "kv.page_size": 4,
    "decode.seats": 3,
    "decode.max_requests": 6,
    "decode.park_after_tokens": 3,
    "decode.host_tokens": 1024,
    "decode.index_tokens": 1024,
    "decode.max_context": 256,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


def ask_all(life: Life) -> None:
    """More requests than seats, so that some are parked; logprobs, seeds and stops among them."""
    life.ask("greedy", prompt(0, 41), max_tokens=18)
    life.ask("logprobs", prompt(1, 12), max_tokens=15, logprobs=2)
    life.ask("seeded", prompt(2, 30), max_tokens=17, temperature=0.8, top_p=0.9, seed=11)
    life.ask("short", prompt(3, 5), max_tokens=3)
    life.ask("stopped", prompt(4, 22), max_tokens=25, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def truth(path: Path) -> dict[str, Any]:
    """What happens when nobody is killed, and how many bytes the journal then has written."""
    life = Life(path, **SETTINGS)
    ask_all(life)
    assert not life.run_until_killed(2**40)
    num_bytes = 2**40 - life.journal.num_bytes_left
    return {"num_bytes": num_bytes, "outcome": life.outcome(), "tokens": dict(life.node.tokens)}


def assert_is_truth(life: Life, truth: dict[str, Any]) -> None:
    found = life.outcome()
    assert set(found) == set(truth["outcome"])
    for name, (tokens, finish) in found.items():
        expected, expected_finish = truth["outcome"][name]
        assert tokens == expected, name
        assert (finish.reason, finish.num_tokens) == (
            expected_finish.reason,
            expected_finish.num_tokens,
        )
    for name, tokens in life.node.tokens.items():
        for ours, theirs in zip(tokens, truth["tokens"][name.rstrip("+")], strict=False):
            assert (ours.logprob is None) == (theirs.logprob is None)
            if ours.logprob is not None and theirs.logprob is not None:
                assert ours.logprob.top_ids == theirs.logprob.top_ids
                assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
    coordinator = life.node.decode.coordinator
    for pages in (coordinator.host.pages, coordinator.index.pages):
        assert pages.num_free == pages.num_total
    assert coordinator.seats.num_free == coordinator.seats.num_seats


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_kill_anywhere_changes_no_token(
    path: Path, truth: dict[str, Any], number: int, overlap: str
) -> None:
    """`overlap`: the next step is launched, and its rows are durable, before tokens are known."""
    rng = random.Random(number)
    life = Life(path, **{**SETTINGS, "decode.overlap": overlap})
    ask_all(life)
    num_kills = 0
    while life.run_until_killed(rng.randrange(1, truth["num_bytes"] if num_kills < 4 else 2**40)):
        num_kills += 1
        life = life.next()
        life.ask_again()
    assert_is_truth(life, truth)


def test_rows_that_were_durable_are_not_computed_again(path: Path, truth: dict[str, Any]) -> None:
    life = Life(path, **SETTINGS)
    ask_all(life)
    assert life.run_until_killed(truth["num_bytes"] * 2 // 3)
    prefilled = life.node.prefill.stats()["prefill_tokens"]
    assert prefilled > 0
    behind = sum(
        max(0, record.num_prompt_tokens + len(record.output) - 1 - record.durable_len)
        for record in life.records().values()
        if record.finish is None
    )
    life = life.next()
    assert life.past.num_replayed == behind
    assert life.past.num_sequences > 2
    assert behind < life.past.num_sequences * life.runtime.geometry.page_size
    life.ask_again()
    assert not life.run_until_killed(2**40)
    assert life.node.prefill.stats()["prefill_tokens"] == 0
    assert_is_truth(life, truth)


def test_a_request_that_ended_unheard_is_answered_from_the_journal(path: Path) -> None:
    life = Life(path, **SETTINGS)
    life.ask("r", prompt(3, 5), max_tokens=3)
    assert not life.run_until_killed(2**40)
    tokens = [token.token_id for token in life.node.tokens["r"]]
    life.node.finishes.clear()  # neither the end nor the last token was heard
    del life.node.tokens["r"][1:]
    life = life.next()
    assert life.past.num_ended == 1
    life.ask_again()
    life.node.step()
    assert life.node.output("r") == tokens
    assert life.node.finishes["r"].reason == "length"


def test_an_attempt_that_is_not_here_is_answered_so(path: Path) -> None:
    life = Life(path, **SETTINGS).next()
    life.node.inbox.append(Resume("stranger", 0, 4, FRONT_ID))
    life.node.step()
    finish = life.node.finishes["stranger"]
    assert (finish.reason, finish.code, finish.can_retry) == ("error", UNKNOWN_ATTEMPT, True)


@pytest.mark.parametrize(
    "fault", ["page twice", "page outside", "too few pages", "prompt not durable", "no token"]
)
def test_a_record_that_contradicts_the_node_is_dropped_alone(path: Path, fault: str) -> None:
    life = Life(path, **SETTINGS)
    life.ask("good", prompt(0, 9), max_tokens=9)
    life.ask("bad", prompt(1, 9), max_tokens=9)
    while len(life.node.tokens["bad"]) < 3:
        life.node.step()
    sequence = life.node.decode.find(("bad", 0))
    assert sequence is not None
    journal = Journal(life.segment.view("journal"), life.shape)
    for record in journal.recover():
        journal.keep(record)
    journal._forget(sequence.key)
    runs = sequence.host_lease.runs
    if fault == "page outside":
        sequence.host_lease.runs = (*runs[:-1], PageRun(10**6, runs[-1].count))
    elif fault == "too few pages":
        sequence.host_lease.runs = (PageRun(runs[0].first, 1),)
    elif fault == "page twice":
        shorter = PageRun(runs[-1].first, runs[-1].count - 1)
        sequence.host_lease.runs = (*runs[:-1], shorter, PageRun(runs[0].first, 1))
    elif fault == "prompt not durable":
        sequence.durable_len = sequence.num_prompt_tokens - 1
    journal.begin(sequence)
    if fault != "no token":
        journal.append(sequence, OutputToken(1))
    life = life.next()
    assert (life.past.num_sequences, life.past.num_dropped) == (1, 1)
    life.sent.pop("bad")
    life.ask_again()
    assert not life.run_until_killed(2**40)
    assert len(life.node.output("good")) == 9
    assert list(life.records()) == ["good"]


def test_two_records_that_claim_one_page_are_both_dropped(path: Path) -> None:
    life = Life(path, **SETTINGS)
    for name in ("a", "b"):
        life.ask(name, prompt(0, 9), max_tokens=9)
    while len(life.node.tokens["b"]) < 2:
        life.node.step()
    first, second = (life.node.decode.find((name, 0)) for name in "ab")
    assert first is not None and second is not None
    journal = Journal(life.segment.view("journal"), life.shape)
    for record in journal.recover():
        journal.keep(record)
    journal._forget(second.key)
    second.host_lease.runs = first.host_lease.runs
    journal.begin(second)
    journal.append(second, OutputToken(1))
    life = life.next()
    assert (life.past.num_sequences, life.past.num_dropped) == (0, 2)
    pages = life.node.decode.coordinator.host.pages
    assert pages.num_free == pages.num_total


def test_a_complete_output_without_an_end_ends_at_once(path: Path) -> None:
    life = Life(path, **SETTINGS)
    life.ask("r", prompt(3, 5), max_tokens=3)
    life.journal.end = lambda *_: None  # type: ignore[method-assign]  # killed before it was noted
    assert not life.run_until_killed(2**40)
    assert life.records()["r"].finish is None
    finish: Finish = life.node.finishes.pop("r")
    life = life.next()
    assert life.node.finishes["r"] == finish
    assert life.records()["r"].finish == finish
    assert life.node.decode.is_idle


def test_new_requests_and_old_ones_run_together(path: Path, truth: dict[str, Any]) -> None:
    life = Life(path, **SETTINGS)
    ask_all(life)
    assert life.run_until_killed(truth["num_bytes"] // 2)
    life = life.next()
    life.ask_again()
    life.ask("new", prompt(9, 33), max_tokens=12)
    assert not life.run_until_killed(2**40)
    outcome = life.outcome()
    assert len(outcome.pop("new")[0]) == 12
    assert {name: tokens for name, (tokens, _) in outcome.items()} == {
        name: tokens for name, (tokens, _) in truth["outcome"].items()
    }


def test_reattaching_to_nothing_is_nothing(path: Path) -> None:
    life = Life(path, **SETTINGS)
    result = reattach(life.node.decode, life.journal, life.node.decode.coordinator.index.mirror())
    assert (result.num_sequences, result.num_ended, result.num_dropped) == (0, 0, 0)


class FakeLink:
    """A keeper as the owner sees it."""

    is_alive = True
    is_slow = False
    num_guests = 0

    def num_earlier_guests(self) -> int:
        if self.is_slow or not self.is_alive:
            raise SegmentError("the keeper does not answer")
        return self.num_guests


def aftermath_of(life: Life, link: FakeLink, *, is_fresh: bool = False) -> Aftermath:
    kept = KeptMemory(life.segment, link, life.shape, is_fresh)  # type: ignore[arg-type]
    decode, now = life.node.decode, life.node.clock.now
    watch = KeeperWatch(kept, None, now)
    return Aftermath(kept, watch, decode.coordinator, lambda: decode.num_steps, now)


def test_pages_of_nobody_wait_for_guests_of_the_process_before(
    path: Path, truth: dict[str, Any]
) -> None:
    life = Life(path, **SETTINGS)
    ask_all(life)
    assert life.run_until_killed(truth["num_bytes"] // 2)
    life = life.next()
    link = FakeLink()
    link.num_guests = 2
    aftermath = aftermath_of(life, link)
    host, index = life.node.decode.coordinator.host.pages, life.node.decode.coordinator.index.pages
    assert host.num_free == index.num_free == 0
    assert aftermath.num_kept_back > 0
    for _ in range(50):
        life.node.step()
        aftermath.step()
    assert aftermath.num_kept_back > 0, "never by a timer"
    link.num_guests = 0
    life.node.clock.advance(1.0)
    aftermath.step()
    assert aftermath.num_kept_back == 0
    life.ask_again()
    assert not life.run_until_killed(2**40)
    assert_is_truth(life, truth)


def test_without_a_keeper_nobody_can_say_that_its_guests_are_gone(path: Path) -> None:
    life = Life(path, **SETTINGS)
    link = FakeLink()
    link.num_guests = 1
    aftermath = aftermath_of(life, link)
    link.is_alive = False
    life.node.clock.advance(1.0)
    aftermath.step()
    life.node.clock.advance(MAX_UNKNOWN_S - 1.0)
    aftermath.step()
    assert aftermath.num_kept_back > 0, "another keeper could still come"
    life.node.clock.advance(2.0)
    with pytest.raises(SegmentError, match="kept back"):
        aftermath.step()
    assert aftermath.num_kept_back > 0


def test_pages_are_kept_back_from_the_start_if_the_keeper_does_not_say(path: Path) -> None:
    life = Life(path, **SETTINGS)
    link = FakeLink()
    link.is_slow = True
    aftermath = aftermath_of(life, link)
    assert aftermath.num_kept_back > 0
    link.is_slow = False
    aftermath.step()
    assert aftermath.num_kept_back == 0


def test_a_keeper_that_is_slow_to_answer_is_asked_again(path: Path) -> None:
    life = Life(path, **SETTINGS)
    link = FakeLink()
    link.num_guests = 1
    aftermath = aftermath_of(life, link)
    link.is_slow = True
    life.node.clock.advance(1.0)
    aftermath.step()
    assert aftermath.num_kept_back > 0
    link.is_slow, link.num_guests = False, 0
    life.node.clock.advance(1.0)
    aftermath.step()
    assert aftermath.num_kept_back == 0


def test_fresh_memory_waits_for_nobody(path: Path) -> None:
    link = FakeLink()
    link.num_guests = 1
    assert aftermath_of(Life(path, **SETTINGS), link, is_fresh=True).num_kept_back == 0


def test_a_process_that_has_decoded_some_steps_has_proven_the_memory(path: Path) -> None:
    life = Life(path, **SETTINGS).next()
    aftermath = aftermath_of(life, FakeLink())
    assert life.segment.num_unproven == 2
    life.ask("r", prompt(0, 9), max_tokens=PROOF_STEPS + 2)
    while "r" not in life.node.finishes:
        life.node.step()
        aftermath.step()
    assert life.segment.num_unproven == 0
