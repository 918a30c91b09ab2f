"""Rules of the sections around the data sets: names of validation sets, loaders, packing, the label gate."""

from __future__ import annotations

import re

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.config.schema import build, check_target, require_mapping, show
from nemo_automodel.components.datasets.config import DataCheckConfig, DataloaderConfig, PackedSequenceConfig
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError

_MEDIA_PACKING_KEYS = (
    "pack_size",
    "pretokenize",
    "max_length",
    "packing_ratio",
    "balance_media_tokens",
    "collate_max_length",
    "attn_implementation",
    "packing_format",
    "post_tokenize_hook_fn",
)
_COLLATE_NAMES = ("default", "default_collater")
_VALIDATION = "validation_dataset"
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def validation_datasets(config: ConfigNode) -> dict[str, ConfigNode]:
    """Return the validation sets by name: the text after ``validation_dataset`` and a separator, or ``default``.

    Raises:
        ConfigError: a name twice, a name no file can carry, or a section that is not a mapping.
    """
    found: dict[str, ConfigNode] = {}
    for key in filter(is_validation, config.keys()):
        name = key[len(_VALIDATION) + 1 :] if key != _VALIDATION else "default"
        if not _SET_NAME.fullmatch(name):
            raise ConfigError(f"`{key}`: `{name}` cannot name a validation set. Use letters, digits, _ and -.")
        if config[key] is None:
            continue
        require_mapping(config[key], key)
        if name in found:
            raise ConfigError(f"`{key}`: there are two validation sets named `{name}`. Rename one of them.")
        found[name] = config[key]
    return found


def is_validation(section: str) -> bool:
    """Tell whether a top-level key names a validation set."""
    rest = section.removeprefix(_VALIDATION)
    return section == _VALIDATION or (rest != section and rest[0] in "_-.")


def check_dataloader(loader: DataloaderConfig, name: str) -> None:
    """Refuse collate functions that are not there, and loaders for other data.

    Raises:
        ConfigError: a collate function that is no name, path or mapping.
        NotSupportedYetError: ``dataloader_type``, which belongs to Megatron's data.
    """
    if loader.dataloader_type is not None:
        raise NotSupportedYetError(f"`{name}.dataloader_type` is not supported yet. Remove it.")
    collate = loader.collate_fn
    if isinstance(collate, ConfigNode):
        check_target(collate, may_lack=True, place=f"{name}.collate_fn")
    elif isinstance(collate, str) and "." in collate:
        check_target(ConfigNode({"_target_": collate}, f"{name}.collate_fn"), may_lack=True)
    elif collate is not None and collate not in _COLLATE_NAMES and not callable(collate):
        raise ConfigError(
            f"`{name}.collate_fn` is {show(collate)}, but it must be `default`, a dotted path or a mapping with "
            "`_target_`. Change it."
        )


def packed_sequence(node: ConfigNode | None) -> PackedSequenceConfig:
    """Build the packing section.

    Raises:
        NotSupportedYetError: keys for packing of images and sound.
        ConfigError: whatever else is wrong with it.
    """
    for key in _MEDIA_PACKING_KEYS:
        if node is not None and node.get(key) is not None:
            raise NotSupportedYetError(
                f"`packed_sequence.{key}`: packing of images is not supported yet. Remove it; the size of a row of "
                "text is `packed_sequence_size`."
            )
    config = build(PackedSequenceConfig, node, "packed_sequence")
    for key, value in (("num_proc", config.num_proc), ("max_packs", config.max_packs)):
        if value is not None and value < 1:
            raise ConfigError(f"`packed_sequence.{key}` is {value}, but it must be at least 1. Set it to 1.")
    return config


def data_check(config: ConfigNode) -> DataCheckConfig | None:
    """Read ``data_check``: ``on``, ``off`` (YAML turns both into booleans), or a mapping; ``None`` is off.

    Raises:
        ConfigError: it is something else, or a value in it is wrong.
    """
    value = config.get("data_check")
    if value is None or value is True or value == "on":
        return DataCheckConfig()
    if value is False or value == "off":
        return None
    if not isinstance(value, ConfigNode):
        raise ConfigError(
            f"`data_check` is {show(value)}, but it must be on, off or a mapping such as "
            "`{max_truncated_share: 0.9}`. Change it, or leave it out for on."
        )
    return build(DataCheckConfig, value, "data_check")
