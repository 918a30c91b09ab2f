"""The doctor finds what was broken on purpose, says how to mend it, and survives whatever it looks at.

Faults are planted as they occur: programs of a PATH that answer something else, variables, files, a server that speaks
the Hub's question. What depends on a machine nobody has here is judged from its numbers.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend

from nemo_automodel.cli import doctor
from nemo_automodel.cli.app import main
from nemo_automodel.components.doctor import assembler, gpu, host, hub, kernel_probes, packages, probes, tools, view
from nemo_automodel.components.doctor.findings import (
    GIB,
    NOTE,
    OK,
    PROBLEM,
    WARNING,
    Finding,
    hide,
    pip_command,
    run_check,
)
from nemo_automodel.components.doctor.probes import Result, Surroundings
from nemo_automodel.components.doctor.programs import Ran, run_program

ROOT = Path(__file__).resolve().parents[2]
PIP = "python -m pip install"
SECRET = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
MISSING = Ran(None, is_missing=True)

OF_THIS_MACHINE = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "DOCKER_HOST", "DOCKER_CONTEXT",
    "DOCKER_CONFIG", "CC", "TRITON_INTERPRET", "TRITON_PTXAS_PATH", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip

FAKE_PROBES = """
import json, os, sys
FACTS = json.loads(os.environ["FAKE_TORCH"])
for name in sys.argv[1:]:
    for outcome in ("started", "good"):
        told = {"probe": name, "outcome": outcome, "text": "error 1e-06", "facts": FACTS if name == "torch" else {}}
        print("@doctor " + json.dumps(told), flush=True)
"""
CPU_TORCH = gpu.TorchFacts("2.13.0+cpu", None)
GB10 = gpu.Device("NVIDIA GB10", (12, 1), 120 * GIB, 100 * GIB, is_integrated=True)
H100 = gpu.Device("NVIDIA H100", (9, 0), 80 * GIB, 79 * GIB)
CUDA_TORCH = gpu.TorchFacts(
    "2.13.0",
    "13.0",
    True,
    architectures=("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
    devices=(H100,),
)
BLIND_TORCH = gpu.TorchFacts("2.13.0", "13.0", error="The NVIDIA driver on your system is too old")


def as_json(torch_facts: gpu.TorchFacts) -> str:
    return json.dumps({**vars(torch_facts), "devices": [vars(device) for device in torch_facts.devices]})


def smi(driver: str, cuda: str, name: str = "NVIDIA GB10") -> str:
    return f"""
case "$*" in
  *--query-gpu*) echo "{driver}, {name}" ;;
  *) echo "| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |" ;;
esac
"""


def nvcc(version: str) -> str:
    return f'echo "Cuda compilation tools, release {version}, V{version}.48"'


GOOD_PROGRAMS = {
    "uv": "echo uv 0.13.0",
    "git": "echo git version 2.43.0",
    "docker": "echo CONTAINER ID",
    "gcc": "exit 0",
    "nvcc": nvcc("13.0"),
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that makes these shell scripts the only programs there are; None leaves one out."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def plant(**scripts: str | None) -> Path:
        for name, body in scripts.items():
            path = directory / name.replace("_", "-")
            path.unlink(missing_ok=True)
            if body is not None:
                path.write_text(f"#!/bin/sh\n{body}\n")
                path.chmod(0o755)
        return directory

    return plant


@pytest.fixture
def machine(programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """Return a function that examines a healthy machine with the given faults planted: check → finding.

    Every program is a script of the test, the Hub's directory is empty, and PyTorch's answers come from a process
    that speaks like the real one.
    """
    programs(**GOOD_PROGRAMS)
    child = tmp_path / "child.py"
    child.write_text(FAKE_PROBES)
    monkeypatch.setattr(probes, "COMMAND", (sys.executable, "-S", "-E", str(child)))
    monkeypatch.chdir(tmp_path)
    for name in [*hub.OFFLINE_SWITCHES, *OF_THIS_MACHINE]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there

    def examine(
        torch_facts: gpu.TorchFacts = CPU_TORCH, env: dict[str, str] | None = None, **scripts: str | None
    ) -> dict[str, Finding]:
        programs(**scripts)
        monkeypatch.setenv("FAKE_TORCH", as_json(torch_facts))
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        return {finding.check: finding for finding in doctor.examine(os.environ)}

    return examine


# ---------------------------------------------------------------------------------------------- the real machine


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, with its real kernels, on this machine without a GPU."""
    env = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_TOKEN": SECRET}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "nemo_automodel.cli.app", "doctor", "--json", "--offline"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_json_has_the_documented_keys(real):
    report = json.loads(real.stdout)
    assert list(report) == ["schema", "version", "status", "counts", "hub_asked", "findings"]
    assert report["schema"] == 1
    assert list(report["counts"]) == ["problem", "warning", "note", "ok"]
    assert sum(report["counts"].values()) == len(report["findings"])
    for finding in report["findings"]:
        assert set(finding) == {"check", "topic", "status", "what", "why", "fix", "facts"}
        assert finding["check"].startswith(finding["topic"] + ".")
    assert real.returncode == (1 if report["counts"]["problem"] else 0)


def test_real_kernels_agree_with_float64(real):
    found = {finding["check"]: finding for finding in json.loads(real.stdout)["findings"]}
    for name in ("kernels.cpu_matmul", "kernels.cpu_attention"):
        assert found[name]["status"] == OK, found[name]
        assert float(found[name]["facts"]["text"].removeprefix("error ")) < 1e-5
    assert found["collectives.gloo"]["facts"]["text"] == "all-reduce of one process"
    assert found["kernels.bitsandbytes"]["facts"]["text"] == "exact on the CPU"
    skipped = [name for name, finding in found.items() if finding["facts"].get("text") == "no CUDA device"]
    assert len(skipped) == 8
    assert {found[name]["status"] for name in skipped} == {NOTE}


def test_offline_asks_nobody_and_the_token_is_not_shown(real):
    report = json.loads(real.stdout)
    scopes = next(finding for finding in report["findings"] if finding["check"] == "hub.scopes")
    assert report["hub_asked"] is False
    assert scopes["what"] == "what the token may do is unknown: --offline forbids to ask the Hub"
    assert SECRET not in real.stdout + real.stderr


def test_importing_the_command_is_cheap():
    heavy = ("torch", "transformers", "numpy", "rich", "packaging", "urllib.request", "subprocess")
    code = f"import sys, nemo_automodel.cli.doctor; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ------------------------------------------------------------------------------------- the playbook's table, row by row


