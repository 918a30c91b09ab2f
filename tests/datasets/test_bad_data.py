"""What goes wrong with data, and the one line each mistake gives on the command line.

This is the complete list: every fault is planted in files of its own, and `automodel run.yaml` is typed as a user types
it. None of them may reach the first step, and none may show a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import yaml
from support.tiny import CHAT_TEMPLATE, make_model_dir, make_tokenizer

from nemo_automodel.cli.app import main

BUILDERS = "nemo_automodel.components.datasets.llm"
CHAT = {"_target_": f"{BUILDERS}.chat_dataset.ChatDataset", "path_or_dataset_id": "data.jsonl"}
TABLE = {
    "_target_": f"{BUILDERS}.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset",
    "path_or_dataset_id": "data.jsonl",
    "column_mapping": {"question": "question", "answer": "answer"},
}
SQUAD = {"_target_": f"{BUILDERS}.squad.make_squad_dataset", "dataset_name": "data.jsonl"}
GOOD = {"question": "Where?", "answer": "Paris"}
USER, ASSISTANT = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris"}
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"of": "dog"}'}}
LONG = {"question": "Where is it? " * 60, "answer": "Paris"}
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant.') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.get('tool_calls', []) %}{{ c['function'] | tojson }}{% endfor %}",
)
OWN_CODE = """
def unshifted(tokenizer):
    ids = tokenizer("Where? Paris and Rome")["input_ids"] + [tokenizer.eos_token_id]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]}] * 8

def masked(tokenizer):
    ids = tokenizer("Where? Paris")["input_ids"] + [tokenizer.eos_token_id]
    return [{"input_ids": ids[:-1], "labels": [-100] * len(ids[1:])}] * 8

def endless(tokenizer):
    ids = tokenizer("Where? Paris and Rome")["input_ids"]
    return [{"input_ids": ids[:-1], "labels": ids[1:]}] * 8

def doubled(tokenizer):
    ids = [tokenizer.bos_token_id] * 2 + tokenizer("Where? Paris")["input_ids"] + [tokenizer.eos_token_id]
    return [{"input_ids": ids[:-1], "labels": ids[1:]}] * 8

def padded(tokenizer):
    ids = tokenizer("Where? Paris")["input_ids"] + [tokenizer.eos_token_id]
    pad = [tokenizer.pad_token_id] * 3
    return [{"input_ids": ids[:-1] + pad, "labels": ids[1:] + pad, "attention_mask": [1] * len(ids[1:]) + [0] * 3}] * 8

def nameless(tokenizer):
    return [{"input_ids": [5, 6, 7], "label": [6, 7, 2]}] * 8

def forgets(batch):
    from nemo_automodel.components.datasets.utils import default_collater
    made = default_collater(batch)
    made["labels"][made["labels"] == 2] = -100
    return made
