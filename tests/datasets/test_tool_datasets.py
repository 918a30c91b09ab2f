"""Tools, calls and results through templates that behave like the real ones; xLAM and agent traces as builders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.tiny import CHAT_TEMPLATE, make_tokenizer
from support.tool_templates import HERMES, LLAMA3, QWEN3, TOOL_TEMPLATES

from nemo_automodel.components.datasets.llm.agent_chat import make_agent_chat_dataset
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from nemo_automodel.components.datasets.llm.tool_calls import as_tool
from nemo_automodel.components.datasets.llm.xlam import make_xlam_dataset
from nemo_automodel.shared.errors import UserError

XLAM = {
    "id": 0,
    "query": "Where is the tower?",
    "tools": json.dumps(
        [
            {
                "name": "find",
                "description": "Find a place.",
                "parameters": {
                    "name": {"description": "what", "type": "str"},
                    "limit": {"description": "how many", "type": "int, optional", "default": 10},
                },
            }
        ]
    ),
    "answers": json.dumps([{"name": "find", "arguments": {"name": "tower"}}]),
}
CALL = {
    "hermes": '<tool_call>\n{"name": "find", "arguments": {"name": "tower"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "find", "arguments": {"name": "tower"}}\n</tool_call><|im_end|>',
    "llama3": '{"name": "find", "parameters": {"name": "tower"}}<|im_end|>',
}


def learned_texts(tokenizer, sample: dict) -> list[str]:
    """Return what is learned, piece by piece."""
    pieces, piece = [], []
    for label in [*sample["labels"], -100]:
        if label != -100:
            piece.append(label)
        elif piece:
            pieces.append(tokenizer.decode(piece))
            piece = []
    return pieces


def text_of(tokenizer, sample: dict) -> str:
    return tokenizer.decode(sample["input_ids"])


@pytest.fixture(params=list(TOOL_TEMPLATES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- xLAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_text", [True, False])
def test_xlam_learns_the_call_and_offers_the_tools(family, tmp_path, write_jsonl, is_text):
    row = XLAM if is_text else {**XLAM, **{key: json.loads(XLAM[key]) for key in ("tools", "answers")}}
    tokenizer = make_tokenizer(TOOL_TEMPLATES[family])
    dataset = make_xlam_dataset(tokenizer, dataset_name=str(write_jsonl(tmp_path / "train.jsonl", [row, row])))
    assert len(dataset) == 2
    assert learned_texts(tokenizer, dataset[0]) == [CALL[family]]
    text = text_of(tokenizer, dataset[0])
    assert '"description": "Find a place."' in text
    assert '"required": ["name"]' in text
    assert "Where is the tower?" in text


def test_a_template_with_one_call_a_turn_refuses_parallel_calls(tmp_path, write_jsonl, caplog):
    two = {**XLAM, "answers": json.dumps([{"name": "find", "arguments": {"name": city}} for city in ("Rome", "Oslo")])}
    path = str(write_jsonl(tmp_path / "train.jsonl", [two, XLAM]))
    tokenizer = make_tokenizer(LLAMA3)
    with pytest.raises(
        UserError, match=r"train.jsonl line 1: the chat template refuses .* One call at a time, please."
    ):
        make_xlam_dataset(tokenizer, dataset_name=path)[0]
    lenient = make_xlam_dataset(tokenizer, dataset_name=path, skip_invalid_samples=True)
    assert [learned_texts(tokenizer, lenient[i]) for i in (0, 1, 0)] == [[], [CALL["llama3"]], []]
    assert lenient.num_skipped_rows == 1
    both = make_tokenizer(HERMES)
    assert learned_texts(both, make_xlam_dataset(both, dataset_name=path)[0]) == [
        '<tool_call>\n{"name": "find", "arguments": {"name": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {"name": "Oslo"}}\n</tool_call><|im_end|>'
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("List[Union[int, float]]", {"type": "array", "items": {"type": "integer"}}),
        ("Tuple[Dict[str, int], str]", {"type": "array", "items": {"type": "object"}}),
        ("Dict[str, Any]", {"type": "object"}),
        ("Optional[str]", {"type": "string"}),
        ("Callable[[float], float]", {"type": "string"}),
        ("set", {"type": "array"}),
    ],
)
def test_python_types_become_those_of_json_schema(written, expected):
    parameters = as_tool({"name": "f", "parameters": {"x": {"type": written}}}, "row")["function"]["parameters"]
    assert parameters["properties"] == {"x": expected}
    assert parameters["required"] == ([] if "ptional" in written else ["x"])


def test_descriptions_that_are_schemas_stay_as_they_are():
    schema = {"type": "object", "properties": {"x": {"type": "string", "enum": ["a"]}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert as_tool(tool, "row") == tool
    assert as_tool(tool["function"], "row") == tool
    assert as_tool({"name": "f"}, "row")["function"]["parameters"] == {
        "type": "object",
        "properties": {},
        "required": [],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "[{"}, "line 1: the text in `answers` is not valid JSON"),
        ({"answers": "[]"}, "line 1: `answers` holds no call, so there is nothing to learn. Remove the row."),
        ({"answers": "7"}, "line 1: `answers` is a number, but it must be a list, or the JSON text of one."),
        ({"answers": [{"arguments": {}}]}, 'line 1: a call must look like {"name": "…", "arguments": {…}}'),
        ({"answers": [{"name": "f", "arguments": "x"}]}, "line 1: the arguments of the call of `f` are not valid JSON"),
        ({"answers": [{"name": "f", "arguments": [1]}]}, "line 1: the arguments of the call of `f` are a list"),
        ({"tools": [{"description": "?"}]}, 'line 1: a tool must look like {"name": "…", "parameters": {…}}'),
        ({"tools": [{"name": "f", "parameters": [1]}]}, "line 1: the parameters of the tool `f` are a list"),
        ({"query": ""}, "line 1: `query` must be text, and not empty."),
    ],
)
def test_xlam_rows_with_mistakes(tmp_path, write_jsonl, change, message):
    path = str(write_jsonl(tmp_path / "train.jsonl", [{**XLAM, **change}]))
    with pytest.raises(UserError) as caught:
        make_xlam_dataset(make_tokenizer(HERMES), dataset_name=path)[0]
    assert message in str(caught.value)


def test_templates_that_cannot_do_it(tmp_path, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", [XLAM]))
    plain = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There.", "tool_calls": []}]
    with pytest.raises(UserError, match="make_xlam_dataset needs a chat template that writes tools and calls"):
        make_xlam_dataset(make_tokenizer(), dataset_name=path)
    chats = write_jsonl(tmp_path / "chat.jsonl", [{"messages": plain}, {"messages": TRACE[1:4]}])
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    chat, agent = ChatDataset(str(chats), tokenizer), make_agent_chat_dataset(tokenizer, path=str(chats))
    assert learned_texts(tokenizer, chat[0]) == learned_texts(tokenizer, agent[0]) == ["There.<|im_end|>"]
    xlam = make_xlam_dataset(tokenizer, dataset_name=path)
    for dataset, place in ((xlam, "train.jsonl line 1"), (chat, "chat.jsonl line 2"), (agent, "chat.jsonl line 2")):
        with pytest.raises(UserError, match=f"{place} has tool calls, but the chat template does not write them"):
            dataset[len(dataset) - 1]


# --- conversations with tools ----------------------------------------------------------------------------------------

TRACE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the tower?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "look it up",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "find", "arguments": '{"name": "tower"}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "Paris"},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "content": "And the dog?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "b", "type": "function", "function": {"name": "find", "arguments": {"name": "dog"}}}],
    },
    {"role": "tool", "tool_call_id": "b", "content": "Rome"},
    {"role": "assistant", "content": "In Rome.", "reasoning_content": "it says so"},
]
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Where is the tower?"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"name": "tower"}}'},
        {"from": "observation", "value": "Paris"},
        {"from": "gpt", "value": "In Paris."},
        {"from": "human", "value": "And the dog?"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"name": "dog"}}'},
        {"from": "observation", "value": "Rome"},
        {"from": "gpt", "value": "In Rome."},
    ],
    "tools": '[{"name": "find", "description": "Find a place.", "parameters": {}}]',
}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find a place.", "parameters": {}}}]
SECOND_CALL = {name: call.replace("tower", "dog") for name, call in CALL.items()}


def expected_turns(family: str) -> list[str]:
    return [CALL[family], "In Paris.<|im_end|>", SECOND_CALL[family], "In Rome.<|im_end|>"]


def test_several_calls_of_one_turn_in_sharegpt(tmp_path, write_jsonl):
    calls = [{"name": "find", "arguments": {"name": city}} for city in ("Rome", "Oslo")]
    turns = [{"from": "human", "value": "Where?"}, {"from": "function_call", "value": json.dumps(calls)}]
    tokenizer = make_tokenizer(HERMES)
    dataset = ChatDataset(str(write_jsonl(tmp_path / "train.jsonl", [{"conversations": turns}])), tokenizer)
    assert learned_texts(tokenizer, dataset[0]) == [
        '<tool_call>\n{"name": "find", "arguments": {"name": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {"name": "Oslo"}}\n</tool_call><|im_end|>'
    ]
    turns[1]["value"] = json.dumps([{"arguments": {}}])
    dataset = ChatDataset(str(write_jsonl(tmp_path / "train.jsonl", [{"conversations": turns}])), tokenizer)
    with pytest.raises(UserError, match=r"train.jsonl line 1: message 2: a call must look like"):
        dataset[0]


@pytest.mark.parametrize("form", ["openai", "sharegpt"])
@pytest.mark.parametrize("name", ["hermes", "llama3"])
def test_calls_and_answers_are_learned_and_results_are_not(tmp_path, write_jsonl, name, form):
    plain = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in TRACE]
    row = SHAREGPT if form == "sharegpt" else {"messages": plain, "tools": TOOLS}
    tokenizer = make_tokenizer(TOOL_TEMPLATES[name])
    path = str(write_jsonl(tmp_path / "train.jsonl", [row]))
    for dataset in (ChatDataset(path, tokenizer), make_agent_chat_dataset(tokenizer, path=path)):
        assert learned_texts(tokenizer, dataset[0]) == expected_turns(name)
        text = text_of(tokenizer, dataset[0])
        assert "Find a place." in text
        assert "Be brief." in text
        assert ("<tool_response>\nParis" if name == "hermes" else '"Paris"') in text


def test_qwen3_learns_what_serving_would_show(tmp_path, write_jsonl):
    """Its template rewrites the turns before the last question, so only what follows that is as it was served."""
    tokenizer = make_tokenizer(QWEN3)
    path = str(write_jsonl(tmp_path / "train.jsonl", [{"messages": TRACE, "tools": TOOLS}]))
    dataset = make_agent_chat_dataset(tokenizer, path=path)
    learned = learned_texts(tokenizer, dataset[0])
    assert learned[-1] == "<think>\nit says so\n</think>\n\nIn Rome.<|im_end|>"
    assert SECOND_CALL["qwen3"] in learned
    assert "look it up" not in text_of(tokenizer, dataset[0])
    masked = make_agent_chat_dataset(tokenizer, path=path, mask_reasoning_content=True)
    joined = "".join(learned_texts(tokenizer, masked[0]))
    assert joined.endswith("<think>\n\n</think>\n\nIn Rome.<|im_end|>")


# --- the keys of agent traces ----------------------------------------------------------------------------------------


@pytest.fixture
def agent(tmp_path, write_jsonl):
    """Return a function that writes conversations and builds the set: (tokenizer, dataset)."""

    def build(*conversations, template=HERMES, **options):
        tokenizer = make_tokenizer(template)
        rows = [{"messages": messages} for messages in conversations]
        path = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
        return tokenizer, make_agent_chat_dataset(tokenizer, path=str(path), **options)

    return build


def test_the_last_turn_is_everything_after_the_last_question(agent):
    tokenizer, dataset = agent(TRACE, train_on_last_turn_only=True)
    assert learned_texts(tokenizer, dataset[0]) == expected_turns("hermes")[2:]


def test_an_incomplete_end_is_cut_off(agent):
    whole, without_end = TRACE[:5], TRACE[:5] + TRACE[5:6]
    tokenizer, dataset = agent(whole, without_end, trim_incomplete_last_turn=True)
    assert dataset[0] == dataset[1]
    tokenizer, dataset = agent(without_end)
    assert text_of(tokenizer, dataset[0]).count("And the dog?") == 1
    tokenizer, dataset = agent(TRACE[:8], trim_incomplete_last_turn=True)
    assert learned_texts(tokenizer, dataset[0]) == expected_turns("hermes")[:3], "a call is something to learn"


def test_reasoning_of_the_history_is_dropped(agent):
    spoken = [{**message, "content": "<think>\nhm\n</think>\n\n" + message["content"]} if message["role"] == "assistant"
              else message for message in TRACE]  # fmt: skip
    tokenizer, dataset = agent(spoken, drop_history_reasoning_content=True)
    learned = learned_texts(tokenizer, dataset[0])
    assert ["<think>" in text for text in learned] == [False, False, True, True]
    assert learned[1] == "In Paris.<|im_end|>"


def test_filters(agent, caplog):
    caplog.set_level(logging.INFO)
    silent = TRACE[:2]
    _, dataset = agent(TRACE, silent, TRACE[:5], silent, filter_no_assistant=True)
    assert len(dataset) == 2
    assert dataset.rows.where(1).endswith("train.jsonl line 3"), "messages still name the row's own line"
    assert (
        "The filters left out 2 of 4 rows, which are without a message of the assistant's."
        in caplog.messages
    )  # fmt: skip
    with pytest.raises(UserError, match="has no assistant turn"):
        agent(TRACE, silent)[1][1]
    _, everything = agent(TRACE, TRACE[:5], TRACE[:3])
    lengths = [len(everything[i]["input_ids"]) for i in range(3)]
    _, dataset = agent(TRACE, TRACE[:5], TRACE[:3], filter_overlong=True, seq_length=lengths[1])
    assert [len(dataset[i]["input_ids"]) for i in range(len(dataset))] == lengths[1:]
    _, dataset = agent(TRACE, silent, TRACE[:3], filter_overlong=True, filter_no_assistant=True, seq_length=lengths[1])
    assert len(dataset) == 1
    with pytest.raises(UserError, match=r"All 1 rows are longer than `dataset.seq_length: 20`, so nothing is left."):
        agent(TRACE, filter_overlong=True, seq_length=20)


def test_the_oldest_turns_go_first(agent):
    def question(number: int) -> list[dict]:
        return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]

    turns = [TRACE[0], *(message for number in range(6) for message in question(number))]
    tokenizer, whole = agent(turns)
    lengths = {}
    for kept in range(1, 7):
        _, part = agent([turns[0], *turns[13 - 2 * kept :]])
        lengths[kept] = len(part[0]["input_ids"])
    assert lengths[6] == len(whole[0]["input_ids"])
    for seq_length in range(lengths[1] - 5, lengths[6] + 3):
        fitting = max([kept for kept, length in lengths.items() if length <= seq_length], default=1)
        _, dataset = agent(turns, truncate_history=True, seq_length=seq_length)
        learned = learned_texts(tokenizer, dataset[0])
        assert learned == [f"answer {number}<|im_end|>" for number in range(6 - fitting, 6)]
        assert "Be brief." in text_of(tokenizer, dataset[0])


def test_what_the_history_keys_need(agent, tmp_path, write_jsonl):
    for key in ("filter_overlong", "truncate_history"):
        with pytest.raises(UserError, match=f"`dataset.{key}: true` needs a length. Set `dataset.seq_length`."):
            agent(TRACE, **{key: True})
    path = str(write_jsonl(tmp_path / "train.jsonl", [{"messages": TRACE}]))
    tokenizer = make_tokenizer(HERMES)
    for options, what in (({}, "neither"), ({"path": path, "dataset_name": path}, "both")):
        with pytest.raises(UserError, match=f"takes either `dataset_name` or `path`, but {what} is set"):
            make_agent_chat_dataset(tokenizer, **options)
    assert len(make_agent_chat_dataset(tokenizer, dataset_name=path)) == 1
    with pytest.raises(UserError, match=r"`./no-such-directory` does not exist"):
        make_agent_chat_dataset(tokenizer, path="no-such-directory")
    with pytest.raises(UserError, match=r"`revision: main` is for Hub data sets, but `.*train.jsonl` is a path"):
        make_agent_chat_dataset(tokenizer, path=path, revision="main")
    with pytest.raises(UserError, match="make_agent_chat_dataset needs a chat template"):
        make_agent_chat_dataset(make_tokenizer(), path=path)


def test_both_are_targets_of_a_file(tmp_path: Path, write_jsonl):
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.dataset_rules import check_dataset

    path = str(write_jsonl(tmp_path / "train.jsonl", [{"messages": TRACE}]))
    section = ConfigNode(
        {"_target_": "nemo_automodel.components.datasets.llm.agent_chat.make_agent_chat_dataset", "path": path},
        "dataset",
    )
    check_dataset(section)
    assert len(section.instantiate(tokenizer=make_tokenizer(HERMES))) == 1
    path = str(write_jsonl(tmp_path / "xlam.jsonl", [XLAM]))
    section = ConfigNode(
        {"_target_": "nemo_automodel.components.datasets.llm.xlam.make_xlam_dataset", "dataset_name": path}, "dataset"
    )
    check_dataset(section)
    assert len(section.instantiate(tokenizer=make_tokenizer(HERMES))) == 1
