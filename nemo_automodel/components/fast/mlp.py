"""The MLP half of a fast layer, norm to residual, forward and backward, in tiles of tokens.

Every tile is a whole MLP over its tokens: what it keeps is its own, gradients of adapters are summed over the tiles in
order. One tile holds all tokens as a rule; see `policies` for when not.

Shapes as in `decoder_layer`; T are the tokens of a tile, where not all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_automodel.components.fast.choices import Choices
from nemo_automodel.components.fast.policies import POLICIES, Memory, Policy, RoundedHalves
from nemo_automodel.components.fast.spec import DecoderSpec
from nemo_automodel.components.fast.weight_store import WeightStore
from nemo_automodel.kernels.lora import add_update_
from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.swiglu_lora import swiglu_lora, swiglu_lora_backward


@dataclass
class MlpTile:
    """What the MLP keeps for the tokens ``rows``. Without ``rstd_T`` nothing is kept and all of it is made again."""

    rows: slice
    rstd_T: torch.Tensor | None = None
    gate_up: torch.Tensor | RoundedHalves | None = None
    """As a buffer ``[T, M]`` or rounded; None: to be made again."""
    low_gate_up: torch.Tensor | None = None
    low_down: torch.Tensor | None = None

    def of(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the rows of a matrix of all tokens, itself where the tile has all: a view is time, too."""
        return x_TD if self.rows.stop - self.rows.start == len(x_TD) else x_TD[self.rows]


@dataclass
class MlpSaved:
    """What the MLP of a layer keeps."""

    x_mid_TD: torch.Tensor
    """The middle of the residual stream."""
    tiles: list[MlpTile] = field(default_factory=list)
    residual_TD: torch.Tensor | None = None
    """The layer's input, still to be added to ``x_mid_TD`` where all is made again."""


