"""The optimizer's state, split over processes: each updates some of the parameters and hands the others the result.

Adam keeps two numbers for every weight, as much as weights and gradients together in one dtype. Of N processes that
hold the same weights and gradients each needs to keep only an N-th of them: the optimizer of a process gets the
parameters that are its share, and after an update every process copies each parameter from its owner. The update is
that of one optimizer for all, number for number, since optimizers treat parameters one by one. The price is that the
trained weights travel once a step.

Whole parameters are shared out, the largest first to whoever has least, so shares are even where no parameter is larger
than a share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nemo_automodel.components.distributed.ranks import Ranks

_BUCKET_BYTES = 256 * 2**20


class Shares:
    """Who updates which of ``parameters``; the same in all processes. Everybody has at least one.

    There must be as many parameters as processes.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
        assert len(parameters) >= ranks.size
        self._ranks = ranks
        sizes = [0] * ranks.size
        owners: dict[int, int] = {}
        for number in sorted(range(len(parameters)), key=lambda number: -parameters[number].numel()):
            owners[number] = sizes.index(min(sizes))
            sizes[owners[number]] += max(parameters[number].numel(), 1)
        self._of_owner: list[list[torch.nn.Parameter]] = [
            [parameters[number] for number in range(len(parameters)) if owners[number] == rank]
            for rank in range(ranks.size)
        ]
        self._mine = set(self._of_owner[ranks.rank])

    def is_mine(self, parameter: torch.nn.Parameter) -> bool:
        """Tell whether this process updates a parameter."""
        return parameter in self._mine

    def spread(self) -> None:
        """Give every process the new values of all parameters; call it in all of them after an update."""
        with torch.no_grad():
            for owner, parameters in enumerate(self._of_owner):
                for group in _buckets(parameters):
                    if len(group) == 1 and group[0].is_contiguous():
                        self._ranks.copy_from(group[0], owner)
                        continue
                    flat = torch.cat([parameter.reshape(-1) for parameter in group])
                    self._ranks.copy_from(flat, owner)
                    if owner != self._ranks.rank:
                        news = torch.split(flat, [parameter.numel() for parameter in group])
                        for parameter, new in zip(group, news, strict=True):
                            parameter.copy_(new.view_as(parameter))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield groups of neighbours of one dtype and about ``_BUCKET_BYTES``."""
    group: list[torch.nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if group and (parameter.dtype != group[0].dtype or num_bytes + size > _BUCKET_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(parameter)
        num_bytes += size
    if group:
        yield group
