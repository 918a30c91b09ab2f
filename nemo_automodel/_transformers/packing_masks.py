"""Attention masks of packed rows, in the form a Hugging Face model takes them.

Transformers can find documents by restarts of ``position_ids``, but only without a mask and a cache, and not in every
family; where it does not, documents see each other and nothing says so. So the masks are made here and handed over
finished: one tensor, or one per kind of layer where the configuration lists ``layer_types`` (models take such a
dictionary because ``generate`` prepares it the same way). SDPA takes bool masks, eager attention takes numbers to add.

The mask has S × S entries a row; kernels that read document borders instead come with the fast attention path.
"""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel.kernels.attention import additive_mask, document_layout, packed_mask
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

PackedMask = torch.Tensor | dict[str, torch.Tensor]

_MASKABLE_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# families that turn the two-dimensional mask into position biases, so a finished mask cannot be handed to them; Falcon
# does so when its configuration sets `alibi`
_BIASED_FAMILIES = ("bloom", "mpt")


def is_plain_causal(model: PreTrainedModel) -> bool:
    """Tell whether every layer attends to all earlier positions through SDPA, so that `MASKLESS_SDPA` is the same."""
    config = model.config
    if config is not config.get_text_config() or config._attn_implementation != "sdpa":
        return False
    # a model that picks its attention itself would compute without any mask under a name it does not know
    if not model._supports_attention_backend or model._is_stateful or config.model_type in _BIASED_FAMILIES:
        return False
    kinds = layer_types(config)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return all(getattr(config, key, None) is None for key in ("sliding_window", "attention_chunk_size"))


def check_can_isolate(model: PreTrainedModel) -> None:
    """Refuse models whose layers carry state from one document of a packed row into the next.

    Raises:
        UserError: recurrent, convolutional or otherwise unmaskable layers; named.
    """
    config = model.config.get_text_config()
    unmaskable = sorted(set(layer_types(config) or ()) - set(_MASKABLE_LAYERS))
    if model._is_stateful and not unmaskable:
        unmaskable = ["recurrent"]
    if config.model_type in _BIASED_FAMILIES or getattr(config, "alibi", False):
        unmaskable = ["position bias"]
    if unmaskable:
        raise UserError(
            f"{type(model).__name__} has {', '.join(unmaskable)} layers, which let the documents of a packed row see "
            "each other. Turn packing off: `--packed_sequence.packed_sequence_size 0`."
        )


def layer_types(config: PretrainedConfig) -> list[str] | None:
    """Return the kind of every layer where the configuration lists them; few configurations have the attribute."""
    return getattr(config, "layer_types", None)


def choose_packing_attention(model: PreTrainedModel) -> str:
    """Return ``sdpa`` or ``eager``, the implementation that reads finished masks; switch the model to it if need be."""
    current: str = model.config.get_text_config()._attn_implementation
    if current in ("sdpa", "eager"):
        return current
    chosen = "sdpa" if model._supports_sdpa else "eager"
    logger.info("Packed rows need a mask that `%s` cannot read, so attention runs with `%s`.", current, chosen)
    model.set_attn_implementation(chosen)
    return chosen


def build_packed_masks(model: PreTrainedModel, seq_lens: torch.Tensor, seq_len: int, attention: str) -> PackedMask:
    """Return the masks of a batch of packed rows on the model's device.

    ``seq_lens`` int64 ``[B, C]`` on any device; each mask is ``[B, 1, S, S]``, bool for ``sdpa``, in the model's dtype
    for ``eager``.
    """
    config = model.config.get_text_config()
    documents, places = (t.to(model.device, non_blocking=True) for t in document_layout(seq_lens, seq_len))

    def make(kind: str) -> torch.Tensor:
        window = config.sliding_window if kind == "sliding_attention" else None
        chunk = config.attention_chunk_size if kind == "chunked_attention" else None
        mask = packed_mask(documents, places, window=window, chunk=chunk)
        return mask if attention == "sdpa" else additive_mask(mask, model.dtype)

    kinds = layer_types(config)
    if kinds is not None:
        return {kind: make(kind) for kind in sorted(set(kinds))}
    # without a list all layers are of one kind, and these two optional attributes say which
    if getattr(config, "sliding_window", None) is not None:
        return make("sliding_attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        return make("chunked_attention")
    return make("full_attention")
