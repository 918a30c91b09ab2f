"""`automodel export`: what every format holds is what was trained, read back from the file."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.tiny import CHAT_TEMPLATE, make_tokenizer, tiny_config
from support.tokenizers_ import sentencepiece_tokenizer, split_tokenizer

from nemo_automodel._transformers.answers import Loading
from nemo_automodel._transformers.inference import load_for_inference
from nemo_automodel.cli.app import main
from nemo_automodel.components.export import gguf_tokenizer
from nemo_automodel.components.export.certificate import check_certificate
from nemo_automodel.components.export.gguf_file import write_gguf
from nemo_automodel.components.export.ollama import differences, go_template, take_apart
from nemo_automodel.components.export.serving import adapter_problems, serve_lines
from nemo_automodel.components.export.templates import CONVERSATIONS, PLAIN
from nemo_automodel.shared.errors import UserError

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

IDS = torch.randint(4, 400, (1, 40), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def export(source: Path, out: Path, *words: str) -> int:
    return main(["export", str(source), "-o", str(out), "--device", "cpu", *words])


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", ["sft", "dcp", "lora"])
def test_hf_is_an_ordinary_directory(runs, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(runs(kind), tmp_path / "hf", "--to", "hf", "--dtype", "float32") == 0
    assert "certificate: passed on 16 rows of the run's validation data" in capsys.readouterr().out
    trained, _ = load_for_inference(runs(kind), device="cpu")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(exported), logits(trained), rtol=1e-4, atol=1e-5)
    content = check_certificate(tmp_path / "hf")
    assert {check["name"] for check in content["checks"]} >= {"hf = trained", "hf ≠ base"}
    assert content["source"] == "epoch_0_step_5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_model_without_its_base_says_so(runs, tmp_path: Path) -> None:
    """A plain directory: nothing is known of a run, so text of our own is asked and no base is compared."""
    assert export(runs("sft") / "model", tmp_path / "a", "--to", "hf", "--no-certificate") == 0
    assert not (tmp_path / "a/certificate.json").exists()
    assert export(tmp_path / "a", tmp_path / "b", "--to", "hf") == 0
    content = check_certificate(tmp_path / "b")
    assert content["prompts"] == "16 embedded texts (no run's configuration)"
    assert content["notes"] == ["the base was not compared"]


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.2)])
def test_gguf_holds_the_model(runs, tmp_path: Path, kind: str, tolerance: float) -> None:
    assert export(runs("tied"), tmp_path / "g", "--to", "gguf", "--type", kind, "--dtype", "float32") == 0
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["certificate.json", f"model-{kind}.gguf"]
    trained, _ = load_for_inference(runs("tied"), device="cpu")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "g", gguf_file=f"model-{kind}.gguf", dtype=torch.float32
    )
    torch.testing.assert_close(logits(read), logits(trained), rtol=0, atol=tolerance)
    assert not read.config.tie_word_embeddings
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / f"g/model-{kind}.gguf").tensors}
    assert types == {"F32", {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[kind]}


def test_a_gguf_file_with_another_template_is_caught(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    from nemo_automodel.recipes import export_formats

    def write_with_another(directory, config, tokenizer, *rest):
        tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant:\n")
        write_gguf(directory, config, tokenizer, *rest)

    monkeypatch.setattr(export_formats, "write_gguf", write_with_another)
    assert export(runs("lora"), tmp_path / "g", "--to", "gguf") == 2
    assert "the chat template of gguf writes (user) differently" in capsys.readouterr().err


STRETCHED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": ({}, lambda: make_tokenizer()),
    "llama3": (
        {"head_dim": 16, "rope_parameters": STRETCHED},
        lambda: split_tokenizer(gguf_tokenizer._LLAMA3, ignore_merges=True),
    ),
    "mistral": ({"attention_bias": False}, sentencepiece_tokenizer),
    "qwen2": ({}, lambda: split_tokenizer(gguf_tokenizer._QWEN2)),
    "qwen3": ({"tie_word_embeddings": True}, lambda: split_tokenizer(gguf_tokenizer._QWEN2)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_their_tokenizers(tmp_path: Path, family: str) -> None:
    overrides, make = FAMILIES[family]
    tokenizer = make()
    torch.manual_seed(0)
    config = tiny_config(family.removesuffix("3") if family == "llama3" else family, vocab_size=470, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, model.config, tokenizer, file, "f32", "tiny")
    read = Loading(torch.device("cpu"), torch.float32).gguf(file, tmp_path)
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-5)
    again = gguf_tokenizer.read_tokenizer(file)
    for text in (*PLAIN, "<|im_start|>user\nHi<|im_end|>\n", "it's WE'LL", "2024-01-02 3.14159"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    fields = gguf.GGUFReader(file).fields
    arch = fields["general.architecture"].contents()
    assert arch == ("llama" if family in ("llama", "llama3", "mistral") else family)
    assert fields[f"{arch}.rope.dimension_count"].contents() == (16 if family in ("llama3", "qwen3") else 8)
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 470


def test_stretched_rotary_frequencies_are_transformers_own(tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from nemo_automodel.components.export.gguf_file import rope_factors

    config = tiny_config("llama", head_dim=16, rope_parameters=STRETCHED)
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(plain / torch.from_numpy(rope_factors(config)), expected, rtol=1e-5, atol=0)


def test_what_gguf_cannot_hold(tmp_path: Path, model_dirs, runs, capsys) -> None:
    assert export(model_dirs("gemma3"), tmp_path / "g", "--to", "gguf") == 2
    assert "Models of type `gemma3_text` cannot be written as GGUF" in capsys.readouterr().err
    tokenizer = split_tokenizer(r"\w+|\W+")
    with pytest.raises(UserError, match=r"llama\.cpp has no name for"):
        gguf_tokenizer.vocabulary_of(tokenizer, 470)
    assert not (tmp_path / "g").exists()
    assert not list(tmp_path.glob(".merged-*"))


# --------------------------------------------------------------------------------------------------------------- Ollama


def go_renders(template: str, messages: list[dict[str, str]]) -> str:
    """Carry out the few actions that are written, as Go's text/template would."""
    import re

    system = any(message["role"] == "system" for message in messages)
    actions = re.findall(r"\{\{-? (.*?) \}\}(?=\{\{|$)", template, re.S)

    def block(start: int) -> tuple[list, int]:
        """Read actions up to the end of a block: plain ones, or (kind, branches)."""
        made: list = []
        while start < len(actions):
            action = actions[start]
            if action == "end" or action.startswith("else"):
                return made, start
            if action.startswith(("if ", "range ")):
                branches = []
                condition = action
                while True:
                    inner, start = block(start + 1)
                    branches.append((condition, inner))
                    condition = actions[start]
                    if condition == "end":
                        break
                made.append(branches)
            else:
                made.append(action)
            start += 1
        return made, start

    def holds(condition: str, message: dict | None, is_last: bool) -> bool:
        condition = condition.removeprefix("else ").removeprefix("if ")
        if condition == "not .System":
            return not system
        if condition == "not $last":
            return not is_last
        if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return message["role"] == match[1]
        if match := re.fullmatch(r'and \$last \(ne \.Role "(\w+)"\)', condition):
            return is_last and message["role"] != match[1]
        raise AssertionError(condition)

    def run(block: list, message: dict | None, is_last: bool) -> str:
        text = ""
        for item in block:
            if isinstance(item, str):
                if item == ".Content":
                    text += message["content"]
                elif not item.startswith("$last"):
                    text += json.loads(item)
            elif item[0][0].startswith("range"):
                for number, each in enumerate(messages):
                    text += run(item[0][1], each, number == len(messages) - 1)
            else:
                chosen = next((inner for condition, inner in item if holds(condition, message, is_last)), [])
                text += run(chosen, message, is_last)
        return text

    return run(block(0)[0], None, False)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are \"kind\".<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
