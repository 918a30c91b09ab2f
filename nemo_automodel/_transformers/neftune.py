"""NEFTune: noise on the input embeddings while a model trains (Jain et al. 2023), against learning answers by heart.

Every number of an embedded row gets uniform noise of at most ``alpha / √(S·D)``, S positions of the row, padding and
packed neighbours included, and D its width, so the noise of a whole row has the same expected length whatever its size.
It is drawn on the device from torch's generator, so a resumed run draws the same. Evaluation and generation see none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def add_embedding_noise(model: PreTrainedModel, alpha: float) -> None:
    """Have every training pass of ``model`` add noise to its embedded tokens, from now on."""

    def add(module: torch.nn.Module, args: tuple[Any, ...], embedded_BSD: torch.Tensor) -> torch.Tensor:
        if not (module.training and torch.is_grad_enabled()):
            return embedded_BSD
        limit = alpha / (embedded_BSD.shape[-2] * embedded_BSD.shape[-1]) ** 0.5
        return embedded_BSD + torch.empty_like(embedded_BSD, requires_grad=False).uniform_(-limit, limit)

    model.get_input_embeddings().register_forward_hook(add)
