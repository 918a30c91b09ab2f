"""What a caller may ask of a model, checked and translated before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers.quantized_load import FourBit
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.fast.config import KernelWishes, parse_cuda_graphs, parse_fast_layers, parse_kernels
from nemo_automodel.components.quantization.config import CompileConfig, FP8Config, QuantizationConfig
from nemo_automodel.shared.backend import BackendConfig
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, UserError, did_you_mean
from nemo_automodel.shared.imports import is_available, require
from nemo_automodel.shared.memory_policies import RECOMPUTE_POLICIES

logger = logging.getLogger(__name__)

ATTENTION_NAMES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
FREEZE_KEYS = {
    "freeze_embeddings": (),
    "freeze_vision_tower": ("vision", "visual", "image_encoder"),
    "freeze_audio_tower": ("audio",),
    "freeze_language_model": ("language_model",),
    "freeze_video_embedder": ("video_embed",),
}
"""Keys of ``freeze_config`` → parts of module names that mean the module."""

HUB_KEYS = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
"""Keywords that say how files are fetched."""


@dataclass
class ModelOptions:
    """The keywords of `from_pretrained` and `from_config`; whatever is no field overrides the model's config.json."""

    torch_dtype: str | torch.dtype = "auto"
    dtype: str | torch.dtype | None = None
    attn_implementation: str | None = None
    quantization_config: QuantizationConfig | BitsAndBytesConfig | dict[str, Any] | None = None
    peft_config: PeftConfig | None = None
    compile_config: CompileConfig | None = None
    compile_layers: bool = False
    freeze_config: dict[str, bool] | None = None
    activation_checkpointing: str = "none"
    mlp_tile_tokens: int | None = None
    device: str | torch.device | None = None
    trust_remote_code: bool = False
    backend: BackendConfig | dict[str, Any] | None = None
    use_liger_kernel: bool | None = None
    use_sdpa_patching: bool | None = None
    sdpa_method: Any = None
    force_hf: bool = False
    fast_layers: str | bool = "auto"
    cuda_graphs: str | bool = "auto"
    embeddings_on_host: bool = False
    autocast_dtype: str | None = None
    kernels: KernelWishes | str | dict[str, Any] | None = None
    kernel_record: dict[str, Any] | None = None
    row_shape: tuple[int, int] | None = None
    memory_floor_gib: float | None = None
    has_packed_sequence: bool = False
    output_hidden_states: bool | None = None
    distributed_setup: Any = None
    device_mesh: Any = None
    qat_config: Any = None
    fp8_config: FP8Config | dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> ModelOptions:
        """Sort keywords into fields and overrides."""
        names = {item.name for item in fields(cls)} - {"overrides"}
        return cls(
            **{key: value for key, value in keywords.items() if key in names},
            overrides={key: value for key, value in keywords.items() if key not in names},
        )

    def __post_init__(self) -> None:
        for key in ("distributed_setup", "device_mesh"):
            if getattr(self, key) is not None:
                raise NotSupportedYetError(f"`{key}` is not supported yet: this version uses one device. Leave it out.")
        if self.qat_config is not None and self.peft_config is not None:
            raise ConfigError(
                "`qat_config` and `peft_config` exclude each other: under adapters the weights that would be rounded "
                "do not learn. Leave one of them out."
            )
        if self.qat_config is not None and self.fp8_config is not None:
            raise ConfigError("`qat_config` and `fp8_config` exclude each other. Leave one of them out.")
        if self.activation_checkpointing not in RECOMPUTE_POLICIES:
            raise ConfigError(
                f"`activation_checkpointing: {self.activation_checkpointing}` is not known. "
                f"Use {', '.join(RECOMPUTE_POLICIES)}."
            )
        if self.mlp_tile_tokens is not None and self.mlp_tile_tokens < 1:
            raise ConfigError(f"`mlp_tile_tokens: {self.mlp_tile_tokens}` is not a number of tokens. Use 1 or more.")
        self.fast_layers = parse_fast_layers(self.fast_layers, self.force_hf)
        self.cuda_graphs = parse_cuda_graphs(self.cuda_graphs)
        self.kernels = parse_kernels(self.kernels)
        for key in self.freeze_config or {}:
            if key not in FREEZE_KEYS:
                raise ConfigError(
                    f"`freeze_config.{key}` is not known.{did_you_mean(key, FREEZE_KEYS)} "
                    f"Known: {', '.join(FREEZE_KEYS)}."
                )
        if self.attn_implementation is not None and self.attn_implementation not in ATTENTION_NAMES:
            raise ConfigError(
                f"`model.attn_implementation: {self.attn_implementation}` is not known."
                f"{did_you_mean(self.attn_implementation, ATTENTION_NAMES)} Known: {', '.join(ATTENTION_NAMES)}."
            )
        if self.dtype is not None:
            self.torch_dtype = self.dtype
        if self.torch_dtype != "auto":
            self.torch_dtype = parse_dtype(self.torch_dtype)
        backend = BackendConfig(**self.backend) if isinstance(self.backend, dict) else self.backend or BackendConfig()
        self._report_inert_keys(backend)

    def _report_inert_keys(self, backend: BackendConfig) -> None:
        inert = [f"backend.{key}" for key in backend.inert_keys()]
        inert += [key for key in ("use_liger_kernel", "use_sdpa_patching") if getattr(self, key)] + (
            ["sdpa_method"] if self.sdpa_method is not None else []
        )
        if inert:
            logger.info(
                "No effect on this model: %s. It is Hugging Face's own class with PyTorch kernels.", ", ".join(inert)
            )

    def take_hub_keywords(self) -> dict[str, Any]:
        """Remove and return the overrides that say how files are fetched."""
        return {key: self.overrides.pop(key) for key in HUB_KEYS if key in self.overrides}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to use: the first GPU where there is one, unless another is named.

    Raises:
        UserError: the device is not there.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"`device: {device}` is not a device. Use cpu, cuda or cuda:0.") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise UserError(
                f"`device: {device}`, but this machine has {count} usable GPUs. Use cpu, or check nvidia-smi."
            )
        return torch.device("cuda", chosen.index or 0)
    if chosen.type != "cpu":
        raise UserError(f"`device: {device}` is not supported. Use cpu or cuda.")
    return chosen


