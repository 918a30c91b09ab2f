"""Stores of the token cache that nobody has used for long are removed, and never one that somebody uses."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from support.tiny import make_tokenizer

from nemo_automodel.components.datasets.cache_expiry import hold_store, remove_unused
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.packed_rows import PackedRows, pack_dataset
from nemo_automodel.shared.errors import ConfigError

DAY_S = 86400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def store(root: Path, digit: str, days: float) -> Path:
    """Make a store of 1,000 bytes that was last used so many days ago."""
    directory = root / (digit * 32)
    directory.mkdir(parents=True)
    (directory / "a.chunk").write_bytes(bytes(600))
    (directory / "b.1.tmp").write_bytes(bytes(400))
    (directory / "lock").touch()
    (directory / "in_use").touch()
    age(directory, days)
    return directory


def age(directory: Path, days: float) -> None:
    used = time.time() - days * DAY_S
    for path in (directory / "in_use", directory):
        if path.exists():
            os.utime(path, (used, used))


def test_what_is_old_goes_and_is_told(root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    old, young = store(root, "a", 30.1), store(root, "b", 29.9)
    remove_unused(root, 30)
    assert sorted(root.iterdir()) == [young]
    assert not old.exists()
    assert caplog.messages == [f"Token cache {root}: removed 1 key with 0.000 GB that no run has used for 30 days."]
    caplog.clear()
    remove_unused(root, 30)
    assert caplog.messages == []


def test_stores_of_earlier_versions_go_by_the_time_of_their_directory(root: Path):
    old, young = store(root, "a", 3), store(root, "b", 1)
    for directory, days in ((old, 3), (young, 1)):
        (directory / "in_use").unlink()
        age(directory, days)
    remove_unused(root, 2)
    assert sorted(root.iterdir()) == [young]


def test_nothing_else_is_touched(root: Path):
    """The directory may be one of the user's own."""
    (root / "mine").mkdir(parents=True)
    (root / "file").write_text("mine")
    mixed = store(root, "c", 99)
    (mixed / "notes.txt").write_text("mine")
    age(mixed, 99)
    remove_unused(root, 1)
    assert sorted(path.name for path in root.iterdir()) == ["c" * 32, "file", "mine"]
    assert (mixed / "a.chunk").exists()


def test_what_a_killed_process_moved_away_goes(root: Path):
    left = store(root, "a", 0)
    left.rename(left.with_name(f"{left.name}.17.removed"))
    remove_unused(root, 30)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("by", ["holder", "writer of an earlier version", "a process forked from the holder"])
def test_a_store_in_use_stays_however_old(root: Path, by: str):
    directory = store(root, "a", 99)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def use() -> None:
        import fcntl

        if by == "writer of an earlier version":
            file = (directory / "lock").open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            file = hold_store(directory)
        age(directory, 99)
        if by.startswith("a process forked") and os.fork():
            os._exit(0)  # the child goes on
        ready.set()
        done.wait(30)
        assert file is not None
        os._exit(0)

    process = context.Process(target=use)
    process.start()
    assert ready.wait(30)
    remove_unused(root, 1)
    assert (directory / "a.chunk").exists()
    done.set()
    process.join()
    deadline = time.monotonic() + 10
    while directory.exists() and time.monotonic() < deadline:  # the forked one takes a moment to end
        remove_unused(root, 1)
    assert not directory.exists()


def test_opening_makes_it_young_and_survives_a_removal(root: Path):
    directory = store(root, "a", 99)
    first = hold_store(directory)
    first.close()
    remove_unused(root, 1)
    assert (directory / "a.chunk").exists()
    age(directory, 99)
    remove_unused(root, 1)
    file = hold_store(directory)  # made anew
    assert (directory / "in_use").exists()
    file.close()


def test_a_run_removes_what_others_left(tmp_path: Path, root: Path, write_jsonl, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    data = write_jsonl(tmp_path / "train.jsonl", [{"q": "what", "a": f"answer {i}"} for i in range(9)])

    def run(**options) -> PackedRows:
        dataset = ColumnMappedTextInstructionDataset(str(data), {"question": "q", "answer": "a"}, make_tokenizer())
        cfg = PackedSequenceConfig(packed_sequence_size=64, num_proc=1, cache=str(root), **options)
        packed = pack_dataset(dataset, cfg, pad_token_id=0, seed=0, shuffle=False)
        len(packed)
        return packed

    packed = run()
    (own,) = root.iterdir()
    other = store(root, "a", 31)
    age(own, 31)  # in use by `packed`
    run(cache_days=None)
    assert other.exists()
    run()
    assert sorted(root.iterdir()) == [own]
    assert any("removed 1 key with 0.000 GB that no run has used for 30 days" in line for line in caplog.messages)
    assert len(packed) > 0
    with pytest.raises(ConfigError, match=r"`packed_sequence.cache_days` is 0, but it must be at least 1"):
        PackedSequenceConfig(packed_sequence_size=64, cache_days=0)
