"""From a name to rows: a Hub data set, a file, a directory with its splits, or a glob.

A path that exists is local; a pattern with ``*`` is local; anything that looks like a path is a path, so that a typo is
not looked up on the Hub. Splits of a directory are told by file or directory name (``train.jsonl``,
``validation-00000-of-00002.parquet``, ``data/test/part1.csv``); where no name says a split, all files are ``train``.
Slices (``train[:10]``, ``train[64:]``, ``train[:10%]``, ``train+validation``) mean the same everywhere. Code that a
data set brings is never run.
"""

from __future__ import annotations

import glob
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_automodel.components.datasets.hub import load_hub_splits
from nemo_automodel.components.datasets.rows import (
    JoinedSource,
    JsonLinesSource,
    Rows,
    Source,
    TableSource,
    read_csv_file,
    read_json_file,
)
from nemo_automodel.components.datasets.streamed_rows import NUM_FIRST_ROWS, SplitPart, stream_hub_rows
from nemo_automodel.shared.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# the words that name a split in file and directory names, as the Hub's conventions have them
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_SPLIT_PART = re.compile(r"\s*([\w.-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")
_SHARD = re.compile(r"-\d+-of-\d+$")


def parse_split(split: str) -> list[SplitPart]:
    """Parse ``train``, ``train[:10%]``, ``train[64:]+test``.

    Raises:
        UserError: the text is none of these.
    """
    parts = []
    for term in split.split("+"):
        match = _SPLIT_PART.fullmatch(term)
        if match is None:
            raise UserError(
                f"`split: {split}` cannot be read. Write a name, with a slice if you like: "
                "train, train[:1000], train[64:], train[:10%], train+validation."
            )
        parts.append(SplitPart(*match.groups()))
    return parts


