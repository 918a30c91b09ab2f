"""Model surgery: the one place where a loaded model is changed, in one order.

1. load, or build with random weights on the device; in 4 bits `quantized_load` packs each weight as it is read or draws
   random codes, and what it cannot read, and all of 8 bits, Transformers and bitsandbytes do; where the GPU shares the
   host's memory, `streamed_load` reads unpacked weights in a stream;
2. freeze what ``freeze_config`` names;
3. put adapters on whatever linear layers are there, packed or not;
4. move to the device, unless the weights were read straight onto it; have linear layers round if asked (``qat``);
5. put fast decoder layers in where they apply (`fast_layers`), in 8 bits if asked (`fp8_base`); they recompute
   activations themselves;
6. take the embedding to the host if asked;
7. have other layers recompute activations in the backward pass;
8. compile.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers import quantized_load, streamed_load
from nemo_automodel._transformers.compiling import compile_model
from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel._transformers.fp8_base import Fp8Plan
from nemo_automodel._transformers.host_embedding import keep_on_host
from nemo_automodel._transformers.kernel_choice import KernelRequest
from nemo_automodel._transformers.model_source import readable_errors
from nemo_automodel._transformers.options import FREEZE_KEYS, Quantization
from nemo_automodel._transformers.shard_reader import drop_cached
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.quantization.config import CompileConfig
from nemo_automodel.components.quantization.qat import fake_quantize
from nemo_automodel.components.training.memory_watch import MemoryFloor
from nemo_automodel.shared import read_ahead
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import is_available

logger = logging.getLogger(__name__)

# what selective recomputation keeps: the results that cost most to make again
_EXPENSIVE_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


@dataclass
class AssemblyPlan:
    """Everything `assemble` needs, resolved."""

    auto_class: Any
    """One of Transformers' auto classes."""
    config: PretrainedConfig
    source: str | None
    """Where the weights are; None builds random ones."""
    device: torch.device
    dtype: torch.dtype | None
    attn_implementation: str | None = None
    asks_attention: bool = False
    """The user named the attention implementation."""
    fast_layers: str = "auto"
    cuda_graphs: str = "auto"
    embeddings_on_host: bool = False
    force_hf: bool = False
    autocast_dtype: str | None = None
    floor: MemoryFloor | None = None
    """What stays free of the host's memory; with it all weights are read in a stream."""
    kernels: KernelRequest = field(default_factory=KernelRequest)
    quantization: Quantization | None = None
    fp8: Fp8Plan | None = None
    qat: Any = None
    """A `QATConfig`, or a quantizer of torchao's."""
    freeze: dict[str, bool] = field(default_factory=dict)
    peft: PeftConfig | None = None
    activation_checkpointing: str = "none"
    mlp_tile_tokens: int | None = None
    compile: CompileConfig | None = None
    compile_layers: bool = False
    trust_remote_code: bool = False
    hub: dict[str, Any] = field(default_factory=dict)


def assemble(plan: AssemblyPlan) -> PreTrainedModel:
    """Return the model of ``plan`` on its device, in evaluation mode as Transformers leaves it.

    Raises:
        UserError: weights are missing or do not fit, targets match nothing, or the model cannot do what is asked.
    """
    model = _build(plan) if plan.source is None else _load(plan, plan.source)
    freeze(model, plan.freeze)
    if plan.peft is not None:
        num_layers = apply_lora(model, plan.peft)
        logger.info("LoRA on %d linear layers, rank %d.", num_layers, plan.peft.dim)
    if plan.quantization is None:  # packed weights are already there, and some refuse to move
        model.to(plan.device)  # type: ignore[arg-type]
    if plan.qat is not None:
        fake_quantize(model, plan.qat)
    is_fast = use_fast_layers(model, _fast_request(plan))
    if plan.embeddings_on_host:
        keep_on_host(model, plan.device)
    if plan.activation_checkpointing != "none" and not is_fast:
        recompute_activations(model, plan.activation_checkpointing)
    compile_model(model, plan.compile, plan.compile_layers)
    return model


def _fast_request(plan: AssemblyPlan) -> FastRequest:
    return FastRequest(
        wish=plan.fast_layers,
        peft=plan.peft,
        recompute=plan.activation_checkpointing,
        mlp_tile_tokens=plan.mlp_tile_tokens,
        force_hf=plan.force_hf,
        computes_in_fp8=plan.quantization is not None and plan.quantization.computes_in_fp8,
        is_compiled=plan.compile_layers or (plan.compile is not None and plan.compile.enabled),
        autocast_dtype=plan.autocast_dtype,
        asks_attention=plan.asks_attention,
        kernels=plan.kernels,
        cuda_graphs=plan.cuda_graphs,
        fp8=plan.fp8,
        fake_quantizes=plan.qat is not None,
    )


def _build(plan: AssemblyPlan) -> PreTrainedModel:
    quantization = plan.quantization
    if quantization is not None and quantization.four_bit is not None:
        blueprint = _blueprint(plan, torch.float32)
        model = streamed_load.build_empty(blueprint)
        reason = quantized_load.model_obstacle(model)
        if reason is not None:
            raise UserError(f"`from_config` cannot make random weights in 4 bits: {reason}. Leave `quantization` out.")
        return quantized_load.build_packed(model, blueprint, quantization.four_bit)
    if quantization is not None:
        raise UserError(
            "`from_config` makes random weights in 4 bits or unquantised, not in 8 bits. Set `load_in_4bit: true` "
            "instead of `load_in_8bit`, or leave `quantization` out."
        )
    random: PreTrainedModel
    with plan.device:  # random numbers are made where they stay: a second for 8B parameters, a minute on a CPU
        random = plan.auto_class.from_config(
            plan.config,
            dtype=plan.dtype or torch.float32,
            attn_implementation=plan.attn_implementation,
            trust_remote_code=plan.trust_remote_code,
        )
    return random


