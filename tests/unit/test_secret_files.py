"""Secret files: who may read them, what must be in them, and what an error may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.secret_file import SECRET, secret_file

from tidepool.common.config import Config, parse
from tidepool.common.errors import ConfigError
from tidepool.common.secret_files import read_api_keys, read_cluster_secret
from tidepool.deploy.cluster_secret import check_secrets, forget, with_local_secret


def config(**cluster: str) -> Config:
    return parse({"cluster": cluster})


def test_white_space_at_the_ends_does_not_count(tmp_path: Path) -> None:
    assert read_cluster_secret(secret_file(tmp_path, f"\n {SECRET}\r\n")) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_file_open_to_others_is_an_error(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    for read in (read_cluster_secret, read_api_keys):
        with pytest.raises(ConfigError, match="open to others") as caught:
            read(path)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["", "hunter2", "x" * 31])
def test_a_short_secret_is_an_error_that_does_not_show_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{len(text)} bytes") as caught:
        read_cluster_secret(secret_file(tmp_path, text))
    assert not text or text not in str(caught.value)


def test_a_missing_file_a_directory_and_a_huge_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_cluster_secret(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_cluster_secret(str(tmp_path))
    with pytest.raises(ConfigError, match="larger than"):
        read_cluster_secret(secret_file(tmp_path, "x" * (1 << 20) + "x"))


def test_keys_are_lines_and_comments_are_not(tmp_path: Path) -> None:
    text = "# alice\nsk-alice-0123456789\n\n  sk-bob-0123456789ab  \r\n"
    assert read_api_keys(secret_file(tmp_path, text)) == (
        "sk-alice-0123456789",
        "sk-bob-0123456789ab",
    )


@pytest.mark.parametrize(
    "text, match",
    [
        ("# nobody\n", "holds no key"),
        ("tooshort", "line 1"),
        ("sk-good-0123456789\nsk with spaces in it", "line 2"),
        ("sk-\u00fcml\u00e4ut-0123456789", "line 1"),
    ],
)
def test_a_bad_key_is_an_error_by_its_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read_api_keys(secret_file(tmp_path, text))
    assert "sk-" not in str(caught.value)


def test_a_cluster_on_its_own_ray_makes_a_secret_up_and_removes_it() -> None:
    made, path = with_local_secret(config())
    try:
        assert made.cluster.secret_file == path
        assert len(read_cluster_secret(path)) >= 32
        _, other_path = with_local_secret(config())
        assert read_cluster_secret(other_path) != read_cluster_secret(path)
        forget(other_path)
    finally:
        forget(path)
        forget(path)
    assert not Path(path).exists()


def test_a_named_secret_and_no_authentication_are_left_as_they_are(tmp_path: Path) -> None:
    for each in (config(secret_file=secret_file(tmp_path)), config(authentication="off")):
        assert with_local_secret(each) == (each, "")


def test_a_cluster_on_a_running_ray_needs_a_named_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secret_file"):
        check_secrets(config(), is_local=False)
    check_secrets(config(), is_local=True)
    check_secrets(config(authentication="off"), is_local=False)
    check_secrets(config(secret_file=secret_file(tmp_path)), is_local=False)
    with pytest.raises(ConfigError, match="open to others"):
        check_secrets(config(secret_file=secret_file(tmp_path, mode=0o644)), is_local=False)
    with pytest.raises(ConfigError, match="cannot read"):
        check_secrets(config(secret_file=str(tmp_path / "missing")), is_local=True)
