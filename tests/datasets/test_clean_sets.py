"""No false alarm: sound data of every shape passes the label gate, and teaches exactly what it should.

The tokenizers here are small ones of the kinds that matter, and SmolLM2's real one where the quickstart's demo has been
fetched. ``benchmarks/clean_sets.py`` runs the same sets with a dozen real tokenizers and their own templates.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clean_sets import CHATML, SETS, CleanSet, build, missing_piece
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.cli.fetch_demo import MODEL_DIR, default_directory
from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.components.datasets.document_view import rows_of
from nemo_automodel.components.datasets.label_check import check_labels
from nemo_automodel.shared.errors import UserError

DEMO = default_directory() / MODEL_DIR  # read while tests are collected, before they get a cache of their own
# writes everything that the sets hold: tools, calls, reasoning in the last turn only, as Qwen3's does
EVERYTHING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.get('reasoning_content') and loop.index0 > ns.last %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n"
    "{% endif %}{{ m['content'] }}{% for call in m.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned_rows(clean: CleanSet, path: Path, tokenizer: Fast) -> list[str]:
    """Return what each row teaches as text, after the label gate has passed the whole set."""
    dataset = build(clean, path, tokenizer)
    rows = rows_of(dataset, range(len(dataset)))
    found = check_labels(
        [document for row in rows for document in row], tokenizer, DataCheckConfig(), num_rows=len(rows)
    )
    assert (found.num_dropped, found.num_cut) == (0, 0)
    texts = []
    for (document,) in rows:
        ids = [token for token, is_learned in zip(document.ids, document.learned, strict=True) if is_learned]
        texts.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return texts


@pytest.mark.parametrize("name", SETS)
def test_sound_data_passes(name: str, tmp_path: Path, any_tokenizer: Fast):
    any_tokenizer.chat_template = EVERYTHING
    clean = SETS[name]
    learned = learned_rows(clean, tmp_path / "rows.jsonl", any_tokenizer)
    if any_tokenizer.vocab_size < 300 and not any_tokenizer.get_vocab().get("Ġ"):
        return  # the small vocabularies of these two cannot spell every character; that they pass is what counts
    for text, pieces in zip(learned, clean.learned, strict=True):
        assert missing_piece(text, pieces) is None, text
        given = ("<|im_start|>", "user\n", "What is", "Where", "Be polite", "Be brief", "Name the")
        strays = [piece for piece in given if piece in text and not any(piece in word for word in pieces)]
        assert not strays, text


def demo_tokenizer() -> Fast:
    if not (DEMO / "tokenizer.json").is_file():
        pytest.skip("the quickstart's demo has not been fetched")
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("name", SETS)
def test_sound_data_passes_with_a_real_tokenizer(name: str, tmp_path: Path):
    tokenizer, clean = demo_tokenizer(), SETS[name]
    if "tools" in clean.needs:
        with pytest.raises(UserError, match="the chat template does not write them"):
            learned_rows(clean, tmp_path / "rows.jsonl", tokenizer)
        tokenizer.chat_template = CHATML
    for text, pieces in zip(learned_rows(clean, tmp_path / "rows.jsonl", tokenizer), clean.learned, strict=True):
        # SmolLM2's template knows no reasoning; that it is left out is told in a warning
        assert missing_piece(text, pieces[-1:] if clean.needs == "reasoning" else pieces) is None, text
