"""The assembler with which Triton turns its kernels into machine code, where that matters: on Hopper.

Triton brings a ptxas of its own, which `TRITON_PTXAS_PATH` exchanges. Up to 13.2 it may reuse registers that a WGMMA
instruction still reads, and what was to be multiplied is wrong, or the kernel ends in an illegal memory access
(triton-lang/triton#11781, release notes of CUDA 13.3). Our own kernels keep away from that; compiled layers and
PyTorch's FlexAttention, by which other families attend to packed rows, are Triton's to choose.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from nemo_automodel.components.doctor.findings import NOTE, OK, Finding
from nemo_automodel.components.doctor.programs import Ran, run_program

FIXED = (13, 3)
_PACKAGE = "nvidia-cuda-nvcc>=13.3"
_PLACE = "nvidia/cu13/bin/ptxas"
"""Where that package puts it."""


def find_assembler(env: Mapping[str, str]) -> Path | None:
    """Return the ptxas that Triton uses for Hopper; None where Triton is not installed."""
    if chosen := env.get("TRITON_PTXAS_PATH"):
        return Path(chosen)
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "backends/nvidia/bin/ptxas"


def judge_assembler(path: Path, ran: Ran, pip: str) -> Finding:
    """Look at ``ptxas --version``; ``pip`` is the command that installs."""
    check, packages = "gpu.assembler", sysconfig.get_paths()["purelib"]
    fix = (f"{pip} '{_PACKAGE}'", f"export TRITON_PTXAS_PATH={packages}/{_PLACE}")
    why = (
        "Versions before 13.3 may compile kernels for Hopper wrongly: compiled layers, and the attention of packed "
        "rows in families without fast layers. The project's own kernels avoid it, or were checked on an H100. A newer "
        "one needs a driver for CUDA 13."
    )
    found = re.search(r"release (\d+)\.(\d+)", ran.output)
    if not ran.is_good or found is None:
        return Finding(check, NOTE, f"Triton's ptxas does not answer: {path}: {ran.reason()}", why, fix)
    version = int(found[1]), int(found[2])
    what, facts = f"Triton's ptxas is {found[1]}.{found[2]}", {"ptxas": f"{found[1]}.{found[2]}", "path": str(path)}
    if version < FIXED:
        return Finding(check, NOTE, what, why, fix, facts)
    return Finding(check, OK, what, facts=facts)


def check_assembler(path: Path, pip: str) -> Finding:
    """Ask the ptxas at ``path``, and judge it."""
    return judge_assembler(path, run_program([str(path), "--version"]), pip)
