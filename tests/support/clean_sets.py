"""Data sets without a fault, one for every shape that real ones have, with what each row must teach.

The label gate must let all of them pass, with any tokenizer; ``benchmarks/clean_sets.py`` shows that with real ones.
What must be learned is written by hand as pieces of text, so the oracle knows nothing of templates or offsets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For tokenizers that bring no template of their own."""


@dataclass(frozen=True)
class CleanSet:
    """Rows, how they are loaded, and the pieces of text that each row must teach, in order."""

    kind: str
    """``chat``, ``table``, ``squad`` or ``hellaswag``."""
    rows: list[dict[str, Any]]
    learned: list[list[str]]
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    """What the chat template must be able to write: ``tools`` or ``reasoning``."""


def say(*turns: str, system: str | None = None) -> dict[str, Any]:
    """Return a conversation of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for number, text in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return {"messages": messages}


def chat(*conversations: tuple[str, ...], system: str | None = None, **more: Any) -> CleanSet:
    """Return a set of conversations whose every assistant turn must be learned."""
    rows = [say(*turns, system=system) for turns in conversations]
    return CleanSet("chat", rows, [[text.strip() for text in turns[1::2]] for turns in conversations], **more)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Look up the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
]


def call(city: str, number: int = 1) -> dict[str, Any]:
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
    }


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"call0000{number}", "content": text}


def ask(city: str) -> dict[str, Any]:
    return {"role": "user", "content": f"What is the weather in {city}?"}


def calls(*cities: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(c, n) for n, c in enumerate(cities, start=1)]}


def answer(text: str, reasoning: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


STORY = " ".join(f"In year {year} the river rose {year % 7} feet and the town moved its market." for year in range(400))

SETS: dict[str, CleanSet] = {
    "single turn": chat(
        ("Where is the tower?", "The tower is in Paris."), ("Who wrote it?", "It was written by Ada Lovelace.")
    ),
    "multi turn": chat(
        ("Hello!", "Hello. What can I do?", "Name a river.", "The Loire.", "Another one.", "The Rhone."),
        ("One?", "Two.", "Three?", "Four."),
    ),
    "system prompt": chat(
        ("May I borrow films?", "Up to four, one week each."), system="You answer for the town library. Be brief."
    ),
    "tools": CleanSet(
        "chat",
        [
            {
                "messages": [ask(city), calls(city), result('{"sky": "rain"}'), answer(f"It rains in {city}.")],
                "tools": TOOLS,
            }
            for city in ("Oslo", "Lima")
        ],
        [["get_weather", "Oslo", "It rains in Oslo."], ["get_weather", "Lima", "It rains in Lima."]],
        needs="tools",
    ),
    "a call at the end": CleanSet(
        "chat",
        [{"messages": [ask("Quito"), calls("Quito")], "tools": json.dumps(TOOLS)}],
        [["get_weather", "Quito"]],
        needs="tools",
    ),
    "parallel calls": CleanSet(
        "chat",
        [
            {
                "messages": [
                    {"role": "user", "content": "Weather in Oslo and Lima?"},
                    calls("Oslo", "Lima"),
                    result("rain", 1),
                    result("sun", 2),
                    answer("Rain in Oslo, sun in Lima."),
                ],
                "tools": TOOLS,
            }
        ],
        [["get_weather", "Oslo", "get_weather", "Lima", "Rain in Oslo, sun in Lima."]],
        needs="parallel tools",
    ),
    "reasoning": CleanSet(
        "chat",
        [
            {"messages": [{"role": "user", "content": "What is 6 times 7?"}, answer("42", "Six sevens are 42.")]},
            {"messages": [{"role": "user", "content": "Is 9 prime?"}, answer("No.", "9 is 3 times 3.")]},
        ],
        [["Six sevens are 42.", "42"], ["9 is 3 times 3.", "No."]],
        needs="reasoning",
    ),
    "reasoning in several turns": CleanSet(
        "chat",
        [
            {
                "messages": [
                    {"role": "user", "content": "What is 6 times 7?"},
                    answer("It is 42.", "Six sevens are 42."),
                    {"role": "user", "content": "And 6 times 8?"},
                    answer("It is 48.", "Six more than 42."),
                ]
            }
        ],
        [["Six more than 42.", "It is 48."]],
        needs="reasoning",
    ),
    "think tags in the text": CleanSet(
        "chat",
        [say("Is 7 prime?", "<think>\nNothing divides it.\n</think>\n\nYes, it is.")],
        [["Yes, it is."]],
    ),
    "many scripts": chat(
        ("東京はどこ?", "東京は日本の首都です。"),
        ("Где Москва?", "Москва — столица России."),
        ("서울은?", "서울은 대한민국의 수도입니다."),
        ("Où est l'été?", "L'été est là-bas, près de Nîmes — ça va."),
    ),
    "emoji": chat(("How was it? 🙂", "Great 👍🏽 for the whole 👨‍👩‍👧‍👦, see 🇫🇷 soon!"), ("🎉", "🥳🥳")),
    "right to left": chat(
        ("אירלנד?", "דבלין היא בירת אירלנד."), ("أين القاهرة؟", "القاهرة عاصمة مصر (Cairo) منذ عام 969.")
    ),
    "code": chat(
        (
            "Write a loop.",
            "```python\ndef f(xs):\n    for x in xs:\n        if x % 2 == 0:\n            yield {'x': x}\n```",
        ),
        ("A template?", "Use {{ name }} and {% if ok %}yes{% endif %} in Jinja."),
        ("Tabs?", "a:\n\tb\t&& c || d \\\n\te"),
    ),
    "very short answers": chat(("3 + 4?", "7"), ("Is it true?", "no"), ("Which letter?", "A"), ("Which sign?", "%")),
    "long answers": chat(("Tell me everything.", STORY), ("Again.", STORY[:5000])),
    "spaces around": chat(("  Where? ", " In Paris. "), ("When?  ", "  In 1889.")),
    "line breaks around": chat(("Two lines?\n", "\nFirst.\nSecond.\n\n"), ("A list", "- one\n- two\n\n- three")),
    "ShareGPT": CleanSet(
        "chat",
        [
            {
                "id": f"talk_{i}",
                "system": "Be polite.",
                "conversations": [
                    {"from": "human", "value": f"Question {i}?"},
                    {"from": "gpt", "value": f"Answer {i}, if you please."},
                ],
            }
            for i in range(4)
        ],
        [[f"Answer {i}, if you please."] for i in range(4)],
    ),
    "text parts and nulls": CleanSet(
        "chat",
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": " it?"}],
                    },
                    {"role": "assistant", "content": "Over there.", "tool_calls": None, "name": None},
                ],
                "tools": None,
            }
        ],
        [["Over there."]],
    ),
    "text that looks special": chat(
        ("What is <b>bold</b>?", "<b>bold</b> is HTML; [INST] and ### Response: are not."),
        ("And <pad>?", "<pad> or {braces} or <|not_a_token|> are text here."),
    ),
    "mapped table": CleanSet(
        "table",
        [
            {"instruction": "Name the city.", "input": "The tower.", "output": "Paris"},
            {"instruction": "Name the dog.", "input": "", "output": " lazy"},
            {"instruction": "Count to seven.", "input": None, "output": 7},
            {"instruction": "Two lines\n", "input": "x", "output": "one\ntwo\n"},
        ],
        [["Paris"], ["lazy"], ["7"], ["one\ntwo"]],
        options={"column_mapping": {"context": "instruction", "question": "input", "answer": "output"}},
    ),
    "mapped table as a chat": CleanSet(
        "table",
        [{"q": f"Is {n} even?", "a": "yes" if n % 2 == 0 else "no"} for n in range(6)],
        [["yes" if n % 2 == 0 else "no"] for n in range(6)],
        options={"column_mapping": {"question": "q", "answer": "a"}, "use_hf_chat_template": True},
    ),
    "SQuAD": CleanSet(
        "squad",
        [
            {
                "id": str(n),
                "context": f"The tower of {place} was built in {1880 + n}.",
                "question": "Where was it built?",
                "answers": {"text": [place], "answer_start": [13]},
            }
            for n, place in enumerate(("Paris", "Rome", "東京", "St. John's"))
        ],
        [["Paris"], ["Rome"], ["東京"], ["St. John's"]],
    ),
    "HellaSwag": CleanSet(
        "hellaswag",
        [
            {
                "ctx": "A man sits down. He",
                "endings": ["flies.", "opens a book.", "is a book.", "rains."],
                "label": "1",
            },
            {"ctx": "The dog runs to", "endings": ["the lake.", "of.", "and.", "seven."], "label": 0},
        ],
        [["opens a book."], ["the lake."]],
    ),
}


def build(clean: CleanSet, path: Path, tokenizer: Any, chat_template: str | None = None) -> Any:
    """Write the rows to ``path`` as JSONL and open them with the builder of their kind."""
    from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
    from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
        ColumnMappedTextInstructionDataset,
    )
    from nemo_automodel.components.datasets.llm.hellaswag import HellaSwag
    from nemo_automodel.components.datasets.llm.squad import make_squad_dataset

    path.write_text("".join(json.dumps(row) + "\n" for row in clean.rows), encoding="utf-8")
    if clean.kind == "chat":
        return ChatDataset(str(path), tokenizer, chat_template=chat_template, **clean.options)
    if clean.kind == "table":
        return ColumnMappedTextInstructionDataset(str(path), tokenizer=tokenizer, **clean.options)
    if clean.kind == "squad":
        return make_squad_dataset(tokenizer, dataset_name=str(path))
    return HellaSwag(str(path), tokenizer)


def missing_piece(learned_text: str, pieces: list[str]) -> str | None:
    """Return the first of ``pieces`` that does not stand in ``learned_text`` after the one before it."""
    start = 0
    for piece in pieces:
        found = learned_text.find(piece, start)
        if found < 0:
            return piece
        start = found + len(piece)
    return None
