"""Random sentences as samples, unpacked or packed, for tests and trials without data."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout, Sample, pad_token_id
from nemo_automodel.components.datasets.packed_rows import PackedRows, pack_dataset


def build_unpacked_dataset(
    num_sentences: int = 10,
    mean_len: float = 20.0,
    std_len: float = 6.0,
    vocab_size: int = 100,
    max_sentence_len: int = 64,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Sample]:
    """Build sentences of random tokens, all of them learned; lengths are normal, between 4 and ``max_sentence_len``.

    A tokenizer gives vocabulary size and pad id; without one token 0 pads and is never part of a sentence.
    """
    rng = np.random.default_rng(seed)
    if tokenizer is not None:
        vocab_size = len(tokenizer)
    layout = Layout(pad_token_id(tokenizer) if tokenizer is not None else 0)
    samples = []
    for _ in range(num_sentences):
        length = int(np.clip(round(rng.normal(mean_len, std_len)), 4, max_sentence_len))
        ids = rng.integers(1, vocab_size, length).tolist()
        samples.append(layout.sample(Encoded(ids, [(0, length)])))
    return samples


def build_packed_dataset(
    num_blocks: int = 10,
    block_size: int = 128,
    mean_len: float = 20.0,
    std_len: float = 6.0,
    vocab_size: int = 100,
    max_sentence_len: int = 64,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PackedRows:
    """Build ``num_blocks`` packed rows of ``block_size`` tokens from random sentences."""
    # a row always takes another sentence while max_sentence_len tokens are free, and none is shorter than 3
    enough = num_blocks * (block_size // 3 + 1)
    sentences = build_unpacked_dataset(enough, mean_len, std_len, vocab_size, max_sentence_len, seed, tokenizer)
    pad_id = pad_token_id(tokenizer) if tokenizer is not None else 0
    config = PackedSequenceConfig(packed_sequence_size=block_size, max_packs=num_blocks)
    packed = pack_dataset(sentences, config, pad_token_id=pad_id, seed=seed, shuffle=False)
    assert isinstance(packed, PackedRows)
    return packed
