"""A Modelfile for Ollama, whose template writes what the chat template writes.

Ollama's templates are Go's and chat templates are Jinja's, and there is no translation in general. But most chat
templates only put text before and after the content of each message. What they put there is found out by rendering
conversations with marks for contents; the Go template made of these pieces is then compared with the chat template on
other conversations. A template that does more is refused: Ollama would guess one, which is worse than saying so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.export.templates import CONVERSATIONS, render

_MARKS = {"system": "SYSTEMMARK", "user": "FIRSTMARK", "assistant": "ANSWERMARK", "again": "SECONDMARK"}


@dataclass(frozen=True)
class TemplatePieces:
    """What a chat template writes around contents."""

    start: str
    """Before everything, where there is no system message."""
    system: tuple[str, str] | None
    """Before (from the very start) and after a system message; None: the template has no place for one."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """Starts the answer."""

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """Return what the Go template writes, with the start of an answer; None where it cannot."""
        has_system = any(message["role"] == "system" for message in messages)
        if has_system and self.system is None:
            return None
        text = "" if has_system else self.start
        for message in messages:
            pieces = {"system": self.system, "user": self.user, "assistant": self.assistant}[message["role"]]
            assert pieces is not None
            text += pieces[0] + message["content"] + pieces[1]
        return text + self.answer


def take_apart(tokenizer: PreTrainedTokenizerBase) -> TemplatePieces | None:
    """Return the pieces of a chat template, None where it does more than put them around contents."""
    user, answer = {"role": "user", "content": _MARKS["user"]}, {"role": "assistant", "content": _MARKS["assistant"]}
    again, system = {"role": "user", "content": _MARKS["again"]}, {"role": "system", "content": _MARKS["system"]}

    def write(*messages: dict[str, str], starts_answer: bool = False) -> str:
        text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=starts_answer)
        return str(text)

    try:
        first, open_first = write(user), write(user, starts_answer=True)
        second, third = write(user, answer), write(user, answer, again)
    except jinja2.TemplateError:
        return None
    if not (open_first.startswith(first) and second.startswith(first) and third.startswith(second)):
        return None
    try:
        assistant = _around(second[len(first) :], "assistant")
        around_user = _around(third[len(second) :], "again")
        head, _ = _around(first, "user")
    except ValueError:
        return None
    if not head.endswith(around_user[0]):
        return None
    pieces = TemplatePieces(
        start=head[: len(head) - len(around_user[0])],
        system=None,
        user=around_user,
        assistant=assistant,
        answer=open_first[len(first) :],
    )
    try:
        with_system = write(system, user)
        before, rest = _around(with_system, "system")
        after = rest.removesuffix(around_user[0] + _MARKS["user"] + around_user[1])
        if after != rest:
            return TemplatePieces(pieces.start, (before, after), pieces.user, pieces.assistant, pieces.answer)
    except (jinja2.TemplateError, ValueError):
        pass  # no place for a system message
    return pieces


def _around(text: str, mark: str) -> tuple[str, str]:
    before, after = text.split(_MARKS[mark])
    return before, after


def differences(tokenizer: PreTrainedTokenizerBase, pieces: TemplatePieces) -> list[str]:
    """Return in words where the Go template writes something else than the chat template; empty: nowhere.

    Conversations that end with an answer are left out: Ollama lets the model go on with it.
    """
    found = []
    for messages in CONVERSATIONS:
        asked = [*messages, {"role": "user", "content": "Why?"}] if messages[-1]["role"] == "assistant" else messages
        expected, made = render(tokenizer, asked), pieces.render(asked)
        if expected == made or (expected is None and made is None):
            continue
        stripped = [{**message, "content": message["content"].strip()} for message in asked]
        if render(tokenizer, stripped) == pieces.render(stripped):
            found.append("spaces around a message stay, which the chat template takes away")
        elif made is None or expected is None:
            found.append("system messages are not possible")
        else:
            found.append(f"({', '.join(message['role'] for message in asked)}) is written differently")
    return list(dict.fromkeys(found))


def go_template(pieces: TemplatePieces, bos: str | None) -> str:
    """Return Ollama's template; ``bos`` is taken off the start where the GGUF file has the server add it."""

    def write(text: str) -> str:
        return f"{{{{ {_quoted(text)} }}}}" if text else ""

    def strip(text: str) -> str:
        return text.removeprefix(bos) if bos else text

    lines = [
        f"{{{{- if not .System }}}}{write(strip(pieces.start))}{{{{ end }}}}",
        "{{- range $i, $message := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
    ]
    word = "if"
    if pieces.system is not None:
        before, after = pieces.system
        lines.append(f'{{{{- if eq .Role "system" }}}}{write(strip(before))}{{{{ .Content }}}}{write(after)}')
        word = "else if"
    lines += [
        f'{{{{- {word} eq .Role "user" }}}}{write(pieces.user[0])}{{{{ .Content }}}}{write(pieces.user[1])}',
        f'{{{{- else if eq .Role "assistant" }}}}{write(pieces.assistant[0])}{{{{ .Content }}}}',
        f"{{{{- if not $last }}}}{write(pieces.assistant[1])}{{{{ end }}}}",
        "{{- end }}",
        f'{{{{- if and $last (ne .Role "assistant") }}}}{write(pieces.answer)}{{{{ end }}}}',
        "{{- end }}",
    ]
    return "".join(lines)


def _quoted(text: str) -> str:
    """Return a Go string; Go knows JSON's escapes, except those of halves of characters."""
    return json.dumps(text, ensure_ascii=False)


def modelfile(gguf_file: str, template: str | None, stops: list[str]) -> str:
    """Return the Modelfile."""
    lines = [f"FROM ./{gguf_file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"
