"""What the doctor says of the assembler with which Triton makes machine code, where that matters: on Hopper.

`kernels/assembler.py` tells what is wrong with older ones, and finds a newer one. With an older one our own kernels
keep away from what goes wrong, and are slower; compiled layers and PyTorch's FlexAttention, by which other families
attend to packed rows, are Triton's to choose.
"""

from __future__ import annotations

from pathlib import Path

from nemo_automodel.components.doctor.findings import NOTE, OK, Finding
from nemo_automodel.components.doctor.programs import Ran, run_program
from nemo_automodel.kernels.assembler import PACKAGE, SOUND_FROM, read_version


def judge_assembler(path: Path, ran: Ran, pip: str) -> Finding:
    """Look at ``ptxas --version``; ``pip`` is the command that installs."""
    check, fix = "gpu.assembler", (f"{pip} '{PACKAGE}'",)
    why = (
        "Versions before 13.3 may compile kernels for Hopper wrongly: compiled layers, and the attention of packed "
        "rows in families without fast layers. The project's own kernels avoid it, which costs LoRA 2 to 3 % of its "
        "speed under dropout. A newer one is found by itself; it needs PyTorch and a driver for CUDA 13."
    )
    version = read_version(ran.output)
    if not ran.is_good or version is None:
        return Finding(check, NOTE, f"Triton's ptxas does not answer: {path}: {ran.reason()}", why, fix)
    said = ".".join(map(str, version))
    what, facts = f"Triton's ptxas is {said}", {"ptxas": said, "path": str(path)}
    if version < SOUND_FROM:
        return Finding(check, NOTE, what, why, fix, facts)
    return Finding(check, OK, what, facts=facts)


def check_assembler(path: Path, pip: str) -> Finding:
    """Ask the ptxas at ``path``, and judge it."""
    return judge_assembler(path, run_program([str(path), "--version"]), pip)
