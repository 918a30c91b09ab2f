"""Redo one step that a run wrote to `debug/`, and show which of its rows is to blame.

The step is computed with the weights and the random numbers it had, so its loss and its gradient norm come out again;
then every row by itself. `--section.key value` changes the run's configuration, to try a remedy on that step: another
`model.torch_dtype`, `loss_fn`, or the place of the model on this machine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_automodel.recipes.replay import Replay, ReplayedRow

_NUM_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel replay``."""
    parser.usage = "automodel replay <run directory>/debug/step_N [--rows N] [--section.key value ...]"
    parser.set_defaults(words=[])
    parser.add_argument("dump", help="the directory of the step, for example checkpoints/debug/step_57")
    parser.add_argument(
        "--rows", type=int, default=_NUM_SHOWN, metavar="N", help="how many rows to show, worst first (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Redo the step and print what came out."""
    from nemo_automodel.components.loggers.log_utils import setup_logging
    from nemo_automodel.recipes.replay import replay

    setup_logging()
    found = replay(Path(args.dump), args.words)
    print("\n".join(_lines(found, args.rows, bool(args.words))))
    return 0


def _lines(found: Replay, num_rows: int, is_changed: bool) -> list[str]:
    facts = found.facts
    if found.is_same:
        verdict = "the same, bit for bit"
    elif not found.has_weights:
        verdict = "other weights: the dump has none, so the run's first ones were used"
    else:
        verdict = "not the same" + (": the configuration was changed" if is_changed else ": other kernels or versions")
    lines = [
        f"Step {facts.step} of epoch {facts.epoch} ({facts.finding}), {facts.num_label_tokens} label tokens",
        f"  {'':<10} {'loss':>14} {'grad_norm':>14}",
        f"  {'recorded':<10} {facts.loss:>14.6f} {facts.grad_norm:>14.6f}",
        f"  {'replayed':<10} {found.loss:>14.6f} {found.grad_norm:>14.6f}   {verdict}",
        "",
        f"  {'loss':>12} {'grad_norm':>12} {'tokens':>7}  row, by itself and without dropout",
    ]
    rows = sorted(found.rows, key=_worst_first)
    lines += [
        f"  {row.loss:>12.4f} {row.grad_norm:>12.4f} {row.num_label_tokens:>7}  {row.where}" for row in rows[:num_rows]
    ]
    if len(rows) > num_rows:
        lines.append(f"  and {len(rows) - num_rows} more (--rows {len(rows)})")
    return lines


def _worst_first(row: ReplayedRow) -> tuple[bool, float]:
    is_finite = math.isfinite(row.grad_norm) and (math.isfinite(row.loss) or row.num_label_tokens == 0)
    return is_finite, -row.grad_norm if is_finite else 0.0
