"""The token cache: whatever happened to it, and whoever made the tokens, a row is what the data set says it is."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from support.tiny import make_tokenizer

from nemo_automodel.components.datasets import tokenize_workers
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.content_key import key_of_dataset
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.hellaswag import HellaSwag
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.mix import MixedRows, MixedSet
from nemo_automodel.components.datasets.packed_rows import PackedRows, pack_dataset
from nemo_automodel.components.datasets.rows import Rows
from nemo_automodel.shared.errors import UserError

MAPPING = {"question": "q", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    """Make several chunks of a few rows."""
    monkeypatch.setattr(tokenize_workers, "_FIRST_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(tokenize_workers, "_ROWS_AT_ONCE", 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path: Path, write_jsonl) -> Path:
    rows = [{"q": "what is " + "so " * (i % 9), "a": f"answer {i}"} for i in range(130)]
    return write_jsonl(tmp_path / "train.jsonl", rows)


def rows_of(data: Path, **options) -> ColumnMappedTextInstructionDataset:
    return ColumnMappedTextInstructionDataset(str(data), MAPPING, make_tokenizer(), **options)


def pack(dataset, shuffle: bool = True, seed: int = 3, **options) -> PackedRows:
    config = PackedSequenceConfig(**{"packed_sequence_size": 128, "num_proc": 2, **options})
    return pack_dataset(dataset, config, pad_token_id=0, seed=seed, shuffle=shuffle)


def everything(packed: PackedRows) -> list[dict]:
    return [packed[i] for i in range(len(packed))]


def plain(dataset: TokenizedRows, shuffle: bool = True, seed: int = 3, **options) -> list[dict]:
    """The same packs from samples that the data set made itself, one by one."""
    return everything(pack([dataset[i] for i in range(len(dataset))], shuffle, seed, **options))


def chunks(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.chunk"))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of the cache, without the directory."""
    found = [message for message in caplog.messages if "oken cache" in message]
    caplog.clear()
    return [re.sub(r"/\S+/([0-9a-f]+/)?[0-9a-f]+(\.chunk)?", "DIR", message) for message in found]


@pytest.mark.parametrize("strategy", ["thd", "best_fit", "neat"])
@pytest.mark.parametrize("num_proc", [1, 3])
def test_cold_and_warm_are_what_the_data_set_says(data, cache, caplog, strategy: str, num_proc: int):
    caplog.set_level(logging.INFO)
    expected = plain(rows_of(data), packing_strategy=strategy)
    assert everything(pack(rows_of(data), packing_strategy=strategy, num_proc=num_proc)) == expected
    assert told(caplog) == ["Token cache DIR has none of the 130 rows."]
    assert len(chunks(cache)) == 8 + 4
    assert list(cache.rglob("*.tmp")) == []
    before = [path.stat().st_mtime_ns for path in chunks(cache)]
    assert everything(pack(rows_of(data), packing_strategy=strategy)) == expected
    assert told(caplog) == ["Token cache DIR has all of the 130 rows."]
    assert [path.stat().st_mtime_ns for path in chunks(cache)] == before


def test_other_orders_and_sizes_use_the_same_tokens(data, cache):
    everything(pack(rows_of(data)))
    made = chunks(cache)
    for options in ({"seed": 9}, {"shuffle": False}, {"packed_sequence_size": 300}):
        assert everything(pack(rows_of(data), **options)) == plain(rows_of(data), **options)
    assert chunks(cache) == made


def test_without_the_cache_nothing_is_left(data, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "private"))
    (tmp_path / "private").mkdir()
    packed = pack(rows_of(data), cache=False)
    assert everything(packed) == plain(rows_of(data))
    assert len(list((tmp_path / "private").rglob("*.chunk"))) == 12
    del packed
    assert list((tmp_path / "private").iterdir()) == []
    assert not cache.exists()


def test_the_cache_may_be_elsewhere(data, cache, tmp_path):
    everything(pack(rows_of(data), cache=str(tmp_path / "mine")))
    assert len(chunks(tmp_path / "mine")) == 12
    assert not cache.exists()


