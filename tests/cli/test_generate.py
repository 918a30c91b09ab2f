"""``automodel generate`` and ``chat`` on tiny models: the text is what Transformers and PEFT give by hand."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.tiny import CHAT_TEMPLATE

from nemo_automodel.cli import chat, generate
from nemo_automodel.shared.errors import UserError

PROMPT = "Where was the tower built?"


def parse(module, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def greedy(model, tokenizer, text: str, max_new_tokens: int, add_special_tokens: bool = True) -> str:
    """Return what plain Transformers answers."""
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens)
    encoded.pop("token_type_ids", None)
    output = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def load_plain(directory: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def render(*messages: tuple[str, str]) -> str:
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_text_is_transformers_own(model_dirs, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = model_dirs(family)
    assert generate.run(parse(generate, directory, "--prompt", PROMPT, "--max-new-tokens", "24")) == 0
    model, tokenizer = load_plain(directory)
    expected = greedy(model, tokenizer, PROMPT, 24)
    assert expected
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_is_used_unless_raw(
    model_dirs, system: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_dirs("llama", CHAT_TEMPLATE)
    model, tokenizer = load_plain(directory)
    flags = ["--system", system] if system else []
    generate.run(parse(generate, directory, "--prompt", PROMPT, "--max-new-tokens", "12", *flags))
    messages = [("system", system)] * bool(system) + [("user", PROMPT)]
    templated = greedy(model, tokenizer, render(*messages), 12, add_special_tokens=False)
    assert capsys.readouterr().out == templated + "\n"
    generate.run(parse(generate, directory, "--prompt", PROMPT, "--max-new-tokens", "12", "--raw"))
    raw = greedy(model, tokenizer, PROMPT, 12)
    assert capsys.readouterr().out == raw + "\n"
    assert raw != templated


def test_the_prompt_comes_from_standard_input(
    model_dirs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dirs("llama")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    generate.run(parse(generate, directory, "--prompt", "-", "--max-new-tokens", "8"))
    assert capsys.readouterr().out == greedy(*load_plain(directory), PROMPT, 8) + "\n"


def test_an_adapter_answers_as_peft_does(model_dirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model_dirs("llama")
    model, tokenizer = load_plain(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter = tmp_path / "epoch_0_step_3" / "model"
    wrapped.save_pretrained(adapter)
    expected = greedy(wrapped, tokenizer, PROMPT, 16)
    assert expected != greedy(load_plain(base)[0], tokenizer, PROMPT, 16)
    for path in (adapter, tmp_path / "epoch_0_step_3"):
        generate.run(parse(generate, path, "--prompt", PROMPT, "--max-new-tokens", "16"))
        assert capsys.readouterr().out == expected + "\n"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone"}))
    generate.run(parse(generate, adapter, "--base", base, "--prompt", PROMPT, "--max-new-tokens", "16"))
    assert capsys.readouterr().out == expected + "\n"


def test_sampling_is_repeatable_with_a_seed(model_dirs, capsys: pytest.CaptureFixture[str]) -> None:
    directory = model_dirs("llama")
    texts = []
    for seed in (3, 3, 4):
        flags = ["--temperature", "1.5", "--top-p", "0.95", "--seed", str(seed), "--max-new-tokens", "20"]
        generate.run(parse(generate, directory, "--prompt", PROMPT, *flags))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "  "], "The prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "`--max-new-tokens 0` must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], r"`--temperature -1\.0` must be 0"),
        (["--prompt", "x", "--temperature", "nan"], "`--temperature nan` must be 0"),
        (["--prompt", "x", "--top-p", "0"], r"`--top-p 0\.0` must be above 0"),
        (["--prompt", "x", "--system", "be brief"], "`--system` needs a chat template"),
        (["--prompt", "x", "--base", "other"], "is no adapter"),
        (["--prompt", "x", "--device", "warp"], "warp"),
    ],
)
def test_mistakes_are_one_line(model_dirs, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate.run(parse(generate, model_dirs("llama"), *flags))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        generate.run(parse(generate, tmp_path / "nowhere", "--prompt", "x"))
    assert "nowhere" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_system_message_is_one_line(model_dirs) -> None:
    refusing = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    directory = model_dirs("llama", refusing)
    with pytest.raises(UserError, match="refuses the messages: System role not supported"):
        generate.run(parse(generate, directory, "--prompt", "x", "--system", "y"))


def test_a_reader_that_leaves_early_is_no_error(model_dirs) -> None:
    code = (
        "import argparse, sys; from nemo_automodel.cli import generate; parser = argparse.ArgumentParser();"
        "generate.add_arguments(parser); sys.exit(generate.run(parser.parse_args()))"
    )
    command = [sys.executable, "-c", code, str(model_dirs("llama")), "--prompt", PROMPT, "--max-new-tokens", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def talk(monkeypatch: pytest.MonkeyPatch, directory: Path, *lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return chat.run(parse(chat, directory, "--temperature", "0", "--max-new-tokens", "10"))


def test_chat_sees_the_whole_conversation_until_reset(
    model_dirs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dirs("llama", CHAT_TEMPLATE)
    assert talk(monkeypatch, directory, "Hello", "And you?", "", "/reset", "And you?", "/exit", "never read") == 0
    model, tokenizer = load_plain(directory)

    def by_hand(*messages: tuple[str, str]) -> str:
        return greedy(model, tokenizer, render(*messages), 10, add_special_tokens=False)

    first = by_hand(("user", "Hello"))
    second = by_hand(("user", "Hello"), ("assistant", first), ("user", "And you?"))
    alone = by_hand(("user", "And you?"))
    assert second != alone
    assert capsys.readouterr().out == "".join(text + "\n" * bool(text) for text in (first, second, alone))


def test_chat_with_a_base_model_continues_plain_text(
    model_dirs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dirs("llama")
    assert talk(monkeypatch, directory, "The tower", "was built", "/history", "/dance") == 0
    model, tokenizer = load_plain(directory)
    first = greedy(model, tokenizer, "The tower\n", 10)
    second = greedy(model, tokenizer, f"The tower\n{first}\nwas built\n", 10)
    out, err = capsys.readouterr()
    assert out.startswith(f"{first}\n{second}\nuser: The tower\nassistant: {first}\nuser: was built\n")
    assert "has no chat template (a base model?): it continues the plain text." in err
    assert "`/dance` is no command" in err


def test_an_answer_can_be_stopped(
    model_dirs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []

    def answer_once(model, tokenizer, prompt, args):
        if not stopped:
            stopped.append(list(prompt))
            raise KeyboardInterrupt
        print(len(prompt))
        return "fine"

    monkeypatch.setattr(chat, "answer", answer_once)
    assert talk(monkeypatch, model_dirs("llama", CHAT_TEMPLATE), "one", "two") == 0
    out, err = capsys.readouterr()
    assert stopped == [[{"role": "user", "content": "one"}]]
    assert out == "1\n"
    assert "stopped" in err
