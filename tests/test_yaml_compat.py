"""Every shipped recipe loads, resolves and, where a tiny model can stand in, trains; so do the older forms."""

from __future__ import annotations

import inspect
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FINETUNE = ROOT / "examples/llm_finetune"
BENCHMARK = ROOT / "examples/benchmark"
PLAYBOOK = {
    "lora": FINETUNE / "llama3_2/llama3_2_1b_squad_peft.yaml",
    "qlora": FINETUNE / "llama3_1/llama3_1_8b_squad_qlora.yaml",
    "sft": FINETUNE / "qwen/qwen3_8b_squad_spark.yaml",
}
SHIPPED = sorted((ROOT / "examples").rglob("*.yaml"))
OLD = sorted((ROOT / "tests/data").rglob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def settings_of(path: Path):
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.settings import load_settings

    return load_settings(load_yaml_config(path))


def targets_in(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted name, its other keys) of every `_target_` and of every function named by a `*_fn` key."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"], {k: v for k, v in node.items() if k != "_target_"}
        for name, value in node.items():
            yield from targets_in(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from targets_in(value)
    elif isinstance(node, str) and key.endswith("_fn"):
        yield node, {}


# ------------------------------------------------------------------------------------------------ every file


def test_the_playbook_finds_its_files():
    assert all(path.is_file() for path in PLAYBOOK.values())
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    needed = {"benchmark", "diffusion", "llm_finetune", "llm_kd", "llm_pretrain", "vlm_finetune", "vlm_generate"}
    assert needed <= folders
    assert all(any((ROOT / "examples" / folder).iterdir()) for folder in needed)


@pytest.mark.parametrize("path", [*SHIPPED, *OLD], ids=name_of)
def test_loads_and_every_key_is_known(path: Path):
    from nemo_automodel.shared.errors import NotSupportedYetError

    try:
        settings = settings_of(path)
    except NotSupportedYetError as error:
        assert path.stem == "llama3_1_8b_lora_fp8"
        pytest.xfail(str(error))
    assert settings.step_scheduler.global_batch_size % settings.step_scheduler.local_batch_size == 0


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_shipped_recipes_say_what_they_need(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "# Needs " in text
    is_benchmark = path.parent.name == "benchmark"
    recipe = "BenchmarkingRecipeForNextTokenPrediction" if is_benchmark else "TrainFinetuneRecipeForNextTokenPrediction"
    assert yaml.safe_load(text)["recipe"] == recipe


@pytest.mark.parametrize("path", [*SHIPPED, *OLD], ids=name_of)
def test_every_target_resolves_and_takes_its_keys(path: Path):
    from nemo_automodel.components.config import targets

    # the reference's distributed managers are translated, not called
    raw = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "distributed"}
    found = list(targets_in(raw))
    assert found
    for dotted, keys in found:
        target = targets.resolve(dotted, "the file")
        assert callable(target), dotted
        if "dataloader" not in dotted:
            inspect.signature(target).bind_partial(**keys)


# ------------------------------------------------------------------------------------------ the playbook's values

TABLE = {  # contract values: seed, global, local, ckpt, val, epochs, max_steps, pack, validation rows, lr, wd
    "lora": (1111, 64, 8, 1000, 10, 1, None, 0, 64, 1e-5, 0),
    "qlora": (42, 32, 4, 100, 600, 10, 500, 0, 100, 1e-5, 0.01),
    "sft": (1111, 64, 2, 1000, 10, 1, None, 1024, 64, 1e-5, 0),
}


@pytest.mark.parametrize("form", ["examples", "v0_2", "v0_5"])
@pytest.mark.parametrize("which", list(PLAYBOOK))
def test_playbook_values_in_every_form(which: str, form: str):
    path = PLAYBOOK[which] if form == "examples" else ROOT / "tests/data" / form / PLAYBOOK[which].name
    settings = settings_of(path)
    schedule = settings.step_scheduler
    assert (
        settings.seed,
        schedule.global_batch_size,
        schedule.local_batch_size,
        schedule.ckpt_every_steps,
        schedule.val_every_steps,
        schedule.num_epochs,
        schedule.max_steps,
        settings.packed_sequence.packed_sequence_size,
        settings.validation_datasets["default"].get("limit_dataset_samples"),
        settings.optimizer.get("lr"),
        settings.optimizer.get("weight_decay"),
    ) == TABLE[which]
    assert settings.optimizer.get("eps") == 1e-8
    assert list(settings.optimizer.get("betas")) == [0.9, 0.999]
    assert settings.distributed.strategy == "fsdp2"
    assert settings.dataset.get("dataset_name") == "rajpurkar/squad"
    assert settings.dataloader.shuffle is False
    assert settings.checkpoint.enabled
    assert settings.checkpoint_dir_is_default
    if which == "qlora":
        assert settings.lr_scheduler is None
        assert settings.quantization is not None
        assert settings.quantization.load_in_4bit
        assert (settings.peft.get("dim"), settings.peft.get("alpha"), settings.peft.get("dropout")) == (16, 32, 0.1)
    else:
        assert settings.quantization is None
        assert (settings.lr_scheduler.lr_decay_style, settings.lr_scheduler.min_lr) == ("cosine", 1e-6)
    if which == "lora":
        assert (settings.peft.get("dim"), settings.peft.get("alpha"), settings.peft.get("use_triton")) == (8, 32, True)
    if which == "sft":
        assert settings.peft is None
        assert settings.optimizer.get("fused") is True


# --------------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a script as a program and returns its exit status."""

    def run(script: Path, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [script.name, *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(script), run_name="__main__")
        return int(exit_info.value.code or 0)

    return run


@pytest.fixture
def finetune(run_script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs examples/llm_finetune/finetune.py in an empty directory and returns LATEST."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: Path, *overrides: object) -> Path:
        assert run_script(FINETUNE / "finetune.py", "-c", recipe, *overrides) == 0
        return tmp_path / "checkpoints" / "LATEST"

    return run


def data_overrides(path: Path) -> list[object]:
    return ["--dataset.dataset_name", path, "--validation_dataset.dataset_name", path]


def chat_overrides() -> list[object]:
    overrides: list[object] = []
    for section, file in (("dataset", "train"), ("validation_dataset", "validation")):
        overrides += [
            f"--{section}.path_or_dataset_id",
            FINETUNE / f"own_data/{file}.jsonl",
            f"--{section}.split",
            "none",
        ]
    return overrides


def one_step(global_batch_size: int = 4, local_batch_size: int = 2) -> list[object]:
    return [
        "--step_scheduler.max_steps",
        1,
        "--step_scheduler.global_batch_size",
        global_batch_size,
        "--step_scheduler.local_batch_size",
        local_batch_size,
    ]


def records(latest: Path, file: str = "training.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (latest.resolve().parent / file).read_text().splitlines()]


def check_checkpoint(latest: Path) -> None:
    listing = set(os.listdir(latest))
    assert {"config.yaml", "dataloader", "model", "optim", "rng", "step_scheduler.pt", "losses.json"} <= listing


@pytest.mark.slow
def test_the_playbooks_commands_one_after_the_other(finetune, model_dirs, squad_dir: Path, capsys):
    import peft
    import transformers

    common = ["--packed_sequence.packed_sequence_size", 256, "--step_scheduler.max_steps", 2]
    common += ["--step_scheduler.global_batch_size", 4, *data_overrides(squad_dir)]
    model = "--model.pretrained_model_name_or_path"
    loss = ["--loss_fn._target_", "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy"]
    seen = []
    for which, family, extra in (
        ("lora", "llama", ["--step_scheduler.local_batch_size", 2]),
        ("qlora", "llama", [*loss, "--step_scheduler.local_batch_size", 1]),
        ("sft", "qwen3", ["--step_scheduler.local_batch_size", 1]),
    ):
        latest = finetune(PLAYBOOK[which], model, model_dirs(family), *common, *extra)
        check_checkpoint(latest)
        assert latest.is_symlink()
        assert latest.resolve().name == "epoch_0_step_1"
        assert latest.resolve() not in seen, "a run may not write over an older one"
        seen.append(latest.resolve())
        assert all(path.is_dir() for path in seen), "older runs stay in place"
        steps = records(latest)
        assert [record["step"] for record in steps] == [0, 1]
        assert all(record["num_label_tokens"] > 0 and record["loss"] > 0 for record in steps)
        saved = yaml.safe_load((latest / "config.yaml").read_text())
        assert saved["model"]["pretrained_model_name_or_path"] == str(model_dirs(family))
        if which == "sft":
            transformers.AutoModelForCausalLM.from_pretrained(latest / "model")
            transformers.AutoTokenizer.from_pretrained(latest / "model")
        else:
            base = transformers.AutoModelForCausalLM.from_pretrained(model_dirs(family))
            peft.PeftModel.from_pretrained(base, latest / "model")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["v0_2", "v0_5"])
@pytest.mark.parametrize("which", list(PLAYBOOK))
def test_older_forms_train(which: str, form: str, finetune, model_dirs, squad_dir: Path):
    recipe = ROOT / "tests/data" / form / PLAYBOOK[which].name
    model = ["--model.pretrained_model_name_or_path", model_dirs("qwen3" if which == "sft" else "llama")]
    latest = finetune(recipe, *model, *one_step(), *data_overrides(squad_dir))
    check_checkpoint(latest)
    assert len(records(latest)) == 1


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("llama3_2/llama3_2_1b_squad.yaml", "llama"),
        ("mistral/mistral_7b_squad.yaml", "mistral"),
        ("mistral/mistral_7b_squad_peft.yaml", "mistral"),
        ("qwen/qwen3_4b_squad_peft.yaml", "qwen3"),
    ],
)
def test_squad_recipes_train(recipe: str, family: str, finetune, model_dirs, squad_dir: Path):
    model = ["--model.pretrained_model_name_or_path", model_dirs(family), "--packed_sequence.packed_sequence_size", 128]
    latest = finetune(FINETUNE / recipe, *model, *one_step(), *data_overrides(squad_dir))
    check_checkpoint(latest)
    assert len(records(latest)) == len(records(latest, "validation.jsonl")) == 1


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("llama3_1/llama3_1_8b_chat.yaml", "llama"),
        ("qwen/qwen2_5_7b_chat_peft.yaml", "qwen2"),
        ("gemma/gemma3_1b_chat.yaml", "gemma3"),
        ("gemma/gemma3_1b_chat_peft.yaml", "gemma3"),
        ("own_data/smollm2_135m_chat_peft.yaml", "llama"),
    ],
)
def test_chat_recipes_train(recipe: str, family: str, finetune, model_dirs):
    from support.tiny import CHAT_TEMPLATE

    model = ["--model.pretrained_model_name_or_path", model_dirs(family, CHAT_TEMPLATE)]
    latest = finetune(
        FINETUNE / recipe,
        *model,
        *one_step(),
        *chat_overrides(),
        "--packed_sequence.packed_sequence_size",
        256,
        "--checkpoint.checkpoint_dir",
        "checkpoints",
    )
    check_checkpoint(latest)
    assert len(records(latest)) == len(records(latest, "validation.jsonl")) == 1


