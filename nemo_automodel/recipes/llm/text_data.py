"""From the data sections of the settings to a tokenizer and loaders of batches.

The tokenizer is the model's unless a ``tokenizer`` section names another; a data set may bring one of its own. Loaders
are the same for training and validation, except that only training data is packed and shuffled unless the YAML says
otherwise.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode, to_callable
from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.llm.sample_stream import bear_unlearned
from nemo_automodel.components.datasets.loader import ResumableDataLoader, build_dataloader, shuffles
from nemo_automodel.components.datasets.mix import MixedSet
from nemo_automodel.components.datasets.mix_stream import mix
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.token_budget import MicroBatches, TokenBudgetCollater
from nemo_automodel.components.datasets.utils import default_collater, packed_sequence_thd_collater
from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.loggers.console import Bar
from nemo_automodel.recipes.dataset_rules import mixture, single_sets
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)

_DATA_KEYS = ("path_or_dataset_id", "path_or_dataset", "dataset_name", "path")
_COLLATE_NAMES = {"default": default_collater, "default_collater": default_collater}


class TextData:
    """Builds the data of a run over text.

    ``model_path`` is the directory or Hub name whose tokenizer is taken where no section names one; ``None`` when the
    model has none.
    """

    def __init__(self, settings: RunSettings, mesh: Mesh, model_path: str | None) -> None:
        self.settings = settings
        self.mesh = mesh
        self.model_path = model_path
        self._packs_training = settings.packed_sequence.packed_sequence_size > 0
        # without the gate there is no share to bear, and a row that teaches nothing is as wrong as before
        self._bears_unlearned = settings.data_check is not None and settings.data_check.max_unlearned_share > 0
        self.train_source: Any = None
        """The training set before packing, once its loader is built."""

    def check_names(self) -> None:
        """Find everything that the data sections name, before anything is read.

        Raises:
            UserError: a collate function that is not there.
        """
        self._collate_fn(self.settings.dataloader, "dataloader")
        self._collate_fn(self.settings.validation_dataloader, "validation_dataloader")

    def build_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the run, ``None`` when neither a section nor the model names one."""
        if self.settings.tokenizer is not None:
            return self._tokenizer_of(self.settings.tokenizer)
        for node in single_sets(self.settings.dataset):
            if node.get("tokenizer") is not None:
                return self._tokenizer_of(node["tokenizer"])
        if self.model_path is None or not any(map(_takes_tokenizer, single_sets(self.settings.dataset))):
            return None
        trusts = bool(self.settings.model.get("trust_remote_code", False))
        return NeMoAutoTokenizer.from_pretrained(self.model_path, trust_remote_code=trusts)

    def _tokenizer_of(self, node: ConfigNode) -> PreTrainedTokenizerBase:
        own = {} if "pretrained_model_name_or_path" in node else {"pretrained_model_name_or_path": self.model_path}
        tokenizer: PreTrainedTokenizerBase = node.instantiate(**own)
        return tokenizer

    def build_train_loader(self, tokenizer: PreTrainedTokenizerBase | None) -> ResumableDataLoader:
        """Return the loader of the training data, packed when ``packed_sequence`` says so."""
        dataset = self.train_source = self._dataset(self.settings.dataset, tokenizer)
        if self._packs_training:
            shuffle = shuffles(self.settings.dataloader, is_training=True)
            dataset = self._pack(dataset, tokenizer, self.settings.packed_sequence, shuffle)
        return self._loader(dataset, self.settings.dataloader, "dataloader", is_training=True)

    def build_val_loaders(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Iterable[Batch]]:
        """Return a loader for each validation set, by name."""
        cfg = self.settings.validation_dataloader
        is_packed = self._collate_fn(cfg, "validation_dataloader") is packed_sequence_thd_collater
        loaders: dict[str, Iterable[Batch]] = {}
        for name, node in self.settings.validation_datasets.items():
            dataset = self._dataset(node, tokenizer)
            if is_packed:
                whole = replace(self.settings.packed_sequence, max_packs=None)  # the limit is one on training
                dataset = self._pack(dataset, tokenizer, whole, shuffle=shuffles(cfg, is_training=False))
            loader = self._loader(dataset, cfg, "validation_dataloader", is_training=False)
            loaders[name] = MicroBatches(loader) if self._has_budget(cfg) else loader
        return loaders

    def _has_budget(self, cfg: DataloaderConfig) -> bool:
        """Tell whether micro-batches are made by tokens: then the loader's items are lists of them."""
        return self.settings.step_scheduler.local_batch_tokens is not None and cfg.batch_size == "local"

    def _mixture(self, node: ConfigNode, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        config, parts = mixture(node)
        sets = [MixedSet(self._dataset(inner, tokenizer), weight, _name_of(inner)) for inner, weight in parts]
        return mix(sets, config.stopping, self.settings.seed if config.seed is None else config.seed)

    def _dataset(self, node: ConfigNode, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        if "mix" in node:
            return self._mixture(node, tokenizer)
        dataset = self._single_set(node, tokenizer)
        if self._bears_unlearned:
            bear_unlearned(dataset)
        return dataset

    def _single_set(self, node: ConfigNode, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        if not _takes_tokenizer(node):
            return node.instantiate()
        own = node.get("tokenizer")
        tokenizer = tokenizer if own is None else self._tokenizer_of(own)
        if tokenizer is None and _tokenizer_parameter(node).default is None:
            return node.instantiate()  # random tokens do without
        if tokenizer is None:
            raise UserError(
                f"`{node.place}` needs a tokenizer, but the model does not bring one. Name one with "
                "`tokenizer.pretrained_model_name_or_path`."
            )
        return node.instantiate(tokenizer=tokenizer)

    def _pack(
        self, dataset: Any, tokenizer: PreTrainedTokenizerBase | None, cfg: PackedSequenceConfig, shuffle: bool
    ) -> Any:
        pad_token_id = None if tokenizer is None else tokenizer.pad_token_id
        return pack_dataset(
            dataset,
            cfg,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
            seed=self.settings.seed,
            shuffle=shuffle,
            bar=lambda: Bar("Packing", None),
            bears_unlearned=self._bears_unlearned,
        )

    def _loader(self, dataset: Any, cfg: DataloaderConfig, section: str, is_training: bool) -> ResumableDataLoader:
        collate_fn = self._collate_fn(cfg, section)
        if is_training and self._packs_training and collate_fn is not packed_sequence_thd_collater:
            if cfg.collate_fn is not None:
                logger.info("`packed_sequence` is on: packed_sequence_thd_collater takes the place of `collate_fn`.")
            collate_fn = packed_sequence_thd_collater
        scheduler = self.settings.step_scheduler
        num_rows = scheduler.local_batch_size
        if scheduler.local_batch_tokens is not None and self._has_budget(cfg):
            num_rows = scheduler.num_step_rows(self.mesh.dp_size)
            collate_fn = TokenBudgetCollater(collate_fn, scheduler.local_batch_tokens)
        return build_dataloader(
            dataset,
            cfg,
            local_batch_size=num_rows,
            collate_fn=collate_fn,
            seed=self.settings.seed,
            is_training=is_training,
            num_replicas=self.mesh.dp_size,
            replica=self.mesh.dp_rank,
        )

    @staticmethod
    def _collate_fn(cfg: DataloaderConfig, section: str) -> Callable[[list[Any]], Any]:
        if cfg.collate_fn is None:
            return default_collater
        if isinstance(cfg.collate_fn, str) and cfg.collate_fn in _COLLATE_NAMES:
            return _COLLATE_NAMES[cfg.collate_fn]
        return to_callable(cfg.collate_fn, f"{section}.collate_fn")


def _name_of(node: ConfigNode) -> str:
    """Return what a set of a mixture is called in messages: where its rows are, or else what makes them."""
    for key in _DATA_KEYS:
        if isinstance(node.get(key), str):
            return f"`{node.get(key)}`"
    return f"`{node.place}`"


def _takes_tokenizer(node: ConfigNode) -> bool:
    return _tokenizer_parameter(node) is not None


def _tokenizer_parameter(node: ConfigNode) -> Any:
    """Return the target's parameter ``tokenizer``, None where it has none."""
    target = targets.resolve(node.get("_target_"), f"{node.place}._target_")
    return inspect.signature(target).parameters.get("tokenizer")


def model_path_of(model: ConfigNode) -> str | None:
    """Return the directory or Hub name that the ``model`` section names, None where it names none."""
    for key in ("pretrained_model_name_or_path", "config.pretrained_model_name_or_path", "config"):
        if isinstance(model.get(key), str):
            return str(model.get(key))
    return None
