"""A decoder layer whose own weights learn: the forward pass of `decoder_layer`, and a backward pass that trains it all.

`TrainedStore` is a packed matrix without adapters of which Hugging Face's parameters are the rows. Their gradients are
rows of one matrix too, made by one product a group that adds to what earlier micro-batches left
(`kernels/weight_grad`); nothing about a parameter or its ``grad`` is unusual to an optimizer, to clipping or to a
checkpoint. The optimizer writes into the packed matrix, so nothing is copied after a step.

What a product for a weight needs beyond the gradients is the layer's input to it: norm outputs and the SwiGLU product
are made again by the kernels that pass over their inputs anyway, so as much is kept as for adapters: 92 KB a token on
an 8B model. Any weight may be frozen, and what nobody needs is not computed.

Shapes as in `decoder_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.decoder_layer import DecoderCore, MakeStore, _Call, _Saved
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.mlp import MlpSaved, MlpTile
from nemo_automodel.components.fast.names import Adapter
from nemo_automodel.components.fast.policies import Memory
from nemo_automodel.components.fast.weight_store import DenseStore
from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.norm_grad import head_norm_grads, norm_weight_grad
from nemo_automodel.kernels.swiglu_lora import swiglu_lora_backward
from nemo_automodel.kernels.weight_grad import add_grad, add_product_grad, tell_complete


class TrainedStore(DenseStore):
    """Weights in the dtype of the model that learn, all or some of them."""

    def trained(self) -> list[torch.Tensor]:
        """Return the weights and biases that learn."""
        both = [(slot.linear.weight, slot.linear.bias) for slot in self.slots]
        return [tensor for pair in both for tensor in pair if tensor is not None and tensor.requires_grad]

    @property
    def trains_weights(self) -> bool:
        """Whether any weight learns."""
        return any(slot.linear.weight.requires_grad for slot in self.slots)

    def trained_together(self) -> list[list[torch.Tensor]]:
        """Return the weights of which all learn, whose gradients are one matrix, in one list, if they do."""
        weights = [slot.linear.weight for slot in self.slots]
        return [weights] if all(weight.requires_grad for weight in weights) else []

    def add_grads(self, x_TK: torch.Tensor | None, dy_TN: torch.Tensor) -> None:
        """Add to the gradients of what learns: weights, for which the inputs must be given, and biases."""
        weights = [slot.linear.weight for slot in self.slots]
        if x_TK is not None and all(weight.requires_grad for weight in weights):
            self._add_product(weights, dy_TN, x_TK)
        elif x_TK is not None:
            for slot, rows, _ in self._places:
                if slot.linear.weight.requires_grad:
                    self._add_product([slot.linear.weight], dy_TN[:, rows], x_TK)
        if self.bias_N is None:
            return
        math_dtype = torch.promote_types(dy_TN.dtype, torch.float32)
        for slot, rows, _ in self._places:
            if slot.linear.bias.requires_grad:
                add_grad([slot.linear.bias], dy_TN[:, rows].sum(0, dtype=math_dtype))

    def _add_product(self, weights: list[torch.Tensor], dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        """Add dyᵀ·x to the gradients of ``weights``, whose outputs lie side by side in ``dy_TN``."""
        add_product_grad(weights, dy_TN, x_TK)


class TrainedCore(DecoderCore):
    """`DecoderCore` for a layer without adapters whose weights learn."""

    qkv: TrainedStore
    o: TrainedStore
    gate_up: TrainedStore
    down: TrainedStore

    def __init__(
        self,
        layer: nn.Module,
        adapters: dict[nn.Module, Adapter],
        memory: Memory | None = None,
        store: MakeStore = TrainedStore,
        choices: Choices = DEFAULT,
        dropout: AdapterDropout | None = None,
    ) -> None:
        assert not adapters, "a layer learns by adapters or by its own weights"
        super().__init__(layer, adapters, memory, store, choices, dropout)

    def parameters(self) -> list[torch.Tensor]:
        """Return all that learns. `backward` adds to their gradients itself and returns none."""
        stored = [tensor for store in (self.qkv, self.o, self.gate_up, self.down) for tensor in store.trained()]
        norms = (self._norm1, self._norm2, *(self._head_norms or ()))
        return [*stored, *(norm.weight for norm in norms if norm.weight.requires_grad)]

    def trained_together(self) -> list[list[torch.Tensor]]:
        """Return the weights of each store whose weights all learn."""
        return [group for store in (self.qkv, self.o, self.gate_up, self.down) for group in store.trained_together()]

    def backward(
        self, dy_TD: torch.Tensor, x_TD: torch.Tensor, call: _Call, saved: _Saved, wants_dx: bool
    ) -> tuple[torch.Tensor | None, list[Any]]:
        """Return the gradient of the input (None unless wanted) and a None for each of `parameters`."""
        parameters = self.parameters()
        dx_TD = self._train(dy_TD, x_TD, call, saved, wants_dx)
        tell_complete(parameters)  # not before: who is told may change the weights
        return dx_TD, [None] * len(parameters)

    def _train(
        self, dy_TD: torch.Tensor, x_TD: torch.Tensor, call: _Call, saved: _Saved, wants_dx: bool
    ) -> torch.Tensor | None:
        """Add to the gradients of all that learns; return that of the input."""
        trains_head_norms = any(norm.weight.requires_grad for norm in self._head_norms or ())
        wants_qkv = wants_dx or self._norm1.weight.requires_grad or trains_head_norms or bool(self.qkv.trained())
        wants_mid = wants_qkv or self.o.trains_weights
        dx_mid_TD = self._train_mlp(dy_TD, saved.mlp, wants_mid)
        del saved.mlp
        if dx_mid_TD is None:
            return None
        if self.o.trains_weights:
            self.o.add_grads(self._flat(saved.graph.out_BHSE.detach()), dx_mid_TD)
        if not wants_qkv:
            return None
        dqkv_TW = self.qkv.output_buffer(dy_TD.shape[0])
        dq, dk = self._attention_backward(self.o.dgrad(dx_mid_TD, None), dqkv_TW, x_TD, call, saved)
        if trains_head_norms:
            assert saved.raw_TW is not None
            assert saved.qk_rstd is not None
            grads = head_norm_grads(dq, dk, call.cos, call.sin, self._layout(), saved.raw_TW, saved.qk_rstd)
            self._add_norm_grads(self._head_norms or (), grads)
        saved.raw_TW = None
        del dq, dk
        return self._train_qkv(dqkv_TW, x_TD, dx_mid_TD, saved, wants_dx)

    def _train_mlp(self, dy_TD: torch.Tensor, saved: MlpSaved, wants_mid: bool) -> torch.Tensor | None:
        """Add to the gradients of the MLP; return that of the middle of the residual stream, None unless wanted."""
        wants_input = wants_mid or self._norm2.weight.requires_grad
        if not (wants_input or self.gate_up.trains_weights or self.down.trains_weights):
            return None
        dx_mid_TD = None
        if wants_input and len(saved.tiles) > 1:
            dx_mid_TD = torch.empty(dy_TD.shape, dtype=dy_TD.dtype, device=dy_TD.device)
        while saved.tiles:
            tile = saved.tiles.pop(0)
            dx_TD = self._train_tile(tile, tile.of(dy_TD), saved, wants_input)
            if dx_mid_TD is None:
                dx_mid_TD = dx_TD
            elif dx_TD is not None:
                dx_mid_TD[tile.rows] = dx_TD
        return dx_mid_TD if wants_mid else None

    def _train_tile(
        self, tile: MlpTile, dy_TD: torch.Tensor, saved: MlpSaved, wants_input: bool
    ) -> torch.Tensor | None:
        """Add to the gradients of the MLP for a tile's tokens; return those of its inputs."""
        gate_up, down, norm = self.gate_up, self.down, self._norm2
        gate_up_TG = self._take_gate_up(tile, gate_up, saved)
        dh_TF = down.dgrad(dy_TD, None)
        swiglu_lora_backward(dh_TF, gate_up_TG, None, None, None, gate_up.rank_parts)
        # now dh_TF holds the SwiGLU product, gate_up_TG its gradients
        if down.trains_weights:
            down.add_grads(dh_TF, dy_TD)
        del dh_TF
        if not (wants_input or gate_up.trains_weights):
            return None
        x_mid_TD, rstd_T = tile.of(saved.x_mid_TD), tile.rstd_T
        assert rstd_T is not None
        x2_TD = torch.empty_like(x_mid_TD, memory_format=torch.contiguous_format) if gate_up.trains_weights else None
        dx_mid_TD = None
        if wants_input:
            dx2_TD = gate_up.dgrad(gate_up_TG, None)
            if norm.weight.requires_grad:
                self._add_norm_grads([norm], [norm_weight_grad(dx2_TD, x_mid_TD, rstd_T)])
            dx_mid_TD = rms_norm_backward(
                dx2_TD, x_mid_TD, norm.weight, rstd_T, residual_grad_TD=dy_TD, out_TD=dx2_TD, y_TD=x2_TD
            )
        elif x2_TD is not None:
            rms_norm(x_mid_TD, norm.weight, self.spec.norm_eps, out_TD=x2_TD)
        if x2_TD is not None:
            gate_up.add_grads(x2_TD, gate_up_TG)
        return dx_mid_TD

    def _train_qkv(
        self, dqkv_TW: torch.Tensor, x_TD: torch.Tensor, dx_mid_TD: torch.Tensor, saved: _Saved, wants_dx: bool
    ) -> torch.Tensor | None:
        qkv, norm = self.qkv, self._norm1
        x1_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if qkv.trains_weights else None
        dx_TD = None
        if wants_dx or norm.weight.requires_grad:
            dx_TD = qkv.dgrad(dqkv_TW, None)
            if norm.weight.requires_grad:
                self._add_norm_grads([norm], [norm_weight_grad(dx_TD, x_TD, saved.rstd1_T)])
        if dx_TD is not None and wants_dx:
            rms_norm_backward(
                dx_TD, x_TD, norm.weight, saved.rstd1_T, residual_grad_TD=dx_mid_TD, out_TD=dx_TD, y_TD=x1_TD
            )
        elif x1_TD is not None:
            rms_norm(x_TD, norm.weight, self.spec.norm_eps, out_TD=x1_TD)
        qkv.add_grads(x1_TD, dqkv_TW)
        return dx_TD if wants_dx else None

    @staticmethod
    def _add_norm_grads(norms: Any, grads: Any) -> None:
        for norm, grad in zip(norms, grads, strict=True):
            if norm.weight.requires_grad:
                add_grad([norm.weight], grad)
