"""Operations of a training step, against numbers worked out by hand from the shapes of real models."""

from __future__ import annotations

import pytest
import torch
import transformers

from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.training.flops import (
    ModelWork,
    StepSize,
    check_rate,
    count_work,
    peak_tflops,
    step_size,
)
from nemo_automodel.shared.errors import UserError

SEQ_LEN = 4096
ROW = StepSize(SEQ_LEN, SEQ_LEN, SEQ_LEN, SEQ_LEN**2)
LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "LlamaConfig 8B": LLAMA,
    "Qwen2Config 7B": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "Qwen3Config 8B": LLAMA
    | {"vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128},
    "LlamaConfig 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
# GFLOP a token at sequence 4096: LoRA r 16 on all projections, the same recomputed, all weights, the same recomputed
GFLOP = {
    "LlamaConfig 8B": (34.03, 49.06, 48.79, 63.82),
    "Qwen2Config 7B": (31.40, 45.27, 45.30, 59.17),
    "Qwen3Config 8B": (34.76, 49.86, 49.64, 64.74),
    "LlamaConfig 70B": (298.0, 440.3, 435.8, 578.1),
}
# published rates over published tokens a second
SIX_N = {"LlamaConfig 8B": 32.250, "Qwen2Config 7B": 30.005}


def make(shape: str, lora: bool = True, targets: str = "*_proj", **overrides: object) -> transformers.PreTrainedModel:
    config = getattr(transformers, shape.split()[0])(**SHAPES[shape], **overrides)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if lora:
            apply_lora(model, PeftConfig(target_modules=targets, dim=16, alpha=32))
    return model


def per_token(operations: float) -> float:
    return operations / SEQ_LEN / 1e9


@pytest.mark.parametrize("shape", SHAPES)
def test_hardware_operations_of_real_shapes(shape: str):
    adapted, whole = make(shape), make(shape, lora=False)
    found = [
        per_token(count_work(model, recomputed).hardware(ROW))
        for model in (adapted, whole)
        for recomputed in ("none", "all")
    ]
    assert found == pytest.approx(GFLOP[shape], rel=2e-4)


@pytest.mark.parametrize("shape", SIX_N)
def test_the_count_of_published_rates(shape: str):
    assert per_token(count_work(make(shape)).six_n_style(ROW)) == pytest.approx(SIX_N[shape], abs=6e-4)


def test_model_operations_leave_out_what_is_done_twice():
    work = count_work(make("LlamaConfig 8B"), "all")
    attention_forward = 2 * 32 * 4096 * SEQ_LEN / 1e9
    expected = 4 * (6.979321856 + 0.525336576) + 6 * 0.041943040 + 3 * attention_forward
    assert per_token(work.model(ROW)) == pytest.approx(expected, rel=1e-9)


def test_selective_recomputation_repeats_gate_and_up():
    model = make("LlamaConfig 8B")
    extra = count_work(model, "gate_up").hardware(ROW) - count_work(model).hardware(ROW)
    assert per_token(extra) == pytest.approx(2 * 32 * 2 * 4096 * 14336 / 1e9, rel=1e-9)


def test_sac1_repeats_queries_keys_and_values_as_well():
    model = make("LlamaConfig 8B")
    extra = count_work(model, "qkv_gate_up").hardware(ROW) - count_work(model, "gate_up").hardware(ROW)
    assert per_token(extra) == pytest.approx(2 * 32 * 4096 * (4096 + 2 * 1024) / 1e9, rel=1e-9)


def test_layers_below_the_lowest_adapter_only_run_forward():
    work = count_work(make("LlamaConfig 8B", targets="model.layers.(2[0-9]|3[01]).*_proj"))
    layer = 6.979321856e9 / 32
    assert work.forward_only == pytest.approx(20 * layer)
    assert work.frozen == pytest.approx(12 * layer)
    assert (work.attention, work.attention_forward_only) == (12 * 4096, 20 * 4096)


def test_experts_count_for_the_tokens_they_see():
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        work = count_work(transformers.AutoModelForCausalLM.from_config(config))
    assert work.trained == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 96 + router(work))
    assert work.head == 64 * 512


