"""From rows in either form to messages, and ChatDataset as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import CHAT_TEMPLATE
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset, conversation
from nemo_automodel.components.datasets.utils import split_prompt_answer
from nemo_automodel.shared.errors import UserError

OPENAI = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Paris"}]}


@pytest.fixture
def chat_tokenizer(tokenizer: Fast) -> Fast:
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_both_forms_are_the_same_conversation():
    assert conversation(OPENAI, "row") == conversation(SHAREGPT, "row")
    assert conversation(OPENAI, "row").messages == OPENAI["messages"]
    assert conversation({"messages": json.dumps(OPENAI["messages"])}, "row") == conversation(OPENAI, "row")


def test_sharegpt_roles_and_system_column():
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "function_call", "value": '{"name": "where", "arguments": {"of": "dog"}}'},
            {"from": "observation", "value": "Rome"},
            {"from": "gpt", "value": "In Rome."},
        ],
        "tools": '[{"name": "where"}]',
    }
    got = conversation(row, "row")
    assert [message["role"] for message in got.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert got.messages[2]["tool_calls"][0]["function"] == {"name": "where", "arguments": {"of": "dog"}}
    assert got.tools == [{"name": "where"}]


def test_json_arguments_become_objects_and_nulls_are_taken_out():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Where?", "tool_calls": None, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {"enum": None, "type": "int"}}}}],
    }
    got = conversation(row, "row")
    assert got.messages[0] == {"role": "user", "content": "Where?"}
    assert got.messages[1]["content"] == ""
    assert got.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert got.tools[0]["function"]["parameters"] == {"x": {"type": "int"}}
    assert conversation({**OPENAI, "tools": ""}, "row").tools is None


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "In "}, {"type": "text", "text": "Paris"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert conversation(row, "row").messages[0]["content"] == "In Paris"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "row: the conversation is null, but it must be a list of messages."),
        ({"messages": []}, "row: the conversation is a list, but it must be a list of messages."),
        ({"messages": "[{"}, "row: the messages are not valid JSON"),
        ({"messages": [{"content": "x"}]}, "row: message 1 has the role `None`"),
        ({**OPENAI, "tools": "[{"}, "row: the tools are not valid JSON"),
        ({**OPENAI, "tools": {"name": "f"}}, "row: `tools` must be a list"),
    ],
)
def test_bad_rows(row: dict, message: str):
    with pytest.raises(UserError) as caught:
        conversation(row, "row")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_dataset_of_a_file(tmp_path: Path, chat_tokenizer: Fast, write_jsonl):
    path = write_jsonl(tmp_path / "chat.jsonl", [OPENAI, SHAREGPT])
    dataset = ChatDataset(str(path), chat_tokenizer)
    assert len(dataset) == 2
    assert dataset[0] == dataset[1]
    prompt, answer = split_prompt_answer(dataset[0])
    assert chat_tokenizer.decode(prompt) == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer.decode(answer) == "Paris<|im_end|>"


def test_options_reach_their_stage(tmp_path: Path, chat_tokenizer: Fast, write_jsonl, caplog):
    row = {"messages": OPENAI["messages"] * 2}
    path = str(write_jsonl(tmp_path / "train.jsonl", [row] * 3))
    full = ChatDataset(path, chat_tokenizer)[0]
    num_learned = sum(label != -100 for label in full["labels"])
    last = ChatDataset(path, chat_tokenizer, mask_history=True)[0]
    assert sum(label != -100 for label in last["labels"]) == num_learned // 2
    unshifted = ChatDataset(path, chat_tokenizer, unshifted=True, start_of_turn_token="<|im_start|>")[0]
    assert unshifted["input_ids"][:-1] == full["input_ids"]
    assert all(label in (-100, token) for label, token in zip(unshifted["labels"], unshifted["input_ids"], strict=True))
    assert "start_of_turn_token` has no effect" in caplog.text
    half = len(full["input_ids"]) // 2
    cut = ChatDataset(path, chat_tokenizer, seq_length=half, truncation=True, padding="max_length")[0]
    assert cut["input_ids"] == full["input_ids"][:half]


def test_cut_answers_are_counted_and_told(tmp_path: Path, chat_tokenizer: Fast, write_jsonl, caplog):
    path = write_jsonl(tmp_path / "train.jsonl", [OPENAI] * 3)
    length = len(ChatDataset(str(path), chat_tokenizer)[0]["input_ids"])
    dataset = ChatDataset(str(path), chat_tokenizer, seq_length=length - 2, truncation=True)
    samples = [dataset[i] for i in range(3)]
    assert dataset.num_cut_rows == 3
    assert samples[0]["labels"][-1] != -100
    assert "train.jsonl line 1" in caplog.text
    assert caplog.text.count("learned tokens at `seq_length:") == 1, "told at 1, 10, 100, …"
    dataset = ChatDataset(str(path), chat_tokenizer, seq_length=4, truncation=True)
    dataset.bears_unlearned = True
    assert set(dataset[1]["labels"]) == {-100}
    assert (dataset.num_unlearned_rows, dataset.num_cut_rows) == (1, 0)
    assert "teaches nothing" in caplog.text


def test_invalid_rows_end_the_run_or_are_skipped(tmp_path: Path, chat_tokenizer: Fast, write_jsonl, caplog):
    path = write_jsonl(tmp_path / "train.jsonl", [OPENAI, {"messages": []}, {"messages": OPENAI["messages"][:1]}])
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match="line 4: not valid JSON"):
        ChatDataset(str(path), chat_tokenizer)
    dataset = ChatDataset(str(path), chat_tokenizer, skip_invalid_samples=True)
    assert "Left out 1 of 4 rows" in caplog.text
    samples = dataset.__getitems__([0, 1, 2])
    assert samples[0] == dataset[0]
    assert [set(sample["labels"]) for sample in samples[1:]] == [{-100}, {-100}]
    assert dataset.num_skipped_rows == 2
    assert "line 3: the conversation has no assistant turn" in caplog.text


def test_shuffle_seed_keeps_slices_disjoint(tmp_path: Path, chat_tokenizer: Fast, write_jsonl):
    rows = [{"messages": [{"role": "user", "content": str(i)}, OPENAI["messages"][1]]} for i in range(20)]
    path = str(write_jsonl(tmp_path / "train.jsonl", rows))

    def questions(split: str, seed: int | None) -> list[str]:
        dataset = ChatDataset(path, chat_tokenizer, split=split, shuffle_seed=seed)
        return [row["messages"][0]["content"] for row in dataset.rows]

    first, rest = questions("train[:6]", 42), questions("train[6:]", 42)
    assert sorted(first + rest, key=int) == [str(i) for i in range(20)]
    assert first != [str(i) for i in range(6)]
    assert questions("train[:6]", None) == [str(i) for i in range(6)]


def test_what_is_missing_is_named(tmp_path: Path, tokenizer: Fast, chat_tokenizer: Fast, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", [{"message": []}]))
    with pytest.raises(UserError, match=r"no column `messages`. Did you mean `message`"):
        ChatDataset(path, chat_tokenizer)
    chat_tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template, but the tokenizer has none"):
        ChatDataset(path, chat_tokenizer)
