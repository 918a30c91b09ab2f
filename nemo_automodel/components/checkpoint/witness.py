"""What a checkpoint remembers so that a resume can prove itself: the batch that comes next, and its loss.

A manifest proves that the files are those that were saved. It says nothing of what lies outside of the checkpoint: the
rows of the data set, the weights that an adapter stands on, the libraries. So a save also writes down the content of
the micro-batch that would come next, a digest of it, and its loss with the weights just saved, computed without
dropout. Whoever resumes draws that batch again and computes that loss again.

Rows have digests of their own, over their tokens and labels without padding, so that rows which came out in other
batches or in another order are known again. Digests are XXH3 with 128 bits, as in the manifest: against accidents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from nemo_automodel.components.checkpoint.layout import WITNESS_BATCH_FILE, WITNESS_FILE
from nemo_automodel.components.checkpoint.state import guarded
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import SEQ_LENS_PADDING, Batch

_FORMAT = 1


@dataclass(frozen=True)
class Witness:
    """One micro-batch and what was known of it when the checkpoint was saved."""

    batch: Batch
    """Its tensors; their loss is ``loss``."""
    is_next: bool
    """It is the one that comes next; False: the last one trained on, where what comes next cannot be told."""
    digest: str
    """Of the whole item of the loader, which may hold several micro-batches."""
    row_digests: list[str]
    """Of every row of the item."""
    row_numbers: list[int] | None
    """Numbers of the rows in the data set; None where they have none."""
    loss: float
    """Mean over the learned tokens of ``batch``, without dropout; NaN where it has none or the weights are sick."""
    surroundings: dict[str, str]
    """What its last digits depend on: device, dtype, libraries, threads."""


def digest_of(batches: Sequence[Batch]) -> str:
    """Return 32 hexadecimal digits over names, dtypes, shapes and contents of all tensors."""
    digest = xxhash.xxh3_128()
    for batch in batches:
        for name, value in sorted(tensors_of(batch).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def row_digests_of(batches: Sequence[Batch]) -> list[str]:
    """Return a digest of each row: its tokens, labels and borders of documents, without padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            digest = xxhash.xxh3_128()
            if "attention_mask" in batch:
                kept = batch["attention_mask"][row].bool()
                ids, labels = ids[kept], labels[kept]
            elif "seq_lens" in batch:
                lengths = batch["seq_lens"][row]
                digest.update(_bytes(lengths[lengths != SEQ_LENS_PADDING]))
            digest.update(_bytes(ids))
            digest.update(_bytes(labels))
            found.append(digest.hexdigest())
    return found


def tensors_of(batch: Mapping[str, Any]) -> Batch:
    """Return the tensors of a batch; a packed one also names its format."""
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def to_files(witness: Witness) -> dict[str, bytes]:
    """Return the files of a witness by name."""
    content = {"format": _FORMAT, **{key: value for key, value in vars(witness).items() if key != "batch"}}
    content["loss"] = str(witness.loss)  # JSON has no word for NaN; `float` reads back what `str` wrote, bit for bit
    batch = {name: value.contiguous() for name, value in witness.batch.items()}
    return {
        WITNESS_FILE: json.dumps(content, indent=1).encode() + b"\n",
        WITNESS_BATCH_FILE: safetensors.torch.save(batch),
    }


def read_witness(checkpoint: Path) -> Witness | None:
    """Read what ``to_files`` wrote; None where a checkpoint has none.

    Raises:
        UserError: it is damaged, or written by a later version.
    """
    path, batch_path = checkpoint / WITNESS_FILE, checkpoint / WITNESS_BATCH_FILE
    if not path.is_file():
        return None
    content = guarded(path, lambda: json.loads(path.read_bytes()))
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise UserError(f"`{path}` is not of this version. Go on without it: --checkpoint.resume_check off")
    try:
        batch = guarded(batch_path, lambda: safetensors.torch.load(batch_path.read_bytes()))
    except SafetensorError as error:
        raise UserError(
            f"`{batch_path}` is damaged ({error}). Go on without it: --checkpoint.resume_check off"
        ) from error
    if not {"input_ids", "labels"} <= batch.keys():
        raise UserError(f"`{batch_path}` lacks tokens or labels. Go on without it: --checkpoint.resume_check off")
    return guarded(path, lambda: Witness(batch=batch, **{**content, "loss": float(content["loss"])}))
