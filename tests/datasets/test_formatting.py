"""The border between prompt and answer, EOS and BOS, cutting, shifting and padding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_tokenizer
from transformers import PreTrainedTokenizer
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout, PromptAnswer, PromptAnswerEncoder
from nemo_automodel.shared.errors import UserError

SQUAD_PROMPT = "Context: The tower was built in 1889 in Paris. Question: Where was the tower built? Answer: "
LAYOUT = Layout(pad_id=3)


def encode(tokenizer: Fast, prompt: str, answer: str, **options) -> Encoded:
    return PromptAnswerEncoder(tokenizer, **options).encode([PromptAnswer(prompt, answer)], ["row 1"])[0]


def learned_text(tokenizer: Fast, encoded: Encoded) -> str:
    ((start, end),) = encoded.learned
    return tokenizer.decode(encoded.ids[start : end - 1])


@pytest.mark.parametrize("prompt", [SQUAD_PROMPT, "Answer:", "Answer: ", "Answer:  ", "Answer:\n", "("])
@pytest.mark.parametrize("answer", ["Paris", "Paris.", "1889", "the lazy dog"])
def test_first_answer_token_and_eos_are_learned(any_tokenizer: Fast, prompt: str, answer: str):
    encoded = encode(any_tokenizer, prompt, answer)
    text = prompt + answer
    core = any_tokenizer.backend_tokenizer.encode(text)
    expected_first = next(i for i, (start, end) in enumerate(core.offsets) if end > len(prompt))
    ((first, end),) = encoded.learned
    assert first == expected_first
    assert encoded.ids[: len(core.ids)] == core.ids
    assert end == len(encoded.ids)
    assert encoded.ids[-1] == any_tokenizer.eos_token_id
    assert encoded.ids.count(any_tokenizer.eos_token_id) == 1
    spelled = learned_text(any_tokenizer, encoded).lower().replace("##", "").replace(" ", "")
    assert spelled.endswith(answer.lower().replace(" ", ""))


def test_a_prompt_that_ends_in_a_space_does_not_hide_the_answer():
    # tokens " Paris" straddles the border: tokenising the prompt apart would count the space as a token of its own
    # and mask the whole answer
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, SQUAD_PROMPT, "Paris")
    assert tokenizer.encode(" Paris") == encoded.ids[-2:-1], (
        "the tiny tokenizer must merge the word for this to prove anything"
    )
    assert len(tokenizer.encode(SQUAD_PROMPT)) >= len(encoded.ids) - 1, "the wrong way must mask everything here"
    assert encoded.learned == [(len(encoded.ids) - 2, len(encoded.ids))]


def test_bos_comes_as_the_tokenizer_adds_it_and_never_twice(any_tokenizer: Fast):
    plain = any_tokenizer("Answer: x")["input_ids"]
    has_bos = plain[0] == any_tokenizer.bos_token_id
    encoded = encode(any_tokenizer, "Answer: ", "Paris")
    assert (encoded.ids[0] == any_tokenizer.bos_token_id) == has_bos
    if has_bos:
        brought = encode(any_tokenizer, f"{any_tokenizer.bos_token}Answer: ", "Paris")
        assert brought.ids.count(any_tokenizer.bos_token_id) == 1
        assert learned_text(any_tokenizer, brought) == learned_text(any_tokenizer, encoded)


def test_whole_text_is_learned_without_answer_only(tokenizer: Fast):
    encoded = encode(tokenizer, "Answer: ", "Paris", answer_only=False)
    sample = LAYOUT.sample(encoded)
    assert sample["labels"] == encoded.ids[1:]


def test_batches_encode_as_single_rows_do(any_tokenizer: Fast):
    items = [
        PromptAnswer("Answer: ", "Paris"),
        PromptAnswer(SQUAD_PROMPT, "1889"),
        PromptAnswer("Q ", "a wonderful story"),
    ]
    encoder = PromptAnswerEncoder(any_tokenizer)
    singles = [encoder.encode([item], ["row"])[0] for item in items]
    assert encoder.encode(items, ["row"] * 3) == singles


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=20), answer=st.text(min_size=1, max_size=12).filter(str.strip))
def test_byte_level_border_spells_the_answer(prompt: str, answer: str):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, prompt, answer)
    ((first, end),) = encoded.learned
    before = tokenizer.decode(encoded.ids[:first])
    after = tokenizer.decode(encoded.ids[first : end - 1])
    assert before + after == prompt + answer
    assert after.endswith(answer)
    assert first == 0 or len(tokenizer.decode(encoded.ids[: first + 1])) > len(prompt) - 1


def test_shift_labels_and_mask():
    sample = LAYOUT.sample(Encoded([10, 11, 12, 13, 14], [(2, 4)]))
    assert sample["input_ids"] == [10, 11, 12, 13]
    assert sample["labels"] == [-100, 12, 13, -100]
    assert sample["attention_mask"] == [1, 1, 1, 1]
    assert sample["___PAD_TOKEN_IDS___"] == {"input_ids": 3, "labels": -100, "attention_mask": 0}


def test_the_first_token_is_never_a_label():
    assert LAYOUT.sample(Encoded([10, 11], [(0, 2)]))["labels"] == [11]


def test_unshifted_labels_stand_on_their_token():
    sample = Layout(pad_id=3, shifted=False).sample(Encoded([10, 11, 12], [(1, 3)]))
    assert sample["input_ids"] == [10, 11, 12]
    assert sample["labels"] == [-100, 11, 12]


def test_padding_to_length(tokenizer: Fast):
    layout = Layout.of(tokenizer, 6, "max_length", False)
    sample = layout.sample(Encoded([10, 11, 12, 13], [(2, 4)]))
    assert sample["input_ids"] == [10, 11, 12, 3, 3, 3]
    assert sample["labels"] == [-100, 12, 13, -100, -100, -100]
    assert sample["attention_mask"] == [1, 1, 1, 0, 0, 0]
    assert len(layout.sample(Encoded(list(range(9)), [(2, 9)]))["input_ids"]) == 8, "padding does not cut"


@pytest.mark.parametrize("truncation", [True, "longest_first"])
def test_truncation_fills_the_length_exactly(tokenizer: Fast, truncation: bool | str):
    layout = Layout.of(tokenizer, 4, False, truncation)
    encoded = Encoded([10, 11, 12, 13, 14, 15, 16], [(3, 7)])
    sample = layout.sample(encoded)
    assert sample["input_ids"] == [10, 11, 12, 13]
    assert sample["labels"] == [-100, -100, 13, 14]
    assert layout.num_cut(encoded) == (2, 2)
    assert layout.num_cut(Encoded(list(range(9)), [(5, 9)])) == (0, 4)


@pytest.mark.parametrize(("padding", "truncation"), [(False, False), ("do_not_pad", "do_not_truncate"), (True, False)])
def test_nothing_is_cut_or_padded_by_default(tokenizer: Fast, padding: bool | str, truncation: bool | str):
    sample = Layout.of(tokenizer, None, padding, truncation).sample(Encoded(list(range(50)), [(40, 50)]))
    assert len(sample["input_ids"]) == 49


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, "max_length", False), "`dataset.padding: max_length` needs a length. Set `dataset.seq_length`."),
        ((None, False, True), "`dataset.truncation: True` needs a length. Set `dataset.seq_length`."),
        ((1, False, True), "`dataset.seq_length` is 1, but it must be at least 2."),
        ((8, "maxlength", False), "`dataset.padding: maxlength` is not known. Did you mean `max_length`?"),
        ((8, False, "left"), "`dataset.truncation: left` is not known."),
    ],
)
def test_bad_layouts(tokenizer: Fast, values: tuple, message: str):
    with pytest.raises(UserError, match="^" + message.replace(".", r"\.").replace("?", r"\?")):
        Layout.of(tokenizer, *values)


def test_a_length_without_effect_is_told(tokenizer: Fast, caplog: pytest.LogCaptureFixture):
    Layout.of(tokenizer, 8, False, False)
    assert "has no effect" in caplog.text


def test_pad_falls_back_to_eos_which_stays_learned(tokenizer: Fast):
    tokenizer.pad_token = tokenizer.eos_token
    layout = Layout.of(tokenizer, 12, "max_length", False)
    sample = layout.sample(encode(tokenizer, "Answer: ", "Paris"))
    assert sample["input_ids"][-1] == tokenizer.eos_token_id
    assert [label for label in sample["labels"] if label != -100][-1] == tokenizer.eos_token_id
    assert sample["labels"][-1] == -100


def test_tokenizers_that_cannot_be_used(tokenizer: Fast):
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(UserError, match="no character offsets"):
        PromptAnswerEncoder(Slow())
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="never learn to stop"):
        PromptAnswerEncoder(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="neither a pad nor an eos"):
        Layout.of(tokenizer, None, False, False)
