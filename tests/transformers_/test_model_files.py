"""What a run writes, other tools load; what it wrote, it reads back; and what was loaded can answer."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from support.packed import make_model
from support.tiny import CHAT_TEMPLATE, make_tokenizer, tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.inference import generate_text, load_for_inference
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.shared.errors import UserError

IDS = torch.arange(4, 24).view(2, 10)


def perturb(model):
    """Stand in for training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def load(path, **kwargs):
    return NeMoAutoModelForCausalLM.from_pretrained(str(path), device="cpu", **kwargs)


@pytest.fixture
def adapted(model_dirs):
    return perturb(load(model_dirs("llama"), peft_config=PeftConfig(target_modules="*_proj", dim=4, alpha=8)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_saved_model_equals_the_live_one_in_transformers_and_here(model_dirs, tmp_path, family):
    model = perturb(load(model_dirs(family)))
    out = tmp_path / "model"
    ModelFiles(model, make_tokenizer(CHAT_TEMPLATE)).write(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert all(path.is_file() for path in out.iterdir())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    again = load(model_dirs(family))
    ModelFiles(again, None).read(out)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_weights_are_saved_and_read_in_the_dtype_they_have(model_dirs, tmp_path):
    model = perturb(load(model_dirs("llama"), torch_dtype="bf16"))
    model.model.norm.float()
    ModelFiles(model, None).write(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as weights:
        dtypes = {name: weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    again = load(model_dirs("llama"), torch_dtype="bf16")
    again.model.norm.float()
    ModelFiles(again, None).read(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    config = tiny_config("llama", tie_word_embeddings=True)
    model = NeMoAutoModelForCausalLM.from_config(config, device="cpu")
    ModelFiles(model, None).write(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)
    again = NeMoAutoModelForCausalLM.from_config(config, device="cpu")
    ModelFiles(again, None).read(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_experts_are_read_back_although_files_hold_them_one_by_one(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    models = [NeMoAutoModelForCausalLM.from_config(config, device="cpu") for _ in range(2)]
    ModelFiles(models[0], None).write(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as weights:
        assert any("experts.3." in name for name in weights.keys())  # noqa: SIM118
    ModelFiles(models[1], None).read(tmp_path / "model")
    assert torch.equal(models[0](input_ids=IDS).logits, models[1](input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("folder", "name"), [("", "shard-00001-model-00001-of-00001.safetensors"), ("consolidated", "model.safetensors")]
)
def test_layouts_of_the_reference_are_read(model_dirs, tmp_path, folder, name):
    model = perturb(load(model_dirs("llama")))
    ModelFiles(model, None).write(tmp_path / "flat")
    (tmp_path / "model" / folder).mkdir(parents=True)
    shutil.copy(tmp_path / "flat" / "model.safetensors", tmp_path / "model" / folder / name)
    again = load(model_dirs("llama"))
    ModelFiles(again, None).read(tmp_path / "model")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_weights_of_another_model_and_missing_weights_are_refused(model_dirs, tmp_path):
    model = load(model_dirs("llama"))
    with pytest.raises(UserError, match="holds no weights"):
        ModelFiles(model, None).read(tmp_path)
    with pytest.raises(UserError, match="are not those of this model"):
        ModelFiles(load(model_dirs("llama"), num_hidden_layers=1), None).read(model_dirs("llama"))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged or only partly there"):
        ModelFiles(model, None).read(tmp_path)


def test_saved_adapter_equals_the_live_model_in_peft_and_here(model_dirs, adapted, tmp_path):
    out = tmp_path / "model"
    ModelFiles(adapted, make_tokenizer()).write(out)
    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "automodel_peft_config.json", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dirs("llama"))
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dirs("llama"))
    theirs = peft.PeftModel.from_pretrained(base, out)
    expected = adapted(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    again = load(model_dirs("llama"), peft_config=PeftConfig(target_modules="*_proj", dim=4, alpha=8))
    assert not torch.allclose(again(input_ids=IDS).logits, expected)
    ModelFiles(again, None).read(out)
    assert torch.equal(again(input_ids=IDS).logits, expected)


def test_generation_configs_that_could_not_be_saved_are_mended_before_training(model_dirs, tmp_path, caplog):
    caplog.set_level("INFO")
    model = load(model_dirs("llama"))
    model.generation_config.temperature = 0.3
    files = ModelFiles(model, None)
    assert "sampling values without `do_sample: true`" in caplog.text
    files.write(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.3


def test_several_chat_templates_leave_no_folder(model_dirs, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ messages }}"}
    ModelFiles(load(model_dirs("llama")), tokenizer).write(tmp_path / "model")
    assert all(path.is_file() for path in (tmp_path / "model").iterdir())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == CHAT_TEMPLATE


# inference


def make_checkpoint(model, tmp_path):
    checkpoint = tmp_path / "run" / "epoch_0_step_3"
    ModelFiles(model, make_tokenizer(CHAT_TEMPLATE)).write(checkpoint / "model")
    (tmp_path / "run" / "LATEST").symlink_to("epoch_0_step_3")
    return checkpoint


@pytest.mark.parametrize("is_adapter", [False, True])
def test_every_way_to_name_what_a_run_left(model_dirs, tmp_path, adapted, is_adapter):
    model = adapted if is_adapter else perturb(load(model_dirs("llama")))
    checkpoint = make_checkpoint(model, tmp_path)
    for path in (checkpoint, checkpoint / "model", tmp_path / "run" / "LATEST", tmp_path / "run"):
        loaded, tokenizer = load_for_inference(str(path), device="cpu")
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert len(lora_layers(loaded)) == (14 if is_adapter else 0)


def test_adapters_of_peft_load_too(model_dirs, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dirs("llama"))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], layers_to_transform=[1], use_rslora=True, task_type="CAUSAL_LM"
    )
    theirs = perturb(peft.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_for_inference(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    assert list(lora_layers(loaded)) == ["model.layers.1.self_attn.q_proj"]
    assert tokenizer("the")["input_ids"]


def test_another_base_for_an_adapter(model_dirs, adapted, tmp_path):
    ModelFiles(adapted, make_tokenizer()).write(tmp_path / "adapter")
    moved = shutil.copytree(model_dirs("llama"), tmp_path / "moved")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for name in ("", str(tmp_path / "gone")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=r"--base|does not exist"):
            load_for_inference(tmp_path / "adapter", device="cpu")
    loaded, _ = load_for_inference(tmp_path / "adapter", base=str(moved), device="cpu")
    assert torch.equal(loaded(input_ids=IDS).logits, adapted(input_ids=IDS).logits)
    with pytest.raises(UserError, match="is no adapter"):
        load_for_inference(model_dirs("llama"), base=str(moved), device="cpu")


def greedy(model, ids, num_tokens, ends):
    """The oracle: the likeliest token, again and again, without a cache."""
    made = []
    while len(made) < num_tokens:
        token = model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax().item()
        made.append(token)
        if token in ends:
            break
    return made


@pytest.mark.parametrize("prompt", ["The tower", [{"role": "user", "content": "Was the film good?"}]])
def test_generated_text_is_greedy_streamed_and_repeatable(model_dirs, prompt):
    model, tokenizer = load_for_inference(model_dirs("llama", CHAT_TEMPLATE), device="cpu")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = "<|im_start|>user\nWas the film good?<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    expected = tokenizer.decode(greedy(model, ids, 24, {2}), skip_special_tokens=True)
    model.train()
    pieces = list(generate_text(model, tokenizer, prompt, max_new_tokens=24))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert model.training


def test_sampling_follows_the_seed(model_dirs):
    model, tokenizer = load_for_inference(model_dirs("llama"), device="cpu")

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return "".join(generate_text(model, tokenizer, "The", max_new_tokens=12, temperature=3.0, **kwargs))

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_p=1e-6) == "".join(generate_text(model, tokenizer, "The", max_new_tokens=12))


def test_answers_end_at_the_tokenizers_end_token_and_can_be_left(model_dirs):
    model, tokenizer = load_for_inference(model_dirs("llama"), device="cpu")
    free = greedy(model, tokenizer("The")["input_ids"], 6, {2})
    assert len(free) == 6
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[2])
    assert "".join(generate_text(model, tokenizer, "The", max_new_tokens=6)) == tokenizer.decode(free[:3])
    answer = generate_text(model, tokenizer, "The", max_new_tokens=100000)
    next(answer)
    answer.close()


def test_bad_prompts_and_values_are_one_line(model_dirs):
    model, tokenizer = load_for_inference(model_dirs("llama"), device="cpu")
    for prompt, kwargs, words in (
        ("", {}, "The prompt is empty"),
        ([{"role": "user", "content": "x"}], {}, "no chat template"),
        ("x", {"temperature": -1}, "temperature -1"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("x", {"top_p": 0}, "top_p 0"),
    ):
        with pytest.raises(UserError, match=words):
            list(generate_text(model, tokenizer, prompt, **kwargs))


def test_a_failure_while_generating_reaches_the_caller(model_dirs):
    _, tokenizer = load_for_inference(model_dirs("llama"), device="cpu")
    small = make_model("llama").eval()  # knows fewer tokens than the tokenizer makes
    with pytest.raises(IndexError):
        list(generate_text(small, tokenizer, "tower", max_new_tokens=3))
