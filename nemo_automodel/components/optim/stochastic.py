"""AdamW for weights in bfloat16 that rounds stochastically, of torchao.

An update is computed in fp32 and rounded up or down at random, with probabilities that make the mean exact: a hundred
updates of a hundredth of the step to the next bfloat16 number move a weight by that step, where rounding to the nearest
moves it by nothing. No finer copy of the weights is kept. The price is noise of less than one such step in every
weight, and torch.compile at the first step, a few seconds for every shape of weight (g++ on a CPU).

Random numbers are torch's, so a resumed run goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nemo_automodel.shared.imports import require

_PURPOSE = "Stochastic rounding"


def adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """Return AdamW with moments in the dtype of the weights: 8 bytes a bfloat16 weight with its gradient.

    Raises:
        UserError: torchao is not installed.
    """
    library = require("torchao.optim", _PURPOSE)
    optimizer: torch.optim.Optimizer = library._AdamW(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bf16_stochastic_round=True
    )
    return optimizer


def adamw8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    block_size: int = 256,
) -> torch.optim.Optimizer:
    """Return AdamW with moments in 8 bits, a scale for ``block_size`` of them: 6 bytes a weight with its gradient.

    Raises:
        UserError: torchao is not installed.
    """
    library = require("torchao.optim", _PURPOSE)
    optimizer: torch.optim.Optimizer = library.AdamW8bit(
        params,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        block_size=block_size,
        bf16_stochastic_round=True,
    )
    return optimizer
