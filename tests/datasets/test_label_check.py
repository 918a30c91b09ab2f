"""The label gate on documents written by hand: each fault gives its message, and what is sound passes."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.tiny import make_tokenizer
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.components.datasets.document_view import DocumentView, documents_of, rows_of
from nemo_automodel.components.datasets.label_check import ModelLimits, check_labels
from nemo_automodel.shared.errors import UserError

BOS, EOS, PAD = 1, 2, 3  # of the tiny tokenizer: <|im_start|>, <|im_end|>, <|pad|>
CONFIG = DataCheckConfig()


def document(ids: list[int], num_given: int, where: str = "data.jsonl line 1", **more) -> DocumentView:
    """Return a document that learns everything after its first ``num_given`` tokens."""
    labels = [-100] * (num_given - 1) + ids[num_given:]
    return DocumentView(where, ids[:-1], labels, **more)


GOOD = document([10, 11, 12, 13, EOS], 3)
UNLEARNED = document([10, 11, 12, 13], 4, "data.jsonl line 7")


def check(documents: list[DocumentView], tokenizer: Fast | None = None, config: DataCheckConfig = CONFIG, **more):
    return check_labels(documents, tokenizer or make_tokenizer(), config, **more)


def test_what_a_document_says():
    assert GOOD.ids == [10, 11, 12, 13, EOS]
    assert GOOD.learned == [False, False, False, True, True]
    assert GOOD.num_learned == 2
    ends_given = DocumentView("row", [10, 11, 12], [-100, 12, -100])
    assert (ends_given.ids, ends_given.learned) == ([10, 11, 12], [False, False, True])


def test_sound_rows_pass_and_are_counted():
    other = document([20, 21, 22, EOS], 1, "data.jsonl line 2")
    found = check([GOOD, other, GOOD], num_rows=50)
    assert str(found) == (
        "Data check, 3 of 50 rows looked at: 14 tokens, 7 learned (50.0 %), longest 5, 0 cut, 0 dropped, 1 duplicates."
    )
    assert str(check([GOOD], num_rows=1)).startswith("Data check, all 1 rows: 5 tokens, 2 learned (40.0 %)")
    assert str(check([GOOD])).startswith("Data check, 1 rows of a stream: ")


FAULTS: dict[str, tuple[list[DocumentView], str]] = {
    "nothing": (
        [UNLEARNED, UNLEARNED],
        "Nothing is learned: none of the 2 rows looked at has a label (data.jsonl line 7 is the first; all its labels "
        "are -100). Check what the data set masks.",
    ),
    "one row": (
        [GOOD, UNLEARNED, GOOD],
        "data.jsonl line 7 teaches nothing: all its 3 labels are -100 (1 of 3 rows looked at). Mend or remove the row, "
        "or bear a share of such rows with `data_check.max_unlearned_share`.",
    ),
    "all cut": (
        [GOOD, DocumentView("data.jsonl line 4", [10, 11], [-100, -100], cut_ids=[12, 13, EOS], num_learned_cut=2)],
        "data.jsonl line 4 has 5 tokens, and `dataset.seq_length` cuts off all 2 learned ones, so it teaches nothing "
        "(1 of 2 rows looked at). Raise `dataset.seq_length`, shorten the row, or bear a share of such rows with "
        "`data_check.max_unlearned_share`.",
    ),
    "many cut": (
        [GOOD, *[document([10, 11, 12], 2, f"line {i}", cut_ids=[13, EOS], num_learned_cut=2) for i in (2, 3)]],
        "`dataset.seq_length` cuts the answer of 2 of 3 rows looked at (line 2 loses 2 learned tokens), but at most "
        "50 % may be cut. Raise `dataset.seq_length`, or `data_check.max_truncated_share`.",
    ),
    "no end": (
        [document([10, 11, 12, 13], 2, "Row 1 of the data set")],
        "No end is learned in any of the 1 rows looked at (Row 1 of the data set is the first), so the model would "
        "never stop. End every answer with <|im_end|> and learn it. For text without ends set "
        "`data_check.require_end_token: false`.",
    ),
    "doubled bos": (
        [document([BOS, BOS, 11, 12, EOS], 3)],
        "data.jsonl line 1 begins with <|im_start|> twice, which serving never sends. One comes from the text or the "
        "chat template, one from the tokenizer: take it out of one of them (`tokenizer.add_bos_token: false`).",
    ),
    "unshifted": (
        [DocumentView("Row 1 of the data set", [10, 11, 12, EOS], [-100, 11, 12, EOS])],
        "Row 1 of the data set: every label is the token it stands on, not the next one, so the model would learn to "
        "repeat its input. Shift them: input_ids = ids[:-1], labels = ids[1:].",
    ),
    "skipped": (
        [GOOD, DocumentView("data.jsonl line 2", [EOS], [-100], is_skipped=True)],
        "`skip_invalid_samples` skips 1 of 2 rows looked at (data.jsonl line 2 is the first), but at most 20 % may be "
        "lost. Mend the data, or raise `data_check.max_dropped_share`.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str):
    documents, message = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        check(documents)
    assert str(caught.value) == message


def test_padding_that_is_learned():
    sample = {
        "input_ids": [10, 11, EOS, PAD, PAD],
        "labels": [11, EOS, PAD, PAD, -100],
        "attention_mask": [1, 1, 1, 0, 0],
    }
    with pytest.raises(
        UserError, match=r"^Row 1: 1 labels stand on padding, so the model would learn to write padding"
    ):
        check(documents_of(sample, "Row 1"))
    whole = {key: torch.tensor([values]) for key, values in sample.items()}
    whole["labels"][0, 2:] = -100
    assert check(documents_of(whole, "Row 1")).num_learned == 2


def test_an_end_masked_with_the_padding():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    # as builders make it that set labels to -100 wherever the token is the padding
    masked = DocumentView("Row 1", [10, 11, 12], [11, 12, -100])
    message = (
        "No end is learned in any of the 1 rows looked at (Row 1 is the first), so the model would never stop. The "
        "padding is the end token <|im_end|>, too: whoever masks labels by that token masks the end with the padding. "
        "Mask by position, or give the tokenizer another `pad_token`. For text without ends set "
        "`data_check.require_end_token: false`."
    )
    with pytest.raises(UserError) as caught:
        check([masked], tokenizer)
    assert str(caught.value) == message
    two_turns = DocumentView("Row 1", [10, 11, EOS, 12, 13, EOS, 14], [11, -100, -100, 13, -100, -100, -100])
    with pytest.raises(UserError, match=r"^Row 1: the answer holds <\|im_end\|>, which is also the padding, and it is"):
        check([two_turns], tokenizer)
    assert check([GOOD], tokenizer).num_learned == 2, "the same token may pad and end, if the end is learned"


def test_a_padding_token_inside_answers():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(40)
    hole = DocumentView("Row 1", [10, 11, 40, 12], [11, -100, 12, EOS])
    with pytest.raises(UserError, match="is never learned: its label is masked as if it were padding"):
        check([hole], tokenizer)
    assert check([DocumentView("Row 1", [10, 11, 40, 12], [11, 40, 12, EOS])], tokenizer)
    assert check([DocumentView("Row 1", [10, 40, 11, 12], [-100, -100, 12, EOS])], tokenizer), "a prompt may hold it"


def test_a_special_token_ends_a_part_as_well():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # the tokenizer of a base model; the template ends turns with <|im_end|>
    assert check([document([10, 11, 12, EOS], 2)], tokenizer)
    with pytest.raises(UserError, match="No end is learned"):
        check([document([10, 11, EOS, 12], 1)], tokenizer)


def test_tokens_outside_the_vocabulary():
    with pytest.raises(UserError) as caught:
        check([document([10, 390, 11, EOS], 2)], limits=ModelLimits(350))
    name = make_tokenizer().convert_ids_to_tokens(390)
    assert str(caught.value) == (
        f"data.jsonl line 1 holds the token 390 ({name}), but the model's vocabulary has 350 tokens; the tokenizer has "
        "400. Use the model's own tokenizer."
    )
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    with pytest.raises(
        UserError, match=r"^Rows are padded with the token 400 \(<new pad>\), but the model's vocabulary"
    ):
        check([GOOD], tokenizer, limits=ModelLimits(400))
    assert check([GOOD], tokenizer, limits=ModelLimits(401))


def test_rows_longer_than_the_model_reads():
    assert check([GOOD], limits=ModelLimits(max_positions=4))
    with pytest.raises(UserError) as caught:
        check([GOOD], limits=ModelLimits(max_positions=3))
    assert str(caught.value) == (
        "data.jsonl line 1 has 4 tokens, but the model reads at most 3 (`max_position_embeddings`). Cut rows with "
        "`dataset.seq_length` and `dataset.truncation: true`, or remove this one."
    )


def test_documents_that_packing_drops():
    assert check([GOOD], num_dropped=2, num_kept=8).num_dropped == 2
    with pytest.raises(UserError) as caught:
        check([GOOD], num_dropped=3, num_kept=9)
    assert str(caught.value) == (
        "Packing drops 3 of 12 documents, but at most 20 % may be lost. Raise `packed_sequence.packed_sequence_size`, "
        "cut with `dataset.seq_length` and `dataset.truncation: true`, or raise `data_check.max_dropped_share`."
    )
    assert check([GOOD], config=DataCheckConfig(max_dropped_share=0.25), num_dropped=3, num_kept=9)


@pytest.mark.parametrize(
    ("fault", "more"),
    [
        ("one row", {"max_unlearned_share": 0.5}),
        ("all cut", {"max_unlearned_share": 0.5}),
        ("many cut", {"max_truncated_share": 0.7}),
        ("no end", {"require_end_token": False}),
        ("skipped", {"max_dropped_share": 0.5}),
    ],
)
def test_what_may_be_borne(fault: str, more: dict):
    assert check(FAULTS[fault][0], config=DataCheckConfig(**more))


def test_random_tokens_without_a_tokenizer():
    assert check_labels([document([10, 11, 12, 13], 1)], None, CONFIG).num_learned == 3
    with pytest.raises(UserError, match="Nothing is learned"):
        check_labels([UNLEARNED], None, CONFIG)


def test_shared_ids_are_told(caplog: pytest.LogCaptureFixture):
    rows = [document([10 + i, 11, 12, EOS], 2, f"data.jsonl line {i}", row_id=f"q{i % 3}") for i in range(1, 6)]
    with caplog.at_level(logging.WARNING):
        check(rows)
    assert caplog.messages == [
        "data.jsonl line 4 has the id `q1` of data.jsonl line 1 (2 such rows of those looked at). If the data was put "
        "together twice, remove the copies."
    ]


# --- reading samples back ---------------------------------------------------------------------------------------------


def test_packed_rows_come_apart():
    row = {
        "input_ids": [10, 11, 12, 20, 21, 3, 3],
        "labels": [-100, 12, EOS, 21, EOS, -100, -100],
        "position_ids": [0, 1, 2, 0, 1, 2, 3],
        "seq_lens": [3, 2, -1000],
    }
    first, second = documents_of(row, "Row 5")
    assert (first.where, first.ids, first.learned) == (
        "Row 5, document 1",
        [10, 11, 12, EOS],
        [False, False, True, True],
    )
    assert (second.where, second.ids) == ("Row 5, document 2", [20, 21, EOS])


def test_padding_on_either_side_is_left_out():
    right = {"input_ids": [10, 11, 3], "labels": [11, EOS, -100], "attention_mask": [1, 1, 0]}
    left = {"input_ids": [3, 10, 11], "labels": [-100, 11, EOS], "attention_mask": [0, 1, 1]}
    assert documents_of(right, "r")[0].ids == documents_of(left, "r")[0].ids == [10, 11, EOS]


def test_arrays_and_tensors_are_read_like_lists():
    lists = {"input_ids": [10, 11], "labels": [11, EOS]}
    for make in (np.array, torch.tensor):
        assert documents_of({key: make(values) for key, values in lists.items()}, "r") == documents_of(lists, "r")
        assert len(documents_of({key: make([values] * 3) for key, values in lists.items()}, "r")) == 3


def test_a_loss_mask_counts():
    sample = {"input_ids": [10, 11], "labels": [11, EOS], "loss_mask": [0, 1]}
    assert documents_of(sample, "r")[0].learned == [False, False, True]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("text", "Row 1 is text, but it must be a dict with `input_ids` and `labels`. Return one from the data set."),
        (
            {"input_ids": [1], "label": [1]},
            "Row 1 has no `labels`. Its fields: input_ids, label. Return `input_ids` and `labels` (shifted by one, "
            "-100 where nothing is learned).",
        ),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "Row 1 has 2 `input_ids`, but 1 `labels`. They must be of one length: labels are shifted by one, and -100 "
            "where nothing is learned.",
        ),
    ],
)
def test_what_is_no_sample(sample: object, message: str):
    with pytest.raises(UserError) as caught:
        documents_of(sample, "Row 1")
    assert str(caught.value) == message


def test_a_users_own_set_is_read_by_number():
    samples = [{"input_ids": [10 + i, 11], "labels": [11, EOS]} for i in range(3)]
    assert [[d.where for d in row] for row in rows_of(samples, [2, 0])] == [
        ["Row 3 of the data set"],
        ["Row 1 of the data set"],
    ]


def test_reading_back_counts_nothing(tmp_path, write_jsonl: Callable, caplog: pytest.LogCaptureFixture):
    from nemo_automodel.components.datasets.llm.squad import make_squad_dataset

    row = {"id": 7, "context": "The dog.", "question": "What?", "answers": {"text": ["the lazy dog"]}}
    path = write_jsonl(tmp_path / "train.jsonl", [row])
    dataset = make_squad_dataset(make_tokenizer(), dataset_name=str(path), seq_length=18, truncation=True)
    (((view,),)) = rows_of(dataset, [0])
    assert (view.where, view.row_id) == (f"{path} line 1", "7")
    assert view.input_ids == dataset[0]["input_ids"]
    assert view.labels == dataset[0]["labels"]
    assert make_tokenizer().decode(view.ids + view.cut_ids).endswith("the lazy dog<|im_end|>")
    assert view.num_learned_cut + view.num_learned == 4, "three words and the end"
    counted = dataset.num_cut_rows + dataset.num_unlearned_rows
    rows_of(dataset, [0])
    assert dataset.num_cut_rows + dataset.num_unlearned_rows == counted
