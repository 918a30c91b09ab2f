"""Which layers a model gets, the reason that the log gives, and that whatever does not fit trains as before."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from support.other_models import model_with_adapters
from support.tiny import tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import fast_layers, frozen_head
from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel._transformers.packing_masks import Machine
from nemo_automodel.components._peft.lora import LinearLoRA, PeftConfig
from nemo_automodel.components.fast.linear import FusedLinear
from nemo_automodel.components.quantization.config import CompileConfig
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.memory_policies import RECOMPUTE_POLICIES

PEFT = PeftConfig(target_modules="*_proj", dim=2)
GPU = Machine("cuda", (9, 0), has_varlen=True, has_triton=True, has_compiler=True)


def build(caplog, config=None, **keywords):
    """Return the model and the line about its layers."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        model = NeMoAutoModelForCausalLM.from_config(
            config or tiny_config("llama"), **{"torch_dtype": "float32", "peft_config": PEFT, **keywords}
        )
    (line,) = [m for m in caplog.messages if m.startswith("Decoder layers: ")]
    return model, line.removeprefix("Decoder layers: ")


def adapters_line(caplog) -> str:
    (line,) = [m for m in caplog.messages if m.startswith("Adapters: ")]
    return line.removeprefix("Adapters: ")


def is_fast(model) -> list[bool]:
    return [type(layer).__name__.startswith("Fast") for layer in model.model.layers]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("wish", "peft"), [("on", PEFT), (True, PEFT), ("on", None)])
def test_on_gives_every_layer_its_fast_form(caplog, family, wish, peft):
    model, line = build(caplog, tiny_config(family), fast_layers=wish, peft_config=peft)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    assert line == f"fast (2 of 2, {name}DecoderLayer; recomputed: none)."
    assert is_fast(model) == [True, True]
    assert type(model.model.norm).__name__ == f"Fast{name}RMSNorm"


@pytest.mark.parametrize("policy", RECOMPUTE_POLICIES[1:])
def test_fast_layers_recompute_by_themselves(caplog, policy):
    model, line = build(caplog, fast_layers="on", activation_checkpointing=policy)
    assert line == f"fast (2 of 2, LlamaDecoderLayer; recomputed: {policy})."
    assert [layer.fast_core.recompute for layer in model.model.layers] == [policy] * 2
    assert not model.is_gradient_checkpointing


def test_tiles_of_the_mlp_are_named(caplog):
    _, line = build(caplog, fast_layers="on", activation_checkpointing="full_offload", mlp_tile_tokens=4096)
    assert line == "fast (2 of 2, LlamaDecoderLayer; recomputed: full_offload; MLP in tiles of 4096 tokens)."


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"activation_checkpointing": "sac1"},
            "`distributed.activation_checkpointing: sac1` needs the fast decoder layers, and the model is on the cpu. "
            "Use false, selective or full.",
        ),
        (
            {"mlp_tile_tokens": 4096},
            "`distributed.mlp_tile_tokens: 4096` needs the fast decoder layers, and the model is on the cpu. "
            "Leave it out.",
        ),
    ],
    ids=["policy", "tiles"],
)
def test_what_only_fast_layers_keep_is_refused_elsewhere(caplog, keywords, message):
    with pytest.raises(UserError) as refused:
        build(caplog, **keywords)
    assert str(refused.value) == message


def test_memory_that_is_shared_has_nowhere_to_go(monkeypatch):
    shared = types.SimpleNamespace(name="NVIDIA GB10", is_integrated=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: shared)
    model = types.SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(UserError) as refused:
        fast_layers._memory(model, fast_layers.FastRequest("on", PEFT, "full_offload"))
    assert str(refused.value) == (
        "`distributed.activation_checkpointing: full_offload` moves activations to the host's memory, which this GPU "
        "shares: it would save nothing. Use full."
    )


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_on_adapters_is_named(caplog, position):
    peft = PeftConfig(target_modules="*_proj", dim=2, dropout=0.1, dropout_position=position)
    model, line = build(caplog, fast_layers="on", peft_config=peft)
    assert line == f"fast (2 of 2, LlamaDecoderLayer; recomputed: none; dropout 0.1 {position})."
    assert is_fast(model) == [True, True]


def test_dora_is_named_and_fused_in_decoder_layers_only(caplog):
    peft = PeftConfig(target_modules="*_proj", dim=2, use_dora=True)
    assert build(caplog, fast_layers="on", peft_config=peft)[1] == (
        "fast (2 of 2, LlamaDecoderLayer; recomputed: none; DoRA)."
    )
    with pytest.raises(UserError) as refused:
        build(caplog, tiny_config("gemma3"), fast_layers="on", peft_config=peft)
    assert str(refused.value) == (
        "`model.fast_layers: on` cannot be: DoRA is fused in fast decoder layers only. Set it to auto, which then "
        "takes Transformers' layers."
    )


