"""Which weight files a run will load, known before anything heavy is imported: `shared/read_ahead` reads them early."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared import read_ahead

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_weights_ahead(settings: RunSettings) -> None:
    """Begin to read the weights of a run into the system's cache, where that is of use."""
    if settings.unified_memory.floor_gib or not read_ahead.has_gpu_memory():
        return
    read_ahead.start(weight_files(settings.model))


def weight_files(model: ConfigNode) -> list[Path]:
    """Return the safetensors files that a ``model`` section names, of those that are on this machine.

    An empty list says that there are none, or that the section has random weights; what is wrong with a directory is
    said by the loader.
    """
    name, target = model.get("pretrained_model_name_or_path"), str(model.get("_target_"))
    if not isinstance(name, str) or not (target.endswith(".from_pretrained") or model.get("load_base_model")):
        return []
    found = [_locate(model, name, file) for file in (_INDEX, _SINGLE)]
    index, single = found
    if index is None:
        return [] if single is None else [single]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path for shard in shards if (path := index.with_name(shard)).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _locate(model: ConfigNode, name: str, file: str) -> Path | None:
    """Return where a file of a model lies: in its directory, or in the cache of the Hub's files."""
    inner = model.get("subfolder") or ""
    directory = Path(name).expanduser()
    if directory.is_dir():
        path = directory / inner / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    keywords = {key: model.get(key) for key in ("revision", "cache_dir") if model.get(key) is not None}
    try:
        cached = try_to_load_from_cache(name, str(Path(inner) / file), **keywords)
    except (HFValidationError, OSError):
        return None
    return Path(cached) if isinstance(cached, str) else None
