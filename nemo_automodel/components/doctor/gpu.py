"""The GPU: driver, CUDA toolkit, the CUDA that PyTorch was built for, and whether the three fit together.

Three versions are involved. The driver names the newest CUDA it can serve; PyTorch brings the CUDA libraries it was
built with and needs a driver that serves their major version; the toolkit (``nvcc``) only matters where something is
built from source, and then its major version must be PyTorch's. What PyTorch itself sees is asked in a process of its
own (`probes`), so a broken driver cannot take the doctor down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_automodel.components.doctor.findings import NOTE, OK, PROBLEM, WARNING, Finding, gib, in_container
from nemo_automodel.components.doctor.programs import Ran, run_program

OLDEST_TOOLKIT = 12
"""The major version the playbook asks for."""
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA major version → the driver branch that first serves it, from NVIDIA's table of minor-version compatibility."""
_NEWEST_BRANCH = max(OLDEST_DRIVERS.values())
LEAST_FREE_SHARE = 0.8
DRIVER_TIMEOUT_S = 8.0
"""nvidia-smi wakes every GPU up, which takes seconds where the persistence daemon does not run."""
BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
HOPPER = 9
"""The major number of its capability."""

_QUERY = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")


@dataclass(frozen=True)
class Device:
    """One GPU as PyTorch sees it."""

    name: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    free: int
    is_integrated: bool = False
    """It has no memory of its own."""


