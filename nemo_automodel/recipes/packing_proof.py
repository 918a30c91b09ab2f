"""The isolation proof of a run: its model, its loss's way through the model, and its packer."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from nemo_automodel._transformers.isolation_proof import ROW_LEN, Document, prove_isolation
from nemo_automodel.components.datasets import packing
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.packed_row import packed_row
from nemo_automodel.components.datasets.prefix_sharing import MIN_PREFIX, PrefixSharing
from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater
from nemo_automodel.recipes.engine import EagerEngine
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)


def prove_packing(engine: EagerEngine, settings: RunSettings) -> None:
    """Prove that packed documents do not see each other, and say so, where the run packs and the proof is not off.

    Raises:
        UserError: they do, or the model cannot keep them apart.
    """
    cfg = settings.packed_sequence
    if cfg.packed_sequence_size == 0 or not cfg.prove_isolation:
        return
    row_len = min(cfg.packed_sequence_size, ROW_LEN)
    is_compiled = settings.compile.enabled or settings.distributed.enable_compile
    # a compiled model would be compiled once more for the proof's small rows
    with torch.compiler.set_stance("force_eager" if is_compiled else "default"), engine.autocast():
        proof = prove_isolation(
            engine.forward,
            lambda documents: pack_documents(documents, replace(cfg, packed_sequence_size=row_len)),
            row_len,
            MIN_PREFIX if cfg.share_prefix else 0,
        )
    logger.log(logging.INFO if proof.is_conclusive else logging.WARNING, "%s", proof)


def pack_documents(documents: list[Document], cfg: PackedSequenceConfig) -> Batch:
    """Pack documents into rows as training data is packed, and collate all rows."""
    pieces = [
        packing.Document(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)) for ids, labels in documents
    ]
    if cfg.share_prefix:
        pieces = PrefixSharing(cfg.packed_sequence_size, shuffle=False)(pieces)
    lengths = ((number, len(piece.ids)) for number, piece in enumerate(pieces))
    packs = packing.strategy_of(cfg)(lengths, cfg.packed_sequence_size)
    rows = [packed_row([pieces[number] for number in pack], cfg.packed_sequence_size, 0) for pack in packs]
    return packed_sequence_thd_collater(rows)
