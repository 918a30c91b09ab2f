"""What families without fast layers need: their adapters are fused with linear layers, and the loss may need logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.autograd_bytes import bytes_kept

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import outline
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.fast.linear import FusedLinear
from nemo_automodel.components.plan import memory
from nemo_automodel.components.plan.workload import Workload

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "olmo2": transformers.Olmo2Config(**SIZES),
    "phi3": transformers.Phi3Config(**SIZES, pad_token_id=0),
}
LORA = PeftConfig(target_modules=["*_proj"], dim=16, alpha=32)


def outline_of(family: str, **options: object) -> outline.Outline:
    config = CONFIGS[family]
    return outline.from_config(config, peft_config=LORA, torch_dtype="float32", **{"fast_layers": "on", **options})


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_layers_keep_what_autograd_keeps(family):
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(
        CONFIGS[family], peft_config=LORA, torch_dtype="float32", fast_layers="on", device="cpu"
    ).train()
    fused = [module for module in model.modules() if isinstance(module, FusedLinear)]
    kept = bytes_kept(model, 2, 96)
    found = outline_of(family)
    assert found.why_plain is not None
    assert len(found.fused) == len(fused) > 0
    run = outline.run_plain(found, 2, 96, "none")
    # the ledger also sees what Python still holds, such as the last hidden state
    assert run.kept == pytest.approx(kept, rel=0.07)
    # A and B in the layers' dtype, ranks rounded up to 64
    copies = sum(4 * 64 * (layer.in_features + layer.out_features) for layer in fused)
    assert run.adapter_copies == copies
    load = Workload(outline.shape_of(found, family), 2, 96, 1, weight_bytes=4, plain=run)
    assert memory.peak(load).weights == 4 * (load.shape.num_linear + load.shape.num_other) + copies


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_keeps_less_and_moves_more(recompute):
    found = outline_of("olmo2")
    none, other, again = (outline.run_plain(found, 2, 96, policy) for policy in ("none", recompute, "none"))
    assert other.kept < 0.7 * none.kept
    assert other.written > none.written
    assert again == none


def test_adapters_of_packed_weights_stay_apart():
    found = outline_of("olmo2", quantization_config={"load_in_4bit": True}, fast_layers="auto")
    assert found.fused == ()
    assert outline.run_plain(found, 2, 96, "none").adapter_copies == 0


def test_a_head_that_is_more_than_a_matrix_needs_whole_logits():
    phi = transformers.PhiConfig(**SIZES)  # its output head has a bias
    gemma = transformers.Gemma2Config(**SIZES, head_dim=16)  # which caps its logits
    found = {name: outline.from_config(config, peft_config=LORA) for name, config in (("phi", phi), ("gemma", gemma))}
    copies = {name: outline.logits_copies(value) for name, value in found.items()}
    assert copies == {"phi": 2, "gemma": 4}
    assert outline.logits_copies(outline_of("olmo2")) == 0
    load = Workload(outline.shape_of(found["gemma"], "gemma"), 4, 512, 1)
    more = memory.peak(load.changed(logits_copies=4, recompute="full")).working
    # 2048 tokens x 256 logits x 2 bytes, four times, and chunks of fp32
    assert more == 4 * 2048 * 256 * 2 + 3 * 64 * 2**20 + 72 * 2**20
