"""A Hugging Face directory of the Llama, Mistral, Qwen2 or Qwen3 family as one GGUF file.

Names come from the ``gguf`` package's own table, numbers from config.json. Two things are more than renaming: llama.cpp
turns pairs of neighbours where Hugging Face's Llama turns the two halves of a head, so the rows of q and k of that
family are put in its order; and Llama 3's stretched rotary frequencies are written as a tensor of factors.

Norms and biases stay in fp32, as llama.cpp wants them. Tensors are converted and written one by one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_automodel.components.export.gguf_tokenizer import vocabulary_of, write_vocabulary
from nemo_automodel.components.export.weight_files import TensorInfo, list_tensors, read_tensor
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Hugging Face's type of the model → the name in gguf's table."""
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
"""The name in the certificate."""
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    directory: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    kind: str,
    name: str,
    end_tokens: list[int] | None = None,
) -> None:
    """Write the model of ``directory`` to ``file``; ``kind`` is f32, f16, bf16 or q8_0.

    Raises:
        UserError: a family, a rotary scaling or a tokenizer that is not known, or the ``gguf`` package is missing.
        OSError: the file cannot be written.
    """
    gguf: Any = require("gguf", "Writing a GGUF file")
    _check(config)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    tensors = list_tensors(directory)
    embedding = next(info for key, info in tensors.items() if key.endswith("embed_tokens.weight"))
    vocabulary = vocabulary_of(tokenizer, embedding.shape[0], end_tokens)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        _write_numbers(writer, gguf, config, embedding.shape[0])
        write_vocabulary(writer, vocabulary, template)
        _write_weights(writer, gguf, config, architecture, tensors, kind)
    finally:
        writer.close()


def _check(config: PretrainedConfig) -> None:
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"Models of type `{config.model_type}` cannot be written as GGUF by this version, only "
            f"{', '.join(ARCHITECTURES)}. Use --to hf, and llama.cpp's own converter on that directory."
        )
    if getattr(config, "use_sliding_window", False):
        raise UserError("The model uses a sliding window, which llama.cpp does not for this family. Use --to hf.")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"The model scales its rotary positions by `{rope}`, which is not known here. Use --to hf.")


def head_dim_of(config: Any) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_numbers(writer: Any, gguf: Any, config: Any, vocab_size: int) -> None:
    head_dim, rope = head_dim_of(config), config.rope_parameters
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_weights(
    writer: Any, gguf: Any, config: Any, architecture: Any, tensors: dict[str, TensorInfo], kind: str
) -> None:
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    todo: list[tuple[str, str, Any]] = []
    for name, info in tensors.items():
        if name in tied:
            continue
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise UserError(f"`{name}` has no place in a GGUF file of this family. Use --to hf.")
        todo.append((name, stored, _type_of(gguf, info, kind)))
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, stored, data_type in todo:
        block, size = gguf.GGML_QUANT_SIZES[data_type]
        num_bytes = torch.Size(tensors[name].shape).numel() // block * size
        writer.add_tensor_info(stored, tensors[name].shape, np.dtype(np.float32), num_bytes, raw_dtype=data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, _, data_type in todo:
        weight = _in_order_of_llama_cpp(name, read_tensor(name, tensors[name]).float(), config)
        writer.write_tensor_data(gguf.quants.quantize(weight.numpy(), data_type))


def _type_of(gguf: Any, info: TensorInfo, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(info.shape) == 1:
        return types.F32
    if kind == "q8_0" and info.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16  # rows that are no whole number of blocks, as llama.cpp does it
    return types[TYPES[kind]]


def _in_order_of_llama_cpp(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Interleave the two halves of every head of q and k, as the rotation of the family ``llama`` expects them."""
    if ARCHITECTURES[config.model_type] != "LLAMA":
        return weight
    if ".q_proj." in name:
        num_heads = config.num_attention_heads
    elif ".k_proj." in name:
        num_heads = config.num_key_value_heads
    else:
        return weight
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def rope_factors(config: Any) -> np.ndarray | None:
    """Return what Llama 3.1 divides the rotary frequencies by, fp32 ``[head_dim / 2]``; None without its scaling.

    Long waves are stretched by ``factor``, short ones not at all, those between smoothly.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim, factor = head_dim_of(config), rope["factor"]
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for pair in range(head_dim // 2):
        num_waves = length / (2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim))
        share = min(1.0, max(0.0, (num_waves - low) / (high - low)))
        factors.append(1 / ((1 - share) / factor + share))
    return np.array(factors, dtype=np.float32)
