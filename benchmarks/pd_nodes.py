"""Node processes and the front of benchmarks/pd.py: real control loops, transport and engines."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tidepool.common import wire
from tidepool.common.config import Config
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.node import own_interpreter
from tidepool.transfer.session import Peer

HOST = "127.0.0.1"
START_TIMEOUT_S, RUN_TIMEOUT_S = 150.0, 240.0
FEEDER_TOKEN_S = 15e-6
"""What a feeder sleeps for each prompt token."""
Key = str


@dataclass
class Seen:
    """One request: when it was sent, and when each token came (monotonic seconds of this machine)."""

    kind: str
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    is_over: bool = False
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.token_s)]


# ---- a node's process ----


@dataclass
class Noted:
    """What a node's process has to tell."""

    requests: dict[Key, dict[str, float]] = field(default_factory=dict)
    engines: list[Any] = field(default_factory=list)

    def take(self) -> tuple[dict[Key, dict[str, float]], dict[str, Any]]:
        """Times of requests, and the decode engine's gaps between steps, since the last time."""
        requests, self.requests = dict(self.requests), {}
        steps: dict[str, Any] = {}
        for engine in self.engines:
            stats = engine.stats()
            steps = {key: value for key, value in stats.items() if "step_gap" in key}
            gaps = sorted(engine.times.gaps.copy(), key=lambda gap: -gap.ms)
            steps["worst"] = [
                {"ms": round(gap.ms, 2), "rows": gap.num_rows}
                | {cause: round(ms, 2) for cause, ms in gap.parts_ms.items() if ms >= 0.05}
                for gap in gaps[:12]
            ]
            engine.times.gaps.clear()
        return requests, steps


def serve(pipe: Connection, role: str, node_id: str, config: Config, model: str, gpu: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu) if gpu >= 0 else ""
    noted = Noted()
    node = build(role, node_id, config, model, noted)
    own_interpreter()
    node.start()
    pipe.send((node_id, node.control.address))
    while pipe.recv() != "stop":
        pipe.send(noted.take())
    threading.Timer(10.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    node.stop()
    os._exit(0)


def build(role: str, node_id: str, config: Config, model: str, noted: Noted) -> Any:
    """The node of that role, with notes of when a request passes from one part to the next."""
    from tidepool.decode_node import engine as decode_engine  # noqa: PLC0415
    from tidepool.decode_node import node as decode_node  # noqa: PLC0415
    from tidepool.deploy import unified  # noqa: PLC0415
    from tidepool.deploy.keeping import find_or_start  # noqa: PLC0415
    from tidepool.prefill_node import exporting  # noqa: PLC0415
    from tidepool.prefill_node import node as prefill_node  # noqa: PLC0415

    def note(owner: Any, method: str, what: str) -> None:
        inner = getattr(owner, method)

        def call(self: Any, first: Any, *rest: Any, **named: Any) -> Any:
            noted.requests.setdefault(first.key[0], {})[what] = time.monotonic()
            if isinstance(self, decode_engine.DecodeEngine) and self not in noted.engines:
                noted.engines.append(self)
            return inner(self, first, *rest, **named)

        setattr(owner, method, call)

    for handoff in (exporting.RemoteHandoff, unified.LocalHandoff):
        note(handoff, "offer", "offered")
        note(handoff, "commit", "committed")
    note(decode_engine.DecodeEngine, "make_ready", "ready")
    if model != "demo":
        load = feeding_runtime(model) if role == "feeder" else random_runtime(model)
        for module in (decode_node, prefill_node, unified):
            module.load_runtime = load  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"node_id": node_id, "bind_host": HOST, "on_fatal": fatal}
    if role in ("prefill", "feeder"):
        return prefill_node.build_node(config, **settings)
    if role == "unified":
        return unified.build_node(config, **settings)
    path = Path(tempfile.mkdtemp()) / "keeper"
    link = find_or_start(path, idle_s=1.0, anchor_pid=os.getpid())
    return decode_node.build_node(config, **settings, link=link)