def load_rows(
    path_or_name: str | Path,
    split: str | None = "train",
    name: str | None = None,
    limit: int | None = None,
    *,
    shuffle_seed: int | None = None,
    skip_invalid: bool = False,
    revision: str | None = None,
    streaming: bool = False,
) -> Rows:
    """Load the rows of a split of a local file, directory or glob, or of a Hub data set.

    Args:
        path_or_name: a path (``~`` is expanded), a glob, or ``owner/name`` on the Hub.
        split: a split expression; None takes the only split there is.
        name: the Hub configuration, or a sub-directory of a local directory.
        limit: keep the first rows only; a split that is sliced already is left alone, with a warning.
        shuffle_seed: shuffle each whole split before it is sliced, so that ``train[:128]`` and ``train[128:]`` of one
            seed stay disjoint.
        skip_invalid: leave malformed JSON lines out, with a count, instead of refusing them.
        revision: branch, tag or commit of a Hub data set.
        streaming: read only the first rows now; those of a Hub data set come as ``StreamedRows``, over the network.

    Raises:
        UserError: nothing there, no such split, unreadable, or empty; the message says which and what to do.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit of rows is {limit}, but it must be at least 1. Leave it out to take all rows.")
    parts = parse_split(split) if split is not None else [SplitPart("", None, None)]
    if streaming and not _is_local(str(path_or_name)):
        if shuffle_seed is not None:
            raise UserError(
                "`dataset.shuffle_seed` shuffles a whole split, which a stream does not know. Remove it: "
                "`dataloader.shuffle` shuffles `dataloader.shuffle_buffer_size` rows of a stream at a time."
            )
        return stream_hub_rows(str(path_or_name), parts, name, limit, revision)
    sources = _find_sources(str(path_or_name), [part.name for part in parts], name, revision)
    chosen = []
    for part, source in zip(parts, sources, strict=True):
        order = np.arange(len(source))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(source))
        start, stop = part.bounds(len(source))
        chosen.append(order[start:stop])
    joined = sources[0] if len(sources) == 1 else JoinedSource(sources)
    offsets = itertools.accumulate((len(source) for source in sources[:-1]), initial=0)
    indices = np.concatenate([order + offset for order, offset in zip(chosen, offsets, strict=True)])
    if limit is not None and any(part.start or part.stop for part in parts):
        logger.warning("The limit of %d rows is not applied: `split: %s` is sliced already.", limit, split)
    elif limit is not None:
        indices = indices[:limit]
    if len(indices) == 0:
        sizes = [f"{part.name or 'data'} has {len(source):,} rows" for part, source in zip(parts, sources, strict=True)]
        raise UserError(
            f"`{path_or_name}`, split `{split}`, selects no row: {', '.join(sizes)}. Choose a larger slice."
        )
    if streaming:
        return Rows(joined, indices.tolist(), joined.columns(indices[:NUM_FIRST_ROWS].tolist()))
    return _checked(joined, indices.tolist(), skip_invalid)


def _checked(source: Source, indices: list[int], skip_invalid: bool) -> Rows:
    """Read what must be read to know the columns; with ``skip_invalid`` leave out what cannot be read."""
    if skip_invalid:
        good = [index for index in indices if _is_readable(source, index)]
        if len(good) < len(indices):
            logger.warning("Left out %d of %d rows that cannot be read.", len(indices) - len(good), len(indices))
        if not good:
            raise UserError(f"None of the {len(indices):,} rows can be read ({source.where(indices[0])}).")
        indices = good
    return Rows(source, indices, source.columns(indices))


def _is_readable(source: Source, index: int) -> bool:
    try:
        source.read(index)
    except UserError:
        return False
    return True


def _is_local(given: str) -> bool:
    path = Path(given).expanduser()
    return path.exists() or glob.has_magic(given) or _looks_like_path(given)


def _find_sources(given: str, split_names: list[str], name: str | None, revision: str | None) -> list[Source]:
    path = Path(given).expanduser()
    if revision is not None and _is_local(given):
        raise UserError(f"`revision: {revision}` is for Hub data sets, but `{given}` is a path. Remove it.")
    if path.is_dir():
        splits = _directory_splits(_subdirectory(path, name), given)
        return [_open(_pick(splits, wanted, given)) for wanted in split_names]
    if path.is_file() or glob.has_magic(given):
        if name is not None:
            raise UserError(
                f"`name: {name}` is for Hub data sets and directories, but `{given}` names files. Remove it."
            )
        files, root = ([path], path.parent) if path.is_file() else _glob_files(str(path))
        return [_open(_pick_file(files, root, wanted, given)) for wanted in split_names]
    if _looks_like_path(given):
        raise UserError(_missing_path(path, given))
    return [TableSource(table, given) for table in load_hub_splits(given, split_names, name, revision)]


def _glob_files(pattern: str) -> tuple[list[Path], Path]:
    """Return the data files that match, and the directory below which the pattern begins to vary."""
    files = [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).suffix in _KINDS]
    if not files:
        raise UserError(f"`{pattern}` matches no data file. Known kinds: {', '.join(_KINDS)}.")
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    return files, Path(*fixed)


def _subdirectory(path: Path, name: str | None) -> Path:
    if name is None:
        return path
    if not (path / name).is_dir():
        there = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(
            f"`name: {name}` is not a directory in {path}.{did_you_mean(name, there)} "
            f"Directories there: {', '.join(there) or 'none'}."
        )
    return path / name


def _directory_splits(path: Path, given: str) -> dict[str, list[Path]]:
    """Return split name → files (or the one directory of a saved ``datasets.Dataset``)."""
    if (path / "state.json").is_file():
        return {"train": [path]}
    if (path / "dataset_dict.json").is_file():
        return {entry.parent.name: [entry.parent] for entry in sorted(path.glob("*/state.json"))}
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in _KINDS
        and file.name not in _NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"The directory `{given}` holds no data file. Known kinds: {', '.join(_KINDS)}.")
    named, others = _by_split(files, path)
    splits = named or {"train": files}
    for split, split_files in others.items():
        splits.setdefault(split, split_files)
    return splits


def _by_split(files: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Group files by the split word in their path below ``root``; those without one by their own name."""
    named: dict[str, list[Path]] = {}
    others: dict[str, list[Path]] = {}
    for file in files:
        parts = [*file.relative_to(root).parent.parts, file.stem]
        words = [word for part in parts for word in re.split(r"[^a-z0-9]+", part.lower()) if word in _SPLIT_WORDS]
        if words:
            named.setdefault(_SPLIT_WORDS[words[0]], []).append(file)
        else:
            others.setdefault(_SHARD.sub("", file.stem), []).append(file)
    return {split: named[split] for split in _SPLIT_WORDS if split in named}, others


