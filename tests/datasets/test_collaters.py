"""Batches: values, shapes, dtypes, and samples left as they were."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_automodel.components.datasets.utils import (
    default_collater,
    packed_sequence_thd_collater,
    split_prompt_answer,
)
from nemo_automodel.shared.errors import UserError

PAD = {"input_ids": 9, "labels": -100, "attention_mask": 0}
SAMPLES = [
    {"input_ids": [1, 2, 3], "labels": [-100, 3, 4], "attention_mask": [1, 1, 1], "___PAD_TOKEN_IDS___": PAD},
    {"input_ids": [5], "labels": [6], "attention_mask": [1], "___PAD_TOKEN_IDS___": PAD},
]
PACKED = [
    {
        "input_ids": [1, 2, 3, 0],
        "labels": [2, -100, 4, -100],
        "position_ids": [0, 1, 0, 1],
        "seq_lens": [2, 1],
        "seq_lens_padded": [2, 2],
    },
    {
        "input_ids": [7, 8, 9, 6],
        "labels": [8, 9, 6, -100],
        "position_ids": [0, 1, 2, 3],
        "seq_lens": [4],
        "seq_lens_padded": [4],
    },
]


def test_default_collater_pads_right_and_leaves_samples_alone():
    before = copy.deepcopy(SAMPLES)
    for _ in range(2):
        batch = default_collater(SAMPLES)
        assert {key: value.tolist() for key, value in batch.items()} == {
            "input_ids": [[1, 2, 3], [5, 9, 9]],
            "labels": [[-100, 3, 4], [6, -100, -100]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
            "padding_mask": [[False, False, False], [False, True, True]],
        }
        assert {batch[key].dtype for key in ("input_ids", "labels", "attention_mask")} == {torch.int64}
    assert before == SAMPLES


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (2, 4), (8, 8), (3, 3)])
def test_length_is_rounded_up(multiple: int | None, length: int):
    batch = default_collater(SAMPLES, pad_seq_len_divisible=multiple)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["padding_mask"].shape == (2, length)
    assert batch["input_ids"][0, 3:].tolist() == [9] * (length - 3)


def test_masks_are_made_where_samples_have_none():
    batch = default_collater([{"input_ids": [1, 2], "labels": [2, 3]}, {"input_ids": [4], "labels": [5]}])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[2, 3], [5, -100]]
    assert batch["input_ids"].tolist() == [[1, 2], [4, 0]]


def test_numbers_and_tensors():
    samples = [{"labels": 1, "pixels": torch.ones(1, 2)}, {"labels": 0, "pixels": torch.zeros(3, 2)}]
    batch = default_collater(samples)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["pixels"].shape == (4, 2)
    assert batch["pixels"][0].tolist() == [1.0, 1.0]


def test_default_collater_refuses():
    with pytest.raises(UserError, match="The field `id` of the samples is neither a number"):
        default_collater([{"input_ids": [1], "id": "a"}])
    with pytest.raises(UserError, match="Sample 1 of the batch has no field `labels`"):
        default_collater([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])


def test_packed_collater():
    batch = packed_sequence_thd_collater(PACKED)
    assert batch.pop("qkv_format") == "thd"
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 0], [7, 8, 9, 6]],
        "labels": [[2, -100, 4, -100], [8, 9, 6, -100]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 2, 3]],
        "seq_lens": [[2, 1], [4, -1000]],
        "seq_lens_padded": [[2, 2], [4, -1000]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_packed_collater_refuses():
    with pytest.raises(UserError, match="needs packed rows, but a sample has no `position_ids`"):
        packed_sequence_thd_collater(SAMPLES)
    longer = {**PACKED[0], "input_ids": [1] * 5}
    with pytest.raises(UserError, match="Packed rows must have one length, but a batch holds 4, 5"):
        packed_sequence_thd_collater([PACKED[1], longer])


def test_split_prompt_answer():
    assert split_prompt_answer({"input_ids": [1, 2, 3], "labels": [-100, 3, 4]}) == ([1, 2], [3, 4])
    two = {"input_ids": [1, 2, 3, 4, 0], "labels": [2, -100, 4, 5, -100]}
    assert split_prompt_answer(two) == ([1, 2, 3], [4, 5])
    with pytest.raises(UserError, match="Nothing of the sample is learned"):
        split_prompt_answer({"input_ids": [1], "labels": [-100]})
