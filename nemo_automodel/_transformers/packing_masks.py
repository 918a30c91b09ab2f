"""Attention of packed rows: which kernel keeps the documents apart, and the mask it reads.

Transformers can find documents by restarts of ``position_ids``, but only without a mask and a cache, and not in every
family; where it does not, documents see each other and nothing says so. So the mask is made here and handed over
finished: one for all layers, or one per kind of layer where the configuration lists ``layer_types`` (models take such a
dictionary because ``generate`` prepares it the same way). Three kernels read three kinds of masks:

* ``dense``: bool masks for SDPA, numbers to add for eager attention. Runs everywhere, costs S × S entries a row.
* ``varlen``: the borders of the documents. Nothing is computed between documents and nothing is compiled; bf16 or fp16,
  layers that see the whole document, no shared prefixes.
* ``flex``: a block mask. Any dtype, windows, chunks and shared prefixes; is compiled once a shape, which takes Triton
  and a C compiler.

`choose_backend` says which one runs and why. What an attention function gets as its mask says what to compute, so a
batch without documents, generation included, goes on as before.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nemo_automodel.kernels.attention import (
    PackedLayout,
    additive_mask,
    block_mask,
    borders_as_mask,
    document_borders,
    document_numbers,
    has_varlen_attention,
    is_packed_mask,
    packed_attention,
    packed_mask,
)
from nemo_automodel.shared.determinism import is_deterministic
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import is_available
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

logger = logging.getLogger(__name__)

PackedMask = torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]

_MASKABLE_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# families that make position biases of the two-dimensional mask, or choose keys over the whole row, so that a finished
# mask is not enough; Falcon is one when its configuration sets `alibi`
_BIASED_FAMILIES = ("bloom", "mpt", "doge")

PACKED_ATTENTION = "packed_rows"
"""Attention that looks at its mask: document borders, block masks, or whatever SDPA reads."""


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as an `AttentionInterface` function: ``[B, H, S, E]`` in, ``[B, S, H, E]`` out.

    Raises:
        UserError: the layer wants more than its mask and a scale.
    """
    if attention_mask is None or not is_packed_mask(attention_mask):
        mask: Any = attention_mask
        sdpa: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return sdpa
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras or dropout:
        raise UserError(
            f"The attention of {type(module).__name__} uses {', '.join(extras) or 'dropout'}, which the fast kernels "
            "for packed rows do not know. Set `packed_sequence.attention: dense`."
        )
    return packed_attention(query, key, value, attention_mask, scaling), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def is_plain_causal(model: PreTrainedModel) -> bool:
    """Tell whether every layer attends to all earlier positions through SDPA, so that `MASKLESS_SDPA` is the same."""
    config = model.config
    if config is not config.get_text_config() or config._attn_implementation != "sdpa":
        return False
    # a model that picks its attention itself would compute without any mask under a name it does not know
    if not model._supports_attention_backend or model._is_stateful or config.model_type in _BIASED_FAMILIES:
        return False
    return _sees_whole_documents(config)


def _sees_whole_documents(config: PretrainedConfig) -> bool:
    kinds = layer_types(config)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return all(getattr(config, key, None) is None for key in ("sliding_window", "attention_chunk_size"))


def layer_types(config: PretrainedConfig) -> list[str] | None:
    """Return the kind of every layer where the configuration lists them; few configurations have the attribute."""
    return getattr(config, "layer_types", None)