def test_a_directory_that_cannot_be_written(data, cache, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    assert everything(pack(rows_of(data), cache=str(tmp_path / "file"))) == plain(rows_of(data))
    assert "Set `packed_sequence.cache` to another directory, or to false." in caplog.text
    assert "(Not a directory), so rows are tokenised for this run only" in caplog.text


def damage(kind: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    elif kind == "truncated":
        del content[-8:]
    elif kind == "empty":
        content.clear()
    elif kind == "header":
        content[30] ^= 4
    elif kind == "other":
        content = bytearray(b"something else entirely, of a length that is a multiple of four")
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "header", "other"])
def test_a_damaged_chunk_is_made_anew(data, cache, caplog, kind: str):
    caplog.set_level(logging.WARNING)
    expected = everything(pack(rows_of(data)))
    before = {path.name: path.read_bytes() for path in chunks(cache)}
    damage(kind, chunks(cache)[3])
    caplog.clear()
    assert everything(pack(rows_of(data))) == expected
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (message,) = messages
    assert re.fullmatch(r"The token cache's file \S+\.chunk is damaged\. Its rows are tokenised again\.", message)
    after = {path.name: path.read_bytes() for path in chunks(cache)}
    assert [after.get(name) == content for name, content in before.items()].count(False) <= 1, "only that one"
    caplog.clear()
    assert everything(pack(rows_of(data))) == expected
    assert caplog.messages == []


def test_a_chunk_of_another_set_is_not_believed(data, cache, tmp_path, write_jsonl):
    other = write_jsonl(tmp_path / "other.jsonl", [{"q": "who is it", "a": f"other {i}"} for i in range(130)])
    expected = everything(pack(rows_of(data)))
    foreign = pack(rows_of(other))
    everything(foreign)
    ours, theirs = (next(cache.joinpath(key_of_dataset(rows_of(path))).glob("*.chunk")) for path in (data, other))
    ours.write_bytes(theirs.read_bytes())
    assert everything(pack(rows_of(data))) == expected


def run_elsewhere(function: Callable[[], object], out: Path | None = None) -> multiprocessing.Process:
    """Call a function in a process of its own and write what it returns into a file."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        result = function()
        if out is not None:
            out.write_text(json.dumps(result))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every chunk take a while."""
    encode = ColumnMappedTextInstructionDataset.encode

    def later(self, rows):
        time.sleep(0.1)
        return encode(self, rows)

    monkeypatch.setattr(ColumnMappedTextInstructionDataset, "encode", later)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_there", [0, 1, 4, 9])
def test_a_killed_writer_leaves_what_it_made(data, cache, caplog, slow, num_there: int):
    caplog.set_level(logging.INFO)
    process = run_elsewhere(lambda: everything(pack(rows_of(data))))
    place = cache / key_of_dataset(rows_of(data))
    while len(chunks(cache)) < num_there or not place.exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    (place / "half.1.tmp").write_bytes(b"half")  # what a write that is interrupted leaves behind
    assert everything(pack(rows_of(data))) == plain(rows_of(data))
    (line,) = told(caplog)
    found = re.fullmatch(r"Token cache DIR has (none|\d+) of the 130 rows\.", line)
    assert found is not None
    assert num_there * 7 <= (0 if found[1] == "none" else int(found[1])) < 130
    assert list(cache.rglob("*.tmp")) == []


def test_processes_of_one_host_share_the_work(data, cache, tmp_path, slow):
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [run_elsewhere(lambda: everything(pack(rows_of(data))), out) for out in outs]
    for process in processes:
        process.join()
    expected = plain(rows_of(data))
    assert [json.loads(out.read_text()) for out in outs] == [expected, expected]
    assert len(chunks(cache)) == 12, "each chunk was written once"


def test_a_reader_takes_over_from_a_writer_that_dies(data, cache, slow):
    writer = run_elsewhere(lambda: everything(pack(rows_of(data))))
    while len(chunks(cache)) < 2:
        time.sleep(0.001)
    packed = pack(rows_of(data))  # waits for the writer's rows
    writer.kill()
    assert everything(packed) == plain(rows_of(data))
    writer.join()


def test_no_process_is_left(data):
    others = set(multiprocessing.active_children())  # of tests before this one
    len(pack(rows_of(data)))
    assert set(multiprocessing.active_children()) <= others
    limited = pack(rows_of(data), cache=False, max_packs=1)
    assert len(limited) == 1
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_orphan_is_left(data, tmp_path, slow, how: signal.Signals):
    pids_file = tmp_path / "pids"

    def run() -> None:
        packed = pack(rows_of(data))
        pids = [process.pid for process in multiprocessing.active_children()]
        pids_file.with_suffix(".tmp").write_text(json.dumps(pids))
        pids_file.with_suffix(".tmp").rename(pids_file)
        everything(packed)

    process = run_elsewhere(run)
    while not pids_file.exists():
        time.sleep(0.001)
    pids = json.loads(pids_file.read_text())
    assert len(pids) == 2
    os.kill(process.pid, how)
    process.join()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if is_running(pid)] == []


