"""Generate text from a model, a checkpoint or an adapter.

The answer is streamed to standard output and nothing else is written there, so it can be piped. The prompt goes through
the tokenizer's own chat template, which is what a fine-tuned model was taught with; ``--raw`` or a tokenizer without a
template gives the prompt to the model as it is. Decoding is greedy unless ``--temperature`` says otherwise, so the same
command gives the same answer.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from nemo_automodel.components.loggers.console import progress
from nemo_automodel.shared.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel generate``."""
    parser.add_argument("--prompt", required=True, help="the prompt; `-` reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add_model_arguments(parser, temperature=0.0)


def add_model_arguments(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Declare what generate and chat share; ``temperature`` is the default."""
    parser.add_argument("model", help="a model directory or Hub name, a checkpoint (checkpoints/LATEST) or an adapter")
    parser.add_argument("--base", help="base model of an adapter, where it is not at the place the adapter names")
    parser.add_argument("--system", help="system message, for tokenizers with a chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens to answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 takes the likeliest token (%(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this mass (%(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Stream the answer to one prompt."""
    check_sampling(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise UserError(
            "The prompt is empty. Give some text with --prompt, or `--prompt -` and text on standard input."
        )
    model, tokenizer = load(args)
    try:
        answer(model, tokenizer, _messages(prompt, args, tokenizer.chat_template is not None), args)
    except BrokenPipeError:  # the reader of a pipe, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _messages(prompt: str, args: argparse.Namespace, has_template: bool) -> str | list[dict[str, str]]:
    """Return what the model is given: the text itself, or messages for the chat template."""
    if has_template and not args.raw:
        system = [{"role": "system", "content": args.system}] if args.system else []
        return [*system, {"role": "user", "content": prompt}]
    if args.system:
        raise UserError("`--system` needs a chat template. Leave out --raw, or put the text into the prompt.")
    return prompt


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, before a model is loaded.

    Raises:
        UserError: naming the flag.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"`--max-new-tokens {args.max_new_tokens}` must be at least 1.")
    if not args.temperature >= 0:
        raise UserError(f"`--temperature {args.temperature}` must be 0 (greedy) or more, for example 0.7.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"`--top-p {args.top_p}` must be above 0 and at most 1, for example 0.9.")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model and its tokenizer and seed the sampling."""
    import torch

    from nemo_automodel._transformers.inference import load_for_inference

    with progress(f"Loading {args.model}"):
        model, tokenizer = load_for_inference(
            args.model, base=args.base, device=args.device, trust_remote_code=args.trust_remote_code
        )
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return model, tokenizer


def answer(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], args: argparse.Namespace) -> str:
    """Stream the answer to standard output, end it with a line break and return it.

    Raises:
        UserError: the chat template refuses the messages, as some do with a system message.
    """
    import jinja2

    from nemo_automodel._transformers.inference import generate_text

    pieces = []
    try:
        for piece in generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
        ):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except jinja2.TemplateError as error:
        raise UserError(
            f"The chat template refuses the messages: {error}. Try without --system, or with --raw."
        ) from error
    finally:
        if pieces:
            sys.stdout.write("\n")
    if not pieces:
        print("(no answer: the model ended the text at once)", file=sys.stderr)
    return "".join(pieces)
