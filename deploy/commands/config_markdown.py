"""docs/config.md from the docstrings of the configuration's dataclasses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...common.config import Config

_HEAD = """\
# Configuration

Every value has a default. A TOML file (`--config cluster.toml`) changes them, and the command line
(`--set section.key=value`) changes both; `tidepool config` prints the result and where each value
came from. Unknown keys, wrong types and values that cannot work are refused at start, all in one
message.

```toml
[model]
path = "/models/my-checkpoint"

[decode]
seats = 8
hot_rows = 4096
```

This page is generated: `tidepool config --markdown > docs/config.md`.
"""


def config_markdown() -> str:
    """Returns the whole page."""
    return "\n".join([_HEAD, *_sections()]).rstrip("\n") + "\n"


def _sections() -> Iterator[str]:
    sections = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        section = sections[field.name]
        yield f"## [{field.name}]\n"
        yield f"{(section.__doc__ or '').strip()}\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from _rows(section)
        yield ""


def _rows(section: Any) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        described = section.__pydantic_fields__[field.name]
        meaning = " ".join((described.description or "").split()).replace("|", "\\|")
        yield (
            f"| `{field.name}` | {_type_name(hints[field.name])} "
            f"| `{json.dumps(described.default)}` | {meaning} |"
        )


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(hint))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(hint, str(hint))
