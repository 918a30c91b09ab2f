"""Settings of quantised weights. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.shared.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class QuantizationConfig:
    """The ``quantization:`` section: a frozen base stored in 4 or 8 bits, in the formats of bitsandbytes."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_compute_dtype: str = "bfloat16"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_quant_storage: str = "bfloat16"
    compute_in_fp8: bool = False
    """Multiply 4-bit weights in E4M3, scaled by output channels and tokens, instead of in the compute dtype."""

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError(
                "`quantization.load_in_4bit` and `quantization.load_in_8bit` are both true, but weights are stored one "
                "way only. Set one of them to false."
            )
        if self.compute_in_fp8 and not self.load_in_4bit:
            raise ConfigError(
                "`quantization.compute_in_fp8: true` multiplies 4-bit weights in 8 bits, but `load_in_4bit` is false. "
                "Set `quantization.load_in_4bit: true`, or leave `compute_in_fp8` out."
            )
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(
                f"`quantization.bnb_4bit_quant_type: {self.bnb_4bit_quant_type}` is not known. Use nf4 or fp4."
            )


FP8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@dataclass(frozen=True)
class FP8Config:
    """The ``fp8:`` section: products in 8 bits, of a frozen base under adapters or of all weights while they learn."""

    enabled: bool = False
    recipe_name: str | None = None
    """None: by rows where the GPU has such a product, else one scale a matrix. ``rowwise`` and ``tensorwise`` make the
    gradients of weights in 8 bits as well, ``rowwise_with_gw_hp`` and None do not; a frozen base has none."""
    enable_fsdp_float8_all_gather: bool = False
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    force_recompute_fp8_weight_in_bwd: bool = False
    """Transposed weights are made in every backward pass, as with ``weight_copies: 1``."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose name holds one of these stay as they are, and what is packed with them."""
    emulate: bool = False
    """The same roundings in plain PyTorch, on any device; slow."""
    weight_copies: int | None = None
    """2: weights in 8 bits also lie transposed, for the backward pass; 1: they do not, which is a little slower; 0, for
    weights that learn: they are rounded again in every pass. The same numbers. None: 2 for a frozen base, 1 beside
    weights that learn."""
    first_last_down_proj_bf16: bool = False
    """``down_proj`` of the first and the last layer stay as they are: activations there can be thousands of times the
    usual size."""

    def __post_init__(self) -> None:
        if self.recipe_name is not None and self.recipe_name not in FP8_RECIPES:
            raise ConfigError(
                f"`fp8.recipe_name: {self.recipe_name}` is not known.{did_you_mean(self.recipe_name, FP8_RECIPES)} "
                f"Use {', '.join(FP8_RECIPES)}, or leave it out."
            )
        if self.weight_copies not in (None, 0, 1, 2):
            raise ConfigError(
                f"`fp8.weight_copies` is {self.weight_copies}, but it must be 0, 1 or 2. Use one of them."
            )

    def num_copies(self, is_trained: bool) -> int:
        """Return how many copies in 8 bits of a weight are stored, beside the weight itself where it learns.

        Raises:
            ConfigError: 0 of a frozen base.
        """
        if self.weight_copies == 0 and not is_trained:
            raise ConfigError(
                "`fp8.weight_copies: 0` keeps no weights in 8 bits, but a base under `peft` has no others. Use 1 or 2."
            )
        if self.force_recompute_fp8_weight_in_bwd:
            return min(1, self.weight_copies) if self.weight_copies is not None else 1
        if self.weight_copies is not None:
            return self.weight_copies
        return 1 if is_trained else 2

    @property
    def has_weight_grads(self) -> bool:
        """Whether the gradients of weights that learn are made in 8 bits."""
        return self.recipe_name in ("tensorwise", "rowwise")

    def inert_keys(self) -> list[str]:
        """Return the keys that are set and have no effect on one device."""
        keys = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
        return [key for key in keys if getattr(self, key)]


QAT_TYPES = ("int8_dynact_int4weight", "int4_weight_only")
_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class QATConfig:
    """A scheme by name. The keys are those of torchao's quantizers, dtypes as words."""

    quantizer_type: str = "int8_dynact_int4weight"
    """``int8_dynact_int4weight``: weights in 4 bits, a scale for each group, and activations in 8 bits, a scale and an
    offset for each token. ``int4_weight_only``: weights alone, a scale and an offset for each group."""
    groupsize: int = 256
    """Neighbouring weights of a row that share a scale."""
    padding_allowed: bool = False
    """Of the first scheme: layers whose inputs are no multiple of ``groupsize`` are an error instead of left out."""
    inner_k_tiles: int = 8
    """Of the second scheme, what the kernels want that compute with the result."""
    precision: str | None = None
    """Of weights; None is torchao's default. The weights of the model keep their dtype."""
    scales_precision: str | None = None
    """Of scales; None is torchao's default: float32, or bfloat16 in the second scheme."""

    def __post_init__(self) -> None:
        if self.quantizer_type not in QAT_TYPES:
            raise ConfigError(
                f"`qat.qat_config.quantizer_type: {self.quantizer_type}` is not known."
                f"{did_you_mean(self.quantizer_type, QAT_TYPES)} Use {' or '.join(QAT_TYPES)}."
            )
        if self.groupsize < 2 or (self.quantizer_type == "int4_weight_only" and self.groupsize not in _GROUP_SIZES):
            known = "one of 32, 64, 128, 256" if self.quantizer_type == "int4_weight_only" else "at least 2"
            raise ConfigError(
                f"`qat.qat_config.groupsize` is {self.groupsize}, but for {self.quantizer_type} it must be {known}. "
                "Use 32."
            )
        if self.inner_k_tiles not in (2, 4, 8):
            raise ConfigError(
                f"`qat.qat_config.inner_k_tiles` is {self.inner_k_tiles}, but it must be 2, 4 or 8. Use 8."
            )


@dataclass(frozen=True)
class QATSettings:
    """The ``qat:`` section."""

    enabled: bool = False
    fake_quant_after_n_steps: int = 0
    """Steps without rounding at the beginning."""
    qat_config: Any = None
    """The scheme: keys of `QATConfig`; ``_target_`` may be left out."""
    quantizer: Any = None
    """Instead: the target of a quantizer of torchao's."""

    def __post_init__(self) -> None:
        if self.fake_quant_after_n_steps < 0:
            raise ConfigError(
                f"`qat.fake_quant_after_n_steps` is {self.fake_quant_after_n_steps}, but it cannot be negative. "
                "Use 0 to round from the first step."
            )
        if self.qat_config is not None and self.quantizer is not None:
            raise ConfigError("`qat.qat_config` and `qat.quantizer` are both set. Leave one of them out.")


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class CompileConfig:
    """The ``compile:`` section, passed to ``torch.compile``; ``distributed.enable_compile`` does so layer by layer."""

    enabled: bool = False
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool = False
    backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dynamo_cache_size_limit: int = 256
    """How often one function may be compiled for other shapes before it runs as it is."""

    def __post_init__(self) -> None:
        if self.mode not in COMPILE_MODES:
            raise ConfigError(
                f"`compile.mode: {self.mode}` is not known.{did_you_mean(self.mode, COMPILE_MODES)} "
                f"Use {', '.join(COMPILE_MODES)}."
            )
        if self.mode != "default" and self.options:
            raise ConfigError("`compile.mode` and `compile.options` cannot both be set. Leave one of them out.")
        if self.dynamo_cache_size_limit < 1:
            raise ConfigError(
                f"`compile.dynamo_cache_size_limit` is {self.dynamo_cache_size_limit}, but it must be at least 1. "
                "Use 256."
            )
