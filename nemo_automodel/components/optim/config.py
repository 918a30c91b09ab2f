"""Settings of the learning-rate schedule. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.shared.errors import ConfigError, did_you_mean

DECAY_STYLES = ("constant", "linear", "cosine", "WSD", "inverse-square-root")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
WD_STYLES = ("constant", "linear", "cosine")

OPTIMIZER_NAMES = {
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "fused_adam": "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam",
    "flash_adamw": "flashoptim.FlashAdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "adamw_sr": "nemo_automodel.components.optim.stochastic.adamw",
    "adamw8bit_sr": "nemo_automodel.components.optim.stochastic.adamw8bit",
    "muon": "dion.Muon",
    "normuon": "dion.NorMuon",
    "dion": "dion.Dion",
    "dion2": "dion.Dion2",
}
"""Short names of optimizers and what they stand for."""


def optimizer_path(name: str) -> str:
    """Return the dotted path of an optimizer given by a short name; a dotted path is returned as it is.

    Raises:
        ConfigError: a short name that is not known.
    """
    if "." in name:
        return name
    if name not in OPTIMIZER_NAMES:
        raise ConfigError(
            f"`optimizer._target_: {name}` is not known.{did_you_mean(name, OPTIMIZER_NAMES)} "
            f"Known short names: {', '.join(OPTIMIZER_NAMES)}; any other optimizer by its dotted path."
        )
    return OPTIMIZER_NAMES[name]


@dataclass(frozen=True)
class LRSchedulerConfig:
    """The ``lr_scheduler:`` section. ``null`` fields are filled from the optimizer and the length of the run."""

    lr_decay_style: str = "cosine"
    lr_warmup_steps: int | None = None
    """``null``: a tenth of the run, at most 1000."""
    lr_decay_steps: int | None = None
    """``null``: the whole run."""
    init_lr: float | None = None
    """``null``: a tenth of the optimizer's ``lr``."""
    max_lr: float | None = None
    """``null``: the optimizer's ``lr``."""
    min_lr: float | None = None
    """``null``: a hundredth of the optimizer's ``lr``."""
    start_wd: float | None = None
    end_wd: float | None = None
    wd_incr_steps: int | None = None
    wd_incr_style: str = "constant"
    use_checkpoint_opt_param_scheduler: bool | None = None
    """``true`` keeps a checkpoint's schedule when a run is extended; ``null`` plans the decay anew."""
    override_opt_param_scheduler: bool = False
    """``true`` ignores the schedule of a checkpoint and uses this section."""
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str = "exponential"

    def __post_init__(self) -> None:
        _require_one_of("lr_decay_style", self.lr_decay_style, DECAY_STYLES)
        _require_one_of("lr_wsd_decay_style", self.lr_wsd_decay_style, WSD_DECAY_STYLES)
        _require_one_of("wd_incr_style", self.wd_incr_style, WD_STYLES)
        for key in ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ConfigError(
                    f"`lr_scheduler.{key}` is {value}, but a number of steps is a whole number, 0 or more. Give steps, "
                    "not a share of the run."
                )
        if self.lr_decay_steps == 0:
            raise ConfigError(
                "`lr_scheduler.lr_decay_steps` is 0, but it must be at least 1. Use null for the whole run."
            )
        for key in ("init_lr", "max_lr", "min_lr"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ConfigError(f"`lr_scheduler.{key}` is {value}, but a learning rate cannot be negative.")
        if self.lr_decay_style == "WSD" and self.wsd_decay_steps is None:
            raise ConfigError("`lr_scheduler.lr_decay_style: WSD` needs `lr_scheduler.wsd_decay_steps`. Set it.")
        if self.use_checkpoint_opt_param_scheduler and self.override_opt_param_scheduler:
            raise ConfigError(
                "`lr_scheduler.use_checkpoint_opt_param_scheduler` and `lr_scheduler.override_opt_param_scheduler` are "
                "both true, but they contradict each other. Set one of them to false."
            )


def _require_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"`lr_scheduler.{key}: {value}` is not known.{did_you_mean(value, known)} Known: {', '.join(known)}."
        )
