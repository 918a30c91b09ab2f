"""From samples to a batch: collate functions, and reading a sample back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nemo_automodel.components.datasets.llm.formatting import PAD_TOKEN_IDS, Sample
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, SEQ_LENS_PADDING


def default_collater(batch: Sequence[Sample], pad_seq_len_divisible: int | None = None) -> dict[str, torch.Tensor]:
    """Pad samples on the right to the longest one and stack them.

    Args:
        batch: samples, dicts of lists; their own ``___PAD_TOKEN_IDS___`` says what fills each field (0 where it does
            not, -100 for labels). Left as they are.
        pad_seq_len_divisible: round the length up to a multiple of this many positions.

    Returns:
        int64 ``[B, S]`` for every field of lists, ``[B]`` for every field of numbers, tensors concatenated on
        dimension 0. ``attention_mask`` is made from the lengths where samples have none, and the bool ``padding_mask``
        is true on padding.

    Raises:
        UserError: samples differ in their fields, or a field holds something else.
    """
    fields = [key for key in batch[0] if key != PAD_TOKEN_IDS]
    fill = {"labels": IGNORE_INDEX, **batch[0].get(PAD_TOKEN_IDS, {})}
    lengths = [len(value) for sample in batch for key in fields if isinstance(value := sample.get(key), list)]
    length = max(lengths, default=0)
    if pad_seq_len_divisible:
        length = -(-length // pad_seq_len_divisible) * pad_seq_len_divisible
    collated = {key: _collate_field(key, batch, length, fill.get(key, 0)) for key in fields}
    if "attention_mask" not in collated and isinstance(batch[0].get("input_ids"), list):
        rows = [[1] * len(sample["input_ids"]) for sample in batch]
        collated["attention_mask"] = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    if "attention_mask" in collated:
        collated["padding_mask"] = collated["attention_mask"] == 0
    return collated


def _collate_field(key: str, batch: Sequence[Sample], length: int, fill: int) -> torch.Tensor:
    missing = [number for number, sample in enumerate(batch) if key not in sample]
    if missing:
        raise UserError(f"Sample {missing[0]} of the batch has no field `{key}`, but sample 0 has.")
    values = [sample[key] for sample in batch]
    if all(isinstance(value, torch.Tensor) for value in values):
        return torch.cat(values, dim=0)
    if all(isinstance(value, list) for value in values):
        values = [value + [fill] * (length - len(value)) for value in values]
    try:
        return torch.tensor(values)
    except (TypeError, ValueError):
        raise UserError(
            f"The field `{key}` of the samples is neither a number, a list of numbers nor a tensor, so "
            "default_collater cannot batch it. Remove the field, or name a collate function of your own."
        ) from None


def packed_sequence_thd_collater(batch: Sequence[Sample]) -> dict[str, Any]:
    """Stack packed rows.

    Returns:
        int64 ``input_ids``, ``labels``, ``position_ids`` ``[B, S]``, and ``branch_ids`` where a row shares prefixes;
        ``seq_lens`` and ``seq_lens_padded`` ``[B, D]``, filled with -1000 up to the row with most documents;
        ``qkv_format`` is the text ``thd``.

    Raises:
        UserError: the samples are not packed rows of one length.
    """
    for key in ("input_ids", "labels", "position_ids", "seq_lens", "seq_lens_padded"):
        if any(key not in sample for sample in batch):
            raise UserError(
                f"packed_sequence_thd_collater needs packed rows, but a sample has no `{key}`. Set "
                "`packed_sequence.packed_sequence_size`, or use default_collater."
            )
    sizes = {len(sample["input_ids"]) for sample in batch}
    if len(sizes) > 1:
        raise UserError(f"Packed rows must have one length, but a batch holds {', '.join(map(str, sorted(sizes)))}.")
    collated: dict[str, Any] = {
        # through NumPy, which reads lists of numbers several times faster
        key: torch.from_numpy(np.array([sample[key] for sample in batch], dtype=np.int64))
        for key in ("input_ids", "labels", "position_ids")
    }
    if any("branch_ids" in sample for sample in batch):
        no_branches = [0] * sizes.pop()
        collated["branch_ids"] = torch.tensor([sample.get("branch_ids", no_branches) for sample in batch])
    for key in ("seq_lens", "seq_lens_padded"):
        most = max(len(sample[key]) for sample in batch)
        collated[key] = torch.tensor([sample[key] + [SEQ_LENS_PADDING] * (most - len(sample[key])) for sample in batch])
    collated["qkv_format"] = "thd"
    return collated


def split_prompt_answer(row: Sample) -> tuple[list[int], list[int]]:
    """Return prompt and answer ids of a sample with shifted labels; of several learned parts the last is the answer.

    Raises:
        UserError: nothing of the sample is learned.
    """
    labels = row["labels"]
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    if end == 0:
        raise UserError("Nothing of the sample is learned, so it has no answer.")
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return row["input_ids"][: start + 1], labels[start:end]
