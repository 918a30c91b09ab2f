"""The process in which the doctor tries what can crash or hang: ``python -m …probe_process NAME ...``.

It writes one JSON object a line behind a mark, when a probe starts and when it ends, and stops after the first probe
that failed: a failed kernel leaves CUDA unusable in its process. The parent starts another one for the rest.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

MARK = "@doctor "
STARTED, GOOD, SKIPPED, WRONG, FAILED = "started", "good", "skipped", "wrong", "failed"
IMPORT = "import_"
"""Probes of this name import the package behind it."""
_LOOP_BACK_S = 20


def tell(probe: str, outcome: str, text: str = "", facts: dict[str, Any] | None = None) -> None:
    """Write one line for the parent."""
    line = json.dumps({"probe": probe, "outcome": outcome, "text": text, "facts": facts or {}})
    print(f"\n{MARK}{line}", flush=True)  # a library may have printed half a line before it


def torch_facts() -> dict[str, Any]:
    """Return what PyTorch says about itself: the fields of ``gpu.TorchFacts``."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "is_available": False,
        "error": "",
        "architectures": [],
        "devices": [],
        "cudnn": None,
        "nccl": None,
    }
    if torch.version.cuda is None:
        return facts
    facts["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        facts["error"] = (str(error).strip().splitlines() or [""])[0]
        return facts
    facts["is_available"] = True
    facts["architectures"] = torch.cuda.get_arch_list()
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts["devices"].append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "total": total,
                "free": free,
                "is_integrated": bool(properties.is_integrated),
            }
        )
    return facts


def loop_back(backend: str) -> str:
    """Add a tensor up over a group of one process, through a store on this machine, as torchrun starts one."""
    import torch
    import torch.distributed as dist

    from nemo_automodel.components.doctor.kernel_probes import Skip, Wrong, need_cuda

    device = need_cuda() if backend == "nccl" else torch.device("cpu")
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        raise Skip(f"this PyTorch was built without {backend}")
    timeout = timedelta(seconds=_LOOP_BACK_S)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    tensor = torch.arange(1024, dtype=torch.float32, device=device)
    dist.all_reduce(tensor)
    got = tensor.cpu()  # waits
    dist.destroy_process_group()
    if not torch.equal(got, torch.arange(1024, dtype=torch.float32)):
        raise Wrong("a sum over one process is not the number itself")
    return "all-reduce of one process"


def import_package(name: str) -> str:
    """Import a package with compiled code."""
    importlib.import_module(name)
    return "loads"


def _probe(name: str) -> Callable[[], str]:
    if name in ("gloo", "nccl"):
        return lambda: loop_back(name)
    if name.startswith(IMPORT):
        return lambda: import_package(name.removeprefix(IMPORT))
    from nemo_automodel.components.doctor.kernel_probes import KERNELS

    return KERNELS[name]


def run_probe(name: str) -> bool:
    """Run one probe and tell how it ended; return whether this process can go on."""
    tell(name, STARTED)
    try:
        if name == "torch":
            tell(name, GOOD, facts=torch_facts())
            return True
        from nemo_automodel.components.doctor.kernel_probes import Skip, Wrong

        try:
            tell(name, GOOD, _probe(name)())
        except Skip as reason:
            tell(name, SKIPPED, str(reason))
        except Wrong as reason:
            tell(name, WRONG, str(reason))
    except Exception as error:  # the parent makes a finding of whatever it is
        first_line = (str(error).strip().splitlines() or [""])[0]
        tell(name, FAILED, f"{type(error).__name__}: {first_line}")
        return False
    return True


def main(names: list[str]) -> int:
    """Run the probes in order, up to the first that fails."""
    for name in names:
        if not run_probe(name):
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
