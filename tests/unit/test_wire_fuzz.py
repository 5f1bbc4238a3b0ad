"""The wire decoder: every message survives the round trip, and nothing else gets in."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common import wire
from tidepool.common.errors import ProtocolError

MESSAGES = wire.Message.__subclasses__()
NESTED = (
    wire.Sampling,
    wire.Region,
    wire.PageRun,
    wire.TokenLogprob,
    wire.OutputToken,
    wire.Load,
)
INTEGERS = st.integers(-(2**63), 2**64 - 1)

st.register_type_strategy(int, INTEGERS)
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(str, st.text(st.characters(codec="utf-8"), max_size=20))
for _struct in (*NESTED, *MESSAGES):
    _fields = {field.name: st.from_type(field.type) for field in msgspec.structs.fields(_struct)}
    st.register_type_strategy(_struct, st.builds(_struct, **_fields))

BODIES = st.one_of([st.from_type(message) for message in MESSAGES])
ENVELOPES = st.builds(
    wire.Envelope,
    sender=st.from_type(str),
    sender_epoch=INTEGERS,
    receiver_epoch=INTEGERS,
    body=BODIES,
)


def is_refused_or_valid(frame: bytes) -> None:
    """Decodes; only ProtocolError may come out, or an Envelope that encodes again."""
    try:
        envelope = wire.decode(frame)
    except ProtocolError as error:
        assert str(len(frame)) in str(error)
        return
    assert isinstance(envelope, wire.Envelope)
    wire.encode(envelope)


def cancel_frame(**changes: object) -> bytes:
    body = {"kind": "cancel", "request_id": "r", "attempt": 0, "reason": "", **changes}
    plain = {"sender": "a", "sender_epoch": 1, "receiver_epoch": 1, "body": body}
    return msgpack.packb({key: value for key, value in plain.items() if value is not None})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: each.__name__)
def test_every_message_survives_the_round_trip(message: type[wire.Message]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.from_type(message))
    def round_trip(body: wire.AnyMessage) -> None:
        envelope = wire.Envelope("a", 1, 2, body)
        assert wire.decode(wire.encode(envelope)) == envelope

    round_trip()


def test_the_union_of_messages_has_all_of_them() -> None:
    assert set(wire.AnyMessage.__args__) == set(MESSAGES)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_protocol_error(frame: bytes) -> None:
    is_refused_or_valid(frame)


@settings(max_examples=300, deadline=None)
@given(ENVELOPES, st.data())
def test_a_mutated_frame_is_a_protocol_error_or_another_message(
    envelope: wire.Envelope, data: st.DataObject
) -> None:
    frame = bytearray(wire.encode(envelope))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if how == "flip":
            frame[at] = data.draw(st.integers(0, 255))
        elif how == "cut" and at:
            del frame[at:]
        elif how == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            frame[at:at] = frame[: at + 1]
    is_refused_or_valid(bytes(frame))


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([each.__struct_config__.tag for each in MESSAGES]), JSON_LIKE)
def test_fields_of_the_wrong_type_are_a_protocol_error(kind: str, value: object) -> None:
    body = {"kind": kind, "request_id": value, "attempt": value, "reason": value}
    is_refused_or_valid(
        msgpack.packb({"sender": "a", "sender_epoch": 1, "receiver_epoch": 1, "body": body})
    )


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a", b"\x81\x91"])
def test_deep_nesting_is_a_protocol_error(depth: int, opener: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(opener * depth)
    start = msgpack.packb({"sender": "a", "sender_epoch": 1, "receiver_epoch": 1})
    with pytest.raises(ProtocolError):
        wire.decode(b"\x84" + start[1:] + b"\xa4body" + opener * depth)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "no such kind"},
        {"kind": 7},
        {"kind": None},
        {"attempt": 2.5},
        {"attempt": "0"},
        {"attempt": True},
        {"attempt": None},
        {"request_id": b"r"},
        {"extra": 1},
    ],
)
def test_an_unknown_kind_or_a_wrong_field_is_a_protocol_error(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(cancel_frame(**changes))


@pytest.mark.parametrize(
    "frame", [b"\xcf" + b"\xff" * 8, b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_lengths_beyond_the_frame_are_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(frame)


def test_text_that_is_not_utf_8_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        wire.decode(cancel_frame(reason="x").replace(b"\xa6reason\xa1x", b"\xa6reason\xa1\xff"))


def test_bytes_behind_the_message_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        wire.decode(cancel_frame() + b"\x00")


def test_checksums_use_all_64_bits() -> None:
    chunk = wire.Chunk(1, 0, 1, 0, 1, 0, 1, (2**64 - 1,))
    assert wire.decode(wire.encode(wire.Envelope("a", 1, 1, chunk))).body == chunk
