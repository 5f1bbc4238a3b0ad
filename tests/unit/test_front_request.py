"""One request at the front: indices, gaps, losses, bounds; driven by hand with a fake clock."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers.front import (
    EOS,
    MODEL,
    PAIR,
    TWO_PAIRS,
    finish_of,
    letters,
    make_config,
    tokens_of,
)

from tidepool.common import wire
from tidepool.common.errors import InvariantError, RequestError
from tidepool.deploy.front.attempt import Bounds
from tidepool.deploy.front.request import FrontRequest, RequestState
from tidepool.deploy.front.router import Route

ROUTE = Route(*PAIR)
OTHER = Route(TWO_PAIRS[2], TWO_PAIRS[3])
PROMPT = (1, 2, 3)


def make(max_tokens: int = 8, **fields) -> FrontRequest:
    return FrontRequest(
        "r",
        PROMPT,
        wire.Sampling(max_tokens=max_tokens, seed=5, **fields),
        front_id="front-0",
        model=MODEL,
        bounds=Bounds.of(make_config(front={"max_attempts": 3})),
        now_s=0.0,
        notify=lambda: None,
    )


def started(max_tokens: int = 8, **fields) -> tuple[FrontRequest, wire.Submit]:
    request = make(max_tokens, **fields)
    (send,) = request.submit(ROUTE, 0.0)
    return request, send.message


def ids(request: FrontRequest) -> list[int]:
    return [token.token_id for token in request.tokens]


def test_submit_goes_to_prefill_and_names_decode():
    request = make()
    (send,) = request.submit(ROUTE, 0.0)
    assert send.node_id == "prefill-0"
    assert send.message.decode_id == "decode-0"
    assert send.message.decode_address == "tcp://fake/decode-0"
    assert send.message.attempt == 1


def test_a_unified_node_gets_no_decode_address():
    (send,) = make().submit(Route(PAIR[1], PAIR[1]), 0.0)
    assert (send.node_id, send.message.decode_id, send.message.decode_address) == (
        "decode-0",
        "",
        "",
    )


def test_tokens_in_order_then_finish_end_the_request():
    request, submit = started(3)
    for index, token in enumerate((7, 8)):
        assert request.on_tokens(tokens_of(submit, index, [token]), 1.0) == []
    request.on_finish(finish_of(submit, 2, "stop"), 1.0)
    assert (ids(request), request.finish_reason) == ([7, 8], "stop")


def test_duplicates_are_dropped():
    request, submit = started()
    for first, tokens in ((0, [1, 2]), (0, [1, 2]), (1, [2, 3]), (0, [1])):
        request.on_tokens(tokens_of(submit, first, tokens), 1.0)
    assert ids(request) == [1, 2, 3]


def test_a_gap_asks_decode_to_resume_from_the_missing_index():
    request, submit = started()
    request.on_tokens(tokens_of(submit, 0, [1]), 1.0)
    (send,) = request.on_tokens(tokens_of(submit, 3, [4]), 1.0)
    assert send.node_id == "decode-0"
    assert send.message == wire.Resume("r", 1, 1, "front-0")
    assert request.on_tokens(tokens_of(submit, 4, [5]), 1.05) == []
    (again,) = request.on_tick(1.2)
    assert again.message.next_index == 1
    request.on_tokens(tokens_of(submit, 1, [2, 3, 4, 5]), 1.3)
    assert ids(request) == [1, 2, 3, 4, 5]
    assert request.on_tick(1.4) == []


def test_a_finish_ahead_of_its_tokens_waits_for_them():
    request, submit = started()
    (send,) = request.on_finish(finish_of(submit, 2, "stop"), 1.0)
    assert isinstance(send.message, wire.Resume)
    assert not request.is_ended
    request.on_tokens(tokens_of(submit, 0, [1, 2]), 1.1)
    assert (ids(request), request.finish_reason) == ([1, 2], "stop")


def test_a_gap_that_never_closes_loses_the_attempt():
    request, submit = started()
    request.on_tokens(tokens_of(submit, 2, [1]), 1.0)
    now = 1.0
    while request.state is RequestState.RUNNING:
        now += 0.1
        request.on_tokens(tokens_of(submit, 3, [1]), now)
        if request.state is RequestState.RUNNING:
            request.on_tick(now)
    assert now < 2.0
    assert request.losses == ["gap"]


def test_a_lost_attempt_continues_with_prompt_and_tokens_so_far():
    request, submit = started(8, min_tokens=5)
    request.on_tokens(tokens_of(submit, 0, [10, 11]), 1.0)
    sends = request.on_lost("decode-0", 1, "silent", 1.0)
    assert {(s.node_id, type(s.message)) for s in sends} == {
        ("prefill-0", wire.Cancel),
        ("decode-0", wire.Cancel),
    }
    (send,) = request.submit(OTHER, 1.0)
    again = send.message
    assert again.attempt == 2
    assert again.prompt_token_ids == (*PROMPT, 10, 11)
    assert (again.sampling.max_tokens, again.sampling.min_tokens) == (6, 3)
    assert again.sampling.seed == submit.sampling.seed
    request.on_tokens(tokens_of(again, 0, [12]), 1.0)
    assert ids(request) == [10, 11, 12]


def test_the_loss_of_prefill_matters_only_before_the_first_token():
    request, submit = started()
    assert request.on_lost("prefill-0", 2, "another epoch", 1.0) == []
    request.on_tokens(tokens_of(submit, 0, [1]), 1.0)
    assert request.on_lost("prefill-0", 1, "gone", 1.0) == []
    assert request.state is RequestState.RUNNING
    other, _ = started()
    other.on_lost("prefill-0", 1, "gone", 1.0)
    assert other.state is RequestState.WAITING


def test_a_cut_session_is_waited_for_only_once_decode_has_sent_tokens():
    early, _ = started()
    early.on_cut("decode-0", 1, "reset", 1.0)
    assert early.state is RequestState.WAITING
    request, submit = started()
    request.on_tokens(tokens_of(submit, 0, [97, 98]), 1.0)
    assert request.on_cut("decode-0", 1, "reset", 1.0) == []
    assert request.on_back("decode-0", 2, 1.2) == []
    (send,) = request.on_back("decode-0", 1, 1.2)
    assert isinstance(send.message, wire.Resume)
    request.on_cut("decode-0", 1, "reset", 2.0)
    request.on_tick(2.0 + request._bounds.reconnect_s + 0.1)
    assert (request.state, request.losses) == (RequestState.WAITING, ["node_lost"])


def test_a_hand_off_that_failed_avoids_both_of_its_ends():
    request, submit = started()
    finish = finish_of(submit, 0, "error", status=503, code="handoff_failed", can_retry=True)
    request.on_finish(finish, 1.0)
    assert request.avoid == {"prefill-0", "decode-0"}


def test_messages_of_an_old_attempt_are_not_expected():
    request, submit = started()
    old = tokens_of(submit, 0, [1])
    request.on_lost("decode-0", 1, "silent", 1.0)
    assert not request.expects(old, "decode-0", 1)
    (send,) = request.submit(OTHER, 1.0)
    new = tokens_of(send.message, 0, [1])
    assert not request.expects(old, "decode-0", 1)
    assert not request.expects(new, "decode-1", 2)
    assert not request.expects(new, "prefill-1", 1)
    assert request.expects(new, "decode-1", 1)


def test_prefill_can_end_an_attempt_only_before_its_first_token():
    request, submit = started()
    finish = finish_of(submit, 0, "error", can_retry=True)
    assert request.expects(finish, "prefill-0", 1)
    request.on_tokens(tokens_of(submit, 0, [1]), 0.0)
    assert not request.expects(finish, "prefill-0", 1)
    assert request.expects(finish, "decode-0", 1)


def test_the_last_attempt_ends_with_the_nodes_own_error():
    request = make()
    for attempt in range(3):
        (send,) = request.submit(ROUTE, float(attempt))
        finish = finish_of(
            send.message, 0, "error", status=429, code="full", detail="busy", can_retry=True
        )
        request.on_finish(finish, float(attempt))
    assert request.error is not None
    assert (request.error.status, request.error.code) == (429, "full")
    assert request.error.retry_after_s is not None


def test_an_error_that_cannot_be_retried_ends_at_once():
    request, submit = started()
    request.on_finish(finish_of(submit, 0, "error", status=400, code="x", detail="no"), 0.0)
    assert request.error is not None and request.error.status == 400
    assert request.attempts == 1


def test_an_impossible_status_of_a_node_becomes_500():
    request, submit = started()
    request.on_finish(finish_of(submit, 0, "error", status=200, detail="?"), 0.0)
    assert request.error is not None and request.error.status == 500


def test_silence_loses_the_attempt_and_later_the_request():
    request, submit = started()
    request.on_tokens(tokens_of(submit, 0, [1]), 0.5)
    (probe,) = request.on_tick(1.0)
    assert isinstance(probe.message, wire.Resume)
    request.on_tick(1.6)
    assert request.losses == ["stall"]
    request.on_tick(1.6 + request._bounds.recovery_wait_s)
    assert request.error is None
    request.on_tick(1.7 + request._bounds.recovery_wait_s)
    assert request.error is not None and request.error.status == 503


def test_an_empty_answer_is_a_sign_of_life():
    request, submit = started()
    request.on_tokens(tokens_of(submit, 0, [1]), 0.0)
    for tick in range(1, 30):
        request.on_tokens(tokens_of(submit, 1, []), tick * 0.3)
        request.on_tick(tick * 0.3)
    assert request.losses == []


def test_the_first_token_may_take_as_long_as_the_hand_off():
    request, _ = started()
    request.on_tick(2.9)
    assert request.state is RequestState.RUNNING
    request.on_tick(3.1)
    assert request.state is RequestState.WAITING


def test_waiting_for_a_node_is_bounded():
    request = make()
    request.on_tick(0.4)
    assert not request.is_ended
    request.on_tick(0.6)
    assert request.error is not None
    assert (request.error.status, request.error.code) == (503, "no_node")
    assert request.error.retry_after_s is not None


def test_a_request_whose_tokens_are_complete_is_not_run_again():
    full, submit = started(2)
    full.on_tokens(tokens_of(submit, 0, [1, 2]), 0.0)
    assert full.finish_reason == "length"
    ended, submit = started(8)
    ended.on_tokens(tokens_of(submit, 0, [1, EOS]), 0.0)
    ended.on_lost("decode-0", 1, "gone", 0.0)
    assert ended.finish_reason == "stop"
    ignoring, submit = started(8, ignore_eos=True)
    ignoring.on_tokens(tokens_of(submit, 0, [1, EOS]), 0.0)
    ignoring.on_lost("decode-0", 1, "gone", 0.0)
    assert ignoring.state is RequestState.WAITING


def test_tokens_outside_the_vocabulary_lose_the_attempt():
    request, submit = started()
    request.on_tokens(tokens_of(submit, 0, [MODEL.vocab_size]), 0.0)
    assert (request.losses, ids(request)) == (["bad_token"], [])


def test_more_tokens_than_asked_for_are_cut():
    request, submit = started(2)
    request.on_tokens(tokens_of(submit, 0, [1, 2, 3, 4]), 0.0)
    assert (ids(request), request.finish_reason) == ([1, 2], "length")


def test_failing_cancels_on_both_nodes_once():
    request, _ = started()
    sends = request.fail(RequestError("gone", status=499))
    assert [send.node_id for send in sends] == ["prefill-0", "decode-0"]
    with pytest.raises(InvariantError):
        request.fail(RequestError("again"))


def test_a_node_that_failed_the_request_is_given_a_pause():
    request, submit = started()
    finish = finish_of(submit, 0, "error", status=503, can_retry=True)
    request.on_finish(finish, 1.0)
    assert not request.may_use(ROUTE, 1.1)
    assert request.may_use(ROUTE, 1.3)
    assert request.may_use(OTHER, 1.0)


@hypothesis.given(
    messages=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=40),
    lost_at=st.sets(st.integers(0, 39), max_size=2),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_however_messages_come_the_tokens_are_a_prefix_of_the_truth(messages, lost_at):
    truth = letters(5, len(PROMPT), 10)
    request, submit = started(10)
    for step, (first, count) in enumerate(messages):
        if request.is_ended:
            break
        if step in lost_at:
            request.on_lost("decode-0", 1, "gone", 0.0)
            if request.state is not RequestState.WAITING:
                break
            (send,) = request.submit(ROUTE, 0.0)
            submit = send.message
        done = len(submit.prompt_token_ids) - len(PROMPT)
        request.on_tokens(tokens_of(submit, first, truth[done:][first : first + count]), 0.0)
        assert ids(request) == truth[: len(request.tokens)]
