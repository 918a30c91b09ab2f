"""The proof at start: it holds for what is isolated, and every planted leak makes it fail."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.packed import BASE, make_model, pack

from nemo_automodel._transformers import forward as forward_module
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.isolation_proof import prove_isolation
from nemo_automodel.shared.errors import UserError

ROW_LEN = 96


def next_fit(documents, row_len: int = ROW_LEN) -> dict[str, torch.Tensor]:
    rows: list[list[torch.Tensor]] = [[]]
    for ids, _ in documents:
        if sum(map(len, rows[-1])) + len(ids) > row_len:
            rows.append([])
        rows[-1].append(torch.tensor(ids))
    return pack(rows, row_len)


def runs_on(documents) -> dict[str, torch.Tensor]:
    batch = next_fit(documents)
    return {**batch, "position_ids": torch.arange(ROW_LEN).expand_as(batch["input_ids"])}


def prove(model, packer=next_fit):
    return prove_isolation(LabelledForward(model), packer, ROW_LEN)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_it_holds_in_every_dtype(dtype, most):
    model = make_model("llama").to(dtype)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    proof = prove(model)
    assert proof.difference < most
    assert proof.leak > 0.3
    assert proof.is_conclusive
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before), "the run's random numbers must not move"
    assert "Packed documents are isolated: proven on 6 documents in 2 rows of 96 tokens (logits moved by" in str(proof)


def test_it_holds_under_autocast():
    model = make_model("qwen3")
    with torch.autocast("cpu", torch.bfloat16):
        proof = prove(model)
    assert 1e-4 < proof.difference < 2e-2 < proof.tolerance < 5e-2


# --- any family, any dtype -------------------------------------------------------------------------------------------

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mistral_window", "gpt_oss", "phi3", "llama4", "granite"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_tolerated_follows_from_the_model(family, dtype):
    """No number is fitted: what packing does stays well below it, a stranger far above."""
    proof = prove(make_model(family).to(dtype))
    assert proof.difference < 0.75 * proof.tolerance
    assert proof.tolerance < proof.leak / 10
    assert proof.is_conclusive


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_leak_is_noticed_in_every_family(family, dtype, monkeypatch):
    """The mask is that of one long document; and the mask is right, but positions run on."""
    make = forward_module.build_packed_masks

    def one_document(model, batch, backend):
        return make(model, {**batch, "seq_lens": torch.full((len(batch["input_ids"]), 1), ROW_LEN)}, backend)

    with monkeypatch.context() as patch:
        patch.setattr(forward_module, "build_packed_masks", one_document)
        with pytest.raises(UserError, match="see each other"):
            prove(make_model(family).to(dtype))
    with pytest.raises(UserError, match="Positions do not restart"):
        prove(make_model(family).to(dtype), runs_on)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_the_model_changes_are_noticed(family, monkeypatch):
    """Rotary positions further apart than they are; in bf16 some families hardly notice."""
    usual = LabelledForward.model_inputs

    def stretched(self, batch):
        inputs = usual(self, batch)
        if "seq_lens" in batch:
            inputs["position_ids"] = 3 * inputs["position_ids"]
        return inputs

    monkeypatch.setattr(LabelledForward, "model_inputs", stretched)
    with pytest.raises(UserError, match="see each other"):
        prove(make_model(family))


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_a_noisier_model_is_given_more(scale):
    """The same model with larger weights is noisier; the proof follows, and a leak still shows."""
    model = make_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    proof = prove(model)
    assert proof.difference < 0.75 * proof.tolerance
    assert proof.is_conclusive


# --- planted leaks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_dropped_mask_is_noticed(family, dtype, monkeypatch):
    monkeypatch.setattr(forward_module, "build_packed_masks", lambda _, batch, __: torch.ones_like(batch["input_ids"]))
    with pytest.raises(UserError, match=r"see each other: .* moved by [\d.]+ of .* Turn packing off"):
        prove(make_model(family).to(dtype))


def test_positions_that_run_on_are_noticed_even_where_a_model_would_not_mind():
    with pytest.raises(UserError, match=r"Positions do not restart .* number 0 of its document has position \d+"):
        prove(make_model("llama"), runs_on)


def test_positions_that_a_model_ignores_are_noticed(monkeypatch):
    """GPT-2 learns positions, so running on moves its logits though the mask is right."""
    model = gpt2()
    prove(model)
    usual = LabelledForward.model_inputs

    def without_positions(self, batch):
        inputs = usual(self, batch)
        if "seq_lens" in batch:
            inputs["position_ids"] = torch.arange(ROW_LEN).expand_as(batch["input_ids"])
        return inputs

    monkeypatch.setattr(LabelledForward, "model_inputs", without_positions)
    with pytest.raises(UserError, match="see each other"):
        prove(model)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_border_is_noticed(shift):
    def shifted(documents):
        batch = next_fit(documents)
        lengths = batch["seq_lens"].clone()
        lengths[:, 0] += shift
        lengths[:, 1] -= shift
        return {**batch, "seq_lens": lengths}

    with pytest.raises(UserError, match="see each other"):
        prove(make_model("llama"), shifted)


def test_a_packer_that_loses_a_document_is_noticed():
    with pytest.raises(UserError, match="stands 0 times in the packed rows"):
        prove(make_model("llama"), lambda documents: next_fit(documents[:3]))


def test_a_layer_that_looks_at_the_row_before_is_noticed():
    """A short convolution along the row, as some models have without a name for it."""
    model = make_model("llama")

    def leaks(module, args, output):
        return output + 0.1 * torch.nn.functional.pad(output, (0, 0, 1, -1))

    model.model.layers[0].mlp.register_forward_hook(leaks)
    with pytest.raises(UserError, match="see each other"):
        prove(model)


def test_a_model_that_sees_later_tokens_is_no_proof():
    config = transformers.BertConfig(**BASE, is_decoder=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with pytest.raises(UserError, match="see each other"):
        prove(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_none_prove_nothing(dtype):
    model = make_model("llama").to(dtype)

    def break_packed_rows(module, args, output):
        return torch.full_like(output, torch.nan) if output.shape[1] == ROW_LEN else output

    model.model.layers[0].mlp.register_forward_hook(break_packed_rows)
    with pytest.raises(UserError, match="moved by nan"):
        prove(model)


def test_a_model_without_context_proves_nothing():
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    proof = prove(model)
    assert not proof.is_conclusive
    assert "it could not be proven on 6 documents" in str(proof)


# --- architectures ---------------------------------------------------------------------------------------------------

HYBRID = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
ISOLATED = {
    "ApertusConfig": {}, "Cohere2Config": {"sliding_window": 8}, "Ernie4_5Config": {}, "GemmaConfig": {"head_dim": 8},
    "Glm4Config": {"head_dim": 8}, "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPTNeoXConfig": {},
    "HeliumConfig": {"head_dim": 8}, "MixtralConfig": {"num_local_experts": 4}, "Olmo2Config": {}, "OPTConfig":
    {"ffn_dim": 48, "word_embed_proj_dim": 32}, "PhiConfig": {}, "Qwen3MoeConfig": {"num_experts": 4,
    "num_experts_per_tok": 2, "head_dim": 8},
    "SmolLM3Config": {}, "StableLmConfig": {}, "Starcoder2Config": {"sliding_window": 8},
}  # fmt: skip
REFUSED = {
    "BartConfig": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "BloomConfig": {"n_head": 4}, "DogeConfig": {}, "FalconMambaConfig": {"state_size": 8},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4,
                               "mamba_d_head": 16},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]}, "Mamba2Config": {"num_heads": 4, "head_dim": 16},
    "MiniMaxConfig": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "Qwen3NextConfig": {**HYBRID, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2},
    "Qwen3_5TextConfig": {**HYBRID, "layer_types": ["linear_attention", "full_attention"]},
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]}, "RwkvConfig": {"attention_hidden_size": 32},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_headdim": 16},
}  # fmt: skip


def build(name: str, extra: dict) -> transformers.PreTrainedModel:
    """Return a tiny random model; sizes that the configuration does not have under these names come in ``extra``."""
    config_class = getattr(transformers, name)
    plain = config_class()
    sizes = {key: value for key, value in BASE.items() if hasattr(plain, key)}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**sizes, **extra})).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in parameter_name:
                parameter.mul_(4)
    return model


def gpt2() -> transformers.PreTrainedModel:
    return build("GPT2Config", ISOLATED["GPT2Config"])


@pytest.mark.parametrize("name", ISOLATED)
def test_architectures_that_keep_documents_apart(name):
    proof = prove(build(name, ISOLATED[name]))
    assert proof.difference < 1e-5
    assert proof.is_conclusive


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_are_refused_by_name(name):
    model = build(name, REFUSED[name])
    with pytest.raises(UserError) as error:
        prove(model)
    assert str(error.value).startswith(type(model).__name__)
    assert "Turn packing off: `--packed_sequence.packed_sequence_size 0`." in str(error.value)
