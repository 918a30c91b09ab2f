"""Where a model comes from: a directory here, or a name on the Hugging Face Hub.

A local directory is checked before anything heavy happens: a copy that broke off would otherwise surface as a traceback
deep in a loader, or worse, as a model whose missing weights were filled with random numbers. Errors of the Hub are told
by the type of the exception, never by its text.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars as disable_datasets_bars
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from nemo_automodel.shared import hub_errors
from nemo_automodel.shared.errors import UserError, did_you_mean

_BROKEN_ARCHIVE = "PytorchStreamReader failed"
"""How torch begins what it says of a cut-off `.bin` file."""

logger = logging.getLogger(__name__)

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def hide_bars_without_terminal() -> None:
    """Keep the progress bars of Transformers and Datasets out of files and pipes, where they are noise."""
    if not sys.stderr.isatty():
        disable_transformers_bars()  # type: ignore[no-untyped-call]
        disable_datasets_bars()


def resolve_source(name: str) -> str:
    """Return the directory or Hub name that ``name`` means.

    Raises:
        UserError: it is spelt as a path and there is no such directory.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists()
    if is_path:
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"The model directory `{name}` {what}. Give a directory with config.json, or a Hub name.")
    return name


def check_local_model(directory: Path) -> None:
    """Refuse a directory that holds no complete model: no configuration, no weights, missing or cut-off files.

    Raises:
        UserError: naming the directory, the file and the remedy.
    """
    if not (directory / "config.json").is_file():
        raise UserError(_no_config(directory))
    files = [path for pattern in _WEIGHT_PATTERNS for path in sorted(directory.glob(pattern))]
    if not files:
        raise UserError(
            f"`{directory}` has a config.json but no weights (model.safetensors). Copy the weights there, or train "
            "from scratch with NeMoAutoModelForCausalLM.from_config."
        )
    for index in (directory / name for name in _INDEX_FILES if (directory / name).is_file()):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise UserError(
                f"`{directory}` is incomplete: {index.name} names {len(shards)} weight files, {len(missing)} are "
                f"missing, the first is {missing[0]}. Copy or download it again."
            )
    for path in files:
        if path.suffix == ".safetensors":
            check_safetensors(path)


def _no_config(directory: Path) -> str:
    inner = next((directory / name for name in ("model", "LATEST/model") if (directory / name).is_dir()), None)
    if (directory / "adapter_config.json").is_file():
        remedy = "It holds an adapter: name its base model here"
    elif inner is not None:
        remedy = f"It looks like a checkpoint: use `{inner}`"
    else:
        remedy = "Copy or download the model again, or name another directory"
    return f"`{directory}` is not a model directory: it has no config.json. {remedy}."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is cut off or not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"`{path}` does not hold a JSON object. Copy or download it again.")
    return value


