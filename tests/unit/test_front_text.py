"""Text of an output: characters across tokens, stop strings across tokens."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers.front import EOS, ByteDecoder

from tidepool.deploy.front.text import OutputText


def feed(data: bytes, stop: list[str], min_tokens: int = 0) -> tuple[str, OutputText, int]:
    text = OutputText(ByteDecoder(), stop, min_tokens)
    released = ""
    count = 0
    for byte in data:
        count += 1
        released += text.push(byte)
        if text.is_stopped:
            return released, text, count
    return released + text.finish(), text, count


def test_characters_come_whole():
    text = OutputText(ByteDecoder())
    assert [text.push(byte) for byte in "a\u00e9\u20ac".encode()] == [
        "a",
        "",
        "\u00e9",
        "",
        "",
        "\u20ac",
    ]
    assert text.finish() == ""
    assert text.text == "a\u00e9\u20ac"


def test_an_unfinished_character_comes_out_at_the_end():
    text = OutputText(ByteDecoder(), ["x"])
    text.push(0xC3)
    assert text.finish() == "\ufffd"


def test_special_tokens_have_no_text():
    text = OutputText(ByteDecoder(), ["x"])
    assert text.push(EOS) == ""


@pytest.mark.parametrize(
    ("data", "stop", "expected"),
    [
        ("hello world", ["o w"], "hell"),
        ("hello", ["hello"], ""),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["yz", "xyz"], ""),
        ("one two", ["two", "e"], "on"),
        ("abcab", ["abx"], "abcab"),
        ("\u20ac\u20ac!", ["\u20ac!"], "\u20ac"),
    ],
)
def test_the_output_ends_in_front_of_the_first_stop_string(data, stop, expected):
    released, text, _ = feed(data.encode(), stop)
    assert released == text.text == expected
    assert text.is_stopped == (expected != data)


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    text = OutputText(ByteDecoder(), ["END"])
    assert [text.push(ord(c)) for c in "aEbEN"] == ["a", "", "Eb", "", ""]
    assert text.push(ord("E")) == "EN"
    assert text.finish() == "E"


def test_a_found_stop_string_ends_everything():
    text = OutputText(ByteDecoder(), ["b"])
    text.push(ord("b"))
    assert (text.push(ord("c")), text.finish(), text.text) == ("", "", "")


def test_stop_strings_are_not_looked_for_below_min_tokens():
    released, _, count = feed(b"ababab", ["b"], min_tokens=4)
    assert (released, count) == ("aba", 4)


@hypothesis.given(
    data=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_the_text_is_what_a_search_over_the_whole_output_gives(data, stop):
    ends = [
        (end, end - len(s))
        for end in range(1, len(data) + 1)
        for s in stop
        if data[:end].endswith(s)
    ]
    first_end = min((end for end, _ in ends), default=None)
    begin = min((b for end, b in ends if end == first_end), default=len(data))
    released, text, count = feed(data.encode(), stop)
    assert released == text.text == data[:begin]
    assert text.is_stopped == (first_end is not None)
    assert count == (first_end or len(data))
