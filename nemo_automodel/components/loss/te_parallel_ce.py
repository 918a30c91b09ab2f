"""The loss that many YAML files name after Transformer Engine. Nothing of Transformer Engine is needed here.

On one device it is the same number as `MaskedCrossEntropy`. The reference's version gives NaN for a batch without a
label; this one gives 0.
"""

from __future__ import annotations

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.shared.errors import NotSupportedYetError
from nemo_automodel.shared.types import IGNORE_INDEX


class TEParallelCrossEntropy(MaskedCrossEntropy):
    """Cross-entropy over a vocabulary that may be split over a tensor-parallel group.

    Raises:
        NotSupportedYetError: ``tp_group`` is given; splitting the vocabulary comes with tensor parallelism.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, reduction: str = "sum", tp_group: object = None) -> None:
        if tp_group is not None:
            raise NotSupportedYetError(
                "`loss_fn.tp_group` splits the vocabulary over devices, which this version does not do yet. "
                "Leave it out and run on one device."
            )
        super().__init__(ignore_index=ignore_index, reduction=reduction)
