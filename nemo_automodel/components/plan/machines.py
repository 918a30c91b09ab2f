"""What GPUs hold and how fast they are in a training step. Free of torch.

Rates of the H100 are measured in running steps of the fast decoder layers (`benchmarks/results/fast_core_h100.json`):
well below the datasheet, because the card is limited by power. Other cards are scaled from it by their datasheets, and
`is_measured` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.shared.errors import UserError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One GPU and its host. Rates are what a step sustains: TFLOP/s of dense products, TB/s of device memory."""

    name: str
    memory_gib: float
    """What the driver shows to a process."""
    bf16_tflops: float
    fp8_tflops: float | None
    """``None``: no 8-bit products."""
    attention_tflops: float
    memory_tb_s: float
    is_unified: bool = False
    """GPU and CPU share one memory, so the host's share counts."""
    is_measured: bool = False
    reserve_gib: float = 1.2
    """What the driver, the libraries and the gaps between allocations take."""

    host_gib: float | None = None
    """What of the host's memory may be page-locked; ``None``: not known."""

    @property
    def usable_bytes(self) -> int:
        """Memory that tensors can have."""
        return int((self.memory_gib - self.reserve_gib) * GIB)


_H100 = Machine("NVIDIA H100 80 GB", 79.2, 730, 1430, 420, 2.7, is_measured=True)


def _scaled(name: str, memory_gib: float, bf16_peak: float, fp8: bool, tb_s: float, unified: bool = False) -> Machine:
    """Return a machine whose steps sustain the H100's share of the datasheet's numbers."""
    share = bf16_peak / 989
    return Machine(
        name,
        memory_gib,
        _H100.bf16_tflops * share,
        _H100.fp8_tflops * share if fp8 and _H100.fp8_tflops else None,
        _H100.attention_tflops * share,
        _H100.memory_tb_s * tb_s / 3.35,
        is_unified=unified,
        # of shared memory the system and the desktop keep some
        reserve_gib=8.0 if unified else 1.2,
    )


MACHINES = {
    "h100": _H100,
    "h200": _scaled("NVIDIA H200", 139.8, 989, True, 4.8),
    "b200": _scaled("NVIDIA B200", 178.0, 2250, True, 7.7),
    "gb10": _scaled("NVIDIA GB10 (DGX Spark)", 119.7, 125, True, 0.273, unified=True),
    "a100-80": _scaled("NVIDIA A100 80 GB", 79.2, 312, False, 2.0),
    "a100-40": _scaled("NVIDIA A100 40 GB", 39.4, 312, False, 1.55),
    "l40s": _scaled("NVIDIA L40S", 44.4, 362, True, 0.864),
    "rtx6000ada": _scaled("NVIDIA RTX 6000 Ada", 47.4, 364, True, 0.96),
    "rtxpro6000": _scaled("NVIDIA RTX PRO 6000 Blackwell", 95.0, 503, True, 1.79),
    "rtx5090": _scaled("NVIDIA RTX 5090", 31.4, 209, True, 1.79),
    "rtx4090": _scaled("NVIDIA RTX 4090", 23.5, 165, True, 1.01),
    "rtx3090": _scaled("NVIDIA RTX 3090", 23.5, 71, False, 0.936),
}


def machine(name: str) -> Machine:
    """Return the machine called ``name``.

    Raises:
        UserError: there is no such entry.
    """
    if name not in MACHINES:
        raise UserError(
            f"`--gpu {name}` is not in the table.{did_you_mean(name, MACHINES)} Known: {', '.join(MACHINES)}."
        )
    return MACHINES[name]
