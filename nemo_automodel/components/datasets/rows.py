"""Rows: random access to records, one plain dict each, wherever they are stored.

A JSON Lines file is not loaded: the place of every line is kept and the line is parsed when it is asked for. That costs
16 bytes a row, whatever the row holds, and keeps each row exactly as it was written: a table format would give every
message of a conversation the union of all keys, filled with null, and templates ask whether a key is there. The price
is one parse of every selected line at the start, about 150 MB a second, and it is what lets a malformed line be refused
before a run begins.
"""

from __future__ import annotations

import csv
import hashlib
import json
import mmap
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from nemo_automodel.shared.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]


class Source(ABC):
    """Where rows come from: one file, several, or a table."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Row:
        """Return row ``index``; a UserError names the place when it cannot be read."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Name the place of row ``index`` as a person would look it up."""

    def content_key(self) -> str | None:
        """Return a text that changes whenever a row does; None where that cannot be known."""
        return None

    def columns(self, indices: Sequence[int]) -> list[str]:
        """Return the columns of the rows ``indices``, after reading whatever must be read to know them."""
        found: dict[str, None] = {}
        for index in indices:
            found.update(dict.fromkeys(self.read(index)))
        return list(found)


class JsonLinesSource(Source):
    """A file with one JSON object on every line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._starts, self._line_numbers = array("q"), array("q")
        if path.stat().st_size == 0:
            return
        memory, position = self._open(), 0
        for number, line in enumerate(iter(memory.readline, b""), start=1):
            if line.strip():
                self._starts.append(position)
                self._line_numbers.append(number)
            position += len(line)

    def _open(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Row:
        """Parse the row's line."""
        memory, start = self._open(), self._starts[index]
        end = memory.find(b"\n", start)
        return parse_json_row(memory[start : end if end >= 0 else len(memory)], self.where(index))

    def where(self, index: int) -> str:
        """Return file and line."""
        return f"{self.path} line {self._line_numbers[index]}"

    def content_key(self) -> str:
        """Return the digest of the file's bytes."""
        return hashlib.blake2b(self._open(), digest_size=16).hexdigest()


class ListSource(Source):
    """Rows that are already in memory."""

    def __init__(self, rows: Sequence[Row], label: str) -> None:
        self._rows, self._label = rows, label

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        """Return the row itself."""
        return self._rows[index]

    def content_key(self) -> str | None:
        """Return the digest of the rows as JSON; None where they hold something else."""
        try:
            return hashlib.blake2b(json.dumps(self._rows).encode(), digest_size=16).hexdigest()
        except (TypeError, ValueError):
            return None

    def where(self, index: int) -> str:
        """Return label and row number, counted from 1."""
        return f"{self._label} row {index + 1}"


class TableSource(Source):
    """A ``datasets.Dataset``: memory-mapped, typed columns."""

    def __init__(self, table: datasets.Dataset, label: str) -> None:
        self._table, self._label = table, label

    def __len__(self) -> int:
        return len(self._table)

    def content_key(self) -> str:
        """Return the table's own fingerprint."""
        return str(self._table._fingerprint)

    def read(self, index: int) -> Row:
        """Convert one row to Python values."""
        return dict(self._table[int(index)])

    def where(self, index: int) -> str:
        """Return label and row number, counted from 1."""
        return f"{self._label} row {index + 1}"

    def columns(self, indices: Sequence[int]) -> list[str]:
        """Return the table's columns, without reading a row."""
        return list(self._table.column_names)


