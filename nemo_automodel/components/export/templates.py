"""Whether two tokenizers cut and render the same: what a served model sees must be what the trained one saw.

A template is code, so it is compared by what it writes: conversations with and without a system message, of one turn
and of several, with the start of an answer and without. A template that refuses a conversation must refuse it on both
sides.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.export.certificate import Check

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 7 × 8?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Who wrote it,\nand when?"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "  What's new?  "},
    ],
    [
        {"role": "system", "content": "You are a guide."},
        {"role": "user", "content": "Where is the tower?"},
        {"role": "assistant", "content": "In Paris."},
        {"role": "user", "content": "Since when?"},
        {"role": "assistant", "content": "Since 1889."},
    ],
)
PLAIN = ("The year 1889, in Paris.", "  two  spaces\n\tand a tab", "naïve café – 東京 🙂", "x = f(y)[0] + 12345")


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | None:
    """Return the conversation as the model sees it, with the start of an answer unless it ends in one.

    None where the template refuses it.
    """
    starts_answer = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=starts_answer)
    except jinja2.TemplateError:
        return None
    assert isinstance(text, str)
    return _without_time(text)


def _without_time(text: str) -> str:
    """Take out the time of day, which some templates write and which differs between two calls."""
    return re.sub(r"\d\d:\d\d(:\d\d)?", "", text)


def compare_tokenizers(trained: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase, name: str) -> list[Check]:
    """Return the checks that text becomes the same tokens, and conversations the same text."""
    checks = []
    different = [text for text in PLAIN if _ids(trained, text) != _ids(exported, text)]
    renders = [] if trained.chat_template is None else [render(trained, c) for c in CONVERSATIONS]
    different += [text for text in renders if text is not None and _ids(trained, text) != _ids(exported, text)]
    checks.append(
        Check(
            f"{name} tokens",
            not different,
            f"{name} cuts text into the same tokens"
            if not different
            else f"{name} cuts {different[0]!r} into other tokens than the trained model's tokenizer",
        )
    )
    checks.append(_compare_templates(trained, exported, renders, name))
    return checks


def _compare_templates(trained: Any, exported: Any, renders: list[str | None], name: str) -> Check:
    if (trained.chat_template is None) != (exported.chat_template is None):
        side = "has a chat template and the trained model has none" if trained.chat_template is None else "has none"
        return Check(f"{name} template", False, f"the chat template differs: {name} {side}")
    if trained.chat_template is None:
        return Check(f"{name} template", True, "no chat template on either side")
    for messages, expected in zip(CONVERSATIONS, renders, strict=True):
        if render(exported, messages) != expected:
            roles = ", ".join(message["role"] for message in messages)
            return Check(f"{name} template", False, f"the chat template of {name} writes ({roles}) differently")
    return Check(f"{name} template", True, f"{name} writes conversations the same way")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids
