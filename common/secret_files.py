"""Files that hold secrets: the cluster's own, and the API keys of its clients.

Read once, when a node or front is built. What is in them never appears in an error, a log line, a
configuration that is printed, or a repr.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024
MIN_SECRET_BYTES = 32
"""Whoever records traffic can try guesses at the secret offline: it must not be guessable."""
MIN_KEY_CHARACTERS = 16


def read_cluster_secret(path: str) -> bytes:
    """The secret in a file, without white space at its ends.

    ConfigError if the file cannot be read, is open to others, or holds less than 32 bytes.
    """
    secret = _read_private(path, "cluster.secret_file").strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"cluster.secret_file: {path} holds {len(secret)} bytes; a secret has at least "
            f"{MIN_SECRET_BYTES}"
        )
    return secret


def read_api_keys(path: str) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and lines that start with # do not count.

    ConfigError if the file cannot be read, is open to others, has no key or a bad one.
    """
    where = "front.api_keys_file"
    lines = [line.strip() for line in _read_private(path, where).split(b"\n")]
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith(b"#"):
            continue
        if len(line) < MIN_KEY_CHARACTERS or not all(33 <= byte <= 126 for byte in line):
            raise ConfigError(
                f"{where}: line {number} of {path} is not a key: at least {MIN_KEY_CHARACTERS} "
                "printable ASCII characters without spaces"
            )
        keys.append(line.decode())
    if not keys:
        raise ConfigError(f"{where}: {path} holds no key")
    return tuple(keys)


def _read_private(path: str, where: str) -> bytes:
    """The bytes of a file that only its owner can read; the open file is what is checked."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{where}: {path} is not a file")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"{where}: {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
                    "chmod it to 0600 or 0400"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{where}: {path} is larger than {MAX_FILE_BYTES} bytes")
    return content
