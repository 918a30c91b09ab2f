"""Settings of checkpoints. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, did_you_mean

# keys that change what is saved or loaded and that no code honours yet
_LATER = (
    "model_cache_dir",
    "model_repo_id",
    "dequantize_base_checkpoint",
    "original_model_root_dir",
    "skip_task_head_prefixes_for_base_model",
    "v4_compatible",
    "diffusers_compatible",
)

_RESUME_CHECKS = ("error", "warn", "off")


@dataclass(frozen=True)
class CheckpointingConfig:
    """The ``checkpoint:`` section."""

    enabled: bool = True
    checkpoint_dir: str = "checkpoints/"
    model_save_format: str = "safetensors"
    """``torch_save``: the weights go to ``model_dcp/`` as torch's own format, and ``model/`` has everything else."""
    save_consolidated: bool | str = "final"
    """``false``, ``final`` or ``every`` (``true`` is ``every``). One process writes the Hugging Face files at every
    save, whatever this says."""
    is_async: bool = False
    """Write beside training; costs host memory of the size of a checkpoint."""
    wait_for_staging: bool = False
    """With ``is_async``: copy before training goes on instead of during the next forward and backward pass."""
    cpu_offload: bool = False
    model_cache_dir: str | None = None
    """``null``: the Hugging Face cache."""
    model_repo_id: str | None = None
    allow_legacy_pickle_restore: bool = False
    dequantize_base_checkpoint: bool | None = None
    original_model_root_dir: str | None = None
    skip_task_head_prefixes_for_base_model: list[str] | None = None
    single_rank_consolidation: bool = False
    staging_dir: str | None = None
    v4_compatible: bool = False
    diffusers_compatible: bool = False
    best_metric_key: str = "default"
    """Name of the validation set whose loss decides ``LOWEST_VAL``."""
    consolidation_timeout_minutes: int = 30
    max_recent_checkpoints: int | None = None
    """Keep this many newest checkpoints, and whatever a pointer names."""
    restore_from: str | None = None
    """``null`` resumes from ``LATEST``; a pointer name, a directory name under ``checkpoint_dir``, or a path."""
    resume_check: bool | str = "error"
    """At a resume the next batch and its loss are compared with what they were at the save. ``error`` ends the run
    where they differ, ``warn`` says so and goes on, ``off`` (or ``false``) neither records nor compares."""
    load_base_model: bool | None = None

    def __post_init__(self) -> None:
        formats = ("safetensors", "torch_save")
        if self.model_save_format not in formats:
            raise ConfigError(
                f"`checkpoint.model_save_format: {self.model_save_format}` is not known."
                f"{did_you_mean(self.model_save_format, formats)} Known: {', '.join(formats)}."
            )
        if self.save_consolidated not in (True, False, "final", "every"):
            raise ConfigError(
                f"`checkpoint.save_consolidated: {self.save_consolidated}` is not known. Use false, final or every."
            )
        if self.resume_check not in (True, False, *_RESUME_CHECKS):
            raise ConfigError(
                f"`checkpoint.resume_check: {self.resume_check}` is not known."
                f"{did_you_mean(str(self.resume_check), _RESUME_CHECKS)} Use error, warn or off."
            )
        if self.max_recent_checkpoints is not None and self.max_recent_checkpoints < 1:
            raise ConfigError(
                f"`checkpoint.max_recent_checkpoints` is {self.max_recent_checkpoints}, but at least 1 must be kept. "
                "Use null to keep all."
            )
        self._refuse_what_comes_later()

    @property
    def resume_policy(self) -> str:
        """What happens where a resume is not exact: ``error``, ``warn``, or ``off`` for no comparison."""
        if isinstance(self.resume_check, bool):  # what YAML makes of `on` and `off`
            return "error" if self.resume_check else "off"
        return self.resume_check

    def notices(self) -> list[str]:
        """Return a line for each key that has no effect in this run."""
        found = [
            f"`checkpoint.{key}` has no effect on one process, which writes the final files directly."
            for key, default in (
                ("staging_dir", None),
                ("single_rank_consolidation", False),
                ("consolidation_timeout_minutes", 30),
                ("cpu_offload", False),
            )
            if getattr(self, key) != default
        ]
        if self.wait_for_staging and not self.is_async:
            found.append("`checkpoint.wait_for_staging: true` has no effect without `checkpoint.is_async: true`.")
        return found

    def _refuse_what_comes_later(self) -> None:
        for key in _LATER:
            value = getattr(self, key)
            if value:
                raise NotSupportedYetError(f"`checkpoint.{key}: {value}` is not supported yet. Remove the key.")
        if self.checkpoint_dir.startswith("msc://"):
            raise NotSupportedYetError(
                f"`checkpoint.checkpoint_dir: {self.checkpoint_dir}`: object stores are not supported yet. "
                "Use a local directory."
            )
