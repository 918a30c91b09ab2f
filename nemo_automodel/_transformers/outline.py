"""A model without weights: its sizes, its adapters, and what its layers would keep in memory.

Every tensor lives on PyTorch's ``meta`` device: shapes are real, memory is none, so a 70B is built in a second from its
config.json. What Transformers' own layers keep for the backward pass depends on how each was written, so it is not
calculated but counted: the layers run on such tensors, forward and backward, and a ledger notes every piece of memory
that comes and goes. Attention is exchanged for one that keeps what a fused kernel keeps.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from nemo_automodel._transformers.assemble import freeze, recompute_activations
from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.fast_layers import (
    FastRequest,
    check_fused,
    check_plain,
    dropout_of,
    why_plain,
    would_fuse_adapters,
)
from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel._transformers.fp8_base import Fp8Plan
from nemo_automodel._transformers.frozen_head import is_one_matrix
from nemo_automodel._transformers.model_source import (
    check_sizes,
    load_config,
    one_config,
    read_config,
    resolve_source,
)
from nemo_automodel._transformers.options import (
    ModelOptions,
    check_packed_files,
    refuse_packed_training,
    resolve_dtype,
    stored_quantization,
)
from nemo_automodel.components._peft.lora import LinearLoRA, apply_lora
from nemo_automodel.components.fast.fp8_store import Fp8Scheme
from nemo_automodel.components.fast.linear import FusedLinear
from nemo_automodel.components.plan.workload import Linear, ModelShape, PlainRun
from nemo_automodel.components.quantization.config import FP8Config, QuantizationConfig
from nemo_automodel.components.quantization.qat import fake_quantize
from nemo_automodel.shared.dtypes import dtype_name, parse_dtype
from nemo_automodel.shared.errors import UserError

_ATTENTION = "outline"


@dataclass
class Outline:
    """A model on the meta device, with what was asked of it."""

    model: PreTrainedModel
    options: ModelOptions
    why_plain: str | None
    """Why Transformers' layers would compute it on a GPU; None when the fast layers would."""
    fused: tuple[FusedLinear, ...] = ()
    """Linear layers of Transformers' decoder layers that are fused with their adapters."""
    quantization: QuantizationConfig | None = None
    """How weights are packed: as was asked for, or as the files have them already."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return self.model.dtype


def from_pretrained(pretrained_model_name_or_path: str, **keywords: Any) -> Outline:
    """Return the outline of what `NeMoAutoModelForCausalLM.from_pretrained` would load. Only config.json is read.

    Raises:
        UserError: as `NeMoAutoModelForCausalLM.from_pretrained`, as far as config.json tells.
    """
    return _outline(pretrained_model_name_or_path, keywords, is_read=True)


def from_config(
    config: str | dict[str, Any] | PretrainedConfig | None = None,
    pretrained_model_name_or_path: str | None = None,
    load_base_model: bool = False,
    **keywords: Any,
) -> Outline:
    """Return the outline of what `NeMoAutoModelForCausalLM.from_config` would build.

    Raises:
        UserError: as there.
    """
    return _outline(one_config(config, pretrained_model_name_or_path), keywords, is_read=load_base_model)


def _outline(source: str | dict[str, Any] | PretrainedConfig, keywords: dict[str, Any], is_read: bool) -> Outline:
    """Return the outline; ``is_read``: the weights come from files, which may hold them packed."""
    options = ModelOptions.from_keywords(keywords)
    hub = options.take_hub_keywords()
    config = read_config(source)
    if isinstance(config, str):
        name = resolve_source(config)
        config = load_config(name, options.trust_remote_code, hub, options.overrides)
    NeMoAutoModelForCausalLM.model_class(config)  # refuses architectures that are no such models
    check_sizes(config)
    quantization: Any = options.quantization_config
    if isinstance(quantization, dict):
        quantization = QuantizationConfig(**quantization)
    if is_read:
        in_fp8 = isinstance(options.fp8_config, FP8Config) and options.fp8_config.enabled
        check_packed_files(str(config.name_or_path), config, quantization, in_fp8)
        if options.peft_config is None:
            refuse_packed_training(str(config.name_or_path), config)
        elif quantization is None:
            quantization = stored_quantization(config)
    stored = None if config.dtype is None else parse_dtype(config.dtype)
    dtype = resolve_dtype(options.torch_dtype, stored, torch.device("cuda")) or torch.float32
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=options.trust_remote_code
        )
    logging.getLogger("transformers").setLevel(level)
    freeze(model, options.freeze_config or {})
    if options.peft_config is not None:
        with torch.device("meta"):
            apply_lora(model, options.peft_config)
    if options.qat_config is not None:
        fake_quantize(model, options.qat_config)
    request = _request(options, quantization)
    reason = _why_plain(model, request, dtype, quantization)
    fused: tuple[FusedLinear, ...] = ()
    if reason is not None:
        check_plain(request, reason)
        fused = _fuse(model, quantization, request, dtype)
        check_fused(request, bool(fused), reason)
    return Outline(model, options, reason, fused, quantization)


def _request(options: ModelOptions, quantization: QuantizationConfig | None) -> FastRequest:
    return FastRequest(
        wish=str(options.fast_layers),
        peft=options.peft_config,
        recompute=options.activation_checkpointing,
        mlp_tile_tokens=options.mlp_tile_tokens,
        force_hf=options.force_hf,
        computes_in_fp8=isinstance(quantization, QuantizationConfig) and quantization.compute_in_fp8,
        fp8=_fp8(options),
        cuda_graphs=str(options.cuda_graphs),
        is_compiled=options.compile_layers or (options.compile_config is not None and options.compile_config.enabled),
        fake_quantizes=options.qat_config is not None,
        autocast_dtype=options.autocast_dtype,
        asks_attention=options.attn_implementation is not None,
    )


def _fp8(options: ModelOptions) -> Fp8Plan | None:
    """Return products in 8 bits as far as the choice of layers depends on them; there is no GPU that could be asked."""
    cfg = options.fp8_config
    if not isinstance(cfg, FP8Config) or not cfg.enabled:
        return None
    return Fp8Plan(Fp8Scheme(emulate=True), is_trained=options.peft_config is None)


def _fuse(
    model: PreTrainedModel, quantization: QuantizationConfig | None, request: FastRequest, dtype: torch.dtype
) -> tuple[FusedLinear, ...]:
    """Fuse adapters with their linear layers as a run would, and return the layers. Packed weights stay apart."""
    is_right_dtype = dtype == torch.bfloat16 or request.wish == "on"
    if quantization is not None or not is_right_dtype or not would_fuse_adapters(model, request):
        return ()
    fuse_adapters(model, dropout=dropout_of(request.peft))
    return tuple(module for module in model.modules() if isinstance(module, FusedLinear))


def _why_plain(
    model: PreTrainedModel, request: FastRequest, dtype: torch.dtype, quantization: QuantizationConfig | None
) -> str | None:
    reason = why_plain(model, request)
    if reason is None and quantization is not None:
        reason = _why_plain_when_packed(quantization, dtype)
    if reason is None and dtype != torch.bfloat16 and (request.wish == "auto" or request.fp8 is not None):
        return f"the weights are {dtype_name(dtype)}, not bfloat16"
    return reason


def _why_plain_when_packed(quantization: QuantizationConfig, dtype: torch.dtype) -> str | None:
    """Return why packed weights, which the outline does not have, keep the fast layers away; None if they do not."""
    if not quantization.load_in_4bit:
        return "weights in 8 bits are in layers of bitsandbytes"
    compute_dtype = parse_dtype(quantization.bnb_4bit_compute_dtype)
    if compute_dtype == dtype:
        return None
    names = dtype_name(compute_dtype), dtype_name(dtype)
    return f"`quantization.bnb_4bit_compute_dtype` is {names[0]} and the model's dtype {names[1]}"


def shape_of(outline: Outline, name: str) -> ModelShape:
    """Return the sizes of the model; ``name`` is what to call it."""
    model = outline.model
    config = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_tied = head is not None and head.weight is embedding.weight
    linears = _linears(model, head)
    if not linears or getattr(config, "num_attention_heads", None) is None:
        raise UserError(
            f"`{config.model_type}` models cannot be planned: {'no linear layers' if not linears else 'no attention'} "
            "is what they are made of. Plan a Transformer of its size instead, or measure a few steps."
        )
    adapters = {id(p) for layer in model.modules() if isinstance(layer, LinearLoRA) for p in _adapter(layer)}
    num_all = sum(p.numel() for p in model.parameters() if id(p) not in adapters)
    num_embedding = embedding.weight.numel()
    num_head = 0 if head is None or is_tied else head.weight.numel()
    num_linear = sum(linear.num_weights for linear in linears)
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        linears=tuple(linears),
        num_embedding=num_embedding,
        num_head=num_head,
        num_other=num_all - num_linear - num_embedding - num_head,
        has_qk_norm=any(path.endswith("q_norm") for path, _ in model.named_modules()),
    )


def logits_copies(outline: Outline) -> int:
    """Return how many whole logits the loss would hold at once, 0 where it is one step with the output head."""
    options, config = outline.options, outline.model.config.get_text_config()
    head: Any = outline.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(config, "final_logit_softcapping", None):
        return 4  # before and after the cap, and the gradients of both
    is_compiled = options.compile_config is not None and options.compile_config.enabled
    joins = is_one_matrix(head) and not (options.force_hf or is_compiled or options.autocast_dtype)
    return 0 if joins else 2


def _adapter(layer: LinearLoRA) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [layer.lora_A.weight, layer.lora_B.weight]
    return found if layer.lora_magnitude_vector is None else [*found, layer.lora_magnitude_vector]


def _linears(model: PreTrainedModel, head: nn.Module | None) -> list[Linear]:
    """Return the linear layers by name and shape; the output head and the adapters' own are not among them."""
    inner = {id(x) for m in model.modules() if isinstance(m, LinearLoRA) for x in (m.lora_A, m.lora_B)}
    counts: Counter[tuple[str, int, int, int]] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):  # GPT-2's linear layer
            counts[path.rpartition(".")[2], module.nx, module.nf, 0] += 1
        if isinstance(module, nn.Linear) and module is not head and id(module) not in inner:
            rank = module.lora_A.out_features if isinstance(module, LinearLoRA) else 0
            counts[path.rpartition(".")[2], module.in_features, module.out_features, rank] += 1
    return [Linear(name, count, num_in, num_out, rank) for (name, num_in, num_out, rank), count in counts.items()]


