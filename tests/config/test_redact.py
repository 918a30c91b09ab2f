"""Secrets by whole words."""

from __future__ import annotations

import pytest

from nemo_automodel.components.config.redact import MASK, is_secret_key, redact, redact_text

SECRET = """
    token hf_token HF_TOKEN hfToken access_token auth_token api_key apikey apiKey API-KEY wandb_key secret
    client_secret password db_password authorization secret_key private_key aws_secret_access_key hub_token
"""
INNOCENT = """
    tokenizer pad_token bos_token eos_token pad_token_id start_of_turn_token image_token video_token_id author key keys
    num_label_tokens max_tokens special_tokens additional_special_tokens source_key target_key best_metric_key
    tokenizer_name add_bos_token mask_token_id pretrained_model_name_or_path
"""


@pytest.mark.parametrize("key", SECRET.split())
def test_secret_keys(key: str):
    assert is_secret_key(key)
    assert redact(key, "x") == MASK
    assert redact(key, 123) == MASK
    assert redact(key, True) is True
    assert redact(key, None) is None


@pytest.mark.parametrize("key", INNOCENT.split())
def test_innocent_keys(key: str):
    assert not is_secret_key(key)
    assert redact(key, "<|endoftext|>") == "<|endoftext|>"
    assert redact(key, 2) == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("hf_" + "a1B2" * 8, MASK),
        ("--header=sk-" + "a" * 40, f"--header={MASK}"),
        ("https://user:pass@host:5000/x", f"https://{MASK}@host:5000/x"),
        ("sqlite:///runs.db", "sqlite:///runs.db"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("hf_model", "hf_model"),
    ],
)
def test_shapes_of_secrets_under_any_key(value: str, shown: str):
    assert redact("notes", value) == shown


def test_unknown_tokens_are_judged_by_their_look():
    assert redact("my_service_token", "x") == MASK
    assert redact("weird_token", "A1b2C3d4E5f6G7h8") == MASK
    assert redact("weird_token", "<|weird|>") == "<|weird|>"


def test_placeholders():
    assert redact_text("hf_token", "${HF_TOKEN}") == "${HF_TOKEN}"
    assert redact_text("hf_token", "${HF_TOKEN,abc}") == MASK
    assert redact_text("hf_token", "abc${X}") == MASK
    assert redact_text("name", "${NAME,run}") == "${NAME,run}"
    assert redact_text("name", "${NAME,hf_" + "a" * 30 + "}") == "${NAME," + MASK + "}"
