"""How a model's weights become files, and files weights again.

Fine-tuning all weights writes an ordinary Hugging Face directory; training an adapter writes PEFT's two files and our
settings beside them. Both hold the tokenizer, so that either directory is all that inference or an upload needs. The
caller publishes the directory; `ModelFiles` only fills it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from nemo_automodel._transformers.model_source import check_safetensors, readable_errors
from nemo_automodel.components._peft.adapter_state import (
    adapter_config,
    adapter_state_dict,
    automodel_peft_config,
    load_adapter_state_dict,
)
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
AUTOMODEL_PEFT_CONFIG = "automodel_peft_config.json"

# where weights may lie in a checkpoint's `model/`: our root, then the reference's shards, then its consolidated copy
_LAYOUTS = (("", "model*.safetensors"), ("", "shard-*.safetensors"), ("consolidated", "model*.safetensors"))


class ModelFiles:
    """The files of a live model: everything, or the adapter alone where the model has one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.peft_config: PeftConfig | None = next((x.peft_config for x in lora_layers(model).values()), None)
        _mend_generation_config(model)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors that ``write`` writes: the live ones, tied ones once, or the adapter's on the CPU."""
        return _live_weights(self.model) if self.peft_config is None else adapter_state_dict(self.model)

    def write(self, directory: Path) -> None:
        """Write config, generation config, weights, tokenizer and the model's own code into ``directory``.

        An adapter is PEFT's weights and config, our settings, the tokenizer and the model's own code.
        """
        self.write_from(directory, self.weights())

    def write_from(self, directory: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Do what ``write`` does with ``weights``: those of ``weights()`` or copies of them; None leaves them out."""
        if self.peft_config is None:
            self._write_whole(directory, weights)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            base_name = str(self.model.config.name_or_path)
            if weights is not None:
                save_file(dict(weights), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            _write_json(directory / ADAPTER_CONFIG, adapter_config(self.model, self.peft_config, base_name))
            _write_json(directory / AUTOMODEL_PEFT_CONFIG, automodel_peft_config(self.peft_config))
            if self.model._auto_class is not None:  # set for models that came with code of their own
                custom_object_save(self.model, directory)
        _write_tokenizer(self.tokenizer, directory)

    def _write_whole(self, directory: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        if weights is not None:
            self.model.save_pretrained(directory, state_dict=dict(weights))
            return
        self.model.config.save_pretrained(directory)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(directory)
        if self.model._auto_class is not None:
            custom_object_save(self.model, directory)

    def read(self, directory: Path) -> None:
        """Copy the weights, or the adapter, of ``directory`` into the live model, keeping the live dtypes.

        Raises:
            UserError: no weights, damaged files, or weights of another model.
        """
        if self.peft_config is not None:
            load_adapter_state_dict(self.model, read_adapter_weights(directory))
            return
        candidates = [(folder, sorted((directory / folder).glob(pattern))) for folder, pattern in _LAYOUTS]
        found = [(folder, files) for folder, files in candidates if files]
        if not found:
            raise UserError(f"`{directory}` holds no weights (model.safetensors). Resume from another checkpoint.")
        live = _live_weights(self.model)
        for _, files in found:
            for path in files:
                check_safetensors(path)
            if _shapes(files) == {name: tuple(tensor.shape) for name, tensor in live.items()}:
                _copy(files, live)
                return
        self._read_converted(directory / found[0][0])

    def _read_converted(self, directory: Path) -> None:
        """Load weights whose names or shapes differ on disk, as those of experts do, through Transformers."""
        if not (directory / "config.json").is_file():
            raise UserError(
                f"The weights in `{directory}` are not those of this model. Resume from another checkpoint."
            )
        with readable_errors(str(directory)):
            loaded: Any = type(self.model).from_pretrained(
                directory, dtype=self.model.dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        saved, report = loaded
        live, other = self.model.state_dict(), saved.state_dict()
        shapes, other_shapes = ({n: t.shape for n, t in state.items()} for state in (live, other))
        different = [
            *(f"`{name}` is missing" for name in sorted(report["missing_keys"])),
            *(f"`{name}` is not the model's" for name in sorted(report["unexpected_keys"])),
            *(f"`{name}` is {list(there)} there and {list(here)} here" for name, there, here in _mismatches(report)),
        ]
        if different or shapes != other_shapes:
            first = f"{different[0]} ({len(different)} such). " if different else ""
            raise UserError(
                f"The weights in `{directory}` are not those of this model. {first}Use the configuration they were "
                "saved with, or another checkpoint."
            )
        self.model.load_state_dict(other)


def _mismatches(report: dict[str, Any]) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """Return name, shape in the file and shape in the model of tensors that differ in it."""
    return sorted((name, tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"])


def read_adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter directory.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"`{directory}` holds no adapter ({ADAPTER_WEIGHTS}). Resume from another checkpoint.")
    check_safetensors(path)
    return load_file(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """Write the tokenizer; several chat templates would come as a folder, and an upload must be flat."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
            logger.info("Only the default chat template is saved; %s is left out.", path.name)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Make the generation config one that can be saved.

    Some published ones set a temperature and forget ``do_sample``; Transformers loads them and, in some versions,
    refuses to write them. That must come out before training and not at the first checkpoint.
    """
    if not model.can_generate():
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        logger.info("The generation config sets sampling values without `do_sample: true`; it is saved with it.")
        model.generation_config.do_sample = True


def _live_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights that a file holds: every tensor once, tied ones under the name that is saved."""
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes


def _copy(files: list[Path], live: dict[str, torch.Tensor]) -> None:
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                live[name].copy_(weights.get_tensor(name))
