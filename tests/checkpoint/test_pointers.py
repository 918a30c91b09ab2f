"""Pointers, retention, and every way to say where a run goes on from."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from checkpoint.tiny_run import Run, fake_checkpoint

from nemo_automodel.components.checkpoint.layout import complete_checkpoints, step_of
from nemo_automodel.components.checkpoint.pointers import check_pointer_places, move_pointer, read_pointer
from nemo_automodel.components.checkpoint.publish import best_checkpoint, recover, validation_loss
from nemo_automodel.components.checkpoint.restore import find_restore, newest_checkpoint
from nemo_automodel.shared.errors import UserError


def names(directory: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(directory)]


def test_pointers_follow_the_run(tmp_path):
    run = Run(tmp_path)
    expected = {0.5: "0", 0.7: "0", 0.3: "2", 0.3000001: "2"}
    for step, (loss, best) in enumerate(expected.items()):
        run.train(1)
        run.save(loss)
        assert os.readlink(tmp_path / "LATEST") == f"epoch_0_step_{step}"
        assert os.readlink(tmp_path / "LOWEST_VAL") == f"epoch_0_step_{best}"


def test_a_run_without_validation_has_no_lowest_val(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    run.save()
    assert read_pointer(tmp_path, "LOWEST_VAL") is None


@pytest.mark.parametrize(
    ("losses", "key", "expected"),
    [
        ({"train_loss": 1.0, "val_loss": 2.0}, "default", 2.0),
        ({"train_loss": 1.0, "default": 2.0, "other": 0.5}, "default", 2.0),
        ({"train_loss": 1.0, "default": 2.0, "other": 0.5}, "other", 0.5),
        ({"train_loss": 1.0, "squad": 0.5}, "default", 0.5),
        ({"train_loss": 1.0, "squad": 0.5, "other": 0.4}, "default", None),
        ({"train_loss": 1.0, "squad": 0.5}, "quad", None),
        ({"train_loss": 1.0}, "default", None),
        ({"train_loss": 1.0, "val_loss": None}, "default", None),
        ({"train_loss": 1.0, "val_loss": float("inf")}, "default", None),
    ],
)
def test_which_loss_decides(losses, key, expected):
    assert validation_loss(losses, key) == expected


@pytest.mark.parametrize("damage", ["{", "[]", "3", '{"val_loss": "low"}'])
def test_damaged_losses_are_no_candidate(tmp_path, damage):
    good, bad = fake_checkpoint(tmp_path, 1), fake_checkpoint(tmp_path, 2)
    (good / "losses.json").write_text('{"train_loss": 1.0, "val_loss": 9.0}')
    (bad / "losses.json").write_text(damage)
    assert best_checkpoint(tmp_path, "default") == good


def test_only_recent_checkpoints_and_pointer_targets_are_kept(tmp_path):
    run = Run(tmp_path, max_recent_checkpoints=2)
    for loss in (0.5, 0.1, 0.6, 0.7, 0.8):
        run.train(1)
        run.save(loss)
    assert names(tmp_path) == ["epoch_0_step_1", "epoch_0_step_3", "epoch_0_step_4"]
    assert sorted(p.name for p in tmp_path.glob("epoch*")) == names(tmp_path)


def test_a_checkpoint_that_cannot_be_deleted_stays_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    run = Run(tmp_path, max_recent_checkpoints=1)

    def refuses(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("nemo_automodel.components.checkpoint.publish.delete_checkpoint", refuses)
    for _ in range(2):
        run.train(1)
        run.save()
    assert names(tmp_path) == ["epoch_0_step_0", "epoch_0_step_1"]
    assert "An old checkpoint could not be deleted and stays" in caplog.text


def test_a_later_run_moves_the_pointers_of_the_shared_directory(tmp_path):
    first = Run(tmp_path)
    first.train(2)
    first.save(0.5)
    second = Run(tmp_path / "second", checkpoint_dir=tmp_path)
    (tmp_path / "second").mkdir()
    second.train(4)
    second.save(0.9)
    for pointer in ("LATEST", "LOWEST_VAL"):
        assert os.readlink(tmp_path / pointer) == "second/epoch_0_step_3"
        assert os.readlink(tmp_path / "second" / pointer) == "epoch_0_step_3"
    first.train(1)
    first.save(0.7)
    assert os.readlink(tmp_path / "LATEST") == "epoch_0_step_2"
    assert os.readlink(tmp_path / "LOWEST_VAL") == "epoch_0_step_1"  # of the first run, whatever the second had
    second.train(1)
    third = Run(tmp_path / "third", checkpoint_dir=tmp_path)
    (tmp_path / "third").mkdir()
    third.train(1)
    third.save()  # validates nothing, so no pointer may claim a lowest loss
    assert read_pointer(tmp_path, "LOWEST_VAL") is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_links_pointers_are_text(tmp_path, monkeypatch, number):
    move_pointer(tmp_path, "LATEST", fake_checkpoint(tmp_path, 1))

    def no_links(*args):
        raise OSError(number, "no links here")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", no_links)
        move_pointer(tmp_path, "LATEST", fake_checkpoint(tmp_path, 3))
        assert (tmp_path / "LATEST.txt").read_text() == "epoch_0_step_3"
        assert not (tmp_path / "LATEST").is_symlink()
        assert find_restore(tmp_path, tmp_path, "LATEST") == tmp_path / "epoch_0_step_3"
        assert find_restore(tmp_path, tmp_path, f"{tmp_path}/LATEST") == tmp_path / "epoch_0_step_3"
    move_pointer(tmp_path, "LATEST", fake_checkpoint(tmp_path, 5))
    assert read_pointer(tmp_path, "LATEST") == tmp_path / "epoch_0_step_5"
    assert not (tmp_path / "LATEST.txt").exists()


def test_a_full_disk_is_no_reason_for_a_text_pointer(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(OSError, match="No space"):
        move_pointer(tmp_path, "LATEST", fake_checkpoint(tmp_path, 1))
    assert not (tmp_path / "LATEST.txt").exists()


def test_a_directory_with_a_pointers_name_is_refused(tmp_path):
    (tmp_path / "LATEST").mkdir()
    with pytest.raises(UserError, match="LATEST` is a directory, but the run needs this name"):
        check_pointer_places(tmp_path)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("epoch_0_step_99", 99),
        ("step_3", 3),
        ("my_run_step_12", 12),
        ("epoch_0_step_", None),
        ("epoch_0_step_9.reserving-ab", None),
        ("footstep_3", None),
        ("LATEST", None),
    ],
)
def test_names_of_checkpoints(name, step):
    assert step_of(Path("x", name)) == step


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00a", b"epoch_0_step_9\x00"])
def test_a_damaged_text_pointer_or_note_names_nothing(tmp_path, damage):
    fake_checkpoint(tmp_path, 1)
    (tmp_path / "LATEST.txt").write_bytes(damage)
    (tmp_path / ".publishing").write_bytes(damage)
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_0_step_1"
    recover(tmp_path, [tmp_path], "default")
    assert not (tmp_path / ".publishing").exists()
    assert (tmp_path / "LATEST.txt").read_bytes() == damage


def test_automatic_restore(tmp_path):
    assert find_restore(tmp_path / "missing", tmp_path / "missing", None) is None
    assert find_restore(tmp_path, tmp_path, None) is None
    fake_checkpoint(tmp_path, 9)
    fake_checkpoint(tmp_path, 100)
    fake_checkpoint(tmp_path, 20)
    assert newest_checkpoint(tmp_path).name == "epoch_0_step_100"  # by number, not by spelling
    move_pointer(tmp_path, "LATEST", tmp_path / "epoch_0_step_20")
    assert newest_checkpoint(tmp_path).name == "epoch_0_step_20"
    (tmp_path / "epoch_0_step_20" / ".incomplete").touch()
    assert newest_checkpoint(tmp_path).name == "epoch_0_step_100"
    (tmp_path / "epoch_0_step_100" / "step_scheduler.pt").unlink()
    assert newest_checkpoint(tmp_path).name == "epoch_0_step_9"


def test_automatic_restore_takes_no_checkpoint_of_another_run(tmp_path):
    fake_checkpoint(tmp_path, 9)
    move_pointer(tmp_path, "LATEST", fake_checkpoint(tmp_path / "other", 50))
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_0_step_9"


def test_every_form_of_restore_from(tmp_path, monkeypatch):
    wanted = fake_checkpoint(tmp_path / "out", 9)
    fake_checkpoint(tmp_path / "out", 20)
    below = fake_checkpoint(tmp_path / "out" / "run", 3)
    move_pointer(tmp_path / "out", "LATEST", wanted)
    move_pointer(tmp_path / "out", "LOWEST_VAL", below)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    forms = {
        "LATEST": wanted,
        "LOWEST_VAL": below,
        "epoch_0_step_9": wanted,
        "epoch_0_step_9/": wanted,
        "run/epoch_0_step_3": below,
        "run/../epoch_0_step_9": wanted,
        "out/epoch_0_step_9": wanted,
        "out/LATEST": wanted,
        str(wanted): wanted,
        str(tmp_path / "out" / "LOWEST_VAL"): below,
    }
    for form, expected in forms.items():
        assert find_restore(out, out, form).resolve() == expected, form
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_restore(out, out, "~/out/epoch_0_step_9") == wanted


def test_latest_of_nothing_is_a_fresh_start(tmp_path):
    assert find_restore(tmp_path, tmp_path, "LATEST") is None


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("LOWEST_VAL", "is neither a pointer"),
        ("epoch_0_step_8", "Complete checkpoints in .*: epoch_0_step_9, epoch_0_step_20"),
        ("/nowhere/epoch_0_step_9", "is neither a pointer"),
        ("epoch_0_step_30", "lacks optim/.metadata"),
        ("epoch_0_step_31", "lacks the end of its save, which was interrupted"),
        (".", "Did you mean `.*epoch_0_step_20`"),
    ],
)
def test_restore_from_that_names_no_checkpoint(tmp_path, form, message):
    fake_checkpoint(tmp_path, 9)
    fake_checkpoint(tmp_path, 20)
    (fake_checkpoint(tmp_path, 30) / "optim" / ".metadata").unlink()
    (fake_checkpoint(tmp_path, 31) / ".incomplete").touch()
    with pytest.raises(UserError, match=message) as caught:
        find_restore(tmp_path, tmp_path, form)
    assert "\n" not in str(caught.value)


def test_the_checkpointer_restores_what_its_settings_name(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        run.train(1)
        run.save()
    assert run.checkpointer.find_restore() == tmp_path / "epoch_0_step_1"
    assert Run(tmp_path, restore_from="epoch_0_step_0").checkpointer.find_restore() == tmp_path / "epoch_0_step_0"


def test_progress_is_readable_without_torch(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    path = run.save(is_last_step=True)
    assert json.loads((path / "progress.json").read_text()) == {"step": 0, "epoch": 0, "is_last_step": True}
