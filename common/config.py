"""The configuration: frozen dataclasses, a TOML file over the defaults, command line over the file.

Nothing outside this file reads the environment or a configuration file. Every fault is reported at
once, in one ConfigError. docs/config.md is generated from these docstrings (`tidepool config
--markdown`); a string under a field is its documentation.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import ConfigError
from .layouts import IndexLayoutName, KvLayoutName, check_page_size

_STRICT = ConfigDict(extra="forbid", strict=False, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class ModelSection:
    """Which model, and how it computes."""

    path: str = ""
    """Checkpoint directory: config.json, safetensors, tokenizer."""
    name: str = ""
    """Name that /v1/models shows; empty: the directory's name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations. auto: bfloat16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes. auto: the GPU if there is one."""
    threads: int = 0
    """CPU threads a node uses for tensor work; 0: torch's own choice."""
    strict_norm_eps: bool = False
    """True: the two latent norms use 1e-6 as transformers does; False: the config's rms_norm_eps."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class KvSection:
    """How KV is stored; must be equal on all nodes, peers compare it when they meet."""

    layout: KvLayoutName = "mla_bf16"
    """Bytes of a KV row."""
    index_layout: IndexLayoutName = "index_k"
    """Bytes of an indexer key."""
    page_size: int = 64
    """Tokens a page on device, host and wire: a power of two from 1 to 256."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class PrefillSection:
    """Prefill nodes."""

    chunk_tokens: int = 1024
    """Token budget of one step, shared by the prompts being computed."""
    max_active: int = 4
    """Prompts computed at a time; the budget is divided among them."""
    max_queued: int = 256
    """Prompts waiting; one more is answered 429."""
    pool_tokens: int = 65536
    """Tokens of KV the node holds for prompts being computed or sent."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class DecodeSection:
    """Decode nodes: the host pool, the seats and the hot buffers."""

    attention_backend: Literal["sparse", "dense"] = "sparse"
    """Only "sparse" works with a hot buffer; anything else is refused at start."""
    seats: int = 16
    """Requests that decode at the same time; each has a hot buffer on the device."""
    hot_rows: int = 4096
    """Rows of a hot buffer (at least the model's index_topk); 0: the whole context stays resident."""
    host_tokens: int = 262144
    """Tokens the host pool holds."""
    index_tokens: int = 262144
    """Tokens the device's index pool holds."""
    max_requests: int = 64
    """Requests admitted at a time, seated or waiting for a seat."""
    max_context: int = 0
    """Longest sequence, prompt and output; 0: the model's own limit, bounded by the pools."""
    park_after_tokens: int = 64
    """A running request keeps its seat for at least this many tokens before it may be parked."""
    replacement: Literal["score", "lru"] = "score"
    """Which row of a full hot buffer makes room: the one whose index score is lowest, or the one unused for longest."""
    warm_start: bool = True
    """Load the prompt's last top-k into the hot buffer at admission."""
    cuda_graphs: bool = True
    """On a GPU, replay each decode step as one CUDA graph; taken at start."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Launch the next decode step before the last one's tokens are read; auto: on a GPU."""
    reattach: bool = True
    """Keep host pool, indexer keys and a journal of the requests in memory that outlives the node's process, so that a restarted one goes on with them. Off: a killed node's requests are prefilled again elsewhere."""
    reattach_wait_s: float = 30.0
    """How long a request of a killed decode process waits for its next one before it is prefilled again elsewhere. On a GPU 13 s were measured for the demo model; loading large weights comes on top."""
    keep_s: float = 60.0
    """How long a killed node's memory is kept for the next process."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class KernelsSection:
    """Which kernels a GPU node uses where there are several."""

    attention: Literal["auto", "flashmla_sparse", "cuda", "triton", "reference"] = "auto"
    """Sparse attention. auto: the fastest measured for the layout, heads and batch, of those that are there; flashmla_sparse: FlashMLA's wheel (extra `kernels`); cuda: our own, for Hopper; triton: our own, anywhere; reference: torch ops, for comparing, not in CUDA graphs. Refused at start where it cannot run."""
    index_logits: Literal["auto", "cuda", "triton", "deepgemm"] = "auto"
    """Indexer scores of decode over FP8 keys. cuda: our own, for Hopper; triton: our own, anywhere; deepgemm: DeepGEMM's wheel (extra `kernels`), which takes FP8 queries, where it has a kernel (32 or 64 heads of 128, pages of 64); auto: what was fastest, deepgemm only where queries are FP8 and the wheel is there. Refused at start where it cannot run."""
    index_queries: Literal["auto", "fp8", "bf16"] = "auto"
    """Indexer queries over FP8 keys. fp8: rounded to e4m3 with a power of two a head and token, as DeepSeek's own inference does; bf16: as the model computes them; auto: bf16, unless `index_logits` is deepgemm. The same on prefill and decode nodes."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class TransferSection:
    """The hand-off."""

    protocol: Literal["tcp", "rdma", "loopback"] = "tcp"
    """Mooncake's protocol; loopback moves bytes inside one process (tests)."""
    tcp_engines: int = 0
    """Engines of a node over TCP, each with one thread that sends and one data port; a peer's bytes take them in turn. 0: one for each four cores, at most four."""
    shared_memory: Literal["auto", "off"] = "auto"
    """Prefill copies straight into the host pool of a decode node on its machine that keeps it in a segment; never where `checksums` is on. off: everything goes over the wire."""
    checksums: Literal["auto", "on", "off"] = "auto"
    """Checksums of what is written, a layer of a chunk each; auto: on over tcp."""
    max_chunk_tries: int = 3
    """Times a chunk whose checksum differs is written before the attempt fails."""
    max_write_bytes: int = 16 * 1024 * 1024
    """Largest single write; longer runs are split."""
    max_chunk_bytes: int = 16 * 1024 * 1024
    """Pages are written, announced and verified in pieces of about so many bytes (some layers each), so that one is verified while the next arrives."""
    max_writes_in_flight: int = 16
    """Writes submitted to the transport at a time, to each peer."""
    max_quarantine_share: float = 0.25
    """Share of decode's host pages that may be kept out of use for writers that are lost; past it the node fences them itself: a new data address, the old one closed, transfers under way tried again. 1: never."""
    write_timeout_s: float = 10.0
    """A write that has not ended by then fails its transfer."""
    heartbeat_interval_s: float = 0.3
    """Pings each way."""
    heartbeat_timeout_s: float = 1.5
    """Silence after which a peer counts as gone."""
    resend_interval_s: float = 0.5
    """Unanswered control messages are sent again after this time."""
    deadline_s: float = 120.0
    """An attempt that has not been handed over by then fails."""
    max_defer_s: float = 30.0
    """A request for which decode has had no room for so long is answered 429."""
    front_grace_s: float = 10.0
    """Requests of a front that is silent for so long are cancelled."""
    max_queued_messages: int = 65536
    """Bound of each socket's queue, in messages."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class FrontSection:
    """The HTTP front."""

    host: str = "127.0.0.1"
    """Interface the HTTP server listens on."""
    port: int = 8000
    """Port; 0 picks a free one."""
    max_requests: int = 512
    """Requests in flight; one more is answered 429."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body."""
    max_attempts: int = 3
    """Times a request is submitted before the client sees the failure."""
    node_wait_s: float = 8.0
    """How long a new request waits for a node to come before it is answered 503."""
    recovery_wait_s: float = 60.0
    """How long a request that lost its node waits for another, or for a new process of that one."""
    stall_s: float = 30.0
    """A request with no token for so long is submitted again."""
    drain_s: float = 30.0
    """How long Ctrl-C waits for running requests."""
    api_keys_file: str = ""
    """File of API keys, one a line, readable by its owner only; every call but /health then needs one (`Authorization: Bearer KEY`). Empty: no keys."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class ClusterSection:
    """Placement."""

    name: str = "tidepool"
    """Prefix of the Ray actors' names; two clusters on one Ray need different names."""
    prefill: int = 1
    """Prefill nodes."""
    decode: int = 1
    """Decode nodes."""
    unified: int = 0
    """Nodes that do both; used instead of prefill and decode nodes."""
    fronts: int = 1
    """HTTP fronts. Several share front.port of one machine, so that a killed one costs its own connections only; front.port + 1, + 2, ... are theirs alone, for /metrics."""
    cpus_per_node: float = 1.0
    """CPUs Ray reserves for a node."""
    gpus_per_node: float = 0.0
    """GPUs Ray reserves for a node."""
    drain_s: float = 30.0
    """How long a node or front that is told to stop (SIGTERM) serves what it has; then requests go on elsewhere. A second SIGTERM hurries."""
    pinned: bool = False
    """True: each node, and the front, runs only where Ray has the custom resource of its id, as in `ray start --resources='{"prefill-0": 1}'`."""
    bind_host: str = "auto"
    """Interface the nodes' sockets listen on; auto: the address Ray knows the machine by."""
    authentication: Literal["secret", "off"] = "secret"
    """secret: control connections are encrypted and open only to who has the cluster's secret. off: open to who can reach the port."""
    secret_file: str = ""
    """File with the cluster's secret (32 bytes or more), on every machine, readable by its owner only. Empty: a cluster that starts its own local Ray makes one up; one on a running Ray is refused."""


@dataclass(frozen=True, slots=True, config=_STRICT, kw_only=True)
class Config:
    """Everything."""

    model: ModelSection = field(default_factory=ModelSection)
    kv: KvSection = field(default_factory=KvSection)
    prefill: PrefillSection = field(default_factory=PrefillSection)
    decode: DecodeSection = field(default_factory=DecodeSection)
    kernels: KernelsSection = field(default_factory=KernelsSection)
    transfer: TransferSection = field(default_factory=TransferSection)
    front: FrontSection = field(default_factory=FrontSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise ConfigError("\n".join(faults))


def _faults(config: Config) -> Iterator[str]:
    """Yields every fault that needs no model and no machine to see."""
    try:
        check_page_size(config.kv.page_size)
    except ConfigError as error:
        yield f"kv.page_size: {error}"
    if config.decode.attention_backend != "sparse":
        yield (
            "decode.attention_backend: the hot buffer needs the sparse backend, "
            f"not {config.decode.attention_backend!r}"
        )
    at_least_one = {
        "prefill": ("chunk_tokens", "max_active", "max_queued", "pool_tokens"),
        "decode": ("seats", "host_tokens", "index_tokens", "max_requests", "park_after_tokens"),
        "transfer": (
            "max_chunk_tries",
            "max_write_bytes",
            "max_chunk_bytes",
            "max_writes_in_flight",
            "max_queued_messages",
        ),
        "front": ("max_requests", "max_body_bytes", "max_attempts"),
        "cluster": ("fronts",),
    }
    for section, names in at_least_one.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                yield f"{section}.{name}: must be at least 1, not {value}"
    at_least_zero = {
        "decode": ("hot_rows", "max_context"),
        "model": ("threads",),
        "transfer": ("tcp_engines",),
        "cluster": ("prefill", "decode", "unified", "cpus_per_node", "gpus_per_node"),
    }
    for section, names in at_least_zero.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 0:
                yield f"{section}.{name}: must not be negative, not {value}"
    yield from _time_faults(config)
    cluster = config.cluster
    if not cluster.unified and not (cluster.prefill and cluster.decode):
        yield "cluster: needs at least one prefill and one decode node, or unified nodes"
    if not 0 <= config.front.port <= 65535:
        yield f"front.port: must be from 0 to 65535, not {config.front.port}"


def _time_faults(config: Config) -> Iterator[str]:
    transfer = config.transfer
    if not 0 <= transfer.max_quarantine_share <= 1:
        share = transfer.max_quarantine_share
        yield f"transfer.max_quarantine_share: must be from 0 to 1, not {share}"
    for name in (
        "write_timeout_s",
        "heartbeat_interval_s",
        "heartbeat_timeout_s",
        "resend_interval_s",
        "deadline_s",
        "max_defer_s",
        "front_grace_s",
    ):
        if not getattr(transfer, name) > 0:
            yield f"transfer.{name}: must be positive, not {getattr(transfer, name)}"
    for name in ("reattach_wait_s", "keep_s"):
        if not getattr(config.decode, name) > 0:
            yield f"decode.{name}: must be positive, not {getattr(config.decode, name)}"
    for name in ("node_wait_s", "recovery_wait_s", "stall_s", "drain_s"):
        if not getattr(config.front, name) > 0:
            yield f"front.{name}: must be positive, not {getattr(config.front, name)}"
    if not config.cluster.drain_s > 0:
        yield f"cluster.drain_s: must be positive, not {config.cluster.drain_s}"
    if transfer.heartbeat_timeout_s < 2 * transfer.heartbeat_interval_s:
        yield (
            "transfer.heartbeat_timeout_s: must be at least twice heartbeat_interval_s "
            f"({transfer.heartbeat_interval_s}), not {transfer.heartbeat_timeout_s}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each value came from: "default", "file" or "command line"."""

    config: Config
    origins: Mapping[str, str]
    """Key: "section.field"."""

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yields (dotted name, value, origin) in the order of the dataclasses."""
        for section in dataclasses.fields(Config):
            values = getattr(self.config, section.name)
            for entry in dataclasses.fields(values):
                name = f"{section.name}.{entry.name}"
                yield name, getattr(values, entry.name), self.origins.get(name, "default")


def resolve(path: Path | None, overrides: Mapping[str, Any]) -> Resolved:
    """Reads `path` (TOML; None: no file) and lays `overrides` (dotted name -> value) over it.

    Raises ConfigError with one line a fault: unreadable file, unknown section or key, wrong type,
    values that cannot work.
    """
    tree = _read_toml(path) if path else {}
    origins = {
        f"{section}.{name}": f"file {path}"
        for section, values in tree.items()
        if isinstance(values, dict)
        for name in values
    }
    for dotted, value in overrides.items():
        section, _, name = dotted.partition(".")
        if not isinstance(tree.get(section, {}), dict):
            raise ConfigError(f"{section}: must be a table in {path}, not {tree[section]!r}")
        tree.setdefault(section, {})[name] = value
        origins[dotted] = "command line"
    return Resolved(parse(tree), origins)


def parse(tree: Mapping[str, Any]) -> Config:
    """Builds a Config from nested mappings; raises ConfigError with every fault."""
    try:
        return TypeAdapter(Config).validate_python(dict(tree))
    except ValidationError as error:
        lines = (
            f"{'.'.join(str(part) for part in fault['loc'])}: {_text_of(fault['type'], fault['msg'])}"
            for fault in error.errors()
        )
        raise ConfigError("\n".join(lines)) from error


def _text_of(fault_type: str, message: str) -> str:
    return "there is no such key" if fault_type == "unexpected_keyword_argument" else message


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
