"""An adapter and its base become one ordinary model directory, file by file.

The base is read tensor by tensor and every tensor is written once, changed where the adapter says so (`_peft.merge`),
so a 70B model needs the memory of one file of 4 GB. What the adapter does not touch is copied in the dtype asked for.

A head that shares its weight with the embedding (tied) needs care: an adapter on one of them must not change the other,
so the two are written apart and the configuration says so. Rows trained for added tokens keep them tied.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers.model_files import ADAPTER_CONFIG, read_adapter_weights
from nemo_automodel._transformers.model_source import (
    check_local_model,
    load_config,
    read_json,
    readable_errors,
    resolve_source,
)
from nemo_automodel.components._peft.merge import WeightUpdate, read_updates
from nemo_automodel.components.export.weight_files import (
    MAX_BYTES,
    TensorInfo,
    list_tensors,
    main_dtype,
    read_tensor,
    write_tensors,
)
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "spiece.model", "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, read."""

    directory: Path
    config: dict[str, Any]
    updates: dict[str, WeightUpdate]
    """By the name of the weight."""
    base: str
    """A directory or a Hub name."""

    @property
    def needs_peft(self) -> bool:
        """Tell whether it has more than low-rank updates of linear layers: embeddings, whole weights, single rows."""
        return any(
            update.whole is not None or update.rows is not None or name.endswith("embed_tokens.weight")
            for name, update in self.updates.items()
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    num_updated: int
    dtype: str
    untied: list[str] = field(default_factory=list)
    """Weights that were shared and are now stored apart."""
    vocab_size: int | None = None
    """The new size where the adapter brought rows for added tokens."""


def read_adapter(directory: Path, base: str | None = None) -> Adapter:
    """Read an adapter directory; ``base`` replaces the base that it names.

    Raises:
        UserError: missing or damaged files, no LoRA, no base, or an adapter that was never trained.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    updates = read_updates(config, read_adapter_weights(directory))
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"`{directory / ADAPTER_CONFIG}` does not say which base model it belongs to. Give it with --base."
        )
    if all(update.is_inert for update in updates.values()):
        raise UserError(
            f"The adapter in `{directory}` changes nothing: one factor of every layer is zero (`lora_B` is, before the "
            "first step). Train it, or name another checkpoint."
        )
    return Adapter(directory, config, updates, base)


def fetch_model(name: str) -> Path:
    """Return the directory of a model; of a Hub name the copy in the Hugging Face cache, downloaded where it is none.

    A copy that is there is taken without asking the Hub: it is the one that was trained on.

    Raises:
        UserError: no such model, or the Hub's reasons.
    """
    name = resolve_source(name)
    if Path(name).is_dir():
        check_local_model(Path(name))
        return Path(name)
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        check_local_model(cached)
    except (LocalEntryNotFoundError, HFValidationError, UserError):
        with readable_errors(name):
            return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
    return cached


def merge_adapter(
    adapter: Adapter,
    base: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    stored_as: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    trust_remote_code: bool = False,
    max_bytes: int = MAX_BYTES,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> MergeReport:
    """Write the model ``base`` with ``adapter`` merged into it to the empty directory ``out``.

    ``stored_as`` returns what a weight of the base was during training, where that was not itself (QLoRA).

    Raises:
        UserError: the adapter does not fit the base.
        OSError: a file cannot be written.
    """
    config = load_config(str(base), trust_remote_code, {}, {})
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"The weights of `{base}` are stored quantised, and an adapter is merged into full precision. Name the "
            "model in full precision with --base."
        )
    plan = _plan(adapter, base, config, dtype, trust_remote_code)

    def make(name: str) -> torch.Tensor:
        source = plan.sources[name]
        weight = read_tensor(source, plan.files[source])
        if stored_as is not None:
            weight = stored_as(source, weight)
        update = adapter.updates.get(name)
        return (
            weight.to(plan.tensors[name].dtype) if update is None else update.applied(weight, plan.tensors[name].dtype)
        )

    write_tensors(out, plan.tensors, make, max_bytes, advance)
    _write_config(base, out, plan, dtype)
    copy_side_files(base, out)
    copy_side_files(adapter.directory, out)
    return MergeReport(len(adapter.updates), dtype_name(dtype), plan.untied, plan.vocab_size)


@dataclass
class _Plan:
    """What will be written, and what it is made of."""

    files: dict[str, TensorInfo]
    tensors: dict[str, TensorInfo]
    sources: dict[str, str]
    """Name written → name read."""
    untied: list[str]
    vocab_size: int | None


def _plan(adapter: Adapter, base: Path, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> _Plan:
    files = list_tensors(base)
    skeleton = skeleton_of(config, trust_remote_code)
    tied = dict(skeleton.all_tied_weights_keys)
    sources = {name: name for name in files if name not in tied}
    untied = [
        name
        for name, source in tied.items()
        if source in files and _must_be_untied(name, source, adapter, files[source].shape[0])
    ]
    sources |= {name: tied[name] for name in untied}
    _check_fit(adapter, files, sources, base)
    main = main_dtype(files)
    tensors = {}
    for name, source in sources.items():
        info = files[source]
        update = adapter.updates.get(name)
        shape = info.shape if update is None else update.shape_of(info.shape)
        tensors[name] = TensorInfo(shape, dtype if info.dtype == main or update is not None else info.dtype)
    vocab_size = _vocab_size(skeleton, tensors, adapter)
    return _Plan(files, tensors, sources, untied, vocab_size if vocab_size != _text(config).vocab_size else None)


def skeleton_of(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model without memory behind its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code
        )
    return model


def _must_be_untied(name: str, source: str, adapter: Adapter, num_rows: int) -> bool:
    """Tell whether a tied weight ``name`` differs from its ``source``, of ``num_rows`` rows, after the merge."""
    own, other = adapter.updates.get(name), adapter.updates.get(source)
    if own is not None:
        return True
    if other is None or adapter.config.get("ensure_weight_tying"):
        return False
    is_only_rows = other.rows is not None and other.a is None and other.whole is None
    # with more rows than the base's, a head left behind would have none for them: it is tied still
    grows = other.whole is not None and other.a is None and other.whole.shape[0] != num_rows
    return not (is_only_rows or grows)


def _check_fit(adapter: Adapter, files: Mapping[str, TensorInfo], sources: Mapping[str, str], base: Path) -> None:
    for name, update in adapter.updates.items():
        if name not in sources:
            raise UserError(
                f"The adapter does not fit the base `{base}`, which has no `{name}`. Name the base it was trained on "
                "with --base."
            )
        shape = files[sources[name]].shape
        try:
            update.shape_of(shape)
        except ValueError as error:
            raise UserError(
                f"The adapter does not fit the base `{base}`: `{name}` is {list(shape)} there, and the adapter was "
                f"trained on {error}. Name the base it was trained on with --base."
            ) from error
    _warn_of_more_layers(adapter, sources)


def _warn_of_more_layers(adapter: Adapter, sources: Mapping[str, str]) -> None:
    """A base with the same width and more layers fits, and is still most likely another model."""
    adapted = {int(found[1]) for name in adapter.updates if (found := re.search(r"\.(\d+)\.", name))}
    there = {int(found[1]) for name in sources if (found := re.search(r"\.(\d+)\.", name))}
    if adapted and there and adapted == set(range(len(adapted))) and max(there) > max(adapted):
        logger.warning(
            "The adapter is on layers 0 to %d, and the base has %d. If it was trained on all layers of its base, this "
            "is another base.",
            *(max(adapted), max(there) + 1),
        )


def _vocab_size(skeleton: PreTrainedModel, tensors: Mapping[str, TensorInfo], adapter: Adapter) -> int:
    """Return the rows of the embedding after the merge, which the head must have as well."""
    heads = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())  # type: ignore[no-untyped-call]
    names = {f"{name}.weight" for name, module in skeleton.named_modules() if any(module is head for head in heads)}
    sizes = {name: tensors[name].shape[0] for name in sorted(names) if name in tensors}
    if len(set(sizes.values())) > 1:
        raise UserError(
            f"The adapter in `{adapter.directory}` has rows for added tokens in one of {', '.join(sizes)} only "
            f"({', '.join(map(str, sizes.values()))} rows). Train both, or save both (PEFT: save_embedding_layers)."
        )
    return next(iter(sizes.values()), _text(skeleton.config).vocab_size)


def _text(config: PretrainedConfig) -> Any:
    return config.get_text_config()


def _write_config(base: Path, out: Path, plan: _Plan, dtype: torch.dtype) -> None:
    """Write the base's config.json with what the merge changed, and nothing else."""
    values = read_json(base / "config.json")
    for section in (values, values.get("text_config")):
        if section is None:
            continue
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype_name(dtype)
        if plan.vocab_size is not None and "vocab_size" in section:
            section["vocab_size"] = plan.vocab_size
        if plan.untied and "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    if plan.untied:
        values["tie_word_embeddings"] = False
    if "dtype" not in values and "torch_dtype" not in values:
        values["dtype"] = dtype_name(dtype)
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def rewrite_model(directory: Path, out: Path, dtype: torch.dtype | None, max_bytes: int = MAX_BYTES) -> None:
    """Write the model of ``directory`` to the empty directory ``out``, in another dtype unless it is None.

    Raises:
        UserError: there are no safetensors files.
        OSError: a file cannot be written.
    """
    files = list_tensors(directory)
    main = main_dtype(files)
    tensors = {
        name: TensorInfo(info.shape, dtype if dtype is not None and info.dtype == main else info.dtype)
        for name, info in files.items()
    }
    write_tensors(out, tensors, lambda name: read_tensor(name, files[name]).to(tensors[name].dtype), max_bytes)
    _write_config(directory, out, _Plan(files, tensors, {}, [], None), dtype or main)
    copy_side_files(directory, out)


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, generation config and code of a model or adapter directory; a later copy wins.

    A tokenizer is copied whole: files of another one that are there already are removed first.
    """
    tokenizer = _matching(source, _TOKENIZER_FILES)
    if tokenizer:
        for path in _matching(out, _TOKENIZER_FILES):
            path.unlink()
    for path in [*tokenizer, *_matching(source, ("generation_config.json", "*.py"))]:
        shutil.copyfile(path, out / path.name)


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
