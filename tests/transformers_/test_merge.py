"""A merged directory answers as PEFT does with the adapter beside the base, for every kind of adapter it takes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from support.tiny import make_model_dir

from nemo_automodel._transformers.merge import merge_adapter, read_adapter, rewrite_model
from nemo_automodel.components.export.weight_files import list_tensors
from nemo_automodel.shared.errors import UserError

IDS = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def shake(model: torch.nn.Module, std: float = 0.2) -> None:
    """Give every trainable parameter values of its own, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * std


def make_adapter(base: Path, out: Path, num_tokens: int | None = None, **settings: object) -> torch.Tensor:
    """Write an adapter as PEFT does and return the logits of base and adapter together."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if num_tokens is not None:
        torch.manual_seed(5)
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **settings})
    wrapped = peft.get_peft_model(model, config).eval()
    shake(wrapped)
    wrapped.save_pretrained(out)
    with torch.no_grad():
        return wrapped(input_ids=IDS).logits


def merged_logits(base: Path, adapter: Path, out: Path, **options: object) -> torch.Tensor:
    out.mkdir()
    merge_adapter(read_adapter(adapter, str(base)), base, out, **{"dtype": torch.float32, **options})
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 9}},
    "head": {"target_modules": [*PROJECTIONS, "lm_head"]},
    "embedding": {"target_modules": [*PROJECTIONS, "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "rows": {"trainable_token_indices": [5, 9, 390]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {tied: make_model_dir(root / f"tied_{tied}", "llama", tie_word_embeddings=tied) for tied in (False, True)}


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_peft_computes(bases, tmp_path: Path, kind: str, is_tied: bool) -> None:
    base = bases[is_tied]
    expected = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    found = merged_logits(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=IDS).logits
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]], ids=["frozen", "trained"])
def test_added_tokens_come_along(bases, tmp_path: Path, is_tied: bool, saved: list[str] | None) -> None:
    """PEFT saves both embeddings when the vocabulary has grown; the merged model has the new rows and says so."""
    base = bases[is_tied]
    expected = make_adapter(base, tmp_path / "adapter", num_tokens=451, modules_to_save=saved)
    found = merged_logits(base, tmp_path / "adapter", tmp_path / "out")
    assert found.shape[-1] == 451
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 451
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rounding_is_the_only_error(bases, tmp_path: Path) -> None:
    """Every merged weight is the float64 result, rounded once to bf16; what has no adapter is the base's, rounded."""
    base = bases[False]
    make_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge_adapter(read_adapter(tmp_path / "adapter", str(base)), base, tmp_path / "out")
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(tmp_path / "out/model.safetensors", "pt") as new:
        adapter = read_adapter(tmp_path / "adapter", str(base)).updates
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118
            weight = old.get_tensor(name).double()
            if name in adapter:
                weight += 1.5 * (adapter[name].b.double() @ adapter[name].a.double())
            assert torch.equal(new.get_tensor(name), weight.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_many_small_files_hold_the_same(bases, tmp_path: Path) -> None:
    base = bases[True]
    expected = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    found = merged_logits(base, tmp_path / "adapter", tmp_path / "out", max_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rewrite_model(tmp_path / "out", tmp_path, torch.float16)
    before, after = list_tensors(tmp_path / "out"), list_tensors(tmp_path)
    assert {n: i.shape for n, i in before.items()} == {n: i.shape for n, i in after.items()}
    assert {i.dtype for i in after.values()} == {torch.float16}


def test_a_base_of_another_size_is_one_line(bases, tmp_path: Path) -> None:
    make_adapter(bases[False], tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", "x")
    for name, sizes, message in (
        ("wide", {"hidden_size": 64}, r"is \[64, 64\] there, and the adapter was trained on \[32, 64\]"),
        ("deep", {"num_hidden_layers": 1}, r"has no `model\.layers\.1\."),
    ):
        other = make_model_dir(tmp_path / name, "llama", **sizes)
        (tmp_path / f"out_{name}").mkdir()
        with pytest.raises(UserError, match=message) as caught:
            merge_adapter(adapter, other, tmp_path / f"out_{name}")
        assert "--base" in str(caught.value)
        assert not any((tmp_path / f"out_{name}").iterdir())


def test_a_deeper_base_is_told(bases, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_adapter(bases[False], tmp_path / "adapter")
    deeper = make_model_dir(tmp_path / "deeper", "llama", num_hidden_layers=3)
    (tmp_path / "out").mkdir()
    merge_adapter(read_adapter(tmp_path / "adapter", "x"), deeper, tmp_path / "out")
    assert "layers 0 to 1, and the base has 3" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA without biases"),
        ({"bias": "all"}, "only LoRA without biases"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"r": 16}, "has rank 4 at .* says 16"),
        ({"base_model_name_or_path": None}, "Give it with --base"),
    ],
)
def test_adapters_that_cannot_be_merged(bases, tmp_path: Path, change: dict, message: str) -> None:
    make_adapter(bases[False], tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_an_untrained_adapter_is_refused(bases, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bases[False])
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=PROJECTIONS)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="changes nothing: one factor of every layer is zero"):
        read_adapter(tmp_path, "x")
