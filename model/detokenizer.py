"""Turns output tokens into text piece by piece, never half a character.

One object a request, used by one thread at a time. The pieces and `flush` together are what decoding
all tokens at once gives, also where a model writes bytes that are not UTF-8. (tokenizers' own
DecodeStream raises on some of those.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_HELD = 8
"""Tokens held back behind an unfinished character before a cut inside them is sought."""
_MAX_CHARACTER_TOKENS = 4
"""A UTF-8 character has at most four bytes, so at most four tokens."""


class Detokenizer:
    """Keeps two windows of tokens: context whose text is out, and tokens whose text is not.

    Decoding starts at the context, because decoders treat the first token of a text differently
    (a leading space may vanish).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_context = 0

    def push(self, token_id: int) -> str:
        """Returns the text that became certain with this token; "" inside a character."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith(_REPLACEMENT):
            return self._emit(text, len(self._ids))
        if len(self._ids) - self._num_context <= _MAX_HELD:
            return ""
        return self._emit_before_cut(text)

    def flush(self) -> str:
        """Returns what is left; the object starts anew."""
        text = self._decode(self._ids)[self._num_known_characters() :]
        self._ids, self._num_context = [], 0
        return text

    def _emit_before_cut(self, text: str) -> str:
        """A run of invalid bytes ends nowhere: emits up to a token no character reaches across."""
        end = len(self._ids)
        for cut in range(end - 1, end - 1 - _MAX_CHARACTER_TOKENS, -1):
            head, tail = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            # A tail without text (special tokens) does not show that a character ended before it.
            if tail and head + tail == text:
                return self._emit(head, cut)
        return ""

    def _emit(self, text: str, num_tokens: int) -> str:
        """`text` decodes the first `num_tokens`, which become context; the old context is dropped."""
        piece = text[self._num_known_characters() :]
        del self._ids[: self._num_context]
        self._num_context = num_tokens - self._num_context
        return piece

    def _num_known_characters(self) -> int:
        return len(self._decode(self._ids[: self._num_context]))
