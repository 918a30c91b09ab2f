"""Settings of quantised weights. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.shared.errors import ConfigError


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


@dataclass(frozen=True)
class FP8Config:
    """The ``fp8:`` section."""

    enabled: bool = False
    recipe_name: str | None = None
    enable_fsdp_float8_all_gather: bool = False
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    force_recompute_fp8_weight_in_bwd: bool = False
    filter_fqns: list[str] = field(default_factory=list)
    emulate: bool = False


@dataclass(frozen=True)
class QATSettings:
    """The ``qat:`` section."""

    enabled: bool = False
    fake_quant_after_n_steps: int = 0
    qat_config: Any = None
    quantizer: Any = None


@dataclass(frozen=True)
class CompileConfig:
    """The ``compile:`` section, passed to ``torch.compile``."""

    enabled: bool = False
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool = False
    backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dynamo_cache_size_limit: int = 256
