"""Everything that the Hub can answer, through the command line against a Hub on this machine: one line, the remedy.

One process asks for several repositories, since starting Python costs more than all of them.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from support.hub_server import FINE, OTHER, READ, HubServer, Repo, hub_server
from support.recipes import recipe_config

from nemo_automodel.shared.hub_errors import explain, explain_push

CODE = """
import json, resource, sys
limit, commands = json.loads(sys.argv[1])
from nemo_automodel.cli.app import main
import torch, transformers
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for words in commands:
    print(json.dumps(main(words)), file=sys.stderr, flush=True)
"""


def ask(name: str) -> list[str]:
    return ["generate", name, "--prompt", "Hello", "--max-new-tokens", "2", "--device", "cpu"]


def run(environment: dict[str, str], *commands: list[str], limit: int = 0) -> list[tuple[int, str]]:
    """Run commands in one new process and return exit status and error line of each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, json.dumps([limit, commands])],
        env=kept | environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "hf_" not in done.stdout + done.stderr, "a token was printed"
    found, line = [], ""
    for text in done.stderr.splitlines():
        if text.startswith("error: "):
            line = text.removeprefix("error: ")
        elif text.isdigit():
            found.append((int(text), line))
            line = ""
    assert len(found) == len(commands), done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def files(model_dirs) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dirs("llama").iterdir()}


@pytest.fixture
def hub(files):
    with hub_server() as server:
        server.repos["o/open"] = Repo(files=dict(files))
        yield server


GATED_NOT_ASKED = (
    "`o/gated` is gated, and the account of this token has no access. Request it at {hub}/o/gated (accept the terms), "
    "then start again with a token of that account."
)
GATED_PENDING = (
    "`o/pending` is gated, and your request for access is waiting for its owner. When it is granted ({hub}/o/pending), "
    "start again."
)
GATED_SCOPE = (
    "`o/scope` is gated, and the token may not read gated repositories. Edit it at {hub}/settings/tokens: tick read "
    "access to public gated repositories."
)
GATED_NO_TOKEN = (
    "`o/gated` is gated, and no token was sent. Request access at {hub}/o/gated, make a token at "
    "{hub}/settings/tokens, then set the environment variable HF_TOKEN to it, or run `hf auth login`."
)
MISSING = (
    "`o/nothing` is neither a directory here nor a model on the Hugging Face Hub (404). Check the spelling; if it is "
    "private, set the environment variable HF_TOKEN to a token that may read it, or run `hf auth login`."
)
BAD_TOKEN = (
    "The Hub refuses the token from HF_TOKEN (401): it was revoked, has expired or is not complete. Make another at "
    "{hub}/settings/tokens, then set the environment variable HF_TOKEN to it, or run `hf auth login`."
)


def test_gates_missing_and_renamed(hub: HubServer, files, tmp_path: Path) -> None:
    for gate in ("ask", "pending", "scope"):
        hub.repos[{"ask": "o/gated"}.get(gate, f"o/{gate}")] = Repo(files=dict(files), gate=gate)
    hub.repos["o/old"] = Repo(moved_to="o/open")
    names = ["o/gated", "o/pending", "o/scope", "o/nothing", "o/old"]
    found = run(hub.environment(tmp_path, OTHER), *map(ask, names))
    expected = [GATED_NOT_ASKED, GATED_PENDING, GATED_SCOPE, MISSING]
    assert found[:4] == [(2, text.format(hub=hub.address)) for text in expected]
    assert found[4] == (0, "")  # a renamed repository is followed
    assert [name for name, repo in hub.repos.items() if repo.gate and f"/{name}/resolve" in str(hub.requests)]


def test_without_a_token_and_with_a_bad_one(hub: HubServer, files, tmp_path: Path) -> None:
    hub.repos["o/gated"] = Repo(files=dict(files), gate="ask")
    found = run(hub.environment(tmp_path), ask("o/gated"), ask("o/nothing"))
    assert found == [(2, GATED_NO_TOKEN.format(hub=hub.address)), (2, MISSING)]
    found = run(hub.environment(tmp_path, "hf_revoked"), ask("o/gated"), ask("o/open"))
    assert found == [(2, BAD_TOKEN.format(hub=hub.address))] * 2
    assert FINE not in {token for _, _, token in hub.requests}


def test_a_dropped_connection(hub: HubServer, files, tmp_path: Path) -> None:
    """In mid-file: the client goes on where it ended; where the line stays bad, the message says to run it again."""
    weights = "model.safetensors"
    hub.repos["o/once"] = Repo(files=dict(files), broken_off={weights: 1000})
    hub.repos["o/always"] = Repo(files=dict(files), broken_off={weights: 0}, num_breaks=10**6)
    found = run(hub.environment(tmp_path, READ), ask("o/once"), ask("o/always"))
    assert found[0] == (0, "")
    assert hub.repos["o/once"].num_breaks == 0
    assert found[1] == (
        2,
        "The connection broke off while `o/always` was fetched. Run the same command again: it goes on where it ended.",
    )