def test_playbook_nvcc_command_not_found(machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin/nvcc").touch()
    found = machine(nvcc=None, env={"CUDA_HOME": str(toolkit)})["gpu.toolkit"]
    assert found.status == WARNING
    assert found.what == f"`nvcc: command not found`, although the CUDA toolkit is in {toolkit}"
    assert found.fix == (f"export PATH={toolkit}/bin:$PATH",)
    nowhere = gpu.judge_toolkit(MISSING, [], "13.0", has_gpu=True)
    assert nowhere.status == NOTE
    assert nowhere.fix == ("sudo apt install cuda-toolkit-13-0", "export PATH=/usr/local/cuda/bin:$PATH")


def test_playbook_uv_permission_denied():
    system = tools.judge_uv(MISSING, None, in_environment=False, is_managed=False, has_pip=True)
    assert system.fix == ("pip3 install --user uv", 'export PATH="$HOME/.local/bin:$PATH"')
    managed = tools.judge_uv(MISSING, None, in_environment=False, is_managed=True, has_pip=True)
    assert managed.fix == ("python3 -m venv .venv && .venv/bin/pip install uv",)
    inside = tools.judge_uv(MISSING, None, in_environment=True, is_managed=True, has_pip=True)
    assert inside.fix[0].endswith("-m pip install uv")
    hidden = tools.judge_uv(MISSING, Path("/x/.local/bin/uv"), in_environment=False, is_managed=False, has_pip=True)
    assert hidden.what == "uv is in /x/.local/bin, which PATH lacks"
    assert hidden.fix == ('export PATH="$HOME/.local/bin:$PATH"',)


def test_playbook_gpu_is_not_detected_because_driver_and_runtime_differ(machine):
    found = machine(BLIND_TORCH, nvidia_smi=smi("535.129.03", "12.2"))["gpu.torch"]
    assert found.status == PROBLEM
    assert found.what == "driver 535.129.03 serves CUDA up to 12.2, torch 2.13.0 was built for CUDA 13.0"
    assert "Install driver 580 or newer, or a PyTorch built for CUDA 12." in found.why
    assert found.fix == ("sudo apt install nvidia-driver-580-open && sudo reboot",)


def test_playbook_out_of_memory_during_training():
    busy = gpu.Device("NVIDIA H100", (9, 0), 80 * GIB, 30 * GIB)
    facts = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_90",), devices=(busy,))
    found = {finding.check: finding for finding in gpu.judge_devices(facts, PIP)}["gpu.memory"]
    assert (found.status, found.what) == (WARNING, "GPU 0: 30.0 GiB of 80.0 GiB free")
    assert found.fix[1] == (
        "automodel recipe.yaml --step_scheduler.local_batch_size 1 --distributed.activation_checkpointing full"
    )
    idle = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_90",), devices=(H100,))
    assert [finding.status for finding in gpu.judge_devices(idle, PIP)] == [OK, OK]


def test_playbook_arm64_packages():
    spark = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_120",), devices=(GB10,))
    around = Surroundings(True, "aarch64", spark)
    build = "CMAKE_ARGS='-DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=121' CUDA_HOME=/usr/local/cuda-13 " + pip_command(
        "--no-deps git+https://github.com/bitsandbytes-foundation/bitsandbytes.git", has_pip=True
    )
    assert probes.judge_missing_4bit(around).fix[1] == build
    crashed = probes.judge_result(Result("bitsandbytes", "crashed", "its process died of SIGILL"), around)
    assert crashed.status == WARNING
    assert crashed.what == "bitsandbytes NF4 crashes: its process died of SIGILL"
    assert crashed.fix == (build,)
    driver = gpu.Driver(Ran(0), "580.95", "13.0", ("NVIDIA GB10",))
    wheel = gpu.judge_torch(CPU_TORCH, driver, None, "aarch64", PIP)
    assert wheel.status == PROBLEM
    assert wheel.fix[1] == "python3 -m venv --system-site-packages .venv && .venv/bin/pip install -e ."
    assert host.judge_architecture("aarch64").status == OK
    assert host.judge_architecture("riscv64").status == WARNING


def test_playbook_gated_repository(machine):
    found = machine()["hub.token"]
    assert (found.status, found.what, found.fix) == (NOTE, "no Hugging Face token", ("hf auth login",))
    assert "`Cannot access gated repo for url`" in found.why
    assert "ask for access on the model's page" in found.why
    assert "http://127.0.0.1:9/settings/tokens" in found.why


def test_playbook_unified_memory(machine):
    spark = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_120",), devices=(GB10,))
    found = machine(spark, nvidia_smi=smi("580.95.05", "13.0"))
    assert found["machine.unified_memory"].fix == ("sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'",)
    assert "gpu.memory" not in found  # its free memory says nothing there
    full_of_files = host.Memory(total=120 * GIB, available=110 * GIB, free=20 * GIB, cached=90 * GIB)
    assert host.judge_unified_memory(full_of_files).status == WARNING
    fresh = host.Memory(total=120 * GIB, available=110 * GIB, free=105 * GIB, cached=5 * GIB)
    assert host.judge_unified_memory(fresh).status == NOTE


def test_playbook_docker_permission_denied(machine):
    denied = 'echo "permission denied while trying to connect to the Docker daemon socket" >&2; exit 1'
    found = machine(docker=denied, id="echo users sudo")["tools.docker"]
    assert found.status == WARNING
    assert found.fix == ("sudo usermod -aG docker $USER", "newgrp docker")
    late = machine(docker=denied, id='[ $# -eq 1 ] && echo users || echo "users docker"')["tools.docker"]
    assert late.fix == ("newgrp docker",)
    inside = machine(docker=denied, id="echo users docker")["tools.docker"]
    assert inside.fix == ("ls -l /var/run/docker.sock", "sudo systemctl restart docker.socket docker")


# -------------------------------------------------------------------------------------- drivers, toolkits, devices


def test_a_healthy_machine_has_no_problem_and_no_warning(machine):
    found = machine(CUDA_TORCH, nvidia_smi=smi("580.95.05", "13.0", "NVIDIA H100"))
    worse = {name: finding for name, finding in found.items() if finding.status in (PROBLEM, WARNING)}
    worse.pop("machine.bytecode", None)  # of whoever runs the tests
    worse = {name: f for name, f in worse.items() if not name.startswith(("machine.disk", "machine.shm", "packages."))}
    assert worse == {}
    assert found["gpu.driver"].what == "driver 580.95.05, serves CUDA up to 13.0"
    assert found["gpu.toolkit"].what == "nvcc 13.0"
    assert found["gpu.torch"].what == "torch 2.13.0 uses CUDA 13.0"
    assert found["gpu.device"].what == "GPU 0: NVIDIA H100, compute capability 9.0, 80.0 GiB, FP8"
    assert found["tools.docker"].what == "docker works without sudo"


@pytest.mark.parametrize(
    ("script", "what", "fix"),
    [
        (
            'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18',
            "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch",
            "sudo reboot",
        ),
        (
            'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9',
            "nvidia-smi fails: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            "sudo modprobe nvidia",
        ),
        ("exit 1", "nvidia-smi fails: exit status 1", "sudo apt install nvidia-driver-580-open && sudo reboot"),
        ("exit 0", "nvidia-smi lists no GPU", "lspci | grep -i nvidia"),
    ],
)
def test_broken_drivers(machine, script: str, what: str, fix: str):
    found = machine(BLIND_TORCH, nvidia_smi=script)["gpu.driver"]
    assert (found.status, found.what, found.fix[0]) == (PROBLEM, what, fix)


def test_a_hung_driver_is_cut_off(programs):
    programs(nvidia_smi="/bin/sleep 60 & /bin/sleep 60")
    start = time.monotonic()
    driver = gpu.ask_driver(timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert driver.ran.timed_out
    hung = gpu.judge_driver(driver, has_device_files=True, is_container=False)
    assert (hung.status, hung.what) == (PROBLEM, "nvidia-smi did not answer within 8 s")
    slow = gpu.judge_driver(driver, has_device_files=True, is_container=False, cuda_works=True)
    assert (slow.status, slow.fix) == (WARNING, ("sudo nvidia-smi -pm 1",))


def test_no_driver(programs):
    driver = gpu.ask_driver()
    assert gpu.judge_driver(driver, has_device_files=False, is_container=False).status == NOTE
    assert gpu.judge_driver(driver, has_device_files=False, is_container=True).fix == (
        "docker run --gpus all -it IMAGE",
    )
    alone = gpu.judge_driver(driver, has_device_files=True, is_container=False)
    assert alone.what == "there is an NVIDIA GPU, but no nvidia-smi"


@pytest.mark.parametrize(
    ("torch_facts", "cuda", "visible", "status", "what"),
    [
        (CUDA_TORCH, "12.2", None, OK, "torch 2.13.0 uses CUDA 13.0"),  # a compatibility package serves it
        (CPU_TORCH, "13.0", None, PROBLEM, "torch 2.13.0+cpu is built for the CPU only, but there is a GPU"),
        (BLIND_TORCH, "13.0", "", PROBLEM, "CUDA_VISIBLE_DEVICES is ``, which hides every GPU"),
        (BLIND_TORCH, "13.0", "-1", PROBLEM, "CUDA_VISIBLE_DEVICES is `-1`, which hides every GPU"),
        (
            BLIND_TORCH,
            "13.1",
            "0",
            PROBLEM,
            "torch 2.13.0 (CUDA 13.0) cannot use the GPU: The NVIDIA driver on your system is too old",
        ),
    ],
)
def test_pytorch_against_the_driver(torch_facts, cuda: str, visible: str | None, status: str, what: str):
    driver = gpu.Driver(Ran(0), "1.2.3", cuda, ("NVIDIA H100",))
    found = gpu.judge_torch(torch_facts, driver, visible, "x86_64", PIP)
    assert (found.status, found.what) == (status, what)


def test_without_a_gpu_any_pytorch_is_fine():
    assert gpu.judge_torch(CPU_TORCH, gpu.Driver(MISSING), None, "x86_64", PIP).status == OK
    assert gpu.judge_torch(BLIND_TORCH, gpu.Driver(MISSING), None, "x86_64", PIP).status == OK


@pytest.mark.parametrize(
    ("version", "status", "what"),
    [
        ("11.8", WARNING, "the CUDA toolkit is 11.8, older than 12.0"),
        ("12.8", WARNING, "the CUDA toolkit is 12.8, PyTorch was built for CUDA 13.0"),
        ("13.1", OK, "nvcc 13.1"),
    ],
)
def test_toolkits(machine, version: str, status: str, what: str):
    found = machine(CUDA_TORCH, nvidia_smi=smi("580.95.05", "13.0"), nvcc=nvcc(version))["gpu.toolkit"]
    assert (found.status, found.what) == (status, what)
    assert (found.fix[:1] == ("sudo apt install cuda-toolkit-13-0",)) is (status != OK)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80", "sm_86"), True),  # a later minor version of the same major one
        ((8, 0), ("sm_86", "sm_90"), False),
        ((12, 1), ("sm_120",), True),
        ((12, 1), ("sm_100",), False),
        ((12, 1), ("sm_90", "compute_90"), True),  # compiled from the intermediate code
        ((9, 0), ("sm_90a",), True),
        ((12, 1), ("sm_120a",), False),
        ((12, 1), ("sm_120f",), True),
        ((6, 1), ("sm_75", "sm_80", "sm_90", "sm_120"), False),
        ((9, 0), (), False),
    ],
)
def test_which_gpus_have_kernels(capability: tuple[int, int], architectures: tuple[str, ...], expected: bool):
    assert gpu.has_kernels_for(capability, architectures) is expected


