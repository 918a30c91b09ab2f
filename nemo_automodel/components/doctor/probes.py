"""The parent of ``probe_process``: starts it, gives each probe a deadline, and makes a finding of whatever happened.

A probe can kill its process (a library for another processor ends with SIGILL) or hang it (a wedged driver). Either is
a finding about that probe; the rest is tried in a fresh process. That costs another import of PyTorch, but only then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from nemo_automodel.components.doctor.findings import NOTE, OK, PROBLEM, WARNING, Finding, pip_command
from nemo_automodel.components.doctor.gpu import TorchFacts, major
from nemo_automodel.components.doctor.probe_process import (
    FAILED,
    GOOD,
    IMPORT,
    MARK,
    SKIPPED,
    STARTED,
    WRONG,
)
from nemo_automodel.components.doctor.programs import end_group

COMMAND = (sys.executable, "-m", "nemo_automodel.components.doctor.probe_process")
DEADLINE_S = 60.0
"""For each probe; far above what a healthy machine needs."""
FIRST_DEADLINE_S = 120.0
"""For the first one, which imports PyTorch, maybe from a cold disk."""
CRASHED, HUNG = "crashed", "hung"
TORCH = "torch"
BINARY_PACKAGES = ("torchvision", "flash_attn", "transformer_engine", "torchao")
"""Optional packages that hold code compiled for one PyTorch."""

_TITLES = {
    "torch": "PyTorch",
    "cpu_matmul": "CPU fp32 product",
    "cpu_attention": "CPU attention",
    "cuda_matmul": "GPU bf16 product",
    "cuda_flash": "GPU flash attention",
    "cuda_cudnn": "GPU cuDNN attention",
    "cuda_efficient": "GPU memory-efficient attention",
    "cuda_varlen": "GPU attention in packed rows",
    "cuda_fp8": "GPU FP8 product",
    "triton": "Triton RMSNorm",
    "bitsandbytes": "bitsandbytes NF4",
    "gloo": "gloo loop-back",
    "nccl": "NCCL loop-back",
}


@dataclass(frozen=True)
class Result:
    """How one probe ended."""

    probe: str
    outcome: str
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def probe_names(has_bitsandbytes: bool | None = None) -> list[str]:
    """Return the probes of this environment in order; those of missing packages are left out."""
    has_bitsandbytes = is_installed("bitsandbytes") if has_bitsandbytes is None else has_bitsandbytes
    names = [name for name in _TITLES if name != "bitsandbytes" or has_bitsandbytes]
    return names + [IMPORT + name for name in BINARY_PACKAGES if is_installed(name)]


def is_installed(package: str) -> bool:
    """Tell whether a package can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


class ProbeRun:
    """The probes ``names``, begun at once in another process; ``results`` waits for them.

    Use it as a context manager: leaving it ends the process.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        command: Sequence[str] | None = None,
        first_deadline_s: float = FIRST_DEADLINE_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._left = list(names)
        self._command = list(command or COMMAND)
        self._first_deadline_s, self._deadline_s = first_deadline_s, deadline_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - closed in __exit__
        if self._left:
            self._start()

    def __enter__(self) -> ProbeRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            end_group(self._process)
        self._errors.close()

    def results(self) -> Iterator[Result]:
        """Yield how each probe ended, in order, as they end."""
        while self._left:
            if self._process is None:
                self._start()
            yield from self._follow()

    def _start(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        process = subprocess.Popen(
            [*self._command, *self._left],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self._process, self._lines = process, lines

    def _follow(self) -> Iterator[Result]:
        """Yield results until this process ends; there is always at least one."""
        current, allowed_s, has_failed = self._left[0], self._first_deadline_s, False
        deadline = time.monotonic() + allowed_s
        while self._left:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                yield self._end(current, HUNG, f"no answer within {allowed_s:g} s")
                return
            if line is None and has_failed:
                break  # it said so before it ended
            if line is None:
                yield self._end(current, CRASHED, self._last_words())
                return
            if not line.startswith(MARK):
                continue  # a library that prints
            told = json.loads(line.removeprefix(MARK))
            if told["outcome"] != STARTED:
                self._left.remove(told["probe"])
                has_failed = told["outcome"] == FAILED
                current = self._left[0] if self._left else ""
                allowed_s = self._deadline_s
                yield Result(**told)
                if told["probe"] == TORCH and has_failed:
                    self._left.clear()  # nothing else can run
            deadline = time.monotonic() + allowed_s
        self._stop()

    def _end(self, probe: str, outcome: str, text: str) -> Result:
        self._stop()
        self._left.remove(probe)
        if probe == TORCH:
            self._left.clear()  # nothing else can run
        return Result(probe, outcome, text)

    def _stop(self) -> None:
        assert self._process is not None
        end_group(self._process)
        self._process = None

    def _last_words(self) -> str:
        """Return by which signal or with which last line the process died."""
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        if status < 0:
            return f"its process died of {signal.Signals(-status).name}"
        return f"its process ended with status {status}{f': {lines[-1]}' if lines else ''}"


# ---------------------------------------------------------------------------------------------------------- findings


@dataclass(frozen=True)
class Surroundings:
    """What a finding about a probe depends on."""

    has_pip: bool
    machine: str
    """The processor's architecture."""
    torch: TorchFacts | None

    def pip(self, words: str, verb: str = "install") -> str:
        """Return the line that installs into this environment."""
        return pip_command(words, has_pip=self.has_pip, verb=verb)

    @property
    def has_gpu(self) -> bool:
        """Tell whether PyTorch can use a GPU."""
        return self.torch is not None and self.torch.is_available


