"""Runs on a host: starts a cluster on the hosts' Ray, then answers one JSON line for each on stdin.

    {"op": "audit"}                          -> {"decode-0": {...stats}, "prefill-0": {"error": ...}}
    {"op": "info"}                           -> {"decode-0": {...info}, ...}
    {"op": "fronts"}                         -> {"front-0": {"pid": its process there}, ...}
    {"op": "fence"}                          -> {"decode-0": {"is_asked": true}, ...}
    {"op": "alive"}                          -> {"nodes": number of machines Ray believes in}
    {"op": "stop"}                           -> {"stopped": true}, and the process ends

Started by ray_cluster.RayCluster; its first line tells the fronts' URL. Every call has a bound, so a
node that cannot be reached costs CALL_TIMEOUT_S and is reported as an error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import ray

from tidepool.common.config import parse
from tidepool.deploy.cluster import Cluster, start

CALL_TIMEOUT_S = 15.0
KEEP_INTERVAL_S = 1.0


def main() -> None:
    settings = json.loads(sys.argv[1])
    cluster = start(parse(settings), address=sys.argv[2], log_to_driver=False)
    say({"url": cluster.url})
    threading.Thread(target=keep_fronts, args=(cluster,), daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "stop":
            cluster.stop()
            say({"stopped": True})
            return
        say(answer(cluster, request["op"]))


def keep_fronts(cluster: Cluster) -> None:
    while True:
        time.sleep(KEEP_INTERVAL_S)
        cluster.keep_fronts()


def answer(cluster: Cluster, operation: str) -> dict[str, Any]:
    if operation == "alive":
        return {"nodes": sum(node["Alive"] for node in ray.nodes())}
    if operation == "fronts":
        pids = {name: actor.pid.remote() for name, actor in cluster.fronts.actors.items()}
        return {name: {"pid": _get(pid)} for name, pid in pids.items()}
    if operation == "fence":
        decodes = {name: actor for name, actor in cluster.nodes.items() if "decode" in name}
        asked = {name: actor.fence_writers.remote("a test") for name, actor in decodes.items()}
        return {name: {"is_asked": _get(call)} for name, call in asked.items()}
    method = {"audit": "audit", "info": "info"}[operation]
    calls = {node_id: getattr(actor, method).remote() for node_id, actor in cluster.nodes.items()}
    return {node_id: _get(call) for node_id, call in calls.items()}


def _get(call: Any) -> Any:
    try:
        return ray.get(call, timeout=CALL_TIMEOUT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        return {"error": f"{type(error).__name__}: {error}", "is_silent": True}
    except ray.exceptions.RayError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    _ANSWERS = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what else is printed goes to the log
    main()
