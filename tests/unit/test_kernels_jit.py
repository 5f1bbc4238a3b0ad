"""Building CUDA sources: once for each key, whatever asks at the same time. nvcc is a stand-in script."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tidepool.common.errors import KernelError
from tidepool.kernels import jit

NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "stand-in 1"; exit 0; }
echo run >> "$(dirname "$0")/runs"
sleep 0.2
for last; do :; done
grep -q broken "$(dirname "$0")/op.cu" && { echo "op.cu(1): error" >&2; exit 2; }
echo built > "$last"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    (tmp_path / "op.cu").write_text("// source\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(jit.ctypes, "CDLL", lambda path: path)
    jit._version.cache_clear()
    return tmp_path


def library(folder: Path, **changes: object) -> jit.Library:
    values = {"name": "op", "source": folder / "op.cu", "capability": (9, 0)} | changes
    return jit.Library(**values)


def num_runs(folder: Path) -> int:
    runs = folder / "runs"
    return len(runs.read_text().split()) if runs.exists() else 0


def test_many_at_once_build_one_file_once(folder: Path) -> None:
    paths: list[str] = []
    threads = [
        threading.Thread(target=lambda: paths.append(jit.load(library(folder), folder / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(paths) == 4 and len(set(paths)) == 1
    assert num_runs(folder) == 1
    assert Path(paths[0]).read_text() == "built\n"
    assert not list((folder / "cache").glob(".*")), "no unfinished file is left"


def test_a_changed_source_header_flag_or_architecture_is_another_file(folder: Path) -> None:
    def key(**changes: object) -> str:
        return library(folder, **changes).key(str(folder / "nvcc"))

    keys = [key(), key(capability=(8, 0)), key(flags=("-DX",))]
    (folder / "op.cu").write_text("// another\n")
    keys.append(key())
    (folder / "shared.cuh").write_text("// header\n")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_a_failing_build_says_what_nvcc_said_and_leaves_nothing(folder: Path) -> None:
    (folder / "op.cu").write_text("broken\n")
    with pytest.raises(KernelError, match=r"op\.cu\(1\): error"):
        jit.load(library(folder), folder / "cache")
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".lock"]


def test_no_nvcc_is_a_kernel_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(KernelError, match="nvcc"):
        jit.load(jit.Library("op", Path("op.cu"), (9, 0)))


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((8, 6), "sm_86")],
)
def test_each_architecture_is_built_for_itself(capability: tuple[int, int], target: str) -> None:
    flags = jit.Library("op", Path("op.cu"), capability).all_flags
    assert any(flag.endswith(f"code={target}") for flag in flags)
