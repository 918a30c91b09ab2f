"""Cross-entropy a fixed number of rows at a time: the least memory beyond the logits and their gradient."""

from __future__ import annotations

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX


class ChunkedCrossEntropy(MaskedCrossEntropy):
    """`MaskedCrossEntropy` with the chunk length in the user's hand.

    Args:
        chunk_len: rows of logits that are held in fp32 at once.
        compile: accepted and unused: a chunk is a handful of operations with a hand-written backward pass, and
            compiling them would start a compiler for nothing.
        ignore_index: the label of positions that are not learned.
        reduction: ``sum``, ``mean`` over the learned positions, or ``none``.

    Raises:
        UserError: unknown reduction, or a chunk of no rows.
    """

    def __init__(
        self, chunk_len: int = 32, compile: bool = True, ignore_index: int = IGNORE_INDEX, reduction: str = "sum"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if chunk_len < 1:
            raise UserError(f"`loss_fn.chunk_len` is {chunk_len}, but a chunk has at least one row. Use 32 or more.")
        self.chunk_rows = chunk_len