class JoinedSource(Source):
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))

    def _find(self, index: int) -> tuple[int, int]:
        """Return the number of the part and the row's number in it."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Row:
        """Read the row from its part."""
        number, inner = self._find(index)
        return self._parts[number].read(inner)

    def where(self, index: int) -> str:
        """Return the place as the part names it."""
        number, inner = self._find(index)
        return self._parts[number].where(inner)

    def content_key(self) -> str | None:
        """Return the keys of the parts, with their lengths."""
        keys = [part.content_key() for part in self._parts]
        return None if None in keys else json.dumps([keys, self._starts])

    def columns(self, indices: Sequence[int]) -> list[str]:
        """Ask each part for the rows of it."""
        chosen: dict[int, list[int]] = {}
        for number, inner in map(self._find, indices):
            chosen.setdefault(number, []).append(inner)
        found: dict[str, None] = {}
        for number, rows in chosen.items():
            found.update(dict.fromkeys(self._parts[number].columns(rows)))
        return list(found)


class Rows(Sequence[Row]):
    """A selection of a source's rows, in an order of its own."""

    def __init__(self, source: Source, indices: Sequence[int], column_names: list[str]) -> None:
        self._source, self._indices = source, indices
        self.column_names = column_names

    @classmethod
    def of(cls, rows: Sequence[Row], label: str = "the rows given") -> Rows:
        """Wrap rows that are already in memory."""
        source = ListSource(rows, label)
        return cls(source, range(len(rows)), source.columns(range(len(rows))))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._source.read(self._indices[index])

    def __iter__(self) -> Iterator[Row]:
        for index in self._indices:
            yield self._source.read(index)

    def select(self, indices: Sequence[int]) -> Rows:
        """Return the rows at ``indices``, in that order."""
        return Rows(self._source, [self._indices[i] for i in indices], self.column_names)

    def where(self, index: int) -> str:
        """Name the place of row ``index``: file and line, or data set and row."""
        return self._source.where(self._indices[index])

    def content_key(self) -> str | None:
        """Return a text that changes whenever a row or the selection does; None where that cannot be known."""
        source = self._source.content_key()
        if source is None:
            return None
        indices = np.asarray(self._indices, dtype="<i8")
        return f"{source} {hashlib.blake2b(indices.tobytes(), digest_size=16).hexdigest()}"

    def require_columns(self, *names: str) -> None:
        """Refuse rows that lack a column.

        Raises:
            UserError: a name is not a column; the message lists those that are.
        """
        for name in names:
            if name not in self.column_names:
                raise UserError(
                    f"The data has no column `{name}`.{did_you_mean(name, self.column_names)} "
                    f"Its columns: {', '.join(self.column_names)} ({self.where(0)})."
                )


def parse_json_row(line: bytes, where: str) -> Row:
    """Parse one line of a JSON Lines file.

    Raises:
        UserError: the line is not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {line[error.start]:#04x} is not UTF-8 text. Save the file with the encoding UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}. Every line must be one JSON object."
        ) from None
    except RecursionError:
        raise UserError(
            f"{where}: nested too deeply to be read. A row is a flat object or a list of messages."
        ) from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: the row is {describe(row)}, but it must be an object such as {{"prompt": "…"}}.')
    return row


def read_json_file(path: Path) -> Source:
    """Open a ``.json`` file: a list of objects, or JSON Lines under another name.

    Raises:
        UserError: it is neither, or it is malformed; the message names file, line and column.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text. Save the file with the encoding UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data") or path.stat().st_size == 0:
            return JsonLinesSource(path)
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be read. Write a flat list of rows.") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds {describe(rows)}, but rows must be a list `[{{…}}, {{…}}]`, or one object on every line "
            "(a .jsonl file)."
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is {describe(row)}, but a row must be an object.")
    return ListSource(rows, str(path))


def read_csv_file(path: Path) -> Source:
    """Open a CSV or TSV file with a header line. Every value stays text exactly as written: ``007`` and ``NA`` too.

    Raises:
        UserError: not UTF-8, no header, or a row whose number of fields differs from the header's.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            header = next(reader, [])
            rows = []
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{path} line {reader.line_num}: {len(fields)} fields, but the header has {len(header)}. "
                        "Put values that hold the separator into double quotes."
                    )
                rows.append(dict(zip(header, fields, strict=True)))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text. Save the file with the encoding UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV: {error}.") from None
    return ListSource(rows, str(path))


def from_json_text(value: Any) -> Any:
    """Return the list or object that a text spells out, as CSV files have to; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # whoever wants a list or an object says so, and names the row


def describe(value: object) -> str:
    """Name a value's kind as JSON's users know it."""
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