def test_the_error_of_a_row_arrives_from_its_process(tmp_path, write_jsonl):
    rows = [{"q": "what", "a": f"answer {i}"} for i in range(90)]
    rows[70]["a"], rows[85]["a"] = " ", [1]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    message = f"{path} line 71: the answer is empty, so there is nothing to learn. Fill it or remove the row."
    for num_proc in (1, 2, 3):
        packed = pack(rows_of(path), shuffle=False, num_proc=num_proc)
        assert packed.at_least(1), "the rows before it can be trained on"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            len(packed)


def test_a_process_that_is_killed_is_told(data, monkeypatch):
    def encode(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ColumnMappedTextInstructionDataset, "encode", encode)
    with pytest.raises(UserError, match=r"was killed \(SIGKILL\), often because memory ran out. Lower "):
        pack(rows_of(data))


def test_a_defect_is_not_a_hang(data, monkeypatch, capfd):
    def encode(self, rows):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(ColumnMappedTextInstructionDataset, "encode", encode)
    with pytest.raises(RuntimeError, match="A process that tokenises rows failed"):
        pack(rows_of(data))
    assert "ZeroDivisionError: a defect" in capfd.readouterr().err


def test_a_full_disk_is_told(data, monkeypatch):
    def write(self, rows, tokenized):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenize_workers.TokenStore, "write", write)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device\. Make room, or name another"):
        pack(rows_of(data))


def test_rows_that_lose_their_answer_are_told_cold_and_warm(data, caplog):
    expected = None
    for _ in range(2):
        dataset = rows_of(data, seq_length=8, truncation=True)
        dataset.bears_unlearned = True
        packed = pack(dataset)
        len(packed)
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        expected = expected or lines
        assert lines == expected
        assert any("loses its whole answer and teaches nothing at `seq_length: 8`" in line for line in lines)
        reference = rows_of(data, seq_length=8, truncation=True)
        reference.bears_unlearned = True
        [reference[i] for i in range(len(reference))]
        caplog.clear()
        assert dataset.num_unlearned_rows == reference.num_unlearned_rows == packed.report.num_unlearned > 10
        assert dataset.num_cut_rows == reference.num_cut_rows


# --- what is in the key -----------------------------------------------------------------------------------------------


def keys(data: Path, tmp_path: Path, write_jsonl) -> dict[str, str | None]:
    """Keys of sets that all differ in something that shapes tokens."""
    from transformers import AddedToken

    other = write_jsonl(tmp_path / "b.jsonl", [json.loads(line) for line in data.read_text().splitlines()][:-1])
    found = {
        "plain": key_of_dataset(rows_of(data)),
        "one row less": key_of_dataset(rows_of(other)),
        "another selection": key_of_dataset(rows_of(data, split="train[1:]")),
        "another limit": key_of_dataset(rows_of(data, limit_dataset_samples=5)),
        "the prompt learned": key_of_dataset(rows_of(data, answer_only_loss_mask=False)),
        "cut": key_of_dataset(rows_of(data, seq_length=9, truncation=True)),
        "cut shorter": key_of_dataset(rows_of(data, seq_length=8, truncation=True)),
        "columns swapped": key_of_dataset(
            ColumnMappedTextInstructionDataset(str(data), {"question": "a", "answer": "q"}, make_tokenizer())
        ),
    }
    tokenizer = make_tokenizer()
    for name, change in {
        "a template": lambda: setattr(tokenizer, "chat_template", TEMPLATE),
        "another template": lambda: setattr(tokenizer, "chat_template", TEMPLATE + " "),
        "another token": lambda: tokenizer.add_tokens(["so so"]),
        "a special token": lambda: tokenizer.add_tokens([AddedToken("what", special=True)], special_tokens=True),
        "another eos": lambda: setattr(tokenizer, "eos_token", "so so"),
        "special tokens split": lambda: setattr(tokenizer, "split_special_tokens", True),
    }.items():
        change()
        found[name] = key_of_dataset(ColumnMappedTextInstructionDataset(str(data), MAPPING, tokenizer))
    return found


def test_whatever_shapes_tokens_is_in_the_key(data, tmp_path, write_jsonl):
    found = keys(data, tmp_path, write_jsonl)
    assert None not in found.values()
    assert len(set(found.values())) == len(found), found


def test_keys_are_the_same_in_another_process_and_place(data, tmp_path, write_jsonl):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    moved = write_jsonl(tmp_path / "elsewhere" / "moved.jsonl", lines)
    expected = key_of_dataset(rows_of(data))
    used = rows_of(data)
    used[0], used[1]
    assert key_of_dataset(used) == key_of_dataset(rows_of(moved)) == expected
    code = f"from test_token_cache import *; print(key_of_dataset(rows_of(Path({str(data)!r}))))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.stdout.decode().strip() == expected


