"""Fused adapters in whole steps: packed rows, everything recomputed, the loss with the frozen head, and the recipe."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from support.other_models import OTHERS, adapters_of, model_with_adapters
from support.packed import make_documents, pack
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel._transformers.assemble import recompute_activations
from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens
from nemo_automodel.shared.errors import UserError

TOLERANCE = 1e-5
LENGTHS = [[13, 11, 5], [31], [3, 21]]
LOGITS_LOSS = {
    "gemma2": "on logits, the model caps its logits",
    "granite": "on logits, GraniteForCausalLM changes its logits after the head",
    "phi": "on logits, the head has a bias, an adapter or packed weights",
}
"""What the log says where the head and the loss cannot be one step."""


def gradients(model, batches, joins_frozen_head=True) -> dict[str, torch.Tensor]:
    engine = EagerEngine(model, MaskedCrossEntropy(), torch.device("cpu"), joins_frozen_head=joins_frozen_head)
    loss = engine.forward_backward(batches, count_label_tokens(batches))
    return {"loss": loss, **{name: p.grad for name, p in adapters_of(model).items()}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for name, value in expected.items() if name != "loss")
    for name, value in expected.items():
        error = (found[name] - value).norm() / max(float(value.norm()), 1e-2 * scale)
        assert error <= TOLERANCE, f"{name} differs by {error:.1e} of its norm"


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", OTHERS)
def test_packed_rows_and_the_loss_of_every_family(family, recompute, caplog):
    batches = [pack(make_documents(LENGTHS), 32), pack(make_documents([[8, 8]], seed=3), 16)]
    model, plain = model_with_adapters(family), model_with_adapters(family)
    fuse_adapters(model, recompute)
    if recompute == "full":
        recompute_activations(model, recompute)
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        found = gradients(model, batches)
    assert_same(found, gradients(plain, batches, joins_frozen_head=False))
    way = LOGITS_LOSS.get(family, "in one step with the frozen output head")
    assert f"Loss: {way}." in caplog.messages


def run(tmp_path, model_dir, squad_dir, **choice):
    directory = tmp_path / "-".join(choice)
    config = recipe_config(
        model_dir, squad_dir, directory / "run", peft=lora_section(), step_scheduler__max_steps=20,
        packed_sequence__packed_sequence_size=160, **choice,
    )  # fmt: skip
    recipe = set_up_recipe(config, directory / "config.yaml")
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (directory / "run" / "training.jsonl").read_text().splitlines()]
    return recipe, [row["loss"] for row in rows], directory / "run/LATEST/model/adapter_model.safetensors"


def test_the_recipe_trains_another_family_as_with_force_hf(tmp_path, model_dirs, squad_dir, caplog):
    from safetensors.torch import load_file

    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        _, losses, adapters = run(tmp_path, model_dirs("gemma3"), squad_dir, model__fast_layers="on")
    assert "Adapters: fused on 14 of 14 linear layers." in caplog.messages
    _, plain_losses, plain_adapters = run(tmp_path, model_dirs("gemma3"), squad_dir, model__force_hf=True)
    assert plain_losses[-1] < plain_losses[0] - 0.05, "nothing was learned"
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) <= 1e-5
    saved, expected = load_file(adapters), load_file(plain_adapters)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert (saved[name] - value).norm() <= 1e-4 * value.norm(), name


def test_a_fused_model_saves_and_loads_as_before(tmp_path):
    import transformers

    model, plain = model_with_adapters("glm4"), model_with_adapters("glm4")
    fuse_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    files = [tmp_path / name / "model.safetensors" for name in ("fused", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "fused")) is type(plain.config)


def test_a_model_without_linear_layers_is_refused_as_before():
    import transformers

    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="matches no linear layer"):
        apply_lora(model, PeftConfig(target_modules=["c_attn"]))