UNFIT = [
    ({"fast_layers": "auto"}, {}, "the model is on the cpu"),
    ({"fast_layers": "off"}, {}, "`fast_layers: off`"),
    ({"force_hf": True}, {}, "`force_hf: true`"),
    ({"peft_config": None}, {}, "the model is on the cpu"),
    ({"autocast_dtype": "bfloat16"}, {}, "`distributed.autocast_dtype: bfloat16`"),
    ({"compile_layers": True}, {}, "the layers are compiled instead"),
    ({"compile_config": CompileConfig(enabled=True)}, {}, "the layers are compiled instead"),
    ({"attn_implementation": "eager"}, {}, "`attn_implementation: eager` was asked for"),
    (
        {"peft_config": PeftConfig(target_modules="*_proj", dim=2, use_dora=True, dropout=0.1)},
        {},
        "DoRA with dropout is not on the fast path yet",
    ),
    ({}, {"hidden_act": "gelu"}, "its activation is `gelu`, not silu"),
    ({}, {"attention_dropout": 0.2}, "`attention_dropout` is 0.2"),
    ({}, {"attention_bias": True}, "`o_proj` has a bias"),
    ({}, {"mlp_bias": True}, "`gate_proj` has a bias"),
]


@pytest.mark.parametrize(("keywords", "overrides", "reason"), UNFIT, ids=[case[2][:30] for case in UNFIT])
def test_what_does_not_fit_stays_as_it_is_and_says_why(caplog, keywords, overrides, reason):
    model, line = build(caplog, tiny_config("llama", **overrides), **keywords)
    assert line == f"plain Transformers: {reason}."
    assert is_fast(model) == [False, False]
    ids = torch.tensor([[5, 6, 7, 8]])
    if not any(key.startswith("compile") for key in keywords):
        model(input_ids=ids, labels=ids).loss.backward()
        assert any(p.grad is not None for p in model.parameters())


def test_other_families_are_named(caplog):
    model, line = build(caplog, tiny_config("gemma3"))
    known = "llama, mistral, qwen2, qwen3 have one"
    assert line == f"plain Transformers: `gemma3_text` models have no fast decoder layer yet ({known})."
    assert is_fast(model) == [False, False]


def test_other_families_recompute_the_usual_way(caplog):
    model, _ = build(caplog, tiny_config("gemma3"), activation_checkpointing="full")
    assert model.is_gradient_checkpointing


def test_on_fuses_the_adapters_where_the_decoder_layers_do_not_fit(caplog):
    model, line = build(caplog, tiny_config("llama", mlp_bias=True), fast_layers="on")
    assert line == "plain Transformers: `gate_proj` has a bias."
    assert adapters_line(caplog) == "fused on 14 of 14 linear layers."
    assert is_fast(model) == [False, False]
    assert isinstance(model.model.layers[1].mlp.up_proj, FusedLinear)


def test_adapters_are_fused_under_any_attention(caplog):
    _, line = build(caplog, fast_layers="on", attn_implementation="eager")
    assert line == "plain Transformers: `attn_implementation: eager` was asked for."
    assert adapters_line(caplog) == "fused on 14 of 14 linear layers."


@pytest.mark.parametrize("attention", [None, "eager"])
def test_auto_fuses_adapters_on_a_gpu_in_bfloat16(caplog, monkeypatch, attention):
    monkeypatch.setattr(fast_layers.Machine, "of", lambda device: Machine("cuda", (9, 0)))
    build(caplog, tiny_config("gemma3"), torch_dtype="bfloat16", attn_implementation=attention)
    assert adapters_line(caplog) == "fused on 14 of 14 linear layers."
    peft = PeftConfig(target_modules="*_proj", dim=2, dropout=0.1)
    build(caplog, tiny_config("gemma3"), torch_dtype="bfloat16", attn_implementation=attention, peft_config=peft)
    assert adapters_line(caplog) == "fused on 14 of 14 linear layers; dropout 0.1 post."
    build(caplog, tiny_config("gemma3"), torch_dtype="float32", attn_implementation=attention)
    assert adapters_line(caplog) == "plain: the weights are float32, not bfloat16."


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        (
            {"peft_config": PeftConfig(target_modules="*_proj", dim=2, use_dora=True, dropout=0.1)},
            "DoRA with dropout is not on the fast path yet",
        ),
        ({"compile_layers": True}, "the layers are compiled instead"),
        ({"autocast_dtype": "bfloat16"}, "`distributed.autocast_dtype: bfloat16`"),
    ],
)
def test_asking_for_what_cannot_be_in_any_form_is_an_error(caplog, keywords, reason):
    with pytest.raises(UserError) as refused:
        build(caplog, fast_layers="on", **keywords)
    assert str(refused.value) == (
        f"`model.fast_layers: on` cannot be: {reason}. Set it to auto, which then takes Transformers' layers."
    )


