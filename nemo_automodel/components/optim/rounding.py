"""Which updates 16-bit weights would swallow: a warning that counts before it warns.

An update of Adam is about as large as the learning rate, whatever the gradient is. A weight w in bfloat16 has its next
neighbour 2^(e-7) away, with 2^e ≤ |w| < 2^(e+1), and an update of less than half of that is rounded away, every time:
below a learning rate of 3e-5 a weight of 0.01 stays where it is for ever. So the share of weights that cannot move is
the share of those that large, and it is counted on a sample of every parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from nemo_automodel.shared.dtypes import dtype_name

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.1
"""Of weights that cannot move; fewer are not worth a warning, as in norms, whose weights are near 1 from the start."""
_SAMPLE = 1 << 14
_PLAIN = ("torch.optim", "bitsandbytes.optim")
"""Where optimizers round to the nearest and keep no finer copy."""


def warn_of_vanishing_updates(
    optimizer: torch.optim.Optimizer, trainable: Sequence[tuple[str, torch.nn.Parameter]]
) -> None:
    """Warn if an update of Adam or Lion as large as the learning rate leaves many of the 16-bit weights as they are.

    Optimizers of torch and bitsandbytes are looked at; what others do with small updates is theirs to know.
    """
    kind = type(optimizer).__name__
    low = [p for _, p in trainable if p.dtype in (torch.bfloat16, torch.float16)]
    if not low or not type(optimizer).__module__.startswith(_PLAIN) or not any(x in kind for x in ("Adam", "Lion")):
        return
    lr = float(optimizer.defaults["lr"])
    share = immovable_share(low, lr)
    if share < LEAST_SHARE:
        return
    logger.warning(
        "%.0f %% of the %s weights that learn are so large that an update of the learning rate, %g, is less than half "
        "of the step to the next number and is rounded away, and %s keeps no finer copy. Set `optimizer._target_: "
        "flash_adamw` (24-bit copy) or adamw_sr (stochastic rounding); for LoRA `peft.lora_dtype: float32`.",
        100 * share,
        dtype_name(low[0].dtype),
        lr,
        kind,
    )


def immovable_share(parameters: Sequence[torch.Tensor], lr: float) -> float:
    """Return the share of weights to which adding ``lr`` and rounding to the nearest changes nothing."""
    shares, counts = [], [p.numel() for p in parameters]
    for parameter in parameters:
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)]
        moved = (sample.float() - sample.float().sign() * lr).to(sample.dtype)
        shares.append((moved == sample).float().mean())
    weights = torch.tensor(counts, dtype=torch.float64)
    return float((torch.stack(shares).double().cpu() * weights).sum() / weights.sum())