@dataclass(frozen=True)
class Quantization:
    """What is asked for: 4 bits, which this project packs itself where it can, or 8 bits, which bitsandbytes does."""

    four_bit: FourBit | None
    computes_in_fp8: bool = False
    original: BitsAndBytesConfig | None = None
    """What the caller gave, where it was this."""

    def for_bitsandbytes(self) -> BitsAndBytesConfig:
        """Return what to ask bitsandbytes for.

        Raises:
            UserError: bitsandbytes or accelerate is missing.
        """
        require("bitsandbytes", "`quantization`")
        require("accelerate", "`quantization`")
        if self.original is not None:
            return self.original
        if self.four_bit is None:
            return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_compute_dtype=self.four_bit.compute_dtype,
            bnb_4bit_use_double_quant=self.four_bit.is_nested,
            bnb_4bit_quant_type=self.four_bit.quant_type,
            bnb_4bit_quant_storage=self.four_bit.storage_dtype,
        )


def resolve_quantization(
    value: QuantizationConfig | BitsAndBytesConfig | dict[str, Any] | None, has_adapter: bool
) -> Quantization | None:
    """Return how weights are packed, or None when they stay as they are.

    Raises:
        UserError: a package is missing, bad values, or nothing that could be trained.
    """
    if isinstance(value, dict):
        unknown = sorted(set(value) - {item.name for item in fields(QuantizationConfig)})
        if unknown:
            known = [item.name for item in fields(QuantizationConfig)]
            raise ConfigError(f"`quantization.{unknown[0]}` is not known.{did_you_mean(unknown[0], known)}")
        value = QuantizationConfig(**value)
    if value is None or not (value.load_in_4bit or value.load_in_8bit):
        return None
    if not has_adapter:
        raise UserError(
            "`quantization` freezes the weights in 4 or 8 bits, so there is nothing to train without an adapter. "
            "Add a `peft` section, or leave `quantization` out."
        )
    original = value if isinstance(value, BitsAndBytesConfig) else None
    four_bit = None
    if value.load_in_4bit:
        four_bit = FourBit(
            quant_type=value.bnb_4bit_quant_type,
            is_nested=value.bnb_4bit_use_double_quant,
            compute_dtype=parse_dtype(value.bnb_4bit_compute_dtype, "quantization.bnb_4bit_compute_dtype"),
            storage_dtype=parse_dtype(value.bnb_4bit_quant_storage, "quantization.bnb_4bit_quant_storage"),
            skip=tuple(original.llm_int8_skip_modules or ()) if original is not None else (),
        )
    in_fp8 = isinstance(value, QuantizationConfig) and value.compute_in_fp8
    resolved = Quantization(four_bit, in_fp8, original)
    if four_bit is None:
        resolved.for_bitsandbytes()  # says at once if a package is missing
    return resolved


