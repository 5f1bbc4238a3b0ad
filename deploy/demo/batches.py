"""Training batches of the demo model, made on the training device out of the corpus and random records.

The forms are those of data.py, with more than one question a sequence, so that a batch teaches more: raw questions
follow each other (each answer ends with eos), chat questions are turns of one conversation. Keys are drawn from the
part of the key space that is not held out. Called by train.py on its one thread; no synchronisation with the device.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from . import data

# What a target token is for: not trained on, ordinary text, part of an answer.
IGNORED, TEXT, ANSWER = 0, 1, 2
GROUPS_PER_BATCH = 4
FORMS = ("raw", "chat_user", "chat_system")
FORM_WEIGHTS = (0.5, 0.35, 0.15)
SEPARATORS = (data.RAW_SEPARATOR, data.RAW_SEPARATOR, "\n", " ")
QUESTIONS = (data.CHAT_QUESTION, data.CHAT_QUESTION, "[{key}]?", "Which number is [{key}]?")
# Share of raw sequences without bos, so that a prompt that a client tokenized without it works too.
NO_BOS_SHARE = 0.1
MAX_QUESTIONS, MAX_RECORDS = 16, 80
# Room that each question and each record is counted with when a sequence's numbers of them are drawn.
QUESTION_TOKENS, RECORD_TOKENS = {"raw": 24, "chat_user": 48, "chat_system": 48}, 22


@dataclass(slots=True)
class Batch:
    """Token sequences [B, T] with their next tokens and what each of those is for (int8 [B, T]).

    `digit_index` [questions, 5] holds flat positions (into N = B * T) at which an answer's digits are predicted;
    `special` [B, T] marks records, questions and answers.
    """

    inputs: Tensor
    targets: Tensor
    purpose: Tensor
    digit_index: Tensor
    special: Tensor


class BatchMaker:
    """Draws batches; the same seed gives the same batches on the same device."""

    def __init__(self, corpus: bytes, seed: int, device: torch.device) -> None:
        self.device = device
        self.choices = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.corpus = self._bytes(corpus).to(torch.uint8)
        self.alphabet = self._bytes(data.KEY_ALPHABET.encode())
        ids = torch.arange(data.NUM_KEYS, device=device)
        held_out = ((ids * 2654435761) & 0xFFFFFFFF) >> 28 == 0
        self.key_ids = ids[~held_out]

    def make(self, num_tokens: int, length: int) -> Batch:
        """A batch of num_tokens / length sequences in GROUPS_PER_BATCH groups of one shape each."""
        num_sequences = num_tokens // length
        groups = min(GROUPS_PER_BATCH, num_sequences)
        sizes = [num_sequences // groups + (i < num_sequences % groups) for i in range(groups)]
        parts, offset = [], 0
        for size in sizes:
            tokens, purpose, columns = self._group(size, length + 1)
            rows = torch.arange(offset, offset + size, device=self.device) * length
            parts.append((tokens, purpose, (rows[:, None, None] + columns - 1).flatten(0, 1)))
            offset += size
        tokens, purpose, digit_index = (torch.cat(part) for part in zip(*parts, strict=True))
        special = purpose[:, :-1] != TEXT
        return Batch(tokens[:, :-1], tokens[:, 1:], purpose[:, 1:], digit_index, special)

    def _group(self, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and purposes [size, length], and the columns of the answers' digits [questions, 5]."""
        form = self.choices.choices(FORMS, FORM_WEIGHTS)[0]
        most_questions = min(MAX_QUESTIONS, length // 2 // QUESTION_TOKENS[form])
        num_questions = self.choices.randint(1, max(1, most_questions))
        most_records = min(MAX_RECORDS, length // 2 // RECORD_TOKENS)
        num_records = self.choices.randint(num_questions, max(num_questions, most_records))
        keys, answers = self._records(size, num_records)
        order = self._rand(size, num_records).argsort(1)[:, :num_questions, None]
        asked = [t.gather(1, order.expand(-1, -1, t.shape[2])).unbind(1) for t in (keys, answers)]
        head = self._head(form)
        tail = self._tail(form, list(zip(*asked, strict=True)))
        text_len = length - len(head) - sum(_width(piece) for piece, _ in tail)
        text, text_purpose = self._text(size, text_len, keys, answers)
        pieces = [(self._const(head, size), IGNORED), (text, text_purpose)]
        pieces += [(self._const(p, size) if isinstance(p, list) else p, kind) for p, kind in tail]
        return self._join(pieces, size)

    def _join(self, pieces: list, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Puts pieces side by side; a piece of five answer tokens is a run of digits."""
        purposes, digits, column = [], [], 0
        for tokens, kind in pieces:
            width = tokens.shape[1]
            filled = (
                torch.full((size, width), kind, device=self.device, dtype=torch.int8)
                if isinstance(kind, int)
                else kind
            )
            purposes.append(filled)
            if width == data.ANSWER_LEN and isinstance(kind, int) and kind == ANSWER:
                digits.append(torch.arange(column, column + width, device=self.device))
            column += width
        tokens = torch.cat([tokens for tokens, _ in pieces], 1)
        return tokens, torch.cat(purposes, 1), torch.stack(digits)

    def _head(self, form: str) -> list[int]:
        if form == "raw":
            return [] if self.choices.random() < NO_BOS_SHARE else [data.BOS]
        return [data.BOS, data.USER if form == "chat_user" else data.SYSTEM]

    def _tail(self, form: str, asked: list[tuple[Tensor, Tensor]]) -> list:
        """Questions and answers as (list of token ids or tensor [size, width], purpose)."""
        if form == "raw":
            separator = self.choices.choice(SEPARATORS)
            return [piece for key, answer in asked for piece in _raw_turn(separator, key, answer)]
        question = self.choices.choice(QUESTIONS)
        pieces: list = []
        for i, (key, answer) in enumerate(asked):
            first_in_message = form == "chat_user" and i == 0
            start = list(data.RAW_SEPARATOR.encode()) if first_in_message else [data.USER]
            pieces += _chat_turn(start, question, key, answer)
        return pieces

    def _text(self, size: int, length: int, keys: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Corpus text with the records in it, one at a random place of each equal stretch."""
        num_records = keys.shape[1]
        starts = self._randint(len(self.corpus) - length, (size, 1))
        text = self.corpus[starts + torch.arange(length, device=self.device)].long()
        purpose = torch.full_like(text, TEXT, dtype=torch.int8)
        records = self._record_bytes(keys, answers)
        stretch = length // num_records
        at = self._randint(stretch - data.RECORD_LEN + 1, (size, num_records))
        at = at + torch.arange(num_records, device=self.device) * stretch
        columns = (at[..., None] + torch.arange(data.RECORD_LEN, device=self.device)).flatten(1)
        text.scatter_(1, columns, records.flatten(1))
        return text, purpose.scatter_(1, columns, IGNORED)

    def _records(self, size: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys [size, count, 4] and answers [size, count, 5] as bytes."""
        ids = self.key_ids[self._randint(len(self.key_ids), (size, count))][..., None]
        base = len(data.KEY_ALPHABET)
        powers = base ** torch.arange(data.KEY_LEN - 1, -1, -1, device=self.device)
        keys = self.alphabet[ids // powers % base]
        return keys, self._randint(10, (size, count, data.ANSWER_LEN)) + ord("0")

    def _record_bytes(self, keys: Tensor, answers: Tensor) -> Tensor:
        before, middle, after = (
            self._bytes(text.encode()).expand(*keys.shape[:2], -1) for text in (" [", "]=", "; ")
        )
        return torch.cat((before, keys, middle, answers, after), 2)

    def _const(self, tokens: list[int], size: int) -> Tensor:
        return torch.tensor(tokens, device=self.device, dtype=torch.long).expand(size, -1)

    def _bytes(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device).long()

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def _randint(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)


def _width(piece: list[int] | Tensor) -> int:
    return len(piece) if isinstance(piece, list) else piece.shape[1]


def _raw_turn(separator: str, key: Tensor, answer: Tensor) -> list:
    return [
        (list(f"{separator}[".encode()), IGNORED),
        (key, IGNORED),
        (list(b"]="), IGNORED),
        (answer, ANSWER),
        ([ord(";"), data.EOS], ANSWER),
    ]


def _chat_turn(start: list[int], question: str, key: Tensor, answer: Tensor) -> list:
    before, after = question.encode().split(b"{key}")
    return [
        (start + list(before), IGNORED),
        (key, IGNORED),
        ([*after, data.ASSISTANT], IGNORED),
        ([ord("[")], ANSWER),
        (key, ANSWER),
        (list(b"]="), ANSWER),
        (answer, ANSWER),
        ([ord(";"), data.EOS], ANSWER),
    ]
