"""Reading ahead of what is asked for, as on the way to a GPU: the same tensors, little memory, nothing kept."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_automodel._transformers import shard_reader
from nemo_automodel._transformers.shard_reader import read_index, read_tensors
from nemo_automodel.shared.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def tensors(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Tensors of less than a piece, of several, of exactly two, and of nothing, in two files."""
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", 64)
    made = {
        "a": torch.randn(3, 5), "exact": torch.arange(32).float(), "empty": torch.empty(0, 4),
        "large": torch.randn(41, 13), "half": torch.randn(9).bfloat16(), "last": torch.arange(7),
    }  # fmt: skip
    names = list(made)
    save_file({name: made[name] for name in names[:3]}, tmp_path / "1.safetensors")
    save_file({name: made[name] for name in names[3:]}, tmp_path / "2.safetensors")
    return made


def paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("num_ahead", [1, 3, 50])
@pytest.mark.parametrize("drops_cached", [False, True])
def test_the_same_tensors_in_the_order_asked_for(tmp_path, tensors, num_ahead, drops_cached):
    index = read_index(paths(tmp_path))
    for names in (list(index), list(reversed(tensors))):
        found = list(read_tensors(index, names, CPU, drops_cached, num_ahead))
        assert [name for name, _ in found] == names
        for name, tensor in found:
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name]), name


def test_names_are_taken_a_few_pieces_ahead_and_tensors_are_not_kept(tmp_path, tensors):
    index = read_index(paths(tmp_path))
    taken: list[str] = []

    def names():
        for name in index:
            taken.append(name)
            yield name

    stream = read_tensors(index, names(), CPU, num_ahead=2)
    name, tensor = next(stream)
    assert len(taken) <= 3 < len(index)  # its own, and of the two pieces ahead
    kept = weakref.ref(tensor)
    del tensor
    assert kept() is None
    held = [x for x in gc.get_objects() if type(x) is shard_reader._Arriving and x.name == name]
    assert not any(hasattr(x, "raw") for x in held)


def test_a_file_that_ends_early_is_said_while_reading_ahead(tmp_path, tensors):
    index = read_index(paths(tmp_path))
    last = paths(tmp_path)[-1]
    os.truncate(last, last.stat().st_size - 30)
    with pytest.raises(EOFError, match="before its data do"):
        list(read_tensors(index, index, CPU, num_ahead=3))


def test_leaving_early_closes_files_and_ends_threads(tmp_path, tensors):
    index = read_index(paths(tmp_path))
    open_before = set(os.listdir("/proc/self/fd"))
    stream = read_tensors(index, index, CPU, num_ahead=3)
    next(stream)
    stream.close()
    assert set(os.listdir("/proc/self/fd")) <= open_before


def test_numbers_of_another_kind_are_one_line(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.int16)}, tmp_path / "1.safetensors")
    raw = (tmp_path / "1.safetensors").read_bytes()
    (tmp_path / "1.safetensors").write_bytes(raw.replace(b'"I16"', b'"F99"'))
    with pytest.raises(UserError, match=r"`a` in `.*1.safetensors` holds numbers of the kind F99, .* Use a copy"):
        read_index(paths(tmp_path))
