"""Does prefill and decode apart beat the same number of unified nodes, and where?

    python benchmarks/pd.py --pairs 1 --out docs/reports                        (demo model, CPU)
    python benchmarks/pd.py --pairs 1 --model deepseek-v3.2 --out docs/reports  (random weights, GPUs)

Starts `--pairs` prefill and as many decode nodes (real control loops, transport, engines; no Ray, no
HTTP), each a process, with a GPU of its own where there are GPUs; then twice as many unified nodes.
Both get the same requests at the same moments (Poisson arrivals, seeded): mixes of long prompts with
short outputs, of the reverse, and of both.

* TTFT, split by what the nodes note: queue (to the offer), prefill (to the commit), transfer (to
  READY on decode), first decode (from there to the second token).
* ITL: gaps between tokens at the front, p50 and p99, and p99 against the p50 of a node that decodes
  one request with nothing else to do.
* Goodput: requests a second within the SLO (--slo-ttft, --slo-itl: the first token, and the mean gap).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tidepool.common import wire
from tidepool.common.config import Config, resolve
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.session import Peer

HOST = "127.0.0.1"
START_TIMEOUT_S, RUN_TIMEOUT_S = 150.0, 240.0
Key = str


@dataclass(frozen=True)
class Shape:
    """Lengths of a kind of request."""

    prompt: int
    output: int


@dataclass
class Seen:
    """One request: when it was sent, and when each token came (monotonic seconds of this machine)."""

    kind: str
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    is_over: bool = False
    error: str = ""


# ---- a node's process ----


def serve(pipe: Connection, role: str, node_id: str, config: Config, model: str, gpu: int) -> None:
    if gpu >= 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    notes: dict[Key, dict[str, float]] = {}
    node = build(role, node_id, config, model, notes)
    node.start()
    pipe.send((node_id, node.control.address))
    while pipe.recv() != "stop":
        taken = dict(notes)
        notes.clear()
        pipe.send(taken)
    threading.Timer(10.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    node.stop()
    os._exit(0)


def build(
    role: str, node_id: str, config: Config, model: str, notes: dict[Key, dict[str, float]]
) -> Any:
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
            notes.setdefault(first.key[0], {})[what] = time.monotonic()
            return inner(self, first, *rest, **named)

        setattr(owner, method, call)

    for handoff in (exporting.RemoteHandoff, unified.LocalHandoff):
        note(handoff, "offer", "offered")
        note(handoff, "commit", "committed")
    note(decode_engine.DecodeEngine, "make_ready", "ready")
    if model != "demo":
        for module in (decode_node, prefill_node, unified):
            module.load_runtime = random_runtime(model)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"node_id": node_id, "bind_host": HOST, "on_fatal": fatal}
    if role == "prefill":
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
    """Nodes of one arrangement, and the front."""

    def __init__(self, roles: list[str], config: Config, model: str, num_gpus: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes, self.addresses = [], [], []
        for number, role in enumerate(roles):
            ours, theirs = context.Pipe()
            gpu = number % num_gpus if num_gpus else -1
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
        self.front = Front(config)
        for node_id, address in self.addresses:
            self.front.control.connect(node_id, address)
        with self.front.changed:
            self.front.changed.wait_for(lambda: len(self.front.up) == len(roles), 20.0)
        self._number = 0

    def submit(self, kind: str, prompt: list[int], output: int) -> None:
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
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            front_id="front-0",
            decode_id=decode[0],
            decode_address=decode[1],
        )
        self.front.control.send(node_id, submit)

    def take(self) -> list[Seen]:
        """What was seen since the last time, with the nodes' notes."""
        self.front.wait()
        for pipe in self.pipes:
            pipe.send("notes")
            for key, notes in pipe.recv().items():
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