def test_linear_classes_of_a_model_are_asked_what_they_compute(caplog):
    """Falcon's class is a product and a bias; one that does more keeps its plain adapter, named."""
    model = model_with_adapters("falcon")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        assert fuse_adapters(model) == 8
    assert adapters_line(caplog) == "fused on 8 of 8 linear layers."
    odd = model_with_adapters("falcon")
    layer = odd.transformer.h[1].mlp.dense_4h_to_h
    own = type(layer).__mro__[2]
    layer.__class__ = type(
        "X", (LinearLoRA, type("Doubled", (own,), {"forward": lambda m, x: own.forward(m, x) * 2})), {}
    )
    odd.transformer.h[0].mlp.dense_4h_to_h.weight.requires_grad_(True)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        assert fuse_adapters(odd) == 6
    assert adapters_line(caplog) == (
        "fused on 6 of 8 linear layers; plain: 2, the first is `transformer.h.0.mlp.dense_4h_to_h`, which is trained "
        "besides its adapter."
    )
    assert type(layer).__name__ == "X"


def test_values_are_checked(caplog):
    with pytest.raises(ConfigError) as unknown:
        build(caplog, fast_layers="atuo")
    assert str(unknown.value) == "`model.fast_layers: atuo` is not known. Did you mean `auto`? Use auto, on, off."
    with pytest.raises(ConfigError) as both:
        build(caplog, fast_layers="on", force_hf=True)
    assert str(both.value) == (
        "`model.fast_layers: on` and `model.force_hf: true` exclude each other. Leave one of them out."
    )


@pytest.mark.parametrize("peft", [PEFT, None])
@pytest.mark.parametrize(
    ("machine", "dtype", "line"),
    [
        (GPU, "bfloat16", "fast (2 of 2, LlamaDecoderLayer; recomputed: none)."),
        (GPU, "float32", "plain Transformers: the weights are float32, not bfloat16."),
        (Machine("cuda", (7, 5)), "bfloat16", "plain Transformers: this GPU has no bfloat16 arithmetic."),
        (Machine("cuda", (9, 0)), "bfloat16", "plain Transformers: the package triton is not installed."),
        (
            Machine("cuda", (9, 0), has_triton=True),
            "bfloat16",
            "plain Transformers: Triton needs a C compiler, and neither cc, gcc nor clang is installed.",
        ),
    ],
)
def test_auto_looks_at_the_machine(caplog, monkeypatch, machine, dtype, line, peft):
    monkeypatch.setattr(fast_layers.Machine, "of", lambda device: machine)
    assert build(caplog, torch_dtype=dtype, peft_config=peft)[1] == line


def test_a_base_that_learns_is_seen(caplog):
    model, _ = build(caplog, fast_layers="off")
    norm = model.model.layers[1].input_layernorm
    norm.weight.requires_grad_(True)
    reason = "`input_layernorm.weight` is trained beside adapters; the fast layers train one or the other"
    assert choose(caplog, model) == f"plain Transformers: {reason}."
    norm.weight.requires_grad_(False)
    model, _ = build(caplog, fast_layers="off")
    model.model.layers[1].input_layernorm.to(torch.bfloat16)
    assert choose(caplog, model) == (
        "plain Transformers: its weights are of several dtypes (torch.bfloat16, torch.float32)."
    )
    assert is_fast(model) == [False, False]


def test_another_class_of_layer_is_seen(caplog):
    model, _ = build(caplog, fast_layers="off")
    base = type(model.model.layers[0])
    model.model.layers[0].__class__ = type("MyDecoderLayer", (base,), {})
    assert choose(caplog, model) == (
        "plain Transformers: its layers are MyDecoderLayer, not Transformers' LlamaDecoderLayer."
    )


def choose(caplog, model) -> str:
    """Return the line about the layers of a model that is there already."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        assert not fast_layers.use_fast_layers(model, fast_layers.FastRequest("on", PEFT))
    assert adapters_line(caplog) == "fused on 14 of 14 linear layers."
    return caplog.messages[0].removeprefix("Decoder layers: ")


def test_several_processes_keep_gradients_in_autograd(caplog, monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    _, line = build(caplog, peft_config=None)
    assert line == "plain Transformers: all weights are trained by several processes."
    assert build(caplog, fast_layers="on")[1].startswith("fast (2 of 2")
    model, _ = build(caplog, peft_config=None)
    assert frozen_head.obstacle(model, model.lm_head) == "the head is trained by several processes"
