"""Upload a model to the Hugging Face Hub, private unless --public, with a model card; it must have a certificate.

  automodel export checkpoints/LATEST --to hf -o my-model
  automodel push my-model my-cool-model --run checkpoints/LATEST

The token is HF_TOKEN, or what `hf auth login` left; it needs write access. An upload that broke off goes on when the
command is run again.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel push``."""
    parser.add_argument("model", help="what `automodel export` or `automodel merge` wrote, or a checkpoint")
    parser.add_argument("repo", help="name at the Hub: owner/name, or a name alone for your own account")
    parser.add_argument("--run", help="the checkpoint that it comes from, for the model card")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--no-certificate", action="store_true", help="upload without proof of what it is")


def run(args: argparse.Namespace) -> int:
    """Upload, and print the address."""
    from nemo_automodel.components.loggers.log_utils import setup_logging
    from nemo_automodel.recipes.push import push

    setup_logging()
    address = push(
        args.model, args.repo, is_public=args.public, needs_certificate=not args.no_certificate, run=args.run
    )
    print(f"uploaded to {address}")
    return 0
