"""`tidepool config`: the configuration a command would use, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ...common.config import Resolved
from .config_markdown import config_markdown
from .options import ConfigFile, Settings, resolve_options


def config(
    file: ConfigFile = None,
    settings: Settings = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint directory.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/config.md: every key, explained.")
    ] = False,
) -> None:
    """Print the resolved configuration as TOML, with the origin of each value behind it.

    The output can be used as a configuration file.
    """
    if markdown:
        typer.echo(config_markdown(), nl=False)
        return
    named = {"model.path": None if model is None else str(model)}
    typer.echo("\n".join(config_lines(resolve_options(file, settings, named))))


def config_lines(resolved: Resolved) -> Iterator[str]:
    """Yields TOML with the origins as comments."""
    section = ""
    for name, value, origin in resolved.rows():
        head, _, key = name.partition(".")
        if head != section:
            yield from (("", f"[{head}]") if section else (f"[{head}]",))
            section = head
        yield f"{f'{key} = {_toml(value)}':<44}  # {origin}"


def _toml(value: object) -> str:
    """Strings, booleans and numbers; JSON writes them as TOML does."""
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)
