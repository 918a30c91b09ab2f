"""Settings of loaders and packing. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, did_you_mean

PACKING_STRATEGIES = ("thd", "neat")


@dataclass(frozen=True)
class DataloaderConfig:
    """The ``dataloader:`` and ``validation_dataloader:`` sections, without ``_target_``."""

    collate_fn: Any = None
    """A dotted name, a registry name (``default``) or a ``_target_`` mapping; ``null`` picks the right one."""
    shuffle: bool | None = None
    """``null``: shuffle map-style training data, keep validation data in order."""
    group_by_length: bool = False
    shuffle_buffer_size: int = 10000
    """Streams whose rows have numbers are shuffled as a whole instead."""
    batch_size: int | str | None = "local"
    """``local`` is ``step_scheduler.local_batch_size``; ``null``: the dataset yields whole batches."""
    num_workers: int = 0
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_factor: int | None = None
    drop_last: bool = False
    dataloader_type: str | None = None
    sampler: Any = None
    dataset: Any = None

    def __post_init__(self) -> None:
        if self.sampler is not None:
            raise NotSupportedYetError(
                "`dataloader.sampler` is not supported yet. Remove it: rows are shuffled or kept in order by "
                "`dataloader.shuffle`, and shared out over ranks."
            )
        if self.batch_size not in (None, "local") and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise ConfigError(
                f"`dataloader.batch_size` is {self.batch_size}, but it must be at least 1. Leave it out to use "
                "`step_scheduler.local_batch_size`, or use null where the data set yields whole batches."
            )
        if self.num_workers < 0:
            raise ConfigError(f"`dataloader.num_workers` is {self.num_workers}, but it cannot be negative. Use 0.")
        for key in ("persistent_workers", "prefetch_factor"):
            if getattr(self, key) and self.num_workers == 0:
                raise ConfigError(
                    f"`dataloader.{key}: {getattr(self, key)}` needs workers, but `dataloader.num_workers` is 0. "
                    f"Set it to 1 or more, or remove `{key}`."
                )


@dataclass(frozen=True)
class PackedSequenceConfig:
    """The ``packed_sequence:`` section."""

    packed_sequence_size: int = 0
    """Tokens of a packed row; 0 turns packing off."""
    max_packs: int | None = None
    prepacked: bool = False
    num_proc: int = 1
    packing_strategy: str = "thd"
    """``thd``: documents in order, next fit. ``neat``: the longest document that still fits, first."""
    drop_long_samples: bool = True
    """``true`` drops documents longer than a row and says how many; ``false`` refuses them."""
    split_across_pack: bool | None = None

    def __post_init__(self) -> None:
        if self.packed_sequence_size < 0:
            raise ConfigError(
                f"`packed_sequence.packed_sequence_size` is {self.packed_sequence_size}, but a length cannot be "
                "negative. Use 0 to turn packing off."
            )
        if self.packing_strategy not in PACKING_STRATEGIES:
            raise ConfigError(
                f"`packed_sequence.packing_strategy: {self.packing_strategy}` is not known."
                f"{did_you_mean(self.packing_strategy, PACKING_STRATEGIES)} Known: {', '.join(PACKING_STRATEGIES)}."
            )
