"""The processes of a run, arranged along axes: data (dp), context (cp), tensor (tp), pipeline (pp), expert (ep).

A recipe asks the mesh, never a process group. All processes are on the data axis for now; the others have size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.components.distributed.config import DistributedConfig
from nemo_automodel.components.distributed.ranks import ALONE, Ranks
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError


@dataclass(frozen=True)
class Mesh:
    """The position of this process on the data axis and the sums along it."""

    dp_size: int = 1
    dp_rank: int = 0
    ranks: Ranks = ALONE

    def sum_dp(self, count: int) -> int:
        """Return the sum of a count over the data axis."""
        return self.ranks.sum(count)


def build_mesh(config: DistributedConfig, ranks: Ranks = ALONE) -> Mesh:
    """Arrange the processes.

    Raises:
        NotSupportedYetError: an axis other than the data's has more than one process.
        ConfigError: a size that is no size, or data axes that do not take all processes.
    """
    for key in ("dp_size", "dp_replicate_size", "tp_size", "pp_size", "cp_size", "ep_size"):
        size = getattr(config, key)
        if size is None:
            continue
        if size < 1:
            raise ConfigError(f"`distributed.{key}` is {size}, but it must be at least 1, or null for the default.")
        if size > 1 and not key.startswith("dp_"):
            raise NotSupportedYetError(
                f"`distributed.{key}` is {size}: splitting a model over devices is not supported yet. Set it to 1."
            )
    config.check_data_axis(ranks.size)
    return Mesh(ranks.size, ranks.rank, ranks)