def run_plain(outline: Outline, rows: int, seq_len: int, recompute: str) -> PlainRun:
    """Run Transformers' layers forward and backward without data and return what they kept and moved.

    Raises:
        UserError: they need data, cannot take rows of this length, or have kernels for other dtypes only.
    """
    try:
        return _run_plain(outline, rows, seq_len, recompute)
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"A micro-batch of {rows} × {seq_len:,} tokens of this `{outline.model.config.model_type}` model cannot be "
            f"planned, because its layers do not run without data: {reason}. Shorten the rows to what the model takes "
            "(--seq-len), set `model.torch_dtype: bfloat16`, or measure a few steps."
        ) from error


def _run_plain(outline: Outline, rows: int, seq_len: int, recompute: str) -> PlainRun:
    model = outline.model
    _register_attention()
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    if recompute != "none":
        recompute_activations(model, recompute)
    hooks = [
        p.register_post_accumulate_grad_hook(_drop_grad)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    model.train()
    for layer in outline.fused:
        layer.fused_core.keeps_products = recompute == "selective"
    stores = [layer.fused_core.store for layer in outline.fused]
    for store in stores:
        store.prepare()  # once a step, not in every micro-batch
    copies = [copy for store in stores for copy in (store.a_RK, store.b_NR) if copy is not None]
    ledger = _Ledger([*model.parameters(), *model.buffers(), *copies])
    try:
        with ledger:
            ids = torch.zeros((rows, seq_len), dtype=torch.long, device="meta")
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
            kept = ledger.now
            hidden.backward(torch.empty_like(hidden))
    finally:
        for hook in hooks:
            hook.remove()
        if recompute != "none":
            model._set_gradient_checkpointing(enable=False)
        model.set_attn_implementation(before)
    return PlainRun(
        kept=kept,
        working=max(0, ledger.peak - kept),
        written=ledger.written,
        adapter_copies=sum(copy.nbytes for copy in copies),
    )


def _drop_grad(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of every tensor that is made and of every one that goes, except those that were ``there``."""

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.written = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # a question about values, such as whether a mask is all ones: there are none
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += num_bytes
        self.written += num_bytes
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output and one number for every query."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    out: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def _register_attention() -> None:
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
