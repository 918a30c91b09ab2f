"""The command line as a user types it."""

from __future__ import annotations

import copy
import errno
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_automodel.cli import app
from nemo_automodel.cli.app import main, run_safely
from nemo_automodel.recipes.registry import DEFAULT_RECIPE
from nemo_automodel.shared.errors import UserError

NAC = "nemo_automodel.components"
BASE: dict[str, Any] = {
    "recipe": DEFAULT_RECIPE,
    "seed": 1,
    "step_scheduler": {"global_batch_size": 8, "local_batch_size": 2},
    "model": {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "some/model",
    },
    "loss_fn": {"_target_": f"{NAC}.loss.masked_ce.MaskedCrossEntropy"},
    "dataset": {"_target_": f"{NAC}.datasets.llm.squad.make_squad_dataset"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
}


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NM_UNSET", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE, sort_keys=False))
    return path


def error_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Run a command that must fail, and return its only line on stderr."""
    status = main(words)
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


FROM_CONFIG = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"

# words after `automodel run.yaml`, what the line must hold
OVERRIDES: list[tuple[str, list[str]]] = [
    # sections and keys
    ("--optimzer.lr 1", ["`optimzer`", "Did you mean `optimizer`"]),
    ("--optimizer.learning_rate 1", ["`optimizer.learning_rate`", "takes no `learning_rate`"]),
    ("--optimizer.beta [0.9,0.99]", ["Did you mean `betas`"]),
    ("--step_scheduler.max_step 3", ["Did you mean `max_steps`"]),
    ("--dataset.splitt train", ["`dataset.splitt`", "Did you mean `split`"]),
    ("--loss_fn.ignore_indx 1", ["Did you mean `ignore_index`"]),
    ("--model.torch_dtpye bf16", ["`model.torch_dtpye`", "`torch_dtype`"]),
    ("--model.attn_implementaton sdpa", ["`attn_implementation`"]),
    ("--peft.dims 8", ["`peft.dims`", "Did you mean `dim`"]),
    ("--checkpoint.checkpoint_dirr x", ["Did you mean `checkpoint_dir`"]),
    ("--distributed.stratgy fsdp2", ["Did you mean `strategy`"]),
    ("--dataloader.num_worker 1", ["Did you mean `num_workers`"]),
    ("--wandb.projct x", ["Did you mean `project`"]),
    ("--clip_grad_norm.norm 1", ["`clip_grad_norm.norm`", "max_norm"]),
    ("--lr_scheduler.warmup_steps 1", ["`lr_scheduler.warmup_steps`", "Did you mean `lr_warmup_steps`"]),
    ("--freeze_config.freeze_visoin_tower true", ["Did you mean `freeze_vision_tower`"]),
    ("--rng.sede 3", ["`rng.sede`"]),
    ("--mlflow.experiment x", ["`mlflow.experiment`", "experiment_name"]),
    ("--distributed.pipeline.pp_schedul x", ["`distributed.pipeline.pp_schedul`"]),
    ("--model.peft_config.dim 8", ["`model.peft_config`", "`peft`"]),
    ("--model.tp_plan x", ["`distributed.tp_plan`"]),
    # types
    ("--seed forty", ["`seed` is `forty`", "a whole number"]),
    ("--seed -1", ["`seed` is -1"]),
    ("--seed true", ["`seed` is true"]),
    ("--step_scheduler.max_steps many", ["`step_scheduler.max_steps` is `many`", "a whole number or null"]),
    ("--step_scheduler.max_steps 1e3", ["1000.0", "Write 1000"]),
    ("--step_scheduler.global_batch_size none", ["is null", "leave it out for 32"]),
    ("--step_scheduler 3", ["`step_scheduler` is 3", "a mapping"]),
    ("--optimizer.lr fast", ["`optimizer.lr` is `fast`", "a number"]),
    ("--optimizer.lr -1", ["`optimizer.lr` is -1", "negative"]),
    ("--optimizer.weight_decay [1]", ["`optimizer.weight_decay` is [1]"]),
    ("--dataset.seq_length long", ["`dataset.seq_length` is `long`"]),
    ("--compile.enabled maybe", ["`compile.enabled` is `maybe`", "true or false"]),
    ("--wandb.enable maybe", ["`wandb.enable` is `maybe`"]),
    ("--recipe 3", ["`recipe` is 3"]),
    ("--clip_grad_norm.max_norm big", ["`clip_grad_norm.max_norm` is `big`"]),
    ("--distributed.tp_size two", ["`distributed.tp_size` is `two`"]),
    # values and combinations
    ("--step_scheduler.global_batch_size 9", ["must be a multiple", "2"]),
    ("--step_scheduler.local_batch_size 0", ["at least 1"]),
    ("--step_scheduler.preemption_signal SIGNOPE", ["SIGNOPE", "not a signal"]),
    ("--lr_scheduler.min_lr 1e-3", ["`lr_scheduler.min_lr` is 0.001", "`optimizer.lr` = 0.0001"]),
    ("--lr_scheduler.lr_decay_style cosin", ["Did you mean `cosine`"]),
    ("--lr_scheduler.lr_warmup_steps 0.1", ["`lr_scheduler.lr_warmup_steps` is 0.1", "a whole number"]),
    ("--model.torch_dtype bf17", ["`model.torch_dtype: bf17` is not a dtype"]),
    ("--clip_grad_norm.max_norm -1", ["a norm is not negative"]),
    ("--dist_env.timeout_minutes 0", ["must be positive"]),
    ("--distributed.dp_size 0", ["`distributed.dp_size` is 0"]),
    ("--distributed.activation_checkpointing some", ["selective or full", "sac2, sac1 or full_offload"]),
    ("--distributed.mlp_tile_tokens 0", ["`distributed.mlp_tile_tokens: 0` is not a number of tokens"]),
    ("--distributed.strategy fsdp3", ["`distributed.strategy: fsdp3` is not known", "fsdp2"]),
    ("--quantization.load_in_4bit true", ["Add a `peft` section"]),
    ("--peft.dim 8 --peft.dropout 2", ["`peft.dropout`"]),
    ("--packed_sequence.packed_sequence_size -1", ["packed_sequence_size"]),
    ("--packed_sequence.num_proc 0", ["`packed_sequence.num_proc` is 0"]),
    ("--dataloader.prefetch_factor 2", ["num_workers"]),
    ("--dataloader.collate_fn defualt", ["`dataloader.collate_fn` is `defualt`"]),
    ("--dataloader._target_ torch.utils.data.Sampler", ["StatefulDataLoader"]),
    ("--checkpoint.best_metric_key x --validation_dataset.split x", ["`validation_dataset`"]),
    ("--checkpoint.model_save_format pickle", ["Known: safetensors"]),
    # missing
    ("--model none", ["the section `model` is missing"]),
    ("--optimizer none", ["the section `optimizer` is missing"]),
    ("--dataset none", ["the section `dataset` is missing"]),
    ("--recipe none", ["`recipe` is missing", DEFAULT_RECIPE]),
    ("--model.pretrained_model_name_or_path", ["`model.pretrained_model_name_or_path` is true"]),
    (f"--model._target_ {FROM_CONFIG} --model.config x", ["`pretrained_model_name_or_path`, and both are given"]),
    (
        f"--model._target_ {FROM_CONFIG} --model.pretrained_model_name_or_path none",
        ["takes `config` or `pretrained_model_name_or_path`, and neither is given"],
    ),
    ("--validation_dataset.limit_dataset_samples 3", ["`validation_dataset` has no `_target_`"]),
    # targets
    ("--optimizer._target_ os.system", ["`optimizer._target_: os.system`"]),
    ("--optimizer._target_ torch.os.system", ["torch.os.system"]),
    ("--nobody_reads._target_ torch.load", ["torch.load", "loads or runs code"]),
    ("--dataloader.collate_fn os.system", ["os.system"]),
    ("--model.x {'_target_':'builtins.eval'}", ["builtins.eval"]),
    ("--dataset._target_ mine.py:make", ["NEMO_ENABLE_USER_MODULES=1"]),
    ("--dataset._target_ my_package.make", ["--allow-target my_package"]),
    (f"--loss_fn._target_ {NAC}.loss.masked_ce.MaskedCrossEntrpy", ["Did you mean `MaskedCrossEntropy`"]),
    (f"--loss_fn._target_ {NAC}.los.masked_ce.MaskedCrossEntropy", ["Did you mean `loss`"]),
    ("--optimizer._target_ adamx", ["adamx", "Did you mean `adam"]),
    ("--optimizer._target_ flashoptim.FlashAdamW", ["pip install flashoptim"]),
    ("--loss_fn._target_ 3", ["a target is a dotted path"]),
    ("--distributed._target_ torch.nn.Linear", ["`distributed._target_: torch.nn.Linear`"]),
    # environment
    ("--wandb.name ${NM_UNSET}", ["`wandb.name`", "NM_UNSET"]),
    ("--wandb.name ${bad name}", ["is not a placeholder"]),
    # later
    ("--distributed.dp_size 2", ["`distributed.dp_size` is 2", "started as 1 process", "--nproc-per-node 2"]),
    ("--distributed.dp_replicate_size 2", ["`distributed.dp_replicate_size` is 2", "--nproc-per-node 2"]),
    ("--distributed.tp_size 2", ["`distributed.tp_size` is 2", "not supported yet"]),
    ("--recipe FinetuneRecipeForVLM", ["FinetuneRecipeForVLM", "not supported yet"]),
    ("--kd_ratio 0.5", ["`kd_ratio`", "not supported yet"]),
    ("--checkpoint.v4_compatible true", ["`checkpoint.v4_compatible", "not supported yet"]),
    ("--skypilot.cloud aws", ["`skypilot`", "not supported yet"]),
    ("--nproc-per-node 2 --distributed.strategy mfsdp", ["on 2 devices", "not supported yet"]),
    # words
    ("stray", ["two config files", "stray"]),
    ("--seed 3 stray", ["stray"]),
    ("-q", ["`-q` is neither"]),
    ("--a..b 3", ["`--a..b` is not an override"]),
    ("--recipe.x 3", ["`recipe.x`"]),
    ("--nproc-per-node two", ["not a number of processes"]),
    ("--allow-target os", ["standard library"]),
]


@pytest.mark.parametrize(("words", "parts"), OVERRIDES, ids=[words for words, _ in OVERRIDES])
@pytest.mark.usefixtures("run_yaml")
def test_bad_overrides_are_one_line(words: str, parts: list[str], capsys: pytest.CaptureFixture[str]):
    split = words.split(" ") if "bad name" not in words else ["--wandb.name", "${bad name}"]
    message = error_of(capsys, ["run.yaml", *split])
    for part in parts:
        assert part in message


FILES: list[tuple[str, list[str]]] = [
    ("", ["is empty"]),
    ("- a\n", ["run.yaml", "mapping of sections"]),
    ("a: [1\n", ["run.yaml", "line 2, column 1"]),
    ("model: 1\nmodel: 2\n", ["line 2", "`model` was already given on line 1"]),
    ("a: \x00\n", ["not YAML"]),
    ("a: &a [*a]\n", ["nested too deeply"]),
    ("model: {_target_: !!python/name:os.system }\n", ["line 1"]),
    ("recipe: x\n", ["`recipe: x` is not known"]),
]


@pytest.mark.parametrize(("text", "parts"), FILES)
def test_bad_files_are_one_line(text: str, parts: list[str], run_yaml: Path, capsys: pytest.CaptureFixture[str]):
    run_yaml.write_text(text)
    message = error_of(capsys, ["finetune", "llm", "-c", "run.yaml"])
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rum.yaml"], ["`rum.yaml` does not exist", "Did you mean `run.yaml`"]),
        (["."], ["is a directory"]),
        (["no/where.yaml"], ["`no`"]),
        (["-c"], ["`-c` needs a value"]),
        (["--seed", "3"], ["no config file"]),
        (["--flag", "run.yaml"], ["`run.yaml` was read as the value of --flag"]),
        (["finetun", "llm", "-c", "run.yaml"], ["Did you mean `finetune`"]),
        (["finetune"], ["automodel finetune llm -c"]),
        (["finetune", "-c", "run.yaml"], ["automodel finetune llm -c"]),
        (["finetune", "llm", "run.yaml"], ["`run.yaml` is neither"]),
        (["finetune", "vlm", "-c", "run.yaml"], ["not supported yet"]),
        (["kd", "llm", "-c", "run.yaml"], ["not supported yet"]),
        (["benchmark", "vlm", "-c", "run.yaml"], ["not supported yet"]),
    ],
)
@pytest.mark.usefixtures("run_yaml")
def test_bad_commands_are_one_line(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]):
    message = error_of(capsys, words)
    assert all(part in message for part in parts)


class Recorder:
    """Stands where a recipe would train."""

    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, cfg: Any) -> None:
        self.seen.append(cfg)

    def setup(self) -> None:
        self.seen.append("setup")

    def run_train_validation_loop(self) -> None:
        self.seen.append("loop")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    from nemo_automodel.recipes import registry

    asked: list[str] = []
    monkeypatch.setattr(Recorder, "seen", asked)
    monkeypatch.setattr(registry, "resolve_recipe", lambda path: asked.append(path) or Recorder)
    return Recorder


@pytest.mark.usefixtures("run_yaml")
@pytest.mark.parametrize(
    "words",
    [
        ["run.yaml", "--optimizer.lr", "3"],
        ["--optimizer.lr", "3", "run.yaml"],
        ["-c", "run.yaml", "--optimizer.lr=3"],
        ["./run.yaml", "--nproc-per-node", "1", "--optimizer.lr", "3", "--debug"],
        ["finetune", "llm", "-c", "run.yaml", "--optimizer.lr", "3"],
        ["pretrain", "llm", "--optimizer.lr", "3", "--config", "run.yaml"],
    ],
)
def test_ways_to_start_a_run(words: list[str], recorder: type[Recorder], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    path, config, *calls = recorder.seen
    assert path == f"nemo_automodel.recipes.llm.train_ft.{DEFAULT_RECIPE}"
    assert config.optimizer.lr == 3
    assert calls == ["setup", "loop"]
    assert capsys.readouterr().out.startswith("cfg-path: ")


def test_a_task_needs_no_recipe(run_yaml: Path, recorder: type[Recorder], capsys: pytest.CaptureFixture[str]):
    config = copy.deepcopy(BASE)
    del config["recipe"]
    run_yaml.write_text(yaml.safe_dump(config))
    assert main(["finetune", "llm", "-c", "run.yaml"]) == 0
    assert "loop" in recorder.seen
    assert "`recipe` is missing" in error_of(capsys, ["run.yaml"])


def test_a_process_that_is_one_of_several_starts_no_others(
    run_yaml: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run.yaml", "--nproc-per-node", "2"]) == 0
    assert recorder.seen[2:] == ["setup", "loop"]
    assert capsys.readouterr().out == ""  # the first process says which file it is


@pytest.mark.parametrize("num_gpus", [0, 1, 3])
def test_one_gpu_is_used_unless_more_are_asked_for(
    run_yaml: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, num_gpus: int, capsys
):
    import torch

    launched = []
    monkeypatch.setattr(app, "launch", lambda words, number: launched.append((words, number)) or 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    for words in (["run.yaml"], ["run.yaml", "--nproc-per-node", "1"], ["benchmark", "llm", "-c", "run.yaml"]):
        recorder.seen.clear()
        assert main(words) == 0
        assert "loop" in recorder.seen
        told = "One of 3 GPUs is used. All of them: --nproc-per-node 3" in capsys.readouterr().out
        assert told == (num_gpus == 3 and words == ["run.yaml"])
    assert launched == []
    assert main(["finetune", "llm", "-c", "run.yaml", "--nproc-per-node", "4"]) == 7
    assert launched == [(["finetune", "llm", "-c", "run.yaml", "--nproc-per-node", "4"], 4)]


def test_debug_shows_the_traceback(run_yaml: Path):
    with pytest.raises(UserError, match="optimzer"):
        main(["run.yaml", "--optimzer.lr", "3", "--debug"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "automodel <config.yaml>" in text
    assert "chat                     Chat with a model" in text
    assert main(["run.yaml", "--help"]) == 0
    assert capsys.readouterr().out == text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("automodel 0.")
    assert main([]) == 2


def test_a_tool_has_its_own_help(capsys: pytest.CaptureFixture[str]):
    assert main(["report", "--help"]) == 0
    assert "usage: automodel report" in capsys.readouterr().out
    assert "`automodel report --help` shows the options" in error_of(capsys, ["report"])
    assert "--no-such" in error_of(capsys, ["report", "somewhere", "--no-such"])


def seconds(words: list[str], cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return the best of three, so that a busy machine does not decide."""
    best, done = float("inf"), None
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "nemo_automodel.cli.app", *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        best = min(best, time.perf_counter() - start)
    return best, done


def test_help_and_errors_are_quick(run_yaml: Path):
    help_s, done = seconds(["--help"], run_yaml.parent)
    assert done.returncode == 0
    error_s, done = seconds(["run.yaml", "--dataset.splitt", "x"], run_yaml.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: `dataset.splitt`")
    assert done.stderr.count("\n") == 1
    # limits of the issue are 0.3 s and 1 s on an idle machine; twice that leaves room for a busy one
    assert help_s < 0.6
    assert error_s < 2.0


def test_playbook_out_of_memory_during_training(capsys: pytest.CaptureFixture[str]):
    import torch

    words = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.1 is free"
    )
    assert run_safely(raising(torch.OutOfMemoryError(words)), debug=False) == 2
    assert capsys.readouterr().err == (
        "error: The GPU has no memory left for another 2.00 GiB. Make the run smaller: "
        "--step_scheduler.local_batch_size 1, --distributed.activation_checkpointing full, a smaller "
        "--packed_sequence.packed_sequence_size, or 4 bits (`quantization`); `automodel plan` says what fits, "
        "`automodel doctor` who else holds memory. The last checkpoint is whole.\n"
    )
    with pytest.raises(RuntimeError, match="shapes"):
        run_safely(raising(RuntimeError("shapes differ")), debug=False)


def raising(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb  c"), 2, "error: a b c\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "x", "/full/file"), 2, "error: `/full/file`: no space is left on the device."),
        (PermissionError(errno.EACCES, "x", "/locked"), 2, "error: `/locked`: permission denied."),
        (OSError(errno.EROFS, "x", "/ro"), 2, "error: `/ro`: the file system is read-only."),
    ],
)
def test_run_safely(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]):
    assert run_safely(raising(error), debug=False) == status
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_run_safely_leaves_defects_alone():
    assert run_safely(lambda: None) == 0
    assert run_safely(lambda: 3) == 3
    for error in (ZeroDivisionError(), OSError(errno.EIO, "x"), SystemExit(4)):
        with pytest.raises(type(error)):
            run_safely(raising(error))
    with pytest.raises(UserError):
        run_safely(raising(UserError("x")), debug=True)
