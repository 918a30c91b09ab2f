"""A save and a load are invisible to training, and the directory looks as the contract says."""

from __future__ import annotations

import json
import logging
import os
from functools import partial

import pytest
import torch
import yaml
from checkpoint.tiny_run import CONFIG, Run, assert_same, contents
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_automodel.components.checkpoint.checkpointing import SaveError, estimate_num_bytes
from nemo_automodel.shared.errors import UserError


def _bitsandbytes(groups):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, min_8bit_size=1)


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "tensor_lr": lambda groups: torch.optim.Adam(
        [{**g, "lr": torch.tensor(1e-2)} for g in groups], lr=torch.tensor(1e-2)
    ),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "eight_bit": _bitsandbytes,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path, name, dtype):
    undisturbed = Run(tmp_path, OPTIMIZERS[name], dtype)
    undisturbed.train(8)  # in the middle of an epoch of six steps
    path = undisturbed.save()
    saved = undisturbed.state()
    expected = undisturbed.train(9)

    resumed = Run(tmp_path, OPTIMIZERS[name], dtype)
    resumed.train(3)  # whatever was there before is gone
    resumed.load(path)
    assert_same(saved, resumed.state())
    assert resumed.train(9) == expected
    assert_same(undisturbed.state(), resumed.state())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_of_a_real_loader_is_kept(tmp_path, num_workers):
    def batches(loader):
        return [batch.tolist() for batch in loader]

    loader = StatefulDataLoader(range(20), batch_size=2, num_workers=num_workers)
    iterator = iter(loader)
    seen = [next(iterator).tolist() for _ in range(4)]
    run = Run(tmp_path)
    run.train(4)
    run.loader = loader
    path = run.save()
    resumed = Run(tmp_path)
    resumed.loader = StatefulDataLoader(range(20), batch_size=2, num_workers=num_workers)
    resumed.load(path)
    assert seen + batches(resumed.loader) == [[i, i + 1] for i in range(0, 20, 2)]


def test_a_save_does_not_change_what_follows(tmp_path):
    undisturbed, saving = Run(tmp_path / "a"), Run(tmp_path / "b")
    expected = [*undisturbed.train(5), *undisturbed.train(5)]
    saving = Run(tmp_path / "b")
    found = saving.train(5)
    saving.save()
    assert [*found, *saving.train(5)] == expected


