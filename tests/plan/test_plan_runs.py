"""The planner against `benchmarks/plan_runs.py`: every recipe of the kept record is planned anew."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.plan.machines import GIB, MACHINES
from nemo_automodel.recipes.plan import plan_run

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plan_runs_h100.json"
PART = RECORD.with_name("plan_runs_part_h100.json")
H100 = MACHINES["h100"]


class Verdict(NamedTuple):
    memory: dict[str, float]
    """By what share the planned peak is above the measured one, of each run that ended."""
    rate: dict[str, float]
    false_fits: list[str]
    """Runs that are planned to fit, and were out of memory or above what the card has for tensors."""


def judge(runs: dict[str, Any]) -> Verdict:
    found = Verdict({}, {}, [])
    for name, run in runs.items():
        measured = run.get("measured", {})
        peak_gib, died = measured.get("peak_gib"), "out_of_memory" in measured
        if peak_gib is None and not died:
            continue  # not run, or failed for another reason
        plan = plan_run(ConfigNode(run["recipe"]), H100)
        if plan.fits and (died or peak_gib * GIB > H100.usable_bytes):
            found.false_fits.append(name)
        if peak_gib is not None:
            found.memory[name] = plan.memory.total / GIB / peak_gib - 1
            found.rate[name] = plan.speed.tokens_per_s / measured["tokens_per_s"] - 1
    return found


def recipe(rows: int) -> dict[str, Any]:
    config = {"_target_": "transformers.LlamaConfig", "num_hidden_layers": 2, "vocab_size": 512}
    return {
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config", "config": config,
            "torch_dtype": "bfloat16",
        },
        "step_scheduler": {"global_batch_size": rows, "local_batch_size": rows, "max_steps": 4},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
            "vocab_size": 512, "seq_len": 4096,
        },
        "dataloader": {"batch_size": None},
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }  # fmt: skip


def test_runs_are_judged_by_the_plan_of_today():
    plan = plan_run(ConfigNode(recipe(1)), H100)
    measured = {"peak_gib": plan.memory.total / GIB / 1.04, "tokens_per_s": plan.speed.tokens_per_s / 1.1}
    runs = {
        "good": {"recipe": recipe(1), "measured": measured, "plan": {"needed_gib": 1}},
        "above the card": {"recipe": recipe(1), "measured": {**measured, "peak_gib": 78.5}},
        "dead": {"recipe": recipe(1), "measured": {"out_of_memory": "CUDA out of memory."}},
        "dead and said so": {"recipe": recipe(4000), "measured": {"out_of_memory": "CUDA out of memory."}},
        "no package": {"recipe": {}, "measured": {"error": "needs a package"}},
        "not run": {"recipe": {}, "skipped": "planned above the card's memory"},
    }
    found = judge(runs)
    assert found.memory.keys() == {"good", "above the card"}
    assert found.memory["good"] == pytest.approx(0.04)
    assert found.rate["good"] == pytest.approx(0.1)
    assert found.false_fits == ["above the card", "dead"]


def test_the_kept_runs_of_fused_adapters():
    found = judge(json.loads(PART.read_text())["runs"])
    assert found.false_fits == []
    assert len(found.memory) == 4
    assert max(map(abs, found.memory.values())) <= 0.05, found.memory


@pytest.mark.skipif(not RECORD.exists(), reason="no such record was kept")
def test_the_kept_runs():
    found = judge(json.loads(RECORD.read_text())["runs"])
    assert found.false_fits == []
    assert len(found.memory) >= 25
    assert median(map(abs, found.memory.values())) <= 0.05, found.memory