def fatal(error: BaseException) -> None:
    print(f"a node ends: {error!r}", flush=True)
    os._exit(1)


def random_runtime(model: str) -> Any:
    """Stands for load_runtime: the published shapes, 6 layers (1 dense), 16 experts."""

    def load(config: Config) -> Any:
        import torch  # noqa: PLC0415

        from tidepool.model.config import geometry  # noqa: PLC0415
        from tidepool.model.model import Model  # noqa: PLC0415
        from tidepool.model.random_weights import published_config  # noqa: PLC0415
        from tidepool.model.runtime import Runtime, _choose_kernels  # noqa: PLC0415

        device = torch.device("cuda", 0)
        _choose_kernels(config, device)
        shape = published_config(model, num_layers=6, num_dense_layers=1, num_experts=16)
        made = Model.random(shape, dtype=torch.bfloat16, device=device)
        return Runtime(made, geometry(made.config, config.kv), device)

    return load


def feeding_runtime(model: str) -> Any:
    """Stands for load_runtime of a prefill node without a GPU: as `random_runtime`, but a prompt
    costs FEEDER_TOKEN_S a token and its KV is what the pool holds, drawn once."""

    def load(config: Config) -> Any:
        import torch  # noqa: PLC0415

        from tidepool.model.config import geometry  # noqa: PLC0415
        from tidepool.model.random_weights import published_config  # noqa: PLC0415
        from tidepool.model.runtime import Runtime  # noqa: PLC0415
        from tidepool.prefill_node import node as prefill_node  # noqa: PLC0415

        shape = published_config(model, num_layers=6, num_dense_layers=1, num_experts=16)
        make_pool = prefill_node.build_pool

        def filled_pool(*arguments: Any) -> Any:
            pool = make_pool(*arguments)
            fill_pool(pool)
            return pool

        prefill_node.build_pool = filled_pool
        torch.set_num_threads(1)
        made: Any = Feeder(shape)
        return Runtime(made, geometry(shape, config.kv), torch.device("cpu"))

    return load


class Feeder:
    """What a prefill engine uses of a model; sleeps where that would compute."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def forward(self, token_ids: Any, positions: Any, context: Any) -> Any:
        import torch  # noqa: PLC0415

        time.sleep(FEEDER_TOKEN_S * len(token_ids))
        topk, end = self.config.index_topk, int(positions[-1]) + 1
        num_groups = context._geometry.num_index_layers
        for last in context.last_positions:
            last.extend(
                torch.randperm(end)[:topk].sort().values.to(torch.int32) for _ in range(num_groups)
            )
        return torch.zeros(len(token_ids), 1)

    def logits(self, hidden_NM: Any) -> Any:
        import torch  # noqa: PLC0415

        return torch.randn(hidden_NM.shape[0], self.config.vocab_size)


def fill_pool(pool: Any) -> None:
    """Random rows and keys in every page: the first page's worth drawn, the others copied from it."""
    import torch  # noqa: PLC0415

    from tidepool.kernels.store_index_keys import store_index_keys  # noqa: PLC0415
    from tidepool.kernels.store_rows import store_rows  # noqa: PLC0415

    kv = pool.geometry
    slots = torch.arange(16 * kv.page_size)
    latent, rope = torch.randn(len(slots), 512), torch.randn(len(slots), 64)
    for rows_NX, index_PX in zip(pool.rows, pool.index, strict=True):
        store_rows(latent, rope, slots, rows_NX, kv.row.name)
        store_index_keys(torch.randn(len(slots), 128), slots, index_PX, kv.page_size, kv.index.name)
        for tensor, count in ((rows_NX, len(slots)), (index_PX, 16)):
            for first in range(count, tensor.shape[0], count):
                end = min(first + count, tensor.shape[0])
                tensor[first:end] = tensor[: end - first]


# ---- the front ----