def test_a_full_cache_disk(hub: HubServer, files, tmp_path: Path) -> None:
    """Files of more than 100 kB cannot be written, as on a disk that is full in mid-file."""
    ((status, line),) = run(hub.environment(tmp_path, READ), ask("o/open"), limit=100_000)
    assert status == 2
    assert line.startswith("`o/open` does not fit on the disk: File too large in ")
    assert line.endswith("Make room, or set HF_HOME to a directory on another disk; what was fetched is kept.")
    assert len(files["model.safetensors"]) > 100_000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_offline_with_and_without_the_files(hub: HubServer, tmp_path: Path) -> None:
    online = hub.environment(tmp_path, READ)
    assert run(online, ask("o/open")) == [(0, "")]
    num_requests = len(hub.requests)
    found = run(online | {"HF_HUB_OFFLINE": "1"}, ask("o/open"), ask("o/other"))
    assert found[0] == (0, "")
    assert found[1] == (
        2,
        "`o/other` is neither a directory here nor complete in the Hugging Face cache, and HF_HUB_OFFLINE forbids to "
        "look further. Give a directory, or unset HF_HUB_OFFLINE.",
    )
    assert len(hub.requests) == num_requests


def test_offline_with_a_part_of_the_files(hub: HubServer, tmp_path: Path) -> None:
    """The configuration is in the cache and the weights are not, which Transformers takes for a model without any."""
    environment = hub.environment(tmp_path, READ)
    code = "import huggingface_hub; huggingface_hub.hf_hub_download('o/open', 'config.json')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True, timeout=120)
    ((status, line),) = run(environment | {"HF_HUB_OFFLINE": "1"}, ask("o/open"))
    assert status == 2
    assert line.startswith(
        "`o/open` is neither a directory here nor complete in the Hugging Face cache, and HF_HUB_OFF"
    )
    ((status, line),) = run(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, ask("o/open"))
    assert status == 2
    assert line.startswith("`o/open` is not in the Hugging Face cache and the Hub cannot be reached. Check the network")


def test_other_answers_are_told_in_the_hubs_words() -> None:
    limit = explain("o/limit", answer(429, "We had to rate limit you."))
    assert limit is not None
    assert limit.startswith(
        "The Hub answers 429 for `o/limit`: too many requests from here. Wait some minutes, then run"
    )
    assert explain_push("o/limit", answer(429, "")) == limit
    bill = answer(402, "Payment\n required.")
    assert explain("o/bill", bill) == "The Hub refuses `o/bill` (402): Payment required."
    assert explain_push("o/bill", bill) == "The Hub refuses the upload to `o/bill` (402): Payment required."
    assert explain_push("o/bill", answer(404, "")) == (
        "The Hub has no account or organisation to hold `o/bill` (404). Check the part before the slash."
    )


def answer(status: int, words: str) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused", response=response, server_message=words)


def test_an_adapter_in_the_place_of_a_model(hub: HubServer, tmp_path: Path) -> None:
    hub.repos["o/adapter"] = Repo(files={"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    assert run(hub.environment(tmp_path, READ), ask("o/adapter")) == [
        (
            2,
            "`o/adapter` has no config.json on the Hub, so it is no whole model. If it is an adapter, fetch it with hf "
            "download o/adapter --local-dir adapter, and name that directory.",
        )
    ]


def test_nobody_is_told_of_a_model_without_safetensors(hub: HubServer, files, tmp_path: Path) -> None:
    """Transformers would ask a service to convert it, and give it the token of a private one."""
    content = io.BytesIO()
    torch.save(load(files["model.safetensors"]), content)
    pickled = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub.repos["o/bin"] = Repo(files=pickled | {"pytorch_model.bin": content.getvalue()})
    environment = hub.environment(tmp_path, READ)
    del environment["HF_HUB_DISABLE_TELEMETRY"]
    assert run(environment, ask("o/bin")) == [(0, "")]
    asked = {path for _, path, _ in hub.requests}
    assert any(path.endswith("/pytorch_model.bin") for path in asked)
    assert not [path for path in asked if "o/bin" not in path or "/commits/" in path or "/discussions" in path]


def test_data_sets(hub: HubServer, squad_dir: Path, model_dirs, tmp_path: Path) -> None:
    for name, gate in (("gated", "ask"), ("pending", "pending")):
        hub.repos[f"o/{name}"] = Repo(kind="datasets", gate=gate)
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    look = [["inspect", str(path), "--dataset.dataset_name", f"o/{name}"] for name in ("gated", "pending", "nothing")]
    found = run(hub.environment(tmp_path, OTHER), *look)
    page = f"{hub.address}/datasets/o"
    assert found[0] == (2, GATED_NOT_ASKED.format(hub="").replace("/o/gated (", f"{page}/gated ("))
    assert found[1] == (2, GATED_PENDING.format(hub="").replace("(/o/pending)", f"({page}/pending)"))
    assert found[2][0] == 2
    assert found[2][1].startswith("`o/nothing` is neither a local path nor a Hub data set that this account can see.")


def test_no_network(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    found = run(environment | {"NO_PROXY": "127.0.0.1"}, ask("o/open"))
    assert found == [
        (
            2,
            "`o/open` is not in the Hugging Face cache and the Hub cannot be reached. Check the network (and "
            "HF_ENDPOINT, if you use a mirror), or give a local directory.",
        )
    ]