def stored_quantization(config: PretrainedConfig) -> QuantizationConfig | None:
    """Return how config.json says the weights are packed already: in 4 bits by bitsandbytes, or None for all else."""
    values = _packed_by_bitsandbytes(config)
    if not values.get("load_in_4bit"):
        return None
    names = {item.name for item in fields(QuantizationConfig)} - {"load_in_8bit"}
    return QuantizationConfig(**{key: value for key, value in values.items() if key in names and value is not None})


def _packed_by_bitsandbytes(config: PretrainedConfig) -> dict[str, Any]:
    stored: Any = getattr(config, "quantization_config", None)
    values = stored.to_dict() if isinstance(stored, BitsAndBytesConfig) else stored
    return values if isinstance(values, dict) and values.get("quant_method") == "bitsandbytes" else {}


def check_packed_files(
    name: str,
    config: PretrainedConfig,
    asked: QuantizationConfig | BitsAndBytesConfig | dict[str, Any] | None,
    in_fp8: bool,
) -> None:
    """Refuse to pack weights in another way than their files have them already; say which details are the files'.

    Raises:
        UserError: 8 bits are asked for and the files have 4, or the reverse, or products in 8 bits.
    """
    values = _packed_by_bitsandbytes(config)
    if not values:
        return
    bits = 4 if values.get("load_in_4bit") else 8
    if in_fp8:
        raise UserError(
            f"`fp8.enabled: true` rounds weights of 16 bits, but `{name}` is stored in {bits}. Set it to false, or "
            "name the model as it was before it was packed."
        )
    asked = QuantizationConfig(**asked) if isinstance(asked, dict) else asked
    if asked is None or not (asked.load_in_4bit or asked.load_in_8bit):
        return
    wanted = 4 if asked.load_in_4bit else 8
    if wanted != bits:
        raise UserError(
            f"`quantization.load_in_{wanted}bit: true`, but `{name}` is stored in {bits} bits already, and they cannot "
            f"be had back. Set `quantization.load_in_{bits}bit: true` instead, or name the model as it was before."
        )
    keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant") if bits == 4 else ()
    for key in keys:
        if values.get(key) is not None and values[key] != getattr(asked, key):
            logger.warning("`quantization.%s` has no effect: in `%s` it is %s.", key, name, values[key])


def refuse_packed_training(name: str, config: PretrainedConfig) -> None:
    """Refuse to train all weights of a model whose files are packed: only what is not packed would learn.

    Raises:
        UserError: they are.
    """
    values = _packed_by_bitsandbytes(config)
    if values:
        bits = 4 if values.get("load_in_4bit") else 8
        raise UserError(
            f"`{name}` is stored in {bits} bits, where weights cannot be trained. Add a `peft` section (QLoRA), or "
            "name the model as it was before it was packed."
        )


def resolve_dtype(wanted: str | torch.dtype, stored: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the weights; None leaves it to the weight files (``auto``, and config.json does not say).

    bfloat16 arithmetic is some fifty times slower than fp32 on most CPUs, so ``auto`` means fp32 there.
    """
    if isinstance(wanted, torch.dtype):
        return wanted
    if device.type == "cpu":
        if stored not in (None, torch.float32):
            logger.info("`torch_dtype: auto` on a CPU: float32 instead of the stored %s.", stored)
        return torch.float32
    return stored


def resolve_attention(
    wanted: str | None, model_class: type[PreTrainedModel] | None, device: torch.device, dtype: torch.dtype | None
) -> str | None:
    """Return the attention implementation to ask Transformers for; None lets it choose.

    FlashAttention runs where the package is installed, on a GPU and in half precision; otherwise SDPA does, and a
    model that cannot use SDPA computes attention step by step.
    """
    can_flash = is_available("flash_attn") and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    can_sdpa = model_class is None or model_class._supports_sdpa
    if wanted is None:
        has_flash = can_flash and model_class is not None and model_class._supports_flash_attn
        return "flash_attention_2" if has_flash else None
    chosen = wanted
    if (wanted == "flash_attention_2" and not can_flash) or (wanted == "flex_attention" and device.type == "cpu"):
        chosen = "sdpa"
    if chosen == "sdpa" and not can_sdpa:
        chosen = "eager"
    if chosen != wanted:
        logger.info("`attn_implementation: %s` cannot run here; attention runs with %s.", wanted, chosen)
    return chosen
