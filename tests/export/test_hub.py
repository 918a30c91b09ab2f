"""The playbook's step 13 with the real `hf` command and the real client, against a Hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load, save_file
from support.hub_server import READ, WRITE, HubServer, hub_server

from nemo_automodel.cli.app import main
from nemo_automodel.recipes import export

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


# ------------------------------------------------------------------------------------------------------ automodel push

AUTOMODEL = [sys.executable, "-W", "ignore", "-m", "nemo_automodel.cli.app"]


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(runs("lora")), "--to", "hf", "-o", str(out), "--device", "cpu"]) == 0
    return out


def last_error(done) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "hf_" not in done.stdout + done.stderr, "a token was printed"
    return lines[0].removeprefix("error: ")


def test_push_is_private_has_a_card_and_goes_on_after_a_break(runs, exported, hub, tmp_path: Path) -> None:
    command = [*AUTOMODEL, "push", exported, "my-cool-model", "--run", runs("lora")]
    hub.num_failing_commits = 1
    assert last_error(run(command, hub, tmp_path, WRITE)) == (
        "The upload to `my-cool-model` broke off. Run the same command again: files that arrived are not sent twice."
    )
    num_sent = len(hub.asked("PUT", "/lfs/"))
    assert num_sent == 1
    done = run(command, hub, tmp_path, WRITE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded to {hub.address}/tester/my-cool-model"
    assert len(hub.asked("PUT", "/lfs/")) == num_sent
    repo = hub.repos["tester/my-cool-model"]
    assert repo.private
    card = repo.files.pop("README.md").decode()
    assert repo.files == {path.name: path.read_bytes() for path in exported.iterdir()}
    for part in (
        "library_name: \"transformers\"", "# my-cool-model", "- a local data set", "- method: LoRA, rank 4, alpha 16",
        "- optimizer: AdamW, learning rate 0.01", "- max_steps: 6", "- train_loss at the last step:",
        "certificate: passed on 16 rows", "transformers 5.",
    ):  # fmt: skip
        assert part in card, card
    assert str(tmp_path.parent) not in card
    assert not (exported / "README.md").exists()
    assert {token for _, _, token in hub.requests if token} == {WRITE}
    code = f"import torch, transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained({{!r}})\n{LOGITS}"
    remote = answers(code.format("tester/my-cool-model"), hub, tmp_path / "down", READ)
    assert remote == answers(code.format(str(exported)), hub, tmp_path / "none")


def test_nothing_is_sent_without_a_certificate(runs, exported, hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    plain = tmp_path / "plain"
    shutil.copytree(runs("sft") / "model", plain)
    assert main(["push", str(plain), "x"]) == 2
    assert "has no certificate.json, so nothing shows that it is what was trained" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    (damaged / "config.json").write_text("{}")
    assert main(["push", str(damaged), "x"]) == 2
    assert "is about other files: `config.json` was changed" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["push", str(exported), "x"]) == 2
    assert "HF_HUB_OFFLINE forbids to ask the Hub, so nothing can be uploaded" in capsys.readouterr().err
    done = run([*AUTOMODEL, "push", runs("lora"), "x", "--no-certificate", "--public"], hub, tmp_path, WRITE)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["tester/x"]
    assert not repo.private
    assert "adapter_model.safetensors" in repo.files
    assert b"None: nothing shows that these files are what was trained." in repo.files["README.md"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READ, "The token may not write to `x` (403 Forbidden): it is for reading, or for other repositories. To "
               "upload, make one with *write* access at {hub}/settings/tokens, then set the environment variable "
               "HF_TOKEN to it."),
        (None, "Nothing was sent to `x`: "),
        ("hf_gone", "The Hub refuses the token from HF_TOKEN (401): it was revoked, has expired or is not complete. "
                    "Make another at {hub}/settings/tokens, then set the environment variable HF_TOKEN to it, or run "
                    "`hf auth login`."),
    ],
    ids=["read", "none", "bad"],
)  # fmt: skip
def test_a_token_that_may_not_push(exported, hub, tmp_path: Path, token: str | None, message: str) -> None:
    error = last_error(run([*AUTOMODEL, "push", exported, "x"], hub, tmp_path, token))
    if token is None:
        assert error.startswith(message)
        assert "make one with *write* access" in error
    else:
        assert error == message.format(hub=hub.address)
    assert not hub.repos


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_a_checkpoint_is_certified_before_it_goes_up(runs, hub, tmp_path: Path, kind: str) -> None:
    checkpoint = runs(kind)
    before = sorted(path.name for path in checkpoint.resolve().parent.iterdir())
    done = run([*AUTOMODEL, "push", checkpoint, "mine"], hub, tmp_path, WRITE)
    assert done.returncode == 0, done.stderr
    assert "certificate: passed on 16 rows" in done.stdout
    files = hub.repos["tester/mine"].files
    assert b"- max_steps: 6" in files["README.md"]
    certificate = json.loads(files["certificate.json"])
    assert (certificate["passed"], certificate["source"]) == (True, "epoch_0_step_5")
    name = "model.safetensors" if kind == "sft" else "adapter_model.safetensors"
    assert load(files[name]).keys() == load((checkpoint / "model" / name).read_bytes()).keys()
    assert sorted(path.name for path in checkpoint.resolve().parent.iterdir()) == before


def test_a_checkpoint_that_fails_its_certificate_is_not_sent(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    write = export.write_whole

    def write_another(source, out, *rest):
        report = write(source, out, *rest)
        tensors = load((out / "model.safetensors").read_bytes())
        save_file({name: tensor * 0.9 for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
        return report

    monkeypatch.setattr(export, "write_whole", write_another)
    assert main(["push", str(runs("sft")), "x"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: Nothing was sent: an export of `")
    assert "is not the model that was trained: hf differs from the trained model by" in error


def test_a_gguf_directory_goes_up(runs, hub, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    words = ["export", str(runs("lora")), "--to", "ollama", "-o", str(tmp_path / "g"), "--device", "cpu"]
    assert main(words) == 0
    done = run([*AUTOMODEL, "push", tmp_path / "g", "small"], hub, tmp_path, WRITE)
    assert done.returncode == 0, done.stderr
    assert hub.repos["tester/small"].files.keys() == {"Modelfile", "model-q8_0.gguf", "certificate.json", "README.md"}


def test_a_push_without_network(exported, hub, tmp_path: Path) -> None:
    command = [*AUTOMODEL, "push", exported, "x"]
    assert last_error(run(command, hub, tmp_path, WRITE, HF_ENDPOINT="http://127.0.0.1:9")) == (
        "The Hub cannot be reached, so nothing more was sent to `x`. Check the network (and HF_ENDPOINT, if you use a "
        "mirror). Run the same command again: files that arrived are not sent twice."
    )
