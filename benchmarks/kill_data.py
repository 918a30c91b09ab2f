"""The data of `kill_50.py`: every way in which rows reach a run, small enough to be read in seconds.

    unpacked       rows of a file, shuffled
    packed         the same in packs, tokenised by background processes into the token cache, one loader worker
    streamed       a stream of rows, packed as it comes, two loader workers
    stream_rows    the same unpacked, with the place in the stream kept by each worker
    mixed          two sets of different weights, two loader workers
    shared_prefix  several questions on one text, stored once in a pack

`write_data` writes all files; `sections` returns what a recipe says of one kind. The caches are those of one run, so
that a kill can find the token cache half written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KINDS = ("unpacked", "packed", "streamed", "stream_rows", "mixed", "shared_prefix")
TOKENISING = ("packed", "shared_prefix")
"""Kinds that fill the token cache."""

_LLM = "nemo_automodel.components.datasets.llm"
_SQUAD = f"{_LLM}.squad.make_squad_dataset"
_TABLE = f"{_LLM}.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset"
_STREAM = f"{_LLM}.column_mapped_text_instruction_iterable_dataset.ColumnMappedTextInstructionIterableDataset"
_COLUMNS = {"question": "q", "answer": "a"}
_NUM_TABLE_ROWS = 67
_NUM_LONG_ROWS = 1500
"""Enough for several pieces of the background processes, so that the cache is half full for a while."""
_PACK = {"packed_sequence_size": 160}


def write_data(work: Path, num_rows: int) -> None:
    """Write the files of every kind below ``work``."""
    from support.tiny import write_squad

    write_squad(work / "squad", num_train=num_rows, num_validation=24)
    write_squad(work / "long", num_train=_NUM_LONG_ROWS, num_validation=24)
    _write_questions(work / "questions")
    rows = ({"q": f"question {i} " * (i % 5 + 1), "a": f"answer {i}"} for i in range(_NUM_TABLE_ROWS))
    (work / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_questions(directory: Path) -> None:
    """Write texts with four questions each, one after the other as in SQuAD."""
    directory.mkdir()
    with (directory / "train.jsonl").open("w") as file:
        for text in range(_NUM_LONG_ROWS // 4):
            context = f"Tower {text} was built in {1000 + text} and it is {text % 90 + 10} metres high."
            for number, answer in enumerate((str(1000 + text), str(text % 90 + 10), "a tower", f"Tower {text}")):
                row = {
                    "id": f"{text}-{number}",
                    "title": "Towers",
                    "context": context,
                    "question": f"What is answer {number}?",
                    "answers": {"text": [answer], "answer_start": [0]},
                }
                file.write(json.dumps(row) + "\n")


def sections(kind: str, work: Path, workers: int | None) -> dict[str, Any]:
    """Return ``dataset``, ``dataloader`` and maybe ``packed_sequence``; ``workers`` None: as many as the kind has."""
    squad = {"_target_": _SQUAD, "dataset_name": str(work / "squad"), "split": "train"}
    table = {"_target_": _TABLE, "path_or_dataset_id": str(work / "table.jsonl"), "column_mapping": _COLUMNS}
    dataset: dict[str, Any] = squad
    packed: dict[str, Any] | None = None
    own_workers = 0
    if kind == "packed":
        dataset, packed, own_workers = {**squad, "dataset_name": str(work / "long")}, _PACK, 1
    elif kind == "streamed":
        dataset, packed, own_workers = {**table, "_target_": _STREAM}, _PACK, 2
    elif kind == "stream_rows":
        dataset, own_workers = {**table, "_target_": _STREAM}, 2
    elif kind == "mixed":
        dataset, own_workers = {"mix": [{"dataset": squad, "weight": 3.0}, {"dataset": table}]}, 2
    elif kind == "shared_prefix":
        dataset = {**squad, "dataset_name": str(work / "questions")}
        packed = {**_PACK, "share_prefix": True}
    num_workers = own_workers if workers is None else workers
    found: dict[str, Any] = {"dataset": dataset, "dataloader": {"num_workers": num_workers}}
    if kind != "mixed":
        found["dataloader"]["shuffle"] = True
    if packed is not None:
        found["packed_sequence"] = packed
    return found