# ---- what is measured ----


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def summary(seen: list[Seen], idle_itl_s: float, slo: tuple[float, float]) -> dict[str, Any]:
    good = [each for each in seen if not each.error and each.token_s]
    begin_s = min(each.sent_s for each in seen)
    span_s = max(each.token_s[-1] for each in good) - begin_s
    ttft = [each.token_s[0] - each.sent_s for each in good]
    gaps = [b - a for each in good for a, b in itertools.pairwise(each.token_s)]
    steps = {"queue": [], "prefill": [], "transfer": [], "first_decode": []}  # type: ignore[var-annotated]
    for each in good:
        notes = each.notes
        if notes.keys() >= {"offered", "committed", "ready"}:
            steps["queue"].append(notes["offered"] - each.sent_s)
            steps["prefill"].append(notes["committed"] - notes["offered"])
            steps["transfer"].append(notes["ready"] - notes["committed"])
            if len(each.token_s) > 1:
                steps["first_decode"].append(each.token_s[1] - notes["ready"])
    within = sum(
        each.token_s[0] - each.sent_s <= slo[0]
        and (each.token_s[-1] - each.token_s[0]) / max(1, len(each.token_s) - 1) <= slo[1]
        for each in good
    )
    return {
        "requests": len(seen),
        "failed": [each.error for each in seen if each.error][:3],
        "output_tokens_s": sum(len(each.token_s) for each in good) / span_s,
        "requests_s": len(good) / span_s,
        "ttft_ms": {f"p{p}": percentile(ttft, p / 100) * 1e3 for p in (50, 99)},
        "ttft_split_ms": {
            what: statistics.median(values) * 1e3 for what, values in steps.items() if values
        },
        "itl_ms": {f"p{p}": percentile(gaps, p / 100) * 1e3 for p in (50, 99)},
        "itl_p99_of_idle": percentile(gaps, 0.99) / idle_itl_s,
        "goodput_s": within / span_s,
    }


def run_mix(
    cluster: Cluster, mix: list[tuple[str, Shape]], number: int, rate: float, vocab: int
) -> list[Seen]:
    chance = random.Random(7)
    due_s = time.monotonic()
    for at in range(number):
        due_s += chance.expovariate(rate)
        time.sleep(max(0.0, due_s - time.monotonic()))
        kind, shape = mix[at % len(mix)]
        cluster.submit(
            kind, [chance.randrange(2, vocab) for _ in range(shape.prompt)], shape.output
        )
    return cluster.take()


def measure(roles: list[str], config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    long, short = Shape(*arguments.long), Shape(*arguments.short)
    mixes = {
        "long prompts": [("long", long)],
        "long outputs": [("short", short)],
        "both": [("long", long), ("short", short)],
    }
    cluster = Cluster(roles, config, arguments.model, arguments.gpus)
    found: dict[str, Any] = {"nodes": roles}
    try:
        vocab = arguments.vocab
        for _ in range(2):  # kernels are built, graphs captured, the peer's memory mapped
            run_mix(cluster, mixes["both"], 4 * len(roles), 50.0, vocab)
        alone = run_mix(cluster, mixes["long outputs"], 1, 100.0, vocab)[0].token_s
        idle_itl_s = statistics.median(b - a for a, b in itertools.pairwise(alone))
        found["idle_itl_ms"] = idle_itl_s * 1e3
        for name, mix in mixes.items():
            rate = arguments.rate * arguments.pairs
            seen = run_mix(cluster, mix, arguments.requests, rate, vocab)
            slo = (arguments.slo_ttft, arguments.slo_itl)
            found[name] = summary(seen, idle_itl_s, slo)
            print(json.dumps({"nodes": "+".join(roles), "mix": name, **found[name]}), flush=True)
    finally:
        cluster.stop()
    return found


def configuration(arguments: argparse.Namespace) -> Config:
    most = max(sum(arguments.long), sum(arguments.short)) + 64
    settings: dict[str, Any] = {
        "cluster.authentication": "off",
        "decode.seats": 16,
        "decode.max_requests": 64,
        "decode.host_tokens": 64 * most,
        "decode.index_tokens": 64 * most,
        "prefill.pool_tokens": 8 * most,
        "decode.max_context": most,
    }
    if arguments.model == "demo":
        from tidepool.deploy.demo.run import demo_config  # noqa: PLC0415

        return demo_config({**settings, "decode.seats": 8})
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text("{}")
    settings |= {"model.path": str(folder), "prefill.chunk_tokens": 4096, "decode.hot_rows": 4096}
    return resolve(None, settings).config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--model", default="demo", help="demo, or a name of random_weights.py")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=200)
    parser.add_argument(
        "--long", type=int, nargs=2, default=[1500, 8], metavar=("PROMPT", "OUTPUT")
    )
    parser.add_argument(
        "--short", type=int, nargs=2, default=[100, 64], metavar=("PROMPT", "OUTPUT")
    )
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second and pair")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--slo-ttft", type=float, default=2.0)
    parser.add_argument("--slo-itl", type=float, default=0.05)
    parser.add_argument("--only", choices=("pd", "unified"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = configuration(arguments)
    apart = ["prefill"] * arguments.pairs + ["decode"] * arguments.pairs
    arrangements = {"pd": apart, "unified": ["unified"] * (2 * arguments.pairs)}
    found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    for name, roles in arrangements.items():
        if arguments.only in (None, name):
            found[name] = measure(roles, config, arguments)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        place = "gpu" if arguments.gpus else "cpu"
        path = arguments.out / f"{date.today()}-pd-{arguments.pairs}-{place}.json"
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
