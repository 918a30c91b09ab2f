"""The label gate: what the model is about to be taught is looked at before the first step, and wrong data is refused.

Training goes on happily with labels that are all masked, with an end of turn that is never learned, with a doubled
first token. Nothing fails, the loss falls, and the model is worthless. So the rows that step 0 will train on, and a
sample beside them, are read back and must be able to teach what they seem to teach. The price is a second tokenising
of a few hundred rows.

Each rule refuses with the row, the cause and the remedy. Rules about one row name its file and line; rules about the
set name its numbers. What cannot be known of a data set (a user's own builder has no truncation that we could see) is
not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.components.datasets.document_view import DocumentView
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)


class ModelLimits(NamedTuple):
    """What the model can take, where it is known."""

    vocab_size: int | None = None
    """Rows of its embedding."""
    max_positions: int | None = None
    """Tokens of the longest row."""


NO_LIMITS = ModelLimits()


@dataclass(frozen=True)
class LabelStatistics:
    """What the rows looked at hold."""

    num_rows: int | None
    """Rows of the whole set; None for a stream without end."""
    num_looked_at: int
    num_tokens: int
    num_learned: int
    longest: int
    """Tokens of the longest row."""
    num_cut: int
    """Rows that lose part of their answer to ``truncation``."""
    num_dropped: int
    """Rows that are left out: of a packed set all of them, otherwise those looked at."""
    num_duplicates: int
    """Rows equal to another one that was looked at."""

    def __str__(self) -> str:
        if self.num_rows is None:
            what = f"{self.num_looked_at:,} rows of a stream"
        elif self.num_looked_at >= self.num_rows:
            what = f"all {self.num_rows:,} rows"
        else:
            what = f"{self.num_looked_at:,} of {self.num_rows:,} rows looked at"
        share = 100 * self.num_learned / max(self.num_tokens, 1)
        return (
            f"Data check, {what}: {self.num_tokens:,} tokens, {self.num_learned:,} learned ({share:.1f} %), "
            f"longest {self.longest:,}, {self.num_cut:,} cut, {self.num_dropped:,} dropped, "
            f"{self.num_duplicates:,} duplicates."
        )


def check_labels(
    documents: Sequence[DocumentView],
    tokenizer: PreTrainedTokenizerBase | None,
    config: DataCheckConfig,
    *,
    num_rows: int | None = None,
    num_dropped: int = 0,
    num_kept: int = 0,
    limits: ModelLimits = NO_LIMITS,
) -> LabelStatistics:
    """Refuse rows that cannot teach what they should.

    Args:
        documents: the rows looked at, at least one.
        tokenizer: the run's; without one (random tokens) only the labels are looked at.
        config: shares that are borne, and switches.
        num_rows: rows of the whole set, for the statistics.
        num_dropped: documents that packing leaves out, of the whole set or of those looked at.
        num_kept: documents that packing keeps, of the same.
        limits: what the model can take.

    Raises:
        UserError: the first rule that is broken.
    """
    documents = list(documents)
    skipped = [document for document in documents if document.is_skipped]
    used = [document for document in documents if not document.is_skipped]
    for document in used:
        _check_length(document, limits.max_positions)
        _check_labels_of(document)
        if tokenizer is not None:
            _check_first_tokens(document, tokenizer)
            _check_vocabulary(document, tokenizer, limits.vocab_size)
    _check_learned(used, config)
    if tokenizer is not None:
        _check_padding_mask(used, tokenizer)
        if config.require_end_token:
            _check_end(used, tokenizer)
    _check_shares(documents, skipped, num_dropped, num_kept, config)
    _tell_shared_ids(used)
    return _statistics(documents, used, num_rows, num_dropped + len(skipped))


# --- one row ----------------------------------------------------------------------------------------------------------


def _check_labels_of(document: DocumentView) -> None:
    """Labels must be the next tokens, and must not stand on padding."""
    ids, labels = document.arrays
    is_learned = labels[:-1] != IGNORE_INDEX  # what follows the last token is in its label only
    is_next = labels[:-1][is_learned] == ids[1:][is_learned]
    is_same = labels[:-1][is_learned] == ids[:-1][is_learned]
    if len(is_same) > 1 and is_same.all() and not is_next.all():
        raise UserError(
            f"{document.where}: every label is the token it stands on, not the next one, so the model would learn to "
            "repeat its input. Shift them: input_ids = ids[:-1], labels = ids[1:]."
        )
    if document.num_learned_padding:
        raise UserError(
            f"{document.where}: {document.num_learned_padding} labels stand on padding, so the model would learn to "
            "write padding. Set the label to -100 wherever `attention_mask` is 0."
        )


def _check_length(document: DocumentView, max_positions: int | None) -> None:
    if max_positions is not None and len(document.input_ids) > max_positions:
        raise UserError(
            f"{document.where} has {len(document.input_ids):,} tokens, but the model reads at most {max_positions:,} "
            "(`max_position_embeddings`). Cut rows with `dataset.seq_length` and `dataset.truncation: true`, or remove "
            "this one."
        )


def _check_first_tokens(document: DocumentView, tokenizer: PreTrainedTokenizerBase) -> None:
    bos_id = tokenizer.bos_token_id
    if bos_id is None or bos_id == tokenizer.pad_token_id or document.input_ids[:2] != [bos_id, bos_id]:
        return
    raise UserError(
        f"{document.where} begins with {tokenizer.bos_token} twice, which serving never sends. One comes from the "
        "text or the chat template, one from the tokenizer: take it out of one of them "
        "(`tokenizer.add_bos_token: false`)."
    )


def _check_vocabulary(document: DocumentView, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    highest = int(max(array.max(initial=0) for array in document.arrays))
    pad_id = tokenizer.pad_token_id or 0
    if highest < vocab_size and pad_id < vocab_size:
        return
    number = max(highest, pad_id)
    holder = f"{document.where} holds" if highest >= vocab_size else "Rows are padded with"
    raise UserError(
        f"{holder} the token {number:,} ({tokenizer.convert_ids_to_tokens(number)}), but the model's vocabulary has "
        f"{vocab_size:,} tokens; the tokenizer has {len(tokenizer):,}. Use the model's own tokenizer."
    )


# --- the set ----------------------------------------------------------------------------------------------------------


def _check_learned(documents: Sequence[DocumentView], config: DataCheckConfig) -> None:
    unlearned = [document for document in documents if document.num_learned == 0]
    if not unlearned:
        return
    if len(unlearned) == len(documents) and not any(document.num_learned_cut for document in documents):
        raise UserError(
            f"Nothing is learned: none of the {len(documents):,} rows looked at has a label ({unlearned[0].where} is "
            "the first; all its labels are -100). Check what the data set masks."
        )
    cut = next((document for document in unlearned if document.num_learned_cut), None)
    if len(unlearned) <= config.max_unlearned_share * len(documents):
        return
    if cut is not None:
        num_tokens = len(cut.ids) + len(cut.cut_ids)
        raise UserError(
            f"{cut.where} has {num_tokens:,} tokens, and `{cut.cut_by}` cuts off all {cut.num_learned_cut:,} learned "
            f"ones, so it teaches nothing ({len(unlearned):,} of {len(documents):,} rows looked at). Raise "
            f"`{cut.cut_by}`, shorten the row, or bear a share of such rows with `data_check.max_unlearned_share`."
        )
    raise UserError(
        f"{unlearned[0].where} teaches nothing: all its {len(unlearned[0].labels):,} labels are -100 "
        f"({len(unlearned):,} of {len(documents):,} rows looked at). Mend or remove the row, or bear a share of such "
        "rows with `data_check.max_unlearned_share`."
    )


def _check_padding_mask(documents: Sequence[DocumentView], tokenizer: PreTrainedTokenizerBase) -> None:
    """Find answers in which exactly the padding token was masked, as builders do that mask by token id."""
    pad_id = tokenizer.pad_token_id
    if pad_id is None or any(pad_id in document.labels for document in documents):
        return
    for document in documents:
        if pad_id not in document.input_ids:
            continue
        ids, labels = document.arrays
        is_hole = (labels[:-1] == IGNORE_INDEX) & (ids[1:] == pad_id)
        if (is_hole[1:] & (labels[:-2] != IGNORE_INDEX)).any():
            raise UserError(
                f"{document.where}: the answer holds {tokenizer.pad_token}, which is also the padding, and it is "
                "never learned: its label is masked as if it were padding. Mask padding by position, not by token, "
                "or give the tokenizer another `pad_token`."
            )


def _check_end(documents: Sequence[DocumentView], tokenizer: PreTrainedTokenizerBase) -> None:
    """Some row must learn to end: the end of sequence anywhere, or a special token where a learned part ends."""
    ends = end_token_ids(tokenizer)
    whole = [document for document in documents if not document.cut_ids]
    if not ends or not whole:
        return  # with every row cut, the share of cut rows is the rule that speaks
    for document in whole:
        following = [*document.labels[1:], IGNORE_INDEX]
        for label, next_label in zip(document.labels, following, strict=True):
            if label == tokenizer.eos_token_id or (label in ends and next_label == IGNORE_INDEX):
                return
    first = whole[0]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id == tokenizer.pad_token_id:
        cause = (
            f"The padding is the end token {tokenizer.eos_token}, too: whoever masks labels by that token masks the "
            "end with the padding. Mask by position, or give the tokenizer another `pad_token`."
        )
    else:
        cause = f"End every answer with {tokenizer.eos_token or 'the end token'} and learn it."
    raise UserError(
        f"No end is learned in any of the {len(whole):,} rows looked at ({first.where} is the first), so the model "
        f"would never stop. {cause} For text without ends set `data_check.require_end_token: false`."
    )


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that can end an answer: the end of sequence, and the special ones that mean nothing else."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    eos = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    return (special - others) | eos


def _check_shares(
    documents: Sequence[DocumentView],
    skipped: Sequence[DocumentView],
    num_dropped: int,
    num_kept: int,
    config: DataCheckConfig,
) -> None:
    cut = [document for document in documents if document.num_learned_cut]
    if len(cut) > config.max_truncated_share * len(documents):
        raise UserError(
            f"`{cut[0].cut_by}` cuts the answer of {len(cut):,} of {len(documents):,} rows looked at ({cut[0].where} "
            f"loses {cut[0].num_learned_cut:,} learned tokens), but at most {100 * config.max_truncated_share:g} % may "
            f"be cut. Raise `{cut[0].cut_by}`, or `data_check.max_truncated_share`."
        )
    if num_dropped > config.max_dropped_share * (num_dropped + num_kept):
        raise UserError(
            f"Packing drops {num_dropped:,} of {num_dropped + num_kept:,} documents, but at most "
            f"{100 * config.max_dropped_share:g} % may be lost. Raise `packed_sequence.packed_sequence_size`, cut with "
            "`dataset.seq_length` and `dataset.truncation: true`, or raise `data_check.max_dropped_share`."
        )
    if len(skipped) > config.max_dropped_share * len(documents):
        raise UserError(
            f"`skip_invalid_samples` skips {len(skipped):,} of {len(documents):,} rows looked at "
            f"({skipped[0].where} is the first), but at most {100 * config.max_dropped_share:g} % may be lost. Mend "
            "the data, or raise `data_check.max_dropped_share`."
        )


def _tell_shared_ids(documents: Iterable[DocumentView]) -> None:
    """Warn of rows that share an ``id``: often a set that was put together twice, sometimes meant."""
    first: dict[str, str] = {}
    shared: list[tuple[str, DocumentView]] = []
    for document in documents:
        if document.row_id is None:
            continue
        if document.row_id in first and first[document.row_id] != document.where:
            shared.append((first[document.row_id], document))
        first.setdefault(document.row_id, document.where)
    if shared:
        where, document = shared[0]
        logger.warning(
            "%s has the id `%s` of %s (%d such rows of those looked at). If the data was put together twice, remove "
            "the copies.",
            document.where, document.row_id, where, len(shared),
        )  # fmt: skip


def _statistics(
    documents: Sequence[DocumentView], used: Sequence[DocumentView], num_rows: int | None, num_dropped: int
) -> LabelStatistics:
    lengths = [len(document.ids) for document in used]
    return LabelStatistics(
        num_rows=num_rows,
        num_looked_at=len(documents),
        num_tokens=sum(lengths),
        num_learned=sum(document.num_learned for document in used),
        longest=max(lengths, default=0),
        num_cut=sum(document.num_learned_cut > 0 for document in used),
        num_dropped=num_dropped,
        num_duplicates=len(used) - len({document.content for document in used}),
    )
