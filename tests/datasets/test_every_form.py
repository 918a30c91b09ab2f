"""Every builder reads every form of data, map-style and streamed, and gives the same samples."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.tiny import make_tokenizer
from support.tool_templates import HERMES
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets import hub
from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.llm.agent_chat import make_agent_chat_dataset
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset import (
    ColumnMappedTextInstructionIterableDataset,
)
from nemo_automodel.components.datasets.llm.hellaswag import HellaSwag
from nemo_automodel.components.datasets.llm.sample_stream import HubSampleStream
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.llm.xlam import make_xlam_dataset
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.mix import MixedSet
from nemo_automodel.components.datasets.mix_stream import MixedStream, mix
from nemo_automodel.shared.errors import UserError

NUM_ROWS = 7
MAPPING = {"question": "q", "answer": "a"}


def _chat(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Where is {i}?"}, {"role": "assistant", "content": f"In {i}."}]}


def _sharegpt(i: int) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": f"Where is {i}?"}, {"from": "gpt", "value": f"In {i}."}]}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "squad": lambda i: {"context": f"The tower {i}.", "question": "Where?", "answers": {"text": [f"Paris {i}"]}},
    "hellaswag": lambda i: {"ctx": f"The fox {i}", "endings": ["jumps.", f"is {i}."], "label": str(i % 2)},
    "columns": lambda i: {"q": f"Question {i}", "a": f"Answer {i}"},
    "columns_iterable": lambda i: {"q": f"Question {i}", "a": f"Answer {i}"},
    "chat": _chat,
    "sharegpt": _sharegpt,
    "agent": _chat,
    "xlam": lambda i: {
        "query": f"Where is {i}?",
        "tools": json.dumps([{"name": "find", "description": "Find.", "parameters": {"x": {"type": "str"}}}]),
        "answers": json.dumps([{"name": "find", "arguments": {"x": str(i)}}]),
    },
}


def build(builder: str, path: str, split: str = "train", **options) -> Any:
    """Call a builder with a Hub name or anything local."""
    plain, chat = make_tokenizer(), make_tokenizer(HERMES)
    if builder == "squad":
        return make_squad_dataset(plain, dataset_name=path, split=split, **options)
    if builder == "hellaswag":
        return HellaSwag(path, plain, split=split, **{"pad_to_max_length": False, **options})
    if builder == "columns":
        return ColumnMappedTextInstructionDataset(path, MAPPING, plain, split=split, **options)
    if builder == "columns_iterable":
        options.pop("streaming", None)
        return ColumnMappedTextInstructionIterableDataset(
            path, MAPPING, plain, split=split, repeat_on_exhaustion=False, **options
        )
    if builder in ("chat", "sharegpt"):
        return ChatDataset(path, chat, split=split, **options)
    if builder == "agent":
        return make_agent_chat_dataset(chat, dataset_name=path, split=split, **options)
    return make_xlam_dataset(chat, dataset_name=path, split=split, **options)


def rows_of(builder: str, start: int = 0) -> list[dict[str, Any]]:
    return [ROWS[builder](i) for i in range(start, start + NUM_ROWS)]


def write(form: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """Write rows in a form and return what a user would name."""
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows)
    if form in ("jsonl", "directory", "glob"):
        half = len(rows) // 2
        parts = {"train": rows} if form == "jsonl" else {"train-0": rows[:half], "train-1": rows[half:]}
        for name, part in parts.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        if form == "directory":
            (folder / "validation.jsonl").write_text(json.dumps({"unlike": "train"}) + "\n")
        return {"jsonl": str(folder / "train.jsonl"), "directory": str(folder), "glob": str(folder / "train-*.jsonl")}[
            form
        ]
    if form == "json":
        (folder / "train.json").write_text(json.dumps(rows))
    elif form == "csv":
        with (folder / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    elif form == "parquet":
        table.to_parquet(folder / "train.parquet")
    elif form == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(folder / "train.arrow"), features=table.features) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    elif form == "saved":
        table.save_to_disk(folder / "saved")
        return str(folder / "saved")
    return str(next(folder.glob("train.*")))


def listed(dataset: Any) -> list[dict[str, Any]]:
    return list(dataset) if isinstance(dataset, IterableDataset) else [dataset[i] for i in range(len(dataset))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "arrow", "saved", "directory", "glob"])
@pytest.mark.parametrize("builder", list(ROWS))
def test_every_builder_reads_every_form(builder, form, tmp_path):
    rows = rows_of(builder)
    expected = listed(build(builder, write("jsonl", rows, tmp_path / "jsonl")))
    assert len(expected) == NUM_ROWS
    assert len({tuple(sample["input_ids"]) for sample in expected}) == NUM_ROWS
    path = write(form, rows, tmp_path / form)
    assert listed(build(builder, path)) == expected
    assert listed(build(builder, path, split="train[2:5]")) == expected[2:5]
    streamed = build(builder, path, streaming=True)
    assert isinstance(streamed, IterableDataset)
    assert listed(streamed) == expected


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Return a function that puts rows in files where `owner/name` finds them, through `datasets` itself."""
    load_dataset, folders = datasets.load_dataset, {}

    def load(name, config=None, **options):
        options.pop("revision", None)
        return load_dataset(str(folders[name]), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)

    def put(name: str, builder: str, num_files: int = 3, start: int = 0) -> list[dict[str, Any]]:
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        rows = [ROWS[builder](i) for i in range(start, start + NUM_ROWS * num_files)]
        for number in range(num_files):
            part = datasets.Dataset.from_list(rows[number * NUM_ROWS : (number + 1) * NUM_ROWS])
            part.to_parquet(folders[name] / f"train-{number:05d}-of-{num_files:05d}.parquet")
        return rows

    return put


