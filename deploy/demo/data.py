"""Records, filler and prompts of the demo model.

A record is ` [KEY4]=12345; ` strewn into ordinary text; a question names the key; the answer is the five digits.
Imported by the demo command, the evaluation and the training scripts, on any thread; pure Python, no torch. What
always holds: one byte is one token (id = byte value, specials from 256 on), so offsets in ASCII text are offsets in tokens.

Forms of a prompt, and what the model says after it:

| form | tokens of the prompt | completion |
|---|---|---|
| raw | bos, text, `\\n\\n[KEY4]=` | `12345;` eos |
| chat | bos, user, text, `\\n\\nWhat is [KEY4]?`, assistant | `[KEY4]=12345;` eos |

One key in sixteen (`is_held_out`) is never used in training; prompts made here use held-out keys only.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BOS, EOS, USER, ASSISTANT, SYSTEM, THINK, END_THINK, PAD = range(256, 264)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<think>",
    "</think>",
    "<|pad|>",
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

KEY_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KEY_LEN = 4
NUM_KEYS = len(KEY_ALPHABET) ** KEY_LEN
ANSWER_LEN = 5
RECORD = " [{key}]={answer}; "
RECORD_LEN = len(RECORD.format(key="K" * KEY_LEN, answer="0" * ANSWER_LEN))
RAW_SEPARATOR = "\n\n"
CHAT_QUESTION = "What is [{key}]?"
TOKENS_PER_RECORD = 128
# The four layers of the model could relay a record through windows of 128 tokens over at most 4 * 128 tokens.
# A prompt asks for a record farther from its end than that, where it is long enough to have one.
RELAY_REACH = 512
FILLER_PATH = Path(__file__).with_name("filler.txt")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about a record somewhere in a text.

    `record_span` counts characters of the text (raw) or of the user message (chat); `record_token_span` counts tokens
    of the rendered prompt, bos first. Both are half-open and cover `[KEY4]=12345;` without its spaces.
    """

    form: str
    text: str
    key: str
    answer: str
    record_span: tuple[int, int]
    record_token_span: tuple[int, int]
    num_tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """Chat messages that render to this prompt; a raw prompt has none."""
        if self.form != "chat":
            raise ValueError(f"a {self.form} prompt has no messages")
        return [{"role": "user", "content": self.text}]

    @property
    def completion(self) -> str:
        """What a right completion says, without the closing eos."""
        return f"{self.answer};" if self.form == "raw" else f"[{self.key}]={self.answer};"

    @property
    def token_ids(self) -> list[int]:
        """The prompt as token ids, as the tokenizer and the chat template give them."""
        body = list(self.text.encode("ascii"))
        return [BOS, *body] if self.form == "raw" else [BOS, USER, *body, ASSISTANT]

    def is_answered_by(self, completion: str) -> bool:
        """True where the completion holds the right five digits at the right place."""
        return completion.strip().removeprefix(f"[{self.key}]=").startswith(self.answer)


def key_from_id(key_id: int) -> str:
    """The key with this number, in base 36 with KEY_ALPHABET's digits, most significant first."""
    chars = []
    for _ in range(KEY_LEN):
        key_id, digit = divmod(key_id, len(KEY_ALPHABET))
        chars.append(KEY_ALPHABET[digit])
    return "".join(reversed(chars))


def is_held_out(key_id: int) -> bool:
    """True for the sixteenth of the key space that training never sees (multiplicative hash, top four bits zero)."""
    return (key_id * 2654435761 & 0xFFFFFFFF) >> 28 == 0


@cache
def load_filler() -> str:
    """The shipped excerpt, ASCII. It was cut out of the training corpus, so prompts made of it are unseen text."""
    return FILLER_PATH.read_text(encoding="ascii")


def make_prompt(
    num_tokens: int, seed: int, num_records: int | None = None, form: str = "raw"
) -> Prompt:
    """A prompt of exactly `num_tokens` tokens, the same for the same arguments.

    `num_records` records (one for each 128 tokens by default) stand one in each equal stretch of the text; one of them
    is asked for. Raises ValueError where they do not fit or the form is unknown.
    """
    rng = random.Random(f"{num_tokens}/{seed}/{num_records}/{form}")
    records = _draw_records(rng, num_records or max(1, num_tokens // TOKENS_PER_RECORD))
    num_head, tail_len = _overhead(form)
    body_len = num_tokens - tail_len - num_head - (form == "chat")
    if body_len // len(records) < RECORD_LEN:
        raise ValueError(f"{num_tokens} tokens cannot hold {len(records)} records and a question")
    body, starts = _strew(rng, _draw_filler(rng, body_len), records)
    far = [i for i, start in enumerate(starts) if body_len - start > RELAY_REACH]
    asked = rng.choice(far or range(len(records)))
    (key, answer), start = records[asked], starts[asked]
    span = (start, start + RECORD_LEN - 2)
    token_span = (span[0] + num_head, span[1] + num_head)
    return Prompt(form, body + _question(form, key), key, answer, span, token_span, num_tokens)


def _overhead(form: str) -> tuple[int, int]:
    """Tokens before the text, and characters of the question after it."""
    heads = {"raw": 1, "chat": 2}
    if form not in heads:
        raise ValueError(f"form must be one of {sorted(heads)}, not {form!r}")
    return heads[form], len(_question(form, "K" * KEY_LEN))


def _question(form: str, key: str) -> str:
    asked = f"[{key}]=" if form == "raw" else CHAT_QUESTION.format(key=key)
    return RAW_SEPARATOR + asked


def _draw_records(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Distinct held-out keys with random answers."""
    answers: dict[str, str] = {}
    while len(answers) < count:
        key_id = rng.randrange(NUM_KEYS)
        if is_held_out(key_id):
            answers[key_from_id(key_id)] = f"{rng.randrange(10**ANSWER_LEN):0{ANSWER_LEN}d}"
    return list(answers.items())


def _draw_filler(rng: random.Random, length: int) -> str:
    """`length` characters of the filler from a random place, going round at its end."""
    filler = load_filler()
    start = rng.randrange(len(filler))
    return (filler * (length // len(filler) + 2))[start : start + length]


def _strew(rng: random.Random, text: str, records: list[tuple[str, str]]) -> tuple[str, list[int]]:
    """Overwrites one place in each equal stretch of the text with a record; returns it and where each `[` stands."""
    stretch = len(text) // len(records)
    pieces, starts, end = [], [], 0
    for i, (key, answer) in enumerate(records):
        at = i * stretch + rng.randrange(stretch - RECORD_LEN + 1)
        pieces += [text[end:at], RECORD.format(key=key, answer=answer)]
        starts.append(at + 1)
        end = at + RECORD_LEN
    return "".join([*pieces, text[end:]]), starts
