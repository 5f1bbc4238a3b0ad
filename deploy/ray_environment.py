"""Environment of Ray's own processes: how fast it sees that a machine or a process is gone.

`start` sets it for a Ray that it starts itself; on a cluster of machines export it on each before
`ray start` (docs/multinode.md). Requests do not wait for Ray: fronts route around a silent node by
the heartbeats of their sessions. Ray decides when a node's replacement starts.
"""

from __future__ import annotations

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
"""A machine counts as lost after about 15 s, not 65 s, and outlives a 6 s partition; machines
wait 10 minutes, not one, for a head that restarts. Ray's default would run nodes and fronts at nice 15,
behind everything else on the machine."""
