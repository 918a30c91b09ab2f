"""Settings of loaders, packing and the label gate. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, did_you_mean

MIX_STOPPING_RULES = ("first_exhausted", "all_exhausted")
PACKING_STRATEGIES = ("thd", "best_fit", "neat")
LONG_POLICIES = ("drop", "error", "truncate")
PACKED_ATTENTIONS = ("auto", "varlen", "flex", "dense")


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
    timeout: float = 600.0
    """Seconds without a batch after which workers count as hung and the run ends; 0 waits for ever."""
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
        if self.timeout < 0:
            raise ConfigError(
                f"`dataloader.timeout` is {self.timeout:g}, but a time cannot be negative. Use 600, or 0 for no limit."
            )
        for key in ("persistent_workers", "prefetch_factor"):
            if getattr(self, key) and self.num_workers == 0:
                raise ConfigError(
                    f"`dataloader.{key}: {getattr(self, key)}` needs workers, but `dataloader.num_workers` is 0. "
                    f"Set it to 1 or more, or remove `{key}`."
                )


@dataclass(frozen=True)
class MixConfig:
    """A ``dataset:`` section that mixes several sets."""

    mix: list[Any] = field(default_factory=list)
    """The sets, each a mapping with ``dataset`` and ``weight``."""
    stopping: str = "first_exhausted"
    """``first_exhausted``: no row twice; ``all_exhausted``: until every set has been read as a whole."""
    seed: int | None = None
    """``null``: the run's seed."""

    def __post_init__(self) -> None:
        if self.stopping not in MIX_STOPPING_RULES:
            raise ConfigError(
                f"`stopping: {self.stopping}` of a mixture is not known."
                f"{did_you_mean(self.stopping, MIX_STOPPING_RULES)} Known: {', '.join(MIX_STOPPING_RULES)}."
            )


@dataclass(frozen=True)
class MixPartConfig:
    """One set of a mixture."""

    dataset: Any = None
    """A ``dataset:`` section of its own."""
    weight: float = 1.0
    """Its share of the rows, relative to the other weights."""


@dataclass(frozen=True)
class PackedSequenceConfig:
    """The ``packed_sequence:`` section."""

    packed_sequence_size: int = 0
    """Tokens of a packed row; 0 turns packing off."""
    max_packs: int | None = None
    prepacked: bool = False
    num_proc: int | None = None
    """Processes that tokenise in the background; ``null``: one for each core, at most 8."""
    packing_strategy: str = "thd"
    """``thd``: documents in order, next fit. ``best_fit``: of the next ``look_ahead`` documents the one that fills the
    row best. ``neat``: the longest document of the whole set that still fits, first."""
    look_ahead: int = 1000
    """Documents that ``best_fit`` chooses from."""
    cache: bool | str = True
    """Keep tokenised rows on disk; a text names the directory."""
    cache_days: int | None = 30
    """Remove tokenised rows that no run has used for so many days; ``null`` keeps them."""
    drop_long_samples: bool = True
    """``true`` drops documents longer than a row and says how many; ``false`` refuses them."""
    on_long: str | None = None
    """``drop``, ``error`` or ``truncate`` documents longer than a row; ``null``: as ``drop_long_samples`` says."""
    split_across_pack: bool | None = None
    share_prefix: bool = False
    """Store neighbours that begin with the same tokens once, with a branch for each."""
    attention: str = "auto"
    """The kernel that keeps documents apart: ``varlen``, ``flex``, ``dense``; ``auto`` takes the first that can run."""
    prove_isolation: bool = True
    """Prove before the first step that packed documents do not see each other."""

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
        if self.look_ahead < 1:
            raise ConfigError(
                f"`packed_sequence.look_ahead` is {self.look_ahead}, but it must be at least 1. Use 1000."
            )
        if self.cache_days is not None and self.cache_days < 1:
            raise ConfigError(
                f"`packed_sequence.cache_days` is {self.cache_days}, but it must be at least 1. Use 30, or null to "
                "keep tokenised rows for ever."
            )
        if self.on_long is not None and self.on_long not in LONG_POLICIES:
            raise ConfigError(
                f"`packed_sequence.on_long: {self.on_long}` is not known."
                f"{did_you_mean(self.on_long, LONG_POLICIES)} Known: {', '.join(LONG_POLICIES)}."
            )
        if self.prepacked and self.share_prefix:
            raise ConfigError(
                "`packed_sequence.share_prefix: true` needs documents to pack, but with `prepacked: true` the rows are "
                "packed already. Remove one of the two."
            )
        if self.attention not in PACKED_ATTENTIONS:
            raise ConfigError(
                f"`packed_sequence.attention: {self.attention}` is not known."
                f"{did_you_mean(self.attention, PACKED_ATTENTIONS)} Known: {', '.join(PACKED_ATTENTIONS)}."
            )

    @property
    def long_policy(self) -> str:
        """What happens to a document longer than a row: ``drop``, ``error`` or ``truncate``."""
        return self.on_long or ("drop" if self.drop_long_samples else "error")


@dataclass(frozen=True)
class DataCheckConfig:
    """The ``data_check:`` section: what the label gate bears. ``data_check: off`` skips the gate."""

    sample_rows: int = 256
    """Rows looked at beside those of step 0, chosen by the run's seed."""
    max_truncated_share: float = 0.5
    """Share of rows that may lose part of their answer."""
    max_dropped_share: float = 0.2
    """Share of rows that packing or ``skip_invalid_samples`` may leave out."""
    max_unlearned_share: float = 0.0
    """Share of rows of which nothing may be learned."""
    require_end_token: bool = True
    """``false`` for text without ends, such as pieces of a corpus."""

    def __post_init__(self) -> None:
        if self.sample_rows < 0:
            raise ConfigError(f"`data_check.sample_rows` is {self.sample_rows}, but it cannot be negative. Use 0.")
        for key in ("max_truncated_share", "max_dropped_share", "max_unlearned_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(
                    f"`data_check.{key}` is {getattr(self, key):g}, but a share lies between 0 and 1. Use 0.5 for half."
                )
