"""An embedding that stays on the host: what it computes, where it stays, and when it is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from support.fast_models import tokens
from support.tiny import tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.host_embedding import HostEmbedding, exchange, keep_on_host
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.shared.errors import UserError


def frozen(**overrides: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config("llama", **overrides)).requires_grad_(False)


def test_computes_the_same_and_does_not_follow_the_model():
    plain, model = frozen(), frozen()
    embedding = model.get_input_embeddings()
    exchange(embedding, embedding.weight.detach().clone())
    assert isinstance(embedding, HostEmbedding)
    assert torch.equal(model(input_ids=tokens(2, 7)).logits, plain(input_ids=tokens(2, 7)).logits)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all("embed_tokens" not in name for name, _ in model.named_parameters())
    model.load_state_dict(plain.state_dict())
    model.to("meta")
    assert embedding.weight.device.type == "cpu"
    assert model.device.type == "meta"
    assert torch.equal(embedding.weight, plain.get_input_embeddings().weight)


def test_when_it_is_refused(caplog):
    with pytest.raises(UserError, match="they share one weight with the output head"):
        keep_on_host(frozen(tie_word_embeddings=True), torch.device("cuda"))
    with pytest.raises(UserError, match="they are trained"):
        keep_on_host(frozen().requires_grad_(True), torch.device("cuda"))
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        NeMoAutoModelForCausalLM.from_config(
            tiny_config(), device="cpu", embeddings_on_host=True, peft_config=PeftConfig(target_modules="*_proj")
        )
    assert "`model.embeddings_on_host: true` has no effect: the model is on the CPU." in caplog.messages
