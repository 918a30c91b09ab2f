"""Which decoder layers a model computes with: the fast form of `components/fast`, or Transformers' own; and why.

The choice is made once, for all layers of a model, and one line of the log names it with its reason. ``auto`` takes the
fast form where it was made for: adapters over a frozen base, or all weights, in bf16 on a GPU with Triton. ``on`` asks
for it wherever it computes the same, the CPU and fp32 included, and what does not fit is an error instead of a quiet
change of plan.

Adapters of a model whose decoder layers stay Transformers' own are fused with their linear layers (`fast_linears`): one
more line of the log says on how many, or why not.

A fast layer asks `attention_for` in every call what to compute. It may answer "nothing known": then the layer runs
Transformers' modules, which hold the same weights.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel._transformers.fp8_base import Fp8Packer, Fp8Plan
from nemo_automodel._transformers.fp8_linears import train_linears_in_fp8
from nemo_automodel._transformers.kernel_choice import KernelRequest, choose_kernels
from nemo_automodel._transformers.layer_attention import attention_for
from nemo_automodel._transformers.layer_graphs import record_layers
from nemo_automodel._transformers.packing_masks import Machine
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components._peft.lora import LinearLoRA, lora_layers
from nemo_automodel.components.fast.attention import causal_attention_by
from nemo_automodel.components.fast.choices import Choices
from nemo_automodel.components.fast.decoder_layer import DecoderCore, speed_up
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.embedding import speed_up_embedding
from nemo_automodel.components.fast.final_norm import speed_up_norm
from nemo_automodel.components.fast.names import GROUPS, Adapter
from nemo_automodel.components.fast.nf4_store import Nf4Fp8Store, Nf4Store
from nemo_automodel.components.fast.policies import POLICIES, Memory, Tiles
from nemo_automodel.components.fast.spec import UnfitError, check_family, read_spec
from nemo_automodel.components.fast.trained_layer import TrainedCore, TrainedStore
from nemo_automodel.components.fast.watch import Watch
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.components.training.memory_watch import device_shares_memory
from nemo_automodel.kernels.weight_grad import may_write_grads
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.memory_policies import PLAIN_POLICIES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastRequest:
    """What is asked of a model besides its weights, as far as the choice depends on it."""

    wish: str = "auto"
    """``auto``, ``on`` or ``off``."""
    peft: PeftConfig | None = None
    recompute: str = "none"
    """A name of `shared.memory_policies`."""
    mlp_tile_tokens: int | None = None
    """Tokens that the MLP works on at a time; None: all, or tiles where everything is recomputed and rows are long."""
    force_hf: bool = False
    computes_in_fp8: bool = False
    """4-bit weights are multiplied in 8 bits, which only the fast layers can."""
    is_compiled: bool = False
    fake_quantizes: bool = False
    """Linear layers round their weights, for quantisation-aware training."""
    autocast_dtype: str | None = None
    asks_attention: bool = False
    """The attention implementation was named by the user, not chosen for him."""
    kernels: KernelRequest = field(default_factory=KernelRequest)
    """How the fast layers are to be computed."""
    cuda_graphs: str = "auto"
    """``auto``, ``on`` or ``off``: whether they are recorded."""
    fp8: Fp8Plan | None = None
    """Products in 8 bits; of a frozen base only the fast layers know them: they are then asked for."""


def use_fast_layers(model: PreTrainedModel, request: FastRequest) -> bool:
    """Exchange the decoder layers and the last norm for their fast forms where they apply, and tell whether they do.

    Where they do not, adapters are fused with their linear layers if that is possible. The model must be on its device
    and have its adapters.

    Raises:
        UserError: ``on`` was asked for and neither applies, or 8-bit weights, which need the fast layers.
    """
    layers = _layers(model)
    reason = _obstacle(model, layers, request)
    if reason is not None:
        check_plain(request, reason)
        logger.info("Decoder layers: plain Transformers: %s.", reason)
        obstacle = reason if request.peft is None else _obstacle_to_adapters(model, request)
        is_any_fused = obstacle is None and fuse_adapters(model, request.recompute, dropout_of(request.peft)) > 0
        if obstacle not in (None, reason):
            logger.info("Adapters: plain: %s.", obstacle)
        check_fused(request, is_any_fused, obstacle or reason)
        if request.kernels.wishes.asked:
            logger.info("`model.kernels` has no effect: it is about fast decoder layers.")
        if request.fp8 is not None:
            train_linears_in_fp8(model, request.fp8)
        return False
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")
    name, total = type(layers[0]).__name__, len(layers)
    adapters, (store, weights), dropout = _adapters(model), _choose_store(layers[0], request), dropout_of(request.peft)
    table = choose_kernels(model, max(layers, key=lambda layer: len(lora_layers(layer))), request.kernels, store)
    choices = Choices.from_names(table.names())
    attention = partial(attention_for, causal=causal_attention_by(choices.attention))
    core, memory = TrainedCore if request.peft is None else DecoderCore, _memory(model, request)
    packer = None if request.fp8 is None else Fp8Packer(model, layers, request.fp8)
    for layer in layers:
        with nullcontext() if packer is None else packer.packing(layer):
            make = store if packer is None else packer.store
            speed_up(layer, adapters, memory, make, choices, attention, dropout, core)
    if packer is not None:
        packer.finish()
    Watch(model, [store for layer in layers for store in layer.fast_core.stores])  # type: ignore[union-attr]
    record_layers(layers, request.cuda_graphs, model.device)
    speed_up_norm(model.base_model.norm)  # type: ignore[arg-type]
    if request.peft is None:
        speed_up_embedding(model.get_input_embeddings())
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]
    model.kernel_table = table.to_json()  # type: ignore[assignment]
    what = f"{total} of {total}, {name}{weights}; recomputed: {request.recompute}{_tiles_in_words(request)}"
    variant = "; DoRA" if request.peft is not None and request.peft.use_dora else ""
    variant = variant if dropout is None else f"; {dropout}"
    logger.info("Decoder layers: fast (%s%s).", what, variant)
    return True


def why_plain(model: PreTrainedModel, request: FastRequest) -> str | None:
    """Return why Transformers' layers would compute on a machine that has all the fast ones need; None if they do."""
    return _obstacle(model, _layers(model), replace(request, wish="off" if request.wish == "off" else "on"))


