"""A frozen input embedding that stays in the host's memory: 1 GB less on the GPU for an 8B model, 2 GB for a 70B.

The layer keeps its name and its place in state dicts. Its weight is a buffer and no parameter, because Transformers
asks the first parameter of a model which device the model is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.kernels.host_rows import gather_rows
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)


class HostEmbedding(nn.Embedding):
    """An embedding whose weight does not follow the model to a GPU. Made by `keep_on_host`, never built."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids ``[...]`` to ``[..., D]`` on their device."""
        return gather_rows(input.flatten(), self.weight).view(*input.shape, -1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HostEmbedding:
        return self


def keep_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Move the input embedding of ``model`` to the host, in place; on a CPU it is there.

    Raises:
        UserError: it is trained, shares its weight with the output head, or is not a plain embedding.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    reasons = {
        "they are trained": embedding.weight.requires_grad,
        "they share one weight with the output head": head is not None and head.weight is embedding.weight,
        f"they are a {type(embedding).__name__}": type(embedding) is not nn.Embedding,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is not None:
        raise UserError(f"`model.embeddings_on_host: true`, but {reason}. Leave `embeddings_on_host` out.")
    if device.type == "cpu":
        logger.info("`model.embeddings_on_host: true` has no effect: the model is on the CPU.")
        return
    host = torch.empty(embedding.weight.shape, dtype=embedding.weight.dtype, pin_memory=True)
    exchange(embedding, host.copy_(embedding.weight.detach()))
    logger.info("Embeddings: in the host's memory (%.2f GiB).", host.numel() * host.element_size() / 2**30)


def exchange(embedding: nn.Embedding, weight_VD: torch.Tensor) -> None:
    """Turn ``embedding`` itself into a `HostEmbedding` with ``weight_VD``."""
    del embedding.weight
    embedding.register_buffer("weight", weight_VD)
    embedding.__class__ = HostEmbedding
