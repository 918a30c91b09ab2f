"""Noise on embeddings: how much, when, and that a run with it resumes."""

from __future__ import annotations

import pytest
import torch
from support.packed import make_model
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel._transformers.neftune import add_embedding_noise
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError


def test_noise_is_uniform_and_in_training_alone():
    model = make_model("llama")
    embedding, ids = model.get_input_embeddings(), torch.randint(4, 90, (8, 50))
    clean = embedding(ids).detach()
    add_embedding_noise(model, 5.0)
    limit = 5 / (50 * clean.shape[-1]) ** 0.5
    torch.manual_seed(0)
    noise = (embedding.train()(ids) - clean).detach()
    assert noise.abs().max() <= limit * 1.0001
    assert noise.std() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=limit * 0.02)
    assert torch.equal(embedding.eval()(ids), clean)
    with torch.no_grad():
        assert torch.equal(embedding.train()(ids), clean)
    embedding(ids).sum().backward()
    assert embedding.weight.grad is not None


@pytest.mark.parametrize("peft", [None, lora_section()])
@pytest.mark.parametrize("fast", ["on", "off"])
def test_a_resumed_run_draws_the_same_noise(tmp_path, model_dirs, squad_dir, peft, fast):
    def run(name: str, steps: int, **more: object) -> list[str]:
        config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / name, peft=peft, **more)
        config["step_scheduler"]["max_steps"] = steps
        config["model"]["fast_layers"] = fast
        config["optimizer"]["eps"] = 1e-4
        set_up_recipe(config, tmp_path / f"{name}.yaml").run_train_validation_loop()
        return [line.split('"loss"')[1][:20] for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]

    noise = {"neftune": {"noise_alpha": 5}}
    whole = run("whole", 6, **noise)
    run("parts", 3, **noise)
    assert run("parts", 6, **noise) == whole
    assert run("clean", 6) != whole


@pytest.mark.parametrize("section", [None, {}, {"noise_alpha": 0}, {"noise_alpha": None}, {"noise_alpha": 5}])
def test_the_section(tmp_path, squad_dir, section):
    settings = load_settings(ConfigNode(recipe_config(tmp_path, squad_dir, tmp_path, neftune=section)))
    alphas = {"None": 0.0, "{}": settings.noise_alpha}
    assert settings.noise_alpha == alphas.get(str(section), (section or {}).get("noise_alpha") or 0.0)
    with pytest.raises(ConfigError) as refused:
        load_settings(ConfigNode(recipe_config(tmp_path, squad_dir, tmp_path, neftune={"noise_alpha": -1})))
    assert str(refused.value) == ("`neftune.noise_alpha` is -1, but it cannot be negative. Use 5, or 0 for no noise.")