class Front:
    """Sends requests and notes when their tokens come."""

    def __init__(self, config: Config) -> None:
        self.changed = threading.Condition()
        self.up: set[str] = set()
        self.seen: dict[Key, Seen] = {}
        self.control = ControlLoop(
            "front-0", "front", time.time_ns(), bind_host=HOST, config=config.transfer
        )
        self.control.start(self)

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        now_s = time.monotonic()
        with self.changed:
            if not isinstance(message, (wire.Tokens, wire.Finish)):
                return False
            seen = self.seen.get(message.request_id)
            if seen is None:
                return True  # of a request that another node has ended before
            if isinstance(message, wire.Tokens):
                seen.token_s += [now_s] * len(message.tokens)
            else:
                seen.is_over = True
                if message.reason == "error":
                    seen.error = f"{message.status} {message.detail}"
                self.changed.notify_all()
        return True

    def on_peer_up(self, peer: Peer) -> None:
        with self.changed:
            self.up.add(peer.node_id)
            self.changed.notify_all()

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self.up.discard(peer.node_id)

    def on_tick(self, now_s: float) -> None:
        return

    def wait(self) -> None:
        with self.changed:
            done = self.changed.wait_for(
                lambda: all(seen.is_over for seen in self.seen.values()), RUN_TIMEOUT_S
            )
        if not done:
            raise TimeoutError("requests did not end")


class Cluster:
    """Nodes of one arrangement, and the front. A node with no GPU of its own shares one."""

    def __init__(self, roles: list[str], config: Config, model: str, num_gpus: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes, self.addresses = [], [], []
        gpus = itertools.cycle(range(num_gpus)) if num_gpus else itertools.repeat(-1)
        for number, role in enumerate(roles):
            ours, theirs = context.Pipe()
            gpu = -1 if role == "feeder" else next(gpus)
            arguments = (theirs, role, f"{role}-{number}", config, model, gpu)
            process = context.Process(target=serve, args=arguments)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            if not pipe.poll(START_TIMEOUT_S):
                raise TimeoutError("a node did not start")
            self.addresses.append(pipe.recv())
        self.roles = roles
        self.steps: dict[str, dict[str, Any]] = {}
        self.front = Front(config)
        for node_id, address in self.addresses:
            self.front.control.connect(node_id, address)
        with self.front.changed:
            self.front.changed.wait_for(lambda: len(self.front.up) == len(roles), 20.0)
        self._number = 0

    def submit(self, kind: str, prompt: tuple[int, ...], output: int) -> Key:
        """To the nodes in turn; the n-th prefill node sends to the n-th decode node."""
        number, self._number = self._number, self._number + 1
        first = [at for at, role in enumerate(self.roles) if role != "decode"]
        decodes = [at for at, role in enumerate(self.roles) if role == "decode"]
        node_id, _ = self.addresses[first[number % len(first)]]
        decode = self.addresses[decodes[number % len(decodes)]] if decodes else ("", "")
        key = f"r{number}"
        with self.front.changed:
            self.front.seen[key] = Seen(kind, time.monotonic())
        sampling = wire.Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
        submit = wire.Submit(
            request_id=key,
            attempt=0,
            prompt_token_ids=prompt,
            sampling=sampling,
            front_id="front-0",
            decode_id=decode[0],
            decode_address=decode[1],
        )
        self.front.control.send(node_id, submit)
        return key

    def take(self) -> list[Seen]:
        """What was seen since the last time, with the nodes' notes; `steps` of the decode engines."""
        self.front.wait()
        self.steps = {}
        for (node_id, _), pipe in zip(self.addresses, self.pipes, strict=True):
            pipe.send("notes")
            requests, steps = pipe.recv()
            if steps:
                self.steps[node_id] = steps
            for key, notes in requests.items():
                if key in self.front.seen:
                    self.front.seen[key].notes |= notes
        seen, self.front.seen = self.front.seen, {}
        return list(seen.values())

    def stop(self) -> None:
        self.front.control.stop()
        for pipe in self.pipes:
            pipe.send("stop")
        for process in self.processes:
            process.join(20.0)
