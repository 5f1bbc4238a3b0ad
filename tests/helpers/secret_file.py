"""Files that hold secrets, for tests."""

from __future__ import annotations

from pathlib import Path

SECRET = "a secret for tests, not to be guessed by anybody"


def secret_file(directory: Path, text: str = SECRET, mode: int = 0o600) -> str:
    path = directory / "secret"
    path.write_text(text)
    path.chmod(mode)
    return str(path)
