"""The demo's model: from the GGUF file of a package to an ordinary Hugging Face directory.

The weights were quantised to 4 bits (Q4_1) by whoever packed them, and are multiplied out again here. So they are not
the published SmolLM2-135M-Instruct but a slightly rougher copy, and every name given to them says so.

Reading a GGUF file loses a little of the tokenizer; what is lost is known and put back (`restore_tokenizer`).
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS, EOS, UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MAX_LENGTH_TOKENS = 8192


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of ``gguf`` to the new directory ``target``, weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # three progress bars inside Transformers
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        restore_tokenizer(tokenizer)
        forget_quantizer(model, tokenizer)
        target.mkdir(parents=True)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def restore_tokenizer(tokenizer: Any) -> None:
    """Put back, in place, what the GGUF reader of Transformers 5 drops or misreads.

    SmolLM2 splits numbers into single digits before anything else; without that step ``12345`` becomes other tokens
    than the model was trained on. Transformers 5.17 takes ``<|im_start|>`` for the end token.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.bos_token, tokenizer.eos_token = BOS, EOS
    tokenizer.pad_token, tokenizer.unk_token = EOS, UNK
    tokenizer.model_max_length = MAX_LENGTH_TOKENS


def forget_quantizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Make a model that was read from GGUF an ordinary one, in place.

    Transformers 5.23 refuses to save it otherwise.
    """
    plain: Any = model
    plain.hf_quantizer = None
    plain.is_quantized = False
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(leftover, None)
    for config in (model.config, plain.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
