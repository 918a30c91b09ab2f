"""Chat with a model, a checkpoint or an adapter in the terminal.

Every answer sees the whole conversation, rendered by the tokenizer's own chat template. A base model has no template:
the conversation is then plain text that the model continues. Ctrl-C stops an answer, or leaves when nothing is running.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field

from nemo_automodel.cli.generate import add_model_arguments, answer, check_sampling, load

HELP = "/reset forgets the conversation, /history shows it, /exit leaves."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel chat``."""
    add_model_arguments(parser, temperature=0.7)


@dataclass
class Conversation:
    """What was said so far, as the model is to see it."""

    has_template: bool
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    """Messages ``{"role": "user" | "assistant", "content": text}`` in order."""

    def say(self, role: str, content: str) -> None:
        """Add a turn."""
        self.turns.append({"role": role, "content": content})

    def prompt(self) -> str | list[dict[str, str]]:
        """Return the messages, or for a tokenizer without a template their texts, one a line."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns]
        return messages if self.has_template else "\n".join(message["content"] for message in messages) + "\n"


def run(args: argparse.Namespace) -> int:
    """Answer line after line until the end of the input."""
    check_sampling(args)
    with contextlib.suppress(ImportError):  # not on every system; brings line editing and recall to input()
        import readline  # noqa: F401
    model, tokenizer = load(args)
    conversation = Conversation(tokenizer.chat_template is not None, args.system)
    if not conversation.has_template:
        print(f"`{args.model}` has no chat template (a base model?): it continues the plain text.", file=sys.stderr)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if line == "/exit":
            return 0
        if line.startswith("/"):
            _command(line, conversation)
        elif line:
            conversation.say("user", line)
            try:
                conversation.say("assistant", answer(model, tokenizer, conversation.prompt(), args))
            except KeyboardInterrupt:
                conversation.turns.pop()
                print("(stopped; your last line is forgotten)", file=sys.stderr)


def _command(line: str, conversation: Conversation) -> None:
    if line == "/reset":
        conversation.turns.clear()
        print("(the conversation is forgotten)", file=sys.stderr)
    elif line == "/history":
        for turn in conversation.turns:
            print(f"{turn['role']}: {turn['content']}")
    else:
        print(f"`{line}` is no command. {HELP}", file=sys.stderr)