def _blueprint(plan: AssemblyPlan, default_dtype: torch.dtype) -> streamed_load.Blueprint:
    return streamed_load.Blueprint(
        plan.auto_class,
        plan.config,
        plan.dtype or default_dtype,
        plan.device,
        plan.attn_implementation,
        plan.trust_remote_code,
    )


def _load(plan: AssemblyPlan, source: str) -> PreTrainedModel:
    read_ahead.stop()
    four_bit = None if plan.quantization is None else plan.quantization.four_bit
    # weights that stay as they are come in a stream on their way to a GPU, and wherever the memory has a floor
    is_plain = plan.quantization is None and plan.config.to_dict().get("quantization_config") is None
    if four_bit is None and not (is_plain and (plan.floor is not None or plan.device.type == "cuda")):
        return _load_with_transformers(plan, source)
    with readable_errors(source):
        files = streamed_load.find_files(source, plan.hub)
    stored = next((t.dtype for t in files.weights.values() if t.dtype.is_floating_point), None) if files else None
    blueprint = _blueprint(plan, stored or torch.float32)
    model = streamed_load.build_empty(blueprint)
    if four_bit is None:
        reason, others = streamed_load.plain_obstacle(model, files), "read by Transformers, in no stream"
    else:
        reason = quantized_load.model_obstacle(model) or quantized_load.file_obstacle(model, files)
        others = "packed by Transformers and bitsandbytes"
    if reason is not None or files is None:
        logger.info("Weights: %s: %s.", others, reason)
        del model
        loaded = _load_with_transformers(plan, source)
        if files is not None and plan.floor is not None:
            drop_cached(sorted({stored.path for stored in files.index.values()}))
        return loaded
    if four_bit is None:
        model, report = streamed_load.load_plain(model, files, blueprint, plan.floor)
    else:
        model, report = quantized_load.load_packed(model, files, blueprint, four_bit, plan.floor)
    _check_loaded(model, report, source)
    return model


def _load_with_transformers(plan: AssemblyPlan, source: str) -> PreTrainedModel:
    # reading straight onto the GPU halves the peak where CPU and GPU share memory; Transformers needs accelerate for it
    reads_onto_device = plan.quantization is not None or (plan.device.type != "cpu" and is_available("accelerate"))
    model: PreTrainedModel
    with readable_errors(source):
        model, report = plan.auto_class.from_pretrained(
            source,
            config=plan.config,
            dtype=plan.dtype or "auto",
            attn_implementation=plan.attn_implementation,
            quantization_config=None if plan.quantization is None else plan.quantization.for_bitsandbytes(),
            device_map={"": plan.device} if reads_onto_device else None,
            trust_remote_code=plan.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **plan.hub,
        )
    _check_loaded(model, report, source)
    if plan.quantization is not None:
        _keep_packing(model)
    return model


def _keep_packing(model: PreTrainedModel) -> None:
    """Keep evaluation from rewriting packed weights.

    On a CPU with AVX512-BF16, bitsandbytes turns the weights of a layer that is evaluated into a layout of its own, for
    good: scales are rounded to bf16, some shapes fail, and what trains after the first validation gets no gradient.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_loaded(model: PreTrainedModel, report: dict[str, Any], source: str) -> None:
    """Refuse a model of which some weights stayed random."""
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]]
    if mismatched:
        raise UserError(
            f"The weights of `{source}` do not fit its configuration: `{mismatched[0]}` has another shape "
            f"({len(mismatched)} such weights). Remove the override of its size, or take the right config.json."
        )
    missing = sorted(report["missing_keys"])
    has_task_head = model.get_output_embeddings() is None  # type: ignore[no-untyped-call]
    is_head_only = has_task_head and all(name.count(".") == 1 for name in missing)
    if missing and not is_head_only:
        raise UserError(
            f"`{source}` is incomplete: {len(missing)} weights of {type(model).__name__} are missing, the first is "
            f"`{missing[0]}`. Download it again, or use the class it was saved from."
        )
    if missing:
        logger.info("New weights, to be learned: %s.", ", ".join(missing))
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logger.info("%d weights of `%s` are not used, the first is %s.", len(unexpected), source, unexpected[0])


def freeze(model: PreTrainedModel, freeze: dict[str, bool]) -> None:
    """Turn gradients off for the embeddings and for modules whose names hold the words of `FREEZE_KEYS`."""
    if freeze.get("freeze_embeddings"):
        embeddings = model.get_input_embeddings()
        embeddings.requires_grad_(False)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is not None and head.weight is embeddings.weight:
            logger.info("`freeze_embeddings` freezes the output head as well: they share one weight.")
    for key, words in FREEZE_KEYS.items():
        if freeze.get(key) and words:
            frozen = [p for name, p in model.named_parameters() if any(word in name for word in words)]
            for parameter in frozen:
                parameter.requires_grad_(False)
            logger.info("`%s`: %d weights frozen.", key, len(frozen))


def recompute_activations(model: PreTrainedModel, policy: str) -> None:
    """Have Transformers' decoder layers make activations again in the backward pass, ``selective`` or ``full``.

    Raises:
        UserError: the model cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations. Set `distributed.activation_checkpointing: false`."
        )
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _EXPENSIVE_OPS)
    # the public method also makes the embeddings' output need a gradient, as reentrant checkpoints want; that would run
    # the backward pass through frozen layers below the lowest adapter
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=partial(checkpoint, **kwargs))
