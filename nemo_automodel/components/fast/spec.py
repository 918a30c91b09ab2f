"""Which Hugging Face decoder layers have a fast form, and their dimensions.

A layer qualifies by its exact class and by what its modules are, not by the family's name alone: a subclass, an
activation that is not SiLU, a bias where the family has none or a layer in another precision computes something else,
and then the layer stays as Hugging Face wrote it. Nothing here is guessed: the first thing that does not fit is the
reason that the log names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_LAYER_CLASSES = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
"""``model_type`` → class of the decoder layers that Transformers builds for it."""


class UnfitError(Exception):
    """A model or layer has no fast form; the message says why."""


@dataclass(frozen=True)
class DecoderSpec:
    """Dimensions of a decoder layer: pre-norm, grouped-query attention with rotary embedding, SwiGLU."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    attention_scale: float
    has_qkv_bias: bool
    has_qk_norm: bool


def check_family(model_type: str, layer: nn.Module) -> None:
    """Refuse layers that are not the ones Transformers builds for a family with a fast form.

    Raises:
        UnfitError: another family, or another class.
    """
    expected = _LAYER_CLASSES.get(model_type)
    if expected is None:
        known = ", ".join(_LAYER_CLASSES)
        raise UnfitError(f"`{model_type}` models have no fast decoder layer yet ({known} have one)")
    if type(layer).__name__ != expected or type(layer).__module__.split(".")[0] != "transformers":
        raise UnfitError(f"its layers are {type(layer).__name__}, not Transformers' {expected}")


def read_spec(layer: nn.Module) -> DecoderSpec:
    """Return the dimensions of a Hugging Face decoder layer of a known family.

    Raises:
        UnfitError: the layer computes something that the fast form does not.
    """
    attention: Any = layer.self_attn
    norm: Any = layer.input_layernorm
    config = attention.config
    if config.hidden_act not in ("silu", "swish"):
        raise UnfitError(f"its activation is `{config.hidden_act}`, not silu")
    if config.attention_dropout:
        raise UnfitError(f"`attention_dropout` is {config.attention_dropout}")
    for name in ("o_proj", "gate_proj", "up_proj", "down_proj"):
        owner = attention if name == "o_proj" else layer.mlp
        if getattr(owner, name).bias is not None:
            raise UnfitError(f"`{name}` has a bias")
    biases = [getattr(attention, name).bias for name in ("q_proj", "k_proj", "v_proj")]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        raise UnfitError("only some of q_proj, k_proj and v_proj have a bias")
    return DecoderSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate_size=config.intermediate_size,
        norm_eps=norm.variance_epsilon,
        attention_scale=attention.scaling,
        has_qkv_bias=biases[0] is not None,
        has_qk_norm=hasattr(attention, "q_norm"),
    )