@pytest.mark.parametrize("builder", list(ROWS))
def test_every_builder_reads_and_streams_the_hub(builder, on_the_hub, tmp_path):
    rows = on_the_hub("owner/data", builder)
    expected = listed(build(builder, write("jsonl", rows, tmp_path / "local")))
    assert listed(build(builder, "owner/data")) == expected
    streamed = build(builder, "owner/data", streaming=True)
    assert isinstance(streamed, HubSampleStream)
    assert listed(streamed) == listed(streamed) == expected
    assert listed(build(builder, "owner/data", streaming=True, split="train[2:9]+train[:1]")) == [
        *expected[2:9],
        expected[0],
    ]


def hub_loader(size: int = 2, **options):
    return build_dataloader(
        build("columns", "owner/data", streaming=True),
        DataloaderConfig(shuffle_buffer_size=5, **options),
        local_batch_size=size,
        collate_fn=lambda samples: [tuple(sample["input_ids"]) for sample in samples],
        seed=3,
        is_training=True,
    )


def epoch(loader, number: int = 0) -> list:
    loader.set_epoch(number)
    return list(itertools.chain.from_iterable(loader))


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_workers": 2}])
def test_a_stream_of_the_hub_resumes_anywhere(on_the_hub, options):
    on_the_hub("owner/data", "columns")
    in_order = [tuple(sample["input_ids"]) for sample in build("columns", "owner/data")]
    whole = [epoch(hub_loader(**options), number) for number in range(2)]
    assert sorted(whole[0]) == sorted(whole[1]) == sorted(in_order)
    assert (whole[0] == in_order) == (options == {"shuffle": False})
    assert (whole[0] == whole[1]) == (options == {"shuffle": False})
    loader = hub_loader(**options)
    for number in range(2):
        loader.set_epoch(number)
        done = []
        for step, batch in enumerate(loader):
            done += batch
            if step % (4 if options else 2) == 0:
                resumed = hub_loader(**options)
                resumed.load_state_dict(loader.state_dict())
                assert done + epoch(resumed, number) == whole[number]
                assert epoch(resumed, 1 - number) == whole[1 - number]


def test_blocks_are_shuffled_one_by_one(on_the_hub):
    on_the_hub("owner/data", "columns")
    in_order = [tuple(sample["input_ids"]) for sample in build("columns", "owner/data")]
    places = [in_order.index(row) for row in epoch(hub_loader())]
    assert [sorted(places[start : start + 5]) for start in range(0, 20, 5)] == [
        list(range(start, start + 5)) for start in range(0, 20, 5)
    ]


@pytest.mark.parametrize("replicas", [2, 3])
def test_ranks_share_a_stream_of_the_hub(on_the_hub, replicas):
    on_the_hub("owner/data", "columns")
    whole = [tuple(sample["input_ids"]) for sample in build("columns", "owner/data")]
    shares = []
    for replica in range(replicas):
        stream = build("columns", "owner/data", streaming=True)
        stream.configure(None, replicas, replica)
        shares.append([tuple(sample["input_ids"]) for sample in stream])
    assert sorted(itertools.chain(*shares)) == sorted(whole)


def test_a_stream_of_the_hub_in_a_mixture(on_the_hub, tmp_path):
    on_the_hub("owner/data", "columns")
    local = write("jsonl", [ROWS["columns"](i) for i in range(100, 140)], tmp_path / "local")

    def make():
        sets = [
            MixedSet(build("columns", "owner/data", streaming=True), 2.0, "hub"),
            MixedSet(build("columns", local), 1.0, "local"),
        ]
        return mix(sets, "first_exhausted", seed=4)

    dataset = make()
    assert isinstance(dataset, MixedStream)
    whole = listed(dataset)
    hub_rows = {tuple(sample["input_ids"]) for sample in build("columns", "owner/data")}
    from_hub = [tuple(sample["input_ids"]) in hub_rows for sample in whole]
    assert from_hub.count(True) == len(hub_rows)
    assert from_hub.count(False) == pytest.approx(len(hub_rows) / 2, abs=1.5)
    stream = iter(dataset)
    for done in range(1, len(whole)):
        next(stream)
        resumed = make()
        resumed.load_state_dict(dataset.state_dict())
        assert listed(resumed) == whole[done:]


def test_filters_of_a_stream(on_the_hub, monkeypatch):
    rows = on_the_hub("owner/data", "agent")
    assert len(rows) == 21
    lengths = [len(sample["input_ids"]) for sample in build("agent", "owner/data")]
    limit = sorted(lengths)[5]
    kept = [n for n in lengths if n <= limit]
    assert 0 < len(kept) < len(lengths)
    streamed = build("agent", "owner/data", streaming=True, filter_overlong=True, seq_length=limit)
    assert [len(sample["input_ids"]) for sample in streamed] == kept


def test_mistakes_in_streamed_rows_name_the_place(on_the_hub, monkeypatch, tmp_path):
    rows = [*rows_of("columns"), {"q": "Question", "a": ""}]
    path = write("jsonl", rows, tmp_path / "local")
    with pytest.raises(UserError, match=r"train.jsonl line 8: the answer is empty"):
        listed(build("columns", path, streaming=True))
    monkeypatch.setitem(ROWS, "columns", lambda i: {"q": "Q", "a": "" if i == 12 else "A"})
    on_the_hub("owner/data", "columns")
    with pytest.raises(UserError, match=r"owner/data stream, block of rows from 1, row 13: the answer is empty"):
        listed(build("columns", "owner/data", streaming=True))


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        (
            "columns",
            {"split": "train[:10%]"},
            "`split: train[:10%]` needs the number of rows, which a stream does not know. Use whole numbers from the "
            "start, such as train[1000:2000].",
        ),
        ("columns", {"split": "train[-3:]"}, "`split: train[-3:]` needs the number of rows"),
        (
            "columns",
            {"split": "train[50:60]"},
            "`owner/data` has no row there. Choose another split, or a larger slice.",
        ),
        ("chat", {"shuffle_seed": 1}, "`dataset.shuffle_seed` shuffles a whole split, which a stream does not know."),
        (
            "hellaswag",
            {"pad_to_max_length": True},
            "`dataset.pad_to_max_length: true` needs the longest row of the set",
        ),
    ],
)
def test_what_a_stream_of_the_hub_cannot_do(on_the_hub, builder, options, message):
    on_the_hub("owner/data", builder)
    with pytest.raises(UserError) as caught:
        build(builder, "owner/data", streaming=True, **options)
    assert message in str(caught.value)


def test_only_streams_repeat(on_the_hub):
    on_the_hub("owner/data", "columns")
    forever = build("columns", "owner/data", streaming=True, repeat_on_exhaustion=True)
    assert len(list(itertools.islice(forever, 50))) == 50
    with pytest.raises(UserError, match=r"`dataset.repeat_on_exhaustion: true` is for streams"):
        build("columns", "owner/data", repeat_on_exhaustion=True)
    assert hub.stream_hub_splits("owner/data", ["train"], None)[0].num_shards == 3
