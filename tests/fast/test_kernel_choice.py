"""The measuring code on real layers on the CPU, and the table's way through a run. No time is asserted."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from support.fast_models import adapters_of, plain_model
from support.recipes import lora_section, recipe_config, set_up_recipe
from support.tiny import tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import kernel_choice
from nemo_automodel._transformers.fast_layers import kernel_table
from nemo_automodel._transformers.kernel_choice import KernelRequest, choose_kernels, describe_machine
from nemo_automodel._transformers.kernel_trial import LayerTrial, distance
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.fast.choices import Choices
from nemo_automodel.components.fast.config import parse_kernels
from nemo_automodel.components.fast.dispatch import Entry, Table
from nemo_automodel.components.fast.weight_store import DenseStore
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError, UserError

PEFT = PeftConfig(target_modules="*_proj", dim=2)


@pytest.fixture
def measures(monkeypatch):
    """Measure on the CPU as on a GPU."""
    monkeypatch.setattr(kernel_choice, "_obstacle", lambda model, layer: None)


def model_of(family: str, targets: str | list[str] = "*_proj"):
    model = plain_model(family, adapters_of(targets, dtype="float32"), torch.float32)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def choose(model, saved=None, **wishes) -> Table:
    request = KernelRequest(parse_kernels(wishes or None), saved, row_shape=(2, 24))
    return choose_kernels(model, model.model.layers[0], request)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_way_is_measured_and_agrees_with_the_plain_layer(family, measures, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path))
    model = model_of(family)
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.state_dict().items()}
    table = choose(model)
    assert torch.equal(torch.get_rng_state(), before), "measuring changed the run's random numbers"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    entries = {entry.operation: entry for entry in table.entries}
    assert entries.keys() == {"attention", "swiglu_products", "down_in_depth"}
    for name in ("swiglu_products", "down_in_depth"):
        assert entries[name].trials.keys() == {"on", "off"}
        assert all(t.failure is None and t.ms > 0 and t.error < 1e-9 for t in entries[name].trials.values())
    # of the three backends a CPU has one
    assert entries["attention"].implementation == "flash"
    assert entries["attention"].trials["flash"].error < 1e-9
    assert entries["attention"].trials["cudnn"].failure
    assert table.machine == describe_machine(torch.device("cpu"))
    assert {entry.reason for entry in choose(model).entries} == {"measured earlier"}


def test_a_fault_in_a_way_is_seen(measures, monkeypatch):
    """With one number of the update wrong, `swiglu_products: on` is refused and off is taken."""
    from nemo_automodel.components.fast import decoder_layer

    right = decoder_layer.swiglu_lora_backward

    def wrong(dh, gate_up, update, dh_update, b, parts, b_dropout=None):
        result = right(dh, gate_up, update, dh_update, b, parts)
        return result if result is None else result * 1.01

    monkeypatch.setattr(decoder_layer, "swiglu_lora_backward", wrong)
    model = model_of("llama", ["up_proj", "gate_proj", "down_proj"])
    trial = LayerTrial(model, model.model.layers[0], DenseStore, (2, 24))
    errors = {}
    for name in ("on", "off"):
        errors[name] = trial.question("swiglu_products", Choices(), "one").candidates[name].error()
    assert errors["off"] < 1e-9
    assert errors["on"] > 1e-6

    def broken(dh, gate_up, update, dh_update, b, parts, b_dropout=None):
        result = right(dh, gate_up, update, dh_update, b, parts)
        gate_up[0, 0] = torch.nan
        return result

    monkeypatch.setattr(decoder_layer, "swiglu_lora_backward", broken)
    assert math.isnan(trial.question("swiglu_products", Choices(), "one").candidates["off"].error())


def test_bf16_is_as_far_from_fp32_as_the_plain_layer():
    """And so within the tolerance, which what the plain layer loses would alone be near."""
    model = plain_model("qwen3", adapters_of(dtype="float32"), torch.float32).to(torch.bfloat16)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    trial = LayerTrial(model, model.model.layers[0], DenseStore, (1, 24))
    question = trial.question("swiglu_products", Choices(), "one")
    assert max(trial._plain_distances.values()) > 1e-5
    for candidate in question.candidates.values():
        assert candidate.error() <= question.tolerance == 1e-4


def test_choices_that_change_nothing_are_not_measured(measures, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path))
    entries = {e.operation: e for e in choose(model_of("llama", ["q_proj", "v_proj"])).entries}
    assert entries["swiglu_products"].reason == entries["down_in_depth"].reason == "changes nothing in this model"
    assert entries["attention"].reason == "measured now"


def test_what_is_asked_for_is_checked(measures):
    table = choose(model_of("llama"), swiglu_products="off", attention="flash")
    assert table.names()["swiglu_products"] == "off"
    assert {e.operation for e in table.entries if e.reason == "asked for"} == {"swiglu_products", "attention"}
    with pytest.raises(UserError, match=r"`model\.kernels\.attention: cudnn` cannot be: No"):
        choose(model_of("llama"), attention="cudnn")


def test_a_run_of_another_machine_is_chosen_anew(measures, caplog):
    model = model_of("llama")
    table = choose(model)
    other = replace(table, machine={**table.machine, "torch": "2.10"})
    flipped = [
        replace(e, implementation="on" if e.implementation == "off" else "off") if e.operation != "attention" else e
        for e in table.entries
    ]
    same_machine = replace(table, entries=tuple(flipped))
    assert choose(model, same_machine.to_json()).names() == same_machine.names() != table.names()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert choose(model, replace(other, entries=tuple(flipped)).to_json()).names() == table.names()
    assert caplog.messages[0] == (
        f"This run began on another machine (torch 2.10, now {torch.__version__}), so its kernels are chosen anew; "
        "numbers may differ in their last digits."
    )


def test_on_the_cpu_the_defaults_are_stated(caplog):
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        model = NeMoAutoModelForCausalLM.from_config(
            tiny_config("llama"), torch_dtype="float32", peft_config=PEFT, fast_layers="on"
        )
    assert (
        "Kernels: swiglu_products on, down_in_depth off, attention cudnn (default, the model is on the cpu)."
        in caplog.messages
    )
    record = kernel_table(model)
    assert [entry["implementation"] for entry in record["entries"]] == ["on", "off", "cudnn"]


def test_the_layers_take_what_was_chosen():
    model = NeMoAutoModelForCausalLM.from_config(
        tiny_config("llama"), torch_dtype="float32", peft_config=PEFT, fast_layers="on",
        kernels={"swiglu_products": False, "down_in_depth": True},
    )  # fmt: skip
    assert {layer.fast_core.choices for layer in model.model.layers} == {Choices(False, True, "cudnn")}


def test_a_wish_that_needs_a_gpu_is_refused():
    with pytest.raises(UserError) as refused:
        NeMoAutoModelForCausalLM.from_config(
            tiny_config("llama"), torch_dtype="float32", peft_config=PEFT, fast_layers="on",
            kernels={"attention": "flash"},
        )  # fmt: skip
    assert str(refused.value) == (
        "`model.kernels.attention: flash` cannot be: the model is on the cpu. Leave it out, or use a GPU."
    )


def test_plain_layers_have_no_table(caplog):
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        model = NeMoAutoModelForCausalLM.from_config(
            tiny_config("gemma3"), torch_dtype="float32", peft_config=PEFT, kernels={"attention": "flash"}
        )
    assert kernel_table(model) is None
    assert "`model.kernels` has no effect: it is about fast decoder layers." in caplog.messages


def test_distance():
    a = torch.tensor([3.0, 4.0])
    assert distance(a, a) == pytest.approx(0, abs=1e-12)
    assert distance(2 * a, a) == pytest.approx(1)
    assert distance(torch.tensor([-4.0, 3.0]), a) == pytest.approx(1)
    assert distance(torch.tensor([torch.nan, 3.0]), a) != distance(a, a)


# --- the run ---------------------------------------------------------------------------------------------------------


def run(tmp_path, model_dir, squad_dir, max_steps: int, **overrides):
    config = recipe_config(
        model_dir, squad_dir, tmp_path / "run", peft=lora_section(), model__fast_layers="on",
        step_scheduler__max_steps=max_steps, **overrides,
    )  # fmt: skip
    recipe = set_up_recipe(config, tmp_path / "config.yaml")
    recipe.run_train_validation_loop()
    return recipe


def test_the_table_is_saved_with_the_run_and_a_resumed_run_takes_it(
    tmp_path, model_dirs, squad_dir, measures, monkeypatch, caplog
):
    """The second time another way would be faster, and the run goes on as it began."""
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path / "cache"))
    fastest = {"name": "off"}

    def choose_by_name(question, trials):
        return fastest["name"] if "on" in trials else "flash"

    monkeypatch.setattr("nemo_automodel.components.fast.dispatch._fastest", choose_by_name)
    packed = {"packed_sequence__packed_sequence_size": 160}
    recipe = run(tmp_path, model_dirs("llama"), squad_dir, 2, **packed)
    assert recipe.model.model.layers[0].fast_core.choices == Choices(False, False, "flash")
    path = tmp_path / "run" / "kernels.json"
    written = path.read_bytes()
    assert all(entry["subject"].endswith("rows 2x160") for entry in json.loads(written)["entries"])
    fastest["name"] = "on"
    (tmp_path / "cache").rename(tmp_path / "no cache")
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        resumed = run(tmp_path, model_dirs("llama"), squad_dir, 4, **packed)
    assert resumed.model.model.layers[1].fast_core.choices == Choices(False, False, "flash")
    assert path.read_bytes() == written
    assert any("as the run began" in message for message in caplog.messages)


def test_a_damaged_record_stops_a_resumed_run(tmp_path, model_dirs, squad_dir):
    run(tmp_path, model_dirs("llama"), squad_dir, 1)
    path = tmp_path / "run" / "kernels.json"
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(UserError) as refused:
            run(tmp_path, model_dirs("llama"), squad_dir, 2)
        assert str(refused.value) == (
            f"`{path}` is damaged, so nobody knows how this run was computed. Remove it, and kernels are measured "
            "anew; numbers may then differ in their last digits."
        )
    path.unlink()
    run(tmp_path, model_dirs("llama"), squad_dir, 2)
    assert path.is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__kernels": {"attention": "flesh"}},
            "`model.kernels.attention: flesh` is not known. Did you mean `flash`? Use cudnn, flash, efficient.",
        ),
        ({"model__kernel": "defaults"}, "`model.kernel`: did you mean `kernels`? Correct or remove it."),
        (
            {"model__kernel_record": {}},
            "`model.kernel_record`: in a file this is `kernels.json of the run directory`. Move it there.",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path, squad_dir, overrides, message):
    config = recipe_config(tmp_path / "nowhere", squad_dir, tmp_path / "run", peft=lora_section(), **overrides)
    with pytest.raises(ConfigError) as refused:
        load_settings(ConfigNode(config))
    assert str(refused.value) == message


def test_the_key_in_a_file_reaches_the_layers(tmp_path, model_dirs, squad_dir):
    recipe = run(tmp_path, model_dirs("llama"), squad_dir, 1, model__kernels={"swiglu_products": False})
    assert recipe.model.model.layers[0].fast_core.choices == Choices(swiglu_products=False)
    entries = json.loads((tmp_path / "run" / "kernels.json").read_text())["entries"]
    assert Entry(**entries[0]).reason == "asked for"