def would_fuse_adapters(model: PreTrainedModel, request: FastRequest) -> bool:
    """Tell whether adapters of a model without fast layers would be fused on a machine that has all they need."""
    asked = replace(request, wish="off" if request.wish == "off" else "on")
    return request.peft is not None and _obstacle_to_adapters(model, asked) is None


def dropout_of(peft: PeftConfig | None) -> AdapterDropout | None:
    """Return the dropout of adapters as fused layers apply it."""
    return None if peft is None or not peft.dropout else AdapterDropout(peft.dropout, peft.dropout_position)


def _layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def kernel_table(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return how the fast layers of a model are computed, as plain values for a file; None if it has none."""
    return vars(model).get("kernel_table")


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save as the class does, with copies of the weights that are parts of packed matrices: files want them whole."""
    if not args and kwargs.get("state_dict") is None:
        state = model.state_dict()
        kwargs["state_dict"] = {n: t if t.is_contiguous() else t.cpu().contiguous() for n, t in state.items()}
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _adapters(model: PreTrainedModel) -> dict[nn.Module, Adapter]:
    return {
        layer: Adapter(
            layer.lora_A, layer.lora_B, layer.scaling, None if layer.lora_magnitude_vector is None else layer
        )
        for layer in lora_layers(model).values()
    }


def _memory(model: PreTrainedModel, request: FastRequest) -> Memory:
    """Return what the layers keep for the backward pass.

    Raises:
        UserError: the host's memory is asked for, and it is the GPU's.
    """
    offloads, device = POLICIES[request.recompute].offloads, model.device
    if offloads and device.type == "cuda" and device_shares_memory(device):
        raise UserError(
            f"`distributed.activation_checkpointing: {request.recompute}` moves activations to the host's memory, "
            "which this GPU shares: it would save nothing. Use full."
        )
    return Memory(request.recompute, Tiles(request.mlp_tile_tokens))


def _tiles_in_words(request: FastRequest) -> str:
    return "" if request.mlp_tile_tokens is None else f"; MLP in tiles of {request.mlp_tile_tokens} tokens"


def check_plain(request: FastRequest, reason: str) -> None:
    """Refuse what Transformers' layers cannot do; ``reason`` says why the fast ones do not apply.

    Raises:
        UserError: something is asked for that only the fast layers know, or that excludes products in 8 bits.
    """
    if request.computes_in_fp8:
        raise UserError(
            f"`quantization.compute_in_fp8: true` needs the fast decoder layers, and {reason}. Leave "
            "`compute_in_fp8` out: weights stay in 4 bits and are multiplied in the compute dtype."
        )
    if request.fp8 is not None and request.peft is not None:
        raise UserError(f"`fp8.enabled: true` needs the fast layers, but {reason}. Set it to false.")
    if request.fp8 is not None and (request.autocast_dtype is not None or request.is_compiled):
        other = "compiled layers" if request.is_compiled else "`distributed.autocast_dtype`"
        raise UserError(f"`fp8.enabled: true` and {other} exclude each other. Leave one of them out.")
    if request.cuda_graphs == "on":
        raise UserError(f"`model.cuda_graphs: on` records the fast decoder layers, and {reason}. Set it to auto.")
    check_plain_memory(request.recompute, request.mlp_tile_tokens, reason)


def check_fused(request: FastRequest, is_any_fused: bool, reason: str) -> None:
    """Refuse a model of which nothing is in its fast form, where that was asked for; ``reason`` says why.

    Raises:
        UserError: ``on`` was asked for.
    """
    if request.wish == "on" and not is_any_fused:
        raise UserError(
            f"`model.fast_layers: on` cannot be: {reason}. Set it to auto, which then takes Transformers' layers."
        )


def check_plain_memory(recompute: str, mlp_tile_tokens: int | None, reason: str) -> None:
    """Refuse what Transformers' layers cannot do; ``reason`` says why the fast ones do not apply.

    Raises:
        UserError: a policy or tiles of the fast layers are asked for.
    """
    if recompute not in PLAIN_POLICIES:
        raise UserError(
            f"`distributed.activation_checkpointing: {recompute}` needs the fast decoder layers, and {reason}. "
            "Use false, selective or full."
        )
    if mlp_tile_tokens is not None:
        raise UserError(
            f"`distributed.mlp_tile_tokens: {mlp_tile_tokens}` needs the fast decoder layers, and {reason}. "
            "Leave it out."
        )


def _obstacle(model: PreTrainedModel, layers: list[GradientCheckpointingLayer], request: FastRequest) -> str | None:
    """Return why Transformers' layers compute, None when the fast ones can."""
    asked = _obstacle_in_request(model, request)
    if asked is not None:
        return asked
    try:
        if not layers:
            raise UnfitError(f"{type(model).__name__} has no decoder layers that Transformers can recompute")
        for layer in layers:
            check_family(model.config.model_type, layer)
            read_spec(layer)
            _check_weights(layer, has_adapters=request.peft is not None)
            _check_packed(layer, request.computes_in_fp8)
    except UnfitError as error:
        return str(error)
    is_emulated = request.fp8 is not None and request.fp8.scheme.emulate
    is_asked = request.wish == "on" and request.fp8 is None
    return None if is_emulated or is_asked else _obstacle_on_machine(model)


def _obstacle_to_adapters(model: PreTrainedModel, request: FastRequest) -> str | None:
    """Return why adapters stay as they are where the decoder layers do, None when they can be fused.

    The attention implementation does not matter: it is between the linear layers.
    """
    asked = _obstacle_in_request(model, replace(request, asks_attention=False))
    if asked is None and request.peft is not None and request.peft.use_dora:
        return "DoRA is fused in fast decoder layers only"
    if asked is not None or request.wish == "on":
        return asked
    machine = Machine.of(model.device)
    if machine.device_type != "cuda":
        return f"the model is on the {machine.device_type}"
    return None if model.dtype == torch.bfloat16 else f"the weights are {dtype_name(model.dtype)}, not bfloat16"


def _obstacle_in_request(model: PreTrainedModel, request: FastRequest) -> str | None:
    attention = model.config._attn_implementation
    peft = request.peft
    reasons = {
        "`force_hf: true`": request.force_hf,
        "`fast_layers: off`": request.wish == "off",
        "all weights are trained by several processes": peft is None and not may_write_grads(),
        "the layers are compiled instead": request.is_compiled,
        "`qat` rounds weights in the linear layers": request.fake_quantizes,
        f"`distributed.autocast_dtype: {request.autocast_dtype}`": request.autocast_dtype is not None,
        "DoRA with dropout is not on the fast path yet": peft is not None and peft.use_dora and peft.dropout > 0,
        "DoRA needs the weights in 16 bits or more": peft is not None and peft.use_dora and request.fp8 is not None,
        f"`attn_implementation: {attention}` was asked for": request.asks_attention and attention != "sdpa",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _obstacle_on_machine(model: PreTrainedModel) -> str | None:
    machine = Machine.of(model.device)
    if machine.device_type != "cuda":
        return f"the model is on the {machine.device_type}"
    if model.dtype != torch.bfloat16:
        return f"the weights are {dtype_name(model.dtype)}, not bfloat16"
    if machine.capability < (8, 0):
        return "this GPU has no bfloat16 arithmetic"
    if not machine.has_triton:
        return "the package triton is not installed"
    return None if machine.has_compiler else "Triton needs a C compiler, and neither cc, gcc nor clang is installed"


def _choose_store(layer: nn.Module, request: FastRequest) -> tuple[type[WeightStore], str]:
    """Return how the weights of the layers are kept, and words for the log. All layers are alike."""
    linear = layer.get_submodule(GROUPS["o"][0])
    if request.fp8 is not None:
        return request.fp8.store, "; weights: fp8"
    if request.peft is None:
        return TrainedStore, ""
    if not isinstance(linear, Linear4bit):
        return DenseStore, ""
    kind = f"; weights: {linear.packed.quant_type}"
    return (Nf4Fp8Store, f"{kind}, multiplied in 8 bits") if request.computes_in_fp8 else (Nf4Store, kind)


def _linears(layer: nn.Module) -> dict[str, nn.Module]:
    return {path: layer.get_submodule(path) for paths in GROUPS.values() for path in paths}


def _check_packed(layer: nn.Module, computes_in_fp8: bool) -> None:
    """Refuse layers of which only a part is packed, or whose arithmetic is not that of the rest of the model.

    Raises:
        UnfitError: the first that does not fit.
    """
    linears = _linears(layer)
    packed = {path: linear for path, linear in linears.items() if isinstance(linear, Linear4bit)}
    if packed and len(packed) < len(linears):
        first = next(path for path in linears if path not in packed)
        raise UnfitError(f"`{first}` is not packed and other layers are")
    dtype = layer.get_parameter("input_layernorm.weight").dtype
    for path, linear in packed.items():
        if linear.compute_dtype != dtype:
            raise UnfitError(
                f"`quantization.bnb_4bit_compute_dtype` is {dtype_name(linear.compute_dtype)} and the model's dtype "
                f"{dtype_name(dtype)}"
            )
        if computes_in_fp8 and (linear.in_features % linear.packed.block_size or linear.out_features % 16):
            raise UnfitError(
                f"`{path}` has {linear.in_features} inputs and {linear.out_features} outputs, and 8 bits need "
                f"multiples of {linear.packed.block_size} and 16"
            )


def _check_weights(layer: nn.Module, has_adapters: bool) -> None:
    """Refuse layers whose own weights learn beside adapters, differ in dtype, or are stored in a way of their own.

    Raises:
        UnfitError: the first that does not fit.
    """
    adapters, codes = set(), set()
    for path, linear in _linears(layer).items():
        if isinstance(linear, Linear4bit) and has_adapters:
            codes.add(id(linear.weight))
        elif type(linear) not in (nn.Linear, LinearLoRA):
            raise UnfitError(f"`{path}` is a {type(linear).__name__}")
        if isinstance(linear, LinearLoRA):
            adapters |= {id(linear.lora_A.weight), id(linear.lora_B.weight), id(linear.lora_magnitude_vector)}
    own = {name: parameter for name, parameter in layer.named_parameters() if id(parameter) not in adapters}
    for name, parameter in own.items():
        if parameter.requires_grad and has_adapters:
            raise UnfitError(f"`{name}` is trained beside adapters; the fast layers train one or the other")
    dtypes = sorted({str(parameter.dtype) for parameter in own.values() if id(parameter) not in codes})
    if len(dtypes) > 1:
        raise UnfitError(f"its weights are of several dtypes ({', '.join(dtypes)})")
