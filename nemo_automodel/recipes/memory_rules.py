"""Rules of the ``memory:`` section."""

from __future__ import annotations

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.config.schema import build, show
from nemo_automodel.components.plan.config import MemoryConfig
from nemo_automodel.shared.errors import ConfigError


def memory_settings(config: ConfigNode, notices: list[str]) -> MemoryConfig:
    """Read ``memory``: a policy, or a mapping; note what has no effect beside ``auto``.

    Raises:
        ConfigError: it is something else, or a value in it is not known.
    """
    value = config.get("memory")
    if isinstance(value, str):
        value = ConfigNode({"policy": value}, "memory")
    if value is not None and not isinstance(value, ConfigNode):
        raise ConfigError(
            f"`memory` is {show(value)}, but it must be fixed, auto or a mapping such as `{{rescue: false}}`. Change "
            "it, or leave it out for fixed."
        )
    found = build(MemoryConfig, value, "memory")
    if found.policy == "auto" and config.get("distributed.activation_checkpointing") is not None:
        notices.append("`distributed.activation_checkpointing` has no effect on a GPU: `memory: auto` chooses there.")
    return found
