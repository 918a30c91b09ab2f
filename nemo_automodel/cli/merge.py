"""Merge an adapter into its base: an ordinary model directory, with a certificate that it is what was trained.

LoRA, DoRA and rsLoRA of a checkpoint, a run or a PEFT directory become weights (bf16 unless --dtype says otherwise),
computed in float64 and rounded once. An adapter that was trained on a 4-bit base is merged into the full base or into
the rounded one, whichever gives the lower loss on held-out rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_automodel.recipes.trained_model import Wishes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel merge``."""
    parser.add_argument("adapter", help="a checkpoint (checkpoints/LATEST), a run, or a PEFT directory")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the new directory to write")
    parser.add_argument(
        "--merge-into",
        choices=("auto", "full", "rounded"),
        default="auto",
        help="the base of a QLoRA adapter: full precision, or as it was rounded for training; auto: by held-out loss",
    )
    add_export_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what merge and export share."""
    parser.add_argument("--base", help="base model of the adapter, where it is not at the place the adapter names")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32")
    parser.add_argument("--device", help="where the models are compared: cpu, cuda; default: the GPU if there is one")
    parser.add_argument("--no-certificate", action="store_true", help="write without comparing")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Merge, and print the certificate's line."""
    from nemo_automodel.components.loggers.log_utils import setup_logging
    from nemo_automodel.recipes.export import merge, refuse_failed

    setup_logging()
    certificate = merge(args.adapter, args.out, wishes_of(args, args.merge_into))
    print(f"wrote {args.out}")
    refuse_failed(certificate, args.out)
    return 0


def wishes_of(args: argparse.Namespace, merge_into: str = "auto") -> Wishes:
    """Return what the command line asks for."""
    from nemo_automodel.recipes.trained_model import Wishes
    from nemo_automodel.shared.dtypes import parse_dtype

    return Wishes(
        base=args.base,
        merge_into=merge_into,
        dtype=None if args.dtype is None else parse_dtype(args.dtype, "--dtype"),
        device=args.device,
        is_certified=not args.no_certificate,
        trust_remote_code=args.trust_remote_code,
    )
