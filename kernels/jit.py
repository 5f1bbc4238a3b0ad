"""Builds the CUDA sources with nvcc, once for each source, flags and architecture, and loads them.

A library is a plain C interface (no torch headers, so that a build takes seconds), opened with
ctypes. Built files live in a folder under a name that is a hash of everything that went into them;
several processes may ask at once: one builds behind a file lock, and the file appears by an atomic
rename. Called at the first use of a CUDA op, or before by a node that wants the build over at its
start.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..common.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
DEFAULT_CACHE = Path.home() / ".cache" / "tidepool"
BUILD_TIMEOUT_S = 600.0
_FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC")
# Hopper's own instructions need the "a" target; others are built for themselves.
_ARCHITECTURES = {(8, 0): "80", (9, 0): "90a", (10, 0): "100"}


@dataclass(frozen=True, slots=True)
class Library:
    """What to build.

    Attributes:
        name: start of the file name.
        source: the .cu file; headers (*.h, *.cuh) beside it and in `SOURCES` count as part of it.
        capability: the device's compute capability, (9, 0) for H100 and H200.
        flags: further nvcc flags.
    """

    name: str
    source: Path
    capability: tuple[int, int]
    flags: tuple[str, ...] = ()

    @property
    def all_flags(self) -> tuple[str, ...]:
        major, minor = self.capability
        target = _ARCHITECTURES.get(self.capability, f"{major}{minor}")
        return (
            *_FLAGS,
            f"-gencode=arch=compute_{target},code=sm_{target}",
            f"-I{SOURCES}",
            *self.flags,
        )

    def key(self, nvcc: str) -> str:
        """Hash of sources, flags (architecture included) and compiler version."""
        flags = [flag for flag in self.all_flags if not flag.startswith("-I")]
        digest = hashlib.sha256(repr((flags, _version(nvcc))).encode())
        folders = {self.source.parent, SOURCES}
        headers = {path for folder in folders for path in folder.glob("*.*h")}
        for path in (self.source, *sorted(headers)):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
        return digest.hexdigest()[:20]


def load(library: Library, cache_dir: Path | None = None) -> ctypes.CDLL:
    """Opens the library, building it first if its file is not in `cache_dir` (default: the user's).

    Raises KernelError if nvcc is missing, fails, or takes longer than BUILD_TIMEOUT_S (waiting for
    another process that builds the same file included).
    """
    nvcc = _find_nvcc()
    folder = DEFAULT_CACHE if cache_dir is None else cache_dir
    path = folder / f"{library.name}-{library.key(nvcc)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _build(nvcc, library, path)
    return ctypes.CDLL(str(path))


def _build(nvcc: str, library: Library, path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", prefix=f".{library.name}-", dir=path.parent)
    os.close(handle)
    command = [nvcc, *library.all_flags, str(library.source), "-o", name]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if result.returncode:
            raise KernelError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
        os.replace(name, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{' '.join(command)}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the lock of a process that dies is released by the system."""
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise KernelError(
                        f"{path}: another process has been building for {BUILD_TIMEOUT_S} s"
                    ) from error
                time.sleep(0.05)
        yield


def _find_nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise KernelError("CUDA ops need nvcc on the PATH or in /usr/local/cuda/bin")
    return found


@lru_cache(maxsize=4)
def _version(nvcc: str) -> str:
    try:
        return subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{nvcc} --version: {error}") from error