def test_templates_that_write_the_day_are_keyed_by_it(tmp_path, write_jsonl, monkeypatch):
    from nemo_automodel.components.datasets import content_key

    path = write_jsonl(
        tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )

    def key(template: str, day: str) -> str | None:
        class Date(content_key.datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr(content_key.datetime, "date", Date)
        return key_of_dataset(ChatDataset(str(path), make_tokenizer(), chat_template=template))

    dated = "{{ strftime_now('%d') }}" + TEMPLATE
    assert key(TEMPLATE, "2026-01-01") == key(TEMPLATE, "2026-01-02") is not None
    assert key(dated, "2026-01-01") == key(dated, "2026-01-01") != key(dated, "2026-01-02")


def test_chats_and_tables_have_keys(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "c.jsonl", [CHAT])
    options = [{}, {"mask_history": True}, {"mask_reasoning_content": True}, {"skip_invalid_samples": True}]
    found = {key_of_dataset(ChatDataset(str(path), make_tokenizer(), chat_template=TEMPLATE, **o)) for o in options}
    assert len(found) == 4
    assert None not in found
    tables = []
    for answers in (["b", "c"], ["b", "d"]):
        table = Dataset.from_dict({"q": ["a", "a"], "a": answers})
        table.to_parquet(tmp_path / f"{answers[1]}.parquet")
        tables.append(key_of_dataset(rows_of(tmp_path / f"{answers[1]}.parquet")))
    assert tables[0] == key_of_dataset(rows_of(tmp_path / "c.parquet"))
    assert len({*tables, None}) == 3


def test_what_is_not_ours_has_no_key_and_is_not_kept(data, cache, caplog):
    caplog.set_level(logging.INFO)
    ours = rows_of(data)
    dataset = TokenizedRows(ours.rows, lambda row, where: ours._to_item(row, where), ours._encoder, ours.layout)
    assert key_of_dataset(dataset) is None
    assert everything(pack(dataset)) == plain(rows_of(data))
    assert not cache.exists()
    assert "The tokens of this data set are not cached: something in it has no name for its content." in caplog.text
    unknown = TokenizedRows(Rows.of([{"q": object()}]), ours._to_item, ours._encoder, ours.layout)
    assert key_of_dataset(unknown) is None


def test_a_subclass_of_the_users_is_asked_for_its_samples(data, cache):
    class Upside(ColumnMappedTextInstructionDataset):
        def __getitems__(self, indices):
            return [{**sample, "labels": sample["labels"][::-1]} for sample in super().__getitems__(indices)]

    dataset = Upside(str(data), MAPPING, make_tokenizer())
    assert everything(pack(dataset)) == plain(dataset) != plain(rows_of(data))
    assert not cache.exists()


def test_hellaswag_with_its_loss_mask(tmp_path, write_jsonl):
    rows = [{"ctx": "so " * (i % 5) + "what", "endings": ["a", f"b {i}"], "label": "1"} for i in range(30)]
    dataset = HellaSwag(str(write_jsonl(tmp_path / "train.jsonl", rows)), make_tokenizer())
    assert everything(pack(dataset)) == plain(dataset)


def test_mixtures_use_the_tokens_of_their_sets(data, cache, tmp_path, write_jsonl):
    other = write_jsonl(tmp_path / "other.jsonl", [{"q": "who", "a": f"other {i}"} for i in range(20)])

    def mixed() -> MixedRows:
        return MixedRows([MixedSet(rows_of(data), 1, "a"), MixedSet(rows_of(other), 1, "b")], "all_exhausted")

    reference = mixed()
    assert max(np.bincount(reference.row_numbers[reference.set_numbers == 1])) > 1, "rows come several times"
    expected = everything(pack([reference[i] for i in range(len(reference))], shuffle=False))
    assert everything(pack(mixed(), shuffle=False)) == expected
    made = chunks(cache)
    assert {path.parent.name for path in made} == {key_of_dataset(rows_of(data)), key_of_dataset(rows_of(other))}
    assert everything(pack(mixed(), shuffle=False)) == expected
    everything(pack(rows_of(data)))
    assert chunks(cache) == made
    len(pack(mixed(), shuffle=True))


def test_signals_of_the_terminal_do_not_reach_the_processes(data, slow):
    packed = pack(rows_of(data), cache=False)
    ours = [process for process in multiprocessing.active_children() if process.name.startswith("tokenize-")]
    assert ours
    for process in ours:
        while os.getpgid(process.pid) == os.getpgid(0):  # it has just been forked
            time.sleep(0.001)
    len(packed)
