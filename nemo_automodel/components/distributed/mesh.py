"""The processes of a run, arranged along axes: data (dp), context (cp), tensor (tp), pipeline (pp), expert (ep).

A recipe asks the mesh, never a process group. One process is the whole mesh for now, so every axis has size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.components.distributed.config import DistributedConfig
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError


@dataclass(frozen=True)
class Mesh:
    """The position of this process on the data axis and the sums along it."""

    dp_size: int = 1
    dp_rank: int = 0

    def sum_dp(self, count: int) -> int:
        """Return the sum of a count over the data axis."""
        assert self.dp_size == 1, "more than one process comes with sharding"
        return count


def build_mesh(config: DistributedConfig, world_size: int) -> Mesh:
    """Arrange the processes.

    Raises:
        NotSupportedYetError: an axis of more than one process.
        ConfigError: a size that is no size.
    """
    for key in ("dp_size", "dp_replicate_size", "tp_size", "pp_size", "cp_size", "ep_size"):
        size = getattr(config, key)
        if size is None:
            continue
        if size < 1:
            raise ConfigError(f"`distributed.{key}` is {size}, but it must be at least 1, or null for the default.")
        if size > world_size:
            raise NotSupportedYetError(
                f"`distributed.{key}` is {size}, but training on more than one device is not supported yet. "
                "Set it to 1."
            )
    return Mesh()
