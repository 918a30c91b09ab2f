"""Low-rank adapters on linear layers (Hu et al. 2021), with DoRA (Liu et al. 2024) and rsLoRA.

A frozen layer ``y = W x + b`` becomes ``y = W x + b + s·B A x``. ``A`` ``[R, in]`` and ``B`` ``[out, R]`` are the
submodules ``lora_A`` and ``lora_B`` of the layer itself, which keeps its name, its weight and its place in the model:
the layer's class is exchanged for a subclass that adds the update to whatever its own ``forward`` returns. So 4-bit and
8-bit layers need no code of their own, and a weight shared with the embedding stays shared.

DoRA rescales the rows of the adapted weight to learned lengths ``m``: ``y = (m / |W + s·B A|)·(W x + s·B A x) + b``,
the norm taken per output row and, as the paper says (section 4.3), without a gradient.

Adapters are stored in fp32 unless told otherwise and computed in the dtype that reaches the layer. ``B`` starts at
zero, so the first step starts from the base model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.components._peft.config import DEFAULT_TARGET, PeftConfig
from nemo_automodel.components._peft.module_matcher import check_exceptions, select_modules
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import ConfigError, UserError

__all__ = ["LinearLoRA", "PeftConfig", "adapters_off", "apply_lora", "lora_layers"]

logger = logging.getLogger(__name__)

_ADAPTED_CLASSES: dict[type[nn.Linear], type[LinearLoRA]] = {}


class LinearLoRA(nn.Linear):
    """A linear layer with an adapter. Made from an existing layer by `LinearLoRA.attach`, never built."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_magnitude_vector: nn.Parameter | None
    peft_config: PeftConfig
    """What the adapter was made with; one object for all layers of a model."""
    _scaling: float
    _dropout: float
    _drops_input: bool

    @staticmethod
    def attach(layer: nn.Linear, cfg: PeftConfig, name: str = "") -> LinearLoRA:
        """Turn ``layer`` itself into a layer with an adapter and return it. Its own parameters are frozen.

        ``name`` is its dotted name in the model, by which ``cfg`` may give it a rank and a scale of its own.
        Random numbers come from the CPU generator, so that a seed means the same adapter on every device.

        Raises:
            UserError: DoRA on a quantised layer, or ``lora_dtype`` is no float dtype.
        """
        if cfg.use_dora and not _has_plain_weight(layer):
            raise UserError(
                "`peft.use_dora: true` needs the lengths of the weight rows, which a quantised base does not keep. "
                "Turn off `use_dora` or `quantization`."
            )
        dtype = parse_dtype(cfg.lora_dtype or torch.float32, "peft.lora_dtype")
        if not dtype.is_floating_point:
            raise ConfigError(f"`peft.lora_dtype: {cfg.lora_dtype}` cannot learn. Use float32 or bfloat16.")
        device = layer.weight.device
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        layer.__class__ = _adapted_class(type(layer))
        assert isinstance(layer, LinearLoRA)
        rank = cfg.rank_of(name)
        lora_A = nn.Linear(layer.in_features, rank, bias=False)
        if cfg.lora_A_init == "xavier":
            nn.init.xavier_normal_(lora_A.weight)
        else:
            nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
        layer.lora_A = lora_A.to(device, dtype)
        layer.lora_B = nn.Linear(rank, layer.out_features, bias=False).to(device, dtype)
        nn.init.zeros_(layer.lora_B.weight)
        layer.peft_config = cfg
        layer._scaling = cfg.scaling_of(name)
        layer._dropout = cfg.dropout
        layer._drops_input = cfg.dropout_position == "pre"
        magnitude = nn.Parameter(torch.linalg.norm(layer.weight.detach().to(dtype), dim=1)) if cfg.use_dora else None
        layer.register_parameter("lora_magnitude_vector", magnitude)
        return layer

    @property
    def scaling(self) -> float:
        """The factor in front of the update."""
        return self._scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``; the result has the dtype of the layer without an adapter."""
        result = super().forward(x)
        if self.lora_magnitude_vector is not None:
            return self._dora(x, result)
        return result + self._update(x).to(result.dtype)

    def _update(self, x: torch.Tensor) -> torch.Tensor:
        if self._drops_input:
            x = nn.functional.dropout(x, self._dropout, self.training)
        update = self._low_rank(x)
        return update if self._drops_input else nn.functional.dropout(update, self._dropout, self.training)

    def _low_rank(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x, self.lora_A.weight.to(x.dtype))
        return nn.functional.linear(low, self.lora_B.weight.to(low.dtype)) * self._scaling

    def _dora(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        assert self.lora_magnitude_vector is not None
        with torch.no_grad():
            a, b = self.lora_A.weight, self.lora_B.weight
            norm = torch.linalg.norm(self.weight.to(a.dtype) + self._scaling * (b @ a), dim=1)
        ratio = (self.lora_magnitude_vector / norm).to(result.dtype)
        if self._drops_input and self._dropout and self.training:
            # PEFT drops the inputs of both terms, the base's direction and the update, with one mask
            x = nn.functional.dropout(x, self._dropout, self.training)
            base = nn.functional.linear(x, self.weight.to(x.dtype))
            update = self._low_rank(x)
        else:
            base = result if self.bias is None else result - self.bias.to(result.dtype)
            update = self._update(x)
        return result + (ratio - 1) * base + ratio * update.to(result.dtype)

    def extra_repr(self) -> str:
        """Describe the adapter beside the layer."""
        return f"{super().extra_repr()}, lora_rank={self.lora_A.out_features}, lora_scaling={self._scaling:g}"


def _adapted_class(base: type[nn.Linear]) -> type[LinearLoRA]:
    """Return a class that adds an adapter to ``base``, a linear layer of any storage; one class for each."""
    if base not in _ADAPTED_CLASSES:
        made = LinearLoRA if base is nn.Linear else type(f"{base.__name__}LoRA", (LinearLoRA, base), {})
        _ADAPTED_CLASSES[base] = made
    return _ADAPTED_CLASSES[base]


def _has_plain_weight(layer: nn.Linear) -> bool:
    """Tell whether the weight is a matrix of numbers, not codes."""
    return layer.weight.is_floating_point() and layer.weight.shape == (layer.out_features, layer.in_features)


def lora_layers(model: nn.Module) -> dict[str, LinearLoRA]:
    """Return every layer with an adapter, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearLoRA)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let every layer compute what it computes without its adapter, for a while."""
    layers = list(lora_layers(model).values())
    kept = [(layer._scaling, layer.lora_magnitude_vector) for layer in layers]
    for layer in layers:
        layer._scaling, layer.lora_magnitude_vector = 0.0, None
    try:
        yield
    finally:
        for layer, (scaling, magnitude) in zip(layers, kept, strict=True):
            layer._scaling, layer.lora_magnitude_vector = scaling, magnitude


def apply_lora(model: PreTrainedModel, cfg: PeftConfig) -> int:
    """Freeze the model, put adapters on the layers that ``cfg`` means, and return how many there are.

    Raises:
        UserError: nothing matches, or DoRA meets quantised layers.
    """
    if not (cfg.target_modules or cfg.exclude_modules or cfg.match_all_linear):
        logger.warning("`peft` names no layers, so every layer matching `%s` gets an adapter.", DEFAULT_TARGET)
    chosen = select_modules(
        model,
        cfg.target_modules,
        cfg.exclude_modules,
        cfg.match_all_linear,
        model.get_output_embeddings(),  # type: ignore[no-untyped-call]
    )
    check_exceptions("rank_pattern", list(cfg.rank_pattern), list(chosen))
    check_exceptions("alpha_pattern", list(cfg.alpha_pattern), list(chosen))
    model.requires_grad_(False)
    for name, layer in chosen.items():
        assert isinstance(layer, nn.Linear)
        LinearLoRA.attach(layer, cfg, name)
    _report_inert_keys(model, cfg)
    return len(chosen)


def _report_inert_keys(model: PreTrainedModel, cfg: PeftConfig) -> None:
    if cfg.use_triton and model.device.type == "cuda":
        logger.info("`peft.use_triton: true` changes nothing: fast decoder layers run in Triton where they apply.")
    elif cfg.use_triton:
        logger.info(
            "`peft.use_triton: true` has no effect: it needs a GPU, not %s. The adapters run in PyTorch, same numbers.",
            model.device.type,
        )
    if not cfg.use_memory_efficient_lora:
        logger.info("`peft.use_memory_efficient_lora: false` has no effect: there is one implementation.")
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name]
    if experts:
        logger.info("Expert weights (%s, …) get no adapters: they are not linear layers.", experts[0])
    elif cfg.moe_rank_scaling:
        logger.info("`peft.moe_rank_scaling: true` has no effect: this model has no experts.")
