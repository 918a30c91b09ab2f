"""A run that dies at any moment of a save, and a disk that refuses, cost nothing that was saved before."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from checkpoint.tiny_run import CONFIG, Run, assert_same, contents, in_child
from safetensors import SafetensorError

from nemo_automodel.components.checkpoint.checkpointing import SaveError
from nemo_automodel.components.checkpoint.disk import check_writable, explain_write_failure
from nemo_automodel.components.checkpoint.layout import complete_checkpoints, missing_parts
from nemo_automodel.components.checkpoint.pointers import read_pointer
from nemo_automodel.components.checkpoint.run_directory import choose_run_directory
from nemo_automodel.shared.errors import UserError

STEPS_OF_A_SAVE = ("fsync", "rename", "replace", "unlink", "symlink", "mkdir", "open")
"""What the saving code asks of the system, in `os`; a kill happens just before one of these."""


def _count_requests(dies_at: int | None = None) -> list[int]:
    """Count this process's requests to the system; kill it just before the one numbered ``dies_at``."""
    count = [0]

    def wrap(function):
        def wrapped(*args, **kwargs):
            if count[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return function(*args, **kwargs)

        return wrapped

    for name in STEPS_OF_A_SAVE:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def _two_saves(directory: Path):
    run = Run(directory, max_recent_checkpoints=1)
    run.train(3)
    run.save(0.5)
    first = run.state()
    run.train(3)
    return run, {"epoch_0_step_2": first, "epoch_0_step_5": run.state()}


def test_killed_at_every_step_of_a_save(tmp_path):
    origin = tmp_path / "origin"
    choose_run_directory(origin, True, CONFIG)
    run, expected = _two_saves(origin)
    shutil.copytree(origin, tmp_path / "whole", symlinks=True)

    def whole_save():
        run.checkpointer = Run(tmp_path / "whole", max_recent_checkpoints=1).checkpointer
        count = _count_requests()
        run.save(0.25)
        return count[0]

    _, num_requests = in_child(whole_save)
    assert num_requests > 30
    num_publishing = 30  # the last requests: names, pointers, deletion of the old checkpoint
    early = range(0, num_requests - num_publishing, 5)
    outcomes = []
    for dies_at in [*early, *range(num_requests - num_publishing, num_requests)]:
        directory = tmp_path / f"killed-{dies_at}"
        shutil.copytree(origin, directory, symlinks=True)
        run.checkpointer = Run(directory, max_recent_checkpoints=1).checkpointer

        def killed_save(dies_at=dies_at):
            _count_requests(dies_at)
            run.save(0.25)

        assert in_child(killed_save)[0] == -signal.SIGKILL
        # a reader who comes now sees whole checkpoints only
        assert missing_parts(directory / "LATEST") == []
        assert missing_parts(directory / "LOWEST_VAL") == []

        place = choose_run_directory(directory, True, CONFIG)
        outcomes.append(place.resume_from.name)
        leftovers = [p.name for p in directory.iterdir() if ".tmp" in p.name or ".reserving" in p.name]
        assert leftovers == []
        assert not (directory / ".publishing").exists()
        newest = complete_checkpoints(directory)[-1]
        assert read_pointer(directory, "LATEST") == read_pointer(directory, "LOWEST_VAL") == newest == place.resume_from
        resumed = Run(directory)
        resumed.load(place.resume_from)
        assert_same(resumed.state(), expected[place.resume_from.name])
        if dies_at % 10 == 0:
            resumed.train(3)
            resumed.save(0.1)  # and the run goes on saving
    assert outcomes == sorted(outcomes)  # first the old checkpoint, from one moment on the new one
    assert set(outcomes) == set(expected)


@pytest.mark.parametrize("restore_from", [None, "LATEST"])
def test_a_published_checkpoint_gets_its_pointers_at_the_next_start(tmp_path, monkeypatch, restore_from):
    run, _ = _two_saves(tmp_path)

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo_automodel.components.checkpoint.publish._move_pointers", dies)
        with pytest.raises(KeyboardInterrupt):
            run.save(0.25)
    assert os.readlink(tmp_path / "LATEST") == "epoch_0_step_2"
    place = choose_run_directory(tmp_path, True, {**CONFIG, "checkpoint": {"restore_from": restore_from}})
    assert place.resume_from == tmp_path / "epoch_0_step_5"
    assert os.readlink(tmp_path / "LATEST") == os.readlink(tmp_path / "LOWEST_VAL") == "epoch_0_step_5"


def test_ctrl_c_during_a_save_leaves_nothing_behind(tmp_path):
    run, _ = _two_saves(tmp_path)
    before = contents(tmp_path)
    parts = run.parts()

    def interrupted(directory, weights):
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    parts.model_files.write_from = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.checkpointer.save(5, 0, parts, {"train_loss": 1.0})
    assert contents(tmp_path) == before


def test_foreign_files_and_complete_checkpoints_survive_the_cleaning(tmp_path):
    _two_saves(tmp_path)
    for name in ("notes.txt", "epoch_0_step_7.reserving", ".hidden.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "epoch_0_step_9").mkdir()
    (tmp_path / "epoch_0_step_9" / ".incomplete").touch()
    (tmp_path / "epoch_0_step_8.reserving-12ab").mkdir()
    (tmp_path / ".automodel-00000000000000000000000000000000.tmp").touch()
    choose_run_directory(tmp_path, True, CONFIG)
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {
        *("LATEST", "LOWEST_VAL", "epoch_0_step_2"),
        *("notes.txt", "epoch_0_step_7.reserving", ".hidden.tmp"),
    }


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), "has no room: .* [GM]iB free. Free some space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "takes no more files of yours"),
    (PermissionError(errno.EACCES, "Permission denied"), "no permission"),
    (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
    (OSError(errno.EIO, "Input/output error", "model.safetensors"), r"Input/output error \(`model.safetensors`\)"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "has no room"),
]


@pytest.mark.parametrize(("failure", "message"), FAILURES, ids=[repr(f)[:40] for f, _ in FAILURES])
def test_a_failed_save_is_one_line_and_changes_nothing(tmp_path, failure, message):
    run, _ = _two_saves(tmp_path)
    before = contents(tmp_path)
    parts = run.parts()

    def fails(directory, weights):
        (directory / "half").write_text("x")
        raise failure

    parts.model_files.write_from = fails
    with pytest.raises(SaveError, match=message) as caught:
        run.checkpointer.save(5, 0, parts, {"train_loss": 1.0})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before
    assert run.save(0.1) == tmp_path / "epoch_0_step_5"  # the next one works


def test_a_defect_of_ours_is_not_called_a_full_disk(tmp_path):
    run, _ = _two_saves(tmp_path)
    parts = run.parts()

    def fails(directory, weights):
        raise RuntimeError("a defect")

    parts.model_files.write_from = fails
    with pytest.raises(RuntimeError, match="a defect") as caught:
        run.checkpointer.save(5, 0, parts, {"train_loss": 1.0})
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("limit", [200, 2_000, 20_000])
def test_files_that_grow_beyond_a_limit(tmp_path, limit):
    """Whoever writes, safetensors, torch or plain Python, the failure is the system's and the message names it."""
    run = Run(tmp_path, width=64)
    run.train(3)
    run.save()
    run.train(3)
    before = contents(tmp_path)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run.save()
        except SaveError as error:
            return str(error)

    status, message = in_child(limited)
    assert status == 0
    assert "File too large" in message
    assert "earlier ones are untouched" in message
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a small file system")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("width", [8, 64, 128, 192, 256])
def test_a_disk_that_fills_up(small_disk, width):
    run = Run(small_disk, width=width)
    run.train(1)
    message = None
    for _ in range(100):
        before = contents(small_disk)
        try:
            last = run.save()
        except SaveError as error:
            message = str(error)
            break
        run.train(1)
    assert message is not None
    assert "has no room" in message
    assert "--checkpoint.max_recent_checkpoints" in message
    assert "\n" not in message
    if before:
        assert contents(small_disk) == before
        Run(small_disk, width=width).load(last)


def test_a_disk_without_inodes_says_so(tmp_path, monkeypatch):
    """There may be gigabytes free, which says nothing to the user."""
    counts = os.statvfs(tmp_path)
    none_left = type(
        "Counts", (), {"f_files": 1000, "f_favail": 0, "f_bavail": 9, "f_blocks": 9, "f_bfree": 9, "f_frsize": 4096}
    )
    monkeypatch.setattr("os.statvfs", lambda path: none_left if path == tmp_path else counts)
    message = explain_write_failure(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert message is not None
    assert "has no room for another file, however small (its inodes are used up): " in message


def test_too_little_space_is_said_before_step_0(small_disk):
    check_writable(small_disk, 2**19)
    with pytest.raises(UserError, match=r"A checkpoint needs about 1\.00 GiB\. The disk of .* \d\.\d\d MiB free"):
        check_writable(small_disk, 2**30)
    (small_disk / "filler").write_bytes(b"0" * 2**19)
    with pytest.raises(UserError, match="has no room"):
        check_writable(small_disk, 2**20)


def test_a_directory_without_permission():
    """As root nothing is forbidden, so an ordinary user tries."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)

        def as_nobody():
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                choose_run_directory(Path(name) / "out", False, CONFIG)
            except UserError as error:
                return str(error)

        status, message = in_child(as_nobody)
        os.chmod(name, 0o755)
    assert status == 0
    assert "no permission" in message
    assert "\n" not in message


def test_no_space_at_the_start_is_one_line(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nemo_automodel.components.checkpoint.run_directory.replace_file", full)
    with pytest.raises(UserError, match="has no room"):
        choose_run_directory(tmp_path, True, CONFIG)


def test_a_file_system_that_cannot_sync_directories(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _, expected = _two_saves(tmp_path)
    resumed = Run(tmp_path)
    resumed.load(tmp_path / "LATEST")
    assert_same(resumed.state(), expected["epoch_0_step_2"])


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_a_directory_is_needed(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="a file has this name"):
        choose_run_directory(tmp_path / place, False, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"
