"""Where a cluster's secret comes from, and what can be said of secret files before anything starts.

A cluster on its own local Ray makes a secret up: a private file that lives as long as the cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
from pathlib import Path

from ..common.config import Config
from ..common.errors import ConfigError
from ..common.secret_files import read_api_keys, read_cluster_secret


def check_secrets(config: Config, *, is_local: bool) -> None:
    """Raises ConfigError for secret files that are missing, open to others or unusable.

    On a running Ray the files may be on other machines only; those are checked where they are read.
    """
    cluster = config.cluster
    is_wanted = cluster.authentication == "secret"
    if is_wanted and not cluster.secret_file and not is_local:
        raise ConfigError(
            "cluster.secret_file: nodes on a running Ray need a file with the cluster's secret on "
            "every machine (umask 077; head -c 32 /dev/urandom | base64 > FILE); to run without, "
            'set cluster.authentication = "off"'
        )
    if is_wanted and cluster.secret_file and (is_local or Path(cluster.secret_file).exists()):
        read_cluster_secret(cluster.secret_file)
    keys_file = config.front.api_keys_file
    if keys_file and (is_local or Path(keys_file).exists()):
        read_api_keys(keys_file)


def with_local_secret(config: Config) -> tuple[Config, str]:
    """The configuration with a fresh secret file, if it needs one, and the file's path (or "").

    The caller removes the file with `forget`.
    """
    cluster = config.cluster
    if cluster.authentication == "off" or cluster.secret_file:
        return config, ""
    handle, path = tempfile.mkstemp(prefix="tidepool-secret-")  # mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_urlsafe(48))
    changed = dataclasses.replace(cluster, secret_file=path)
    return dataclasses.replace(config, cluster=changed), path


def forget(path: str) -> None:
    """Removes a secret made by `with_local_secret`."""
    if path:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
