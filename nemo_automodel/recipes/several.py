"""What a run of several processes may not ask for. Free of torch.

The processes hold the same weights, take turns at the rows of a global batch, and add up their gradients once a step.
So a step is the step of one process with the same global batch, up to the order in which its sums are made. What has
not been shown to keep that is refused here by name, never ignored.
"""

from __future__ import annotations

from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import NotSupportedYetError

_KEPT_WHOLE = (
    "`distributed.strategy: fsdp2` on {num} devices: the optimizer's state is sharded, but weights and gradients are "
    "kept whole on each for now. The updates are those of FSDP2."
)


def check_several(settings: RunSettings, num_processes: int) -> list[str]:
    """Return what to say of a run on ``num_processes``.

    Raises:
        ConfigError: it asks for another number.
        NotSupportedYetError: it asks for something that only one process can do so far.
    """
    settings.distributed.check_data_axis(num_processes)
    if num_processes == 1:
        return []
    strategy = settings.distributed.strategy
    if strategy not in ("ddp", "fsdp2"):
        raise NotSupportedYetError(
            f"`distributed.strategy: {strategy}` on {num_processes} devices is not supported yet. Set it to ddp."
        )
    if settings.optimizer.get("in_backward"):
        raise NotSupportedYetError(
            f"`optimizer.in_backward: true` on {num_processes} devices is not supported yet: weights would be updated "
            "before gradients are added up. Set it to false."
        )
    if strategy == "fsdp2" and settings.checkpoint.is_async:
        raise NotSupportedYetError(
            f"`checkpoint.is_async: true` with `distributed.strategy: fsdp2` on {num_processes} devices is not "
            "supported yet. Set is_async to false, or the strategy to ddp."
        )
    return [_KEPT_WHOLE.format(num=num_processes)] if strategy == "fsdp2" else []


def refuse_benchmark(num_processes: int) -> None:
    """Refuse to time several processes.

    Raises:
        NotSupportedYetError: there are several.
    """
    if num_processes > 1:
        raise NotSupportedYetError(
            f"A benchmark on {num_processes} devices is not supported yet. Start it with --nproc-per-node 1"
        )


def refuse_stream(section: str, num_processes: int) -> NotSupportedYetError:
    """Return the error for a data set without a length."""
    return NotSupportedYetError(
        f"`{section}` is a stream, and streams on {num_processes} devices are not supported yet. Use a set whose rows "
        "have numbers (`streaming: false`), or one process."
    )