def check_can_isolate(model: PreTrainedModel, row_len: int = 0) -> None:
    """Refuse models that cannot keep the documents of packed rows of ``row_len`` tokens apart.

    Raises:
        UserError: recurrent, convolutional or otherwise unmaskable layers, named; positions that the model sets by
            itself; rotary embeddings that change with the longest document of a batch.
    """
    config = model.config.get_text_config()
    # earlier Transformers (seen in 5.12) list the layers of some recurrent models under another name
    kinds = layer_types(config) or getattr(config, "layers_block_type", None) or ()
    unmaskable = sorted(set(kinds) - {*_MASKABLE_LAYERS, "attention"})
    if model._is_stateful and not unmaskable:
        unmaskable = ["recurrent"]
    if config.model_type in _BIASED_FAMILIES or getattr(config, "alibi", False):
        unmaskable = ["position bias"]
    if unmaskable:
        raise UserError(
            f"{type(model).__name__} has {', '.join(unmaskable)} layers, which let the documents of a packed row see "
            "each other. Turn packing off: `--packed_sequence.packed_sequence_size 0`."
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UserError(
            f"{type(model).__name__} numbers the positions of a row by itself, so they cannot restart in the documents "
            "of a packed row. Turn packing off: `--packed_sequence.packed_sequence_size 0`."
        )
    limit = _rotary_limit(config)
    if limit is not None and row_len > limit:
        raise UserError(
            f"The rotary embeddings of {type(model).__name__} change for all documents of a batch once one is longer "
            f"than {limit:,} tokens. Set `packed_sequence.packed_sequence_size` to {limit} or less, not {row_len}."
        )


def _rotary_limit(config: PretrainedConfig) -> int | None:
    """Return the longest position with which rotary embeddings stay as they are; ``None`` if they always do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # one set of parameters, or one for each kind of layer
    sets = [parameters] if "rope_type" in parameters else [one for one in parameters.values() if isinstance(one, dict)]
    limits = [
        int(one.get("original_max_position_embeddings") or config.max_position_embeddings)
        for one in sets
        if one.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the choice of a kernel depends on besides the model."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability."""
    has_varlen: bool = False
    has_triton: bool = False
    has_compiler: bool = False
    """A C compiler and Python's headers, which Triton needs."""

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Look at the machine that ``device`` belongs to."""
        if device.type != "cuda":
            return cls(device.type)
        return cls(
            device.type,
            torch.cuda.get_device_capability(device),
            has_varlen=has_varlen_attention(),
            has_triton=is_available("triton"),
            has_compiler=_can_compile_c(),
        )


def _can_compile_c() -> bool:
    """Tell whether Triton can build what calls its kernels: it needs a C compiler and the headers of this Python."""
    has_headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    return has_headers and any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def choose_backend(
    model: PreTrainedModel, wish: str, machine: Machine, dtype: torch.dtype, has_branches: bool
) -> tuple[str, str]:
    """Return ``varlen``, ``flex`` or ``dense`` for packed rows, and the reason in words.

    ``wish`` is one of these or ``auto``, which takes the first of them that can run. ``dtype`` is what attention
    computes in, ``has_branches`` tells of shared prefixes.

    Raises:
        UserError: what was asked for cannot run.
    """
    config = model.config.get_text_config()
    general = _obstacle_to_fast_kernels(model, config, machine)
    obstacles = {
        "varlen": general or _obstacle_to_varlen(config, machine, dtype, has_branches),
        "flex": general or _obstacle_to_flex(config, machine),
        "dense": None,
    }
    if wish != "auto":
        if obstacles[wish] is not None:
            raise UserError(
                f"`packed_sequence.attention: {wish}` cannot run: {obstacles[wish]}. Set it to auto, which takes what "
                "can."
            )
        return wish, "asked for"
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    reasons = dict.fromkeys(obstacle for name, obstacle in obstacles.items() if obstacle and name != chosen)
    return chosen, "; ".join(reasons) if chosen != "varlen" else f"whole documents in {_short(dtype)}"


def _obstacle_to_fast_kernels(model: PreTrainedModel, config: PretrainedConfig, machine: Machine) -> str | None:
    if machine.device_type != "cuda":
        return f"the model is on the {machine.device_type}"
    if not (model._supports_attention_backend and model._supports_sdpa):
        return f"{type(model).__name__} computes its attention in its own way"
    if config._attn_implementation == "eager":
        return "the model runs eager attention"
    if getattr(config, "attn_logit_softcapping", None):
        return "the model caps its attention scores"
    if getattr(config, "attention_dropout", 0.0):
        return "the model drops attention at random"
    if getattr(config, "kv_lora_rank", None):
        return "keys and values differ in width"
    return None


def _obstacle_to_varlen(
    config: PretrainedConfig, machine: Machine, dtype: torch.dtype, has_branches: bool
) -> str | None:
    if has_branches:
        return "documents share prefixes"
    if not _sees_whole_documents(config):
        return "layers have windows or chunks"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention computes in {_short(dtype)}"
    if not machine.has_varlen:
        return f"variable-length attention needs torch 2.11, this is {torch.__version__}"
    if machine.capability < (8, 0) or _head_dim(config) > 256 or _head_dim(config) % 8:
        return f"the GPU or heads of {_head_dim(config)} do not fit the variable-length kernel"
    return None


def _obstacle_to_flex(config: PretrainedConfig, machine: Machine) -> str | None:
    if not machine.has_triton:
        return "FlexAttention needs the package triton, which is not installed"
    if not machine.has_compiler:
        return "FlexAttention needs a C compiler and Python's headers, and they are not installed (gcc, python3-dev)"
    if _head_dim(config) < 16:
        return f"FlexAttention needs heads of 16 or more, these have {_head_dim(config)}"
    return None


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the masks -------------------------------------------------------------------------------------------------------


def switch_attention(model: PreTrainedModel, backend: str) -> None:
    """Have the model compute attention with an implementation that reads the masks of ``backend``.

    It stays switched, because a layer that is recomputed in the backward pass must find the same implementation.
    """
    current: str = model.config.get_text_config()._attn_implementation
    if backend != "dense":
        chosen = PACKED_ATTENTION
    elif current in ("sdpa", "eager", PACKED_ATTENTION):
        return
    else:
        chosen = "sdpa" if model._supports_sdpa else "eager"
        logger.info("Packed rows need a mask that `%s` cannot read, so attention runs with `%s`.", current, chosen)
    if chosen != current:
        model.set_attn_implementation(chosen)


def build_packed_masks(model: PreTrainedModel, batch: Batch, backend: str) -> PackedMask:
    """Return the masks of a CPU batch of packed rows on the model's device, as ``backend`` reads them.

    ``dense``: ``[B, 1, S, S]``, bool for SDPA, in the model's dtype for eager attention. ``varlen``: int32 borders
    ``[1, 1, longest, N + 1]``, the length of the longest document being the size of a dimension that takes no memory.
    """
    config = model.config.get_text_config()
    seq_len = batch["input_ids"].shape[1]
    if backend == "varlen":
        borders, longest = document_borders(batch["seq_lens"], seq_len)
        return borders_as_mask(borders.to(model.device, non_blocking=True), longest)
    layout = PackedLayout(
        document_numbers(batch["seq_lens"], seq_len), batch["position_ids"], batch.get("branch_ids")
    ).to(model.device)

    def make(kind: str) -> torch.Tensor | BlockMask:
        window = config.sliding_window if kind == "sliding_attention" else None
        chunk = config.attention_chunk_size if kind == "chunked_attention" else None
        if backend == "flex":
            return block_mask(layout, window=window, chunk=chunk)
        mask = packed_mask(layout, window=window, chunk=chunk)
        return additive_mask(mask, model.dtype) if config._attn_implementation == "eager" else mask

    kinds = layer_types(config)
    if kinds is not None:
        return {kind: make(kind) for kind in sorted(set(kinds))}
    # without a list all layers are of one kind, and these two optional attributes say which
    if getattr(config, "sliding_window", None) is not None:
        return make("sliding_attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        return make("chunked_attention")
    return make("full_attention")


class BatchFiller:
    """Fills up the odd batch that has fewer rows than usual, so that FlexAttention is not compiled for it alone.

    That takes seconds, and an epoch's last batch comes once an epoch. The rows put behind hold one token and carry no
    label, so loss and gradients stay what they are. A smaller size that comes twice in a row is here to stay, as that
    of a validation set, and is left alone.
    """

    def __init__(self) -> None:
        self._num_rows: dict[tuple[bool, int], tuple[int, int]] = {}
        """Most rows and last number of rows, by (whether there are shared prefixes, length of a row)."""

    def fill(self, batch: Batch) -> Batch:
        """Return the batch, or one of as many rows as the largest batch of its kind had.

        Where the same bits are wanted every time it stays as it is: a resumed run has not seen what came before.
        """
        if is_deterministic():
            return batch
        num_rows, seq_len = batch["input_ids"].shape
        key = "branch_ids" in batch, seq_len
        most, last = self._num_rows.get(key, (0, 0))
        self._num_rows[key] = max(most, num_rows), num_rows
        missing = most - num_rows
        if missing <= 0 or num_rows == last:
            return batch
        filled = {
            name: torch.cat([rows, rows.new_full((missing, rows.shape[1]), value)])
            for name, value in (("input_ids", 0), ("branch_ids", 0), ("labels", IGNORE_INDEX), ("seq_lens", -1))
            if (rows := batch.get(name)) is not None
        }
        positions_1S = torch.arange(seq_len).expand(missing, -1)
        return {**batch, **filled, "position_ids": torch.cat([batch["position_ids"], positions_1S])}
