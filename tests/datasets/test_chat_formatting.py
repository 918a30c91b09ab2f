"""Which characters of a rendered conversation are learned, against expectations written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation, use_chat_template
from nemo_automodel.components.datasets.llm.formatting import Encoded
from nemo_automodel.shared.errors import UserError

BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCKS_WITHOUT_END = BLOCKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# the generation prompt is ignored, as some templates do
NO_GENERATION_PROMPT = CHAT_TEMPLATE.split("{% if add_generation_prompt")[0]
# Llama 2: no roles, a space before the answer, the end-of-sequence token ends a turn
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Qwen3: an answer gets a think block only while no user message follows it
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.get('reasoning_content', '') }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Rome"},
]


def encode(
    template: str, messages: list, tokenizer: Fast | None = None, tools: list | None = None, **options
) -> Encoded:
    encoder = ChatEncoder(tokenizer or make_tokenizer(), template, **options)
    return encoder.encode([Conversation(messages, tools)], ["row 1"])[0]


def learned_texts(encoded: Encoded, tokenizer: Fast | None = None) -> list[str]:
    return [(tokenizer or make_tokenizer()).decode(encoded.ids[start:end]) for start, end in encoded.learned]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BLOCKS, BLOCKS_WITHOUT_END, NO_GENERATION_PROMPT])
def test_all_assistant_turns_with_their_end(template: str):
    encoded = encode(template, MESSAGES)
    assert learned_texts(encoded) == ["In Paris.<|im_end|>", "Rome<|im_end|>"]
    assert make_tokenizer().decode(encoded.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nIn Paris.<|im_end|>\n<|im_start|>user\nAnd the dog?<|im_end|>\n"
        "<|im_start|>assistant\nRome<|im_end|>\n"
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BLOCKS])
def test_mask_history_keeps_the_last_turn(template: str):
    assert learned_texts(encode(template, MESSAGES, mask_history=True)) == ["Rome<|im_end|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BLOCKS])
def test_train_false_takes_a_turn_out(template: str):
    messages = [dict(message) for message in MESSAGES]
    messages[4]["train"] = False
    assert learned_texts(encode(template, messages)) == ["In Paris.<|im_end|>"]
    messages[2]["train"] = False
    with pytest.raises(UserError, match="no assistant turn is to be learned"):
        encode(template, messages)


def test_a_conversation_may_end_with_the_user():
    assert learned_texts(encode(CHAT_TEMPLATE, MESSAGES[:4])) == ["In Paris.<|im_end|>"]


def test_everything_is_learned_without_answer_only():
    encoded = encode(CHAT_TEMPLATE, MESSAGES, answer_only=False)
    assert encoded.learned == [(0, len(encoded.ids))]


def test_a_template_without_headers():
    encoded = encode(BRACKETS, MESSAGES[1:])
    # the space before the answer is part of its first token
    assert learned_texts(encoded) == [" In Paris.<|im_end|>", " Rome<|im_end|>"]


def test_bos_of_the_template_is_not_doubled_and_none_is_added(any_tokenizer: Fast):
    bos = any_tokenizer.bos_token
    with_bos = encode("{{ bos_token }}" + BRACKETS, MESSAGES[1:3], any_tokenizer)
    assert any_tokenizer.convert_ids_to_tokens(with_bos.ids[:1]) == [bos]
    assert with_bos.ids.count(any_tokenizer.bos_token_id) == 1
    assert any_tokenizer.bos_token_id not in encode(BRACKETS, MESSAGES[1:3], any_tokenizer).ids


def test_eos_is_appended_where_the_template_ends_a_turn_with_nothing():
    encoded = encode(NO_END, MESSAGES)
    assert learned_texts(encoded) == ["In Paris.\n", "Rome\n<|im_end|>"]
    assert learned_texts(encode(NO_END, MESSAGES[:4])) == ["In Paris.\n"]


def test_the_empty_think_block_is_not_learned():
    assert learned_texts(encode(THINKING, MESSAGES)) == ["In Paris.<|im_end|>", "Rome<|im_end|>"]
    assert "<think>\n\n</think>\n\nRome" in make_tokenizer().decode(encode(THINKING, MESSAGES).ids)


def test_reasoning_is_learned_unless_masked():
    messages = [MESSAGES[1], {"role": "assistant", "content": "Rome", "reasoning_content": "Old towers."}]
    assert learned_texts(encode(THINKING, messages)) == ["<think>\nOld towers.\n</think>\n\nRome<|im_end|>"]
    masked = learned_texts(encode(THINKING, messages, mask_reasoning=True))
    assert masked == ["<think>\n", "\n</think>\n\nRome<|im_end|>"]
    inline = [MESSAGES[1], {"role": "assistant", "content": "<think>Old towers.</think>Rome"}]
    assert learned_texts(encode(CHAT_TEMPLATE, inline, mask_reasoning=True)) == ["<think>", "</think>Rome<|im_end|>"]


def test_tool_calls_are_learned_and_results_are_not():
    call = {"type": "function", "function": {"name": "where", "arguments": {"of": "dog"}}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Rome"},
        {"role": "assistant", "content": "In Rome."},
    ]
    encoded = encode(TOOLS, messages, tools=[{"type": "function", "function": {"name": "where"}}])
    assert learned_texts(encoded) == [
        '<tool_call>{"name": "where", "arguments": {"of": "dog"}}</tool_call><|im_end|>',
        "In Rome.<|im_end|>",
    ]
    assert make_tokenizer().decode(encoded.ids).startswith('<|im_start|>system\n{"type": "function"')


def test_characters_of_several_tokens_are_learned_whole():
    messages = [MESSAGES[1], {"role": "assistant", "content": "日本 🙂"}]
    for template in (CHAT_TEMPLATE, BLOCKS):
        assert learned_texts(encode(template, messages)) == ["日本 🙂<|im_end|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BLOCKS])
def test_masks_agree_with_other_tokenizers(any_tokenizer: Fast, template: str):
    template = template.replace("<|im_end|>", any_tokenizer.eos_token).replace("<|im_start|>", "@")
    encoded = encode(template, MESSAGES, any_tokenizer)
    assert len(encoded.learned) == 2
    for (start, end), answer in zip(encoded.learned, ("In Paris.", "Rome"), strict=True):
        assert encoded.ids[end - 1] == any_tokenizer.eos_token_id
        given = any_tokenizer(answer, add_special_tokens=False)["input_ids"]
        # at the start of a line there is no prefix space, so compare what is spelled
        spell = lambda ids: any_tokenizer.decode(ids).lower().replace(" ", "").replace("##", "")  # noqa: E731
        assert spell(encoded.ids[start : end - 1]) == spell(given)


def test_a_token_that_straddles_the_end_of_a_block_is_learned():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        "{% else %}{% generation %}{{ m['content'] }}{% endgeneration %}is. Bye{% endif %}{% endfor %}"
    )
    messages = [MESSAGES[1], {"role": "assistant", "content": " In Par"}]
    assert learned_texts(encode(template, messages)) == [" In Paris"], "` Paris` is one token"


def test_rows_in_a_batch_do_not_mix():
    encoder = ChatEncoder(make_tokenizer(), CHAT_TEMPLATE)
    items = [Conversation(MESSAGES), Conversation(MESSAGES[1:3]), Conversation(MESSAGES[:4])]
    assert encoder.encode(items, ["a", "b", "c"]) == [encoder.encode([item], ["x"])[0] for item in items]


def test_a_template_that_rewrites_what_came_before_is_refused():
    counting = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(
        UserError, match="row 1: the chat template writes the 2 messages before assistant turn 1 differ"
    ):
        encode(counting, MESSAGES)


def test_a_turn_that_is_written_differently_later_is_context(caplog: pytest.LogCaptureFixture):
    template = NO_END.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}!{% endif %}"
    )
    encoder = ChatEncoder(make_tokenizer(), template)
    encoded = encoder.encode([Conversation(MESSAGES)], ["row 1"])[0]
    assert learned_texts(encoded) == ["Rome!<|im_end|>"], "`In Paris.` lacks the `!` that a server would wait for"
    assert encoder.num_context_turns == 1
    assert (
        "row 1: the chat template writes assistant turn 1 differently once the conversation goes on, so the model "
        "would never have to write it that way. It is context there, not learned (1 such turns so far)." in caplog.text
    )


def test_a_turn_whose_reasoning_is_taken_out_later_is_context():
    messages = [dict(message) for message in MESSAGES]
    messages[2]["reasoning_content"] = "Towers stand in Paris."
    messages[4]["reasoning_content"] = "Dogs live in Rome."
    text = make_tokenizer().decode(encode(THINKING, messages).ids)
    assert "assistant\nIn Paris.<|im_end|>" in text, "the template takes the reasoning of the first turn out"
    expected = ["<think>\nDogs live in Rome.\n</think>\n\nRome<|im_end|>"]
    assert learned_texts(encode(THINKING, messages)) == expected
    # a row that ends before the second question shows the first turn as the model writes it
    expected = ["<think>\nTowers stand in Paris.\n</think>\n\nIn Paris.<|im_end|>"]
    assert learned_texts(encode(THINKING, messages[:3])) == expected


def test_turns_whose_question_is_written_differently_later_are_context():
    # Mistral's: the tools stand before the last question only
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
        "[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert learned_texts(encode(template, MESSAGES[1:])) == ["In Paris.<|im_end|>", "Rome<|im_end|>"]
    assert learned_texts(encode(template, MESSAGES[1:], tools=[{"name": "where"}])) == ["Rome<|im_end|>"]


def test_a_role_header_inside_a_block_is_not_learned():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert learned_texts(encode(template, MESSAGES)) == ["In Paris.<|im_end|>", "Rome<|im_end|>"]


def test_blocks_of_a_template_that_rewrites_are_refused():
    with pytest.raises(
        UserError, match="row 1: the chat template writes the 2 messages before assistant turn 1 differ"
    ):
        encode("{{ messages | length }}" + BLOCKS, MESSAGES)


def test_conversations_that_teach_nothing_are_refused():
    with pytest.raises(UserError, match="row 1: the conversation has no assistant turn"):
        encode(CHAT_TEMPLATE, MESSAGES[:2])
    with pytest.raises(UserError, match="mark 0 parts, but the conversation has 1 assistant turns"):
        encode(BLOCKS.replace("== 'assistant'", "== 'model'"), MESSAGES[1:3])


def test_what_the_template_says_reaches_the_user():
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Begin with a user.') }}{% endif %}" + BRACKETS
    with pytest.raises(UserError, match=r"row 1: the chat template refuses the conversation: Begin with a user\."):
        encode(template, MESSAGES)
    with pytest.raises(UserError, match=r"^The chat template is not valid Jinja: .*\(line 1\). Correct the template"):
        encode("{% for m in messages %}", MESSAGES)


def test_templates_from_text_and_files(tmp_path: Path, tokenizer: Fast):
    assert use_chat_template(tokenizer, None) is None
    (tmp_path / "t.jinja").write_text(BRACKETS)
    (tmp_path / "t.json").write_text(json.dumps({"chat_template": BRACKETS}))
    for given in (BRACKETS, str(tmp_path / "t.jinja"), str(tmp_path / "t.json")):
        tokenizer.chat_template = None
        assert use_chat_template(tokenizer, given) == BRACKETS
        assert tokenizer.chat_template == BRACKETS, "the checkpoint must hold the template that was trained"
    assert use_chat_template(tokenizer, None) == BRACKETS
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds no chat template"):
        use_chat_template(tokenizer, str(tmp_path / "other.json"))
    with pytest.raises(UserError, match=r"`dataset.chat_template: missing.jinja` cannot be read: No such file"):
        use_chat_template(tokenizer, "missing.jinja")


# --- habits of real templates, written here anew ----------------------------------------------------------------------

HEADER = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# the first Llama 3: the header of another answer, asked for or not
ALWAYS_ASKS = HEADER + "{{ '<|im_start|>assistant\n' }}"
# Phi 3.5: an end of sequence where no answer is asked for
ENDS_TWICE = HEADER + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
# gpt-oss: the last answer ends with another token than those before it
LAST_END = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma 4, DeepSeek 3.2: an answer is asked for after an empty thought, which given answers lack
EMPTY_THOUGHT = HEADER + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n</think>\n{% endif %}"
# DeepSeek R1: an answer is asked for after the beginning of a thought, which given answers lack
OPEN_THOUGHT = HEADER + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
# Command R7B: two tokens end a turn, and the first of them is no end of turn elsewhere
TWO_ENDS = HEADER.replace("<|im_end|>", "<|pad|><|im_end|>") + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# gpt-oss: the model says in which channel it speaks
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|pad|>final{% endif %}"
    "{{ '\n' }}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# Command R7B: the empty thought of another answer, asked for or not
ALWAYS_ASKS_WITH_THOUGHT = HEADER + "{{ '<|im_start|>assistant\n<think></think>' }}"
FIRST_CALL_ONLY = TOOLS.replace("m.get('tool_calls', [])", "m.get('tool_calls', [])[:1]")


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (ALWAYS_ASKS, ["In Paris.<|im_end|>", "Rome<|im_end|>"]),
        (ENDS_TWICE, ["In Paris.<|im_end|>", "Rome<|im_end|>"]),
        (LAST_END, ["Rome<|endoftext|>"]),
        (EMPTY_THOUGHT, ["Rome<|im_end|>"]),
        (TWO_ENDS, ["In Paris.<|pad|><|im_end|>", "Rome<|pad|><|im_end|>"]),
        (CHANNELS, ["<|pad|>final\nIn Paris.<|im_end|>", "<|pad|>final\nRome<|im_end|>"]),
        (ALWAYS_ASKS_WITH_THOUGHT, ["Rome<|im_end|>"]),
    ],
    ids=[
        "always asks",
        "ends twice",
        "another last end",
        "empty thought",
        "two ends",
        "channels",
        "always with thought",
    ],
)
def test_habits(template: str, learned: list[str]):
    assert learned_texts(encode(template, MESSAGES)) == learned
    # the row is what a server would send before the last answer, and that answer
    tokenizer = make_tokenizer()
    asked = tokenizer.apply_chat_template(
        MESSAGES[:4], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encode(template, MESSAGES).ids).startswith(f"{asked}{learned[-1]}")


def test_blocks_move_with_an_empty_thought_that_is_put_in():
    template = BLOCKS.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>",
    )
    encoded = encode(template, MESSAGES)
    assert learned_texts(encoded) == ["Rome<|im_end|>"]
    assert make_tokenizer().decode(encoded.ids).endswith("<|im_start|>assistant\n<think></think>Rome<|im_end|>\n")


def test_an_empty_thought_does_not_come_before_a_real_one():
    thinking = [MESSAGES[1], {"role": "assistant", "content": "<think>\nOld towers.\n</think>\nIn Paris."}]
    with pytest.raises(UserError, match="row 1: a server asks for assistant turn 1 with"):
        encode(EMPTY_THOUGHT, thinking)


def test_a_thought_that_a_server_opens_and_the_row_lacks_is_refused():
    message = (
        "row 1: a server asks for assistant turn 1 with '<|im_start|>assistant\\n<think>\\n', but the chat template "
        "goes on with '<|im_start|>assistant\\nIn Paris…' in this row, so serving would not show what was trained. "
        "Give the turn the `reasoning_content` that belongs there, or name a template that asks for answers as it "
        "writes them (`dataset.chat_template`), such as the model's own after `{% set enable_thinking = false %}` if "
        "it knows that switch."
    )
    with pytest.raises(UserError) as caught:
        encode(OPEN_THOUGHT, MESSAGES)
    assert str(caught.value) == message
    thinking = [MESSAGES[1], {"role": "assistant", "content": "<think>\nOld towers.\n</think>In Paris."}]
    assert learned_texts(encode(OPEN_THOUGHT, thinking)) == ["Old towers.\n</think>In Paris.<|im_end|>"]


def test_calls_that_a_template_leaves_out_are_refused():
    calls = [{"type": "function", "function": {"name": "where", "arguments": {"of": it}}} for it in ("dog", "fox")]
    messages = [MESSAGES[1], {"role": "assistant", "content": "", "tool_calls": calls}]
    assert "fox" in learned_texts(encode(TOOLS, messages))[0]
    with pytest.raises(UserError) as caught:
        encode(FIRST_CALL_ONLY, messages)
    assert str(caught.value) == (
        "row 1: the chat template writes 1 of the 2 calls of the tool `where` in one turn. Use a template that writes "
        "them all, or leave such rows out."
    )


def test_reasoning_that_a_template_leaves_out_is_told(caplog: pytest.LogCaptureFixture):
    messages = [MESSAGES[1], {"role": "assistant", "content": "In Paris.", "reasoning_content": "Old towers."}]
    assert learned_texts(encode(CHAT_TEMPLATE, messages)) == ["In Paris.<|im_end|>"]
    assert caplog.messages == [
        "row 1: the chat template does not write `reasoning_content`, so it is not learned (1 such turns so far). Use "
        "a template that does, or write it into `content`."
    ]
