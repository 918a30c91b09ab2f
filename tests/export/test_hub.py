"""The playbook's step 13 with the real `hf` command and the real client, against a Hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import READ, WRITE, HubServer, hub_server

HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


def run(command: list[str], hub: HubServer, cache: Path, token: str | None = None, **variables: str):
    """Run a command as a user of that Hub would."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = kept | hub.environment(cache, token) | variables
    return subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def answers(code: str, hub: HubServer, cache: Path, token: str | None = None) -> str:
    """Run Python that prints something, and return it."""
    done = run([sys.executable, "-W", "ignore", "-c", code], hub, cache, token)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


LOGITS = "print(round(float(model(input_ids=torch.tensor([[5, 6, 7]])).logits.double().square().sum()), 3))"


@pytest.mark.skipif(not HF.is_file(), reason="the hf command is not installed beside this Python")
@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_hf_upload_gives_a_repository_that_loads_from_its_root(runs, hub, tmp_path: Path, kind: str) -> None:
    checkpoint = runs(kind)
    done = run([HF, "upload", "my-cool-model", checkpoint / "model"], hub, tmp_path / "up", WRITE)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["tester/my-cool-model"]
    files = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    assert repo.files == files
    load = "import torch, transformers\n"
    if kind == "sft":
        load += "make = transformers.AutoModelForCausalLM.from_pretrained\n"
    else:
        load += "import peft\nmake = peft.AutoPeftModelForCausalLM.from_pretrained\n"
    code = load + "model = make({!r}, dtype=torch.float32)\n" + LOGITS
    remote = answers(code.format("tester/my-cool-model"), hub, tmp_path / "down", READ)
    assert remote == answers(code.format(str(checkpoint / "model")), hub, tmp_path / "none")
    assert hub.asked("GET", "resolve/main") or hub.asked("GET", "/resolve/")
