"""Check this machine for training: Python, GPU, CUDA, packages, disks, Hub, one kernel of each backend.

Each finding says what was seen, why it matters and which command mends it. Nothing is changed and nothing is sent
anywhere, with one exception: where a Hugging Face token is set, and neither --offline nor HF_HUB_OFFLINE forbids it,
the Hub is asked what the token may do. The exit status is 1 where something keeps training from working, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from nemo_automodel import __version__
from nemo_automodel.components.doctor.findings import PROBLEM, STATUSES, Check, Finding, hide, run_check
from nemo_automodel.shared.memory import read_memory, shares_memory

if TYPE_CHECKING:
    from nemo_automodel.components.doctor.gpu import Driver
    from nemo_automodel.components.doctor.probes import Result

JSON_SCHEMA = 1
"""Raised when a key of the JSON changes its meaning or goes away; new keys and new checks may come at any time."""
EXIT_PROBLEM = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the page")
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub what the token may do")


def run(args: argparse.Namespace) -> int:
    """Examine the machine and print what was found."""
    from nemo_automodel.components.loggers.console import progress

    # asked before the bar stands in for standard output
    encoding = sys.stdout.encoding or "ascii"
    with progress("Looking at the machine and running one kernel of each backend"):
        findings = examine(os.environ, allow_hub=not args.offline, debug=args.debug, encoding=encoding)
    if args.json:
        print(json.dumps(report(findings), indent=2))
    else:
        from nemo_automodel.cli.inspect import wants_colour
        from nemo_automodel.components.doctor.view import render

        sys.stdout.write(render(findings, has_colour=wants_colour(), encoding=encoding))
    return EXIT_PROBLEM if any(finding.status == PROBLEM for finding in findings) else 0


def report(findings: list[Finding]) -> dict[str, object]:
    """Return the object that ``--json`` prints."""
    from nemo_automodel.components.doctor.view import counts

    number = counts(findings)
    return {
        "schema": JSON_SCHEMA,
        "version": __version__,
        "status": next(status for status in STATUSES if number[status]),
        "counts": number,
        "hub_asked": any(finding.facts.get("asked", False) for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }


def examine(
    env: Mapping[str, str], *, allow_hub: bool = True, debug: bool = False, encoding: str = "utf-8"
) -> list[Finding]:
    """Run every check on this machine; no secret of the environment is in what comes back.

    ``encoding`` is standard output's.
    """
    from nemo_automodel.components.doctor.hub import all_secrets
    from nemo_automodel.components.doctor.view import TOPICS

    found = list(_all_findings(env, allow_hub, debug, encoding))
    found.sort(key=lambda finding: TOPICS.index(finding.topic))
    secrets = all_secrets(env)
    return [hide(finding, secrets) for finding in found]


def _all_findings(env: Mapping[str, str], allow_hub: bool, debug: bool, encoding: str) -> Iterator[Finding]:
    """Yield what is found; kernels run in their own process while the rest is looked at."""
    from nemo_automodel.components.doctor import gpu, host, hub, probes, tools

    has_pip = probes.is_installed("pip")
    with probes.ProbeRun(probes.probe_names()) as running:
        driver = gpu.ask_driver()
        has_gpu = driver.sees_gpu or gpu.has_device_files()
        yield from _run_all(host.host_checks(env, has_gpu, encoding), debug)
        yield from _run_all(tools.tool_checks(env, has_gpu, has_pip), debug)
        yield from _run_all(hub.hub_checks(env, allow_hub), debug)
        yield from run_check("packages.required", lambda: _run_all(_package_checks(), debug), debug=debug)
        results = list(running.results())
    yield from _run_all(_kernel_checks(results, driver, env, has_pip), debug)


def _run_all(checks: Mapping[str, Check], debug: bool) -> Iterator[Finding]:
    for name, check in checks.items():
        yield from run_check(name, check, debug=debug)


def _package_checks() -> dict[str, Check]:
    # imported here, because it needs `packaging`, which comes with Transformers and may be what is missing
    from nemo_automodel.components.doctor.packages import package_checks

    return package_checks()


def _kernel_checks(results: list[Result], driver: Driver, env: Mapping[str, str], has_pip: bool) -> dict[str, Check]:
    """Return what is to be said about the kernels' process, and about what PyTorch said of itself there."""
    from nemo_automodel.components.doctor import assembler, gpu, host, probe_process, probes
    from nemo_automodel.kernels.assembler import find_assembler

    machine = platform.machine()
    said = next(
        (result for result in results if result.probe == "torch" and result.outcome == probe_process.GOOD), None
    )
    torch = gpu.TorchFacts.from_json(said.facts) if said is not None else None
    around = probes.Surroundings(has_pip, machine, torch)
    checks: dict[str, Check] = {
        probes.check_name(result.probe): partial(probes.judge_result, result, around)
        for result in results
        if result is not said
    }
    if not any(result.probe == "bitsandbytes" for result in results) and torch is not None:
        checks["kernels.bitsandbytes"] = lambda: probes.judge_missing_4bit(around)
    checks["gpu.driver"] = lambda: gpu.check_driver(driver, torch)
    checks["gpu.toolkit"] = lambda: gpu.check_toolkit(env, torch, driver.sees_gpu)
    if torch is None:
        return checks
    pip = around.pip("")
    checks["gpu.torch"] = lambda: gpu.judge_torch(torch, driver, env.get("CUDA_VISIBLE_DEVICES"), machine, pip)
    checks["gpu.device"] = lambda: gpu.judge_devices(torch, pip)
    ptxas = find_assembler(env, torch.cuda)
    if ptxas is not None and any(device.capability[0] == gpu.HOPPER for device in torch.devices):
        checks["gpu.assembler"] = lambda: assembler.check_assembler(ptxas, pip)
    gpus = [(name, False) for name in driver.names]
    gpus += [(device.name, device.is_integrated) for device in torch.devices]
    if any(shares_memory(name, is_integrated) for name, is_integrated in gpus):
        checks["machine.unified_memory"] = lambda: host.judge_unified_memory(read_memory())
    return checks
