"""How a chat template writes a conversation, and where in its text the assistant's turns stand.

The template is only ever asked, by rendering: for its own ``{% generation %}`` blocks where it has them, otherwise for
each turn with and without itself; and once, on a conversation of two messages, for its habits round every answer. What
it says is held against what a server would send, and a turn for which the two differ carries the reason with it.

Stage of this module: ``Conversation`` → text and a list of ``Turn``.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_automodel.shared.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(
    r"(<think[^>]*>\s*</think[^>]*>|<\|channel>thought\s*<channel\|>|<\|START_THINKING\|>\s*<\|END_THINKING\|>)\s*$"
)
# the same where the generation prompt may have opened it
_THOUGHT_LEAD = re.compile(r"\s*(<think[^>]*>\s*)?</think[^>]*>\s*|\s*<\|channel>thought\s*<channel\|>\s*")
_ONLY_APPENDS = "Use a template that only appends, or cut the conversation there."


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools offered."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Drift(NamedTuple):
    """Why serving would not show a turn as training does, and what can be done."""

    reason: str
    remedy: str


class Turn(NamedTuple):
    """One assistant turn in the rendered text."""

    message: Message
    span: Span
    drift: Drift | None = None
    """None for a turn that can be learned."""


class _Habits(NamedTuple):
    """What a template writes round every answer."""

    lead: str
    """Between generation prompt and answer, but not learned: the rest of an empty think block, or the role header where
    the template knows no generation prompt."""
    end_of_turn: str
    """Directly after the answer, if that is a token."""
    trailer: str
    """After that, where the conversation ends."""


class TurnReader:
    """Reads the turns of conversations as one template writes them.

    ``needs_order``: which turn is which has to be known, so blocks that cannot be told apart are refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, needs_order: bool = False) -> None:
        self._tokenizer, self._template, self._needs_order = tokenizer, template, needs_order
        self.special_tokens = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)

    def read(self, item: Conversation, where: str) -> tuple[str, list[Turn]]:
        """Return the rendered conversation and its assistant turns, in order; ``where`` names it for messages.

        Raises:
            UserError: no assistant turn, or the template refuses the conversation.
        """
        text, inserted = self._as_served(item, where)
        if not any(message["role"] == "assistant" for message in item.messages):
            raise UserError(f"{where}: the conversation has no assistant turn, so there is nothing to learn.")
        if _GENERATION_BLOCK.search(self._template):
            return text, self._turns_by_blocks(text, inserted, item, where)
        return text, self._turns_by_prefixes(text, item, where)

    def _as_served(self, item: Conversation, where: str) -> tuple[str, Span]:
        """Render, and put the empty thought into the last answer that a server puts there, if the template does not.

        Gemma 4 and others ask for an answer without reasoning by an empty thought, and leave it out of answers that
        are given, also of the last one. Returns the text and where something was put in.
        """
        text = self._render(item.messages, item, where)
        untouched = (len(text), len(text))
        if self._asks_with is None or item.messages[-1]["role"] != "assistant" or len(item.messages) < 2:
            return text, untouched
        before = self._render(item.messages[:-1], item, where, for_generation=True)
        header = before.removesuffix(self._asks_with)
        opening = self._asks_with.partition(">")[0]
        if text.startswith(before) or header == before or not text.startswith(header):
            return text, untouched
        if text.startswith(opening, len(header)):
            return text, untouched  # the row brings a thought of its own
        return before + text[len(header) :], (len(header), len(before))

    @cached_property
    def _asks_with(self) -> str | None:
        """Return the empty thought at the end of the generation prompt, None where there is none."""
        item = Conversation([{"role": "user", "content": "probe"}])
        try:
            found = _EMPTY_THOUGHT.search(self._render(item.messages, item, "probe", for_generation=True))
        except UserError:
            return None  # a template for other roles: nothing to learn from this exchange
        return found.group() if found else None

    def _turns_by_blocks(self, text: str, inserted: Span, item: Conversation, where: str) -> list[Turn]:
        """Ask the template's own ``{% generation %}`` blocks, and prove what precedes them."""
        render: Any = render_jinja_template  # its annotation leaves out the second result
        rendered, blocks = render(
            [item.messages],
            tools=item.tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        at, num_inserted = inserted[0], inserted[1] - inserted[0]
        assert rendered[0] == text[:at] + text[inserted[1] :]
        numbers = [i for i, message in enumerate(item.messages) if message["role"] == "assistant"]
        blocks = [(start, end) for start, end in blocks[0] if start < end]
        blocks = [(start + num_inserted, end + num_inserted) if start >= at else (start, end) for start, end in blocks]
        if len(blocks) == len(numbers):
            return [
                self._proven_block(text, item, i, number, span, where)
                for number, (i, span) in enumerate(zip(numbers, blocks, strict=True), start=1)
            ]
        if not blocks or self._needs_order or any("train" in item.messages[i] for i in numbers):
            raise UserError(
                f"{where}: the chat template's generation blocks mark {len(blocks)} parts, but the conversation has "
                f"{len(numbers)} assistant turns. Mend the template, or use one without generation blocks."
            )
        return [Turn({}, self._tidied(text, start, end)) for start, end in blocks]

    def _proven_block(self, text: str, item: Conversation, i: int, number: int, block: Span, where: str) -> Turn:
        before = self._render(item.messages[:i], item, where, for_generation=True)
        if not text.startswith(before):
            return Turn(item.messages[i], block, self._drift_before(text, before, item, i, number))
        # a block around the role header does not make it learned: a server sends it
        return Turn(item.messages[i], self._tidied(text, max(block[0], len(before)), block[1]))

    def _turns_by_prefixes(self, text: str, item: Conversation, where: str) -> list[Turn]:
        """Render each assistant turn without and with it, and prove that both are in the whole conversation."""
        turns: list[Turn] = []
        for i, message in enumerate(item.messages):
            if message["role"] != "assistant":
                continue
            number = len(turns) + 1
            before = self._render(item.messages[:i], item, where, for_generation=True)
            if not text.startswith(before):
                turns.append(Turn(message, (0, 0), self._drift_before(text, before, item, i, number)))
                continue
            is_last = i + 1 == len(item.messages)
            after = text if is_last else self._render(item.messages[: i + 1], item, where)
            turns.append(self._compared(text, after, len(before), message, number))
        return turns

    def _drift_before(self, text: str, before: str, item: Conversation, i: int, number: int) -> Drift:
        """Say how ``before``, what a server would send for message ``i``, differs from the beginning of ``text``."""
        same = _shared_beginning(before, text)
        asked = self._render(item.messages[:i], item, "the messages before it")
        if asked and same.startswith(asked):
            asked_with = before[len(asked) :]
            found = _start_of(text[len(asked) :], len(asked_with))
            return Drift(
                f"a server asks for assistant turn {number} with {asked_with!r}, but the chat template goes on with "
                f"{found!r} in this row, so serving would not show what was trained.",
                "Give the turn the `reasoning_content` that belongs there, or name a template that asks for answers as "
                "it writes them (`dataset.chat_template`), such as the model's own after "
                "`{% set enable_thinking = false %}` if it knows that switch.",
            )
        return Drift(
            f"the chat template writes the {i} messages before assistant turn {number} differently once the "
            "conversation goes on, so serving would not show what was trained.",
            _ONLY_APPENDS,
        )

    def _compared(self, text: str, after: str, start: int, message: Message, number: int) -> Turn:
        """Return the turn that starts at ``start``, if ``text`` holds it as ``after``, where it is the last one."""
        after = after.removesuffix(self._habits.trailer)
        if text.startswith(after):
            return Turn(message, self._tidied(text, start, len(after)))
        # Qwen3 writes an empty think block into the last turn only; what follows it must still be the same
        wanted = after[slice(*self._tidied(after, start, len(after)))]
        if wanted.strip() and text.startswith(wanted, start):
            return Turn(message, self._tidied(text, start, start + len(wanted)))
        drift = Drift(
            f"the chat template writes assistant turn {number} differently once the conversation goes on, so the model "
            "would never have to write it that way.",
            _ONLY_APPENDS,
        )
        return Turn(message, (start, start), drift)

    def _tidied(self, text: str, start: int, end: int) -> Span:
        """Move a turn's start behind what the template always puts first, and its end to the end-of-turn token."""
        lead, end_of_turn, trailer = self._habits
        if trailer and text.endswith(trailer):
            end = min(end, len(text) - len(trailer))
        if lead and text.startswith(lead, start):
            start += len(lead)
        if end_of_turn and not text[start:end].rstrip().endswith(end_of_turn) and text.startswith(end_of_turn, end):
            end += len(end_of_turn)
        stripped = text[start:end].rstrip()
        if stripped.endswith(self.special_tokens):
            end = start + len(stripped)
        return start, end

    @cached_property
    def _habits(self) -> _Habits:
        """Find out on a small conversation what the template writes round every answer."""
        answer = "probe answer"
        item = Conversation([{"role": "user", "content": "probe"}, {"role": "assistant", "content": answer}])
        try:
            before = self._render(item.messages[:1], item, "probe", for_generation=True)
            text, _ = self._as_served(item, "probe")
            longer = self._render([*item.messages, {"role": "user", "content": "more"}], item, "probe")
        except UserError:
            return _Habits("", "", "")  # a template for other roles: nothing to learn from this exchange
        if answer not in text or not text.startswith(before):
            return _Habits("", "", "")
        lead, _, tail = text[len(before) :].partition(answer)
        end_of_turn = self._end_of_turn(text, tail, longer.partition(answer)[2])
        trailer = tail.removeprefix(end_of_turn) if end_of_turn else ""
        is_header = lead.strip() and before == self._render(item.messages[:1], item, "probe") and not trailer.strip()
        if not (is_header or _THOUGHT_LEAD.fullmatch(lead)):
            lead = ""  # any other mark before an answer is the model's to write
        return _Habits(lead, end_of_turn, trailer)

    def _end_of_turn(self, text: str, tail: str, longer_tail: str) -> str:
        """Return what ends an answer whether or not the conversation goes on, if that is a token.

        Some templates write more at the very end: an end of sequence, or the header of another answer. The second
        begins with the token that opens the conversation, which cannot end a turn.
        """
        shared = _shared_beginning(tail, longer_tail)
        opening = self._opening_token(text)
        if opening:
            shared = shared.partition(opening)[0]
        ends = [shared.rfind(token) + len(token) for token in self.special_tokens if token in shared]
        return shared[: max(ends)] if ends else ""

    def _opening_token(self, text: str) -> str:
        """Return the special token that opens the first message, "" where none does."""
        bos = self._tokenizer.bos_token
        if isinstance(bos, str) and text.startswith(bos) and text.count(bos) == 1:
            text = text.removeprefix(bos)
        found = [(text.find(token), -len(token), token) for token in self.special_tokens if token in text]
        return min(found)[2] if found else ""

    def _render(self, messages: list[Message], item: Conversation, where: str, for_generation: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=item.tools,  # type: ignore[arg-type]
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=for_generation,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template is not valid Jinja: {str(error.message).rstrip('.')} (line {error.lineno}). "
                "Correct the template, or name another with `dataset.chat_template`."
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{where}: the chat template refuses the conversation: {reason}") from error


def _start_of(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars + 10 else f"{text[:num_chars]}…"


def _shared_beginning(a: str, b: str) -> str:
    different = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:different]
