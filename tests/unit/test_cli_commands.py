"""The command line: what a stranger sees, and that errors are one message."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.front import RunningFront

from tidepool.common import wire
from tidepool.common.config import parse
from tidepool.deploy import cli
from tidepool.deploy.commands.config_markdown import config_markdown

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidepool", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    monkeypatch.setenv("COLUMNS", "200")
    return run


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("serve", "demo", "status", "config"))


@pytest.mark.parametrize("command", ["serve", "demo", "status", "config"])
def test_every_command_explains_itself(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "--help" in out


def test_the_printed_configuration_is_toml_that_gives_the_same(run, tmp_path):
    file = tmp_path / "cluster.toml"
    file.write_text('[decode]\nseats = 3\n[model]\npath = "/a \\"b\\""\n')
    code, out, _ = run("config", "--config", str(file), "--set", "kv.page_size=16")
    assert code == 0
    config = parse(tomllib.loads(out))
    assert (config.decode.seats, config.kv.page_size, config.model.path) == (3, 16, '/a "b"')
    lines = {line.split(" = ")[0]: line for line in out.splitlines() if " = " in line}
    assert lines["seats"].endswith(f"# file {file}")
    assert lines["page_size"].endswith("# command line")
    assert lines["hot_rows"].endswith("# default")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set", "x"], "write SECTION.KEY=VALUE"),
        (["--set", "decode=3"], "write SECTION.KEY=VALUE"),
        (["--set", "nothing.here=1"], "nothing: there is no such key"),
        (["--set", "decode.nothing=1"], "decode.nothing: there is no such key"),
        (["--set", "decode.seats=many"], "decode.seats"),
        (["--set", "kv.page_size=48"], "power of two"),
        (["--config", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_a_bad_configuration_is_one_message_and_status_2(run, arguments, text):
    code, out, err = run("config", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and text in err
    assert "Traceback" not in err


def test_all_faults_come_in_one_message(run):
    code, _, err = run("config", "--set", "kv.page_size=48", "--set", "decode.seats=0")
    assert code == 2
    assert "page size" in err and "decode.seats" in err


@pytest.mark.parametrize("content", [b"\xff", b"[", b"kv = 3\n"])
def test_an_unusable_file_is_one_message(run, tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    code, _, err = run("config", "--config", str(file), "--set", "kv.page_size=16")
    assert code == 2 and err.startswith("error: ")


def test_serve_resolves_its_options_and_runs_the_cluster(run, monkeypatch):
    from tidepool.deploy import cluster  # noqa: PLC0415

    seen: dict[str, Any] = {}

    def serve(resolved, *, address):
        seen.update(config=resolved.config, origins=dict(resolved.origins), address=address)

    monkeypatch.setattr(cluster, "serve", serve)
    options = ["--model", "/m", "--prefill", "2", "--decode", "3", "--port", "0"]
    code, _, err = run("serve", *options, "--address", "auto", "--set", "decode.seats=7")
    assert (code, err) == (0, "")
    config = seen["config"]
    assert (config.model.path, config.cluster.prefill, config.cluster.decode) == ("/m", 2, 3)
    assert (config.front.port, config.decode.seats, seen["address"]) == (0, 7, "auto")
    assert seen["origins"]["cluster.decode"] == "command line"
    assert "decode.hot_rows" not in seen["origins"]


def test_serve_without_a_model_is_one_message(run):
    code, _, err = run("serve")
    assert code == 2
    assert "no checkpoint directory" in err and "Traceback" not in err


def test_status_shows_every_node_of_a_running_front(run):
    with RunningFront() as front:
        code, out, err = run("status", "--url", front.url)
        assert (code, err) == (0, "")
        assert "prefill-0" in out and "decode-0" in out and "ready" in out
        code, out, _ = run("status", "--url", front.url, "--json")
        assert code == 0 and '"is_ready": true' in out
        front.control.say("decode-0", wire.Ping(wire.Load(quarantined_pages=417)))
        front.wait_for(lambda: "417" in run("status", "--url", front.url)[1])
        front.control.down("decode-0")
        front.wait_for(lambda: bool(front.service.missing_roles))
        code, out, _ = run("status", "--url", front.url)
        assert code == 1 and "no decode node" in out


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "http://x\x00/"])
def test_status_without_a_front_is_one_message(run, url):
    code, _, err = run("status", "--url", url)
    assert code == 2
    assert err.startswith("error: no tidepool front answers") and "Traceback" not in err


def test_help_imports_nothing_slow():
    slow = "{'torch', 'ray', 'transformers', 'fastapi', 'uvicorn'}"
    script = (
        "import sys; sys.argv = ['tidepool', 'config']\n"
        "from tidepool.deploy import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"found = {slow} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=REPOSITORY.parent,
    )
    assert done.returncode == 0, done.stderr


def test_docs_config_is_up_to_date():
    page = (REPOSITORY / "docs" / "config.md").read_text()
    assert page == config_markdown(), "run: tidepool config --markdown > docs/config.md"


def test_every_key_is_explained():
    rows = [line for line in config_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]
