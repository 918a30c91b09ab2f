"""`automodel merge` on real small runs: what it writes is what was trained, and planted faults are caught."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_automodel._transformers import packed_base
from nemo_automodel._transformers.inference import load_for_inference
from nemo_automodel.cli.app import main
from nemo_automodel.components.export.certificate import check_certificate
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.recipes import export
from nemo_automodel.shared.errors import UserError

IDS = torch.randint(4, 400, (1, 12), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def copied(checkpoint: Path, to: Path) -> Path:
    """Return a copy of a checkpoint without its manifest, for a fault to be planted in."""
    shutil.copytree(checkpoint.resolve(), to / "epoch_0_step_5")
    (to / "epoch_0_step_5/manifest.json").unlink()
    return to / "epoch_0_step_5"


@pytest.mark.parametrize("kind", ["lora", "tied", "dora"])
def test_a_run_is_merged_and_certified(runs, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(runs(kind)), "-o", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "certificate: passed on 16 rows of the run's validation data: merged differs from the trained" in printed
    trained, _ = load_for_inference(runs(kind), device="cpu")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    # bf16 keeps 8 bits: a half unit of the last is 2^-9 of a weight
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=0.1)
    content = check_certificate(out)
    assert content["passed"]
    assert content["source"] == "epoch_0_step_5"
    assert str(tmp_path) not in json.dumps(content)
    assert {check["name"] for check in content["checks"]} == {
        "merged = trained", "merged ≠ base", "merged loss", "merged tokens", "merged template"
    }  # fmt: skip
    if kind == "tied":
        assert not merged.config.tie_word_embeddings
        assert any("no longer shared" in note for note in content["notes"])


def test_fp32_is_exact(runs, tmp_path: Path) -> None:
    assert main(["merge", str(runs("tied")), "-o", str(tmp_path / "m"), "--dtype", "float32", "--device", "cpu"]) == 0
    trained, _ = load_for_inference(runs("tied"), device="cpu")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ planted faults


def plant(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let ``change(directory)`` damage what the export has just written."""
    write = export.write_whole

    def write_damaged(source, out, *rest):
        report = write(source, out, *rest)
        change(out)
        return report

    monkeypatch.setattr(export, "write_whole", write_damaged)


