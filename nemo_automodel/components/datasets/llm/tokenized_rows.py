"""A map-style set of training samples that tokenises a row when it is asked for.

Nothing is tokenised before the first step, and batches are tokenised together. Whoever needs every row at once
(packing, grouping by length) asks for slices of a thousand or so, where a fast tokenizer uses all cores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout, Sample
from nemo_automodel.components.datasets.rows import Row, Rows
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
EncoderItem = TypeVar("EncoderItem", contravariant=True)


def nothing_left(where: str, num_tokens: int, key: str, limit: int | None, num_learned: int) -> UserError:
    """Return the error of a row of which a cut to ``limit`` positions, set by ``key``, leaves nothing to learn."""
    return UserError(
        f"{where} has {num_tokens:,} tokens, and `{key}: {limit}` cuts off all {num_learned:,} learned ones, so it "
        f"teaches nothing. Raise `{key}`, shorten or remove the row, or bear such rows with "
        "`data_check.max_unlearned_share`."
    )


class Encoder(Protocol[EncoderItem]):
    """The stage between an item (prompt and answer, or a conversation) and its tokens."""

    def encode(self, items: Sequence[EncoderItem], where: Sequence[str]) -> list[Encoded]:
        """Tokenise items; ``where`` names each for messages."""


class TokenizedRows(Dataset[Sample], Generic[Item]):
    """Rows → items → tokens → samples, on demand.

    A row whose learned tokens are all cut off by ``truncation`` is refused when it is asked for, wherever that is.
    With ``bears_unlearned`` or ``skips_invalid`` it stays in place with every label at -100 and adds nothing to loss or
    gradient. Such rows, and rows that lose part of their answer, are counted in ``num_unlearned_rows`` and
    ``num_cut_rows`` and told in a warning at 1, 10, 100, … of them.
    """

    skips_invalid = False
    """Rows that cannot be used teach nothing instead of ending the run."""
    bears_unlearned = False
    """Rows that lose their whole answer teach nothing instead of ending the run."""

    def __init__(self, rows: Rows, to_item: Callable[[Row, str], Item], encoder: Encoder[Item], layout: Layout) -> None:
        self.rows, self.layout = rows, layout
        self._to_item, self._encoder = to_item, encoder
        self.num_cut_rows = 0
        self.num_unlearned_rows = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return several samples, tokenised in one call."""
        return [self.layout.sample(self._counted(index, encoded)) for index, encoded in self._encode(indices)]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the number of positions of each sample, without building it."""
        return [len(self.layout.sample(encoded)["input_ids"]) for _, encoded in self._encode(indices)]

    def encode(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        """Return each index with its row's tokens, before they are cut and shifted; nothing is counted."""
        return self._encode(indices)

    def _encode(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        where = [self.rows.where(index) for index in indices]
        items = [self._to_item(self.rows[index], place) for index, place in zip(indices, where, strict=True)]
        return list(zip(indices, self._encoder.encode(items, where), strict=True))

    def _counted(self, index: int, encoded: Encoded) -> Encoded:
        num_kept, num_cut = self.layout.num_cut(encoded)
        self.count_cut(index, len(encoded.ids), num_kept, num_cut)
        return encoded

    def count_cut(self, index: int, num_tokens: int, num_kept: int, num_cut: int) -> None:
        """Count a row of ``num_tokens`` that loses learned tokens, ``num_cut`` beside the ``num_kept`` that stay.

        Raises:
            UserError: none stays, and such rows are not to be borne.
        """
        if num_cut == 0:
            return
        if num_kept == 0:
            if not (self.skips_invalid or self.bears_unlearned):
                raise nothing_left(
                    self.rows.where(index), num_tokens, "dataset.seq_length", self.layout.seq_length, num_cut
                )
            self.num_unlearned_rows += 1
            count, what = self.num_unlearned_rows, "loses its whole answer and teaches nothing"
        else:
            self.num_cut_rows += 1
            count, what = self.num_cut_rows, f"loses {num_cut} of {num_kept + num_cut} learned tokens"
        if count in (1, 10, 100, 1000, 10_000, 100_000):
            logger.warning(
                "%s has %d tokens and %s at `seq_length: %d` (%d such rows so far). Raise `dataset.seq_length`.",
                self.rows.where(index), num_tokens, what, self.layout.seq_length, count,
            )  # fmt: skip
