"""One micro-batch through a Hugging Face model: from a batch of token ids to a scalar loss.

The output head is the widest layer of a language model, and most positions of a fine-tuning row carry no label. A hook
in front of the head keeps only the labelled rows, so the logits are ``[1, N, V]`` for N labels and not ``[B, S, V]``.
Whatever the model does after the head (softcapping, scaling) still happens, because the rows are taken before it.

Labels are already shifted and never reach the model: Transformers would shift them again.

Shapes: B rows, S positions, N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers.causal_attention import MASKLESS_SDPA
from nemo_automodel._transformers.packing_masks import (
    build_packed_masks,
    check_can_isolate,
    choose_packing_attention,
    is_plain_causal,
)
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

LossFn = Callable[..., torch.Tensor]


class LabelledForward:
    """Computes losses with a model. Hand it CPU batches: then the labels are found without waiting for the device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            raise UserError(
                f"{type(model).__name__} has no output head over its vocabulary, so it cannot predict the next token. "
                "Use a causal language model."
            )
        self._head: nn.Module = head
        self._head.register_forward_pre_hook(self._keep_labelled_rows)
        self._rows: torch.Tensor | None = None
        self._hidden_ND: torch.Tensor | None = None
        self._bypasses_head = False
        self._packing_attention: str | None = None
        self._is_head_proven = False
        self._is_plain_causal = is_plain_causal(model)

    def loss(self, batch: Batch, loss_fn: LossFn, num_label_tokens: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss of one micro-batch as a scalar on the model's device.

        ``num_label_tokens`` counts the labels of the whole optimizer step; ``None`` gives the plain sum. A batch
        without a label gives 0 that still reaches the graph: one ignored row goes through the head.

        Raises:
            UserError: the loss wants hidden states and the model's head is more than one matrix, or the rows are packed
                and the model cannot keep documents apart.
        """
        labels = batch["labels"].flatten()
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if rows.numel() == 0:
            rows = rows.new_zeros(1)
        device = self.model.device
        labels_N = labels[rows].to(device, non_blocking=True)
        # a loss of the user's own may leave the attribute out
        wants_hidden = getattr(loss_fn, "needs_hidden_states", False)
        if wants_hidden:
            self._check_head()
        self._rows, self._bypasses_head = rows.to(device, non_blocking=True), wants_hidden
        try:
            with self.attention_of(batch):
                logits = self.model(**self.model_inputs(batch), use_cache=False).logits
            hidden_ND = self._hidden_ND
        finally:
            self._rows, self._hidden_ND = None, None
        if not wants_hidden:
            return loss_fn(logits=logits.flatten(0, 1), labels=labels_N, num_label_tokens=num_label_tokens)
        assert hidden_ND is not None, "the model did not call its output head"
        if not self._is_head_proven:
            self._prove_head(hidden_ND[:1], logits.flatten(0, 1), loss_fn)
        return loss_fn(
            hidden_states=hidden_ND, labels=labels_N, lm_weight=self._head.weight, num_label_tokens=num_label_tokens
        )

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what the model is called with, on its device: token ids, and the mask of packed or padded rows."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"].to(device, non_blocking=True)}
        if "seq_lens" in batch:
            if self._packing_attention is None:
                check_can_isolate(self.model)
                self._packing_attention = choose_packing_attention(self.model)
            inputs["position_ids"] = batch["position_ids"].to(device, non_blocking=True)
            inputs["attention_mask"] = build_packed_masks(
                self.model, batch["seq_lens"], batch["input_ids"].shape[1], self._packing_attention
            )
        elif "attention_mask" in batch and not self._needs_no_mask(batch):
            inputs["attention_mask"] = batch["attention_mask"].to(device, non_blocking=True)
        return inputs

    def _needs_no_mask(self, batch: Batch) -> bool:
        """Tell whether causality alone keeps tokens from seeing padding: it does when all padding is at the end."""
        if not self._is_plain_causal or "seq_lens" in batch:
            return False
        mask = batch.get("attention_mask")
        return mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())

    @contextmanager
    def attention_of(self, batch: Batch) -> Iterator[None]:
        """Run unpacked rows without a mask where none is needed.

        Transformers would look at every mask, or at every row's positions, to find out whether it can do without, and
        each look waits for the device. Whoever runs a backward pass that recomputes layers does it in here as well,
        so that they find the same attention.
        """
        if not self._needs_no_mask(batch):
            yield
            return
        config = self.model.config
        usual = config._attn_implementation
        config._attn_implementation = MASKLESS_SDPA
        try:
            yield
        finally:
            config._attn_implementation = usual

    def _keep_labelled_rows(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._rows is None:
            return None
        hidden_ND = args[0].flatten(0, -2).index_select(0, self._rows)
        if self._bypasses_head:
            self._hidden_ND = hidden_ND
            hidden_ND = hidden_ND[:1].detach()
        return (hidden_ND.unsqueeze(0),)

    def _check_head(self) -> None:
        if type(self._head) is not nn.Linear or self._head.bias is not None:
            raise UserError(
                "FusedLinearCrossEntropy reads the weight of a plain output head, but the head of this model has a "
                "bias or an adapter. Use nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy."
            )

    def _prove_head(self, hidden_1D: torch.Tensor, logits_1V: torch.Tensor, loss_fn: LossFn) -> None:
        """Compare one row of the model's logits with the weight alone, once: scaling after the head shows here.

        A softcap hardly moves small logits, so the configuration is asked for it as well.
        """
        softcap = getattr(loss_fn, "logit_softcapping", 0)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None) or 0
        with torch.no_grad():
            expected_1V = nn.functional.linear(hidden_1D, self._head.weight)  # type: ignore[arg-type]
            tolerance = 1e-4 if expected_1V.dtype == torch.float32 else 2e-2
            expected_1V = expected_1V.float()
            if softcap:
                expected_1V = softcap * torch.tanh(expected_1V / softcap)
        if cap != softcap or not torch.allclose(logits_1V.float(), expected_1V, rtol=tolerance, atol=tolerance):
            remedy = f"Set `loss_fn.logit_softcapping: {cap}`, or use" if cap != softcap else "Use"
            raise UserError(
                f"FusedLinearCrossEntropy reads the weight of the output head, but {type(self.model).__name__} changes "
                f"its logits after the head. {remedy} nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy."
            )
        self._is_head_proven = True
