"""What the front needs from others: the control plane and the tokenizer, as small protocols.

`Control` is what transfer/control.py offers to a front; `Tokenizer` is what model/tokenizer.py
offers. Tests put fakes in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...common import wire


class Peer(Protocol):
    """One incarnation of a node, as the control plane names it."""

    @property
    def node_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...


class Control(Protocol):
    """The control plane. Every method may be called from any thread and returns at once."""

    def start(self, handler: Any) -> None:
        """Starts the I/O thread; `handler` is a transfer.session.Handler."""

    def stop(self, timeout_s: float) -> None: ...

    def connect(self, node_id: str, address: str) -> None:
        """Keeps a session up; another address replaces the one before."""

    def disconnect(self, node_id: str) -> None: ...

    def send(self, node_id: str, message: wire.AnyMessage) -> None:
        """To the node's live incarnation; dropped if it has none."""

    def fence(self, node_id: str, epoch: int) -> None:
        """That incarnation is dead: its session ends and cannot come back."""


class Decoder(Protocol):
    """Turns the tokens of one output into text, piece by piece."""

    def push(self, token_id: int) -> str:
        """Returns the text that became certain with this token; "" inside a character."""

    def flush(self) -> str:
        """Returns what is left at the end."""


class Tokenizer(Protocol):
    """Text to tokens and back. `encode` and `render_chat` run on worker threads."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def decoder(self) -> Decoder: ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> list[int]:
        """Prompt of a conversation; RequestError if the model has no template or it refuses."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the front must know of the model to check a request.

    Attributes:
        name: the name clients ask for.
        vocab_size: token ids run from 0 to vocab_size - 1.
        max_context: longest sequence in tokens while no node has told its own limit.
        eos_token_ids: tokens that end an output.
    """

    name: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
