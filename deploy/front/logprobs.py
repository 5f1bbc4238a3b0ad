"""Log-probabilities of tokens in the two shapes OpenAI has for them.

-inf and NaN become -9999, as vLLM and OpenAI do: JSON has no word for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...common import wire
from .openai_responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from .ports import Tokenizer

LOWEST = -9999.0


def completion_logprobs(
    tokens: Sequence[wire.OutputToken], num_top: int, tokenizer: Tokenizer, offset: int
) -> CompletionLogprobs:
    """Shape of /v1/completions. `offset`: characters of token text in front of `tokens`."""
    texts = [tokenizer.decode([token.token_id]) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[_chosen(token) for token in tokens],
        top_logprobs=[
            _top_dict(token, text, num_top, tokenizer)
            for token, text in zip(tokens, texts, strict=True)
        ],
        text_offset=offsets,
    )


def chat_logprobs(
    tokens: Sequence[wire.OutputToken], num_top: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    """Shape of /v1/chat/completions."""
    content = []
    for token in tokens:
        text = tokenizer.decode([token.token_id])
        top = [
            TopLogprob(token=t, logprob=value, bytes=_bytes(t))
            for t, value in _top(token, num_top, tokenizer)
        ]
        content.append(
            ChatLogprob(token=text, logprob=_chosen(token), bytes=_bytes(text), top_logprobs=top)
        )
    return ChatLogprobs(content=content, refusal=None)


def _top_dict(
    token: wire.OutputToken, text: str, num_top: int, tokenizer: Tokenizer
) -> dict[str, float]:
    """The best tokens and the chosen one; of equal texts the better one counts."""
    best: dict[str, float] = {}
    for top_text, value in _top(token, num_top, tokenizer):
        best.setdefault(top_text, value)
    best.setdefault(text, _chosen(token))
    return best


def _top(
    token: wire.OutputToken, num_top: int, tokenizer: Tokenizer
) -> Iterable[tuple[str, float]]:
    found = token.logprob
    if found is None:
        return
    pairs = zip(found.top_ids, found.top_logprobs, strict=False)
    for token_id, value in list(pairs)[:num_top]:
        yield tokenizer.decode([token_id]), _finite(value)


def _chosen(token: wire.OutputToken) -> float:
    return _finite(token.logprob.logprob) if token.logprob is not None else LOWEST


def _finite(value: float) -> float:
    return value if math.isfinite(value) and value > LOWEST else LOWEST


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", errors="replace"))
