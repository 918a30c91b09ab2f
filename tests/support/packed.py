"""Tiny models of many families, packed batches and their unpacked counterparts."""

from __future__ import annotations

import torch
import transformers
from support.tiny import tiny_config

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
MORE_FAMILIES = {
    "mistral_window": ("MistralConfig", {"sliding_window": 8}),
    "qwen2_window": (
        "Qwen2Config",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 1.5}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {}),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8, "attention_chunk_size": 7, "num_local_experts": 2, "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"], "attn_temperature_tuning": False,
            "no_rope_layers": [1, 0],
        },
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
}  # fmt: skip


def make_model(family: str, attention: str | None = None, **overrides: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family in MORE_FAMILIES:
        name, extra = MORE_FAMILIES[family]
        config = getattr(transformers, name)(**{**BASE, **extra, **overrides})
    else:
        config = tiny_config(family, **{"vocab_size": 96, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():  # away from zero, so that a leak shows
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)
    return model.train()


def make_documents(lengths: list[list[int]], seed: int = 0) -> list[list[torch.Tensor]]:
    """Return random token ids, one list of documents for every row."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(4, 96, (n,), generator=generator) for n in row] for row in lengths]


def shifted_labels(document: torch.Tensor) -> torch.Tensor:
    """Return the next token of every position; nothing follows the last, and the first two are a prompt."""
    labels = torch.cat([document[1:], torch.tensor([-100])])
    labels[:2] = -100
    return labels


def pack(rows: list[list[torch.Tensor]], seq_len: int) -> dict[str, torch.Tensor]:
    """Return the packed batch of the contract."""
    num_documents = max(len(row) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), seq_len), 3),
        "labels": torch.full((len(rows), seq_len), -100),
        "position_ids": torch.zeros(len(rows), seq_len, dtype=torch.long),
        "seq_lens": torch.full((len(rows), num_documents), -1000),
    }
    for i, row in enumerate(rows):
        ids = torch.cat(row)
        batch["input_ids"][i, : len(ids)] = ids
        batch["labels"][i, : len(ids)] = torch.cat([shifted_labels(d) for d in row])
        batch["position_ids"][i, : len(ids)] = torch.cat([torch.arange(len(d)) for d in row])
        batch["position_ids"][i, len(ids) :] = torch.arange(len(row[-1]), len(row[-1]) + seq_len - len(ids))
        batch["seq_lens"][i, : len(row)] = torch.tensor([len(d) for d in row])
    return batch


def pad(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the unpacked batch of the contract: one document a row, padded on the right."""
    size = max(len(d) for d in documents)
    filled = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    batch = {key: torch.full((len(documents), size), value) for key, value in filled.items()}
    for i, document in enumerate(documents):
        batch["input_ids"][i, : len(document)] = document
        batch["labels"][i, : len(document)] = shifted_labels(document)
        batch["attention_mask"][i, : len(document)] = 1
    return batch


def varlen_by_loop(q, k, v, borders_q, borders_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Compute what `torch.nn.attention.varlen.varlen_attn` computes on a GPU, one document after the other."""
    assert (borders_q is borders_k, max_q, window_size) == (True, max_k, (-1, 0))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out = torch.full_like(q, torch.nan)
    for start, end in zip(borders_q[:-1].tolist(), borders_q[1:].tolist(), strict=True):
        assert end - start <= max_q
        part = [t[start:end].transpose(0, 1) for t in (q, k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=scale)
        out[start:end] = attended.transpose(0, 1)
    return out