@dataclass(frozen=True)
class TorchFacts:
    """What PyTorch says about itself."""

    version: str
    cuda: str | None
    """The CUDA it was built for; None for a CPU build."""
    is_available: bool = False
    error: str = ""
    """Why CUDA cannot be used, in its own words."""
    architectures: tuple[str, ...] = ()
    """What its kernels were compiled for: ``sm_90``, ``compute_120``."""
    devices: tuple[Device, ...] = ()
    cudnn: str | None = None
    nccl: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> TorchFacts:
        """Rebuild the facts from what the probe printed."""
        plain = dict(values)
        devices = plain.pop("devices")
        architectures = plain.pop("architectures")
        assert isinstance(devices, list)
        assert isinstance(architectures, list)
        return cls(
            devices=tuple(Device(**{**item, "capability": tuple(item["capability"])}) for item in devices),
            architectures=tuple(architectures),
            **plain,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says."""

    ran: Ran
    version: str = ""
    cuda: str = ""
    """The newest CUDA the driver serves."""
    names: tuple[str, ...] = ()

    @property
    def sees_gpu(self) -> bool:
        """Tell whether there is at least one GPU."""
        return bool(self.names)


def ask_driver(timeout_s: float = DRIVER_TIMEOUT_S) -> Driver:
    """Ask nvidia-smi, twice at most: for the list of GPUs, and for the CUDA version, which only its title holds."""
    ran = run_program(_QUERY, timeout_s=timeout_s)
    if not ran.is_good:
        return Driver(ran)
    rows = [[cell.strip() for cell in line.split(",", 1)] for line in ran.output.splitlines() if "," in line]
    title = run_program(["nvidia-smi"], timeout_s=timeout_s)
    found = re.search(r"CUDA Version:\s*(\d+\.\d+)", title.output)
    return Driver(
        ran,
        version=rows[0][0] if rows else "",
        cuda=found[1] if found else "",
        names=tuple(row[1] for row in rows),
    )


def install_driver(cuda: str | None = None) -> str:
    """Return the line that installs a driver (Ubuntu, DGX OS) that serves ``cuda``, by default the newest known."""
    branch = OLDEST_DRIVERS.get(major(cuda) if cuda else 0, _NEWEST_BRANCH)
    return f"sudo apt install nvidia-driver-{branch}-open && sudo reboot"


def major(version: str) -> int:
    """Return the number before the first dot."""
    return int(version.partition(".")[0])


def judge_driver(driver: Driver, has_device_files: bool, is_container: bool, cuda_works: bool = False) -> Finding:
    """Look at the driver through nvidia-smi; ``cuda_works``: PyTorch uses the GPU all the same."""
    ran, check = driver.ran, "gpu.driver"
    if ran.is_missing:
        return _judge_without_smi(has_device_files or cuda_works, is_container)
    if ran.timed_out and cuda_works:
        return Finding(
            check,
            WARNING,
            f"nvidia-smi did not answer within {DRIVER_TIMEOUT_S:g} s, though CUDA works",
            "The GPU is put to sleep whenever nobody uses it, and every start waits until it is awake.",
            ("sudo nvidia-smi -pm 1",),
            {"found": True},
        )
    if ran.timed_out:
        return Finding(
            check,
            PROBLEM,
            f"nvidia-smi did not answer within {DRIVER_TIMEOUT_S:g} s",
            "The driver hangs: training would hang at its first touch of the GPU. The kernel's log names the cause; a "
            "reboot clears it.",
            ("sudo dmesg | grep -i -e nvrm -e xid | tail", "sudo reboot"),
            {"found": True},
        )
    if not ran.is_good:
        status = WARNING if cuda_works else PROBLEM
        return Finding(check, status, f"nvidia-smi fails: {ran.reason()}", *_explain_failure(ran), {"found": True})
    if not driver.sees_gpu:
        return Finding(
            check,
            PROBLEM,
            "nvidia-smi lists no GPU",
            "The driver runs but sees no device, so training would use the CPU.",
            ("lspci | grep -i nvidia", "sudo dmesg | grep -i nvrm | tail"),
            {"found": True},
        )
    facts = {"found": True, "driver": driver.version, "cuda": driver.cuda, "gpus": list(driver.names)}
    return Finding(check, OK, f"driver {driver.version}, serves CUDA up to {driver.cuda or '(not said)'}", facts=facts)


def _judge_without_smi(has_gpu: bool, is_container: bool) -> Finding:
    if not has_gpu:
        return Finding(
            "gpu.driver",
            NOTE,
            "no NVIDIA GPU is visible: nvidia-smi is not there",
            "Training runs on the CPU, which is enough for tiny models. If there is a GPU, install its driver; a "
            "container gets it with --gpus all.",
            ("docker run --gpus all -it IMAGE",) if is_container else (install_driver(),),
            {"found": False},
        )
    return Finding(
        "gpu.driver",
        NOTE,
        "there is an NVIDIA GPU, but no nvidia-smi",
        "Without it nobody sees what the GPU does. PyTorch does not need it.",
        ("docker run --gpus all -it IMAGE",) if is_container else (f"sudo apt install nvidia-utils-{_NEWEST_BRANCH}",),
        {"found": False},
    )


def _explain_failure(ran: Ran) -> tuple[str, tuple[str, ...]]:
    text = f"{ran.output} {ran.errors}".lower()
    if "version mismatch" in text:
        return (
            "The driver was updated while the old one is still loaded. CUDA cannot start before both are the same.",
            ("sudo reboot",),
        )
    if "communicate with the nvidia driver" in text:
        return (
            "The kernel module is not loaded or does not fit the kernel, so no GPU is detected.",
            ("sudo modprobe nvidia", install_driver()),
        )
    return (
        "Without a working driver no GPU is detected during training. Reinstall the driver.",
        (install_driver(),),
    )


# ---------------------------------------------------------------------------------------------------------- toolkit


def find_toolkits(env: Mapping[str, str], root: Path = Path("/usr/local")) -> list[Path]:
    """Return directories with an nvcc that PATH may lack, the likeliest first."""
    places = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    places += [root / "cuda", *sorted(root.glob("cuda-*"), reverse=True)]
    return [place / "bin" for place in places if (place / "bin/nvcc").is_file()]


def judge_toolkit(ran: Ran, off_path: Sequence[Path], torch_cuda: str | None, has_gpu: bool) -> Finding:
    """Look at ``nvcc --version``; ``off_path`` are toolkits that PATH does not name."""
    check = "gpu.toolkit"
    needed = "It is needed to build bitsandbytes, flash-attn and others from source, not for training itself."
    if ran.is_missing:
        if off_path:
            return Finding(
                check,
                WARNING,
                f"`nvcc: command not found`, although the CUDA toolkit is in {off_path[0].parent}",
                f"The CUDA toolkit is not on PATH. {needed}",
                (f"export PATH={off_path[0]}:$PATH",),
                {"nvcc": None, "off_path": str(off_path[0])},
            )
        install = (f"sudo apt install cuda-toolkit-{(torch_cuda or '13.0').replace('.', '-')}",) if has_gpu else ()
        return Finding(
            check,
            NOTE,
            "`nvcc: command not found`: no CUDA toolkit is installed",
            needed,
            (*install, "export PATH=/usr/local/cuda/bin:$PATH") if has_gpu else (),
            {"nvcc": None},
        )
    found = re.search(r"release (\d+\.\d+)", ran.output)
    if not ran.is_good or found is None:
        return Finding(
            check,
            WARNING,
            "nvcc did not answer in time" if ran.timed_out else f"nvcc does not work: {ran.reason()}",
            f"Its installation is broken. {needed}",
            ("sudo apt install --reinstall cuda-toolkit",),
            {"nvcc": None},
        )
    version = found[1]
    facts = {"nvcc": version, "torch_cuda": torch_cuda}
    if major(version) < OLDEST_TOOLKIT:
        return Finding(
            check,
            WARNING,
            f"the CUDA toolkit is {version}, older than {OLDEST_TOOLKIT}.0",
            f"It cannot compile for current GPUs. {needed}",
            (f"sudo apt install cuda-toolkit-{(torch_cuda or '13.0').replace('.', '-')}",),
            facts,
        )
    if torch_cuda is not None and major(version) != major(torch_cuda):
        return Finding(
            check,
            WARNING,
            f"the CUDA toolkit is {version}, PyTorch was built for CUDA {torch_cuda}",
            f"PyTorch refuses to build extensions across major versions. {needed}",
            (
                f"sudo apt install cuda-toolkit-{torch_cuda.replace('.', '-')}",
                f"export CUDA_HOME=/usr/local/cuda-{torch_cuda} PATH=/usr/local/cuda-{torch_cuda}/bin:$PATH",
            ),
            facts,
        )
    return Finding(check, OK, f"nvcc {version}", facts=facts)


# ---------------------------------------------------------------------------------------------------- PyTorch's view


def judge_torch(torch: TorchFacts, driver: Driver, visible: str | None, machine: str, pip: str) -> Finding:
    """Look at whether PyTorch can use the GPU that the driver shows.

    ``visible`` is CUDA_VISIBLE_DEVICES, ``machine`` the processor's architecture, ``pip`` the line that installs into
    this environment, without its packages.
    """
    check = "gpu.torch"
    build = f"CUDA {torch.cuda}" if torch.cuda else "the CPU only"
    facts = {"torch": torch.version, "cuda": torch.cuda, "is_available": torch.is_available, "driver": driver.version}
    if torch.is_available:
        return Finding(check, OK, f"torch {torch.version} uses CUDA {torch.cuda}", facts=facts)
    if not driver.sees_gpu:
        return Finding(
            check, OK if driver.ran.is_missing else NOTE, f"torch {torch.version}, built for {build}", facts=facts
        )
    if torch.cuda is None:
        why, fix = _cpu_build(driver, machine, pip)
        return Finding(
            check, PROBLEM, f"torch {torch.version} is built for the CPU only, but there is a GPU", why, fix, facts
        )
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return Finding(
            check,
            PROBLEM,
            f"CUDA_VISIBLE_DEVICES is `{visible}`, which hides every GPU",
            "The GPU is not detected during training, so it would use the CPU.",
            ("unset CUDA_VISIBLE_DEVICES",),
            facts,
        )
    if driver.cuda and major(driver.cuda) < major(torch.cuda):
        return Finding(
            check,
            PROBLEM,
            f"driver {driver.version} serves CUDA up to {driver.cuda}, torch {torch.version} was built for CUDA "
            f"{torch.cuda}",
            "CUDA driver and runtime do not match, so the GPU is not detected during training. Install driver "
            f"{OLDEST_DRIVERS.get(major(torch.cuda), 'of that CUDA')} or newer, or a PyTorch built for CUDA "
            f"{major(driver.cuda)}.",
            (install_driver(torch.cuda),),
            facts,
        )
    return Finding(
        check,
        PROBLEM,
        f"torch {torch.version} (CUDA {torch.cuda}) cannot use the GPU: {torch.error or 'no reason given'}",
        "The driver sees the GPU and its version fits. Usually the module for CUDA is not loaded, the device files "
        "belong to another group, or LD_LIBRARY_PATH names the libraries of another CUDA.",
        ("sudo modprobe nvidia-uvm", "ls -l /dev/nvidia*", "unset LD_LIBRARY_PATH"),
        facts,
    )


def _cpu_build(driver: Driver, machine: str, pip: str) -> tuple[str, tuple[str, ...]]:
    why = "The GPU is not detected during training, so it would use the CPU. "
    if machine == "aarch64":
        why += (
            "On ARM64 not every index has the CUDA build: the container's PyTorch has it, and an environment made "
            "with --system-site-packages sees it."
        )
        return why, (
            "docker run --gpus all -it nvcr.io/nvidia/pytorch:25.11-py3",
            "python3 -m venv --system-site-packages .venv && .venv/bin/pip install -e .",
        )
    newest = f" (this driver serves CUDA {driver.cuda})" if driver.cuda else ""
    return f"{why}Install the CUDA build{newest}.", (f"{pip} --force-reinstall --no-cache-dir 'torch>=2.10,<2.14'",)


def judge_devices(torch: TorchFacts, pip: str) -> Iterator[Finding]:
    """Look at each GPU: whether PyTorch has kernels for it, what it can compute in, how much memory is free."""
    for number, device in enumerate(torch.devices):
        yield _judge_capability(number, device, torch, pip)
        if not device.is_integrated:
            yield _judge_free_memory(number, device)


def has_kernels_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Tell whether kernels compiled for ``architectures`` run on a GPU.

    Machine code (``sm_``) runs on the same major version with the same or a higher minor one, unless its name ends in
    ``a`` or ``f``; the intermediate code (``compute_``) is compiled for anything newer.
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        built = (int(found[2]), int(found[3]))
        if found[4] == "a":
            if capability == built:
                return True
        elif found[1] == "compute" and not found[4]:
            if capability >= built:
                return True
        elif capability[0] == built[0] and capability >= built:
            return True
    return False


def _judge_capability(number: int, device: Device, torch: TorchFacts, pip: str) -> Finding:
    check, digits = "gpu.device", "{}.{}".format(*device.capability)
    what = f"GPU {number}: {device.name}, compute capability {digits}, {gib(device.total)}"
    facts = {
        "index": number,
        "name": device.name,
        "capability": digits,
        "total": device.total,
        "free": device.free,
        "is_unified": device.is_integrated,
        "bf16": device.capability >= BF16_CAPABILITY,
        "fp8": device.capability >= FP8_CAPABILITY,
    }
    if not has_kernels_for(device.capability, torch.architectures):
        return Finding(
            check,
            PROBLEM,
            f"{what}: torch {torch.version} has no kernels for it",
            f"It was compiled for {', '.join(torch.architectures)}; training would end with `no kernel image is "
            "available`. Take a newer PyTorch for a newer GPU, one built for CUDA 12 for an older GPU.",
            (f"{pip} --upgrade 'torch>=2.10,<2.14'",),
            facts,
        )
    if device.capability < BF16_CAPABILITY:
        return Finding(
            check,
            WARNING,
            f"{what}: no bf16",
            "The recipes compute in bfloat16, which this GPU only emulates. Train in float32, or take a GPU of "
            "capability 8.0 or higher.",
            ("automodel recipe.yaml --model.torch_dtype float32",),
            facts,
        )
    return Finding(check, OK, f"{what}{', FP8' if facts['fp8'] else ''}", facts=facts)


def _judge_free_memory(number: int, device: Device) -> Finding:
    what = f"GPU {number}: {gib(device.free)} of {gib(device.total)} free"
    facts = {"index": number, "total": device.total, "free": device.free}
    if device.free >= LEAST_FREE_SHARE * device.total:
        return Finding("gpu.memory", OK, what, facts=facts)
    return Finding(
        "gpu.memory",
        WARNING,
        what,
        "Other processes hold the rest, so training may run out of memory. End them, or make the run smaller.",
        (
            "nvidia-smi --query-compute-apps=pid,used_memory,name --format=csv",
            "automodel recipe.yaml --step_scheduler.local_batch_size 1 --distributed.activation_checkpointing full",
        ),
        facts,
    )


def has_device_files(root: Path = Path("/dev")) -> bool:
    """Tell whether the kernel shows an NVIDIA device."""
    return any(root.glob("nvidia[0-9]*")) or (root / "nvidiactl").exists()


def check_driver(driver: Driver, torch: TorchFacts | None) -> Finding:
    """Judge the driver on this machine."""
    cuda_works = torch is not None and torch.is_available
    return judge_driver(driver, has_device_files(), in_container(), cuda_works)


def check_toolkit(env: Mapping[str, str], torch: TorchFacts | None, has_gpu: bool) -> Finding:
    """Ask nvcc, and judge it."""
    ran = run_program(["nvcc", "--version"])
    return judge_toolkit(ran, find_toolkits(env), torch.cuda if torch is not None else None, has_gpu)
