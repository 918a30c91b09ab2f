"""The model that was trained, asked before anything is exported: which checkpoint, what it answers, what its base does.

The trained model is what the checkpoint holds: all weights, an adapter on its base, or an adapter on a base in 4 bits.
It and its base answer held-out rows of the run's own validation data, one after the other.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nemo_automodel._transformers.answers import Loading, Probe, answers_of, choose_loading, probes_of_texts
from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel._transformers.inference import checkpoint_of, find_model_directory
from nemo_automodel._transformers.merge import Adapter, fetch_model, read_adapter
from nemo_automodel._transformers.model_files import ADAPTER_CONFIG
from nemo_automodel._transformers.model_source import check_local_model
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components._peft.lora import adapters_off
from nemo_automodel.components.checkpoint.layout import CONFIG_FILE, MODEL_DCP_DIR, MODEL_DIR
from nemo_automodel.components.checkpoint.manifest import verify
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.components.datasets.document_view import rows_in
from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.export.certificate import Answers
from nemo_automodel.recipes.llm.text_data import TextData, model_path_of
from nemo_automodel.recipes.settings import RunSettings, load_settings
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

MAX_ROWS = 32


@dataclass(frozen=True)
class Source:
    """A model that was trained, and what is known about its training."""

    directory: Path
    """Model files."""
    checkpoint: Path | None
    settings: RunSettings | None
    """None: it is no checkpoint of ours, or its config.yaml cannot be read."""

    @property
    def is_adapter(self) -> bool:
        """Tell whether it needs a base."""
        return (self.directory / ADAPTER_CONFIG).is_file()

    @property
    def name(self) -> str:
        """Return a name that says nothing about this machine."""
        return self.checkpoint.resolve().name if self.checkpoint is not None else self.directory.resolve().name


@dataclass(frozen=True)
class Wishes:
    """What may be asked of an export."""

    base: str | None = None
    """Replaces the base that the adapter names."""
    merge_into: str = "auto"
    """``full``, ``rounded``, or ``auto``: by held-out loss. Only QLoRA has a choice."""
    dtype: torch.dtype | None = None
    """None: bf16 for a merge, and as it is stored otherwise."""
    device: str | None = None
    is_certified: bool = True
    trust_remote_code: bool = False


@dataclass
class Trained:
    """The trained model's answers, to which an export is compared."""

    answers: Answers
    base: Answers | None
    losses: dict[str, float]
    probes: list[Probe]
    prompts: str
    loading: Loading
    tokenizer: PreTrainedTokenizerBase
    is_rounded: bool = False
    """The answers are those on the 4-bit base."""


def find_source(path: str) -> Source:
    """Return what ``path`` means: a checkpoint, ``LATEST``, a run, a PEFT or a Hugging Face directory.

    Raises:
        UserError: none of them, damaged files, or an adapter that is not the one its run describes.
    """
    directory = Path(find_model_directory(path))
    if not any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(
            f"`{path}` holds no model: no checkpoint, no adapter and no Hugging Face directory. Name one, for example "
            "checkpoints/LATEST."
        )
    checkpoint = checkpoint_of(directory)
    if checkpoint is None:
        if not (directory / ADAPTER_CONFIG).is_file():  # an adapter's files are checked when it is read
            check_local_model(directory)
        return Source(directory, None, None)
    verify(checkpoint, (f"{MODEL_DIR}/", f"{MODEL_DCP_DIR}/"))
    return Source(directory, checkpoint, _settings_of(checkpoint))


def _settings_of(checkpoint: Path) -> RunSettings | None:
    try:
        return load_settings(load_yaml_config(checkpoint / CONFIG_FILE))
    except UserError as error:
        logger.warning("%s cannot be read, so nothing of the run is known: %s", checkpoint / CONFIG_FILE, error)
        return None


def _check_scale(source: Source, adapter: Adapter) -> None:
    """Compare the two places that say how strong an adapter is; an edited one would change the model in silence."""
    if source.settings is None or source.settings.peft is None:
        return
    trained = source.settings.peft.instantiate()
    if not isinstance(trained, PeftConfig):  # a target of the user's own
        return
    pairs = {
        "r": (adapter.config.get("r", False), trained.dim),
        "lora_alpha": (adapter.config.get("lora_alpha", False), trained.alpha),
        "use_rslora": (adapter.config.get("use_rslora", False), trained.use_rslora),
        "use_dora": (adapter.config.get("use_dora", False), trained.use_dora),
    }
    for name, update in adapter.updates.items():  # what single layers have of their own
        if update.a is not None:
            layer = name.removesuffix(".weight")
            pairs[f"alpha / rank of {layer}"] = (update.scaling, trained.scaling_of(layer))
    for key, (found, value) in pairs.items():
        if found != value:
            raise UserError(
                f"`{adapter.directory / ADAPTER_CONFIG}` says `{key}` = {found}, but the run was trained with {value} "
                "(config.yaml). Put it back, or copy the checkpoint again."
            )


