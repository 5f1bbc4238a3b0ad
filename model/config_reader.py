"""Typed reads from a JSON object that collect faults instead of stopping at the first one.

Used by config.py alone. After a fault a read answers a harmless value, so that the caller can go
on and find the others; `raise_faults` ends it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError

_MAX_JSON_BYTES = 256 * 1024 * 1024
_MAX_NUMBER = 1e15
"""Bound of every real number in a configuration; keeps infinity and NaN out too."""


def read_json(path: Path) -> dict[str, Any]:
    """Parses one JSON object; CheckpointError if the file is absent, too large or something else."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(tree).__name__}")
    return tree


class ConfigReader:
    """Reads `tree` (the object named `prefix`); null counts as absent."""

    def __init__(
        self, tree: dict[str, Any], prefix: str = "", faults: list[str] | None = None
    ) -> None:
        self.tree = tree
        self._prefix = prefix
        self._faults: list[str] = [] if faults is None else faults

    def fault(self, text: str) -> None:
        if text not in self._faults:
            self._faults.append(text)

    def raise_faults(self) -> None:
        if self._faults:
            raise CheckpointError("\n".join(f"config.json: {fault}" for fault in self._faults))

    def child(self, name: str) -> ConfigReader:
        """Reader of the object `name`; an absent one is empty."""
        value = self.tree.get(name)
        if value is not None and not isinstance(value, dict):
            self.fault(f"{name}: must be an object, not {value!r:.60}")
        return ConfigReader(value if isinstance(value, dict) else {}, f"{name}.", self._faults)

    def integer(
        self, name: str, *, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int:
        value = self._value(name, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and minimum <= value <= maximum:
            return value
        if value is not None:
            bounds = f"at least {minimum}" if value_is_low(value, minimum) else f"at most {maximum}"
            self.fault(f"{self._prefix}{name}: must be an integer of {bounds}, not {value!r:.60}")
        return max(minimum, 1)

    def number(self, name: str, *, default: float | None = None, minimum: float = 1e-12) -> float:
        value = self._value(name, default)
        if type(value) in (int, float) and minimum <= value <= _MAX_NUMBER:
            return float(value)
        if value is not None:
            sign = "positive" if minimum > 0 else "non-negative"
            self.fault(f"{self._prefix}{name}: must be a {sign} number, not {value!r:.60}")
        return 1.0

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is bool:
            return value
        self.fault(f"{self._prefix}{name}: must be true or false, not {value!r:.60}")
        return default

    def choices(self, name: str, words: dict[str, str], length: int) -> tuple[str, ...] | None:
        """A list (or string) of `length` entries, each a key of `words`; None when absent."""
        value = self.tree.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, str)) or len(value) != length:
            self.fault(
                f"{name}: must have one entry for each of {length} layers, not {value!r:.60}"
            )
            return None
        unknown = sorted({repr(entry) for entry in value if str(entry) not in words})
        if unknown:
            self.fault(f"{name}: entries must be {', '.join(words)}, not {', '.join(unknown[:4])}")
            return None
        return tuple(words[str(entry)] for entry in value)

    def only(self, name: str, supported: object) -> None:
        """A fault when `name` is present with any other value."""
        value = self.tree.get(name)
        if value is not None and value != supported:
            self.fault(f"{self._prefix}{name}: only {supported!r} is supported, not {value!r:.60}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.tree.get(name)
        if value is None:
            value = default
        if value is None:
            self.fault(f"{self._prefix}{name}: is missing")
        return value


def value_is_low(value: object, minimum: int) -> bool:
    """Whether to quote the lower bound: for anything that is not a too large integer."""
    return type(value) is not int or value < minimum
