"""Decision 7: several runs, one directory, nothing lost, and nothing refused after training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint.tiny_run import CONFIG, contents, fake_checkpoint

from nemo_automodel.components.checkpoint.identity import LEFT_OUT, differences, run_identity, run_name
from nemo_automodel.components.checkpoint.pointers import move_pointer
from nemo_automodel.components.checkpoint.run_directory import RunDirectory, choose_run_directory
from nemo_automodel.shared.errors import UserError


def changed(*pairs: tuple[str, Any], base: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """Return a configuration with dotted keys set."""
    config = copy.deepcopy(base)
    for key, value in pairs:
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


OTHER = changed(("optimizer.lr", 2e-2))


def lora(model: str) -> dict[str, Any]:
    return changed(("model.pretrained_model_name_or_path", model), ("peft.dim", 8))


def qlora(model: str) -> dict[str, Any]:
    return changed(("quantization.load_in_4bit", True), base=lora(model))


def default(root: Path, config: dict[str, Any]) -> RunDirectory:
    return choose_run_directory(root, True, config)


def named(root: Path, config: dict[str, Any]) -> RunDirectory:
    return choose_run_directory(root, False, config)


def saved(place: RunDirectory, root: Path, config: dict[str, Any], step: int, **progress: Any) -> Path:
    """Do what a run leaves behind: a log line, a checkpoint, pointers."""
    path = fake_checkpoint(place.path, step, config, **progress)
    (place.path / "training.jsonl").write_text('{"step": 0}\n')
    for directory in {place.path, root}:
        move_pointer(directory, "LATEST", path)
    return path


@pytest.mark.parametrize("choose", [default, named])
def test_a_fresh_directory(tmp_path, choose):
    root = tmp_path / "deep" / "checkpoints"
    place = choose(root, CONFIG)
    assert place == RunDirectory(root, None, f"A fresh run: checkpoints go to `{root}`.")
    assert root.is_dir()


@pytest.mark.parametrize("choose", [default, named])
def test_the_same_run_goes_on(tmp_path, choose):
    path = saved(choose(tmp_path, CONFIG), tmp_path, CONFIG, 49)
    place = choose(tmp_path, changed(("step_scheduler.ckpt_every_steps", 7), ("wandb.project", "x")))
    assert place == RunDirectory(tmp_path, path, f"Going on from `{path}`.")


@pytest.mark.parametrize("choose", [default, named])
def test_the_same_run_before_its_first_checkpoint_starts_again(tmp_path, choose):
    choose(tmp_path, CONFIG)
    (tmp_path / "training.jsonl").write_text('{"step": 0}\n')
    place = choose(tmp_path, CONFIG)
    assert (place.path, place.resume_from) == (tmp_path, None)


@pytest.mark.parametrize("choose", [default, named])
def test_a_finished_run_says_so(tmp_path, choose):
    path = saved(choose(tmp_path, CONFIG), tmp_path, CONFIG, 99)
    before = contents(tmp_path)
    place = choose(tmp_path, CONFIG)
    assert place.finished
    assert place.resume_from == path
    assert "100 done, `step_scheduler.max_steps` is 100" in place.message
    assert "--step_scheduler.max_steps 200" in place.message
    assert "--checkpoint.checkpoint_dir" in place.message
    assert "\n" not in place.message
    assert contents(tmp_path) == before

    longer = choose(tmp_path, changed(("step_scheduler.max_steps", 200)))
    assert (longer.finished, longer.resume_from) == (False, path)


@pytest.mark.parametrize(
    ("old", "new", "is_last_step", "finished"),
    [
        # bounded by epochs: only the note tells that step 41 was the last
        ({"num_epochs": 2}, {"num_epochs": 2}, True, True),
        ({"num_epochs": 2}, {"num_epochs": 2}, False, False),
        ({"num_epochs": 2}, {"num_epochs": 1}, True, True),
        ({"num_epochs": 2}, {"num_epochs": 3}, True, False),
        ({"num_epochs": 2}, {"num_epochs": 2, "max_steps": 1000}, True, True),
        ({"num_epochs": 2, "max_steps": 1000}, {"num_epochs": 2, "max_steps": 2000}, True, True),
        ({}, {}, True, True),
        ({}, {"num_epochs": 10}, True, True),
        ({}, {"num_epochs": 11}, True, False),
        # bounded by steps: the number in the name tells
        ({"max_steps": 42}, {"max_steps": 42}, False, True),
        ({"max_steps": 42}, {"max_steps": 30}, True, True),
        ({"max_steps": 42}, {"max_steps": 43}, True, False),
        ({"max_steps": 42}, {}, True, False),
        ({"max_steps": 42, "num_epochs": None}, {"num_epochs": None, "max_steps": 50}, True, False),
    ],
)
def test_when_a_run_is_finished(tmp_path, old, new, is_last_step, finished):
    schedule = {"global_batch_size": 4, "local_batch_size": 4}
    old = changed(("step_scheduler", schedule | old))
    new = changed(("step_scheduler", schedule | new))
    saved(default(tmp_path, old), tmp_path, old, 41, is_last_step=is_last_step)
    place = default(tmp_path, new)
    assert place.finished is finished
    if finished and "max_steps" not in new["step_scheduler"]:
        assert "--step_scheduler.num_epochs" in place.message


def test_another_run_in_the_default_directory_gets_its_own(tmp_path):
    first = saved(default(tmp_path, CONFIG), tmp_path, CONFIG, 99)
    before = contents(first)
    place = default(tmp_path, OTHER)
    assert place.path == tmp_path / run_name(run_identity(OTHER))
    assert place.path.is_dir()
    assert place.resume_from is None
    assert not place.finished
    assert f"checkpoints go to `{place.path}`" in place.message
    assert f"`{tmp_path}` holds another run, which stays as it is" in place.message
    assert "`optimizer.lr` (0.01 → 0.02)" in place.message
    assert "\n" not in place.message
    assert contents(first) == before

    # each goes on in its own directory, whatever the shared pointers say
    second = saved(place, tmp_path, OTHER, 19)
    assert os.readlink(tmp_path / "LATEST") == f"{place.path.name}/epoch_0_step_19"
    assert default(tmp_path, OTHER).resume_from == second
    again = default(tmp_path, changed(("step_scheduler.max_steps", 200)))
    assert (again.path, again.resume_from) == (tmp_path, first)


def test_another_run_in_a_named_directory_is_refused(tmp_path):
    root = tmp_path / "out"
    saved(named(root, CONFIG), root, CONFIG, 9)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        named(root, OTHER)
    message = str(caught.value)
    assert "\n" not in message
    assert f"`checkpoint.checkpoint_dir: {root}` holds another run" in message
    assert "`optimizer.lr` (0.01 → 0.02)" in message
    assert "--optimizer.lr 0.01" in message
    assert "--checkpoint.restore_from epoch_0_step_9" in message
    assert contents(tmp_path) == before

    # the ways out that the message names are ways out
    elsewhere = message.split("--checkpoint.checkpoint_dir ")[1].split(";")[0]
    assert named(Path(elsewhere), OTHER).path == Path(elsewhere)
    assert named(root, changed(("optimizer.lr", 0.01), base=OTHER)).resume_from == root / "epoch_0_step_9"
    place = named(root, changed(("checkpoint.restore_from", "epoch_0_step_9"), base=OTHER))
    assert (place.path, place.resume_from) == (root, root / "epoch_0_step_9")
    assert "`optimizer.lr` (0.01 → 0.02); the new ones count" in place.message


def test_many_differences_are_counted(tmp_path):
    saved(named(tmp_path, CONFIG), tmp_path, CONFIG, 9)
    other = changed(("dataset.split", "train"), *((f"model.key_{i}", i) for i in range(8)))
    with pytest.raises(UserError, match=r"`model.key_2` \(absent → 2\) and 6 more"):
        named(tmp_path, other)


def test_a_run_that_left_nothing_is_no_run(tmp_path):
    """A start that failed, on a mistyped model say, must not push the mended one into a sub-directory."""
    named(tmp_path, OTHER)
    place = named(tmp_path, CONFIG)
    assert place.path == tmp_path
    (tmp_path / "training.jsonl").touch()
    assert default(tmp_path, OTHER).path == tmp_path


def test_log_lines_alone_are_a_run(tmp_path):
    named(tmp_path, CONFIG)
    (tmp_path / "training.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="holds another run"):
        named(tmp_path, OTHER)
    assert default(tmp_path, OTHER).path.parent == tmp_path


@pytest.mark.parametrize("content", [None, "", "a: [", "- 1", "\x00"])
def test_checkpoints_of_an_unknown_run_are_left_alone(tmp_path, content):
    path = fake_checkpoint(tmp_path, 9)
    if content is not None:
        (path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="its configuration is unknown"):
        named(tmp_path, CONFIG)
    assert default(tmp_path, CONFIG).path.parent == tmp_path


def test_a_run_that_saves_nothing_does_not_write_into_one_that_does(tmp_path):
    saved(default(tmp_path, CONFIG), tmp_path, CONFIG, 9)
    unsaved = changed(("checkpoint.enabled", False))
    assert default(tmp_path, unsaved).path.parent == tmp_path
    with pytest.raises(UserError, match=r"`checkpoint\.enabled`"):
        named(tmp_path, unsaved)


def test_the_playbooks_three_commands(tmp_path):
    """One after the other in the default directory, each twice; `LATEST` always means the last one."""
    root = tmp_path / "checkpoints"
    configs = [lora("meta-llama/Llama-3.1-8B"), qlora("meta-llama/Meta-Llama-3-70B"), changed()]
    places = []
    for config in configs:
        place = default(root, config)
        assert (place.resume_from, place.finished) == (None, False)
        path = saved(place, root, config, 99)
        assert (root / "LATEST").resolve() == path
        assert {"config.yaml", "model", "optim", "step_scheduler.pt"} <= set(os.listdir(root / "LATEST"))
        places.append(place)
    assert places[0].path == root
    assert places[1].path.name.startswith("meta-llama-3-70b-qlora-")
    assert places[2].path.name.startswith("tiny-net-sft-")
    assert len({place.path for place in places}) == 3
    for config, place in zip(configs, places, strict=True):
        again = default(root, config)
        assert (again.finished, again.path) == (True, place.path)


def test_restore_from_a_pointer_continues_that_run(tmp_path):
    saved(default(tmp_path, CONFIG), tmp_path, CONFIG, 9)
    place = default(tmp_path, OTHER)
    second = saved(place, tmp_path, OTHER, 19)
    found = default(tmp_path, changed(("checkpoint.restore_from", "LATEST")))
    assert (found.path, found.resume_from.resolve()) == (place.path, second)
    assert "the new ones count" in found.message


@pytest.mark.parametrize("number", [12, 1.5])
def test_restore_from_may_look_like_a_number(tmp_path, number):
    fake_checkpoint(tmp_path, 1, CONFIG)
    with pytest.raises(UserError, match=f"`checkpoint.restore_from: {number}` is neither a pointer"):
        named(tmp_path, changed(("checkpoint.restore_from", number)))


def test_restore_from_elsewhere_starts_in_the_own_directory(tmp_path):
    source = saved(default(tmp_path / "a", OTHER), tmp_path / "a", OTHER, 9)
    place = named(tmp_path / "b", changed(("checkpoint.restore_from", str(source))))
    assert (place.path, place.resume_from) == (tmp_path / "b", source)


def test_going_back_is_refused_while_later_checkpoints_are_there(tmp_path):
    """Step 19 would be written again, hours later, and a checkpoint is never overwritten."""
    first = saved(named(tmp_path, CONFIG), tmp_path, CONFIG, 9)
    second = saved(named(tmp_path, CONFIG), tmp_path, CONFIG, 19)
    back = changed(("checkpoint.restore_from", "epoch_0_step_9"))
    with pytest.raises(UserError, match=r"goes on after `.*step_9`, but `.*step_19` is there") as caught:
        named(tmp_path, back)
    assert f"mv {second} {second}-old" in str(caught.value)
    assert "--checkpoint.restore_from epoch_0_step_19" in str(caught.value)
    second.rename(f"{second}-old")
    assert named(tmp_path, back).resume_from == first


@pytest.mark.parametrize("is_file", [True, False])
def test_a_name_that_will_be_written_is_taken(tmp_path, is_file):
    path = tmp_path / "epoch_0_step_99"
    path.touch() if is_file else path.mkdir()
    with pytest.raises(UserError, match=r"goes on from the start, but `.*epoch_0_step_99` is there"):
        named(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["LATEST", "LOWEST_VAL"])
def test_a_pointers_name_is_taken(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="needs this name for a link"):
        default(tmp_path, CONFIG)


HOLD = """
import sys, time, yaml
from nemo_automodel.components.checkpoint.run_directory import choose_run_directory
place = choose_run_directory(sys.argv[1], True, yaml.safe_load(sys.argv[2]))
assert "torch" not in sys.modules, "the run directory is chosen before torch is imported"
print(place.path, flush=True)
time.sleep(20)
"""


def test_two_processes_never_share_a_run(tmp_path):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path), yaml.safe_dump(CONFIG)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str(tmp_path)
        with pytest.raises(UserError, match="in use by another process"):
            default(tmp_path, CONFIG)
        with pytest.raises(UserError, match="in use by another process"):
            named(tmp_path, OTHER)
        assert default(tmp_path, OTHER).path.parent == tmp_path
        other.kill()
        other.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert default(tmp_path, CONFIG).path == tmp_path
                break
            except UserError:
                time.sleep(0.05)
        else:
            pytest.fail("the directory is still held after its process died")


# What a run is.


@pytest.mark.parametrize("key", [key for key in LEFT_OUT if "." in key])
def test_schedule_and_cadence_are_not_identity(key):
    assert run_identity(changed((key, 7))) == run_identity(CONFIG)


@pytest.mark.parametrize("section", [key for key in LEFT_OUT if "." not in key] + ["_anchors"])
def test_sections_that_are_not_identity(section):
    assert run_identity(changed((f"{section}.x", 7))) == run_identity(CONFIG)
    assert run_identity(changed((section, None))) == run_identity(CONFIG)


@pytest.mark.parametrize(
    "key",
    [
        *("model.torch_dtype", "optimizer.lr", "peft.dim", "seed", "dataset.split", "loss_fn._target_"),
        *("step_scheduler.global_batch_size", "step_scheduler.local_batch_size", "lr_scheduler.min_lr"),
        *("packed_sequence.packed_sequence_size", "clip_grad_norm.max_norm", "validation_dataset.split"),
    ],
)
def test_what_is_trained_is_identity(key):
    assert differences(run_identity(CONFIG), run_identity(changed((key, 7)))) == [
        (key, run_identity(CONFIG).get(key, "absent"), 7)
    ]


def test_identity_survives_yaml():
    config = changed(("optimizer.lr", 1e-8), ("model.scale", 1.0), ("a", [1, {"b": None}]), ("c", {}), ("d", []))
    config["optimizer"]["betas"] = (0.9, 0.999)
    written = yaml.safe_load(
        yaml.safe_dump(changed(base=config) | {"optimizer": {**config["optimizer"], "betas": [0.9, 0.999]}})
    )
    assert run_identity(written) == run_identity(config)
    assert run_identity(changed(("model.scale", 1), base=config)) == run_identity(config)
    assert run_identity(changed(("c", []), base=config)) != run_identity(config)


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (lora("meta-llama/Llama-3.1-8B"), "llama-3.1-8b-lora-"),
        (lora("/data/My Models/Qwen3_8B/"), "qwen3-8b-lora-"),
        (qlora("Qwen/Qwen3-8B"), "qwen3-8b-qlora-"),
        (changed(("peft.use_dora", True), base=lora("a/b")), "b-dora-"),
        (changed(("peft", None)), "tiny-net-sft-"),
        (
            changed(("model", {"_target_": "x.NeMoAutoModelForCausalLM.from_config", "config": "a/gpt2"})),
            "gpt2-pretrain-",
        ),
        (changed(("model", {"_target_": "x.build_gpt2_model"})), "x.build-gpt2-model-sft-"),
        (changed(("model", {"pretrained_model_name_or_path": "../.."})), "model-sft-"),
    ],
)
def test_run_names(config, start):
    name = run_name(run_identity(config))
    assert name.startswith(start)
    assert len(name) == len(start) + 8
    assert name == run_name(run_identity(copy.deepcopy(config)))
    assert name != run_name(run_identity(changed(("seed", 3), base=config)))