def test_old_gpus():
    pascal = gpu.Device("NVIDIA P100", (6, 0), 16 * GIB, 16 * GIB)
    facts = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_75", "sm_90"), devices=(pascal,))
    found = next(gpu.judge_devices(facts, PIP))
    assert found.status == PROBLEM
    assert found.what.endswith("torch 2.13.0 has no kernels for it")
    turing = gpu.Device("Tesla T4", (7, 5), 16 * GIB, 16 * GIB)
    facts = gpu.TorchFacts("2.13.0", "13.0", True, architectures=("sm_75",), devices=(turing,))
    found = next(gpu.judge_devices(facts, PIP))
    assert (found.status, found.facts["bf16"], found.facts["fp8"]) == (WARNING, False, False)


# ----------------------------------------------------------------------------------------------------- the machine


def test_python_and_architecture():
    assert host.judge_python((3, 12, 1), True).status == OK
    assert host.judge_python((3, 9, 18), True).what == "Python 3.9.18"
    assert host.judge_python((3, 9, 18), True).status == PROBLEM
    assert host.judge_python((3, 12, 1), False).status == PROBLEM


def write_proc(tmp_path: Path, total_gib: int, available_gib: int) -> Path:
    lines = {"MemTotal": total_gib, "MemFree": 1, "MemAvailable": available_gib, "Buffers": 1, "Cached": 3}
    text = "".join(f"{name}: {value * 2**20} kB\n" for name, value in lines.items())
    (tmp_path / "meminfo").write_text(text)
    return tmp_path


def test_memory_of_the_machine(tmp_path: Path):
    memory = host.read_memory(write_proc(tmp_path, 128, 120), tmp_path / "nothing")
    assert memory == host.Memory(128 * GIB, 120 * GIB, GIB, 4 * GIB)
    assert host.judge_memory(memory).what == "120.0 GiB of 128.0 GiB memory free"
    assert host.judge_memory(memory).status == OK
    assert host.judge_memory(host.Memory(16 * GIB, 10 * GIB, 0, 0)).status == NOTE
    assert host.judge_memory(host.Memory(128 * GIB, GIB, 0, 0)).status == WARNING


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(tmp_path: Path, version: int):
    cgroup = tmp_path / "cgroup"
    folder = cgroup / "memory" if version == 1 else cgroup
    folder.mkdir(parents=True)
    limit, used, inactive = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / limit).write_text(f"{8 * GIB}\n")
    (folder / used).write_text(f"{7 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon {GIB}\n{inactive} {3 * GIB}\n")
    memory = host.read_memory(write_proc(tmp_path, 128, 120), cgroup)
    assert (memory.total, memory.available, memory.is_limited) == (8 * GIB, 4 * GIB, True)
    assert host.judge_memory(memory).what == "4.0 GiB of 8.0 GiB memory free (the container's limit)"


