"""The switch: what it sets, what it refuses, and what is chosen under it. That a GPU then repeats itself is measured by
`benchmarks/determinism.py`."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os

import pytest
import torch
from kernels.oracle import in_wider_buffer
from support.fast_models import adapters_of, plain_model
from support.recipes import lora_section, recipe_config, set_up_recipe
from torch.nn.attention import SDPBackend

from nemo_automodel._transformers import kernel_choice, layer_graphs
from nemo_automodel._transformers.kernel_choice import KernelRequest, choose_kernels
from nemo_automodel._transformers.layer_graphs import record_layers
from nemo_automodel._transformers.packing_masks import BatchFiller
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.config.run_safely import run_safely
from nemo_automodel.components.fast.attention import causal_attention_by
from nemo_automodel.components.fast.config import parse_kernels
from nemo_automodel.components.training.determinism import switch_determinism
from nemo_automodel.kernels.weight_grad import add_product_grad
from nemo_automodel.recipes.memory_advice import MemoryAdvice, Misfit
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.determinism import is_deterministic
from nemo_automodel.shared.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave the process as it was."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    switch_determinism(False)


@pytest.fixture
def on():
    switch_determinism(True)


@pytest.fixture
def config_of(model_dirs, squad_dir, tmp_path):
    def make(**overrides) -> dict:
        return recipe_config(model_dirs(), squad_dir, tmp_path / "run", **overrides)

    return make


def settings_of(config: dict):
    from nemo_automodel.components.config.loader import ConfigNode

    return load_settings(ConfigNode(copy.deepcopy(config)))


# --- the switch ------------------------------------------------------------------------------------------------------


def test_on_and_off_again(caplog):
    caplog.set_level(logging.INFO)
    switch_determinism(True)
    assert is_deterministic()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ, "without a GPU there is no cuBLAS"
    assert caplog.messages == [
        "Deterministic: on (PyTorch's strict mode); on the CPU it changes nothing but refuses what has no order."
    ]
    switch_determinism(False)
    assert not is_deterministic()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def test_what_others_set_stays():
    torch.use_deterministic_algorithms(True)
    try:
        switch_determinism(False)
        assert is_deterministic()
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert not is_deterministic(), "a warning leaves the kernels as they are"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("given", [None, ":4096:8", ":16:8"])
def test_on_a_gpu_cublas_is_configured(given, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: given is not None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    switch_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (given or ":4096:8")
    assert caplog.messages == [
        f"Deterministic: on (CUBLAS_WORKSPACE_CONFIG={given or ':4096:8'}, PyTorch's strict mode): attention never by "
        "cuDNN, kernels of fast layers by a rule and not measured, layers recorded only by `model.cuda_graphs: on`."
    ]


@pytest.mark.parametrize(
    ("given", "has_started", "message"),
    [
        (
            ":4096:2",
            False,
            "CUBLAS_WORKSPACE_CONFIG is :4096:2, but `deterministic: true` needs :4096:8 or :16:8. Unset it, and "
            ":4096:8 is taken.",
        ),
        (
            None,
            True,
            "`deterministic: true`, but this process has used CUDA already, and cuBLAS reads CUBLAS_WORKSPACE_CONFIG "
            "when CUDA starts. Start Python with CUBLAS_WORKSPACE_CONFIG=:4096:8.",
        ),
    ],
)
def test_another_configuration_and_a_late_one_are_refused(given, has_started, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_started)
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    with pytest.raises(UserError) as refused:
        switch_determinism(True)
    assert str(refused.value) == message
    assert not is_deterministic()


@pytest.mark.parametrize("operation", ["cumsum_cuda_kernel", "_histc_cuda with floating point input"])
def test_an_operation_without_an_order_is_one_line(operation, capsys):
    words = (
        f"{operation} does not have a deterministic implementation, but you set 'torch.use_deterministic_"
        "algorithms(True)'. You can turn off determinism just for this operation"
    )

    def fails() -> None:
        raise RuntimeError(words)

    assert run_safely(fails, debug=False) == 2
    assert capsys.readouterr().err == (
        f"error: `{operation}` has no form that adds in a fixed order, and `deterministic: true` wants one. Set "
        "`deterministic: false`, or do without what uses it.\n"
    )
    with pytest.raises(RuntimeError, match="does not have"):
        run_safely(fails, debug=True)


def test_torch_words_it_as_the_line_is_found(on):
    """The operation is one of the few that have no such form on a CPU."""
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"put_\S* does not have a deterministic implementation"):
        x.put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(None, False), (False, False), (True, True)])
def test_the_key(config_of, value, expected):
    settings = settings_of(config_of(deterministic=value))
    assert settings.deterministic is expected
    assert settings.config.to_dict().get("deterministic") == (True if expected else None), "false is no other run"
    assert not settings_of(config_of()).deterministic


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"compile__mode": "max-autotune"},
            "`compile.mode: max-autotune` measures kernels at every start, and `deterministic: true` wants the same "
            "ones. Use `compile.mode: default`.",
        ),
        (
            {"model__kernels": {"attention": "cudnn"}},
            "`model.kernels.attention: cudnn` adds in no fixed order, and `deterministic: true` wants one. Use flash, "
            "or leave it out.",
        ),
        ({"deterministic": "maybe"}, "`deterministic` is `maybe`, but it must be true or false or null."),
    ],
)
def test_what_it_does_not_go_with(config_of, overrides, message):
    with pytest.raises(ConfigError) as refused:
        settings_of(config_of(**{"deterministic": True, **overrides}))
    assert str(refused.value).startswith(message)


def test_the_older_key_says_where_it_went(config_of):
    settings = settings_of(config_of(rng={"deterministic": True}))
    assert settings.notices == ["`rng.deterministic` has no effect. Use the top-level `deterministic`."]
    assert not settings.deterministic


def test_a_step_that_does_not_fit_ends_the_run(config_of):
    advice = MemoryAdvice(settings_of(config_of(deterministic=True)))
    found = advice.last_words(Misfit(2, 64, "none", "1 GiB", ""), rescues=False)
    assert "under `deterministic: true` no step is done again in parts, which add up otherwise." in found
    assert found.endswith("Set --step_scheduler.local_batch_size 1")


# --- choices ---------------------------------------------------------------------------------------------------------


def model_of():
    model = plain_model("llama", adapters_of("*_proj", dtype="float32"), torch.float32)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def test_kernels_are_chosen_by_a_rule(on, monkeypatch):
    """Neither measured now, nor earlier, nor as the run began without the switch."""
    monkeypatch.setattr(kernel_choice, "_obstacle", lambda model, layer: None)
    monkeypatch.setattr(kernel_choice, "measure", lambda run, device: pytest.fail("something was measured"))
    model = model_of()
    first = choose_kernels(model, model.model.layers[0], KernelRequest(row_shape=(2, 24)))
    assert first.names() == {"attention": "flash", "swiglu_products": "on", "down_in_depth": "off"}
    assert {entry.reason for entry in first.entries} == {"fixed, `deterministic: true`"}
    saved = json.loads(json.dumps(first.to_json()).replace('"flash"', '"cudnn"'))
    again = choose_kernels(model, model.model.layers[0], KernelRequest(saved=saved, row_shape=(2, 24)))
    assert again.names() == first.names()


def test_what_is_asked_for_is_taken_if_it_has_an_order(on, monkeypatch):
    monkeypatch.setattr(kernel_choice, "_obstacle", lambda model, layer: None)
    model = model_of()

    def names(**wishes: object) -> dict[str, str]:
        request = KernelRequest(parse_kernels(wishes), row_shape=(2, 24))
        return choose_kernels(model, model.model.layers[0], request).names()

    assert names(swiglu_products=False) == {"attention": "flash", "swiglu_products": "off", "down_in_depth": "off"}
    with pytest.raises(UserError, match=r"`kernels: {attention: cudnn}` adds in no fixed order"):
        names(attention="cudnn")


def test_attention_is_never_left_to_cudnn(on):
    assert causal_attention_by("flash").key == (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    switch_determinism(False)
    assert SDPBackend.CUDNN_ATTENTION in causal_attention_by("flash").key


@pytest.mark.parametrize(("wish", "records"), [("auto", False), ("on", True)])
def test_layers_are_recorded_only_if_that_is_asked_for(on, wish, records, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(layer_graphs, "CudaRecorder", lambda: None)
    from support.fast_models import fast_model

    layers = fast_model("llama", PeftConfig(target_modules="*_proj", dim=2)).model.layers
    caplog.clear()
    record_layers(layers, wish, torch.device("cuda"))
    assert [layer.graphs is not None for layer in layers] == [records] * len(layers)
    assert caplog.messages == [] if records else ["Decoder layers: not recorded as CUDA graphs, `deterministic: true`."]


def test_a_batch_does_not_depend_on_those_before(on):
    filler = BatchFiller()
    batch = {"input_ids": torch.zeros(3, 8, dtype=torch.int64)}
    short = {"input_ids": batch["input_ids"][:1]}
    assert filler.fill(batch) is batch
    assert filler.fill(short) is short


def test_the_first_product_is_added_as_all_others_are(on, monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(n, 5)) for n in (3, 2)]
    calls: list[str] = []
    monkeypatch.setattr(torch, "mm", lambda *_, **__: calls.append("mm"))
    x, dy = (in_wider_buffer(torch.randn(7, n), 2) for n in (5, 5))
    add_product_grad(weights, dy, x)
    assert calls == []
    torch.testing.assert_close(torch.cat([weight.grad for weight in weights]), dy.t() @ x)


# --- runs ------------------------------------------------------------------------------------------------------------


def run_once(config: dict, path, stop: int | None = None):
    """Train; return the losses and gradient norms of the records, and a digest of what was trained."""
    recipe = set_up_recipe(copy.deepcopy(config), path / "config.yaml")
    recipe.run_train_validation_loop()
    assert is_deterministic() == bool(config.get("deterministic"))
    digest = hashlib.sha256()
    for parameter in recipe.model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    records = [json.loads(line) for line in (path / "run" / "training.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records], digest.hexdigest()


def test_two_runs_are_the_same_to_the_last_bit(model_dirs, squad_dir, tmp_path):
    found = []
    for name in ("one", "other"):
        config = recipe_config(
            model_dirs(),
            squad_dir,
            tmp_path / name / "run",
            deterministic=True,
            step_scheduler__max_steps=3,
            peft={**lora_section(), "dropout": 0.1},
            packed_sequence={"packed_sequence_size": 64},
        )
        found.append(run_once(config, tmp_path / name))
    assert len(found[0][0]) == 3
    assert found[0] == found[1]
    saved = next((tmp_path / "one" / "run").glob("epoch_*")) / "config.yaml"
    assert "deterministic: true" in saved.read_text()


def test_a_run_that_goes_on_without_it_says_what_is_exact(config_of, tmp_path, caplog):
    config = config_of(deterministic=True, step_scheduler__max_steps=1)
    run_once(config, tmp_path)
    config["step_scheduler"]["max_steps"] = 2
    config["deterministic"] = False
    config["checkpoint"]["restore_from"] = "LATEST"
    run_once(config, tmp_path)
    assert (
        "`deterministic` (True → absent): weights, optimizer and the place in the data are exact. Other kernels "
        "compute from here on, so losses differ in their last digits from those of a run without the change."
    ) in caplog.text
