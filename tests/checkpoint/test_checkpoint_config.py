"""Settings that are wrong, or that come later, are refused where they enter."""

from __future__ import annotations

import pytest

from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError


@pytest.mark.parametrize(
    "settings",
    [
        {"model_save_format": "safetensor"},
        {"save_consolidated": "sometimes"},
        {"max_recent_checkpoints": 0},
    ],
)
def test_wrong_values(settings):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(settings))}"):
        CheckpointingConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_dir": "msc://bucket/run"},
        {"dequantize_base_checkpoint": True},
        {"skip_task_head_prefixes_for_base_model": ["score."]},
    ],
)
def test_what_comes_later(settings):
    key, value = next(iter(settings.items()))
    with pytest.raises(NotSupportedYetError, match=f"checkpoint.{key}") as caught:
        CheckpointingConfig(**settings)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_without_effect_are_said():
    assert CheckpointingConfig().notices() == []
    assert CheckpointingConfig(is_async=True, wait_for_staging=True).notices() == []
    found = CheckpointingConfig(staging_dir="scratch", cpu_offload=True, wait_for_staging=True).notices()
    assert [line.split("`")[1] for line in found] == [
        "checkpoint.staging_dir",
        "checkpoint.cpu_offload",
        "checkpoint.wait_for_staging: true",
    ]
