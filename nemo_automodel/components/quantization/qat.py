"""Quantisation-aware training: weights learn under the rounding that they will have when they are quantised afterwards.

Every forward pass rounds weights and, where the scheme says so, activations to a few bits and back; the gradient passes
through the rounding as if it were not there (Bengio et al. 2013). The weights themselves stay in 16 or 32 bits, and so
do checkpoints: quantise those with the same scheme. The rounding is torchao's, so what is trained for is exactly what
its conversion does.

The price is a pass over all weights in every micro-batch and Transformers' own layers.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from nemo_automodel.components.quantization.config import QATConfig
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require

logger = logging.getLogger(__name__)

_PURPOSE = "`qat`"


def create_quantizer(cfg: QATConfig) -> Any:
    """Return torchao's quantizer of a scheme.

    Raises:
        UserError: torchao is not installed.
    """
    library = require("torchao.quantization.qat", _PURPOSE)
    keywords: dict[str, Any] = {"groupsize": cfg.groupsize}
    for key, value in (("precision", cfg.precision), ("scales_precision", cfg.scales_precision)):
        if value is not None:
            keywords[key] = parse_dtype(value, f"qat.qat_config.{key}")
    if cfg.quantizer_type == "int4_weight_only":
        return library.Int4WeightOnlyQATQuantizer(inner_k_tiles=cfg.inner_k_tiles, **keywords)
    return library.Int8DynActInt4WeightQATQuantizer(padding_allowed=cfg.padding_allowed, **keywords)


def fake_quantize(model: nn.Module, quantizer: Any) -> None:
    """Have the linear layers of ``model`` round, and log how many; names and weights stay.

    ``quantizer`` is a `QATConfig` or a quantizer of torchao's: anything with ``prepare(model)``.

    Raises:
        UserError: torchao is not installed, or a layer does not fit the scheme, or none does.
    """
    quantizer = create_quantizer(quantizer) if isinstance(quantizer, QATConfig) else quantizer
    if not callable(getattr(quantizer, "prepare", None)):
        raise UserError(
            f"`qat`: a {type(quantizer).__name__} cannot prepare a model. Use `qat_config`, or a quantizer such as "
            "torchao.quantization.qat.Int8DynActInt4WeightQATQuantizer."
        )
    kind = type(quantizer).__name__
    weights = dict(model.named_parameters())
    linears = {name: (module.in_features, module.bias) for name, module in _linears(model).items()}
    try:
        quantizer.prepare(model)
    except (ValueError, AssertionError) as error:  # each scheme has its own way to say no
        raise UserError(
            f"`qat`: {kind} refuses the model: {' '.join(str(error).split())}. Its layers have "
            f"{', '.join(map(str, sorted({size for size, _ in linears.values()})))} inputs; the group size must divide "
            "all of them, and for int4_weight_only 16 times `inner_k_tiles` as well. Lower `groupsize` or "
            "`inner_k_tiles`."
        ) from error
    _give_back_shapes(model, weights)
    for name, parameter in model.named_parameters():
        assert parameter is weights[name], f"{name} is another parameter after {kind}"
    found = rounding_layers(model)
    if not found:
        raise UserError(
            f"`qat`: {kind} found no linear layer that it can round, because the group size must divide a layer's "
            f"inputs, here {', '.join(map(str, sorted({size for size, _ in linears.values()})))}. Lower `groupsize`."
        )
    left = [name for name in linears if name not in found]
    rest = f"; as they are: {len(left)}, the first is `{left[0]}`" if left else ""
    logger.info("Fake quantisation: %d of %d linear layers (%s)%s.", len(found), len(linears), kind, rest)


def _give_back_shapes(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Put weights that are shapes alone, on the meta device, back into layers: torchao makes new ones there."""
    for name, layer in rounding_layers(model).items():
        for key, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(layer, key, weights[f"{name}.{key}"])


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def rounding_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that `fake_quantize` made, by name.

    Raises:
        UserError: torchao is not installed.
    """
    kind = require("torchao.quantization.qat.linear", _PURPOSE).FakeQuantizedLinear
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


class DelayedStart:
    """Turns the rounding of a model on at a step, so that weights can settle first.

    Steps count from 0; the first ``num_steps`` of them run without. 0 rounds from the beginning.
    """

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._switch = require("torchao.quantization.qat.linear", _PURPOSE).enable_linear_fake_quant
        self._layers = list(rounding_layers(model).values())
        self._num_steps = num_steps
        self._is_on: bool | None = None

    def at_step(self, index: int) -> None:
        """Make the model what it is in step ``index``, and log when that changes."""
        is_on = index >= self._num_steps
        if is_on is self._is_on:
            return
        for layer in self._layers:
            self._switch(layer, is_on)
        if self._num_steps:
            logger.info("Fake quantisation is %s.", "on" if is_on else f"off until step {self._num_steps}")
        self._is_on = is_on
