"""What a run says after its last step: where its checkpoint is, how good it became, and what to do with it."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_automodel.components.checkpoint.restore import newest_checkpoint
from nemo_automodel.components.loggers.run_record import extreme, points, read_run
from nemo_automodel.components.training.step_scheduler import Step

logger = logging.getLogger(__name__)


def log_what_next(run_dir: Path, step: Step | None, num_steps: int) -> None:
    """Say how the run ended; ``step`` is the last one of this session, ``num_steps`` counts those of the whole run."""
    if step is not None and step.is_preempted and not step.is_last:
        logger.info("Stopped after step %d. The same command goes on from there.", step.index)
        return
    lines = [f"Training is done after {num_steps} steps."]
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None:
        lines.append(f"  checkpoint       {checkpoint}")
    for name, records in read_run(run_dir).validation.items():
        best = extreme(points(records, "val_loss"), min)
        if best is not None:
            lines.append(f"  best validation  {best[0]:.4f} ({name}, step {best[1]})")
    lines.append(f"  look at it       automodel report {run_dir}")
    if checkpoint is not None:
        lines.append(f"  try it           automodel chat {checkpoint}")
    logger.info("\n".join(lines))
