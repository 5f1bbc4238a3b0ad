"""`tidepool serve`: a cluster on Ray, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ConfigFile, Settings, resolve_options


def serve(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint directory, as the hub ships it."),
    ] = None,
    config: ConfigFile = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill nodes.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode nodes.")] = None,
    unified: Annotated[
        bool, typer.Option("--unified", help="One node that does both, instead of a pair.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Interface the front listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the front; 0 takes a free one.")] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="RAY", help="A running Ray cluster; without it a local one starts."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Serve a model: starts prefill and decode nodes and the HTTP front.

    Blocks; prints the endpoint. Ctrl-C finishes the running requests and stops everything.

    Example: tidepool serve --model ./checkpoint --decode 2 --set decode.seats=8
    """
    resolved = resolve_options(
        config,
        settings,
        {
            "model.path": None if model is None else str(model),
            "cluster.prefill": prefill,
            "cluster.decode": decode,
            "cluster.unified": 1 if unified else None,
            "front.host": host,
            "front.port": port,
        },
    )
    from ..cluster import serve as run  # noqa: PLC0415  (ray and torch: only when serving)

    run(resolved, address=address)
