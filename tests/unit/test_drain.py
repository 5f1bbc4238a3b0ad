"""SIGTERM of a real process: the first drains, the second hurries, and the process ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading
from tidepool.deploy.drain import DrainOnTerm

def drain(hurry):
    print("draining", flush=True)
    if sys.argv[1] == "waits":
        hurry.wait()
        print("hurried", flush=True)
    elif sys.argv[1] == "fails":
        raise ValueError("cannot drain")

DrainOnTerm(drain).install()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(("kind", "status"), [("returns", 0), ("waits", 0), ("fails", 70)])
def test_a_process_drains_on_sigterm_and_ends(kind: str, status: int) -> None:
    command = (sys.executable, "-c", SCRIPT, kind)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        if kind == "waits":
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "hurried\n"
        assert process.wait(30.0) == status
