"""A decoder layer as one autograd function with a backward pass written by hand.

Forward: norm → packed QKV → bias, q/k norm and RoPE in place → attention → output projection → residual and norm in one
pass → packed gate and up → SwiGLU → down projection with the residual in its accumulator. Kept for the backward pass
are the layer's input, the middle of the residual stream, the finished queries, keys and values, the output of
attention, gate and up, and a few numbers a token: about 92 KB a token on an 8B model, a third of what automatic
differentiation keeps. Norm outputs and the SwiGLU product are made again on the way back by kernels that read their
inputs anyway.

Backward: gradients of gate and up overwrite them, attention's gradients are read in the layout they come in, and
nothing is computed that nobody needs: below the lowest adapter there is no gradient. So it runs once; a second backward
pass is refused. Attention keeps an autograd graph of its own inside, so any differentiable attention can be put in.

Base weights are frozen here, and learn in `trained_layer`. A Hugging Face layer is exchanged in place (`speed_up`):
names, weights and modules stay, and generation with a cache runs through them as before.

Shapes: B rows, S positions, T = B·S tokens, D hidden size, H query heads, K key heads, E head dim, F intermediate size,
G = 2F, W = (H + 2K)·E; M a buffer wider than its contents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.dora import Rescaled, RowScales
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.names import GROUPS, Adapter, Slot, slots_of
from nemo_automodel.components.fast.spec import DecoderSpec, read_spec
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.rope import QKVLayout, rotate_qkv, rotate_qkv_backward
from nemo_automodel.kernels.swiglu_lora import swiglu_lora, swiglu_lora_backward

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(q ``[B, H, S, E]``, k and v ``[B, K, S, E]``, scale) → ``[B, H, S, E]``; differentiable by autograd."""

ChooseAttention = Callable[[nn.Module, torch.Tensor | None], Attention | None]
"""(a layer's attention module, its mask) → what to compute; None where Hugging Face's own modules must."""

MakeStore = Callable[[Sequence[Slot]], WeightStore]
"""(the linear layers of a packed matrix) → what keeps it; the class of a store is one."""


class Replay(Protocol):
    """A layer's recorded passes, see `graphs`."""

    def forward(self, x_TD: torch.Tensor, core: DecoderCore, call: _Call, drops: bool) -> torch.Tensor | None:
        """Return the layer's output ``[T, D]`` with its way back, None where nothing is recorded."""


# cuDNN is 1.7 times as fast as the next on Hopper (543 against 304 TFLOP/s forward, measured on an H100)
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FAST_CLASSES: dict[type[nn.Module], type[FastDecoderLayer]] = {}


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend to all earlier positions; keys and values are not repeated for their group of queries."""
    return _sdpa(q, k, v, scale, None)


def causal_attention_by(name: str, only: bool = False) -> Attention:
    """Return `causal_attention` with the SDPA backend ``name`` first, or with no other.

    ``name`` is ``cudnn``, ``flash``, ``efficient`` or ``math``.
    """
    return CausalAttention((_BACKENDS[name], *(() if only else (b for n, b in _BACKENDS.items() if n != name))))


@dataclass(frozen=True)
class CausalAttention:
    """`causal_attention` by given backends, the first that can. What it reads beside its arguments: nothing."""

    key: tuple[SDPBackend, ...]
    tensors: tuple[torch.Tensor, ...] = ()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Return ``[B, H, S, E]``."""
        return _sdpa(q, k, v, scale, None, self.key)

    def over(self, tensors: tuple[torch.Tensor, ...]) -> CausalAttention:
        """Return this: it reads no tensors of its own; see `graphs.GraphAttention`."""
        return self


