"""A decoder layer as one autograd function with a backward pass written by hand.

Forward: norm → packed QKV → bias, q/k norm and RoPE in place → attention → output projection → residual and norm in one
pass → packed gate and up → SwiGLU → down projection with the residual in its accumulator. Kept for the backward pass
are the layer's input, the middle of the residual stream, the finished queries, keys and values, the output of
attention, gate and up, and a few numbers a token: about 92 KB a token on an 8B model, a third of what automatic
differentiation keeps, or less as `policies` says. Norm outputs and the SwiGLU product are made again on the way back by
kernels that read their inputs anyway. The half behind the middle of the stream is in `mlp`.

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

from nemo_automodel.components.fast.attention import (
    Attention,
    AttentionGraph,
    ChooseAttention,
    attention_by_mask,
    causal_attention,
)
from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.dora import Rescaled, RowScales
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.mlp import MlpPart, MlpSaved
from nemo_automodel.components.fast.names import GROUPS, Adapter, Slot, slots_of
from nemo_automodel.components.fast.policies import Memory
from nemo_automodel.components.fast.spec import DecoderSpec, read_spec
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.rope import QKVLayout, rotate_qkv, rotate_qkv_backward

MakeStore = Callable[[Sequence[Slot]], WeightStore]
"""(the linear layers of a packed matrix) → what keeps it; the class of a store is one."""


class Replay(Protocol):
    """A layer's recorded passes, see `graphs`."""

    def forward(self, x_TD: torch.Tensor, core: DecoderCore, call: _Call, drops: bool) -> torch.Tensor | None:
        """Return the layer's output ``[T, D]`` with its way back, None where nothing is recorded."""


_FAST_CLASSES: dict[type[nn.Module], type[FastDecoderLayer]] = {}


@dataclass
class _Qkv:
    """Queries, keys and values of a pass: finished ones, raw ones beside them under a query/key norm."""

    qkv_TW: torch.Tensor
    qk_TX: torch.Tensor
    qk_rstd: torch.Tensor | None

    def matrices(self) -> list[torch.Tensor]:
        """Return the memory they lie in."""
        return [self.qkv_TW] if self.qk_rstd is None else [self.qkv_TW, self.qk_TX]


@dataclass
class _Saved:
    """What a forward pass keeps for the way back."""

    rstd1_T: torch.Tensor
    raw_TW: torch.Tensor | None
    qk_rstd: torch.Tensor | None
    graph: AttentionGraph
    low_qkv: torch.Tensor | None
    low_o: torch.Tensor | None
    mlp: MlpSaved


@dataclass(frozen=True)
class _Call:
    """One call of a layer: the shape of its rows, the rotary tables and the attention."""

    num_rows: int
    seq_len: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention: Attention


