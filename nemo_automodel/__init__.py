"""Fine-tune Hugging Face language models from one YAML file.

The public names are loaded on first use, so that ``import nemo_automodel`` costs milliseconds and never imports
torch by itself.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# Unless told otherwise, libraries below send what nobody asked for, and some look once, when they are imported: counts
# of use, and of a model without safetensors its name, with the user's token, to a service that converts it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

__version__ = "0.1.0"

_PUBLIC = {
    "NeMoAutoModelForCausalLM": "nemo_automodel._transformers.auto_model",
    "NeMoAutoModelForSeq2SeqLM": "nemo_automodel._transformers.auto_model",
    "NeMoAutoModelForSequenceClassification": "nemo_automodel._transformers.auto_model",
    "NeMoAutoModelForTokenClassification": "nemo_automodel._transformers.auto_model",
    "NeMoAutoModelForImageTextToText": "nemo_automodel._transformers.auto_model",
    "NeMoAutoTokenizer": "nemo_automodel._transformers.auto_tokenizer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
