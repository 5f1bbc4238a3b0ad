"""The proof that earlier processes of a node are dead."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tidepool.deploy import incarnations
from tidepool.deploy.incarnations import MAX_RECORDED, Incarnations

HOLDER = """
import sys, time
from pathlib import Path
from tidepool.deploy.incarnations import Incarnations
mine = Incarnations("decode-0", Path(sys.argv[1]))
assert mine.claim()
mine.record(7)
print("held", flush=True)
time.sleep(60)
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """Another process of the node, epoch 7, alive."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait(10.0)
    assert holder.stdout is not None
    holder.stdout.close()


@pytest.fixture(autouse=True)
def quiet_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of TCP sockets of our own."""
    table = tmp_path / "tcp"
    table.write_text("header\n")
    monkeypatch.setattr(incarnations, "_TCP_TABLES", (table,))
    return table


def test_a_process_that_lives_is_never_called_dead(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        successor = Incarnations("decode-0", tmp_path)
        assert not successor.claim(0.2)
        successor.record(8)
        assert successor.dead_epochs() == ()
        successor.close()
    finally:
        end(holder)
    later = Incarnations("decode-0", tmp_path)
    assert later.claim()
    assert later.dead_epochs() == (7,), "epoch 8 never had the lock: nothing is known of it"
    later.close()


def test_a_killed_process_is_proven_dead_to_the_next(tmp_path: Path) -> None:
    end(hold(tmp_path))
    for epoch in (8, 9):
        mine = Incarnations("decode-0", tmp_path)
        assert mine.claim()
        mine.record(epoch)
        assert mine.dead_epochs() == tuple(range(7, epoch))
        mine.close()


def test_bytes_that_the_kernel_still_sends_delay_the_proof(
    tmp_path: Path, quiet_kernel: Path
) -> None:
    end(hold(tmp_path))
    mine = Incarnations("decode-0", tmp_path)
    assert mine.claim()
    row = "   0: 0100007F:0019 0200007F:0020 {} 000000A0:00000000 00:00000000 00000000 0 0 0\n"
    quiet_kernel.write_text("header\n" + row.format("04"))
    assert mine.dead_epochs() == ()
    quiet_kernel.write_text("header\n" + row.format("01"))
    assert mine.dead_epochs() == (7,)
    mine.close()


@pytest.mark.parametrize("text", ["[1, 2", '{"a": 1}', "[1.5]", '["x"]', "[true]"])
def test_a_record_that_makes_no_sense_proves_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.json").write_text(text)
    mine = Incarnations("n", tmp_path)
    assert mine.claim()
    assert mine.dead_epochs() == ()
    mine.close()


def test_a_node_that_ends_in_order_leaves_no_record(tmp_path: Path) -> None:
    mine = Incarnations("n", tmp_path)
    assert mine.claim()
    mine.record(1)
    mine.forget()
    assert not (tmp_path / "n.json").exists()


def test_the_record_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(json.dumps(list(range(MAX_RECORDED))))
    mine = Incarnations("n", tmp_path)
    assert mine.claim()
    mine.record(99)
    assert len(json.loads((tmp_path / "n.json").read_text())) == MAX_RECORDED
    mine.close()
