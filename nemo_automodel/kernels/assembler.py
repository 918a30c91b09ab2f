"""The assembler with which Triton makes machine code, and what depends on it: how tall a tile may be on Hopper.

Triton brings a ptxas of its own, which ``TRITON_PTXAS_PATH`` exchanges. Up to 13.2 it may reuse registers that a WGMMA
instruction still reads: what was to be multiplied is wrong, or the kernel ends in an illegal memory access
(triton-lang/triton#11781, release notes of CUDA 13.3). Triton multiplies by WGMMA from tiles of 64 rows on, so these
need a newer one. The package `PACKAGE` has it, and so has a CUDA toolkit of that version: `use_sound_one` looks for
them. Blackwell has an assembler of its own in Triton and multiplies otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SOUND_FROM = (13, 3)
HOPPER = 9
"""Major compute capability."""
PACKAGE = "nvidia-cuda-nvcc>=13.3"
VARIABLE = "TRITON_PTXAS_PATH"
_TOOLKIT = Path("/usr/local/cuda")
_TIMEOUT_S = 5.0


def use_sound_one(env: MutableMapping[str, str], cuda: str | None) -> None:
    """Let Triton take a ptxas that gets WGMMA right, if there is one and the user chose none.

    It must be said before the first kernel is compiled. ``cuda`` is the version that PyTorch is built for, so the
    driver knows it: machine code of 13.x runs on drivers for 13.0 and newer.
    """
    path = find_assembler(env, cuda)
    if path is not None and path != _bundled():
        env[VARIABLE] = str(path)


def find_assembler(env: Mapping[str, str], cuda: str | None) -> Path | None:
    """Return the ptxas to use for Hopper: the user's, a sound one, or Triton's own; None where there is no Triton."""
    if chosen := env.get(VARIABLE):
        return Path(chosen)
    bundled = _bundled()
    if bundled is None or cuda is None or int(cuda.partition(".")[0]) < SOUND_FROM[0]:
        return bundled
    found = (path for path in (_packaged(), *_of_toolkits(env)) if path is not None and path.is_file())
    return next((path for path in found if _is_sound(version_of(path))), bundled)


@functools.cache
def version_of(path: Path) -> tuple[int, int] | None:
    """Ask a ptxas for its version; None if it does not answer."""
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return read_version(done.stdout) if done.returncode == 0 else None


def read_version(said: str) -> tuple[int, int] | None:
    """Return the version in the output of ``ptxas --version``."""
    found = re.search(r"release (\d+)\.(\d+)", said)
    return None if found is None else (int(found[1]), int(found[2]))


@functools.cache
def tile_rows(device: torch.device) -> int:
    """Return how many rows tiles have that matrix units multiply: 64 where WGMMA can be trusted, otherwise 32."""
    import torch  # the doctor asks for the assembler also where PyTorch does not import

    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return 32
    path = find_assembler(os.environ, torch.version.cuda)
    return 64 if path is not None and _is_sound(version_of(path)) else 32


def _is_sound(version: tuple[int, int] | None) -> bool:
    return version is not None and version >= SOUND_FROM


def _bundled() -> Path | None:
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "backends/nvidia/bin/ptxas"


def _packaged() -> Path | None:
    """Return where `PACKAGE` puts it, beside other packages of NVIDIA."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found is not None else None
    return next((path for place in places or () if (path := Path(place) / "cu13/bin/ptxas").is_file()), None)


def _of_toolkits(env: Mapping[str, str]) -> list[Path]:
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := env.get(name))]
    return [home / "bin/ptxas" for home in (*homes, _TOOLKIT)]
