"""Several processes from one command: together from start to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.recipes import lora_section, recipe_config

from nemo_automodel.cli.app import main

# --- the launcher alone, with small programs ------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    """Return a function that launches a Python program instead of ours, in a process of its own."""

    def start(program: str, size: int = 2, grace_s: float = 20.0) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(program)
        code = (
            "from nemo_automodel.cli import launch\n"
            f"launch.GRACE_S, launch.PROGRAM = {grace_s}, [{str(tmp_path / 'program.py')!r}]\n"
            f"raise SystemExit(launch.launch(['a', 'b c'], {size}))"
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_every_process_knows_its_place(launch, tmp_path):
    program = (
        "import os, sys\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR'.split()\n"
        "open(f'{sys.argv[0]}.{os.environ[\"RANK\"]}', 'w').write("
        "' '.join([*map(os.environ.get, names), *sys.argv[1:]]))\n"
        "assert os.environ['AUTOMODEL_LAUNCHER_PID'] == str(os.getppid())\n"
    )
    process = launch(program, size=3)
    assert process.wait(30) == 0
    for rank in range(3):
        assert (tmp_path / f"program.py.{rank}").read_text() == f"{rank} {rank} 3 3 127.0.0.1 a b c"


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(5 if rank == 1 else 0)", 5),
        ("sys.exit(4 - rank)", 4),
        ("os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_status_is_the_first_process_s_or_that_of_one_that_failed(launch, ends, status):
    assert launch(f"import os, sys\nrank = int(os.environ['RANK'])\n{ends}").wait(30) == status


def test_who_does_not_leave_after_a_failure_is_killed(launch):
    start = time.monotonic()
    process = launch("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(600)", grace_s=0.5)
    assert process.communicate(timeout=30)[1] == (
        "error: Lost rank 1: it ended with status 3. Rank 0 did not end by itself and was killed.\n"
    )
    assert process.returncode == 3
    assert time.monotonic() - start < 30


def test_a_signal_is_passed_on(launch):
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(600)\n"
    )
    process = launch(program)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_path(tmp_path, model_dirs, squad_dir):
    config = recipe_config(
        model_dirs("llama"),
        squad_dir,
        tmp_path / "run",
        peft=lora_section(),
        step_scheduler__max_steps=1000,
        dist_env={"backend": "gloo"},
        distributed={"strategy": "fsdp2"},
        data_check=False,
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def wait_for_line(stream, wanted: str) -> list[str]:
    seen = []
    for line in stream:
        seen.append(line)
        if wanted in line:
            return seen
    raise AssertionError("".join(seen))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


def test_a_run_of_two_is_stopped_goes_on_and_survives_nobody_s_death_in_silence(config_path):
    command = [sys.executable, "-m", "nemo_automodel.cli.app", str(config_path), "--nproc-per-node", "2"]
    environment = {**os.environ, "LOGGING_LEVEL": "INFO"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    lines = wait_for_line(run.stderr, "| step 2 |")
    run.send_signal(signal.SIGTERM)
    _, rest = run.communicate(timeout=60)
    assert run.returncode == 0, rest
    text = "".join(lines) + rest
    assert "`distributed.strategy: fsdp2` on 2 devices: the optimizer's state is sharded" in text
    assert text.count("The same command goes on from there.") == 1

    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    lines = wait_for_line(run.stderr, "| step 5 |")
    assert any("bit for bit as at the save" in line for line in lines)
    victim = children_of(run.pid)[1]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    rest = run.communicate(timeout=60)[1]
    assert time.monotonic() - start < 30
    assert run.returncode == 4
    said = [line for line in rest.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, rest
    assert said[0].startswith(f"error: Lost rank 1 (process {victim}): it was killed, or ended without a word.")


def test_torchrun_starts_the_same_run_and_speaks_with_one_voice(config_path, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["-m", "nemo_automodel.cli.app", str(config_path), "--step_scheduler.max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cfg-path: ") == 1
    assert done.stderr.count("| step 1 |") == 1
    assert len((tmp_path / "run" / "training.jsonl").read_text().splitlines()) == 2


def test_a_mistake_is_told_once_before_anything_is_started(config_path, capsys):
    words = [str(config_path), "--nproc-per-node", "2"]
    assert main([*words, "--distributed.strategy", "megatron_fsdp"]) == 2
    assert capsys.readouterr().err == (
        "error: `distributed.strategy: megatron_fsdp` on 2 devices is not supported yet. Set it to ddp.\n"
    )
    alone = ["--optimizer.in_backward", "true", "--clip_grad_norm.max_norm", "0"]
    assert main([*words, *alone, "--step_scheduler.global_batch_size", "2"]) == 2
    assert "`optimizer.in_backward: true` on 2 devices is not supported yet" in capsys.readouterr().err
    assert main(["benchmark", "llm", "-c", *words]) == 2
    assert "A benchmark on 2 devices is not supported yet. Start it with --nproc-per-node 1" in capsys.readouterr().err
