"""A configuration that cannot work with its model or machine is refused in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import session_checkpoint

from tidepool.common.config import Config, resolve
from tidepool.common.errors import ConfigError
from tidepool.decode_node.build import check, host_bytes, max_context
from tidepool.model.config import ModelConfig, geometry


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = session_checkpoint(tmp_path_factory, "glm52")
    return ModelConfig.from_dir(path)


def configured(**overrides: object) -> Config:
    return resolve(
        None, {name.replace("__", "."): value for name, value in overrides.items()}
    ).config


def test_every_fault_is_in_one_message(model: ModelConfig) -> None:
    config = configured(
        decode__hot_rows=8,
        decode__max_context=10**6,
        decode__index_tokens=32,
        kv__layout="mla_fp8",
        model__path="x",
    )
    with pytest.raises(ConfigError) as caught:
        check(config, model)
    message = str(caught.value)
    for part in ("top-k of 16 rows, not 8", "4096 positions", "index_tokens", "mla_fp8"):
        assert part in message


def test_a_host_pool_larger_than_the_machine_is_refused_with_both_numbers(
    model: ModelConfig,
) -> None:
    config = configured(decode__host_tokens=65536)
    needed = host_bytes(config, geometry(model, config.kv))
    check(config, model, available_bytes=needed)
    with pytest.raises(ConfigError, match=f"{needed} bytes.*{needed - 1}"):
        check(config, model, available_bytes=needed - 1)


def test_the_longest_context_is_the_smallest_limit(model: ModelConfig) -> None:
    assert max_context(configured(), model) == model.max_position_embeddings
    assert max_context(configured(decode__host_tokens=512), model) == 512
    assert max_context(configured(decode__max_context=100), model) == 100
