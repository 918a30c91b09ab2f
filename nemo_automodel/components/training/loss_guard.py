"""Telling a sick step from a healthy one, from the two numbers that every step reports. Free of torch.

A loss or gradient norm that is not finite is sick beyond doubt. A *spike* is a finite loss far above the last ones:
more than ``spike_threshold`` robust standard deviations (1.4826 times the median distance from the median, Rousseeuw
and Croux 1993) above the median of the last fifty. Both survive outliers, so one spike does not hide the next. The
price is a sort of fifty numbers a step.

What is remembered goes into the checkpoint: a resumed run judges as the undisturbed one does.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from typing import Any

from nemo_automodel.components.training.config import LossGuardConfig

_WINDOW = 50
_MIN_LOSSES = 20
"""Below this nothing is a spike: the losses of the first steps fall fast."""
_SIGMA_OF_MAD = 1.4826
_LEAST_RISE = 0.05
"""Share of the median that a spike exceeds it by at least: losses may be almost equal."""


class Finding(enum.Enum):
    """What a step is."""

    HEALTHY = "healthy"
    SPIKE = "spike"
    NONFINITE = "nonfinite"


class LossGuard:
    """Judges the steps of a run in order."""

    def __init__(self, config: LossGuardConfig) -> None:
        self.config = config
        self.num_nonfinite = 0
        """Steps of the run, sessions before this one included."""
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    @property
    def median(self) -> float:
        """Median of the last losses, NaN before the first."""
        return statistics.median(self._losses) if self._losses else math.nan

    def judge(self, loss: float, grad_norm: float) -> Finding:
        """Tell what the step is, and remember it."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.num_nonfinite += 1
            return Finding.NONFINITE
        is_spike = self._is_spike(loss)
        self._losses.append(loss)
        return Finding.SPIKE if is_spike else Finding.HEALTHY

    def _is_spike(self, loss: float) -> bool:
        threshold = self.config.spike_threshold
        if threshold is None or len(self._losses) < _MIN_LOSSES:
            return False
        median = self.median
        spread = _SIGMA_OF_MAD * statistics.median(abs(known - median) for known in self._losses)
        return loss > median + max(threshold * spread, _LEAST_RISE * abs(median))

    @property
    def is_over_limit(self) -> bool:
        """Tell whether there were more steps that are not finite than the run may have."""
        return self.num_nonfinite > self.config.max_nonfinite

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as JSON holds it."""
        return {"num_nonfinite": self.num_nonfinite, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was remembered."""
        self.num_nonfinite = int(state["num_nonfinite"])
        self._losses = deque((float(loss) for loss in state["losses"]), maxlen=_WINDOW)
