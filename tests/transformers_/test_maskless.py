"""Unpacked rows without a mask: the same loss and gradients as with one, in every family that takes the shortcut."""

from __future__ import annotations

import pytest
import torch
import transformers

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.packing_masks import is_plain_causal
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = ["Llama", "Qwen2", "Qwen3", "Granite", "Olmo2", "Phi3", "Cohere", "Gemma", "Starcoder2", "Helium"]


def make(family: str, **extra: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 11), generator=generator)
    labels = torch.randint(3, 97, (3, 11), generator=generator)
    mask = torch.ones(3, 11, dtype=torch.int64)
    for row, num_padding in ((1, 4), (2, 7)):
        place = slice(0, num_padding) if left else slice(11 - num_padding, 11)
        ids[row, place], labels[row, place], mask[row, place] = 0, -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def losses_and_gradients(model, data, maskless: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    forward = LabelledForward(model)
    if not maskless:
        forward._is_plain_causal = False
    loss = forward.loss(data, MaskedCrossEntropy(), 10)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PLAIN)
def test_same_loss_and_gradients_as_with_the_mask(family):
    model = make(family, **({"head_dim": 8} if family in ("Gemma", "Helium") else {}))
    assert is_plain_causal(model), "this family is expected to take the shortcut"
    expected = losses_and_gradients(model, batch(), maskless=False)
    found = losses_and_gradients(model, batch(), maskless=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert model.config._attn_implementation == "sdpa"


def test_padding_in_front_keeps_its_mask():
    model = make("Llama")
    expected = losses_and_gradients(model, batch(left=True), maskless=False)
    found = losses_and_gradients(model, batch(left=True), maskless=True)
    assert torch.equal(found[0], expected[0])
    unmasked = model(input_ids=batch(left=True)["input_ids"]).logits
    masked = model(**{k: v for k, v in batch(left=True).items() if k != "labels"}).logits
    assert not torch.allclose(unmasked[2, -1], masked[2, -1]), "the mask must matter for this test to prove anything"


def test_later_tokens_stay_unseen():
    model, data = make("Llama"), batch()
    forward = LabelledForward(model)
    seen: list[torch.Tensor] = []

    def keep(*, logits: torch.Tensor, labels: torch.Tensor, num_label_tokens: int | None) -> torch.Tensor:
        seen.append(logits.detach())
        return logits.sum()

    forward.loss(data, keep)
    changed = {**data, "input_ids": data["input_ids"].clone()}
    changed["input_ids"][0, -1] = 5 if data["input_ids"][0, -1] != 5 else 6
    forward.loss(changed, keep)
    assert torch.equal(seen[0][:10], seen[1][:10])
    assert not torch.equal(seen[0][10], seen[1][10])


@pytest.mark.parametrize(
    ("family", "extra"),
    [("Mistral", {"sliding_window": 4}), ("StableLm", {}), ("Falcon", {})],
)
def test_other_families_keep_their_masks(family, extra):
    assert not is_plain_causal(make(family, **extra))
