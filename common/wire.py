"""Every message on the control plane, and its strict encoding.

One frozen type a message, MessagePack on the wire. Decoding is strict: an unknown kind, a missing,
extra or mistyped field is a ProtocolError. Identity of a request is (`request_id`, `attempt`); an
id is never used again. Every envelope names the incarnation (`epoch`) of sender and receiver, so a
message from or for a process that has since been replaced is recognised and dropped.

Who sends what:

| message    | from -> to            | meaning                                                  |
|------------|-----------------------|----------------------------------------------------------|
| Hello      | both ways, first      | who I am, protocol, layout, memory regions               |
| Goodbye    | both ways             | the session is refused or ends, with a reason            |
| Ping       | both ways             | I am alive; carries the load                             |
| Submit     | front -> prefill, unified | run this request; decode on that node                |
| Resume     | front -> decode       | send the tokens again from this index                    |
| Cancel     | any                   | stop this attempt                                        |
| Offer      | prefill -> decode     | I am about to compute this prompt; reserve room          |
| Grant      | decode -> prefill     | pages to write to, under a lease                         |
| Defer      | decode -> prefill     | full now; ask again later                                |
| Refuse     | decode -> prefill     | this request can never run here, or not any more         |
| Chunk      | prefill -> decode     | these pages of the lease are written; their checksums    |
| ChunkAck   | decode -> prefill     | verified (or not: write them again)                      |
| Commit     | prefill -> decode     | all pages written; first token, warm set                 |
| CommitAck  | decode -> prefill     | every page verified; the request belongs to decode       |
| Drained    | prefill -> decode     | I will never again write under this lease                |
| DrainedAck | decode -> prefill     | the lease has ended                                      |
| Tokens     | decode -> front       | output tokens from a running index                       |
| Finish     | decode, prefill -> front | the attempt ended, and why                            |
| Fence      | front -> node         | that incarnation of that node is dead                    |
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import ProtocolError

PROTOCOL_VERSION = 3

UNKNOWN_ATTEMPT = "unknown_attempt"
"""Code of the Finish with which decode answers a Resume for an attempt that it does not have."""

Role = Literal["front", "prefill", "decode", "unified"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all messages."""


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to choose output tokens.

    `max_tokens`, `min_tokens` count output tokens of this attempt (a re-submitted attempt carries
    what is left). Randomness is keyed by (`seed`, position in the sequence) alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1
    """-1: none; 0: of the chosen token; n: also of the n best."""


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One registered memory region: `num_layers` layers of `num_pages` pages each, layer-major."""

    name: Literal["kv", "index"]
    base_address: int
    num_layers: int
    num_pages: int
    page_bytes: int


class SharedMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where processes of the same machine can map a node's regions instead of sending to them."""

    machine: str
    """Equal for two processes that see the same files and each other's process ids."""
    keeper: str
    """Path of the socket of the process that lends the memory."""
    regions: tuple[Literal["kv", "index"], ...]
    """Those that lie in it, each in a part of its name."""


class PageRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages [first, first + count)."""

    first: int
    count: int


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-probability of the chosen token, and of the best ones (`top_ids`, `top_logprobs`)."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class OutputToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sampled token."""

    token_id: int
    logprob: TokenLogprob | None = None


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node tells about itself in each Ping; the front routes by it."""

    num_queued: int = 0
    num_running: int = 0
    num_parked: int = 0
    free_pages: int = 0
    total_pages: int = 0
    quarantined_pages: int = 0
    is_draining: bool = False


class Hello(Message, frozen=True, tag="hello"):
    """First message of a session, in both directions."""

    protocol_version: int
    node_id: str
    role: Role
    epoch: int
    layout_hash: str
    layout_text: str
    data_address: str
    """Where the transport reaches this node's memory; empty if it takes no writes."""
    regions: tuple[Region, ...]
    shared: SharedMemory | None = None


class Goodbye(Message, frozen=True, tag="goodbye"):
    reason: str


class Ping(Message, frozen=True, tag="ping"):
    load: Load


class Submit(Message, frozen=True, tag="submit"):
    """Run an attempt. `decode_address` is empty for a unified node."""

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    front_id: str
    decode_id: str = ""
    decode_address: str = ""


class Resume(Message, frozen=True, tag="resume"):
    request_id: str
    attempt: int
    next_index: int
    front_id: str


