"""Which ptxas Triton is told to take, and how tall tiles are; programs that only say a version stand for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from nemo_automodel.kernels import assembler
from nemo_automodel.kernels.assembler import VARIABLE, find_assembler, tile_rows, use_sound_one, version_of

BANNER = "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release {}, V{}.93"
ON_HOPPER = torch.device("cuda", 0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that plants a ptxas of some version: Triton's, the package's, a toolkit's."""
    monkeypatch.setattr(assembler, "_TOOLKIT", tmp_path / "cuda")
    monkeypatch.setattr(assembler, "_bundled", lambda: tmp_path / "triton/bin/ptxas")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]}),
    )
    version_of.cache_clear()
    tile_rows.cache_clear()

    def plant(place: str, version: str | None) -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        said = "exit 1" if version is None else f"cat <<'END'\n{BANNER.format(version, version)}\nEND"
        path.write_text(f"#!/bin/sh\n{said}\n")
        path.chmod(0o755)
        return path

    plant("triton/bin/ptxas", "12.8")
    yield plant
    version_of.cache_clear()
    tile_rows.cache_clear()


def chosen(cuda: str | None = "13.0", **env: str) -> str | None:
    """Return what Triton is told."""
    use_sound_one(env, cuda)
    return env.get(VARIABLE)


def test_with_nothing_better_triton_keeps_its_own(machine, tmp_path):
    machine("nvidia/cu13/bin/ptxas", "13.2")
    machine("cuda/bin/ptxas", None)
    assert chosen() is None
    assert find_assembler({}, "13.0") == tmp_path / "triton/bin/ptxas"


def test_a_package_and_a_toolkit_are_found(machine, tmp_path):
    toolkit = machine("cuda/bin/ptxas", "13.4")
    assert chosen() == str(toolkit)
    home = machine("home/bin/ptxas", "14.0")
    assert chosen(CUDA_HOME=str(tmp_path / "home")) == str(home)
    package = machine("nvidia/cu13/bin/ptxas", "13.3")
    assert chosen(CUDA_HOME=str(tmp_path / "home")) == str(package)


def test_what_the_user_chose_stays(machine):
    machine("nvidia/cu13/bin/ptxas", "13.5")
    assert chosen(**{VARIABLE: "ptxas of mine"}) == "ptxas of mine"


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_a_driver_that_may_not_know_its_machine_code_gets_none_of_it(machine, cuda):
    machine("nvidia/cu13/bin/ptxas", "13.5")
    assert chosen(cuda) is None


@pytest.mark.parametrize(
    ("capability", "version", "rows"),
    [(9, "13.3", 64), (9, "13.2", 32), (9, None, 32), (10, "13.5", 32), (8, "13.5", 32)],
)
def test_only_hopper_gets_tall_tiles_and_only_where_wgmma_is_right(machine, monkeypatch, capability, version, rows):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setenv(VARIABLE, str(machine("mine/ptxas", version)))
    assert tile_rows(ON_HOPPER) == rows


def test_on_a_cpu_nothing_is_asked(machine):
    assert tile_rows(torch.device("cpu")) == 32


def test_what_is_no_program_has_no_version(machine, tmp_path):
    assert version_of(tmp_path / "nothing") is None
    assert version_of(machine("odd/ptxas", "thirteen")) is None
