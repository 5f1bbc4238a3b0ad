"""A decode node's memory that outlives its process: claimed from the node's keeper, or made anew.

Used on the thread that builds the node. What the process before left is gone on from only if it holds
the same things in the same places: the identity names everything that decides that. It is also left
alone if that process found its own state wrong, or if MAX_UNPROVEN processes in a row have ended
before they had decoded PROOF_STEPS steps: whatever ends them may lie in this memory.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.config import Config
from ..common.errors import SegmentError
from ..common.layouts import KvGeometry
from ..hostpool.index_pool import IndexPool
from ..hostpool.keeper_link import KeeperLink
from ..hostpool.pool import HostPool
from ..hostpool.segment import SharedSegment
from .journal import Journal, Shape

JOURNAL_VERSION = 1
_PORT = struct.Struct("<I")
MAX_UNPROVEN = 3
PROOF_STEPS = 64
OWN_TIMEOUT_S = 60.0
"""Who has the node's record knows that the process before is ending; its devices are released last."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class KeptMemory:
    """The segment of this node and its link to the keeper.

    Attributes:
        link: another one once the keeper was replaced (keeper_watch.py).
        is_fresh: it holds nothing yet.
    """

    segment: SharedSegment
    link: KeeperLink
    shape: Shape
    is_fresh: bool

    def journal(self) -> Journal:
        """The journal in it; call once."""
        journal = Journal(self.segment.view("journal"), self.shape)
        journal.on_discard = lambda offset, size: self.segment.discard("journal", offset, size)
        return journal

    @property
    def port(self) -> int:
        """Of the node's control socket, as the last process noted it; 0: none has."""
        return int(_PORT.unpack(self.segment.view("port"))[0])

    def note_port(self, port: int) -> None:
        """Peers of this process look for the next one there."""
        _PORT.pack_into(self.segment.view("port"), 0, port)

    def guard(self, on_fatal: Callable[[BaseException], None]) -> Callable[[BaseException], None]:
        """`on_fatal`, behind a mark that nobody may go on from this state."""

        def spoil(error: BaseException) -> None:
            self.segment.spoil()
            on_fatal(error)

        return spoil

    def close(self) -> None:
        """The node ends in order: the keeper ends too, and the memory with it."""
        self.link.end()
        self.link.close()
        self.segment.close()


def claim(link: KeeperLink, config: Config, kv: KvGeometry, max_context: int) -> KeptMemory:
    """Takes over what the keeper holds, or has it hold something new.

    SegmentError if the keeper does not answer or has another owner; ConfigError if the machine has
    not enough memory.
    """
    decode = config.decode
    shape = Shape(
        num_slots=2 * decode.max_requests,
        max_pages=kv.num_pages(max_context),
        max_context=max_context,
    )
    parts = {
        "kv": HostPool.bytes_needed(kv, decode.host_tokens // kv.page_size),
        "index": IndexPool.bytes_needed(kv, decode.index_tokens // kv.page_size),
        "journal": shape.num_bytes,
        "port": _PORT.size,
    }
    identity = identity_of(config, kv, shape)
    segment = _take(link, identity)
    is_fresh = segment is None
    if segment is None:
        segment = SharedSegment.create(parts, identity=identity, what="decode's kept memory")
        link.hold(segment)
    else:
        segment.begin_generation()
    return KeptMemory(segment, link, shape, is_fresh)


def identity_of(config: Config, kv: KvGeometry, shape: Shape) -> str:
    """A sentence that names all that must be equal for one process to go on from another's bytes."""
    model, decode = config.model, config.decode
    return (
        f"journal {JOURNAL_VERSION}, {kv.layout_text}, {decode.host_tokens} + "
        f"{decode.index_tokens} tokens, {shape}, model {fingerprint(Path(model.path))}, "
        f"{model.dtype} on {model.device}, strict_norm_eps {model.strict_norm_eps}"
    )


def fingerprint(model: Path) -> str:
    """Short hash of a checkpoint's configuration and of names, sizes and times of its weights."""
    text = hashlib.sha256()
    text.update((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        status = file.stat()
        text.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return text.hexdigest()[:16]


def _take(link: KeeperLink, identity: str) -> SharedSegment | None:
    """What the keeper holds, if it can be gone on from."""
    try:
        segment = link.own(OWN_TIMEOUT_S)
    except SegmentError as error:
        if link.is_owner:
            log.warning("starting clean: %s", error)
            return None
        raise
    if segment is None:
        return None
    fault = _fault(segment, identity)
    if fault is None:
        return segment
    log.warning("starting clean: %s", fault)
    segment.close()
    return None


def _fault(segment: SharedSegment, identity: str) -> str | None:
    if segment.identity != identity:
        return f"the memory holds [{segment.identity}], this node needs [{identity}]"
    if segment.is_spoiled:
        return "the process before found its own state wrong"
    if segment.num_unproven >= MAX_UNPROVEN:
        return f"{segment.num_unproven} processes in a row did not get going from this memory"
    return None
