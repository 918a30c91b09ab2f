"""Rules of ``dataset:`` and ``validation_dataset:`` sections, one set or a mixture, and of how their rows are split."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.config.schema import build, check_target, require_mapping, show
from nemo_automodel.components.datasets.config import DataloaderConfig, MixConfig, MixPartConfig, PackedSequenceConfig
from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.recipes.section_rules import check_installed
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError

TOKENIZER_RUNTIME = ("pretrained_model_name_or_path",)


def single_sets(node: ConfigNode) -> Iterator[ConfigNode]:
    """Yield the sections of single sets: the section itself, or those of its mixture, at any depth."""
    parts = node.get("mix")
    if parts is None:
        yield node
        return
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, ConfigNode) and isinstance(part.get("dataset"), ConfigNode):
            yield from single_sets(part["dataset"])


def mixture(node: ConfigNode) -> tuple[MixConfig, list[tuple[ConfigNode, float]]]:
    """Read a section with ``mix``: its settings, and the section and weight of every set.

    Raises:
        ConfigError: an unknown key, no set, a set without ``dataset``, or a weight that is not positive.
    """
    config = build(MixConfig, node, node.place)
    if not config.mix:
        raise ConfigError(f"`{node.place}.mix` is empty. Write a list of sets, each with `dataset` and `weight`.")
    parts = []
    for number, part in enumerate(config.mix):
        place = f"{node.place}.mix.{number}"
        found = build(MixPartConfig, part, place)
        if found.dataset is None:
            raise ConfigError(f"`{place}` lacks `dataset`. Add {place}.dataset with `_target_`.")
        require_mapping(found.dataset, f"{place}.dataset")
        if not 0 < found.weight < float("inf"):
            raise ConfigError(f"`{place}.weight` is {found.weight:g}, but a weight must be positive. Use 1.0.")
        parts.append((found.dataset, found.weight))
    return config, parts


def check_dataset(node: ConfigNode) -> None:
    """Check a section against what it calls, without importing it.

    Raises:
        ConfigError: a target that is not there, a keyword it does not take, or a mixture that cannot be read.
        NotSupportedYetError: ``unshifted: true``, or a Delta table.
        UserError: a package that is not installed.
    """
    if "mix" in node:
        for inner, _ in mixture(node)[1]:
            check_dataset(inner)
        return
    check_installed(node)
    _refuse_delta(node)
    tokenizer = node.get("tokenizer")
    node.remove("tokenizer")  # it may lack its path: then it is the model's
    check_target(node, runtime=("tokenizer",))
    if node.get("unshifted") is True:
        raise NotSupportedYetError(
            f"`{node.place}.unshifted: true` leaves every label on its own token, which only recipes that are not "
            "supported yet want; this one predicts the next token. Remove it."
        )
    if tokenizer is not None:
        require_mapping(tokenizer, f"{node.place}.tokenizer")
        check_target(tokenizer, runtime=TOKENIZER_RUNTIME)
        node["tokenizer"] = tokenizer


def _refuse_delta(node: ConfigNode) -> None:
    """Refuse the keys of Delta tables: nothing here has ever read one, since that takes a Databricks service."""
    for key in node:
        if key.startswith("delta_") and "ColumnMappedTextInstruction" in str(node.get("_target_")):
            raise NotSupportedYetError(
                f"`{node.place}.{key}`: Delta tables (Databricks) are not supported yet. Write the table as Parquet "
                "(`spark.table(name).write.parquet(directory)`), name the directory in "
                f"`{node.place}.path_or_dataset_id`, and remove the `delta_` keys."
            )


def check_token_budget(
    scheduler: StepSchedulerConfig, loader: DataloaderConfig, packing: PackedSequenceConfig, config: ConfigNode
) -> list[str]:
    """Refuse what cannot stand beside ``step_scheduler.local_batch_tokens``; return a line for what it replaces.

    Raises:
        ConfigError: a batch size of the loader's own, or packed rows longer than the budget.
    """
    budget = scheduler.local_batch_tokens
    if budget is None:
        return []
    if loader.batch_size != "local":
        raise ConfigError(
            f"`dataloader.batch_size` is {show(loader.batch_size)}, but `step_scheduler.local_batch_tokens: {budget}` "
            "decides how many rows a micro-batch has. Remove one of them."
        )
    if packing.packed_sequence_size > budget:
        raise ConfigError(
            f"`step_scheduler.local_batch_tokens` is {budget}, but a packed row has "
            f"`packed_sequence.packed_sequence_size` = {packing.packed_sequence_size} tokens. Raise the first to "
            f"{packing.packed_sequence_size} or more."
        )
    if "local_batch_size" in config["step_scheduler"]:
        return ["`step_scheduler.local_batch_size` has no effect beside `step_scheduler.local_batch_tokens`."]
    return []