COUNTS = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_DEFAULT, MISTRAL], ids=["chatml", "default", "mistral"])
def test_ollamas_template_writes_what_the_chat_template_writes(template: str) -> None:
    tokenizer = make_tokenizer(template)
    pieces = take_apart(tokenizer)
    assert differences(tokenizer, pieces) == []
    go = go_template(pieces, None)
    for messages in CONVERSATIONS:
        if messages[-1]["role"] == "assistant" or (template is MISTRAL and messages[0]["role"] == "system"):
            continue
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go_renders(go, messages) == expected


def test_what_ollamas_template_cannot_do_is_said() -> None:
    tokenizer = make_tokenizer(LLAMA3)
    pieces = take_apart(tokenizer)
    assert differences(tokenizer, pieces) == ["spaces around a message stay, which the chat template takes away"]
    go = go_template(pieces, tokenizer.bos_token)  # the server adds it
    expected = tokenizer.apply_chat_template(CONVERSATIONS[1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.bos_token + go_renders(go, CONVERSATIONS[1]) == expected
    assert take_apart(make_tokenizer(COUNTS)) is None or differences(make_tokenizer(COUNTS), pieces)


def test_an_ollama_directory(runs, tmp_path: Path, capsys) -> None:
    assert export(runs("lora"), tmp_path / "o", "--to", "ollama") == 0
    lines = (tmp_path / "o/Modelfile").read_text()
    assert lines.startswith("FROM ./model-q8_0.gguf\nTEMPLATE ")
    assert lines.endswith('PARAMETER stop "<|im_end|>"\n')
    assert "Ollama's template writes conversations the same way" in capsys.readouterr().out
    template = lines.split('"""')[1]
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    expected = tokenizer.apply_chat_template(CONVERSATIONS[2], tokenize=False, add_generation_prompt=True)
    assert go_renders(template, CONVERSATIONS[2]) == expected


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["peft", "vllm", "sglang"])
def test_an_adapter_is_what_peft_loads(runs, tmp_path: Path, kind: str, capsys) -> None:
    assert export(runs("lora"), tmp_path / "a", "--to", kind) == 0
    assert "certificate: passed" in capsys.readouterr().out
    trained, _ = load_for_inference(runs("lora"), device="cpu")
    base = transformers.AutoModelForCausalLM.from_pretrained(trained.config.name_or_path)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    torch.testing.assert_close(logits(wrapped), logits(trained), rtol=1e-4, atol=1e-5)
    check_certificate(tmp_path / "a")
    if kind != "peft":
        assert "--max-lora-rank 8" in (tmp_path / "a/SERVE.md").read_text()


def test_servers_rules(runs, tmp_path: Path, capsys) -> None:
    good = {"peft_type": "LORA", "r": 24, "bias": "none", "use_rslora": True}
    names = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert adapter_problems("vllm", good, names) == []
    assert "--max-lora-rank 32" in serve_lines("vllm", "adapter", "base", 24)
    for change, message in (
        ({"use_dora": True}, "is DoRA"),
        ({"bias": "all"}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "holds whole modules (lm_head)"),
        ({"rank_pattern": {"q_proj": 4}}, "sets `rank_pattern`"),
        ({"r": 1024}, "has rank 1024, and 512 is the highest"),
        ({"peft_type": "LOHA"}, "is of type LOHA"),
    ):
        assert message in adapter_problems("vllm", good | change, names)[0]
    assert export(runs("dora"), tmp_path / "v", "--to", "vllm") == 2
    assert "vllm does not take the adapter" in capsys.readouterr().err
    assert export(runs("sft"), tmp_path / "v", "--to", "vllm") == 0
    assert "vllm serve v\n" in (tmp_path / "v/SERVE.md").read_text()
    assert export(runs("sft"), tmp_path / "p", "--to", "peft") == 2
    assert "is no adapter, so it cannot be exported as one" in capsys.readouterr().err