def _pick(splits: dict[str, list[Path]], wanted: str, given: str) -> list[Path]:
    if not wanted and len(splits) == 1:
        return next(iter(splits.values()))
    if wanted in splits:
        return splits[wanted]
    canonical = _SPLIT_WORDS.get(wanted)
    if canonical in splits:
        return splits[canonical]
    what = f"has no split `{wanted}`.{did_you_mean(wanted, splits)}" if wanted else "has several splits; name one."
    raise UserError(f"`{given}` {what} Splits there: {', '.join(splits)}.")


def _pick_file(files: list[Path], root: Path, wanted: str, given: str) -> list[Path]:
    """Choose among files that were named themselves.

    The default ``train`` takes a single split whatever it is called, but asking a file of the training rows for
    ``validation`` is refused: it would validate on what was trained.
    """
    named, others = _by_split(files, root)
    if not named:
        return files
    if len(named) + bool(others) == 1 and wanted in ("", "train"):
        return files
    return _pick({**others, **named}, wanted, given)


def _open(files: list[Path]) -> Source:
    kinds = {_KINDS[file.suffix] for file in files if file.is_file()}
    if len(kinds) > 1:
        raise UserError(
            f"{files[0].parent} holds the split as {' and '.join(sorted(kinds))} files. Name one file or a glob."
        )
    try:
        if not kinds:
            return _load_saved(files[0])
        kind = kinds.pop()
        if kind in ("parquet", "arrow"):
            return _load_tables(kind, files)
        readers = {"jsonl": JsonLinesSource, "json": read_json_file, "csv": read_csv_file}
        parts: list[Source] = [readers[kind](file) for file in files]
    except OSError as error:
        raise UserError(f"{error.filename or files[0]} cannot be read: {error.strerror or error}.") from error
    for file, part in zip(files, parts, strict=True):
        if len(part) == 0:
            raise UserError(f"{file} is empty. It must hold at least one row.")
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _load_saved(directory: Path) -> Source:
    import datasets

    return TableSource(datasets.load_from_disk(str(directory)), str(directory))


def _load_tables(kind: str, files: list[Path]) -> Source:
    import datasets
    import pyarrow

    label = str(files[0]) if len(files) == 1 else str(files[0].parent)
    try:
        table = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{label} is not a readable {kind} file: {reason}") from error
    return TableSource(table, label)


def _looks_like_path(given: str) -> bool:
    return (
        given.startswith((".", "/", "~"))
        or "\\" in given
        or given.count("/") > 1
        or given.endswith("/")
        or Path(given).suffix in _KINDS
        or ("." in given and "/" not in given)
    )


def _missing_path(path: Path, given: str) -> str:
    if path.suffix and path.suffix not in _KINDS:
        return f"`{given}` does not exist, and `{path.suffix}` is not a known kind of data. Known: {', '.join(_KINDS)}."
    if not path.parent.is_dir():
        return f"`{given}` does not exist: there is no directory `{path.parent}`. Check the path."
    there = sorted(entry.name for entry in path.parent.iterdir())
    return (
        f"`{given}` does not exist.{did_you_mean(path.name, there)} Paths are relative to the working directory "
        f"({Path.cwd()}); a Hub data set is named owner/name."
    )