def router(work: ModelWork) -> float:
    """Return the router's weights where they are a linear layer, which differs between versions of Transformers."""
    without = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 96)
    assert work.trained - without in (0, 2 * 64 * 8)
    return (work.trained - without) / 2


def test_gpt2s_own_linear_layer_counts():
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    with torch.device("meta"):
        work = count_work(transformers.AutoModelForCausalLM.from_config(config))
    assert work.trained == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64)
    assert (work.head, work.head_is_trained, work.attention) == (32 * 300, True, 2 * 32)


@pytest.mark.parametrize("recomputed", ["none", "gate_up", "qkv_gate_up", "all_but_down"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_plan_of_a_run_counts_the_same(lora: bool, recomputed: str):
    from dataclasses import replace

    from nemo_automodel._transformers.options import ModelOptions
    from nemo_automodel._transformers.outline import Outline, shape_of
    from nemo_automodel.components.plan.machines import machine
    from nemo_automodel.components.plan.speed import estimate
    from nemo_automodel.components.plan.workload import Workload

    model = make("Qwen3Config 8B", lora)
    policy = {"none": "none", "gate_up": "sac2", "qkv_gate_up": "sac1", "all_but_down": "full_offload"}[recomputed]
    shape = shape_of(Outline(model, ModelOptions(), None), "x")
    load = Workload(shape, rows=1, seq_len=SEQ_LEN, grad_accum=1, is_full=not lora, recompute=policy)
    planned = estimate(load, replace(machine("h100"), bf16_tflops=1.0, attention_tflops=1.0))
    work = count_work(model, recomputed)
    adapters = 6 * work.adapters * SEQ_LEN  # the plan counts their bytes instead
    assert (planned.products + planned.attention) * 1e12 == pytest.approx(work.hardware(ROW) - adapters, rel=1e-9)


def test_labels_decide_the_heads_share():
    work = count_work(make("LlamaConfig 8B"))
    half = StepSize(SEQ_LEN, SEQ_LEN, SEQ_LEN // 2, SEQ_LEN**2)
    assert work.hardware(ROW) - work.hardware(half) == pytest.approx(4 * 0.525336576e9 * SEQ_LEN / 2)


def test_tokens_of_batches():
    padded = {
        "input_ids": torch.zeros(2, 8),
        "labels": torch.tensor([[1, 2, -100, -100, -100, -100, -100, -100], [1] * 8]),
        "attention_mask": torch.tensor([[1] * 3 + [0] * 5, [1] * 8]),
    }
    packed = {
        "input_ids": torch.zeros(2, 10),
        "labels": torch.full((2, 10), -100),
        "seq_lens": torch.tensor([[3, 4, 2], [10, -1000, -1000]]),
    }
    assert step_size([padded]) == StepSize(16, 11, 10, 128)
    assert step_size([packed]) == StepSize(20, 19, 0, 9 + 16 + 4 + 1 + 100)
    assert step_size([padded, packed]) == StepSize(36, 30, 10, 258)


@pytest.mark.parametrize(
    ("name", "half", "eighth"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA GH200 480GB", 989, 1979),
        ("NVIDIA GB200", 2500, 5000),
        ("NVIDIA GB10", 125, 250),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("A card from nowhere", None, None),
    ],
)
def test_peaks_by_name(name: str, half: float | None, eighth: float | None):
    assert (peak_tflops(name), peak_tflops(name, with_fp8=True)) == (half, eighth)


def test_a_rate_above_the_peak_is_refused():
    check_rate(988.9, 989, "an H100")
    check_rate(1e9, None, "a card nobody knows")
    with pytest.raises(UserError, match=r"990 TFLOP/s, above the 989 that an H100 can do: .*no rate is reported"):
        check_rate(990, 989, "an H100")
