"""What stays exact when a run goes on with other settings than it was saved with. Free of torch.

A user may do that knowingly (``checkpoint.restore_from``). Then the run says, for every key that decides what is
trained, what goes on as if nothing had happened and what does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.components.checkpoint.identity import differences, run_identity
from nemo_automodel.components.checkpoint.layout import CONFIG_FILE
from nemo_automodel.shared.errors import UserError

Change = tuple[str, Any, Any]
"""Dotted key, old value, new value."""

_SPLIT = (
    "every step has the same rows, none is skipped or comes twice. Their losses are added up in another order, which "
    "changes the last digits, and dropout draws other numbers."
)
_STEPS = (
    "no row of this epoch is skipped or comes twice. Steps have another size from here on, so their losses cannot be "
    "compared with those of before, and the learning rate follows the number of steps."
)
_ORDER = (
    "weights, optimizer and schedule are exact. The place in the epoch is a number of rows, and now it counts rows in "
    "another order: until the epoch ends some rows come twice and others not at all."
)
_DATA = (
    "weights, optimizer and schedule are exact. The place in the epoch is a number of rows, and now it counts others: "
    "until the epoch ends some rows may come twice and others not at all."
)
_NOTHING = "everything stays exact where rows have numbers; a stream that keeps its place worker by worker is refused."
_COMPUTED = "the place in the data is exact. The same weights give another loss from here on."
_UPDATED = "weights and the place in the data are exact. Updates follow the new value from here on."

_KERNELS = (
    "weights, optimizer and the place in the data are exact. Other kernels compute from here on, so losses differ in "
    "their last digits from those of a run without the change."
)

_CONSEQUENCES = {
    "step_scheduler.local_batch_size": _SPLIT,
    "step_scheduler.local_batch_tokens": _SPLIT,
    "step_scheduler.global_batch_size": _STEPS,
    "dataloader.num_workers": _NOTHING,
    "dataloader.pin_memory": _NOTHING,
    "dataloader.persistent_workers": _NOTHING,
    "dataloader.prefetch_factor": _NOTHING,
    "dataloader.timeout_minutes": _NOTHING,
    "dataloader.shuffle": _ORDER,
    "dataloader.shuffle_buffer_size": _ORDER,
    "dataloader.group_by_length": _ORDER,
    "seed": _ORDER,
    "deterministic": _KERNELS,
    "rng": _ORDER,
    "dataset": _DATA,
    "dataloader": _DATA,
    "tokenizer": _DATA,
    "packed_sequence": _DATA,
    "model": _COMPUTED,
    "peft": _COMPUTED,
    "quantization": _COMPUTED,
    "fp8": _COMPUTED,
    "qat": _COMPUTED,
    "compile": _COMPUTED,
    "distributed": _COMPUTED,
    "loss_fn": _COMPUTED,
    "optimizer": _UPDATED,
    "lr_scheduler": _UPDATED,
    "clip_grad_norm": _UPDATED,
}
"""The longest prefix of a key counts."""


def changes_since(checkpoint: Path, config_yaml: Mapping[str, Any]) -> list[Change]:
    """Return what of the run's identity differs from the configuration that ``checkpoint`` was saved with.

    Raises:
        UserError: its configuration is missing or damaged.
    """
    try:
        saved = yaml.safe_load((checkpoint / CONFIG_FILE).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"`{checkpoint / CONFIG_FILE}` is missing or damaged ({type(error).__name__}). Mend it."
        ) from error
    return differences(run_identity(saved), run_identity(config_yaml))


def consequences(changes: list[Change]) -> list[str]:
    """Return a line for each kind of consequence: which keys have it, old and new value, what stays exact."""
    by_text: dict[str, list[str]] = {}
    for key, old, new in changes:
        text = _consequence(key)
        if text is not None:
            by_text.setdefault(text, []).append(f"`{key}` ({old} → {new})")
    return [f"{', '.join(keys)}: {text}" for text, keys in by_text.items()]


def world_size_line(saved_by: int, num_ranks: int, group_by_length: bool) -> str | None:
    """Return what stays exact where a run goes on with another number of processes; None where it is the same."""
    if saved_by == num_ranks:
        return None
    rows = (
        "rows sorted by length come in another order: until the epoch ends some come twice and others not at all"
        if group_by_length
        else "the place in the data counts the rows of all processes, so none is skipped or comes twice, and steps of "
        "the same global batch have the rows they would have had"
    )
    return (
        f"{saved_by} process(es) → {num_ranks}: weights, optimizer and schedule are exact; {rows}. Losses and "
        "gradients are added up in another order, which changes the last digits, and dropout draws other numbers."
    )


def changes_data(changes: list[Change]) -> bool:
    """Tell whether other batches may come next."""
    return any(_consequence(key) in (_SPLIT, _STEPS, _ORDER, _DATA) for key, _, _ in changes)


def changes_loss(changes: list[Change]) -> bool:
    """Tell whether the same weights may give another loss for the same batch."""
    return any(_consequence(key) == _COMPUTED for key, _, _ in changes)


def _consequence(key: str) -> str | None:
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        text = _CONSEQUENCES.get(".".join(parts[:end]))
        if text is not None:
            return text
    return None