def masked_attention(mask: torch.Tensor) -> Attention:
    """Return attention under a mask ``[B, 1, S, S]``, bool or additive."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if q.is_cuda:  # the backends that take a mask want as many keys as queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return _sdpa(q, k, v, scale, mask)

    return attend


def attention_by_mask(module: nn.Module, mask: torch.Tensor | None) -> Attention:
    """Return causal attention without a mask, else attention under it."""
    return causal_attention if mask is None else masked_attention(mask)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    backends: Sequence[SDPBackend] = tuple(_BACKENDS.values()),
) -> torch.Tensor:
    with sdpa_kernel(list(backends), set_priority=True):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


@dataclass
class _Saved:
    """What a forward pass keeps for the way back. Graph: attention's inputs and output, with autograd's memory."""

    rstd1_T: torch.Tensor
    rstd2_T: torch.Tensor
    raw_TW: torch.Tensor | None
    qk_rstd: torch.Tensor | None
    graph: tuple[list[torch.Tensor], torch.Tensor]
    x_mid_TD: torch.Tensor
    gate_up_TM: torch.Tensor | None
    low_qkv: torch.Tensor | None
    low_o: torch.Tensor | None
    low_gate_up: torch.Tensor | None
    low_down: torch.Tensor | None


@dataclass(frozen=True)
class _Call:
    """One call of a layer: the shape of its rows, the rotary tables and the attention."""

    num_rows: int
    seq_len: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention: Attention


class DecoderCore:
    """The computation of one layer over packed weights. ``recompute`` is none, selective or full.

    Selective makes gate and up again in the backward pass, full everything but the layer's input.
    """

    def __init__(
        self,
        layer: nn.Module,
        adapters: dict[nn.Module, Adapter],
        recompute: str = "none",
        store: MakeStore = DenseStore,
        choices: Choices = DEFAULT,
        dropout: AdapterDropout | None = None,
    ) -> None:
        self.spec: DecoderSpec = read_spec(layer)
        self.recompute, self.choices, self.dropout = recompute, choices, dropout
        slots = slots_of(layer, adapters)
        self.qkv, self.o = store(slots["qkv"]), store(slots["o"])
        self.gate_up, self.down = store(slots["gate_up"]), store(slots["down"])
        self.stores = (self.qkv, self.o, self.gate_up, self.down)
        self._row_scales = {
            group: RowScales(store)
            for group, store in zip(GROUPS, self.stores, strict=True)
            if any(slot.adapter is not None and slot.adapter.magnitude is not None for slot in store.slots)
        }
        assert not (self._row_scales and dropout), "DoRA under masks is the plain path's"
        self._norm1: Any = layer.input_layernorm
        self._norm2: Any = layer.post_attention_layernorm
        attention: Any = layer.self_attn
        self._head_norms = (attention.q_norm, attention.k_norm) if self.spec.has_qk_norm else None

    def parameters(self) -> list[torch.Tensor]:
        """Return the adapters' weights, in the order of the gradients."""
        return [parameter for store in self.stores for parameter in store.parameters()]

    def for_pass(self, device: torch.device, drops: bool) -> DecoderCore:
        """Return this computation for one forward and backward pass: under masks of its own, under DoRA's scales."""
        if self._row_scales:
            rescaled = copy.copy(self)
            for group, scales in self._row_scales.items():
                setattr(rescaled, group, Rescaled(scales.store, scales))
            return rescaled
        return self.under_seed(self.draw_seed(device)) if self.drops(drops) else self

    def drops(self, is_training: bool) -> bool:
        """Tell whether a pass is under masks."""
        return is_training and self.dropout is not None and any(store.has_adapters for store in self.stores)

    def draw_seed(self, device: torch.device) -> torch.Tensor:
        """Draw the seed of the masks of one pass."""
        assert self.dropout is not None
        return self.dropout.draw_seed(device)

    def under_seed(self, seed: torch.Tensor) -> DecoderCore:
        """Return this computation under the masks of a seed."""
        assert self.dropout is not None
        masked = copy.copy(self)
        for number, (group, store) in enumerate(zip(GROUPS, self.stores, strict=True)):
            setattr(masked, group, self.dropout.over(store, seed, number))
        return masked

    @property
    def has_row_scales(self) -> bool:
        """Whether every pass computes DoRA's scales first."""
        return bool(self._row_scales)

    def addresses(self) -> tuple[int, ...]:
        """Return numbers that change when weights move in memory."""
        norms = (self._norm1, self._norm2, *(self._head_norms or ()))
        return (*(store.num_packings for store in self.stores), *(norm.weight.data_ptr() for norm in norms))

    def trained_together(self) -> list[list[torch.Tensor]]:
        """Return the parameters whose gradients must be rows of one matrix, matrix by matrix."""
        return []

    def _layout(self) -> QKVLayout:
        spec = self.spec
        q_norm, k_norm = (None, None) if self._head_norms is None else (m.weight.data for m in self._head_norms)
        return QKVLayout(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, q_norm, k_norm, spec.norm_eps, self.qkv.bias_N
        )

    # Forward.

    def forward(self, x_TD: torch.Tensor, call: _Call, keeps: bool) -> tuple[torch.Tensor, _Saved | None]:
        """Return the layer's output ``[T, D]`` and, if asked, what `backward` needs."""
        for store in self.stores:
            store.prepare()
        return self._run(x_TD, call, keeps)

    def _run(
        self, x_TD: torch.Tensor, call: _Call, keeps: bool, wants_output: bool = True
    ) -> tuple[torch.Tensor, _Saved | None]:
        eps, num_tokens = self.spec.norm_eps, x_TD.shape[0]
        x1_TM = self.qkv.input_buffer(num_tokens)
        x1 = self.qkv.room_for_rounded(num_tokens)
        _, rstd1_T = rms_norm(x_TD, self._norm1.weight, eps, out_TD=x1_TM[:, : self.qkv.num_in], rounded=x1)
        low_qkv = self.qkv.low(x1_TM)
        qkv_TW = self.qkv.forward(x1_TM, low_qkv, x1)[:, : self.qkv.num_out]
        del x1_TM, x1
        qk_TX, qk_rstd = rotate_qkv(qkv_TW, call.cos, call.sin, self._layout())
        graph = self._attend(qk_TX, qkv_TW, call, keeps)
        attended_TX = self._flat(graph[1].detach())
        low_o = self.o.low(attended_TX)
        x_mid_TD = self.o.forward(attended_TX, low_o)[:, : self.o.num_out]
        x2_TM = self.gate_up.input_buffer(num_tokens)
        x2, to_TD = self.gate_up.room_for_rounded(num_tokens), x2_TM[:, : self.gate_up.num_in]
        _, rstd2_T = rms_norm(x_mid_TD, self._norm2.weight, eps, residual_TD=x_TD, out_TD=to_TD, rounded=x2)
        low_gate_up = self.gate_up.low(x2_TM)
        gate_up_TM = self.gate_up.forward_pending(x2_TM, low_gate_up, x2)
        del x2_TM, x2, to_TD
        h_TM, update = self.down.input_buffer(num_tokens), self.gate_up.pending(low_gate_up)
        a_RF = self.down.a_RK if self.choices.swiglu_products else None
        low_down = swiglu_lora(
            gate_up_TM[:, : self.gate_up.num_out],
            h_TM[:, : self.down.num_in],
            update,
            a_RF,
            self.down.rank,
            self.down.input_mask,
        )
        low_down = self.down.low(h_TM) if low_down is None else low_down
        # when a layer is recomputed nobody asks for its output: a fifth of the products is left out
        y_TD = self.down.forward_added(x_mid_TD, h_TM, low_down) if wants_output else x_mid_TD
        if not keeps:
            return y_TD, None
        return y_TD, _Saved(
            rstd1_T=rstd1_T,
            rstd2_T=rstd2_T,
            raw_TW=None if qk_rstd is None else qkv_TW,
            qk_rstd=qk_rstd,
            graph=graph,
            x_mid_TD=x_mid_TD,
            gate_up_TM=None if self.recompute == "selective" else gate_up_TM,
            low_qkv=low_qkv,
            low_o=low_o,
            low_gate_up=low_gate_up,
            low_down=low_down,
        )

    def _attend(
        self, qk_TX: torch.Tensor, qkv_TW: torch.Tensor, call: _Call, keeps: bool
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        spec = self.spec
        split = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
        parts = [*torch.split(qk_TX, split, dim=1), qkv_TW[:, sum(split) :]]
        heads = [
            part.view(call.num_rows, call.seq_len, -1, spec.head_dim).transpose(1, 2).detach().requires_grad_(keeps)
            for part in parts
        ]
        with torch.set_grad_enabled(keeps):
            return heads, call.attention(heads[0], heads[1], heads[2], spec.attention_scale)

    @staticmethod
    def _flat(x_BHSE: torch.Tensor) -> torch.Tensor:
        """Return ``[T, H·E]``, without a copy where positions are outside heads in memory."""
        return x_BHSE.transpose(1, 2).flatten(0, 1).flatten(1)

    def there_and_back(
        self, x_BSD: torch.Tensor, dy_BSD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return output, gradient of the input and gradients of `parameters` of whole causal rows, for measurements."""
        call = _Call(x_BSD.shape[0], x_BSD.shape[1], *tables, causal_attention)
        x_TD, dy_TD = x_BSD.flatten(0, 1), dy_BSD.flatten(0, 1)
        y_TD, saved = self.forward(x_TD, call, keeps=True)
        assert saved is not None
        dx_TD, grads = self.backward(dy_TD, x_TD, call, saved, wants_dx=True)
        assert dx_TD is not None
        return y_TD.view(x_BSD.shape), dx_TD.view(x_BSD.shape), grads

    # Backward.

    def backward(
        self, dy_TD: torch.Tensor, x_TD: torch.Tensor, call: _Call, saved: _Saved, wants_dx: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of the input (None unless wanted) and those of `parameters`. ``saved`` is used up."""
        wants_attention = wants_dx or self.qkv.has_adapters
        wants_mid = wants_attention or self.o.has_adapters
        dx_mid_TM, mlp_grads = self._mlp_backward(dy_TD, saved, wants_mid)
        if dx_mid_TM is None:
            return None, mlp_grads
        heads, attended = saved.graph
        dlow_o = self.o.low_grad(dx_mid_TM)
        o_grads = self.o.adapter_grads(self._flat(attended.detach()), dx_mid_TM, saved.low_o, dlow_o)
        if not wants_attention:
            return None, [*o_grads, *mlp_grads]
        dattended_TX = self.o.dgrad(dx_mid_TM, dlow_o)
        shape = (call.num_rows, call.seq_len, self.spec.num_heads, self.spec.head_dim)
        dq, dk, dv = torch.autograd.grad(attended, heads, dattended_TX.view(shape).transpose(1, 2))
        del heads, attended, dattended_TX
        saved.graph = ([], dq)
        dqkv_TM = self.qkv.output_buffer(dy_TD.shape[0])
        rotate_qkv_backward(
            dq, dk, dv, call.cos, call.sin, self._layout(), dqkv_TM, raw_TW=saved.raw_TW, rstd_TC=saved.qk_rstd
        )
        saved.graph = ([], dqkv_TM)
        del dq, dk, dv
        dx_TD, qkv_grads = self._qkv_backward(dqkv_TM, x_TD, dx_mid_TM[:, : self.o.num_out], saved, wants_dx)
        return dx_TD, [*qkv_grads, *o_grads, *mlp_grads]

    def _mlp_backward(
        self, dy_TD: torch.Tensor, saved: _Saved, wants_mid: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of the middle of the residual stream, in a buffer for `o`, and of the MLP's adapters."""
        gate_up, down, num_tokens = self.gate_up, self.down, dy_TD.shape[0]
        if not (wants_mid or gate_up.has_adapters or down.has_adapters):
            return None, []
        gate_up_TM = saved.gate_up_TM
        if gate_up_TM is None:
            gate_up_TM = self._gate_up_again(saved)
        gate_up_TG = gate_up_TM[:, : gate_up.num_out]
        dy_TM = dy_TD
        if down.margin and self.choices.down_in_depth:
            dy_TM = down.output_buffer(num_tokens)
            dy_TM[:, : down.num_out] = dy_TD
        dlow_down = down.low_grad(dy_TM)
        dh_TF, dh_update = down.dgrad_pending(dy_TM, dlow_down)
        b_GR = gate_up.b_NR if self.choices.swiglu_products else None
        update = gate_up.pending(saved.low_gate_up)
        dlow_gate_up = swiglu_lora_backward(
            dh_TF, gate_up_TG, update, dh_update, b_GR, gate_up.rank_parts, gate_up.output_mask
        )
        # now dh_TF holds the SwiGLU product, gate_up_TG its gradients
        down_grads = down.adapter_grads(dh_TF, dy_TM, saved.low_down, dlow_down)
        del dh_TF, dy_TM
        if not (wants_mid or gate_up.has_adapters):
            return None, down_grads
        dlow_gate_up = gate_up.low_grad(gate_up_TM) if dlow_gate_up is None else dlow_gate_up
        dx2_TD = gate_up.dgrad(gate_up_TM, dlow_gate_up)
        dx_mid_TM = self.o.output_buffer(num_tokens)
        x2_TD = torch.empty_like(dx2_TD)
        rms_norm_backward(
            dx2_TD,
            saved.x_mid_TD,
            self._norm2.weight,
            saved.rstd2_T,
            residual_grad_TD=dy_TD,
            out_TD=dx_mid_TM[:, : self.o.num_out],
            y_TD=x2_TD if gate_up.has_adapters else None,
        )
        gate_up_grads = gate_up.adapter_grads(x2_TD, gate_up_TM, saved.low_gate_up, dlow_gate_up)
        saved.gate_up_TM = None
        return dx_mid_TM if wants_mid else None, [*gate_up_grads, *down_grads]

    def _gate_up_again(self, saved: _Saved) -> torch.Tensor:
        x2_TM = self.gate_up.input_buffer(saved.x_mid_TD.shape[0])
        x2, to_TD = self.gate_up.room_for_rounded(len(x2_TM)), x2_TM[:, : self.gate_up.num_in]
        rms_norm(saved.x_mid_TD, self._norm2.weight, self.spec.norm_eps, out_TD=to_TD, rounded=x2)
        return self.gate_up.forward_pending(x2_TM, saved.low_gate_up, x2)

    def _qkv_backward(
        self, dqkv_TM: torch.Tensor, x_TD: torch.Tensor, dx_mid_TD: torch.Tensor, saved: _Saved, wants_dx: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        qkv, weight_D = self.qkv, self._norm1.weight
        dlow = qkv.low_grad(dqkv_TM)
        x1_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if qkv.has_adapters else None
        dx_TD = None
        if wants_dx:
            dx_TD = qkv.dgrad(dqkv_TM, dlow)
            rms_norm_backward(
                dx_TD, x_TD, weight_D, saved.rstd1_T, residual_grad_TD=dx_mid_TD, out_TD=dx_TD, y_TD=x1_TD
            )
        elif x1_TD is not None:
            rms_norm(x_TD, weight_D, self.spec.norm_eps, out_TD=x1_TD)
        return dx_TD, [] if x1_TD is None else qkv.adapter_grads(x1_TD, dqkv_TM, saved.low_qkv, dlow)


class _DecoderLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, core: DecoderCore, call: _Call, *weights: torch.Tensor) -> torch.Tensor:
        y_TD, saved = core.forward(x_TD, call, keeps=core.recompute != "full")
        ctx.save_for_backward(x_TD)
        # not through `save_for_backward`: it would free them only with the graph, and they are overwritten on purpose
        ctx.core, ctx.call, ctx.saved, ctx.is_used = core, call, saved, False
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_used:
            raise RuntimeError(
                "A fast decoder layer overwrites what it kept, so its backward pass runs once. Run the forward pass "
                "again, or load the model with `force_hf: true`."
            )
        ctx.is_used = True
        (x_TD,) = ctx.saved_tensors
        saved, ctx.saved = ctx.saved, None
        if saved is None:
            _, saved = ctx.core._run(x_TD, ctx.call, keeps=True, wants_output=False)
        dx_TD, grads = ctx.core.backward(grad_outputs[0].contiguous(), x_TD, ctx.call, saved, ctx.needs_input_grad[0])
        return dx_TD, None, None, *grads


class FastDecoderLayer(nn.Module):
    """A Hugging Face decoder layer computed by a `DecoderCore`. Made by `speed_up`, never built."""

    fast_core: DecoderCore
    choose_attention: ChooseAttention
    graphs: Replay | None
    self_attn: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``. With a cache, Hugging Face's own modules compute."""
        attention = None
        if past_key_values is None and position_embeddings is not None:
            attention = self.choose_attention(self.self_attn, attention_mask)
        if attention is None or position_embeddings is None:
            plain: torch.Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return plain
        num_rows, seq_len, _ = hidden_states.shape
        call = _Call(num_rows, seq_len, *position_embeddings, attention)
        x_TD = hidden_states.reshape(num_rows * seq_len, -1)
        if self.graphs is not None and torch.is_grad_enabled():
            replayed = self.graphs.forward(x_TD, self.fast_core, call, self.training)
            if replayed is not None:
                return replayed.view(hidden_states.shape)
        core = self.fast_core.for_pass(x_TD.device, drops=self.training)
        weights = core.parameters()
        if torch.is_grad_enabled() and (x_TD.requires_grad or weights):
            y_TD = _DecoderLayerFunction.apply(x_TD, core, call, *weights)  # type: ignore[no-untyped-call]
        else:
            for store in core.stores:  # evaluation must not show adapters that are gone, and has the time
                store.forget_adapters()
            y_TD, _ = core.forward(x_TD, call, keeps=False)
        out: torch.Tensor = y_TD.view(hidden_states.shape)
        return out


def speed_up(
    layer: nn.Module,
    adapters: dict[nn.Module, Adapter],
    recompute: str = "none",
    store: MakeStore = DenseStore,
    choices: Choices = DEFAULT,
    choose_attention: ChooseAttention = attention_by_mask,
    dropout: AdapterDropout | None = None,
    core: type[DecoderCore] = DecoderCore,
) -> None:
    """Exchange the class of a Hugging Face decoder layer for its fast form, in place.

    ``adapters`` maps linear layers, of this layer or others, to what is on them. ``store`` keeps the base weights,
    ``choices`` are between ways that differ in speed only. ``choose_attention`` is asked in every call. ``dropout`` is
    on the adapters, while the layer is in training mode. ``core`` is another for layers whose own weights learn
    (`trained_layer`).

    Raises:
        UnfitError: the layer computes something that the fast form does not; it is as it was.
    """
    layer.fast_core = core(layer, adapters, recompute, store, choices, dropout)  # type: ignore[assignment]
    layer.choose_attention = choose_attention  # type: ignore[assignment]
    layer.graphs = None  # type: ignore[assignment]
    base = type(layer)
    if base not in _FAST_CLASSES:
        _FAST_CLASSES[base] = type(f"Fast{base.__name__}", (FastDecoderLayer, base), {})
    layer.__class__ = _FAST_CLASSES[base]
