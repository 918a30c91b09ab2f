"""What a model says at held-out positions, for comparing models with each other.

Rows go through one by one and without padding, so the numbers depend on nothing but the weights. fp32 is used where the
model fits in memory that way, since what is looked for is the rounding of the weights and not that of the computation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.merge import Adapter, fetch_model
from nemo_automodel._transformers.model_files import AUTOMODEL_PEFT_CONFIG, read_adapter_weights
from nemo_automodel._transformers.model_source import load_config, read_json, readable_errors
from nemo_automodel._transformers.options import resolve_device
from nemo_automodel.components._peft.adapter_state import config_from_adapter, load_adapter_state_dict
from nemo_automodel.components.export.certificate import Answers
from nemo_automodel.components.export.weight_files import list_tensors
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require
from nemo_automodel.shared.memory import read_memory
from nemo_automodel.shared.types import IGNORE_INDEX

MAX_POSITIONS = 512
MAX_ROW_TOKENS = 1024

# without a run's data: some plain text, which every language model can say something about
TEXTS = (
    "The library opens at nine and closes at six. On Sundays it stays",
    "To make tea, boil water, pour it over the leaves and wait for",
    "A triangle has three sides. A square has four sides, and all of them are",
    "def area(width, height):\n    return width *",
    "The train from the coast arrives at noon, and the one from the mountains arrives an hour",
    "She looked at the sky and said that it would rain before",
    "Water freezes at zero degrees Celsius and boils at",
    "Monday, Tuesday, Wednesday, Thursday,",
)


@dataclass(frozen=True)
class Probe:
    """One held-out row."""

    input_ids: list[int]
    labels: list[int]
    """Shifted as everywhere: the token after each position, or -100."""


def probes_of_texts(tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Return the embedded texts, each as it is and, with a chat template, as a question."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    if tokenizer.chat_template is not None:
        for text in TEXTS:
            message = [{"role": "user", "content": text}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            rows.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return [Probe(ids[:-1], list(ids[1:])) for ids in rows if len(ids) > 1]


def answers_of(model: PreTrainedModel, probes: Sequence[Probe]) -> Answers:
    """Return the log probabilities at up to 512 labelled positions, spread evenly over the rows."""
    share = max(1, MAX_POSITIONS // len(probes))
    found: list[torch.Tensor] = []
    targets: list[int] = []
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for probe in probes:
            places = [place for place, label in enumerate(probe.labels) if label != IGNORE_INDEX][:share]
            if not places or len(targets) >= MAX_POSITIONS:
                continue
            start = max(0, places[-1] + 1 - MAX_ROW_TOKENS)
            places = [place for place in places if place >= start]
            ids = torch.tensor([probe.input_ids[start : places[-1] + 1]], device=model.device)
            logits_SV = model(input_ids=ids, use_cache=False).logits[0]
            kept = logits_SV[[place - start for place in places]].float()
            found.append(kept.log_softmax(dim=-1).cpu())
            targets += [probe.labels[place] for place in places]
    log_probs_NV = torch.cat(found)
    picked = log_probs_NV.double().gather(1, torch.tensor(targets)[:, None])
    return Answers(log_probs_NV, -picked.mean().item())


@dataclass(frozen=True)
class Loading:
    """How models are loaded to be compared: the same way, all of them."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False

    @property
    def is_bf16(self) -> bool:
        """Tell whether the computation itself rounds."""
        return self.dtype == torch.bfloat16

    def _options(self, **more: Any) -> dict[str, Any]:
        return {
            "device": self.device,
            "torch_dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "fast_layers": "off",
            **more,
        }

    def whole(self, directory: Path | str) -> PreTrainedModel:
        """Load a model directory."""
        return NeMoAutoModelForCausalLM.from_pretrained(str(directory), **self._options()).requires_grad_(False)

    def with_adapter(self, adapter: Adapter, quantization: QuantizationConfig | None) -> PreTrainedModel:
        """Load an adapter on its base, which is stored in 4 or 8 bits where ``quantization`` says so."""
        if adapter.needs_peft:
            return self.with_peft(adapter)
        own = adapter.directory / AUTOMODEL_PEFT_CONFIG
        tensors = read_adapter_weights(adapter.directory)
        peft_config = config_from_adapter(adapter.config, read_json(own) if own.is_file() else {}, tensors)
        options = self._options(peft_config=peft_config)
        if quantization is not None:
            # the rounding of the weights is what counts, not that of the computation
            options["quantization_config"] = replace(
                quantization, bnb_4bit_compute_dtype=dtype_name(self.dtype), compute_in_fp8=False
            )
        model = NeMoAutoModelForCausalLM.from_pretrained(str(fetch_model(adapter.base)), **options)
        load_adapter_state_dict(model, tensors)
        return model.requires_grad_(False)

    def with_peft(self, adapter: Adapter) -> PreTrainedModel:
        """Load an adapter with embeddings or rows of them through PEFT, which is its definition."""
        peft = require("peft", "Comparing an adapter that has more than linear layers")
        model = self.whole(fetch_model(adapter.base))
        num_rows = [u.whole.shape[0] for u in adapter.updates.values() if u.whole is not None]
        embedding: Any = model.get_input_embeddings()
        if num_rows and max(num_rows) > embedding.weight.shape[0] and "embed_tokens" in " ".join(adapter.updates):
            model.resize_token_embeddings(max(num_rows), mean_resizing=False)
        wrapped: PreTrainedModel = peft.PeftModel.from_pretrained(model, str(adapter.directory))
        return wrapped

    def gguf(self, file: Path, config_directory: Path) -> PreTrainedModel:
        """Read a GGUF file back through Transformers, with the configuration that it was made from."""
        config = load_config(str(config_directory), self.trust_remote_code, {}, {})
        if config.model_type == "mistral":  # a GGUF file calls it llama, whose computation it is
            config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
        with readable_errors(str(file)):
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, config=config, dtype=self.dtype
            )
        on_device: PreTrainedModel = model.to(self.device)
        return on_device


def choose_loading(base: Path, device: str | None, trust_remote_code: bool) -> Loading:
    """Return how to load models like ``base``: on the GPU if there is one, in fp32 if that fits.

    Raises:
        UserError: no such device, or not even bf16 fits.
    """
    chosen = resolve_device(device)
    num_weights = sum(torch.Size(info.shape).numel() for info in list_tensors(base).values())
    free = torch.cuda.mem_get_info(chosen)[0] if chosen.type == "cuda" else _free_memory()
    for dtype in (torch.float32, torch.bfloat16):
        if num_weights * dtype.itemsize * 1.15 < free:
            return Loading(chosen, dtype, trust_remote_code)
    raise UserError(
        f"The models have {num_weights / 1e9:.1f}e9 weights, and comparing them needs {num_weights * 2.3e-9:.0f} GB of "
        f"which {chosen} has {free / 1e9:.0f} free. Use --device cpu or a larger machine, or leave the certificate out "
        "with --no-certificate."
    )


def _free_memory() -> int:
    """Return the bytes of main memory that can be had, caches included."""
    if Path("/proc/meminfo").is_file():
        return read_memory().available
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