"""


class Fault(NamedTuple):
    """Files to write, what to set in the recipe, and what must be printed."""

    rows: Any
    """Rows of ``data.jsonl``; bytes or text of it; or a mapping of file names to any of these."""
    dataset: dict[str, Any]
    message: str
    """``{dir}`` is where the files lie."""
    more: dict[str, Any] = {}  # noqa: RUF012
    """Dotted keys of the recipe."""
    template: str | None = None


def chat(*messages: Any, **more: Any) -> list[dict[str, Any]]:
    """Return a good conversation and a bad one."""
    return [{"messages": [USER, ASSISTANT]}, {"messages": list(messages), **more}]


FILES: dict[str, Fault] = {
    "malformed JSON": Fault(
        b'{"question": "a", "answer": "b"}\n{"question": "a", "answer" "b"}\n',
        TABLE,
        "{dir}data.jsonl line 2: not valid JSON: Expecting ':' delimiter at column 28. Every line must be "
        "one JSON object.",
    ),
    "wrong encoding": Fault(
        b'{"question": "a", "answer": "b"}\n{"question": "caf\xe9", "answer": "b"}\n',
        TABLE,
        "{dir}data.jsonl line 2: byte 0xe9 is not UTF-8 text. Save the file with the encoding UTF-8.",
    ),
    "empty file": Fault(b"", TABLE, "data.jsonl is empty. It must hold at least one row."),
    "misspelt column": Fault(
        [{"questions": "a", "answer": "b", "id": 1}],
        TABLE,
        "The data has no column `question`. Did you mean `questions`? Its columns: questions, answer, id "
        "(data.jsonl line 1).",
    ),
    "missing column": Fault(
        [{"text": "a"}],
        SQUAD,
        "The data has no column `context`. Did you mean `text`? Its columns: text (data.jsonl line 1).",
    ),
    "a directory without data": Fault(
        {"there/README.md": "about"},
        {**TABLE, "path_or_dataset_id": "there"},
        "The directory `there` holds no data file. Known kinds: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow.",
    ),
    "a split that is not there": Fault(
        {"there/train.jsonl": [GOOD], "there/dev.jsonl": [GOOD]},
        {**TABLE, "path_or_dataset_id": "there", "split": "trian"},
        "`there` has no split `trian`. Did you mean `train`? Splits there: train, validation.",
    ),
    "a row that is no object": Fault(
        b'{"question": "a", "answer": "b"}\n["a", "b"]\n',
        TABLE,
        'data.jsonl line 2: the row is a list, but it must be an object such as {{"prompt": "…"}}.',
    ),
    "nested without end": Fault(
        b'{"question": ' + b"[" * 100_000 + b"\n",
        TABLE,
        "data.jsonl line 1: nested too deeply to be read. A row is a flat object or a list of messages.",
    ),
    "a row of a table too long": Fault(
        {"data.csv": "question,answer\nWhere?,Paris\nWhere, when?,Paris\n"},
        {**TABLE, "path_or_dataset_id": "data.csv"},
        "data.csv line 3: 3 fields, but the header has 2. Put values that hold the separator into double quotes.",
    ),
}

ROWS: dict[str, Fault] = {
    "empty answer": Fault(
        [GOOD, {"question": "Where?", "answer": "  "}],
        TABLE,
        "data.jsonl line 2: the answer is empty, so there is nothing to learn. Fill it or remove the row.",
    ),
    "null answer": Fault(
        [GOOD, {"question": "Where?", "answer": None}],
        TABLE,
        "data.jsonl line 2: the answer is empty, so there is nothing to learn. Fill it or remove the row.",
    ),
    "null prompt": Fault(
        [GOOD, {"question": None, "answer": "Paris"}],
        TABLE,
        "data.jsonl line 2: question hold no text, so there is no prompt.",
    ),
    "wrong type": Fault(
        [GOOD, {"question": "Where?", "answer": {"city": "Paris"}}],
        TABLE,
        "data.jsonl line 2: the column `answer` holds an object, but it must hold text.",
    ),
    "wrong type in SQuAD": Fault(
        [{"context": "c", "question": "q", "answers": "Paris"}],
        SQUAD,
        'data.jsonl line 1: `answers` must look like {{"text": ["…"]}} with one text or more.',
    ),
    "an answer that is a number": Fault(
        chat(USER, {"role": "assistant", "content": 7}),
        CHAT,
        "data.jsonl line 2: the content of message 2 is a number, but it must be text.",
    ),
    "null content": Fault(
        chat({"role": "user", "content": None}, ASSISTANT),
        CHAT,
        "data.jsonl line 2: the content of message 1 is null, but it must be text.",
    ),
    "empty answer in a conversation": Fault(
        chat(USER, {"role": "assistant", "content": "\n"}),
        CHAT,
        "data.jsonl line 2: message 2, an answer of the assistant, is empty, so only its end would be learned. Fill "
        "it, remove it, or set `train: false` in it.",
    ),
    "no list of messages": Fault(
        [{"messages": {"role": "user", "content": "Where?"}}],
        CHAT,
        "data.jsonl line 1: the conversation is an object, but it must be a list of messages.",
    ),
    "messages in messages": Fault(
        chat([USER, ASSISTANT]),
        CHAT,
        "data.jsonl line 2: message 1 is a list, but it must be an object with a role.",
    ),
    "a role nobody knows": Fault(
        chat({"role": "usr", "content": "Where?"}, ASSISTANT),
        CHAT,
        "data.jsonl line 2: message 1 has the role `usr`, which is not known. Did you mean `user`? Known: system, "
        "developer, user, human, assistant, gpt, model, chatgpt, tool, function, function_response, observation, "
        "ipython, function_call.",
    ),
    "two users in a row": Fault(
        chat(USER, USER, ASSISTANT),
        CHAT,
        "data.jsonl line 2: the chat template refuses the conversation: Roles must alternate "
        "user/assistant/user/assistant.",
        template=STRICT,
    ),
    "no assistant": Fault(
        chat(USER),
        CHAT,
        "data.jsonl line 2: the conversation has no assistant turn, so there is nothing to learn.",
    ),
    "a call without a result": Fault(
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, ASSISTANT),
        CHAT,
        "data.jsonl line 2: message 2 calls a tool, but message 3 is from `assistant` and no result comes between "
        "them. Add a message with the role `tool`, or cut the conversation after the call.",
        template=TOOLS,
    ),
    "arguments that are no JSON": Fault(
        chat(
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": "{dog}"}}],
            },
        ),
        CHAT,
        "data.jsonl line 2: message 2: the arguments of the call of `find` are not valid JSON: Expecting property name "
        "enclosed in double quotes.",
        template=TOOLS,
    ),
    "an image": Fault(
        chat(
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            ASSISTANT,
        ),
        CHAT,
        "data.jsonl line 2: message 1 holds image content, but this recipe trains on text only.",
    ),
    "an answer that is cut off": Fault(
        [GOOD, LONG],
        {**TABLE, "seq_length": 32, "truncation": True},
        "data.jsonl line 2 has 364 tokens, and `dataset.seq_length` cuts off all 2 learned ones, so it teaches nothing "
        "(1 of 2 rows looked at). Raise `dataset.seq_length`, shorten the row, or bear a share of such rows with "
        "`data_check.max_unlearned_share`.",
    ),
    "longer than the pack, refused": Fault(
        [GOOD, LONG],
        TABLE,
        "data.jsonl line 2 has 363 tokens, but `packed_sequence.packed_sequence_size` is 64. Raise it, set "
        "`packed_sequence.on_long` to drop or truncate, or truncate with `dataset.seq_length`.",
        more={"packed_sequence": {"packed_sequence_size": 64, "on_long": "error"}},
    ),
    "longer than the pack, dropped": Fault(
        [GOOD, LONG],
        TABLE,
        "Packing drops 1 of 2 documents, but at most 20 % may be lost. Raise `packed_sequence.packed_sequence_size`, "
        "cut with `dataset.seq_length` and `dataset.truncation: true`, or raise `data_check.max_dropped_share`.",
        more={"packed_sequence": {"packed_sequence_size": 64}},
    ),
    "longer than the pack, cut": Fault(
        [GOOD, LONG],
        TABLE,
        "data.jsonl line 2 has 364 tokens, and `packed_sequence.packed_sequence_size: 64` cuts off all 2 learned ones, "
        "so it teaches nothing. Raise `packed_sequence.packed_sequence_size`, shorten or remove the row, or bear such "
        "rows with `data_check.max_unlearned_share`.",
        more={"packed_sequence": {"packed_sequence_size": 64, "on_long": "truncate"}},
    ),
    "a template with a mistake": Fault(
        chat(USER, ASSISTANT),
        {**CHAT, "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endif %}"},
        "The chat template is not valid Jinja: Encountered unknown tag 'endif'. Jinja was looking for the following "
        "tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for' (line 2). Correct the "
        "template, or name another with `dataset.chat_template`.",
    ),
    "a template that rewrites": Fault(
        [{"messages": [USER, ASSISTANT]}],
        {**CHAT, "chat_template": "{{ messages | length }} messages\n" + CHAT_TEMPLATE},
        "data.jsonl line 1: the chat template writes the 1 messages before assistant turn 1 differently once the "
        "conversation goes on, so serving would not show what was trained. Use a template that only appends, or cut "
        "the conversation there.",
    ),
    "no template": Fault(
        [{"messages": [USER, ASSISTANT]}],
        CHAT,
        "ChatDataset needs a chat template, but the tokenizer has none. Set `dataset.chat_template` to a text or a "
        ".jinja file, or use an instruction-tuned model's tokenizer.",
        template="",
    ),
}

OWN: dict[str, tuple[str, str]] = {
    "unshifted": (
        "unshifted",
        "Row 1 of the data set: every label is the token it stands on, not the next one, so the model would learn to "
        "repeat its input. Shift them: input_ids = ids[:-1], labels = ids[1:].",
    ),
    "nothing learned": (
        "masked",
        "Nothing is learned: none of the 8 rows looked at has a label (Row 1 of the data set is the first; all its "
        "labels are -100). Check what the data set masks.",
    ),
    "no end": (
        "endless",
        "No end is learned in any of the 8 rows looked at (Row 1 of the data set is the first), so the model would "
        "never stop. End every answer with <|im_end|> and learn it. For text without ends set "
        "`data_check.require_end_token: false`.",
    ),
    "doubled BOS": (
        "doubled",
        "Row 1 of the data set begins with <|im_start|> twice, which serving never sends. One comes from the text or "
        "the chat template, one from the tokenizer: take it out of one of them (`tokenizer.add_bos_token: false`).",
    ),
    "learned padding": (
        "padded",
        "Row 1 of the data set: 3 labels stand on padding, so the model would learn to write padding. Set the label to "
        "-100 wherever `attention_mask` is 0.",
    ),
    "no labels": (
        "nameless",
        "Row 1 of the data set has no `labels`. Its fields: input_ids, label. Return `input_ids` and `labels` (shifted "
        "by one, -100 where nothing is learned).",
    ),
}


@pytest.fixture
def printed(tmp_path: Path, model_dirs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that writes files, runs the command and returns what it prints after ``error: ``."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in content)
            path.write_text(content if isinstance(content, str) else lines)

    def run(
        rows: Any, dataset: dict[str, Any], template: str | None = None, model: Path | None = None, **more: Any
    ) -> str:
        for name, content in (rows if isinstance(rows, dict) else {"data.jsonl": rows}).items():
            write(name, content)
        chat_template = CHAT_TEMPLATE if template is None and "ChatDataset" in dataset["_target_"] else template
        config = {
            "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
            "step_scheduler": {"global_batch_size": 2, "local_batch_size": 1, "max_steps": 1},
            "model": {
                "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
                "pretrained_model_name_or_path": str(model or model_dirs("llama", chat_template or None)),
            },
            "dataset": dataset,
            "dataloader": {"shuffle": False},
            "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
            "checkpoint": {"checkpoint_dir": "run", "enabled": False},
            **more,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        status = main(["run.yaml"])
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (status, len(error)) == (2, 1)
        log = tmp_path / "run" / "training.jsonl"
        assert not log.exists() or not log.read_text(), "a step was trained"
        return error[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize("name", [*FILES, *ROWS])
def test_faults_of_files_and_rows(name: str, printed: Callable):
    fault = {**FILES, **ROWS}[name]
    message = printed(fault.rows, fault.dataset, fault.template, **fault.more)
    assert message == fault.message.format(dir="")


@pytest.mark.parametrize("name", OWN)
def test_faults_of_a_users_own_builder(name: str, printed: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEMO_ENABLE_USER_MODULES", "1")
    function, message = OWN[name]
    assert printed({"mine.py": OWN_CODE}, {"_target_": f"mine.py:{function}"}) == message


def test_a_collate_function_that_forgets_the_end(printed: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEMO_ENABLE_USER_MODULES", "1")
    rows = {"data.jsonl": [GOOD] * 8, "mine.py": OWN_CODE}
    message = printed(rows, TABLE, dataloader={"collate_fn": {"_target_": "mine.py:forgets"}, "shuffle": False})
    assert message.startswith(
        "No end is learned in any of the 1 rows looked at (The first micro-batch is the first), so the model would "
        "never stop."
    )


def test_a_tokenizer_without_pad_and_end(printed: Callable, tmp_path: Path):
    model = make_model_dir(tmp_path / "model")
    tokenizer = make_tokenizer()
    for name in ("eos_token", "pad_token"):
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(model)
    message = printed([GOOD], TABLE, model=model)
    assert message == (
        f"The tokenizer of `{model}` has neither a pad nor an end token, so rows cannot be padded. Set one: "
        "`--tokenizer.pad_token '<a token of the vocabulary>'`."
    )
    tokenizer.pad_token = "<|pad|>"
    tokenizer.save_pretrained(model)
    message = printed([GOOD], TABLE, model=model)
    assert message == (
        "The tokenizer has no eos token, so the model would never learn to stop. Set `eos_token` in its "
        "tokenizer_config.json."
    )


def test_a_row_of_10_mb(printed: Callable, tmp_path: Path):
    model = make_model_dir(tmp_path / "model", vocab_size=401)
    tokenizer = make_tokenizer()
    sentence = "Where is it? " * 100
    tokenizer.add_tokens(sentence)  # so that the test does not take half a minute
    tokenizer.save_pretrained(model)
    row = {"question": sentence * 8_000, "answer": "Paris"}
    assert printed([GOOD, row], TABLE, model=model) == (
        "data.jsonl line 2 has 8,001 tokens, but the model reads at most 512 (`max_position_embeddings`). Cut rows "
        "with `dataset.seq_length` and `dataset.truncation: true`, or remove this one."
    )


def test_a_tokenizer_larger_than_the_model(printed: Callable, tmp_path: Path):
    model = make_model_dir(tmp_path / "model", vocab_size=300)
    rows = [GOOD, {"question": "1?", "answer": "2"}]
    ids = make_tokenizer()("Where? Paris")["input_ids"]
    token = make_tokenizer().convert_ids_to_tokens(max(ids))
    assert printed(rows, TABLE, model=model) == (
        f"data.jsonl line 1 holds the token {max(ids)} ({token}), but the model's vocabulary has 300 tokens; the "
        "tokenizer has 400. Use the model's own tokenizer."
    )


def test_a_damaged_table(printed: Callable, tmp_path: Path):
    datasets.Dataset.from_list([GOOD] * 50).to_parquet(str(tmp_path / "whole.parquet"))
    content = (tmp_path / "whole.parquet").read_bytes()
    message = printed({"data.parquet": content[: len(content) // 2]}, {**TABLE, "path_or_dataset_id": "data.parquet"})
    assert message.startswith("data.parquet is not a readable parquet file: ")


def test_ids_twice_are_told(printed: Callable, caplog: pytest.LogCaptureFixture):
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}]
    # that is a warning; the run is refused for the model, which is looked at later
    printed(
        rows, TABLE, peft={"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "target_modules": "nothing"}
    )
    assert (
        "data.jsonl line 3 has the id `a` of data.jsonl line 1 (1 such rows of those looked at). If the data was put "
        "together twice, remove the copies." in caplog.messages
    )


def test_the_docs_show_these_messages():
    page = (Path(__file__).resolve().parents[2] / "docs/errors.md").read_text(encoding="utf-8")
    section = page.split("\n## Data\n")[1].split("\n## ")[0]
    shown = [
        " ".join(text.split())
        for block in section.split("```text\n")[1:]
        for text in block.split("```")[0].split("\n\n")
    ]
    printed = {f"error: {fault.message.format(dir='')}" for fault in {**FILES, **ROWS}.values()}
    printed |= {f"error: {message}" for _, message in OWN.values()}
    assert len(shown) >= 13
    assert not set(shown) - printed