class MlpPart:
    """What `DecoderCore` does between the middle of the residual stream and its end."""

    spec: DecoderSpec
    choices: Choices
    memory: Memory
    recompute: str
    o: WeightStore
    gate_up: WeightStore
    down: WeightStore
    _norm2: Any

    @property
    def policy(self) -> Policy:
        """What is kept."""
        return POLICIES[self.recompute]

    def _mlp(self, x_mid_TD: torch.Tensor, x_TD: torch.Tensor, keeps: bool) -> tuple[torch.Tensor, MlpSaved]:
        """Return the layer's output ``[T, D]`` and what is kept; ``x_TD`` is added to ``x_mid_TD`` in place."""
        saved, tiles = MlpSaved(x_mid_TD), self.memory.tiles.of(len(x_mid_TD), self.recompute)
        y_TD = torch.empty_like(x_TD) if len(tiles) > 1 else None
        for rows in tiles:
            tile = MlpTile(rows)
            y = self._tile_forward(tile, tile.of(x_mid_TD), tile.of(x_TD))
            if y_TD is None:
                y_TD = y
            else:
                y_TD[rows] = y
            if keeps:
                saved.tiles.append(self._reduced(tile))
            del y, tile
        assert y_TD is not None
        return y_TD, saved

    def _mlp_again(self, x_mid_TD: torch.Tensor, x_TD: torch.Tensor) -> MlpSaved:
        """Return what the backward pass needs to make the whole MLP again, tile by tile."""
        tiles = [MlpTile(rows) for rows in self.memory.tiles.of(len(x_mid_TD), self.recompute)]
        return MlpSaved(x_mid_TD, tiles, residual_TD=x_TD)

    def _reduced(self, tile: MlpTile) -> MlpTile:
        """Return the tile with as much of gate and up as the policy keeps."""
        if not self.policy.keeps_gate_up:
            tile.gate_up = None
        elif self.policy.rounds_gate_up:
            assert isinstance(tile.gate_up, torch.Tensor)
            tile.gate_up = RoundedHalves.of(tile.gate_up, self.gate_up.num_out)
        return tile

    def _tile_forward(
        self, tile: MlpTile, x_mid_TD: torch.Tensor, residual_TD: torch.Tensor, wants_output: bool = True
    ) -> torch.Tensor:
        """Fill ``tile`` and return the output of its tokens.

        When a layer is made again nobody asks for its output: a fifth of the products is left out.
        """
        gate_up, down = self.gate_up.from_row(tile.rows.start), self.down.from_row(tile.rows.start)
        gate_up_TM = self._make_gate_up(tile, gate_up, x_mid_TD, residual_TD)
        tile.gate_up = gate_up_TM
        if not (wants_output or down.has_adapters):
            _add_masked(gate_up, gate_up_TM, tile.low_gate_up)
            return x_mid_TD
        h_TM, update = down.input_buffer(len(x_mid_TD)), gate_up.pending(tile.low_gate_up)
        a_RF = down.a_RK if self.choices.swiglu_products else None
        low = swiglu_lora(
            gate_up_TM[:, : gate_up.num_out], h_TM[:, : down.num_in], update, a_RF, down.rank, down.input_mask
        )
        tile.low_down = down.low(h_TM) if low is None else low
        return down.forward_added(x_mid_TD, h_TM, tile.low_down) if wants_output else x_mid_TD

    def _make_gate_up(
        self, tile: MlpTile, gate_up: WeightStore, x_mid_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> torch.Tensor:
        """Return gate and up without `pending`, for the first time or, what ``tile`` knows already left out, again."""
        x2_TM = gate_up.input_buffer(len(x_mid_TD))
        x2, to_TD = gate_up.room_for_rounded(len(x_mid_TD)), x2_TM[:, : gate_up.num_in]
        eps, weight_D = self.spec.norm_eps, self._norm2.weight
        _, rstd_T = rms_norm(x_mid_TD, weight_D, eps, residual_TD=residual_TD, out_TD=to_TD, rounded=x2)
        if tile.rstd_T is None:
            tile.rstd_T, tile.low_gate_up = rstd_T, gate_up.low(x2_TM)
        return gate_up.forward_pending(x2_TM, tile.low_gate_up, x2)

    def _take_gate_up(self, tile: MlpTile, gate_up: WeightStore, saved: MlpSaved) -> torch.Tensor:
        """Return gate and up for the backward pass, any masked update added, and let go of what is kept of them."""
        x_mid_TD = tile.of(saved.x_mid_TD)
        if tile.rstd_T is None:
            assert saved.residual_TD is not None
            self._tile_forward(tile, x_mid_TD, tile.of(saved.residual_TD), wants_output=False)
        kept, tile.gate_up = tile.gate_up, None
        if kept is None:
            gate_up_TM = self._make_gate_up(tile, gate_up, x_mid_TD, None)
            _add_masked(gate_up, gate_up_TM, tile.low_gate_up)
            return gate_up_TM
        return kept if isinstance(kept, torch.Tensor) else kept.write_to(gate_up.output_buffer(len(x_mid_TD)))

    # Backward.

    def _mlp_backward(
        self, dy_TD: torch.Tensor, saved: MlpSaved, wants_mid: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of the middle of the residual stream, in a buffer for `o`, and of the MLP's adapters."""
        wants_input = wants_mid or self.gate_up.has_adapters
        if not (wants_input or self.down.has_adapters):
            return None, []
        # a single tile makes the buffer itself, when less is there
        dx_mid_TM = self.o.output_buffer(len(dy_TD)) if wants_input and len(saved.tiles) > 1 else None
        total: list[torch.Tensor] = []
        while saved.tiles:
            tile = saved.tiles.pop(0)
            to_TM = None if dx_mid_TM is None else tile.of(dx_mid_TM)
            to_TM, grads = self._tile_backward(tile, tile.of(dy_TD), saved, to_TM, wants_input)
            dx_mid_TM, total = to_TM if dx_mid_TM is None else dx_mid_TM, _sum(total, grads)
        return dx_mid_TM if wants_mid else None, total

    def _tile_backward(
        self, tile: MlpTile, dy_TD: torch.Tensor, saved: MlpSaved, dx_mid_TM: torch.Tensor | None, wants_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of a tile's tokens, if wanted, in the buffer given or a new one, and of the adapters."""
        gate_up, down = self.gate_up.from_row(tile.rows.start), self.down.from_row(tile.rows.start)
        gate_up_TM, num_tokens = self._take_gate_up(tile, gate_up, saved), len(dy_TD)
        dy_TM = dy_TD
        if down.margin and self.choices.down_in_depth:
            dy_TM = down.output_buffer(num_tokens)
            dy_TM[:, : down.num_out] = dy_TD
        dlow_down = down.low_grad(dy_TM)
        dh_TF, dh_update = down.dgrad_pending(dy_TM, dlow_down)
        # what B multiplies under a mask is a product of its own: three masks in one kernel do not fit its registers
        b_GR = gate_up.b_NR if self.choices.swiglu_products and gate_up.output_mask is None else None
        # under a mask gate and up hold their update already
        update = gate_up.pending(tile.low_gate_up) if gate_up.output_mask is None else None
        gate_up_TG = gate_up_TM[:, : gate_up.num_out]
        dlow_gate_up = swiglu_lora_backward(dh_TF, gate_up_TG, update, dh_update, b_GR, gate_up.rank_parts)
        # now dh_TF holds the SwiGLU product, gate_up_TG its gradients
        down_grads = down.adapter_grads(dh_TF, dy_TM, tile.low_down, dlow_down)
        del dh_TF, dy_TM
        if not wants_input:
            return None, down_grads
        dlow_gate_up = gate_up.low_grad(gate_up_TM) if dlow_gate_up is None else dlow_gate_up
        dx2_TD = gate_up.dgrad(gate_up_TM, dlow_gate_up)
        dx_mid_TM = self.o.output_buffer(num_tokens) if dx_mid_TM is None else dx_mid_TM
        x2_TD = torch.empty_like(dx2_TD)
        assert tile.rstd_T is not None
        rms_norm_backward(
            dx2_TD,
            tile.of(saved.x_mid_TD),
            self._norm2.weight,
            tile.rstd_T,
            residual_grad_TD=dy_TD,
            out_TD=dx_mid_TM[:, : self.o.num_out],
            y_TD=x2_TD if gate_up.has_adapters else None,
        )
        grads = gate_up.adapter_grads(x2_TD, gate_up_TM, tile.low_gate_up, dlow_gate_up)
        return dx_mid_TM, [*grads, *down_grads]


def _add_masked(gate_up: WeightStore, gate_up_TM: torch.Tensor, low_TR: torch.Tensor | None) -> None:
    """Add the update that lies under a mask, if there is one, as SwiGLU's forward pass does."""
    update = gate_up.pending(low_TR) if gate_up.output_mask is not None else None
    if update is not None:
        add_update_(gate_up_TM[:, : gate_up.num_out], update)


def _sum(total: list[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add the gradients of a tile to those of the tiles before it, in place."""
    for grad, more in zip(total, grads, strict=bool(total)):
        grad.add_(more)
    return total or list(grads)
