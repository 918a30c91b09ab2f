"""Rows of a Hub data set that are read over the network as they are needed.

Such rows have no numbers and no count: a few are read at the start, to know their columns, and the rest comes when it
is its turn. Local files are not read like this; their rows have numbers even when they are streamed, which is what
lets them be shuffled as a whole.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from nemo_automodel.components.datasets.hub import stream_hub_splits
from nemo_automodel.components.datasets.rows import ListSource, Row, Rows
from nemo_automodel.shared.errors import UserError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

NUM_FIRST_ROWS = 100
"""Rows that are read to know the columns of a stream."""


class SplitPart(NamedTuple):
    """One term of a split expression: ``train[64:10%]`` is ``("train", "64", "10%")``."""

    name: str
    start: str | None
    stop: str | None

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """Return first and end row; percentages are rounded to the nearest row, negative bounds count from the end."""

        def resolve(bound: str | None, default: int) -> int:
            if bound is None:
                return default
            value = round(num_rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
            return min(max(value + num_rows if value < 0 else value, 0), num_rows)

        return resolve(self.start, 0), resolve(self.stop, num_rows)

    def cut(self, table: datasets.IterableDataset) -> datasets.IterableDataset:
        """Return the part of a stream.

        Raises:
            UserError: a bound that needs the number of rows.
        """
        for bound in (self.start, self.stop):
            if bound is not None and not bound.isdigit():
                raise UserError(
                    f"`split: {self.name}[{self.start or ''}:{self.stop or ''}]` needs the number of rows, which a "
                    "stream does not know. Use whole numbers from the start, such as train[1000:2000]."
                )
        start = int(self.start or 0)
        table = table.skip(start) if start else table
        return table if self.stop is None else table.take(max(int(self.stop) - start, 0))


class StreamedRows(Rows):
    """The first rows of a stream, and ``open``, which begins the whole stream anew."""

    def __init__(self, table: datasets.IterableDataset, label: str) -> None:
        self._table, self.label = table, label
        first = [dict(row) for row in itertools.islice(self.open(), NUM_FIRST_ROWS)]
        if not first:
            raise UserError(f"`{label}` has no row there. Choose another split, or a larger slice.")
        source = ListSource(first, f"{label} stream")
        super().__init__(source, range(len(first)), source.columns(range(len(first))))

    def open(self) -> datasets.IterableDataset:
        """Return the stream at its beginning."""
        return copy.deepcopy(self._table)

    def filtered(self, keeps: Callable[[Row], bool]) -> StreamedRows:
        """Return the stream of the rows that ``keeps`` is true of."""
        return StreamedRows(self._table.filter(keeps), self.label)


def stream_hub_rows(
    repo: str, parts: list[SplitPart], config: str | None, limit: int | None, revision: str | None
) -> StreamedRows:
    """Open the stream of a split of a Hub data set.

    Raises:
        UserError: no such data set or split, out of reach, a slice that needs the number of rows, or no row.
    """
    import datasets

    tables = stream_hub_splits(repo, [part.name for part in parts], config, revision)
    cut = [part.cut(table) for part, table in zip(parts, tables, strict=True)]
    whole = cut[0] if len(cut) == 1 else datasets.concatenate_datasets(cut)
    is_sliced = any(part.start or part.stop for part in parts)
    if limit is not None and is_sliced:
        logger.warning("The limit of %d rows is not applied: the split is sliced already.", limit)
    elif limit is not None:
        whole = whole.take(limit)
    return StreamedRows(whole, repo)
