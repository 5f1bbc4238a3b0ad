"""Options that several commands share, and from them the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...common.config import Resolved, resolve
from ...common.errors import ConfigError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file; docs/config.md lists every key."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Overrides one value of the configuration; may be given several times.",
    ),
]


def resolve_options(
    file: Path | None, settings: Sequence[str] | None, named: dict[str, Any]
) -> Resolved:
    """Lays `--set` and then the command's own options over the file. None means: not given.

    Raises ConfigError with every fault, one a line.
    """
    overrides = parse_settings(settings or ())
    overrides.update({name: value for name, value in named.items() if value is not None})
    return resolve(file, overrides)


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Splits SECTION.KEY=VALUE; the value keeps its text, the configuration knows its type."""
    overrides = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {setting}: write SECTION.KEY=VALUE, as in decode.seats=8")
        overrides[f"{section}.{key}"] = value.strip()
    return overrides
