"""Tokenizers: pad and border tokens, and mistakes as one line."""

from __future__ import annotations

import json

import pytest
from support.tiny import make_tokenizer

from nemo_automodel import NeMoAutoTokenizer
from nemo_automodel.shared.errors import UserError

TEXT = "Where was the tower built?"


def save(tmp_path, **tokens):
    tokenizer = make_tokenizer()
    for key, value in tokens.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_it_is_the_tokenizer_of_transformers(tmp_path):
    ours, theirs = NeMoAutoTokenizer.from_pretrained(save(tmp_path)), make_tokenizer()
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.pad_token == "<|pad|>"
    NeMoAutoTokenizer.from_pretrained(str(tmp_path), force_default=True, force_hf=True)


def test_a_missing_pad_token_becomes_the_end_token_and_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer = NeMoAutoTokenizer.from_pretrained(save(tmp_path, pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "rows are padded with its end token <|im_end|>" in caplog.text


def test_neither_pad_nor_end_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a pad nor an end token"):
        NeMoAutoTokenizer.from_pretrained(save(tmp_path, pad_token=None, eos_token=None))


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_border_tokens_are_added_when_asked_and_once(tmp_path, bos, eos):
    plain = make_tokenizer()
    ids = plain(TEXT)["input_ids"]
    expected = [plain.bos_token_id] * bos + ids + [plain.eos_token_id] * eos
    tokenizer = NeMoAutoTokenizer.from_pretrained(save(tmp_path), add_bos_token=bos, add_eos_token=eos)
    assert tokenizer(TEXT)["input_ids"] == expected
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[bos][1] > 0
    # a saved tokenizer does it too, and asking again adds nothing
    tokenizer.save_pretrained(tmp_path / "again")
    again = NeMoAutoTokenizer.from_pretrained(str(tmp_path / "again"), add_bos_token=bos, add_eos_token=eos)
    assert again(TEXT)["input_ids"] == expected


def test_border_tokens_that_do_not_exist_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"`tokenizer\.add_bos_token: true`, but"):
        NeMoAutoTokenizer.from_pretrained(save(tmp_path, bos_token=None), add_bos_token=True)


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        NeMoAutoTokenizer.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        NeMoAutoTokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        NeMoAutoTokenizer.from_pretrained("nobody/nothing-here")
    path = save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="OddTokenizer", auto_map={"AutoTokenizer": ["odd.OddTokenizer", None]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"needs code of .* set `trust_remote_code: true`"):
        NeMoAutoTokenizer.from_pretrained(path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError):
        NeMoAutoTokenizer.from_pretrained(path)
