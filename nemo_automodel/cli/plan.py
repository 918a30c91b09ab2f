"""Say before a run whether it fits, and how long it takes.

Only the configuration and the model's config.json are read: no weights, no data, no GPU. Memory is the peak of a
training step by what it is for; time is a roofline with measured rates. Where the run does not fit, the nearest
settings that do are printed as overrides, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from nemo_automodel.components.plan.machines import GIB, MACHINES, machine
from nemo_automodel.components.plan.memory import TERM_NAMES

if TYPE_CHECKING:
    from nemo_automodel.recipes.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options beside the config file and its overrides."""
    parser.usage = "automodel plan <config.yaml> [--section.key value ...] [--gpu NAME] [--seq-len N] [--json]"
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(MACHINES)} (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens of the longest row, where rows are not packed")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 when the run fits, 1 when it does not."""
    from nemo_automodel.components.config._arg_parser import load_config, parse_command_line
    from nemo_automodel.recipes.plan import plan_run

    target = machine(args.gpu)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the plan's alone
        config = load_config(parse_command_line(args.words, takes_positional=True))
    plan = plan_run(config, target, args.seq_len)
    print(json.dumps(as_json(plan), indent=1) if args.json else "\n".join(lines(plan)))
    return 0 if plan.fits else 1


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as numbers with their units in the names."""
    load = plan.load
    return {
        "model": load.shape.name,
        "gpu": plan.machine.name,
        "fits": plan.fits,
        "needed_gib": round(plan.needed_bytes / GIB, 2),
        "usable_gib": round(plan.machine.usable_bytes / GIB, 2),
        "memory_gib": {name: round(value, 2) for name, value in plan.memory.terms().items()},
        "step_host_gib": round(plan.step_host_gib, 2),
        "load_host_gib": round(plan.load_host_gib, 2),
        "load_device_gib": round(plan.load_device_gib, 2),
        "tokens_per_s": round(plan.speed.tokens_per_s),
        "step_s": round(plan.speed.step_s, 3),
        "hours": None if plan.num_steps is None else round(plan.num_steps * plan.speed.step_s / 3600, 2),
        "checkpoint_gib": round(plan.checkpoint_gib, 2),
        "weights": load.shape.num_weights,
        "trainable_weights": load.num_trainable,
        "micro_batch": {"rows": load.rows, "tokens": load.tokens},
        "notes": list(plan.notes),
        "overrides_that_fit": None if plan.alternative is None else plan.alternative[0],
    }


def lines(plan: Plan) -> list[str]:
    """Return the plan as the terminal shows it."""
    load, found = plan.load, as_json(plan)
    shape = load.shape
    out = [
        f"{shape.name} on {plan.machine.name}: {shape.num_weights / 1e9:.2f} billion weights, "
        f"{load.num_trainable / 1e6:.1f} million learn",
        f"micro-batches of {load.rows} × {load.seq_len:,} tokens, {load.grad_accum} a step",
        "",
    ]
    terms = {**TERM_NAMES, "weights": "weights of the layers"} if load.is_full else TERM_NAMES
    for name, value in found["memory_gib"].items():
        out.append(f"  {terms[name]:<28} {value:8.2f} GiB")
    verdict = "fits" if plan.fits else "does NOT fit"
    out += [
        f"  {'peak of a step':<28} {found['needed_gib']:8.2f} GiB of {found['usable_gib']:.1f}: {verdict}",
        "",
        f"  {'while loading':<28} {plan.load_device_gib:8.2f} GiB on the GPU, {plan.load_host_gib:.1f} on the host",
        f"  {'a checkpoint':<28} {plan.checkpoint_gib:8.2f} GiB on disk",
        f"  {'speed':<28} {plan.speed.tokens_per_s:8,.0f} tokens/s, {plan.speed.step_s:.2f} s a step",
    ]
    if found["hours"] is not None:
        out.append(f"  {f'{plan.num_steps:,} steps':<28} {found['hours']:8.2f} hours")
    out += ["", *plan.notes]
    if plan.alternative is not None:
        overrides = " ".join(f"--{key} {_as_word(value)}" for key, value in plan.alternative[0].items())
        out.append(f"This fits: {overrides}")
    elif not plan.fits:
        out.append("Nothing nearby fits. Take a smaller model, shorter rows, or a larger GPU.")
    return out


def _as_word(value: Any) -> str:
    """Return a value as a word of the command line."""
    return shlex.quote(str(value)) if isinstance(value, dict) else str(value).lower()
