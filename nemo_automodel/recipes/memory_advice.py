"""Words about a micro-batch that did not fit: what it was, what takes the memory by the plan, and which key helps."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.recipes.plan import predict
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import UserError


@dataclass(frozen=True)
class Misfit:
    """What did not fit."""

    num_rows: int
    row_len: int
    policy: str
    asked_for: str = ""
    """Memory that was refused, such as ``2.00 GiB``; empty where that is not known."""
    in_use: str = ""
    """What the device held; empty on the CPU."""

    def __str__(self) -> str:
        rows = "1 row" if self.num_rows == 1 else f"{self.num_rows} rows"
        facts = [f"recomputed: {self.policy}", self.in_use, self.asked_for and f"another {self.asked_for} refused"]
        return f"{rows} × {self.row_len:,} tokens did not fit in memory ({'; '.join(fact for fact in facts if fact)})"


class MemoryAdvice:
    """Advice for the run of ``settings``."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings

    def on_rescue(self, misfit: Misfit, policy: str, num_rows: int, is_first: bool) -> str:
        """Return what is said when a step is done again, with ``num_rows`` rows at once under ``policy``."""
        if policy != misfit.policy:
            how = f"with more computed again in the backward pass ({policy})"
            key = f"If most rows are as long, set --distributed.activation_checkpointing {policy}"
        else:
            how = f"with at most {num_rows} of such rows at once"
            key = f"To have it so from the start: {self._smaller_batch(misfit, num_rows)}"
            if self._settings.memory.policy != "auto":
                key += "; or let the planner choose what is computed again: --memory auto"
        said = f"{misfit}, so the step is done again {how}, and later ones are computed so at once"
        if not is_first:
            return f"{said}."
        return f"{said}. Its update stays the same up to the order of sums. {self._consumers(misfit)}{key}"

    def last_words(self, misfit: Misfit, rescues: bool) -> str:
        """Return the message of a run that ends: nothing was left to try, or nothing was to be tried."""
        if not rescues:
            key = self._smaller_batch(misfit, -(-misfit.num_rows // 2))
            if self._settings.deterministic:
                key = key if misfit.num_rows > 1 else "--distributed.activation_checkpointing full"
                rule = ", and under `deterministic: true` no step is done again in parts, which add up otherwise"
                return f"{misfit}{rule}. {self._consumers(misfit)}Set {key}"
            remedy = f"Set `memory.rescue: true`, which does such steps again in smaller parts, or {key}"
            return f"{misfit}. {self._consumers(misfit)}{remedy}"
        rule = ", and there is nothing left to split or to compute again"
        return f"{misfit}{rule}. {self._consumers(misfit)}{self._remedies(misfit)}"

    def updated_already(self, misfit: Misfit) -> str:
        """Return the message of a run whose optimizer had updated some weights when memory ran out."""
        return (
            f"{misfit}, and `optimizer.in_backward` had updated some weights by then, so the step cannot be done "
            f"again. {self._consumers(misfit)}Start again from the last checkpoint with "
            "--distributed.activation_checkpointing full, a smaller global batch, or without `in_backward`."
        )

    def _consumers(self, misfit: Misfit) -> str:
        """Return a sentence with the largest terms of the plan, nothing where the model cannot be planned."""
        try:
            needed = predict(self._settings, misfit.num_rows, misfit.row_len, misfit.policy)
        except UserError:
            return ""
        return f"By the plan most memory is taken by {needed.largest()}. "

    def _smaller_batch(self, misfit: Misfit, num_rows: int) -> str:
        """Return the override that makes micro-batches of at most ``num_rows`` rows of this length."""
        schedule = self._settings.step_scheduler
        if schedule.local_batch_tokens is not None:
            return f"--step_scheduler.local_batch_tokens {num_rows * misfit.row_len}"
        total = schedule.global_batch_size
        fitting = next(size for size in range(min(num_rows, total), 0, -1) if total % size == 0)
        if fitting >= schedule.local_batch_size:  # the batch was larger than those of training
            fitting = max(1, schedule.local_batch_size // 2)
        return f"--step_scheduler.local_batch_size {fitting}"

    def _remedies(self, misfit: Misfit) -> str:
        settings = self._settings
        ways = ["shorten the rows"]
        if settings.packed_sequence.packed_sequence_size:
            ways = [f"--packed_sequence.packed_sequence_size {misfit.row_len // 2}"]
        elif settings.dataset.get("seq_length"):
            ways = [f"--dataset.seq_length {misfit.row_len // 2}"]
        if settings.peft is not None and settings.quantization is None and settings.fp8 is None:
            ways.append("--quantization.load_in_4bit true")
        if settings.peft is None:
            ways.append("an optimizer with a smaller state (--optimizer._target_ adamw8bit)")
        return f"Use {', '.join(ways)}, or a larger GPU; `automodel plan` says what would fit."
