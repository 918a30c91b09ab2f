"""The parts of the measuring scripts that decide something: tokens, ladders, gates."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script."""
    import importlib

    monkeypatch.syspath_prepend(str(SCRIPTS))
    # the scripts put their own directories in front as well, for good
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_packed_rows_are_the_same_tokens_in_documents(script):
    measuring = script("measuring")
    (plain,), (packed,) = (
        measuring.random_batches(500, 2, 256, 1),
        measuring.packed_batches(500, 2, 256, 1, mean_len=40, std_len=15),
    )
    assert torch.equal(plain["input_ids"], packed["input_ids"])
    for row in range(2):
        lengths = packed["seq_lens"][row]
        lengths = lengths[lengths > 0]
        assert int(lengths.sum()) == 256, "no padding: both rates are of the same number of tokens"
        assert 4 <= len(lengths) <= 12
        ends = lengths.cumsum(0) - 1
        assert (packed["labels"][row] == -100).nonzero().flatten().tolist() == ends.tolist()
        assert (packed["position_ids"][row] == 0).sum() == len(lengths)
        assert packed["position_ids"][row][ends].tolist() == (lengths - 1).tolist()


def test_smaller_micro_batches_hold_the_same_rows(script):
    measuring = script("measuring")
    whole = measuring.random_batches(500, 4, 16, 3)
    split = measuring.split_rows(whole, 1)
    assert len(split) == 12
    assert torch.equal(torch.cat([b["labels"] for b in split]), torch.cat([b["labels"] for b in whole]))


def test_shapes_have_the_sizes_of_the_models(script):
    measuring = script("measuring")
    from nemo_automodel.components.training.flops import StepSize

    one = StepSize(4096, 4096, 4096, 4096**2)
    gflop = {"llama3_1_8b": 34.03, "qwen2_5_7b": 31.40, "qwen3_8b": 34.76}
    for shape, expected in gflop.items():
        found = measuring.lora_work(measuring.make_config(shape)).hardware(one) / 4096 / 1e9
        assert found == pytest.approx(expected, abs=0.005), shape
    smollm = measuring.lora_work(measuring.make_config("smollm2_135m"))
    assert smollm.frozen + smollm.head == pytest.approx(134.5e6, rel=0.001)


def test_readings_of_the_card_are_summed_up(script):
    clocks = script("measuring").Clocks(is_cuda=False)
    clocks._lines = "1980, 650.5, 60\n1500, 700.5, 64\n"
    summary = clocks.summary()
    assert summary["num_readings"] == 2
    assert summary["sm_mhz"] == {"mean": 1740, "min": 1500, "max": 1980}
    assert summary["watts"]["mean"] == 675.5


def test_what_is_wrong_with_a_comparison(script, capsys: pytest.CaptureFixture[str]):
    judge = script("compare").judge
    good = {"tokens_per_s": 100.0, "first_loss": 12.0}
    assert judge({"ours": good, "hf_peft": good, "unsloth": {"not_installed": ["unsloth"]}}) == []
    assert judge({"ours": good, "ours_packed": {**good, "tokens_per_s": 97.5}}) == []
    (slow,) = judge({"ours": good, "ours_packed": {**good, "tokens_per_s": 96.0}})
    assert slow == "packed rows reach 0.960 of the unpacked rate"
    (other,) = judge({"ours": good, "hf_peft": {**good, "first_loss": 12.1}})
    assert other.startswith("the first losses differ")
    assert judge({"ours": {"failed": "no memory"}}) == ["ours: no memory"]


def test_missing_packages_stand_in_the_table(script):
    compare = script("compare")
    result = {
        "tokens_per_s": 14500.4, "hardware_tflops": 493.2, "peak_gib": 45.83, "rows_of_a_micro_batch": 2,
        "recomputes_activations": False, "layers": "fast", "seconds": 36.2, "first_loss": 12.0,
        "clocks": {"sm_mhz": {"mean": 1410}, "watts": {"mean": 690}},
    }  # fmt: skip
    lines = compare.table({"cases": {"ours": result, "unsloth": {"not_installed": ["unsloth"]}}}).splitlines()
    assert lines[2] == "| this project, bf16 | fast | 14,500 | 45.8 | 493 | 2, none | 36.2 | 1,410 | 690 | 12.0000 |"
    assert lines[3] == "| unsloth | | not installed: unsloth | | | | | | | |"


