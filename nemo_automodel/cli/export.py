"""Write a trained model for other programs: Hugging Face, PEFT, GGUF, Ollama, vLLM, SGLang.

Every export is read back and compared with the trained model on held-out rows; certificate.json holds what was found.

  hf      an ordinary model directory; an adapter is merged, see `automodel merge`
  peft    the adapter as it is
  gguf    one file for llama.cpp and what builds on it (--type)
  ollama  the same with a Modelfile: ollama create NAME -f OUT/Modelfile
  vllm    an adapter that vLLM takes, or a whole model, with the command that serves it; sglang likewise
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_automodel.cli.merge import add_export_arguments, wishes_of

_KINDS = ("hf", "peft", "gguf", "ollama", "vllm", "sglang")
_TYPES = ("q8_0", "f16", "bf16", "f32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel export``."""
    parser.add_argument("model", help="a checkpoint (checkpoints/LATEST), a run, a PEFT or a Hugging Face directory")
    parser.add_argument("--to", choices=_KINDS, required=True, help="the format")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the new directory to write")
    parser.add_argument("--type", choices=_TYPES, default="q8_0", help="how GGUF stores weights (%(default)s)")
    add_export_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and print the certificate's line."""
    from nemo_automodel.components.loggers.log_utils import setup_logging
    from nemo_automodel.recipes.export import refuse_failed
    from nemo_automodel.recipes.export_formats import export

    setup_logging()
    certificate = export(args.model, args.out, args.to, wishes_of(args), args.type)
    print(f"wrote {args.out}")
    refuse_failed(certificate, args.out)
    return 0