def check_name(probe: str) -> str:
    """Return the full name of a probe's check."""
    if probe in ("gloo", "nccl"):
        return f"collectives.{probe}"
    if probe.startswith(IMPORT):
        return f"packages.{probe}"
    return "gpu.torch" if probe == "torch" else f"kernels.{probe}"


def judge_result(result: Result, around: Surroundings) -> Finding:
    """Make a finding of a probe's end."""
    probe, check = result.probe, check_name(result.probe)
    title = _TITLES.get(probe, f"import {probe.removeprefix(IMPORT)}")
    facts = {"outcome": result.outcome, "text": result.text}
    if result.outcome == GOOD:
        return Finding(check, OK, f"{title}: {result.text}", facts=facts)
    if result.outcome == SKIPPED:
        return Finding(check, NOTE, f"{title}: not tried, {result.text}", facts=facts)
    how = {WRONG: "computes wrong numbers", FAILED: "fails", CRASHED: "crashes", HUNG: "hangs"}[result.outcome]
    status, why, fix = _consequence(probe, result, around)
    return Finding(check, status, f"{title} {how}: {result.text}", why, fix, facts)


def _consequence(probe: str, result: Result, around: Surroundings) -> tuple[str, str, tuple[str, ...]]:
    """Return how bad it is that a probe failed, why, and what mends it."""
    reinstall = around.pip("--force-reinstall --no-cache-dir 'torch>=2.10,<2.14'")
    upgrade = around.pip("--upgrade 'torch>=2.10,<2.14'")
    if probe == "torch":
        return PROBLEM, "Nothing works without PyTorch. Its installation is broken or does not fit.", (reinstall,)
    if probe.startswith("cpu_"):
        return PROBLEM, "The CPU part of PyTorch does not fit this processor.", (reinstall,)
    if probe == "cuda_matmul":
        return (
            PROBLEM,
            "Training on the GPU would fail or learn nonsense. Look for errors of the device first.",
            ("nvidia-smi -q -d ECC,PAGE_RETIREMENT", "sudo dmesg | grep -i xid | tail", reinstall),
        )
    if probe == "triton":
        return (
            WARNING,
            "LoRA's and the loss's fast kernels cannot run. A compiler, Python's headers or a Triton that fits PyTorch "
            "is missing.",
            (
                f"sudo apt install build-essential python{sys.version_info.major}.{sys.version_info.minor}-dev",
                around.pip("--force-reinstall --no-deps triton"),
                "rm -rf ~/.triton/cache",
            ),
        )
    if probe == "bitsandbytes":
        return WARNING, "QLoRA cannot run: its library was built for another GPU or processor.", _build_4bit(around)
    if probe in ("gloo", "nccl"):
        return (
            WARNING,
            "Several processes cannot talk to each other, not even on this machine. One process needs none of it.",
            ("sudo ip link set lo up", "export GLOO_SOCKET_IFNAME=lo")
            if probe == "gloo"
            else ("export NCCL_SOCKET_IFNAME=lo", "NCCL_DEBUG=INFO automodel doctor"),
        )
    if probe.startswith(IMPORT):
        package = probe.removeprefix(IMPORT).replace("_", "-")
        remove = around.pip(package, verb="uninstall")
        what = "It breaks the import of every model in Transformers." if package == "torchvision" else ""
        return (
            PROBLEM if package == "torchvision" else WARNING,
            f"{package} was built for another PyTorch. {what} Nothing here needs it.".replace("  ", " "),
            (remove,),
        )
    if result.outcome in (WRONG, CRASHED, HUNG):
        return (
            PROBLEM,
            "PyTorch may choose this kernel by itself. Another version of PyTorch may have mended it.",
            (upgrade,),
        )
    return (
        WARNING,
        "PyTorch takes another kernel, which is slower or needs more memory.",
        (upgrade,),
    )


def _build_4bit(around: Surroundings) -> tuple[str, ...]:
    """Return the lines that bring a bitsandbytes for this machine: a wheel, or a build for this GPU."""
    wheel = around.pip("--force-reinstall --no-deps bitsandbytes")
    if not around.has_gpu or around.torch is None or around.torch.cuda is None:
        return (wheel,)
    capabilities = sorted({"{}{}".format(*device.capability) for device in around.torch.devices})
    source = "git+https://github.com/bitsandbytes-foundation/bitsandbytes.git"
    build = (
        f"CMAKE_ARGS='-DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY={';'.join(capabilities)}' "
        f"CUDA_HOME=/usr/local/cuda-{major(around.torch.cuda)} {around.pip(f'--no-deps {source}')}"
    )
    return (build,) if around.machine == "aarch64" else (wheel, build)


def judge_missing_4bit(around: Surroundings) -> Finding:
    """Look at a bitsandbytes that is not installed."""
    fix: tuple[str, ...] = (around.pip("bitsandbytes accelerate"),)
    if around.machine == "aarch64":
        fix += _build_4bit(around)[-1:]
    return Finding(
        "kernels.bitsandbytes",
        NOTE,
        "bitsandbytes NF4: not tried, it is not installed",
        "QLoRA needs it. Where no wheel fits an ARM64 machine, build it from source: the second line."
        if len(fix) > 1
        else "QLoRA needs it.",
        fix,
        {"outcome": SKIPPED, "text": "it is not installed"},
    )
