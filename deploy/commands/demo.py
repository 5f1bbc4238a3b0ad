"""`tidepool demo`: the whole path once, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Settings, parse_settings


def demo(
    seed: Annotated[int | None, typer.Option(help="Repeats the prompt of that number.")] = None,
    settings: Settings = None,
) -> None:
    """Ask a small built-in model a question about an 8,000-token prompt.

    Starts a local Ray with one prefill node, one decode node and the front, streams the answer,
    prints what it cost, and stops everything. Needs no GPU and no network.
    """
    overrides = parse_settings(settings or ())
    from ..demo.run import main  # noqa: PLC0415  (ray and torch: only when it runs)

    raise typer.Exit(main(dict(overrides), seed))