def test_gates_of_loss_curves(script):
    parity = script("parity")
    assert parity.smoothed([float(i) for i in range(12)]) == [0.5 + i for i in range(11)]
    plain = {"losses": [2.0] * 12, "held_out_loss": 3.0}
    ours = {"losses": [2.0] * 6 + [2.006] * 6, "held_out_loss": 3.003}
    results = {"plain": plain, "fast": ours, "fp8": ours}
    train, held_out = parity.gates("fast", results)
    assert train["gap"] == pytest.approx(0.003)
    assert not train["holds"]
    assert held_out["gap"] == pytest.approx(0.001)
    assert held_out["holds"]
    assert all(gate["holds"] for gate in parity.gates("fp8", results)), "8 bits may differ by 1 %"
    assert parity.gates("plain", results) == []


def test_the_chart_of_loss_curves_is_well_formed(script):
    from xml.dom import minidom

    parity = script("parity")
    results = {name: {"losses": [3 - 0.01 * i for i in range(60)]} for name in ("plain", "fast")}
    drawn = minidom.parseString(parity.chart({**results, "fp8": {"failed": "no"}}))
    assert [text.firstChild.data for text in drawn.getElementsByTagName("text")][:2] == ["plain", "fast"]


def test_planned_runs_are_recipes(script):
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.settings import load_settings

    plan_runs = script("plan_runs")
    cases = [plan_runs.Case.read(text) for text in plan_runs.CASES.splitlines()]
    assert len(cases) == len(set(cases)) >= 40
    for case in cases:
        if case.optimizer == "adamw8bit":  # asks for its package at once
            pytest.importorskip("bitsandbytes")
        settings = load_settings(ConfigNode(plan_runs.recipe_of(case, "cuda", False, "defaults")))
        assert settings.step_scheduler.global_batch_size == case.rows * case.grad_accum
        assert settings.distributed.recompute_policy() == case.recompute
        assert (settings.peft is None) == (case.store == "sft")
        assert (settings.quantization is not None) == case.store.startswith("nf4")
        assert (settings.fp8 is not None) == case.store.startswith("fp8")


def test_a_planned_run_is_trained_and_a_failing_one_is_kept(script):
    plan_runs = script("plan_runs")
    case = plan_runs.Case.read("smollm2_135m:nf4:2x1024:full:adamw:2")
    recipe = plan_runs.recipe_of(case, "cpu", True, "defaults")
    found = plan_runs.measure(recipe)
    assert found["layers"] == "fast"
    assert found["tokens_per_s"] * found["step_s"] == pytest.approx(2 * 2 * 64)
    assert found["peak_gib"] is None, "a CPU has none"
    recipe["optimizer"]["lr"] = -1.0
    assert plan_runs.measure(recipe)["error"].startswith("`optimizer.lr`")
    plan = {"fits": True, "needed_gib": 1.0}
    runs = {
        "close": {"plan": plan, "measured": {"peak_gib": 1.0}, "memory_error": 0.02},
        "far": {"plan": plan, "measured": {"peak_gib": 1.0}, "memory_error": -0.04},
        "dead": {"plan": plan, "measured": {"out_of_memory": "no"}},
    }
    summary = plan_runs.summary(runs)
    assert summary["memory_error"] == {"runs": 2, "median": pytest.approx(0.03), "worst": 0.04}
    assert summary["false_fits"] == ["dead"]
    assert summary["failed"] == []


def test_digests_of_determinism_see_every_bit(script):
    determinism = script("determinism")
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.randn(4, 6).to(dtype)
        digest = determinism._digest(tensor)
        assert determinism._digest(tensor.t().contiguous().t()) == digest
        assert determinism._digest(tensor.flip(0)) != digest
        other = tensor.clone()
        other[2, 3] = (
            torch.nextafter(other[2, 3].float(), torch.tensor(9.0)) if dtype == torch.float32 else -other[2, 3]
        )
        assert determinism._digest(other) != digest
