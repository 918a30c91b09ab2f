"""What a run leaves on disk, opened by plain Transformers and PEFT, against the model that is still alive."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.recipes import lora_section, recipe_config, set_up_recipe

IDS = torch.tensor([[5, 17, 230, 41, 9, 77, 300, 12]])


def train(tmp_path: Path, model_dir: Path, squad_dir: Path, **overrides) -> torch.nn.Module:
    run_dir = tmp_path / "run"
    config = recipe_config(model_dir, squad_dir, run_dir, step_scheduler__max_steps=5, **overrides)
    recipe = set_up_recipe(config, tmp_path / "config.yaml")
    recipe.run_train_validation_loop()
    return recipe.model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_plain_transformers_loads_the_saved_directory(tmp_path, model_dirs, squad_dir, family):
    live = train(tmp_path, model_dirs(family), squad_dir)
    saved = tmp_path / "run" / "LATEST" / "model"
    assert all(entry.is_file() for entry in saved.iterdir())
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved)
    before = transformers.AutoModelForCausalLM.from_pretrained(model_dirs(family))
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, live(IDS).logits)
        assert not torch.allclose(plain(IDS).logits, before(IDS).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    original = transformers.AutoTokenizer.from_pretrained(model_dirs(family))
    assert tokenizer("Where was it built?") == original("Where was it built?")


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_plain_peft_loads_the_saved_adapter(tmp_path, model_dirs, squad_dir, extra):
    live = train(tmp_path, model_dirs("qwen3"), squad_dir, peft={**lora_section(), **extra})
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dirs("qwen3"))
    with torch.no_grad():
        untouched = base(IDS).logits
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "LATEST" / "model").eval()
        torch.testing.assert_close(plain(IDS).logits, live(IDS).logits, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(plain(IDS).logits, untouched)