def change_weights(change):
    def apply(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return apply


def run_merge(checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Merge, expect one line of error, and return it."""
    assert main(["merge", str(checkpoint), "-o", str(out), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def refused(out: Path) -> None:
    with pytest.raises(UserError, match=r"FAILED|says"):
        check_certificate(out)


def test_a_wrong_alpha_in_the_merge_is_caught(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    """The weights hold half of the update."""
    base = load_file(Path(json.loads((runs("lora") / "model/adapter_config.json").read_text())
                          ["base_model_name_or_path"]) / "model.safetensors")  # fmt: skip

    def halve(tensors):
        for name in tensors:
            tensors[name] = ((tensors[name].float() + base[name].float()) / 2).to(tensors[name].dtype)

    plant(monkeypatch, change_weights(halve))
    assert "is not the model that was trained: merged differs from the trained model by" in run_merge(
        runs("lora"), tmp_path / "m", capsys
    )
    refused(tmp_path / "m")


def test_a_wrong_alpha_in_the_file_is_caught(runs, tmp_path: Path, capsys) -> None:
    path = runs("lora").resolve() / "model/adapter_config.json"
    old = path.read_text()
    wrong = json.dumps(json.loads(old) | {"lora_alpha": 32})
    try:
        path.write_text(wrong)
        assert "is damaged" in run_merge(runs("lora"), tmp_path / "m", capsys)  # its manifest knows better
    finally:
        path.write_text(old)
    checkpoint = copied(runs("lora"), tmp_path)
    (checkpoint / "model/adapter_config.json").write_text(wrong)
    assert "says `lora_alpha` = 32, but the run was trained with 16" in run_merge(checkpoint, tmp_path / "m", capsys)
    assert not (tmp_path / "m").exists()


def test_a_wrong_alpha_of_one_layer_is_caught(runs, tmp_path: Path, capsys) -> None:
    checkpoint = copied(runs("lora"), tmp_path)
    path = checkpoint / "model/adapter_config.json"
    layer = "model.layers.1.mlp.up_proj"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {layer: 32}}))
    error = run_merge(checkpoint, tmp_path / "m", capsys)
    assert f"says `alpha / rank of {layer}` = 8.0, but the run was trained with 4.0 (config.yaml)" in error


def test_a_full_disk_is_one_line_and_leaves_nothing(runs, tmp_path: Path) -> None:
    """Files of more than 20 kB cannot be written; every format is tried in one process."""
    code = """
import json, resource, signal, sys
from nemo_automodel.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
print([main(words) for words in json.loads(sys.argv[1])])
"""
    out = ["-o", str(tmp_path / "out/full"), "--device", "cpu", "--no-certificate"]
    commands = [
        ["merge", str(runs("lora")), *out],
        ["export", str(runs("sft")), "--to", "hf", *out],
        ["export", str(runs("dcp")), "--to", "hf", *out],
        ["export", str(runs("lora")), "--to", "gguf", *out],
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[2, 2, 2, 2]", done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: `{tmp_path}/out/full` cannot be written: File too large. Make room there or name another place with "
        "--out; nothing was left of it."
    ] * 4
    assert not list((tmp_path / "out").iterdir())


def test_a_zero_lora_b_is_caught(runs, tmp_path: Path, capsys) -> None:
    checkpoint = copied(runs("lora"), tmp_path)
    path = checkpoint / "model/adapter_model.safetensors"
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    assert "changes nothing: one factor of every layer is zero" in run_merge(checkpoint, tmp_path / "m", capsys)


def test_the_base_itself_is_caught(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    base = json.loads((runs("lora") / "model/adapter_config.json").read_text())["base_model_name_or_path"]
    plant(monkeypatch, lambda out: shutil.copy(Path(base) / "model.safetensors", out / "model.safetensors"))
    assert "is not the model that was trained" in run_merge(runs("lora"), tmp_path / "m", capsys)
    failed = [check["name"] for check in json.loads((tmp_path / "m/certificate.json").read_text())["checks"]
              if not check["passed"]]  # fmt: skip
    assert failed[:2] == ["merged = trained", "merged ≠ base"]


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_overwritten_is_caught(runs, tmp_path: Path, monkeypatch, capsys, lost: str) -> None:
    """One of the two is written over the other, as a merge that keeps them tied does."""

    def tie(tensors):
        other = ({"lm_head.weight", "model.embed_tokens.weight"} - {lost}).pop()
        tensors[lost] = tensors[other].clone()

    plant(monkeypatch, change_weights(tie))
    assert "merged differs from the trained model by" in run_merge(runs("tied"), tmp_path / "m", capsys)
    refused(tmp_path / "m")


def test_a_wrong_template_is_caught(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    def change(out: Path) -> None:
        path = out / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))

    plant(monkeypatch, change)
    assert "the chat template of merged writes (user) differently" in run_merge(runs("lora"), tmp_path / "m", capsys)


def test_a_base_of_another_size_is_caught(runs, model_dirs, tmp_path: Path, capsys) -> None:
    other = model_dirs("qwen3")
    command = ["merge", str(runs("dora")), "-o", str(tmp_path / "m"), "--base", str(other), "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "The adapter does not fit" in error
    assert not (tmp_path / "m").exists()


def test_an_exported_file_changed_later_is_caught(runs, tmp_path: Path) -> None:
    assert main(["merge", str(runs("lora")), "-o", str(tmp_path / "m"), "--device", "cpu"]) == 0
    (tmp_path / "m/README.md").write_text("a model card may come later")
    check_certificate(tmp_path / "m")
    with (tmp_path / "m/tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"is about other files: `tokenizer\.json` was changed"):
        check_certificate(tmp_path / "m")


# ----------------------------------------------------------------------------------------------------- the two bases


def set_adapter(checkpoint: Path, make) -> None:
    """Give every layer the update ``make(weight, weight as packed)``, at full rank."""
    config_path = checkpoint / "model/adapter_config.json"
    config = json.loads(config_path.read_text())
    base = Path(config["base_model_name_or_path"])
    weights = load_file(base / "model.safetensors")
    packed = packed_base.base_as_packed(base, QuantizationConfig(load_in_4bit=True), "float32")
    tensors = {}
    for layer in config["target_modules"]:
        weight = weights[f"{layer}.weight"]
        u, s, v = torch.linalg.svd(make(weight, packed(f"{layer}.weight", weight)), full_matrices=False)
        rest = 32 - len(s)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.nn.functional.pad(v, (0, 0, 0, rest)).contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.nn.functional.pad(u * s, (0, rest)).contiguous()
    save_file(tensors, checkpoint / "model/adapter_model.safetensors")
    config |= {"r": 32, "lora_alpha": 32}
    config_path.write_text(json.dumps(config))
    run = checkpoint / "config.yaml"
    run.write_text(run.read_text().replace("dim: 4", "dim: 32").replace("alpha: 16", "alpha: 32"))


UPDATES = {
    "rounded": lambda weight, packed: weight - packed,  # undoes the rounding: right on the rounded base alone
    "full": lambda weight, packed: torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 2e-3,
}


@pytest.mark.parametrize("best", UPDATES)
def test_the_base_is_chosen_by_held_out_loss(runs, tmp_path: Path, capsys, best: str) -> None:
    checkpoint = copied(runs("qlora"), tmp_path)
    set_adapter(checkpoint, UPDATES[best])
    main(["merge", str(checkpoint), "-o", str(tmp_path / "m"), "--device", "cpu", "--dtype", "float32"])
    out = "".join(capsys.readouterr())
    assert f"merging into the {best} base (the lower held-out loss)" in out
    losses = json.loads((tmp_path / "m/certificate.json").read_text())["losses"]
    rounded, full = losses["adapter on the rounded base (as trained)"], losses["adapter on the full base"]
    assert (rounded < full) == (best == "rounded")
    assert losses["merged"] == pytest.approx(min(rounded, full), abs=1e-3)
    other = {"rounded": "full", "full": "rounded"}[best]
    main(["merge", str(checkpoint), "-o", str(tmp_path / "o"), "--device", "cpu", "--merge-into", other])
    assert f"merging into the {other} base (asked for)" in capsys.readouterr().out
    asked = json.loads((tmp_path / "o/certificate.json").read_text())["losses"]["merged"]
    assert asked == pytest.approx(max(rounded, full), abs=0.02)


def test_weights_are_rounded_as_training_rounds_them(runs) -> None:
    model, _ = load_quantised(runs("qlora"))
    base = Path(model.config.name_or_path)
    weights = load_file(base / "model.safetensors")
    packed = packed_base.base_as_packed(base, QuantizationConfig(load_in_4bit=True), "float32")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(modules) == 14
    for name, weight in weights.items():
        layer = modules.get(name.removesuffix(".weight"))
        if layer is None:
            assert packed(name, weight) is weight
        else:
            assert torch.equal(packed(name, weight), layer.unpacked())
            assert not torch.equal(packed(name, weight), weight)


def load_quantised(checkpoint: Path):
    from nemo_automodel._transformers.answers import Loading
    from nemo_automodel._transformers.merge import read_adapter

    loading = Loading(torch.device("cpu"), torch.float32)
    return loading.with_adapter(read_adapter(checkpoint / "model"), QuantizationConfig(load_in_4bit=True)), loading


def test_the_older_spelling(runs, tmp_path: Path) -> None:
    """`tools/merge_lora.py -m BASE -a ADAPTER -o OUT` as a program."""
    adapter = runs("lora") / "model"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    root = Path(__file__).resolve().parents[2]
    words = ["-m", base, "-a", str(adapter), "-o", str(tmp_path / "m"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(root / "tools/merge_lora.py"), *words],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert check_certificate(tmp_path / "m")["kind"] == "merged"


def test_mistakes(runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    cut = tmp_path / "cut"
    shutil.copytree(runs("sft") / "model", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    for words, message in (
        (["merge", str(runs("sft")), "-o", str(tmp_path / "x")], "is no adapter: all its weights are there already"),
        (["merge", str(tmp_path / "gone"), "-o", str(tmp_path / "x")], "holds no model"),
        (["merge", str(runs("lora")), "-o", str(tmp_path / "full")], "exists and is not empty"),
        (["merge", str(runs("lora")), "-o", str(tmp_path / "x"), "--merge-into", "rounded"], "4- or 8-bit base"),
        (["merge", str(runs("lora")), "-o", str(tmp_path / "x"), "--device", "gpu"], "`device: gpu` is not a device"),
        (["export", str(cut), "--to", "hf", "-o", str(tmp_path / "x")], "is damaged or only partly there"),
        (["merge", str(runs("lora")), "-o", str(tmp_path / "x"), "--dtype", "int4"], "`--dtype: int4` is not a dtype"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error, error
        assert not (tmp_path / "x").exists()
        assert not (tmp_path / ".x.part").exists()