class DecoderCore(MlpPart):
    """The computation of one layer over packed weights. ``memory`` says what it keeps for the backward pass."""

    def __init__(
        self,
        layer: nn.Module,
        adapters: dict[nn.Module, Adapter],
        memory: Memory | None = None,
        store: MakeStore = DenseStore,
        choices: Choices = DEFAULT,
        dropout: AdapterDropout | None = None,
    ) -> None:
        self.spec: DecoderSpec = read_spec(layer)
        self.memory = memory or Memory()
        self.recompute, self.choices, self.dropout = self.memory.recompute, choices, dropout
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
        self._norm2 = layer.post_attention_layernorm
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
        self.prepare()
        return self.run(x_TD, call, keeps)

    def prepare(self) -> None:
        """Have the stores look for changes of adapters and weights."""
        for store in self.stores:
            store.prepare()

    def run(self, x_TD: torch.Tensor, call: _Call, keeps: bool) -> tuple[torch.Tensor, _Saved | None]:
        """Do what `forward` does with stores that are prepared."""
        x_mid_TD, saved = self._attention_part(x_TD, call, keeps)
        y_TD, mlp = self._mlp(x_mid_TD, x_TD, keeps)
        if saved is not None:
            saved.mlp = mlp
        return y_TD, saved

    def again(self, x_TD: torch.Tensor, call: _Call) -> _Saved:
        """Return what `backward` needs of a layer that kept its input only; the MLP is made again there."""
        x_mid_TD, saved = self._attention_part(x_TD, call, keeps=True)
        assert saved is not None
        saved.mlp = self._mlp_again(x_mid_TD, x_TD)
        return saved

    def _attention_part(self, x_TD: torch.Tensor, call: _Call, keeps: bool) -> tuple[torch.Tensor, _Saved | None]:
        """Return the middle of the residual stream, x not added yet, and what is kept but for the MLP's share."""
        qkv, rstd1_T, low_qkv = self._make_qkv(x_TD, call, None)
        forgets = qkv.matrices() if keeps and not self.policy.keeps_qkv else ()
        graph = AttentionGraph(call.attention, self._heads(qkv, call), self.spec.attention_scale, keeps, forgets)
        raw_TW, qk_rstd = (None, None) if forgets or qkv.qk_rstd is None else (qkv.qkv_TW, qkv.qk_rstd)
        del qkv, forgets
        attended_TX = self._flat(graph.out_BHSE.detach())
        low_o = self.o.low(attended_TX)
        x_mid_TD = self.o.forward(attended_TX, low_o)[:, : self.o.num_out]
        if not keeps:
            return x_mid_TD, None
        return x_mid_TD, _Saved(rstd1_T, raw_TW, qk_rstd, graph, low_qkv, low_o, MlpSaved(x_mid_TD))

    def _make_qkv(
        self, x_TD: torch.Tensor, call: _Call, low_qkv: torch.Tensor | None
    ) -> tuple[_Qkv, torch.Tensor, torch.Tensor | None]:
        """Return queries, keys and values, 1/rms of the norm before them, and the adapters' product, unless given."""
        qkv, num_tokens = self.qkv, x_TD.shape[0]
        x1_TM, x1 = qkv.input_buffer(num_tokens), qkv.room_for_rounded(num_tokens)
        to_TD = x1_TM[:, : qkv.num_in]
        _, rstd1_T = rms_norm(x_TD, self._norm1.weight, self.spec.norm_eps, out_TD=to_TD, rounded=x1)
        low_qkv = qkv.low(x1_TM) if low_qkv is None else low_qkv
        qkv_TW = qkv.forward(x1_TM, low_qkv, x1)[:, : qkv.num_out]
        return _Qkv(qkv_TW, *rotate_qkv(qkv_TW, call.cos, call.sin, self._layout())), rstd1_T, low_qkv

    def _heads(self, qkv: _Qkv, call: _Call) -> list[torch.Tensor]:
        spec = self.spec
        split = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
        parts = [*torch.split(qkv.qk_TX, split, dim=1), qkv.qkv_TW[:, sum(split) :]]
        return [part.view(call.num_rows, call.seq_len, -1, spec.head_dim).transpose(1, 2) for part in parts]

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
        dx_mid_TM, mlp_grads = self._mlp_backward(dy_TD, saved.mlp, wants_mid)
        del saved.mlp
        if dx_mid_TM is None:
            return None, mlp_grads
        dlow_o = self.o.low_grad(dx_mid_TM)
        o_grads = self.o.adapter_grads(self._flat(saved.graph.out_BHSE.detach()), dx_mid_TM, saved.low_o, dlow_o)
        if not wants_attention:
            return None, [*o_grads, *mlp_grads]
        dqkv_TM = self.qkv.output_buffer(dy_TD.shape[0])
        self._attention_backward(self.o.dgrad(dx_mid_TM, dlow_o), dqkv_TM, x_TD, call, saved)
        dx_TD, qkv_grads = self._qkv_backward(dqkv_TM, x_TD, dx_mid_TM[:, : self.o.num_out], saved, wants_dx)
        return dx_TD, [*qkv_grads, *o_grads, *mlp_grads]

    def _attention_backward(
        self, dattended_TX: torch.Tensor, dqkv_TM: torch.Tensor, x_TD: torch.Tensor, call: _Call, saved: _Saved
    ) -> tuple[torch.Tensor, ...]:
        """Write the gradient of the packed projection to ``dqkv_TM``; return those of finished queries and keys."""
        if saved.graph.lacks_heads:
            qkv, _, _ = self._make_qkv(x_TD, call, saved.low_qkv)
            saved.graph.put_back(qkv.matrices())
            saved.raw_TW, saved.qk_rstd = (None if qkv.qk_rstd is None else qkv.qkv_TW), qkv.qk_rstd
            del qkv
        shape = (call.num_rows, call.seq_len, self.spec.num_heads, self.spec.head_dim)
        dq, dk, dv = saved.graph.grads(dattended_TX.view(shape).transpose(1, 2))
        del saved.graph, dattended_TX
        rotate_qkv_backward(
            dq, dk, dv, call.cos, call.sin, self._layout(), dqkv_TM, raw_TW=saved.raw_TW, rstd_TC=saved.qk_rstd
        )
        return dq, dk

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
        ctx.host_copy = core.memory.host.put(x_TD) if core.policy.offloads else None
        y_TD, saved = core.forward(x_TD, call, keeps=core.policy.keeps_layer)
        if ctx.host_copy is None:
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
        x_TD = ctx.saved_tensors[0] if ctx.host_copy is None else ctx.core.memory.host.take(ctx.host_copy)
        saved, ctx.saved, ctx.host_copy = ctx.saved, None, None
        if saved is None:
            saved = ctx.core.again(x_TD, ctx.call)
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
    memory: Memory | None = None,
    store: MakeStore = DenseStore,
    choices: Choices = DEFAULT,
    choose_attention: ChooseAttention = attention_by_mask,
    dropout: AdapterDropout | None = None,
    core: type[DecoderCore] = DecoderCore,
) -> None:
    """Exchange the class of a Hugging Face decoder layer for its fast form, in place.

    ``adapters`` maps linear layers, of this layer or others, to what is on them. ``memory`` is what layers keep for the
    backward pass, one for all layers of a model. ``store`` keeps the base weights, ``choices`` are between ways that
    differ in speed only. ``choose_attention`` is asked in every call. ``dropout`` is
    on the adapters, while the layer is in training mode. ``core`` is another for layers whose own weights learn
    (`trained_layer`).

    Raises:
        UnfitError: the layer computes something that the fast form does not; it is as it was.
    """
    layer.fast_core = core(layer, adapters, memory, store, choices, dropout)  # type: ignore[assignment]
    layer.choose_attention = choose_attention  # type: ignore[assignment]
    layer.graphs = None  # type: ignore[assignment]
    base = type(layer)
    if base not in _FAST_CLASSES:
        _FAST_CLASSES[base] = type(f"Fast{base.__name__}", (FastDecoderLayer, base), {})
    layer.__class__ = _FAST_CLASSES[base]