def held_out(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Probe], str]:
    """Return held-out rows and where they come from: the run's first validation set, or texts of our own."""
    reason = "no run's configuration"
    if source.settings is not None:
        reason = "the run has no validation data"
        if source.settings.validation_datasets:
            try:
                rows = _validation_rows(source, source.settings)
                if rows:
                    return rows, f"{len(rows)} rows of the run's validation data"
                reason = "the validation data has no labels"
            except UserError as error:
                reason = f"the validation data cannot be read: {error}"
                logger.warning("%s Text of our own takes its place.", error)
    probes = probes_of_texts(tokenizer)
    return probes, f"{len(probes)} embedded texts ({reason})"


def _validation_rows(source: Source, settings: RunSettings) -> list[Probe]:
    has_tokenizer = (source.directory / "tokenizer_config.json").is_file()
    data = TextData(settings, Mesh(), str(source.directory) if has_tokenizer else model_path_of(settings.model))
    loader = next(iter(data.build_val_loaders(data.build_tokenizer()).values()))
    probes: list[Probe] = []
    for item in loader:
        for batch in item if isinstance(item, list) else [item]:
            for row in rows_in(batch, "A validation row"):
                probes += [Probe(document.input_ids, document.labels) for document in row if document.num_learned]
        if len(probes) >= MAX_ROWS:
            break
    return probes[:MAX_ROWS]


def ask_trained(source: Source, wishes: Wishes, adapter: Adapter | None, keeps_choice: bool = True) -> Trained:
    """Load the trained model and its base, one after the other, and let them answer the held-out rows.

    ``keeps_choice`` False looks at the full-precision base alone, where an adapter is not merged.

    Raises:
        UserError: something cannot be loaded, or does not fit in memory.
    """
    tokenizer_source = source.directory
    if not (source.directory / "tokenizer_config.json").is_file() and adapter is not None:
        tokenizer_source = fetch_model(adapter.base)
    tokenizer = NeMoAutoTokenizer.from_pretrained(str(tokenizer_source), trust_remote_code=wishes.trust_remote_code)
    probes, prompts = held_out(source, tokenizer)
    if adapter is None:
        return _ask_whole(source, wishes, probes, prompts, tokenizer)
    loading = choose_loading(fetch_model(adapter.base), wishes.device, wishes.trust_remote_code)
    quantization = source.settings.quantization if source.settings is not None else None
    answers, base = _ask_adapter(loading, adapter, None, probes)
    losses = {"base": base.loss, "trained": answers.loss}
    trained = Trained(answers, base, losses, probes, prompts, loading, tokenizer)
    if quantization is None or not keeps_choice:
        if wishes.merge_into == "rounded":
            raise UserError(
                "`--merge-into rounded` is for adapters that were trained on a 4- or 8-bit base, and this run's "
                "config.yaml names none. Leave it out."
            )
        return trained
    rounded, rounded_base = _ask_adapter(loading, adapter, quantization, probes)
    trained.losses = {
        "base": base.loss,
        "base, rounded": rounded_base.loss,
        "adapter on the rounded base (as trained)": rounded.loss,
        "adapter on the full base": answers.loss,
    }
    if wishes.merge_into == "rounded" or (wishes.merge_into == "auto" and rounded.loss < answers.loss):
        trained.answers, trained.base, trained.is_rounded = rounded, rounded_base, True
    return trained


def _ask_adapter(loading: Loading, adapter: Adapter, quantization: Any, probes: list[Probe]) -> tuple[Answers, Answers]:
    model = loading.with_adapter(adapter, quantization)
    answers = answers_of(model, probes)
    if adapter.needs_peft:
        del model
        return answers, ask(lambda: loading.whole(fetch_model(adapter.base)), probes)
    with adapters_off(model):
        return answers, answers_of(model, probes)


def _ask_whole(
    source: Source, wishes: Wishes, probes: list[Probe], prompts: str, tokenizer: PreTrainedTokenizerBase
) -> Trained:
    """A model with all weights trained; its base is what the run started from, where that can be had."""
    loading = choose_loading(source.directory, wishes.device, wishes.trust_remote_code)
    answers = ask(lambda: loading.whole(source.directory), probes)
    base_name = None if source.settings is None else model_path_of(source.settings.model)
    base = None
    if base_name is not None:
        try:
            base = ask(lambda: loading.whole(fetch_model(base_name)), probes)
        except UserError as error:
            logger.warning("The base is not compared: %s", error)
    losses = {"trained": answers.loss} | ({} if base is None else {"base": base.loss})
    return Trained(answers, base, losses, probes, prompts, loading, tokenizer)


def ask(load: Callable[[], Any], probes: list[Probe]) -> Answers:
    """Load a model, let it answer, and forget it."""
    model = load()
    answers = answers_of(model, probes)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers


def open_adapter(source: Source, wishes: Wishes) -> Adapter | None:
    """Return the adapter of a source, None where all weights were trained.

    Raises:
        UserError: damaged, untrained, or not the one that its run describes.
    """
    if not source.is_adapter:
        if wishes.base is not None:
            raise UserError(f"`--base {wishes.base}` names the base of an adapter, but `{source.directory}` is none.")
        return None
    adapter = read_adapter(source.directory, wishes.base)
    _check_scale(source, adapter)
    return adapter
