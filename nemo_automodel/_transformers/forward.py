"""One micro-batch through a Hugging Face model: from a batch of token ids to a scalar loss.

The output head is the widest layer of a language model, and most positions of a fine-tuning row carry no label. A hook
in front of the head keeps only the labelled rows, so the logits are ``[1, N, V]`` for N labels and not ``[B, S, V]``.
Whatever the model does after the head (softcapping, scaling) still happens, because the rows are taken before it.

Labels are already shifted and never reach the model: Transformers would shift them again.

Shapes: B rows, S positions, N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers import frozen_head
from nemo_automodel._transformers.causal_attention import MASKLESS_SDPA
from nemo_automodel._transformers.packing_masks import (
    BatchFiller,
    Machine,
    build_packed_masks,
    check_can_isolate,
    choose_backend,
    is_plain_causal,
    switch_attention,
)
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

LossFn = Callable[..., torch.Tensor]

logger = logging.getLogger(__name__)


class LabelledForward:
    """Computes losses with a model. Hand it CPU batches: then the labels are found without waiting for the device.

    ``packed_attention`` names the kernel of packed rows: ``varlen``, ``flex``, ``dense``, or ``auto`` for the first of
    them that can run. ``joins_frozen_head`` computes the head, learning or not, and the loss in one step if possible.
    """

    def __init__(self, model: PreTrainedModel, packed_attention: str = "auto", joins_frozen_head: bool = True) -> None:
        self.model = model
        self.packed_attention = packed_attention
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
        self._num_head_rows = 1
        """Rows that go through the head when it is bypassed; none where the head and the loss are one step."""
        self._backends: dict[bool, str] = {}
        """The kernel of packed rows, without and with shared prefixes; chosen when the first such batch comes."""
        self._filled = BatchFiller()
        self._is_head_proven = False
        self._joins_head: bool | None = None if joins_frozen_head else False
        """Whether the head and a plain loss are one step; ``None``: to be found out."""
        self._is_plain_causal = is_plain_causal(model)

    def forget_sizes(self) -> None:
        """Fill up no batch to the size of an earlier one: that may have been too large for the device."""
        self._filled = BatchFiller()

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
        if "seq_lens" in batch:
            self._backend_of(batch)  # before the head is asked: the attention that was asked for may not run here
        plain = self._plain_loss(loss_fn)
        # a loss of the user's own may leave the attribute out
        wants_hidden = plain is not None or getattr(loss_fn, "needs_hidden_states", False)
        if wants_hidden and plain is None:
            self._check_head()
        self._rows, self._bypasses_head = rows.to(device, non_blocking=True), wants_hidden
        self._num_head_rows = 1 if plain is None else 0
        try:
            with self.attention_of(batch):
                logits = self.model(**self.model_inputs(batch), use_cache=False).logits
            hidden_ND = self._hidden_ND
        finally:
            self._rows, self._hidden_ND = None, None
        if not wants_hidden:
            return loss_fn(logits=logits.flatten(0, 1), labels=labels_N, num_label_tokens=num_label_tokens)
        assert hidden_ND is not None, "the model did not call its output head"
        if plain is not None:
            return frozen_head.loss_of_rows(self._head, hidden_ND, labels_N, num_label_tokens, plain)
        if not self._is_head_proven:
            self._prove_head(hidden_ND[:1], logits.flatten(0, 1), loss_fn)
        return loss_fn(
            hidden_states=hidden_ND, labels=labels_N, lm_weight=self._head.weight, num_label_tokens=num_label_tokens
        )

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what the model is called with, on its device: token ids, and the mask of packed or padded rows.

        There may be more rows than in ``batch``, after them (see ``BatchFiller``).
        """
        device = self.model.device
        if "seq_lens" in batch and self._backend_of(batch) == "flex":
            batch = self._filled.fill(batch)
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"].to(device, non_blocking=True)}
        if "seq_lens" in batch:
            inputs["position_ids"] = batch["position_ids"].to(device, non_blocking=True)
            inputs["attention_mask"] = build_packed_masks(self.model, batch, self._backend_of(batch))
        elif "attention_mask" in batch and not self._needs_no_mask(batch):
            inputs["attention_mask"] = batch["attention_mask"].to(device, non_blocking=True)
        return inputs

    def _backend_of(self, batch: Batch) -> str:
        """Return the kernel of packed rows, and switch the model to it when the first such batch comes."""
        has_branches = "branch_ids" in batch
        if has_branches not in self._backends:
            check_can_isolate(self.model, batch["input_ids"].shape[1])
            device = self.model.device
            is_cast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if is_cast else self.model.dtype
            backend, reason = choose_backend(self.model, self.packed_attention, Machine.of(device), dtype, has_branches)
            logger.info("Attention of packed rows: %s (%s).", backend, reason)
            switch_attention(self.model, backend)
            self._backends[has_branches] = backend
        return self._backends[has_branches]

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
            hidden_ND = hidden_ND[: self._num_head_rows].detach()
        return (hidden_ND.unsqueeze(0),)

    def _plain_loss(self, loss_fn: LossFn) -> frozen_head.PlainLoss | None:
        """Return a loss that is computed together with the head, None where it is computed from logits or by itself."""
        plain = frozen_head.as_plain_loss(loss_fn)
        if plain is None or self._joins_head is False:
            return None
        if self._joins_head is None:
            reason = frozen_head.obstacle(self.model, self._head)
            if reason is None and not frozen_head.explains_two_tokens(self.model, self._head, self._last_row):
                reason = f"{type(self.model).__name__} changes its logits after the head"
            self._joins_head = reason is None
            logger.info("Loss: %s.", self._name_of_joined_head() if reason is None else f"on logits, {reason}")
        return plain if self._joins_head else None

    def _name_of_joined_head(self) -> str:
        return f"in one step with the {'trained' if self._head.weight.requires_grad else 'frozen'} output head"

    def _last_row(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states and logits of the last of one row of tokens, ``[1, D]`` and ``[1, V]``."""
        self._rows, self._bypasses_head = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device), True
        self._num_head_rows = 1
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            hidden_1D = self._hidden_ND
        finally:
            self._rows, self._hidden_ND = None, None
        assert hidden_1D is not None, "the model did not call its output head"
        return hidden_1D, logits.flatten(0, 1)

    def _check_head(self) -> None:
        if not frozen_head.is_one_matrix(self._head):
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
        weight: Any = self._head.weight
        if cap != softcap or not frozen_head.weight_explains(weight, hidden_1D, logits_1V, softcap):
            remedy = f"Set `loss_fn.logit_softcapping: {cap}`, or use" if cap != softcap else "Use"
            raise UserError(
                f"FusedLinearCrossEntropy reads the weight of the output head, but {type(self.model).__name__} changes "
                f"its logits after the head. {remedy} nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy."
            )
        self._is_head_proven = True
