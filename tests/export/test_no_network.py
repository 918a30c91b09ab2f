"""No traffic, ever: a whole run in a network namespace that has no interfaces, not even the loop-back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.recipes import lora_section, recipe_config
from support.tiny import CHAT_TEMPLATE

from nemo_automodel.components.export.certificate import check_certificate

CODE = """
import json, os, socket, sys
from nemo_automodel.cli.app import main
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), socket.if_nameindex()
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError as error:
    assert error.errno == 101, error  # the network is unreachable: nothing could be sent anywhere
seen = []
sys.addaudithook(lambda event, args: seen.append(args) if event in ("socket.connect", "socket.getaddrinfo") else None)
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
assert not seen, seen
"""


def can_unshare() -> bool:
    """Tell whether this machine lets a user make a network namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="user namespaces are forbidden on this machine")
def test_training_saving_merging_and_exporting_need_no_network(model_dirs, squad_dir, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = model_dirs("llama", CHAT_TEMPLATE)
    config = recipe_config(base, squad_dir, tmp_path / "run", step_scheduler__max_steps=3, optimizer__lr=1e-2)
    config["lr_scheduler"] = {"lr_decay_style": "constant"}
    config["validation_dataset"] = {**config["dataset"], "split": "validation"}
    config["step_scheduler"]["val_every_steps"] = 2
    config["peft"] = lora_section()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    latest, common = str(tmp_path / "run/LATEST"), ["--device", "cpu", "-o"]
    commands = [
        [str(recipe)],
        ["merge", latest, *common, str(tmp_path / "merged")],
        ["export", latest, "--to", "gguf", *common, str(tmp_path / "gguf")],
        ["export", latest, "--to", "vllm", *common, str(tmp_path / "vllm")],
        ["generate", str(tmp_path / "merged"), "--prompt", "Hello", "--max-new-tokens", "2", "--device", "cpu"],
    ]
    # no switch says that the network is off
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-W", "ignore", "-c", CODE, json.dumps(commands)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for out in ("merged", "gguf", "vllm"):
        check_certificate(tmp_path / out)
