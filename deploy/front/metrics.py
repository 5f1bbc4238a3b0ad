"""Prometheus metrics of a front: its own counters, and gauges of the nodes read at each scrape.

Label values come from closed sets: known routes, statuses, loss kinds, nodes of the cluster and
the keys of their stats (at most MAX_STATS).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .nodes import Node

MAX_STATS = 128
_STAT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

STEP_CAUSES = ("others", "seats", "launch", "device", "answer", "held")
"""Causes of long gaps between steps, see decode_node/step_times.py."""
NODE_COUNTERS = frozenset(
    {
        "bytes_received",
        "bytes_sent",
        "bytes_swapped_in",
        "checksum_errors",
        "data_fences",
        "data_fences_failed",
        "decode_steps",
        "failed_requests",
        "hellos_refused",
        "hot_hits",
        "hot_misses",
        "keeper_restarts",
        *(f"long_step_gaps_{cause}" for cause in STEP_CAUSES),
        *(f"long_step_gaps_{cause}_ms" for cause in STEP_CAUSES),
        "output_tokens",
        "parks",
        "prefill_failed",
        "prefill_steps",
        "prefill_tokens",
        "rows_swapped_in",
        "step_gaps",
        "strangers_refused",
    }
)
"""Keys of a node's stats that only grow; all others are gauges."""


class FrontMetrics:
    """The front's own metrics, on a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "tidepool_http_requests",
            "HTTP requests answered.",
            ["route", "status"],
            registry=registry,
        )
        self.stream_errors = Counter(
            "tidepool_stream_errors", "Streams that ended with an error event.", registry=registry
        )
        self.disconnects = Counter(
            "tidepool_client_disconnects", "Clients that went away early.", registry=registry
        )
        self.prompt_tokens = Counter(
            "tidepool_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry
        )
        self.output_tokens = Counter(
            "tidepool_output_tokens", "Output tokens given to clients.", registry=registry
        )
        self.attempts = Counter(
            "tidepool_attempts", "Attempts submitted to nodes.", registry=registry
        )
        self.losses = Counter(
            "tidepool_attempts_lost", "Attempts lost, by cause.", ["kind"], registry=registry
        )
        self.stale_messages = Counter(
            "tidepool_stale_messages", "Messages of attempts nobody waits for.", registry=registry
        )
        self.ttft = Histogram(
            "tidepool_ttft_seconds",
            "Time from a request's arrival to its first token.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "tidepool_tpot_seconds",
            "Mean time per output token behind the first.",
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "tidepool_requests_in_flight", "Requests admitted and not answered.", registry=registry
        )
        self.waiting = Gauge(
            "tidepool_requests_waiting", "Requests without a node.", registry=registry
        )

    def watch_nodes(self, nodes: Callable[[], Iterable[Node]]) -> None:
        """Adds the nodes' gauges; `nodes` is read at each scrape."""
        self.registry.register(_NodeCollector(nodes))

    def render(self) -> bytes:
        """Returns the text format."""
        return generate_latest(self.registry)


class _NodeCollector(Collector):
    def __init__(self, nodes: Callable[[], Iterable[Node]]) -> None:
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        nodes = list(self._nodes())
        yield from _load_gauges(nodes)
        yield from _stat_metrics(nodes)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names depend on the nodes."""
        return []


_LOAD: dict[str, tuple[str, Callable[[Node], float]]] = {
    "up": ("Whether the node answers.", lambda node: node.is_up),
    "draining": ("Whether the node drains.", lambda node: node.load.is_draining),
    "queued": ("Requests queued.", lambda node: node.load.num_queued),
    "running": ("Requests running.", lambda node: node.load.num_running),
    "parked": ("Requests parked.", lambda node: node.load.num_parked),
    "in_flight": ("Attempts of this front.", lambda node: node.in_flight),
    "pages_free": ("KV pages that are free.", lambda node: node.load.free_pages),
    "pages_used": (
        "KV pages that are held.",
        lambda node: node.load.total_pages - node.load.free_pages,
    ),
    "pages_quarantined": (
        "KV pages kept back because a late write may still reach them.",
        lambda node: node.load.quarantined_pages,
    ),
}
_LOAD_NAMES = frozenset(_LOAD)


def _load_gauges(nodes: list[Node]) -> Iterator[Metric]:
    for name, (text, read) in _LOAD.items():
        family = GaugeMetricFamily(f"tidepool_node_{name}", text, labels=["node", "role"])
        for node in nodes:
            family.add_metric([node.info.node_id, node.info.role], float(read(node)))
        yield family


def _stat_metrics(nodes: list[Node]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for node in nodes:
        for key, value in node.info.stats.items():
            if not isinstance(value, int | float) or not _STAT_NAME.match(key):
                continue
            if key in _LOAD_NAMES or (key not in families and len(families) >= MAX_STATS):
                continue
            family = families.setdefault(key, _family(key))
            family.add_metric([node.info.node_id, node.info.role], float(value))
    yield from families.values()


def _family(key: str) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if key in NODE_COUNTERS else GaugeMetricFamily
    text = f"{key.replace('_', ' ')}, as the node tells."
    return kind(f"tidepool_node_{key}", text, labels=["node", "role"])