def check_safetensors(path: Path) -> None:
    """Read a weight file's header, which says how long the file must be.

    Raises:
        UserError: the file is cut off or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"`{path}` is damaged or only partly there ({error}). Copy or download it again.") from error


def load_config(name: str, trust_remote_code: bool, hub: dict[str, Any], overrides: dict[str, Any]) -> PretrainedConfig:
    """Read the model's configuration, once, and set ``overrides`` in it.

    Raises:
        UserError: no such model, unknown architecture, code of the repository needed and not trusted, unknown key.
    """
    with readable_errors(name):
        values, _ = PretrainedConfig.get_config_dict(name, **hub)
        if not values.keys() - {"_commit_hash"} and not Path(name).is_dir():
            raise UserError(
                f"`{name}` has no config.json on the Hub, so it is no whole model. If it is an adapter, fetch it with "
                f"hf download {name} --local-dir adapter, and name that directory."
            )
        auto_map = values.get("auto_map", {})
        is_known = values.get("model_type") in CONFIG_MAPPING
        if auto_map and trust_remote_code:
            announce_remote_code(name, auto_map)
            config, unknown = AutoConfig.from_pretrained(
                name, trust_remote_code=True, return_unused_kwargs=True, **hub, **overrides
            )
        elif is_known:
            # already read: from_pretrained would read the file again
            config_class = CONFIG_MAPPING[values["model_type"]]
            config, unknown = config_class.from_dict(values, name_or_path=name, return_unused_kwargs=True, **overrides)
        elif auto_map:
            raise UserError(
                f"`{name}` needs code of {code_owner(name, auto_map)} to run. If you trust that code, set "
                "`model.trust_remote_code: true`."
            )
        else:
            raise UserError(_unknown_architecture(name, values.get("model_type")))
    assert isinstance(config, PretrainedConfig)
    key = next((key for key in overrides if key in unknown), None)
    if key is not None:
        raise UserError(
            f"`model.{key}`: neither an option of ours nor a key of {type(config).__name__}."
            f"{did_you_mean(key, config.to_dict())} Leave it out, or use a key of the model's config.json."
        )
    return config


def one_config(
    config: str | dict[str, Any] | PretrainedConfig | None, name: str | None
) -> str | dict[str, Any] | PretrainedConfig:
    """Return the one of both that is given.

    Raises:
        UserError: both are, or neither.
    """
    given = [value for value in (config, name) if value is not None]
    if len(given) != 1:
        which = "both are" if given else "neither is"
        raise UserError(
            f"`from_config` takes `config` or `pretrained_model_name_or_path`, and {which} given. "
            "Give one: a directory with config.json, a Hub name, or what a config.json holds."
        )
    return given[0]


def read_config(config: str | dict[str, Any] | PretrainedConfig) -> str | PretrainedConfig:
    """Turn a config.json, or a mapping of what one holds, into a configuration; names and objects stay as they are.

    Raises:
        UserError: no ``model_type``, or an unknown one.
    """
    if isinstance(config, str) and Path(config).expanduser().is_file():
        config = read_json(Path(config).expanduser())
    if not isinstance(config, dict):
        return config
    model_type = config.get("model_type")
    if model_type is None:
        raise UserError("`model.config` has no `model_type`, so nothing says what model it is. Add it, such as llama.")
    if model_type not in CONFIG_MAPPING:
        raise UserError(_unknown_architecture("model.config", model_type))
    with readable_errors("model.config"):
        made: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(config)
    return made


def check_sizes(config: PretrainedConfig) -> None:
    """Refuse sizes of which no model can be made.

    Raises:
        UserError: the first one.
    """
    text = config.get_text_config()
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        size = getattr(text, key, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"The model's `{key}` is {size}, but it must be at least 1. Correct it in its config.json.")
    heads, kv_heads = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0 and heads % kv_heads:
        raise UserError(
            f"The model's `num_attention_heads` is {heads}, but it must be a multiple of `num_key_value_heads` = "
            f"{kv_heads}. Correct one of them in its config.json."
        )


def _unknown_architecture(name: str, model_type: str | None) -> str:
    if model_type is None:
        return f"The config.json of `{name}` has no `model_type`, so nothing says what model it is. Add it."
    return (
        f"`{name}` is of type `{model_type}`, which this version of Transformers does not know."
        f"{did_you_mean(model_type, CONFIG_MAPPING)} Run: pip install --upgrade transformers"
    )


def code_owner(name: str, auto_map: dict[str, Any]) -> str:
    """Return whose Python code ``auto_map`` points to: another repository (``owner/repo--file.Class``) or its own."""
    owners = {str(ref).partition("--")[0] for ref in auto_map.values() if "--" in str(ref)}
    return " and ".join(f"`{owner}`" for owner in sorted(owners)) or f"`{name}`"


def announce_remote_code(name: str, auto_map: dict[str, Any]) -> None:
    """Say in the log whose code is about to run."""
    logger.warning("trust_remote_code: running Python code of %s for `%s`.", code_owner(name, auto_map), name)


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn what the Hub and the loaders raise inside the block into one line each.

    Raises:
        UserError: gated, missing, offline, damaged or unreadable; the original is attached.
    """
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"A weight file of `{name}` is damaged ({error}). Download it again.") from error
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The configuration of `{name}` is refused: {reason}. Correct its config.json, or the key under `model`."
        ) from error
    except hub_errors.transport_errors(HFValidationError) as error:
        # a UserError is a ValueError, so it never lands here
        raise UserError(_explain(name, error)) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _BROKEN_ARCHIVE not in str(error):
            raise
        raise UserError(
            f"A weight file of `{name}` is damaged, or holds objects that loading would have to run, which is never "
            "done. Use a model whose weights are safetensors."
        ) from error


def _explain(name: str, error: Exception) -> str:
    hub = hub_errors.explain(name, error) or hub_errors.explain_missing(name)
    if hub is not None:
        return hub
    if any(isinstance(item, PermissionError) for item in hub_errors.causes(error)):
        return f"`{name}` cannot be read: {error}. Check the permissions."
    return f"`{name}` cannot be loaded: {' '.join(str(error).split())}"
