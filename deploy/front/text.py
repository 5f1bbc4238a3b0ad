"""The text of one output: detokenised as tokens come, cut at the first stop string.

Used by one choice, on the asyncio loop. Text that may still turn out to be the beginning of a stop
string is held back; what was released never changes. A stop string may span tokens; of those that
complete at the same character the longest counts. Stop strings are not part of the output. Text of
the first `min_tokens` tokens is not searched.
"""

from __future__ import annotations

from collections.abc import Sequence

from .ports import Decoder


class StopString:
    """Finds one string in text that comes character by character (Knuth-Morris-Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def push(self, character: str) -> bool:
        """Returns whether the string is complete with this character."""
        while self.num_matched and self.text[self.num_matched] != character:
            self.num_matched = self._borders[self.num_matched - 1]
        if self.text[self.num_matched] == character:
            self.num_matched += 1
        return self.num_matched == len(self.text)


class OutputText:
    """Turns tokens into text.

    Attributes:
        is_stopped: a stop string was found; no more text will come.
        text: everything released so far.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.is_stopped = False
        self._decoder = decoder
        self._stops = [StopString(text) for text in stop]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now."""
        if self.is_stopped:
            return ""
        self._num_tokens += 1
        return self._feed(self._decoder.push(token_id))

    def finish(self) -> str:
        """Returns the rest: the output has ended."""
        if self.is_stopped:
            return ""
        rest = self._feed(self._decoder.flush())
        if self.is_stopped:
            return rest
        rest += self._held
        self._pieces.append(self._held)
        self._held = ""
        return rest

    def _feed(self, text: str) -> str:
        if not self._stops or self._num_tokens < self._min_tokens:
            return self._release(text, len(self._held) + len(text))
        for index, character in enumerate(text):
            complete = [len(stop.text) for stop in self._stops if stop.push(character)]
            if complete:
                self.is_stopped = True
                seen = len(self._held) + index + 1
                return self._release(text, seen - max(complete))
        keep = max(stop.num_matched for stop in self._stops)
        return self._release(text, len(self._held) + len(text) - keep)

    def _release(self, text: str, count: int) -> str:
        """Releases the first `count` characters of what is held plus `text`, holds the rest."""
        pending = self._held + text
        self._held = "" if self.is_stopped else pending[count:]
        if count:
            self._pieces.append(pending[:count])
        return pending[:count]


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders
