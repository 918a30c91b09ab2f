"""Files, directories, globs, splits and slices; and the one line each mistake gives."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import datasets
import pytest

from nemo_automodel.components.datasets.sources import load_rows, parse_split
from nemo_automodel.shared.errors import UserError

ROWS = [{"q": f"question {i}", "a": f"answer {i}", "n": i} for i in range(10)]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def numbers(rows) -> list[int]:
    return [int(row["n"]) for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str):
    rows = load_rows(write(tmp_path / f"data{suffix}"))
    assert rows.column_names == ["q", "a", "n"]
    assert numbers(rows) == list(range(10))
    assert rows[-1]["a"] == "answer 9"
    assert {str(value) for value in rows[3].values()} == {"question 3", "answer 3", "3"}
    assert numbers(rows[2:4]) == [2, 3]
    assert numbers(rows.select([5, 1])) == [5, 1]
    assert f"data{suffix}" in rows.where(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"data{suffix}"], "nothing is written beside the data"


def test_arrow_files_and_saved_data_sets(tmp_path: Path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "saved"))
    assert numbers(load_rows(tmp_path / "saved")) == list(range(10))
    assert numbers(load_rows(next((tmp_path / "saved").glob("*.arrow")))) == list(range(10))
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "both"))
    assert numbers(load_rows(tmp_path / "both", "test")) == [0, 1, 2]


def test_rows_stay_as_they_were_written(tmp_path: Path):
    written = [{"m": [{"role": "user", "content": "x"}]}, {"m": [{"role": "tool", "id": "7", "content": ["a", 1]}]}]
    rows = load_rows(write(tmp_path / "data.jsonl", written))
    assert list(rows) == written, "no key may be added to fill a table"
    assert rows.where(1) == f"{tmp_path}/data.jsonl line 2"
    texts = [{"a": "007", "b": "NA"}, {"a": "", "b": 'with "quotes",\nand a line'}]
    assert list(load_rows(write(tmp_path / "data.csv", texts))) == texts


def test_blank_lines_and_byte_order_marks(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\n  \n{"n": 1}')
    rows = load_rows(path)
    assert numbers(rows) == [0, 1]
    assert rows.where(1).endswith("line 4")


def test_rows_travel_to_workers(tmp_path: Path):
    rows = pickle.loads(pickle.dumps(load_rows(write(tmp_path / "data.jsonl"))))
    assert numbers(rows) == list(range(10))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[7:]", range(7, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[:30%]", range(3)),
        ("train[75%:]", range(8, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:-8]", range(2)),
        ("train[:500]", range(10)),
        ("train[:]", range(10)),
        ("train[8:]+train[:1]", [8, 9, 0]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_slices(tmp_path: Path, split: str, expected, suffix: str):
    assert numbers(load_rows(write(tmp_path / f"train{suffix}"), split)) == list(expected)


def test_limit(tmp_path: Path, caplog):
    path = write(tmp_path / "train.jsonl")
    assert numbers(load_rows(path, limit=4)) == [0, 1, 2, 3]
    assert numbers(load_rows(path, limit=400)) == list(range(10))
    assert numbers(load_rows(path, "train[5:]", limit=2)) == [5, 6, 7, 8, 9]
    assert "limit of 2 rows is not applied" in caplog.text
    with pytest.raises(UserError, match="limit of rows is 0"):
        load_rows(path, limit=0)


LAYOUTS = {
    "names": {"train.jsonl": "train", "validation.parquet": "validation", "test.csv": "test"},
    "synonyms": {"my_train_set.jsonl": "train", "dev.jsonl": "validation", "eval.jsonl": "test"},
    "directories": {"train/a.jsonl": "train", "val/a.jsonl": "validation", "test/deep/a.jsonl": "test"},
    "shards": {
        "data/train-00000-of-00002.jsonl": "train",
        "data/train-00001-of-00002.jsonl": "train",
        "data/valid-00000-of-00001.jsonl": "validation",
        "data/test-00000-of-00001.jsonl": "test",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directories_with_splits(tmp_path: Path, layout: str):
    expected: dict[str, list[int]] = {}
    for number, (name, split) in enumerate(LAYOUTS[layout].items()):
        write(tmp_path / name, [{"n": number}])
        expected.setdefault(split, []).append(number)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.jsonl", [{"n": 99}])
    for split, there in expected.items():
        assert numbers(load_rows(tmp_path, split)) == there
    assert numbers(load_rows(tmp_path, "dev")) == expected["validation"], "a synonym may be asked for, too"
    assert numbers(load_rows(tmp_path, "train+test")) == expected["train"] + expected["test"]
    with pytest.raises(UserError, match=r"has several splits; name one. Splits there: train, validation, test"):
        load_rows(tmp_path, None)
    with pytest.raises(UserError, match=r"has no split `trian`. Did you mean `train`\? Splits there: "):
        load_rows(tmp_path, "trian")


def test_a_directory_without_split_names(tmp_path: Path):
    write(tmp_path / "chat.jsonl", [{"n": 1}])
    write(tmp_path / "code.jsonl", [{"n": 2}])
    assert numbers(load_rows(tmp_path)) == [1, 2]
    assert numbers(load_rows(tmp_path, "code+chat")) == [2, 1]
    with pytest.raises(UserError, match=r"has no split `validation`. Splits there: train, chat, code"):
        load_rows(tmp_path, "validation")


def test_configurations_are_subdirectories(tmp_path: Path):
    write(tmp_path / "en" / "train.jsonl", [{"n": 1}])
    write(tmp_path / "ko" / "train.jsonl", [{"n": 2}])
    assert numbers(load_rows(tmp_path, name="ko")) == [2]
    with pytest.raises(
        UserError, match=r"`name: koo` is not a directory in .* Did you mean `ko`\? Directories there: en, ko"
    ):
        load_rows(tmp_path, name="koo")
    with pytest.raises(UserError, match="`name: ko` is for Hub data sets and directories"):
        load_rows(tmp_path / "en" / "train.jsonl", name="ko")


def test_globs(tmp_path: Path):
    for number in range(3):
        write(tmp_path / f"part{number}.jsonl", [{"n": number}])
    assert numbers(load_rows(f"{tmp_path}/part*.jsonl")) == [0, 1, 2]
    assert numbers(load_rows(f"{tmp_path}/part[12].jsonl", "validation")) == [1, 2]
    with pytest.raises(UserError, match="matches no data file"):
        load_rows(f"{tmp_path}/*.parquet")
    write(tmp_path / "x_train.jsonl", [{"n": 7}])
    write(tmp_path / "x_test.jsonl", [{"n": 8}])
    assert numbers(load_rows(f"{tmp_path}/x_*.jsonl", "test")) == [8]


def test_a_file_of_one_split_is_not_taken_for_another(tmp_path: Path):
    path = write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"has no split `validation`. Splits there: train"):
        load_rows(path, "validation")
    other = write(tmp_path / "validation.jsonl")
    assert len(load_rows(other, "train")) == len(load_rows(other, "validation")) == len(load_rows(other, None)) == 10
    assert len(load_rows(write(tmp_path / "rows.jsonl"), "validation")) == 10


def test_words_in_directories_above_the_data_do_not_count(tmp_path: Path):
    write(tmp_path / "test" / "rows.jsonl")
    assert len(load_rows(tmp_path / "test" / "rows.jsonl")) == 10
    assert len(load_rows(tmp_path / "test")) == 10
    assert len(load_rows(f"{tmp_path}/test/*.jsonl", "validation")) == 10


def test_shuffle_seed_is_the_same_order_every_time(tmp_path: Path):
    path = write(tmp_path / "train.jsonl")
    first = numbers(load_rows(path, shuffle_seed=1))
    assert first == numbers(load_rows(path, shuffle_seed=1))
    assert sorted(first) == list(range(10))
    assert first != list(range(10))
    assert first != numbers(load_rows(path, shuffle_seed=2))


# more kinds of what test_bad_data.py lists
BAD_FILES = {
    "malformed json": (
        "data.json",
        b'[{"a": 1},\n {"a": }]',
        "data.json line 2: not valid JSON: Expecting value at column 8",
    ),
    "json lines named json": ("data.json", b'{"a": 1}\n{"a" 1}\n', "data.json line 2: not valid JSON"),
    "one object": ("data.json", b'{"data": [{"a": 1}]}', "data.json holds an object, but rows must be a list"),
    "list of text": ("data.json", b'[{"a": 1}, "x"]', "data.json row 2 is text, but a row must be an object."),
    "utf-16": ("data.jsonl", '{"a": 1}\n'.encode("utf-16"), "data.jsonl line 1: byte 0xff is not UTF-8 text."),
    "csv encoding": ("data.csv", b"a\ncaf\xe9\n", "data.csv is not UTF-8 text."),
    "blank": ("data.jsonl", b"\n\n", "data.jsonl is empty. It must hold at least one row."),
    "empty json": ("data.json", b"[]", "data.json is empty."),
    "empty json file": ("data.json", b"", "data.json is empty."),
    "header only": ("data.csv", b"a,b\n", "data.csv is empty."),
    "quote": ("data.csv", b'a,b\n"x"y,2\n', "data.csv line 2: not valid CSV"),
    "not parquet": ("data.parquet", b"PAR0 no", "data.parquet is not a readable parquet file: "),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_rows(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_selected_lines_are_checked(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text('{"n": 0}\n{"n": 1}\n{broken\n')
    assert numbers(load_rows(tmp_path / "data.jsonl", "train[:2]")) == [0, 1]
    with pytest.raises(UserError, match="line 3"):
        load_rows(tmp_path / "data.jsonl")
    assert numbers(load_rows(tmp_path / "data.jsonl", skip_invalid=True)) == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("./trian.jsonl", "`./trian.jsonl` does not exist. Did you mean `train.jsonl`? Paths are relative to"),
        ("train.jsnl", "`train.jsnl` does not exist, and `.jsnl` is not a known kind"),
        ("./train.xlsx", "`./train.xlsx` does not exist, and `.xlsx` is not a known kind of data. Known: .jsonl"),
        (
            "nowhere/deep/train.jsonl",
            "`nowhere/deep/train.jsonl` does not exist: there is no directory `nowhere/deep`.",
        ),
        ("s3://bucket/train", "does not exist"),
        ("a b", "`a b` is neither a path that exists nor a Hub data set (owner/name)."),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str):
    write(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_rows(given)
    assert message in str(caught.value)


def test_other_mistakes(tmp_path: Path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"split `train\[20:\]`, selects no row: train has 10 rows"):
        load_rows(tmp_path, "train[20:]")
    with pytest.raises(UserError, match=r"`split: train\[1:2:3\]` cannot be read"):
        load_rows(tmp_path, "train[1:2:3]")
    write(tmp_path / "train.csv")
    with pytest.raises(UserError, match="holds the split as csv and jsonl files"):
        load_rows(tmp_path)
    with pytest.raises(UserError, match=r"no column `question`. Did you mean .* Its columns: question_, q \("):
        load_rows(write(tmp_path / "c.jsonl", [{"question_": 1}, {"q": 2}])).require_columns("question")


def test_parse_split():
    assert parse_split("train[64:10%] + my-split.1") == [("train", "64", "10%"), ("my-split.1", None, None)]