def test_a_parameter_without_a_gradient_stays_without_state(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    resumed = Run(tmp_path)
    resumed.load(run.save())
    assert resumed.model.unused.weight not in resumed.optimizer.state
    assert resumed.model.head.weight in resumed.optimizer.state


def test_names_survive_compile_and_another_order_of_groups(tmp_path):
    run = Run(tmp_path)
    run.train(4)
    path = run.save()
    resumed = Run(tmp_path, lambda groups: torch.optim.AdamW(groups[::-1], lr=1e-2))
    resumed.model.hidden = torch.compile(resumed.model.hidden)  # never called, so nothing is compiled
    parts = resumed.parts()
    parts.model_files.read = lambda directory: None
    resumed.checkpointer.load(path, parts)
    by_name = {name.replace("_orig_mod.", ""): p for name, p in resumed.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        assert_same(run.optimizer.state[parameter], resumed.optimizer.state[by_name[name]], name)
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.1, 0.01]


def test_the_layout_is_the_contracts(tmp_path, caplog):
    run = Run(tmp_path)
    run.train(100)
    with caplog.at_level(logging.INFO):
        path = run.save(0.5)
        Run(tmp_path).load(path)
    assert path == tmp_path / "epoch_0_step_99"
    assert {
        "config.yaml",
        "dataloader",
        "losses.json",
        "manifest.json",
        "model",
        "optim",
        "rng",
        "step_scheduler.pt",
    } <= set(os.listdir(tmp_path / "LATEST"))
    assert os.listdir(path / "dataloader") == ["dataloader_dp_rank_0.pt"]
    assert os.listdir(path / "rng") == ["rng_global_rank_0.pt"]
    assert sorted(os.listdir(path / "optim")) == [".metadata", "__0_0.distcp"]
    assert not (path / ".incomplete").exists()
    assert json.loads((path / "losses.json").read_text()) == {"train_loss": 1.0, "val_loss": 0.5}
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    assert torch.load(path / "step_scheduler.pt", weights_only=True) == {"step": 100, "epoch": 0}
    assert os.readlink(tmp_path / "LATEST") == "epoch_0_step_99"
    assert caplog.messages[:2] == [f"Saving checkpoint to {path}", f"Loading checkpoint from {path}"]
    assert caplog.messages[2].startswith(f"Checked 9 files of {path} against its manifest (")


def test_torch_itself_reads_the_optimizer(tmp_path):
    """The layout is torch's flattened one, so another program can read it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    run = Run(tmp_path)
    run.train(4)
    path = run.save()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    expected = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    found = {key: torch.empty_like(v) if isinstance(v, torch.Tensor) else None for key, v in expected.items()}
    sched = {"num_steps": None, "style": None}
    load({"optim": found, "sched": sched}, checkpoint_id=path / "optim", no_dist=True)
    assert_same(found, expected)
    assert sched == {"num_steps": 4, "style": "halving"}


def test_no_path_of_this_machine_is_written(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    for file in path.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_published_checkpoint_is_never_overwritten(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    before = (path / "losses.json").read_bytes()
    with pytest.raises(SaveError, match="never overwritten"):
        run.save(3.0)
    assert (path / "losses.json").read_bytes() == before


def test_a_loss_that_is_no_number_is_null(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    assert json.loads((run.save(float("nan")) / "losses.json").read_text())["val_loss"] is None
    assert not (tmp_path / "LOWEST_VAL").is_symlink()


def test_settings_the_user_changed_win_over_the_checkpoints(tmp_path):
    run = Run(tmp_path)
    run.train(4)
    path = run.save()
    changed = Run(tmp_path, lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.5, 0.9)))
    parts = changed.parts()
    parts.config_yaml = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "betas": [0.5, 0.9]}}
    changed.checkpointer.load(path, parts)
    assert changed.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert changed.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 1e-2


def test_groups_that_do_not_fit_are_refused(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    one_group = Run(tmp_path, lambda groups: torch.optim.AdamW([p for g in groups for p in g["params"]], lr=1e-2))
    with pytest.raises(UserError, match="different values of `lr`"):
        one_group.load(path)


def test_estimated_size_is_the_size(tmp_path):
    run = Run(tmp_path, width=1024)
    run.model.unused.requires_grad_(False)
    run.train(1)
    path = run.save()
    size = sum(file.stat().st_size for folder in ("model", "optim") for file in (path / folder).rglob("*"))
    assert size == pytest.approx(estimate_num_bytes(run.model, saves_whole_model=True), rel=0.05)
    frozen = sum(p.numel() * p.element_size() for p in run.model.parameters() if not p.requires_grad)
    assert estimate_num_bytes(run.model, True) - estimate_num_bytes(run.model, False) == frozen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("is_async", [False, True])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value, is_async):
    """They would be LATEST, and with few checkpoints kept push out the last good one."""
    run = Run(tmp_path, max_recent_checkpoints=1, is_async=is_async)
    run.train(2)
    good = run.save()
    run.checkpointer.finish()
    before = contents(tmp_path)
    run.train(1)
    with torch.no_grad():
        run.model.head.weight[0, 3] = value
    with pytest.raises(SaveError) as caught:
        run.save()
    assert str(caught.value).startswith(
        f"The checkpoint `{tmp_path / 'epoch_0_step_2'}` was not saved: `head.weight` is not finite (1 of 6 trained "
        "weights are sick)"
    )
    assert contents(tmp_path) == before
    resumed = Run(tmp_path)
    resumed.load(good)
    assert resumed.steps.step == 2


def test_a_frozen_weight_may_be_what_it_is(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    with torch.no_grad():
        run.model.frozen.weight[0, 0] = float("-inf")  # a mask that a model keeps as a weight, for example
    assert run.save().is_dir()