def test_disks(tmp_path: Path):
    def judge(free: int, is_writable: bool = True) -> Finding:
        return host.judge_disk(host.CHECKPOINTS, tmp_path, 100 * GIB, free, is_writable)

    assert judge(50 * GIB).status == OK
    assert (judge(5 * GIB).status, judge(GIB // 2).status) == (WARNING, PROBLEM)
    assert judge(GIB // 2).what == f"checkpoints: only 0.5 GiB of 100.0 GiB free at {tmp_path}"
    denied = judge(50 * GIB, is_writable=False)
    assert (denied.status, denied.what) == (PROBLEM, f"checkpoints: {tmp_path} cannot be written")
    assert denied.fix[0] == f'sudo install -d -o "$(id -un)" -g "$(id -gn)" {tmp_path}'


def test_a_file_in_the_place_of_a_directory_is_no_place_to_write(tmp_path: Path):
    (tmp_path / "checkpoints").touch()
    assert host.check_disk(host.CHECKPOINTS, tmp_path / "checkpoints").status == PROBLEM
    assert host.check_disk(host.CHECKPOINTS, tmp_path / "checkpoints/below").status == PROBLEM
    assert host.check_disk(host.CHECKPOINTS, tmp_path / "new/below").status in (OK, WARNING)


def test_where_the_hub_keeps_models(tmp_path: Path):
    assert host.hub_cache({"HF_HOME": "/a"}) == Path("/a/hub")
    assert host.hub_cache({"XDG_CACHE_HOME": "/b"}) == Path("/b/huggingface/hub")
    assert host.hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/a"}) == Path("/c")
    from huggingface_hub import constants

    assert host.hub_cache(os.environ) == Path(constants.HF_HUB_CACHE)


def test_shared_memory():
    docker = host.judge_shm(64 * 2**20, is_container=True)
    assert (docker.status, docker.what) == (WARNING, "/dev/shm holds 64 MiB")
    assert docker.fix[0] == "docker run --shm-size=8g --ulimit memlock=-1 --gpus all -it IMAGE"
    assert host.judge_shm(64 * 2**20, is_container=False).fix[0] == "sudo mount -o remount,size=8G /dev/shm"
    assert host.judge_shm(8 * GIB, is_container=True).status == OK


def test_limits():
    assert host.judge_limits(1024, -1, -1, has_gpu=True).status == OK
    few = host.judge_limits(256, -1, -1, has_gpu=False)
    assert (few.status, few.fix) == (WARNING, ("ulimit -n 4096",))
    assert host.judge_limits(-1, 8 * GIB, -1, has_gpu=True).status == PROBLEM
    assert host.judge_limits(-1, 8 * GIB, -1, has_gpu=False).status == WARNING
    locked = host.judge_limits(1024, -1, 65536, has_gpu=True)
    assert (locked.status, locked.what) == (NOTE, "1024 open files, 64 KiB of locked memory (ulimit -l)")


def test_limits_are_those_of_this_process():
    code = (
        "import resource, json; from nemo_automodel.components.doctor import host\n"
        "checks = host.host_checks({}, False, 'utf-8')\n"
        "print(json.dumps(checks['machine.limits']().to_json()))"
    )
    command = f'ulimit -n 300; exec {sys.executable} -c "$CODE"'
    env = {**os.environ, "CODE": code}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["what"] == "only 300 files may be open at once (ulimit -n)"


def test_bytecode_encoding_and_switches():
    slow = host.judge_bytecode(is_set=True, has_compiled=False)
    assert slow.status == WARNING
    assert slow.fix[0] == "unset PYTHONDONTWRITEBYTECODE"
    assert "-m compileall -q " in slow.fix[1]
    assert host.judge_bytecode(is_set=True, has_compiled=True).status == OK
    assert host.judge_bytecode(is_set=False, has_compiled=False).status == OK
    assert host.judge_encoding("UTF-8", "utf-8").status == OK
    ascii_only = host.judge_encoding("ANSI_X3.4-1968", "utf-8")
    assert (ascii_only.status, ascii_only.fix) == (WARNING, ("export LC_ALL=C.UTF-8 PYTHONUTF8=1",))
    assert host.judge_switches({"TRITON_INTERPRET": "0"}).status == OK
    on = host.judge_switches({"TRITON_INTERPRET": "1", "CUDA_LAUNCH_BLOCKING": "1"})
    assert (on.status, on.fix) == (WARNING, ("unset TRITON_INTERPRET CUDA_LAUNCH_BLOCKING",))


def test_an_ascii_terminal_gets_ascii(machine, monkeypatch: pytest.MonkeyPatch):
    finding = Finding("machine.python", PROBLEM, "ein Weg: /Übung", "warum", ("cd /Übung",))
    page = view.render([finding], has_colour=False, encoding="ascii", width=80)
    assert page.isascii()
    assert "X ein Weg: /?bung" in page


# ------------------------------------------------------------------------------------------------- packages, tools


def test_requirements():
    needed = [Requirement("torch>=2.10,<2.14"), Requirement("datasets>=4.0"), Requirement("rich>=13")]
    wrong = packages.judge_requirements(needed, {"torch": "2.9.1+cu128", "rich": "15.0"}, PIP)
    assert wrong.status == PROBLEM
    assert wrong.what == "torch 2.9.1+cu128 is not <2.14,>=2.10; datasets is missing"
    assert wrong.fix == (f"{PIP} 'torch<2.14,>=2.10' 'datasets>=4.0'",)
    assert (
        packages.judge_requirements(needed, {"torch": "2.13.0+cpu", "datasets": "5.2", "rich": "15"}, PIP).status == OK
    )


def test_tested_versions(tmp_path: Path):
    pins_file = tmp_path / "constraints.txt"
    pins_file.write_text(
        "# a remark\ntorch==2.13.0\nPyYAML==6.0.3\nnumpy==2.4.6 ; python_version >= '3.10'\n"
        "old==1 ; python_version < '3'\n"
    )
    pins = packages.read_pins(pins_file)
    assert pins == {"torch": "2.13.0", "pyyaml": "6.0.3", "numpy": "2.4.6"}
    same = packages.judge_tested({"torch": "2.13.0+cu130", "pyyaml": "6.0.3"}, pins, {"torch"}, PIP)
    assert same.status == OK
    near = packages.judge_tested({"torch": "2.11.0", "numpy": "2.5.0"}, pins, {"torch"}, PIP)
    assert near.status == NOTE
    assert near.what == "other than the tested versions: torch 2.11.0 (tested: 2.13.0), 1 packages that others need"
    assert near.fix == (f"{PIP} -c constraints.txt -e .",)
    assert packages.judge_tested({"torch": "3.0"}, pins, {"torch"}, PIP).status == WARNING


def test_the_constraints_of_this_repository_can_be_read():
    pins = packages.read_pins(ROOT / "constraints.txt")
    assert pins["torch"].startswith("2.")
    assert len(pins) > 50


def test_extras_say_what_they_would_enable():
    extras = {
        "qlora": [Requirement("bitsandbytes>=0.49"), Requirement("accelerate>=1.10")],
        "wandb": [Requirement("wandb")],
    }
    found = packages.judge_extras(extras, {"accelerate": "1.15"}, PIP)
    assert found.status == NOTE
    assert found.what == (
        "not installed: qlora (bitsandbytes) for bases in 4 or 8 bits (QLoRA); "
        "wandb (wandb) for the tracker Weights & Biases"
    )
    assert found.fix == (f"{PIP} -e '.[qlora,wandb]'",)
    assert set(packages._ENABLES) == set(packages._extras()), "an extra of pyproject.toml has no description"


def test_two_copies_of_the_package():
    found = packages.judge_project("/somewhere", "0.1.0", "0.5.0", examples=True)
    assert (found.status, found.what) == (
        WARNING,
        "nemo_automodel 0.1.0 is imported from /somewhere, but 0.5.0 is installed",
    )
    assert packages.judge_project("/somewhere", "0.1.0", None, examples=True).status == NOTE


def test_pip_lines_fit_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert pip_command("uv", has_pip=True) == "'my env/bin/python' -m pip install uv"
    assert pip_command("uv", has_pip=False) == "uv pip install --python 'my env/bin/python' uv"


def test_compiler():
    assert tools.judge_compiler("/usr/bin/gcc", True, has_gpu=True).status == OK
    none = tools.judge_compiler(None, False, has_gpu=True)
    assert (none.status, none.what) == (WARNING, "a C compiler and Python.h are missing")
    assert none.fix == (f"sudo apt install build-essential python3.{sys.version_info.minor}-dev",)
    assert tools.judge_compiler("/usr/bin/gcc", False, has_gpu=False).what == "Python.h is missing"


def test_a_docker_daemon_elsewhere_is_not_asked(machine, tmp_path: Path):
    asked = tmp_path / "asked"
    script = f"echo x > {asked}"
    found = machine(env={"DOCKER_HOST": "tcp://example.invalid:2375"}, docker=script)["tools.docker"]
    assert found.what == "docker talks to DOCKER_HOST, which was not asked"
    assert not asked.exists()
    settings = tmp_path / "docker"
    settings.mkdir()
    (settings / "config.json").write_text('{"currentContext": "farm"}')
    assert tools.remote_docker({"DOCKER_CONFIG": str(settings)}) == "the context `farm`"
    assert tools.remote_docker({"DOCKER_HOST": "unix:///run/docker.sock"}) is None


def test_docker_without_a_daemon(machine):
    stopped = 'echo "Cannot connect to the Docker daemon at unix:///var/run/docker.sock." >&2; exit 1'
    found = machine(docker=stopped)["tools.docker"]
    assert (found.status, found.what) == (NOTE, "the docker daemon is not running")
    assert machine(docker="echo strange; exit 3")["tools.docker"].what == "docker does not work: strange"


# ----------------------------------------------------------------------------------------------------------- Hub


class Hub(BaseHTTPRequestHandler):
    """Answers ``/api/whoami-v2`` with what the test put into ``reply``; everything that is asked is in ``asked``."""

    reply: tuple[int, Any] = (200, {})
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers.get("Authorization")))
        status, body = type(self).reply
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Hub.asked = []
    httpd = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def access(role: str, **fine_grained: Any) -> dict[str, Any]:
    token: dict[str, Any] = {"displayName": "laptop", "role": role}
    if fine_grained:
        token["fineGrained"] = fine_grained
    return {"type": "user", "name": "somebody", "auth": {"type": "access_token", "accessToken": token}}


WRITES = {"entity": {"type": "user", "name": "somebody"}, "permissions": ["repo.content.read", "repo.write"]}


@pytest.mark.parametrize(
    ("reply", "status", "what", "can_write"),
    [
        ((200, access("write")), OK, "the token may read and write", True),
        ((200, access("read")), NOTE, "the token may read, not write", False),
        (
            (200, access("fineGrained", canReadGatedRepos=False, scoped=[])),
            WARNING,
            "the token is fine-grained and may not read gated repositories",
            False,
        ),
        (
            (200, access("fineGrained", canReadGatedRepos=True, scoped=[])),
            NOTE,
            "the token is fine-grained, may read gated repositories and not write",
            False,
        ),
        (
            (200, access("fineGrained", canReadGatedRepos=True, scoped=[WRITES])),
            OK,
            "the token is fine-grained, may read gated repositories and write",
            True,
        ),
        ((401, {"error": "Invalid token"}), PROBLEM, "the Hub refuses the token from HF_TOKEN (401)", None),
        ((503, b"busy"), WARNING, "the Hub at ENDPOINT answers 503", None),
        ((200, b"<html>log in to the hotel</html>"), WARNING, "the Hub at ENDPOINT cannot be reached: NOT JSON", None),
        ((200, []), NOTE, "the token has the role `unknown`, which the doctor does not know", None),
    ],
)
def test_scopes(server: str, reply: tuple[int, Any], status: str, what: str, can_write: bool | None):
    Hub.reply = reply
    env = {"HF_TOKEN": SECRET, "HF_ENDPOINT": server}
    found = hub.check_scopes(hub.find_token(env), env, allowed=True)
    expected = what.replace("ENDPOINT", server).replace("NOT JSON", "the answer is not the Hub's")
    assert (found.status, found.what) == (status, expected)
    assert found.facts.get("can_write") == can_write
    assert Hub.asked == [("/api/whoami-v2", f"Bearer {SECRET}")]
    assert SECRET not in json.dumps(found.to_json())
    if status in (PROBLEM, WARNING) and reply[0] != 503 and reply[1] != b"<html>log in to the hotel</html>":
        assert f"{server}/settings/tokens" in found.why
        assert "hf auth login" in found.fix


def test_a_token_is_not_carried_to_another_place(server: str):
    Hub.reply = (302, {})
    env = {"HF_TOKEN": SECRET, "HF_ENDPOINT": server}
    found = hub.check_scopes(hub.find_token(env), env, allowed=True)
    assert found.what == f"the Hub at {server} answers 302"
    assert Hub.asked == [("/api/whoami-v2", f"Bearer {SECRET}")]


def test_a_token_is_not_sent_in_clear():
    assert hub.sends_in_clear("http://mirror.example")
    assert not hub.sends_in_clear("https://mirror.example")
    env = {"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://mirror.invalid"}
    found = hub.check_scopes(hub.find_token(env), env, allowed=True)
    assert (found.status, found.what) == (WARNING, "HF_ENDPOINT is not https, so the token was not sent")


def test_no_network():
    env = {"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = hub.check_scopes(hub.find_token(env), env, allowed=True)
    assert found.status == WARNING
    assert found.what.startswith("the Hub at http://127.0.0.1:9 cannot be reached: ")
    assert found.fix == ("curl -sSI http://127.0.0.1:9", "export HF_HUB_OFFLINE=1")


def test_a_server_that_never_answers_is_left(server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Hub, "do_GET", lambda self: time.sleep(0.5))
    start = time.monotonic()
    answer = hub.ask_who_am_i(server, SECRET, timeout_s=0.1)
    assert time.monotonic() - start < 5
    assert answer.status is None


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_switch_forbids_to_ask(server: str, switch: str):
    env = {"HF_TOKEN": SECRET, "HF_ENDPOINT": server, switch: "1"}
    found = hub.check_scopes(hub.find_token(env), env, allowed=True)
    assert found.what == f"what the token may do is unknown: {switch} forbids to ask the Hub"
    assert found.fix == (f"env -u {switch} automodel doctor",)
    assert Hub.asked == []


def test_without_a_token_nobody_is_asked(server: str, tmp_path: Path):
    env = {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path)}
    assert hub.check_scopes(hub.find_token(env), env, allowed=True).what == "no token, so the Hub was not asked"
    assert Hub.asked == []


def test_offline_switches():
    off = hub.judge_offline({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "yes"}, 2, 1)
    assert off.what == "HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE is set: nothing is downloaded"
    assert "(2 models and 1 data sets are there)" in off.why
    assert off.fix == ("unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",)
    unread = hub.judge_offline({"HF_HUB_OFFLINE": "yep"}, 0, 0)
    assert (unread.status, unread.what) == (WARNING, "HF_HUB_OFFLINE=yep has no effect")
    assert hub.judge_offline({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "false"}, 0, 0).status == OK


def test_switches_mean_what_the_library_takes_them_for():
    code = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    for value in ("1", "yep"):
        env = {**os.environ, "HF_HUB_OFFLINE": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(bool(hub.switched_off_by({"HF_HUB_OFFLINE": value})))


def test_broken_downloads(tmp_path: Path):
    blobs = tmp_path / "models--meta-llama--Llama-3.1-8B/blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "models--meta-llama--Llama-3.1-8B/snapshots").mkdir()
    assert hub.judge_cache(tmp_path).what == "1 models and 0 data sets in the cache"
    (blobs / "abc.incomplete").write_bytes(b"x" * 2048)
    found = hub.judge_cache(tmp_path)
    assert found.what == "1 downloads broke off (0.0 GiB): meta-llama/Llama-3.1-8B"
    assert found.fix == ("hf download meta-llama/Llama-3.1-8B",)


def test_where_the_token_comes_from(tmp_path: Path):
    env = {"HF_HOME": str(tmp_path)}
    path = tmp_path / "token"
    assert hub.judge_token(hub.find_token(env), env).facts["source"] is None
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    token = hub.find_token(env)
    assert token is not None
    assert (token.secret, token.source) == (SECRET, str(path))
    assert SECRET not in repr(token)
    assert hub.judge_token(token, env).what == f"a token from {path}"
    path.chmod(0o644)
    shared = hub.judge_token(token, env)
    assert (shared.status, shared.fix) == (WARNING, (f"chmod 600 {path}",))
    hiding = {**env, "HF_TOKEN": SECRET.replace("a", "b")}
    found = hub.judge_token(hub.find_token(hiding), hiding)
    assert (found.status, found.what) == (NOTE, f"HF_TOKEN hides another token in {path}")
    same = {**env, "HF_TOKEN": SECRET}
    assert hub.judge_token(hub.find_token(same), same).what == "a token from HF_TOKEN"
    disabled = {**same, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    assert hub.judge_token(hub.find_token(disabled), disabled).status == WARNING


@pytest.mark.parametrize("value", [f'"{SECRET}"', "<your_huggingface_token>", f"{SECRET} {SECRET}", "hf_Ünicode"])
def test_what_cannot_be_a_token(value: str, server: str):
    env = {"HF_TOKEN": value, "HF_ENDPOINT": server}
    found = hub.judge_token(hub.find_token(env), env)
    assert (found.status, found.fix) == (PROBLEM, ("unset HF_TOKEN", "hf auth login"))
    assert value not in json.dumps(found.to_json(), ensure_ascii=False)
    hub.check_scopes(hub.find_token(env), env, allowed=True)
    assert Hub.asked == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_token_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(0)
    assert hub.check_token({"HF_HOME": str(tmp_path)}).what == f"the token in {path} cannot be read: no permission"


def test_no_secret_is_ever_printed(machine, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Hub.reply = (401, {"error": SECRET})
    (tmp_path / "hf").mkdir()
    in_file = SECRET.replace("a", "c")
    (tmp_path / "hf/token").write_text(in_file)
    address = server.replace("//", "//me:pass-phrase@")
    talkative = 'echo "rejected $HF_TOKEN and $WANDB_API_KEY" >&2; exit 1'
    env = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "wandb-key-0123", "HF_ENDPOINT": address}
    machine(env=env, nvidia_smi=talkative)
    for words in (["doctor"], ["doctor", "--json"]):
        assert main(words) == 1
        printed = "".join(capsys.readouterr())
        assert "rejected (hidden) and (hidden)" in printed
        for secret in (SECRET, in_file, "wandb-key-0123", "pass-phrase"):
            assert secret not in printed


def test_hiding_reaches_every_field():
    finding = Finding("hub.token", WARNING, f"a {SECRET}", f"b {SECRET}", (f"c {SECRET}",), {"d": [{"e": SECRET}]})
    assert SECRET not in json.dumps(hide(finding, [SECRET]).to_json())
    assert hide(finding, ["a"]) == finding  # a word that short may stand anywhere


# --------------------------------------------------------------------------------------- probes in their own process


def child(tmp_path: Path, body: str) -> tuple[str, ...]:
    path = tmp_path / "probe_child.py"
    path.write_text(
        "import json, os, signal, sys, time\n"
        "def tell(probe, outcome, text=''):\n"
        "    print('\\n@doctor ' + json.dumps({'probe': probe, 'outcome': outcome, 'text': text}), flush=True)\n"
        f"for name in sys.argv[1:]:\n{body}"
    )
    return (sys.executable, "-S", "-E", str(path))


def run_child(tmp_path: Path, body: str, names: list[str], **deadlines: float) -> list[tuple[str, str, str]]:
    with probes.ProbeRun(names, command=child(tmp_path, body), **deadlines) as running:
        return [(result.probe, result.outcome, result.text) for result in running.results()]


def test_a_crash_is_a_finding_and_the_rest_goes_on(tmp_path: Path):
    body = (
        "    tell(name, 'started')\n"
        "    print('a library prints something', end='')\n"
        "    if name == 'bitsandbytes': os.kill(os.getpid(), signal.SIGILL)\n"
        "    if name == 'triton': sys.exit('undefined symbol: cuFoo')\n"
        "    tell(name, 'good', 'fine')\n"
    )
    assert run_child(tmp_path, body, ["cpu_matmul", "bitsandbytes", "triton", "gloo"]) == [
        ("cpu_matmul", "good", "fine"),
        ("bitsandbytes", "crashed", "its process died of SIGILL"),
        ("triton", "crashed", "its process ended with status 1: undefined symbol: cuFoo"),
        ("gloo", "good", "fine"),
    ]


def test_a_hung_probe_is_cut_off_and_the_rest_goes_on(tmp_path: Path):
    body = "    tell(name, 'started')\n    if name == 'nccl': time.sleep(60)\n    tell(name, 'good')\n"
    start = time.monotonic()
    told = run_child(tmp_path, body, ["gloo", "nccl", "triton"], deadline_s=0.5)
    assert time.monotonic() - start < 20
    assert [(probe, outcome) for probe, outcome, _ in told] == [("gloo", "good"), ("nccl", "hung"), ("triton", "good")]


def test_a_failed_probe_ends_its_process_and_the_rest_goes_on(tmp_path: Path):
    body = (
        "    tell(name, 'started')\n"
        "    if name == 'cuda_fp8': tell(name, 'failed', 'RuntimeError: x'); sys.exit(1)\n"
        "    tell(name, 'good', str(os.getpid()))\n"
    )
    first, failed, second = run_child(tmp_path, body, ["cuda_matmul", "cuda_fp8", "triton"])
    assert failed == ("cuda_fp8", "failed", "RuntimeError: x")
    assert first[2] != second[2]


@pytest.mark.parametrize("body", ["    sys.exit('no module named torch')\n", "    time.sleep(60)\n"])
def test_without_pytorch_nothing_else_is_tried(tmp_path: Path, body: str):
    told = run_child(tmp_path, body, ["torch", "cpu_matmul", "gloo"], first_deadline_s=0.5)
    assert len(told) == 1
    found = probes.judge_result(Result(*told[0]), Surroundings(True, "x86_64", None))
    assert (found.check, found.status) == ("gpu.torch", PROBLEM)
    assert found.fix[0].endswith("--force-reinstall --no-cache-dir 'torch>=2.10,<2.14'")


def test_leaving_early_ends_the_process(tmp_path: Path):
    with probes.ProbeRun(["torch"], command=child(tmp_path, "    time.sleep(60)\n")) as running:
        process = running._process
    assert process is not None
    assert process.wait(timeout=5) == -9


@pytest.mark.parametrize(
    ("result", "status", "what"),
    [
        (Result("cuda_matmul", "wrong", "differs"), PROBLEM, "GPU bf16 product computes wrong numbers: differs"),
        (Result("cuda_flash", "failed", "x"), WARNING, "GPU flash attention fails: x"),
        (Result("cuda_flash", "wrong", "x"), PROBLEM, "GPU flash attention computes wrong numbers: x"),
        (Result("cpu_attention", "crashed", "x"), PROBLEM, "CPU attention crashes: x"),
        (Result("triton", "failed", "x"), WARNING, "Triton RMSNorm fails: x"),
        (Result("nccl", "hung", "x"), WARNING, "NCCL loop-back hangs: x"),
        (Result("gloo", "failed", "x"), WARNING, "gloo loop-back fails: x"),
        (Result("import_torchvision", "failed", "x"), PROBLEM, "import torchvision fails: x"),
        (Result("import_flash_attn", "failed", "x"), WARNING, "import flash_attn fails: x"),
        (Result("cuda_fp8", "skipped", "no CUDA device"), NOTE, "GPU FP8 product: not tried, no CUDA device"),
    ],
)
def test_what_a_probe_means(result: Result, status: str, what: str):
    found = probes.judge_result(result, Surroundings(True, "x86_64", CUDA_TORCH))
    assert (found.status, found.what) == (status, what)


def test_the_package_that_breaks_transformers_is_removed():
    around = Surroundings(False, "x86_64", CPU_TORCH)
    found = probes.judge_result(Result("import_torchvision", "failed", "undefined symbol"), around)
    assert found.fix == (pip_command("torchvision", has_pip=False, verb="uninstall"),)


# -------------------------------------------------------------------------------------------- kernels and oracles


def test_wrong_numbers_are_seen():
    want = torch.arange(1.0, 101.0, dtype=torch.float64)
    assert kernel_probes.compare(want.float(), want) == "error 0e+00"
    off = want.float()
    off[3] += 0.01
    with pytest.raises(kernel_probes.Wrong, match=r"differs from float64 by 1\.0e-04, 1e-05 is normal"):
        kernel_probes.compare(off, want)
    off[3] = float("nan")
    with pytest.raises(kernel_probes.Wrong, match="by nan"):
        kernel_probes.compare(off, want)
    with pytest.raises(kernel_probes.Wrong, match="by inf"):
        kernel_probes.compare(torch.full((2,), float("inf")), torch.ones(2, dtype=torch.float64))


def test_a_gradient_that_is_not_a_number_is_seen():
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        v.register_hook(lambda grad: grad * float("nan"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with pytest.raises(kernel_probes.Wrong, match="by nan"):
        kernel_probes._with_gradients(attend, torch.device("cpu"), torch.float32)


def test_the_attention_oracle():
    q, k, v = (kernel_probes.random(1, 2, 5, 8, seed=seed).double() for seed in range(3))
    got = kernel_probes.reference_attention(q, k, v)
    for query in range(5):
        weights = torch.softmax((k[0, 1, : query + 1] @ q[0, 1, query]) / 8**0.5, dim=0)
        torch.testing.assert_close(got[0, 1, query], weights @ v[0, 1, : query + 1])


def test_what_runs_on_a_gpu_agrees_with_float64_on_the_cpu_too():
    cpu = torch.device("cpu")
    for text in (
        kernel_probes.bf16_product(cpu),
        kernel_probes.fp8_product(cpu),
        kernel_probes.sdpa(SDPBackend.FLASH_ATTENTION, cpu),
    ):
        assert 1e-4 < float(text.removeprefix("error ")) < 2e-2  # the rounding to bf16 is seen
    with pytest.raises(kernel_probes.Skip, match="this PyTorch has no such kernel for this GPU"):
        kernel_probes.sdpa(SDPBackend.CUDNN_ATTENTION, cpu)


def test_the_codes_of_nf4():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(
        kernel_probes.nf4_codes(), torch.tensor(published, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_wrong_four_bit_table_is_seen(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes")
    codes = kernel_probes.nf4_codes()
    assert kernel_probes.bitsandbytes() == "exact on the CPU"
    functional = pytest.importorskip("bitsandbytes.functional")
    dequantize = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args, **kw: dequantize(*args, **kw) * 1.02)
    with pytest.raises(kernel_probes.Wrong):
        kernel_probes.bitsandbytes()
    assert codes.diff().min() > 0


# -------------------------------------------------------------------------------------- findings, page, exit status


def test_a_check_that_breaks_is_a_finding():
    def broken() -> Finding:
        raise KeyError("MemTotal")

    (found,) = run_check("machine.memory", broken)
    assert (found.check, found.status) == ("machine.memory", WARNING)
    assert found.what == "this check itself failed: KeyError: 'MemTotal'"
    assert found.fix == ("automodel doctor --debug",)
    with pytest.raises(KeyError):
        run_check("machine.memory", broken, debug=True)


def test_a_fault_without_a_remedy_cannot_be_told():
    with pytest.raises(ValueError, match="needs a reason and a command"):
        Finding("gpu.driver", PROBLEM, "broken")
    with pytest.raises(ValueError, match="is no status"):
        Finding("gpu.driver", "bad", "broken")


def test_exit_status(machine, capsys: pytest.CaptureFixture[str]):
    machine()
    assert main(["doctor", "--offline"]) == 0
    assert "ready to train (0 problems" in capsys.readouterr().out
    machine(CPU_TORCH, nvidia_smi=smi("580.95.05", "13.0"))
    assert main(["doctor", "--offline"]) == 1
    assert capsys.readouterr().out.startswith("automodel doctor: not ready to train (1 problem, ")
    assert main(["doctor", "--json", "--offline"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == PROBLEM


def test_the_page_shows_the_worst_first_and_fits():
    findings = [
        Finding("machine.python", OK, "Python 3.12.1"),
        Finding("hub.token", NOTE, "no token", "a reason", ("hf auth login",)),
        Finding("tools.docker", WARNING, "denied", "a reason", ("newgrp docker",)),
        Finding("gpu.torch", PROBLEM, "torch is blind", "word " * 40, ("sudo reboot " + "x" * 100,)),
        Finding("kernels.triton", NOTE, "Triton: not tried, no CUDA device"),
        Finding("kernels.cuda_fp8", NOTE, "FP8: not tried, no CUDA device"),
    ]
    page = view.render(findings, has_colour=False, encoding="utf-8", width=70)
    lines = page.splitlines()
    assert lines[0] == "automodel doctor: not ready to train (1 problem, 1 warning, 1 note)"
    assert [line[0] for line in lines if line[:1] in "✗!·✓" and line] == ["✗", "!", "·", "✓", "✓"]
    assert "✓ kernels     not tried (no CUDA device): Triton, FP8" in lines
    assert "  $ sudo reboot " + "x" * 100 in lines  # a command is one line, to be copied
    assert all(len(line) <= 70 for line in lines if not line.startswith("  $ "))
    assert "\x1b" not in page


def test_colour_only_where_it_is_wanted(machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    machine()
    main(["doctor"])
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.delenv("NO_COLOR")
    main(["doctor"])
    assert "\x1b[" in capsys.readouterr().out


def test_on_a_terminal(machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    machine()
    monkeypatch.setenv("PYTHONUTF8", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code = (
        "import sys; from nemo_automodel.components.doctor import probes; from nemo_automodel.cli.app import main\n"
        f"probes.COMMAND = {probes.COMMAND!r}\nsys.exit(main(['doctor', '--offline']))"
    )
    outer, inner = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    printed = b""
    while True:
        try:
            printed += os.read(outer, 65536)
        except OSError:  # the other end is closed
            break
    os.close(outer)
    assert process.wait(timeout=30) == 0
    page = printed.decode()[printed.decode().index("automodel doctor: ") :]
    assert "are read as" not in page  # the bar, which stands in for standard output, has no encoding
    assert "✓" in page
    assert "\x1b[" in page


def test_programs_run_in_english_with_nothing_to_read(programs):
    programs(probe='echo "$LC_ALL"; read line; echo "got:$line"')
    assert run_program(["probe"]) == Ran(0, "C\ngot:\n", "")
    assert run_program(["not-there"]).is_missing
    directory = programs()
    (directory / "broken").write_text("#!/not/there\n")
    (directory / "broken").chmod(0o755)
    assert run_program(["broken"]).errors == "it cannot be started: No such file or directory"


def every_fix(machine) -> Iterator[Finding]:
    yield from machine(
        BLIND_TORCH, nvidia_smi="exit 1", docker="exit 1", uv=None, git=None, gcc=None, nvcc=None
    ).values()
    yield from machine(CPU_TORCH, nvidia_smi=smi("580.1", "13.0"), nvcc=nvcc("11.8")).values()
    around = [Surroundings(has_pip, arch, CUDA_TORCH) for has_pip in (True, False) for arch in ("x86_64", "aarch64")]
    for surroundings in around:
        yield probes.judge_missing_4bit(surroundings)
        for name in [*probes.probe_names(True), "import_torchvision", "import_flash_attn"]:
            for outcome in ("wrong", "failed", "crashed", "hung"):
                yield probes.judge_result(Result(name, outcome, "x"), surroundings)


def test_every_remedy_is_a_command_of_the_shell(machine, monkeypatch: pytest.MonkeyPatch):
    path = os.environ["PATH"]
    fixes = sorted({command for finding in every_fix(machine) for command in finding.fix})
    assert len(fixes) > 25
    monkeypatch.setenv("PATH", path)
    script = "\n".join(fixes)
    done = subprocess.run(["/bin/sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def documented_checks() -> set[str]:
    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z]+\.[a-z0-9_*]+)`", page, flags=re.MULTILINE))


def test_every_check_is_in_the_docs():
    sources = [*(ROOT / "nemo_automodel/components/doctor").glob("*.py"), ROOT / "nemo_automodel/cli/doctor.py"]
    topics = "|".join(view.TOPICS)
    known = {
        name
        for source in sources
        for name in re.findall(rf'"((?:{topics})\.[a-z0-9_]+)"', source.read_text(encoding="utf-8"))
    }
    known |= {probes.check_name(name) for name in probes.probe_names(True) if not name.startswith("import_")}
    assert documented_checks() == known | {"packages.import_*"}


def test_a_finding_of_the_docs_has_the_printed_keys():
    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (line,) = block.splitlines()
    finding = gpu.judge_torch(BLIND_TORCH, gpu.Driver(Ran(0), "535.129.03", "12.2", ("GPU",)), None, "x86_64", PIP)
    assert json.loads(line) == finding.to_json()


def test_files_with_secrets_keep_their_mode(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(0o600)
    hub.judge_token(hub.find_token({"HF_HOME": str(tmp_path)}), {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ----------------------------------------------------------------------------------------------- Triton's assembler


@pytest.mark.parametrize(("version", "status"), [("12.8", NOTE), ("13.2", NOTE), ("13.3", OK), ("14.0", OK)])
def test_the_assembler_of_triton_is_asked_on_hopper(machine, programs, version: str, status: str):
    directory = programs(ptxas=f'echo "Cuda compilation tools, release {version}, V{version}.93"')
    env = {"TRITON_PTXAS_PATH": str(directory / "ptxas")}
    found = machine(CUDA_TORCH, env)["gpu.assembler"]
    assert (found.status, found.what) == (status, f"Triton's ptxas is {version}")
    assert found.facts == {"ptxas": version, "path": str(directory / "ptxas")}
    if status == NOTE:
        (fix,) = found.fix
        assert fix.endswith("install 'nvidia-cuda-nvcc>=13.3'")
    other = replace(CUDA_TORCH, devices=(GB10,))
    assert "gpu.assembler" not in machine(other, env)


def test_an_assembler_that_does_not_answer_is_said(programs):
    broken = programs(ptxas="echo no such library >&2; exit 1") / "ptxas"
    found = assembler.check_assembler(broken, PIP)
    assert found.what == f"Triton's ptxas does not answer: {broken}: no such library"
    assert found.fix[0] == f"{PIP} 'nvidia-cuda-nvcc>=13.3'"
