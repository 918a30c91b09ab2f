"""Traces of agents: long conversations with tools, reasoning and an end that may be missing.

A *turn* here is a user's message and everything up to the next one: the assistant's calls, the tools' results and the
final answer. What comes before the last turn is its history. The keys of the builder act on a conversation in this
order: an incomplete end is cut off, reasoning is taken out of the history, the history's turns are marked as context,
and the oldest turns go where the whole is too long. Filters then look at what is left.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_dataset import ConversationRows, conversation
from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation, Message, use_chat_template
from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout, Sample
from nemo_automodel.components.datasets.llm.sample_stream import as_stream
from nemo_automodel.components.datasets.llm.tokenized_rows import Encoder
from nemo_automodel.components.datasets.llm.tool_calls import ToolReader
from nemo_automodel.components.datasets.rows import Row, Rows
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.components.datasets.streamed_rows import StreamedRows
from nemo_automodel.components.datasets.streaming import Stream
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_THINK_BLOCK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_ROWS_AT_ONCE = 1000


def make_agent_chat_dataset(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_name: str | None = None,
    path: str | None = None,
    split: str | None = "train",
    revision: str | None = None,
    filter_no_assistant: bool = False,
    filter_overlong: bool = False,
    trim_incomplete_last_turn: bool = False,
    chat_template: str | None = None,
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    padding: bool | str = False,
    truncation: bool | str = False,
    mask_reasoning_content: bool = False,
    train_on_last_turn_only: bool = False,
    drop_history_reasoning_content: bool = False,
    truncate_history: bool = False,
    skip_invalid_samples: bool = False,
    streaming: bool = False,
) -> ConversationRows | Stream[Sample]:
    """Build samples from conversations in OpenAI's or ShareGPT's form; every assistant message is learned.

    * ``dataset_name``, a Hub name or anything local, or ``path``, something local; ``revision`` is the Hub's.
    * ``filter_no_assistant``: leave out conversations in which the assistant says nothing, instead of refusing them.
    * ``filter_overlong``: leave out what is longer than ``seq_length``; tokenises everything at the start.
    * ``trim_incomplete_last_turn``: cut off what follows the assistant's last message.
    * ``mask_reasoning_content``: do not learn the text of the reasoning; its delimiters are still learned.
    * ``train_on_last_turn_only``: learn what the assistant says after the user's last message.
    * ``drop_history_reasoning_content``: take reasoning out of earlier turns, as servers do.
    * ``truncate_history``: drop the oldest turns, never the system message, until the rest fits in ``seq_length``.
    * ``skip_invalid_samples``: a row that cannot be used teaches nothing, with a warning, instead of ending the run.
    * ``streaming``: a stream, see ``sample_stream``.

    Raises:
        UserError: not exactly one of ``dataset_name`` and ``path``, unreadable data, no chat template, a key that needs
            ``seq_length``, or filters that leave nothing.
    """
    source = _source(dataset_name, path)
    for key, is_on in (("filter_overlong", filter_overlong), ("truncate_history", truncate_history)):
        if is_on and seq_length is None:
            raise UserError(f"`dataset.{key}: true` needs a length. Set `dataset.seq_length`.")
    template = use_chat_template(tokenizer, chat_template)
    if template is None:
        raise UserError(
            "make_agent_chat_dataset needs a chat template, but the tokenizer has none. Set `dataset.chat_template` to "
            "a text or a .jinja file, or use an instruction-tuned model's tokenizer."
        )
    rows = load_rows(
        source,
        split,
        limit=limit_dataset_samples,
        skip_invalid=skip_invalid_samples,
        revision=revision,
        streaming=streaming,
    )
    if "conversations" not in rows.column_names:
        rows.require_columns("messages")
    shape = _Shape(trim_incomplete_last_turn, drop_history_reasoning_content, train_on_last_turn_only)
    reader = ToolReader(shape, tokenizer, template)
    encoder: Encoder[Conversation] = ChatEncoder(tokenizer, template, mask_reasoning=mask_reasoning_content)
    if truncate_history and seq_length is not None:
        encoder = HistoryCutter(encoder, seq_length + 1)
    needs_length = padding == "max_length" or truncation not in (False, None, "do_not_truncate")
    has_other_use = filter_overlong or truncate_history
    layout = Layout.of(tokenizer, seq_length if needs_length or not has_other_use else None, padding, truncation)
    keeper = _Keeper(
        reader, encoder, filter_no_assistant, seq_length if filter_overlong else None, skip_invalid_samples
    )
    rows = keeper.filtered(rows)
    dataset = ConversationRows(rows, reader, encoder, layout, skip_invalid_samples)
    return as_stream(dataset) if streaming else dataset


def _source(dataset_name: str | None, path: str | None) -> str:
    if (dataset_name is None) == (path is None):
        what = "neither" if path is None else "both"
        raise UserError(
            f"make_agent_chat_dataset takes either `dataset_name` or `path`, but {what} is set. Set "
            "`dataset.dataset_name` to a Hub name, or `dataset.path` to a file or directory."
        )
    if path is None:
        return str(dataset_name)
    is_plain = not Path(path).expanduser().is_absolute() and not path.startswith(".")
    return f"./{path}" if is_plain else path  # never a Hub name


@dataclass(frozen=True)
class _Shape:
    """Row → conversation, as the keys of the builder want it."""

    trims: bool
    drops_history_reasoning: bool
    last_turn_only: bool

    def __call__(self, row: Row, where: str) -> Conversation:
        messages, tools = conversation(row, where)
        if self.trims:
            messages = messages[: _last(messages, "assistant") + 1]
        history = max(_last(messages, "user"), 0)
        changed = []
        for number, message in enumerate(messages):
            if number < history and message["role"] == "assistant":
                if self.drops_history_reasoning:
                    message = _without_reasoning(message)
                if self.last_turn_only:
                    message = {**message, "train": False}
            changed.append(message)
        return Conversation(changed, tools)


def _last(messages: Sequence[Message], role: str) -> int:
    """Return the place of the last message of a role, -1 where there is none."""
    return max((number for number, message in enumerate(messages) if message["role"] == role), default=-1)


def _without_reasoning(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in _REASONING_KEYS}
    return {**kept, "content": _THINK_BLOCK.sub("", message["content"])}


class HistoryCutter:
    """An encoder that drops the oldest turns of conversations with more than ``max_tokens`` tokens.

    The system message stays, and so does the last turn with something of the assistant's, even where it is too long by
    itself. Of the turns before it as many stay as fit.
    """

    def __init__(self, encoder: Encoder[Conversation], max_tokens: int) -> None:
        self._encoder, self._max_tokens = encoder, max_tokens
        self.num_shortened = 0
        """Conversations encoded so far that lost turns; one that is encoded again counts again."""

    def encode(self, items: Sequence[Conversation], where: Sequence[str]) -> list[Encoded]:
        """Tokenise conversations; ``where`` names each for messages."""
        return [
            encoded if len(encoded.ids) <= self._max_tokens else self._shortened(item, place, encoded)
            for item, place, encoded in zip(items, where, self._encoder.encode(items, where), strict=True)
        ]

    def _shortened(self, item: Conversation, where: str, whole: Encoded) -> Encoded:
        messages = item.messages
        num_fixed = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
        last_assistant = _last(messages, "assistant")
        users = [n for n, message in enumerate(messages) if message["role"] == "user" and n < last_assistant]
        starts = [n for n in users if n > num_fixed]
        found, low, high = whole, 0, len(starts) - 1
        while low <= high:  # the fewest turns whose loss makes it fit; lengths fall with every turn that goes
            middle = (low + high) // 2
            shorter = Conversation([*messages[:num_fixed], *messages[starts[middle] :]], item.tools)
            (encoded,) = self._encoder.encode([shorter], [where])
            if len(encoded.ids) <= self._max_tokens or middle == len(starts) - 1:
                found = encoded
            if len(encoded.ids) <= self._max_tokens:
                high = middle - 1
            else:
                low = middle + 1
        self.num_shortened += found is not whole
        return found


@dataclass
class _Keeper:
    """The filters of the builder."""

    reader: Callable[[Row, str], Conversation]
    encoder: Encoder[Conversation]
    needs_assistant: bool
    seq_length: int | None
    keeps_invalid: bool
    """Rows that cannot be used are not the filters' business."""

    def __call__(self, row: Row) -> bool:
        return self._are_kept(Rows.of([dict(row)], "a row of the stream"), range(1))[0]

    def filtered(self, rows: Rows) -> Rows:
        """Return the rows that are kept, and log how many are not.

        Raises:
            UserError: none is left.
        """
        if not self.needs_assistant and self.seq_length is None:
            return rows
        if isinstance(rows, StreamedRows):
            return rows.filtered(self)
        kept: list[int] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            indices = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
            kept += itertools.compress(indices, self._are_kept(rows, indices))
        limits = ["without a message of the assistant's"] if self.needs_assistant else []
        limits += [f"longer than `dataset.seq_length: {self.seq_length}`"] if self.seq_length is not None else []
        reason = " or ".join(limits)
        logger.info("The filters left out %d of %d rows, which are %s.", len(rows) - len(kept), len(rows), reason)
        if not kept:
            raise UserError(f"All {len(rows):,} rows are {reason}, so nothing is left. Change the filters.")
        return rows.select(kept)

    def _are_kept(self, rows: Rows, indices: Sequence[int]) -> list[bool]:
        try:
            items = [self.reader(rows[index], rows.where(index)) for index in indices]
            kept = [any(message["role"] == "assistant" for message in item.messages) for item in items]
            speaking = list(itertools.compress(range(len(items)), kept))
            if self.seq_length is not None and speaking:
                where = [rows.where(indices[number]) for number in speaking]
                encoded = self.encoder.encode([items[number] for number in speaking], where)
                for number, row in zip(speaking, encoded, strict=True):
                    kept[number] = len(row.ids) <= self.seq_length + 1
        except UserError:
            if not self.keeps_invalid:
                raise
            return [True] if len(indices) == 1 else [self._are_kept(rows, [index])[0] for index in indices]
        if not self.needs_assistant:
            kept = [is_kept or number not in speaking for number, is_kept in enumerate(kept)]
        return kept
