"""All weights learning in 8 bits, in models without fast decoder layers: linear layers exchanged one by one.

Every `nn.Linear` but the output head multiplies as the fast layers do (`components/fast/fp8_trained`), so any family
can be trained so. Inputs are rounded in passes of their own here, and layers that share an input round it each for
itself. Experts whose weights are three-dimensional are no linear layers and stay as they are.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers.fp8_base import Fp8Plan, check_filters, odd_side
from nemo_automodel.components.fast.fp8_trained import Fp8TrainedLinear, Fp8TrainedStore
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)


def train_linears_in_fp8(model: PreTrainedModel, plan: Fp8Plan) -> None:
    """Exchange the linear layers of a model on its device, and log how many.

    Raises:
        UserError: a filter that matches nothing, nothing left to multiply in 8 bits, or weights of a dtype for which
            the GPU has no such product.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    check_filters(plan.filter_fqns, list(linears))
    if not plan.scheme.emulate and model.dtype != torch.bfloat16:
        raise UserError(
            f"`fp8.enabled: true` needs weights in bfloat16, but they are {dtype_name(model.dtype)}. "
            "Set `model.torch_dtype: bfloat16`."
        )
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    downs = [name for name in linears if name.endswith("down_proj")]
    kept = {}
    for name, linear in linears.items():
        if linear is head:
            kept[name] = "the output head"
        elif type(linear) is not nn.Linear:
            kept[name] = f"a {type(linear).__name__}"
        elif any(word in name for word in plan.filter_fqns):
            kept[name] = "fp8.filter_fqns"
        elif plan.keeps_first_last_down and name in (downs[:1] + downs[-1:]):
            kept[name] = "fp8.first_last_down_proj_bf16"
        elif (odd := odd_side(linear.weight.shape)) is not None:
            kept[name] = odd
    if len(kept) == len(linears):
        reason = next(iter(kept.values()), "there is no linear layer")
        raise UserError(f"`fp8.enabled: true` leaves no matrix in 8 bits ({reason}). Set it to false.")
    store = Fp8TrainedStore.under(plan.scheme)
    for name, linear in linears.items():
        if name not in kept:
            Fp8TrainedLinear.attach(linear, store)
    rest = "".join(f"; as it is: `{name}`, {reason}" for name, reason in list(kept.items())[:1])
    others = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
    count = len(linears) - len(kept)
    logger.info("%s: %d of %d linear layers in 8 bits%s%s.", plan.title, count, len(linears), rest, others)
