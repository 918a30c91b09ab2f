"""What autograd keeps of a forward pass, to hold the planner against."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def bytes_kept(model: PreTrainedModel, num_rows: int, seq_len: int) -> int:
    """Return the bytes of storage that a forward pass without the head saves, weights and buffers not counted."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=torch.zeros((num_rows, seq_len), dtype=torch.long), use_cache=False)[0]
        hidden.sum()
    return sum(kept.values())
