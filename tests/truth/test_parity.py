"""The recipe against Transformers + PEFT driven by hand, in fp32 on the CPU.

The oracle shares no code with the project: it writes the text, finds the border by characters, runs one document at a
time without padding through the plain Hugging Face model, and steps a torch optimizer under the contract's formula for
the learning rate. Losses must agree within 1e-5 in every step, and every tensor within 1e-5 of its norm at the end.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.recipes import lora_section, recipe_config, set_up_recipe

NUM_STEPS = 50
GLOBAL_BATCH = 4
LR, MIN_LR, WARMUP = 1e-3, 1e-4, 5
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recorded_losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "training.jsonl").read_text().splitlines()]


def oracle_documents(model_dir: Path, squad_dir: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (ids, labels) of every training row, labels shifted, prompt positions -100."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    documents = []
    for line in (squad_dir / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = f"Context: {row['context']} Question: {row['question']} Answer: "
        coded = tokenizer(prompt + row["answers"]["text"][0].strip(), return_offsets_mapping=True)
        ids = [*coded["input_ids"], tokenizer.eos_token_id]
        learned = [end > len(prompt) for _, end in coded["offset_mapping"]] + [True]
        labels = [token if keep else -100 for token, keep in zip(ids, learned, strict=True)]
        documents.append((torch.tensor(ids[:-1]), torch.tensor(labels[1:])))
    return documents


def oracle_lr(step: int) -> float:
    """Learning rate applied in step ``step`` (0-based): linear warm-up from 0, cosine to the minimum."""
    if step <= WARMUP:
        return LR * step / WARMUP
    ratio = (step - WARMUP) / (NUM_STEPS - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * ratio)) * (LR - MIN_LR)


def oracle_train(model: torch.nn.Module, steps: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> list[float]:
    """Train ``model`` on the given documents of each step and return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    model.train()
    losses = []
    for step, documents in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = oracle_lr(step)
        num_labels = sum(int((labels != -100).sum()) for _, labels in documents)
        loss = torch.zeros(())
        for ids, labels in documents:
            logits = model(input_ids=ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / num_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def cycle(documents: list, rows_per_step: int) -> list[list]:
    """Return the rows of every step: in order, each epoch from the start."""
    epoch = [documents[i : i + rows_per_step] for i in range(0, len(documents), rows_per_step)]
    return [epoch[step % len(epoch)] for step in range(NUM_STEPS)]


def next_fit(documents: list, size: int) -> list[list]:
    """Fill rows of ``size`` tokens in order, never splitting a document."""
    packs: list[list] = [[]]
    for document in documents:
        if sum(len(ids) for ids, _ in packs[-1]) + len(document[0]) > size:
            packs.append([])
        packs[-1].append(document)
    return packs


def assert_same_losses(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == NUM_STEPS
    assert theirs[-1] < theirs[0] - 0.1, "the oracle did not learn: the comparison would prove nothing"
    worst = max(range(NUM_STEPS), key=lambda i: abs(ours[i] - theirs[i]))
    assert abs(ours[worst] - theirs[worst]) <= LOSS_TOLERANCE, f"step {worst}: {ours[worst]} against {theirs[worst]}"


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error <= WEIGHT_TOLERANCE, f"{name} differs by {error:.2e} of its norm"


def wrap_with_peft(model_dir: Path, recipe) -> torch.nn.Module:
    """Return the PEFT model of the same base that starts from the recipe's adapters."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    live = dict(recipe.model.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            ours = live[name.removeprefix("base_model.model.").replace(".default.", ".")]
            parameter.data.copy_(ours.detach())
    return model


def peft_adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def compare(tmp_path: Path, model_dir: Path, squad_dir: Path, *, lora: bool, pack_size: int = 0, **overrides) -> None:
    if lora:
        overrides["peft"] = lora_section()
    if pack_size:
        overrides["packed_sequence__packed_sequence_size"] = pack_size
    run_dir = tmp_path / "run"
    recipe = set_up_recipe(recipe_config(model_dir, squad_dir, run_dir, **overrides), tmp_path / "config.yaml")
    documents = oracle_documents(model_dir, squad_dir)
    if pack_size:
        packs = next_fit(documents, pack_size)
        assert max(len(pack) for pack in packs) > 1
        steps = [[document for pack in group for document in pack] for group in cycle(packs, GLOBAL_BATCH)]
    else:
        steps = cycle(documents, GLOBAL_BATCH)
    if lora:
        oracle = wrap_with_peft(model_dir, recipe)
    else:
        oracle = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    theirs = oracle_train(oracle, steps)
    recipe.run_train_validation_loop()
    assert_same_losses(recorded_losses(run_dir), theirs)
    if lora:
        expected = peft_adapters(oracle)
        assert_same_weights({n: p.detach() for n, p in recipe.model.named_parameters() if "lora_" in n}, expected)
    else:
        expected = {n: p.detach() for n, p in oracle.named_parameters()}
        assert_same_weights({n: p.detach() for n, p in recipe.model.named_parameters()}, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("lora", [False, True], ids=["sft", "lora"])
def test_fifty_steps_equal_transformers_and_peft(tmp_path, model_dirs, squad_dir, family, lora):
    compare(tmp_path, model_dirs(family), squad_dir, lora=lora)


@pytest.mark.parametrize("local_batch_size", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["sft", "lora"])
def test_every_split_of_the_global_batch_is_the_same_run(tmp_path, model_dirs, squad_dir, lora, local_batch_size):
    compare(tmp_path, model_dirs("llama"), squad_dir, lora=lora, step_scheduler__local_batch_size=local_batch_size)


@pytest.mark.parametrize("lora", [False, True], ids=["sft", "lora"])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_changes_nothing(tmp_path, model_dirs, squad_dir, lora, policy):
    compare(tmp_path, model_dirs("llama"), squad_dir, lora=lora, distributed__activation_checkpointing=policy)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("lora", [False, True], ids=["sft", "lora"])
def test_packed_rows_equal_lonely_documents(tmp_path, model_dirs, squad_dir, family, lora):
    compare(tmp_path, model_dirs(family), squad_dir, lora=lora, pack_size=160)


@pytest.mark.parametrize(
    "loss",
    [
        "chunked_ce.ChunkedCrossEntropy",
        "te_parallel_ce.TEParallelCrossEntropy",
        "linear_ce.FusedLinearCrossEntropy",
    ],
)
def test_every_loss_is_the_same_loss(tmp_path, model_dirs, squad_dir, loss):
    target = f"nemo_automodel.components.loss.{loss}"
    compare(tmp_path, model_dirs("llama"), squad_dir, lora=False, loss_fn={"_target_": target})
