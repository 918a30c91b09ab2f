"""Tiny random models and a tokenizer trained on a few sentences: everything a test needs without a network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Context: The tower was built in 1889 in Paris. Question: Where was the tower built? Answer: Paris",
    "Was the film good? It was a wonderful, moving story with fine actors and a poor ending.",
    "user assistant system tool positive negative 0 1 2 3 4 5 6 7 8 9",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "layer_types": None}),
}


def make_tokenizer(chat_template: str | None = None, vocab_size: int = 400) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that can spell any text; eos and pad are different tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(family: str = "llama", **overrides: object) -> transformers.PretrainedConfig:
    """Return the configuration of a two-layer model of about 60,000 parameters."""
    name, extra = FAMILIES[family]
    values = {
        "vocab_size": 448,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        **extra,
        **overrides,
    }
    return getattr(transformers, name)(**values)


def make_model_dir(path: Path, family: str = "llama", chat_template: str | None = None, **overrides: object) -> Path:
    """Write a tiny random model with its tokenizer as an ordinary Hugging Face directory and return the path."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    model.save_pretrained(path)
    make_tokenizer(chat_template).save_pretrained(path)
    return path


def write_squad(path: Path, num_train: int = 64, num_validation: int = 16) -> Path:
    """Write a directory of SQuAD-shaped rows, ``train.jsonl`` and ``validation.jsonl``, and return the path."""
    path.mkdir(parents=True, exist_ok=True)
    places = ["Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito"]
    for split, num_rows, offset in (("train", num_train, 0), ("validation", num_validation, 1000)):
        with (path / f"{split}.jsonl").open("w") as file:
            for i in range(num_rows):
                place, year = places[i % len(places)], 1800 + offset // 10 + i
                context = f"The tower was built in {year} in {place}."
                row = {
                    "id": f"{split}-{i}",
                    "title": "Towers",
                    "context": context,
                    "question": f"Where was the tower of {year} built?",
                    "answers": {"text": [place], "answer_start": [context.index(place)]},
                }
                file.write(json.dumps(row) + "\n")
    return path
