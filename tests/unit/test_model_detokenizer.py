"""Streaming text: pieces join to the whole decode and never hold half a character."""

from __future__ import annotations

import pytest
from helpers.tiny_tokenizer import write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidepool.model.detokenizer import Detokenizer
from tidepool.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = write_tokenizer(tmp_path_factory.mktemp("bytes"))
    return load_tokenizer(path, "GlmMoeDsaForCausalLM").tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back_in_whole_characters(tokenizer, text):
    parts = pieces(tokenizer, list(text.encode()))
    assert "".join(parts) == text
    assert parts[-1] == "" or parts[-1].endswith("\ufffd")
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(ids=st.lists(st.sampled_from([0x41, 0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 257])))
@settings(max_examples=300, deadline=None)
@example(ids=[0xFF] * 100)
@example(ids=[0xE2] * 50 + [0x82, 0xAC])
@example(ids=[0xF0, 0x9F, 0x98] * 20)
@example(ids=[257] * 40 + [0x41])
@example(ids=[0xFF] * 6 + [0xC3, 257, 257, 257, 0x80])
def test_bytes_that_are_no_text_decode_as_they_do_at_once(tokenizer, ids):
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_endless_invalid_bytes_are_not_held_back(tokenizer):
    parts = pieces(tokenizer, [0xFF] * 200)
    assert max(len(part) for part in parts) <= 10


def test_a_leading_space_that_a_decoder_drops_is_dropped_once():
    words = {0: " a", 1: " b", 2: " c"}
    decoder = Detokenizer(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [decoder.push(i) for i in (0, 1, 2)] == ["a", " b", " c"]
    assert decoder.flush() == ""
