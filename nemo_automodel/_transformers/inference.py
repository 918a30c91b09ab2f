"""Load what a run left behind, or any model, and let it answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel._transformers.model_files import (
    ADAPTER_CONFIG,
    AUTOMODEL_PEFT_CONFIG,
    ModelFiles,
    read_adapter_weights,
)
from nemo_automodel._transformers.model_source import hide_bars_without_terminal, read_json
from nemo_automodel.components._peft.adapter_state import config_from_adapter, load_adapter_state_dict
from nemo_automodel.components.checkpoint.layout import MODEL_DCP_DIR, MODEL_DIR, SCHEDULE_FILE
from nemo_automodel.components.checkpoint.manifest import verify
from nemo_automodel.components.checkpoint.model_dcp import has_model, read_model
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]


def find_model_directory(path: str | Path) -> str:
    """Return the directory that holds the model files of ``path``.

    ``path`` may be a Hub name or a model or adapter directory (returned as they are), a checkpoint
    (``epoch_E_step_S``), a pointer to one (``LATEST``), or the directory of a run.
    """
    root = Path(path).expanduser()
    for directory in (root, root / "model", root / "model" / "consolidated", root / "LATEST" / "model"):
        if any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return str(directory)
    return str(path)


def checkpoint_of(directory: Path) -> Path | None:
    """Return the checkpoint that a directory of model files belongs to, None where it stands alone."""
    folder = directory.parent if directory.name == "consolidated" else directory
    is_part = folder.name == MODEL_DIR and (folder.parent / SCHEDULE_FILE).is_file()
    return folder.parent if is_part else None


def load_for_inference(
    path: str | Path,
    *,
    base: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a base model, a checkpoint or an adapter, ready to generate.

    ``base`` replaces the base model that an adapter names. ``dtype`` defaults to ``auto``.

    Raises:
        UserError: no such model, incomplete files, or an adapter that does not fit its base.
    """
    hide_bars_without_terminal()
    directory = find_model_directory(path)
    checkpoint = checkpoint_of(Path(directory))
    if checkpoint is not None:
        verify(checkpoint, (f"{MODEL_DIR}/", f"{MODEL_DCP_DIR}/"))
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "torch_dtype": dtype or "auto"}
    options["fast_layers"] = "off"  # generation with a cache runs Transformers' modules, so packing would be in vain
    if not (Path(directory) / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UserError(f"`--base {base}` names the base of an adapter, but `{path}` is no adapter. Leave it out.")
        if checkpoint is not None and has_model(checkpoint):
            model = _load_torch_save(checkpoint, options)
        else:
            model = NeMoAutoModelForCausalLM.from_pretrained(directory, **options)
        return model, NeMoAutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    model = _load_adapter(Path(directory), base, options)
    own_tokenizer = (Path(directory) / "tokenizer_config.json").is_file()
    source = directory if own_tokenizer else str(model.config.name_or_path)
    return model, NeMoAutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _load_torch_save(checkpoint: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a checkpoint that was saved with ``model_save_format: torch_save``."""
    model = NeMoAutoModelForCausalLM.from_config(str(checkpoint / MODEL_DIR), **options)
    read_model(checkpoint, ModelFiles(model, None).weights())
    return model


def _load_adapter(directory: Path, base: str | None, options: dict[str, Any]) -> PreTrainedModel:
    config = read_json(directory / ADAPTER_CONFIG)
    own = directory / AUTOMODEL_PEFT_CONFIG
    tensors = read_adapter_weights(directory)
    peft_config = config_from_adapter(config, read_json(own) if own.is_file() else {}, tensors)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"`{directory / ADAPTER_CONFIG}` does not say which base model it belongs to. Give it with --base."
        )
    logger.info("Adapter of %s on base model %s.", directory, base)
    model = NeMoAutoModelForCausalLM.from_pretrained(base, peft_config=peft_config, **options)
    load_adapter_state_dict(model, tensors)
    return model.requires_grad_(False)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> torch.Tensor:
    """Return the token ids ``[1, S]`` of a text as it is, or of messages through the tokenizer's chat template.

    Raises:
        UserError: messages without a chat template, or nothing to start from.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise UserError(
                "The tokenizer has no chat template, so it cannot hold a chat. Give a plain prompt instead."
            )
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        # the template writes its special tokens itself
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("The prompt is empty. Give at least one word.")
    return torch.tensor([ids])


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Yield the answer piece by piece as it is made.

    ``temperature`` 0 always takes the likeliest token; above 0 it samples from the likeliest tokens that together
    reach the probability ``top_p``. Closing the iterator early stops the model after the token at hand.

    Raises:
        UserError: values out of range, messages without a chat template, an empty prompt.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}; they must be at least 1, "
            "at least 0, and above 0 up to 1."
        )
    input_ids = render_prompt(tokenizer, prompt).to(model.device)
    is_stopped, failure = threading.Event(), []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else _GREEDY
    was_training = model.training

    def work() -> None:
        try:
            model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=_end_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                stopping_criteria=[lambda ids, scores, **_: torch.full((1,), is_stopped.is_set(), device=ids.device)],
                **sampling,
            )
        except Exception as error:  # handed to the caller's thread below
            failure.append(error)
        finally:
            streamer.end()  # type: ignore[no-untyped-call]

    model.train(False)
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        is_stopped.set()
        worker.join()
        model.train(was_training)
    if failure:
        raise failure[0]


# a model's generation_config may ask for sampling; greedy decoding must not inherit it
_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's own, and the tokenizer's, which fine-tuning teaches."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return sorted(set(ends))