class Cancel(Message, frozen=True, tag="cancel"):
    """`lease_id`: from decode, the lease that must be drained; 0 if there is none."""

    request_id: str
    attempt: int
    reason: str
    lease_id: int = 0


class Offer(Message, frozen=True, tag="offer"):
    request_id: str
    attempt: int
    num_prompt_tokens: int
    sampling: Sampling
    front_id: str
    is_shared: bool = False
    """Prefill will copy into memory that both nodes map: no forced fence ends such a lease."""


class Grant(Message, frozen=True, tag="grant"):
    """Pages in order of position: page i of the prompt is the i-th page of the runs."""

    request_id: str
    attempt: int
    lease_id: int
    kv_runs: tuple[PageRun, ...]
    index_runs: tuple[PageRun, ...]


class Defer(Message, frozen=True, tag="defer"):
    request_id: str
    attempt: int
    retry_after_s: float


class Refuse(Message, frozen=True, tag="refuse"):
    """`status` and `code` become the client's error."""

    request_id: str
    attempt: int
    reason: str
    status: int
    code: str


class Chunk(Message, frozen=True, tag="chunk"):
    """Pages [first_page, first_page + num_pages) of the prompt are written in some layers.

    Layers are numbered through: every KV layer, then every index layer. `checksums` has one value a
    layer of [first_layer, first_layer + num_layers), each over its pages in order, or is empty when
    checksums are off. `sequence` numbers the chunks of a lease from 0: layer by layer, then the
    next pages. A chunk that is written again keeps its number and counts `tries` up.
    """

    lease_id: int
    sequence: int
    tries: int
    first_page: int
    num_pages: int
    first_layer: int
    num_layers: int
    checksums: tuple[int, ...]


class ChunkAck(Message, frozen=True, tag="chunk_ack"):
    lease_id: int
    sequence: int
    tries: int
    ok: bool


class Commit(Message, frozen=True, tag="commit"):
    """Sent behind the last chunk; decode is READY once it has this and all chunks are verified.

    `warm_positions`: for each index group, positions of the prompt's last top-k, little-endian
    int32 one behind the other (as bytes they cost either side nothing to decode); may be empty.
    """

    lease_id: int
    num_chunks: int
    first_token: OutputToken
    warm_positions: tuple[bytes, ...]


class CommitAck(Message, frozen=True, tag="commit_ack"):
    lease_id: int


class Drained(Message, frozen=True, tag="drained"):
    lease_id: int
    request_id: str
    attempt: int


class DrainedAck(Message, frozen=True, tag="drained_ack"):
    lease_id: int


class Tokens(Message, frozen=True, tag="tokens"):
    """Output tokens `first_index`, `first_index` + 1, ... of this attempt."""

    request_id: str
    attempt: int
    first_index: int
    tokens: tuple[OutputToken, ...]


class Finish(Message, frozen=True, tag="finish"):
    """The attempt ended after `num_tokens` output tokens.

    With reason "error", `status`, `code` and `detail` say what the client is told, and
    `can_retry` whether another attempt may succeed.
    """

    request_id: str
    attempt: int
    reason: FinishReason
    num_tokens: int
    status: int = 200
    code: str = ""
    detail: str = ""
    can_retry: bool = False


class Fence(Message, frozen=True, tag="fence"):
    """The process that was `node_id` at `epoch` is proven dead: its leases may end."""

    node_id: str
    epoch: int


AnyMessage = (
    Hello
    | Goodbye
    | Ping
    | Submit
    | Resume
    | Cancel
    | Offer
    | Grant
    | Defer
    | Refuse
    | Chunk
    | ChunkAck
    | Commit
    | CommitAck
    | Drained
    | DrainedAck
    | Tokens
    | Finish
    | Fence
)


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one ZMQ frame holds. `receiver_epoch` is 0 while the sender does not know it yet."""

    sender: str
    sender_epoch: int
    receiver_epoch: int
    body: AnyMessage


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Envelope, strict=True)


def encode(envelope: Envelope) -> bytes:
    return _ENCODER.encode(envelope)


def decode(frame: bytes) -> Envelope:
    """Decodes one frame; raises ProtocolError, naming the field, on anything but a known message."""
    try:
        return _DECODER.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"cannot decode a frame of {len(frame)} bytes: {error}") from error
