"""Text to tokens and back, and conversations to prompts. Offline; runs no code of a checkpoint.

Loaded by the front (and by tools); `encode`, `decode` and `render_chat` may run on several threads
at once. A directory without a tokenizer is fine: requests then carry token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.errors import CheckpointError, RequestError
from .chat import ChatTemplate, normalize_messages
from .chat_deepseek_v32 import encode_conversation
from .config import Architecture
from .detokenizer import Detokenizer


class Tokenizer:
    """The tokenizer of a checkpoint, and its way to write a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, architecture: Architecture) -> None:
        self._backend = tokenizer.backend_tokenizer
        # Set once: transformers' own calls set and reset these, which is not safe on threads.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._template = _chat_template(tokenizer)
        self._architecture = architecture

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it count as such.

        `add_special_tokens`: what the checkpoint puts around a text (bos); a rendered conversation
        brings its own. RequestError for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not valid Unicode: {error}") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; ids the tokenizer does not know are left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def decoder(self) -> Detokenizer:
        """Decodes one output piece by piece."""
        return Detokenizer(self.decode)

    @property
    def has_chat(self) -> bool:
        return self._template is not None or self._has_own_encoder

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        response_format: dict[str, Any] | None = None,
    ) -> list[int]:
        """Prompt of a conversation in OpenAI's form, up to where the assistant's answer begins.

        The checkpoint's Jinja template if it has one; else the published rules of DeepSeek-V3.2
        (the only one that reads `response_format`; `kwargs` may hold "thinking"). RequestError 400
        if there is neither, or if the conversation does not fit.
        """
        return self.encode(
            self.render_text(messages, tools, kwargs, response_format=response_format),
            add_special_tokens=False,
        )

    def render_text(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        response_format: dict[str, Any] | None = None,
    ) -> str:
        """As `render_chat`, before tokenization."""
        if not self.has_chat:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        kwargs = dict(kwargs or {})
        messages = normalize_messages(messages)
        if self._template is not None:
            return self._template.render(messages, tools, kwargs)
        is_thinking = bool(kwargs.get("thinking", kwargs.get("enable_thinking", False)))
        return encode_conversation(
            messages, tools=tools, response_format=response_format, is_thinking=is_thinking
        )

    @property
    def _has_own_encoder(self) -> bool:
        return self._architecture == "DeepseekV32ForCausalLM"


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """`tokenizer` is None where the directory has none; `reason` then says what is missing."""

    tokenizer: Tokenizer | None
    reason: str = ""


def load_tokenizer(path: str | Path, architecture: Architecture) -> LoadedTokenizer:
    """Loads the tokenizer of a checkpoint directory.

    Only tokenizer.json is accepted. CheckpointError if the files are there and cannot be used.
    """
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        return LoadedTokenizer(None, f"{path} has no tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise CheckpointError(f"cannot load the tokenizer of {path}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"the tokenizer of {path} does not use its tokenizer.json")
    return LoadedTokenizer(Tokenizer(tokenizer, architecture))


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Template text of chat_template.jinja or tokenizer_config.json, or of a set of named ones."""
    source = tokenizer.chat_template
    if not source:
        return None
    named = source if isinstance(source, dict) else {"default": source}
    if "default" not in named:
        return None
    return ChatTemplate(named["default"], named.get("tool_use"), tokenizer.special_tokens_map)
