"""Small finished runs to export from, trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.recipes import lora_section, recipe_config, set_up_recipe
from support.tiny import CHAT_TEMPLATE, make_model_dir, make_tokenizer, write_squad

from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.utils import default_collater


def teach(directory: Path, squad: Path, num_steps: int = 80) -> None:
    """Train all weights of a tiny model on the held-out rows, so that it is sharp where it is measured."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = make_squad_dataset(tokenizer, dataset_name=str(squad), split="validation")
    batch = default_collater([rows[index] for index in range(len(rows))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(num_steps):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def train(config: dict, path: Path) -> Path:
    """Run a recipe and return its newest checkpoint."""
    recipe = set_up_recipe(config, path)
    recipe.run_train_validation_loop()
    return Path(config["checkpoint"]["checkpoint_dir"]) / "LATEST"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Return a function ``kind → checkpoint``.

    sft, dcp (the same in torch's distributed format), lora, tied (LoRA on a tied head as well), dora, qlora.
    """
    root, made = tmp_path_factory.mktemp("runs"), {}
    squad = write_squad(root / "squad")

    def get(kind: str) -> Path:
        if kind in made:
            return made[kind]
        tied = kind == "tied"
        base = root / f"base_{tied}"
        if not base.exists():
            make_model_dir(base, "llama", CHAT_TEMPLATE, tie_word_embeddings=tied)
            teach(base, squad)
        config = recipe_config(base, squad, root / kind, step_scheduler__max_steps=6, optimizer__lr=1e-2)
        config["lr_scheduler"] = {"lr_decay_style": "constant"}
        config["validation_dataset"] = {**config["dataset"], "split": "validation"}
        if kind == "dcp":
            config["checkpoint"]["model_save_format"] = "torch_save"
        elif kind != "sft":
            config["peft"] = lora_section()
        if tied:
            config["peft"]["target_modules"] = ["*_proj", "lm_head"]
        if kind == "dora":
            config["peft"]["use_dora"] = True
        if kind == "qlora":
            config["quantization"] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
        made[kind] = train(config, root / f"{kind}.yaml")
        return made[kind]

    return get
