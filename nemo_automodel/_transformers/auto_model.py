"""Hugging Face models by name or directory, ready to be trained: `from_pretrained` and `from_config`.

The model is Hugging Face's own class, so what it saves every other tool loads. What a caller may ask beyond that is
listed in `ModelOptions`; any other keyword overrides a key of the model's config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers.assemble import AssemblyPlan, assemble
from nemo_automodel._transformers.fp8_base import resolve_fp8
from nemo_automodel._transformers.kernel_choice import KernelRequest
from nemo_automodel._transformers.model_source import (
    check_local_model,
    check_sizes,
    load_config,
    one_config,
    read_config,
    resolve_source,
)
from nemo_automodel._transformers.options import (
    ModelOptions,
    check_packed_files,
    resolve_attention,
    resolve_device,
    resolve_dtype,
    resolve_quantization,
    stored_quantization,
)
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.fast.config import parse_kernels
from nemo_automodel.components.quantization.config import CompileConfig, FP8Config, QuantizationConfig
from nemo_automodel.components.training.memory_watch import floor_for
from nemo_automodel.shared.backend import BackendConfig
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)


class _NeMoAutoModel:
    """Never made: `from_pretrained` and `from_config` return Hugging Face models."""

    _auto_class: Any

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made with from_pretrained(...) or from_config(...).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        torch_dtype: str | torch.dtype = "auto",
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        quantization_config: QuantizationConfig | BitsAndBytesConfig | dict[str, Any] | None = None,
        peft_config: PeftConfig | None = None,
        compile_config: CompileConfig | None = None,
        compile_layers: bool = False,
        freeze_config: dict[str, bool] | None = None,
        activation_checkpointing: str = "none",
        mlp_tile_tokens: int | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        backend: BackendConfig | dict[str, Any] | None = None,
        use_liger_kernel: bool | None = None,
        use_sdpa_patching: bool | None = None,
        sdpa_method: Any = None,
        force_hf: bool = False,
        fast_layers: str | bool = "auto",
        cuda_graphs: str | bool = "auto",
        embeddings_on_host: bool = False,
        autocast_dtype: str | None = None,
        kernels: str | dict[str, Any] | None = None,
        kernel_record: dict[str, Any] | None = None,
        row_shape: tuple[int, int] | None = None,
        memory_floor_gib: float | None = None,
        has_packed_sequence: bool = False,
        output_hidden_states: bool | None = None,
        distributed_setup: Any = None,
        device_mesh: Any = None,
        qat_config: Any = None,
        fp8_config: FP8Config | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a model from a directory or from the Hub.

        ``torch_dtype`` (or ``dtype``) ``auto`` is the stored dtype on a GPU and fp32 on a CPU. ``device`` defaults to
        the first GPU, else the CPU. ``activation_checkpointing`` is ``none``, ``selective``, ``full`` or a name of
        `shared.memory_policies`, and ``mlp_tile_tokens`` divides the MLP, see docs/performance.md. ``compile_config``
        compiles the whole model, ``compile_layers`` each decoder layer. ``fast_layers`` is ``auto``, ``on`` or ``off``:
        decoder layers in their fast form, see docs/performance.md; ``force_hf`` turns it off as well. ``cuda_graphs``,
        ``auto``, ``on`` or ``off``, records these layers. ``fp8_config`` multiplies in 8 bits: the frozen base under an
        adapter, or all weights. ``embeddings_on_host`` keeps the frozen input embedding in the host's memory.
        ``kernels`` is ``measure``, ``defaults`` or a mapping, see there; ``kernel_record`` what an earlier run of the
        same job measured, and ``row_shape`` the rows and positions of the batches to come, if they are all alike.
        ``memory_floor_gib`` keeps so much of the host's memory free while weights are read; where the GPU shares that
        memory there is such a floor anyway, see docs/models.md. ``autocast_dtype`` says that the caller computes under
        autocast. The liger and SDPA keys, ``backend``, ``has_packed_sequence`` and ``output_hidden_states`` are
        accepted and change nothing. ``kwargs``: ``revision``, ``cache_dir``, ``token``, ``local_files_only``,
        ``subfolder``, ``force_download``, or keys of config.json to override.

        Raises:
            UserError: every mistake of the caller, in one line: no such model, incomplete files, unknown keys or
                architecture, missing packages, no such device.
            LowMemoryStop: reading the weights would cross the floor under the host's memory.
        """
        # every explicit keyword above is a field of ModelOptions
        keywords = {key: value for key, value in locals().items() if key not in ("cls", "kwargs")}
        name = resolve_source(str(keywords.pop("pretrained_model_name_or_path")))
        options = ModelOptions.from_keywords({**keywords, **kwargs})
        return cls._assemble(name, None, options)

    @classmethod
    def from_config(
        cls,
        config: str | dict[str, Any] | PretrainedConfig | None = None,
        *,
        pretrained_model_name_or_path: str | None = None,
        load_base_model: bool = False,
        **options: Any,
    ) -> PreTrainedModel:
        """Build a model from a configuration with random weights, made on the device.

        ``config`` is an object, a directory, a config.json, a Hub name, or what a config.json holds: a mapping with
        ``model_type``; ``pretrained_model_name_or_path`` is another word for it, so that a recipe for
        `from_pretrained` runs without weights when only its target is exchanged. ``load_base_model`` loads the weights
        as well. ``options`` are those of `from_pretrained`.

        Raises:
            UserError: as `from_pretrained`, or not one configuration is given.
        """
        parsed = ModelOptions.from_keywords(options)
        config = read_config(one_config(config, pretrained_model_name_or_path))
        if isinstance(config, str):
            name = resolve_source(config)
            return cls._assemble(name, None, parsed, has_random_weights=not load_base_model)
        name = config.name_or_path or ""
        if load_base_model and not name:
            raise UserError("`load_base_model: true`, but the configuration does not say where its weights are.")
        return cls._assemble(name, config, parsed, has_random_weights=not load_base_model)

    @classmethod
    def _assemble(
        cls, name: str, config: PretrainedConfig | None, options: ModelOptions, has_random_weights: bool = False
    ) -> PreTrainedModel:
        device = resolve_device(options.device)
        quantization = resolve_quantization(options.quantization_config, options.peft_config is not None)
        fp8 = resolve_fp8(options.fp8_config, options.peft_config is not None, device)
        hub = options.take_hub_keywords()
        if not has_random_weights and Path(name).is_dir():
            check_local_model(Path(name) / hub.get("subfolder", ""))
        if config is None:
            config = load_config(name, options.trust_remote_code, hub, options.overrides)
        elif options.overrides:
            config = _override(config, options.overrides)
        check_sizes(config)
        if not has_random_weights:
            check_packed_files(name, config, options.quantization_config, fp8 is not None)
        if quantization is None and options.peft_config is not None and not has_random_weights:
            quantization = resolve_quantization(stored_quantization(config), has_adapter=True)
        stored = parse_dtype(config.dtype) if config.dtype is not None else None
        dtype = resolve_dtype(options.torch_dtype, stored, device)
        attention = resolve_attention(options.attn_implementation, cls.model_class(config), device, dtype)
        plan = AssemblyPlan(
            auto_class=cls._auto_class,
            config=config,
            source=None if has_random_weights else name,
            device=device,
            dtype=dtype,
            attn_implementation=attention,
            asks_attention=options.attn_implementation is not None,
            fast_layers=str(options.fast_layers),
            cuda_graphs=str(options.cuda_graphs),
            embeddings_on_host=options.embeddings_on_host,
            force_hf=options.force_hf,
            autocast_dtype=options.autocast_dtype,
            floor=floor_for(device, options.memory_floor_gib),
            kernels=KernelRequest(parse_kernels(options.kernels), options.kernel_record, options.row_shape),
            quantization=quantization,
            fp8=fp8,
            qat=options.qat_config,
            freeze=options.freeze_config or {},
            peft=options.peft_config,
            activation_checkpointing=options.activation_checkpointing,
            mlp_tile_tokens=options.mlp_tile_tokens,
            compile=options.compile_config,
            compile_layers=options.compile_layers,
            trust_remote_code=options.trust_remote_code,
            hub=hub,
        )
        return assemble(plan)

    @classmethod
    def model_class(cls, config: PretrainedConfig) -> type[PreTrainedModel] | None:
        """Return the class that will be built; None when the code of a repository brings it.

        Raises:
            UserError: the architecture has no model for this task.
        """
        mapping = cls._auto_class._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return model_class
        if cls._auto_class.__name__ in (getattr(config, "auto_map", None) or {}):
            return None
        raise UserError(
            f"`{config.model_type}` models cannot be loaded with {cls.__name__}: the architecture has no such head. "
            "Use the NeMoAutoModelFor… class of its task."
        )


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise UserError(f"`model.{key}`: neither an option of ours nor a key of {type(config).__name__}.")
        setattr(config, key, value)
    return config


class NeMoAutoModelForCausalLM(_NeMoAutoModel):
    """Decoder-only language models."""

    _auto_class = transformers.AutoModelForCausalLM


class NeMoAutoModelForSeq2SeqLM(_NeMoAutoModel):
    """Encoder-decoder language models."""

    _auto_class = transformers.AutoModelForSeq2SeqLM


class NeMoAutoModelForSequenceClassification(_NeMoAutoModel):
    """Models with one label for a text."""

    _auto_class = transformers.AutoModelForSequenceClassification


class NeMoAutoModelForTokenClassification(_NeMoAutoModel):
    """Models with one label for every token."""

    _auto_class = transformers.AutoModelForTokenClassification


class NeMoAutoModelForImageTextToText(_NeMoAutoModel):
    """Language models that also read images."""

    _auto_class = transformers.AutoModelForImageTextToText