def test_phi_recipe_trains_fused_projections(finetune, tmp_path: Path):
    import transformers
    from support.tiny import CHAT_TEMPLATE, make_tokenizer

    config = transformers.Phi3Config(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "phi")
    model = ["--model.pretrained_model_name_or_path", tmp_path / "phi", "--packed_sequence.packed_sequence_size", 256]
    latest = finetune(FINETUNE / "phi/phi_4_chat_peft.yaml", *model, *one_step(), *chat_overrides())
    adapted = json.loads((latest / "model/adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in adapted} >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_the_default_recipe_trains(finetune, model_dirs, tmp_path: Path):
    rows = [
        {"ctx": f"A cook takes {i} eggs and", "endings": ["flies.", "breaks them.", "sings.", "sleeps."], "label": "1"}
        for i in range(16)
    ]
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset.path_or_dataset", tmp_path / "data", "--validation_dataset.path_or_dataset", tmp_path / "data"]
    model = ["--model.pretrained_model_name_or_path", model_dirs("llama")]
    latest = finetune(FINETUNE / "llama3_2/llama3_2_1b_hellaswag.yaml", *model, *one_step(), *data)
    check_checkpoint(latest)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 448}


def tiny_shape(num_rows: int, accumulate: int) -> list[object]:
    words: list[object] = [f"--model.config.{key}={value}" for key, value in TINY.items()]
    words += ["--model.torch_dtype=float32", "--dataset.vocab_size=448", "--dataset.seq_len=16"]
    words += [
        "--step_scheduler.max_steps=3",
        "--benchmark.warmup_steps=1",
        f"--step_scheduler.local_batch_size={num_rows}",
    ]
    return [*words, f"--step_scheduler.global_batch_size={num_rows * accumulate}"]


@pytest.mark.parametrize(
    "recipe", ["llama3_1_8b_lora", "llama3_1_8b_lora_dropout", "qwen2_5_7b_lora", "smollm2_135m_lora"]
)
def test_benchmark_recipes_run(recipe: str, run_script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    words = ["-c", BENCHMARK / f"{recipe}.yaml", *tiny_shape(2, 2)]
    assert run_script(BENCHMARK / "benchmark.py", *words) == 0
    result = json.loads((tmp_path / f"runs/benchmark/{recipe}/benchmark.json").read_text())
    window = result["window"]
    assert (window["steps"], window["micro_batches"], window["tokens_per_micro_batch"]) == (2, 4, 2 * 16)
    assert result["conditions"]["adapters"]["dropout"] == (0.1 if "dropout" in recipe else 0.0)


@pytest.mark.parametrize("path", ["v0_5/llama3_1_8b_peft_benchmark.yaml", "v0_2/llama3_1_8b_benchmark.yaml"])
def test_older_benchmarks_run(path: str, model_dirs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from nemo_automodel.cli.app import main

    monkeypatch.chdir(tmp_path)
    file = ROOT / "tests/data" / path
    words = [str(file)] if "v0_5" in path else ["benchmark", "llm", "-c", str(file)]
    words += [str(word) for word in tiny_shape(2, 2) if "model.config" not in str(word)]
    assert main([*words, "--model.config.pretrained_model_name_or_path", str(model_dirs("llama"))]) == 0
    result = json.loads((tmp_path / "checkpoints/benchmark.json").read_text())
    assert result["window"]["tokens_per_micro_batch"] == 2 * 16, (
        "the reference's mock data takes the micro-batch's rows"
    )
    assert result["tflops"]["peak"] == 989


# ---------------------------------------------------------------------------------------------------- the scripts


def test_the_first_lines_of_the_script_read_well():
    head = "".join((FINETUNE / "finetune.py").read_text().splitlines(keepends=True)[:20])
    for word in ("-c <recipe.yaml>", "parse_args_and_load_config", "TrainFinetuneRecipeForNextTokenPrediction"):
        assert word in head


@pytest.mark.parametrize("script", ["examples/llm_finetune/finetune.py", "recipes/llm_finetune/finetune.py"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.lrr", "3"], "`optimizer.lrr`"),
        (["--model.pretrained_model_name_or_path", "./not-there"], "./not-there"),
        (["-c", "not-there.yaml"], "not-there.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    script: str, words: list[str], expected: str, run_script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOGGING_LEVEL", "ERROR")
    assert run_script(ROOT / script, *words, "--checkpoint.checkpoint_dir", tmp_path / "run") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert message.count("\n") == 0
    assert expected in message


def test_a_copy_of_the_script_trains(run_script, model_dirs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from support.tiny import CHAT_TEMPLATE

    copy = shutil.copy(ROOT / "recipes/llm_finetune/finetune.py", tmp_path / "my_custom_training.py")
    monkeypatch.chdir(ROOT)
    model = ["--model.pretrained_model_name_or_path", model_dirs("llama", CHAT_TEMPLATE)]
    assert run_script(copy, *model, *one_step(), "--checkpoint.checkpoint_dir", tmp_path / "run") == 0
    check_checkpoint(tmp_path / "run/LATEST")
