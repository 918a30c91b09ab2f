"""The quickstart from end to end, on a tiny random model and a few rows in the form of the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from support.tiny import CHAT_TEMPLATE, make_model_dir

from nemo_automodel.cli import fetch_demo, quickstart
from nemo_automodel.cli.app import main
from nemo_automodel.cli.demo_sentences import Sentence
from nemo_automodel.shared.errors import UserError

WORDS = ["film", "ending", "actors", "story", "battery", "sound", "screen", "remote"]


def sentences(start: int, number: int) -> list[Sentence]:
    return [
        Sentence(
            f"movie-{i}",
            1.5 if i % 2 else -1.5,
            f"the {WORDS[i % 8]} was {'wonderful' if i % 2 else 'poor'}" + ", and so on" * (i % 3),
        )
        for i in range(start, start + number)
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Return a cache as `automodel fetch-demo` leaves it; the model has layers where the recipe puts adapters."""
    root = tmp_path_factory.mktemp("cache")
    demo = fetch_demo.Demo(root / "demo")
    demo.data.mkdir(parents=True)
    make_model_dir(demo.model, "llama", CHAT_TEMPLATE, num_hidden_layers=20)
    for name, rows in (("train", sentences(0, 40)), ("validation", sentences(100, 25))):
        (demo.data / f"{name}.jsonl").write_text("".join(json.dumps(row.row()) + "\n" for row in rows))
    fetch_demo.write_manifest(demo.root)
    return root


@pytest.fixture
def demo(cache, monkeypatch, tmp_path) -> fetch_demo.Demo:
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return fetch_demo.Demo(cache / "demo")


class Oracle:
    """Numbers from plain Transformers, one row at a time."""

    def __init__(self, demo: fetch_demo.Demo, model_dir: Path | None = None) -> None:
        path = model_dir or demo.model
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.rows = [json.loads(line)["messages"] for line in (demo.data / "validation.jsonl").open()]

    def prompt_ids(self, row: int) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(self.rows[row][:1], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def log_probs(self, row: int, answer: str) -> torch.Tensor:
        """Return the log-probability of each token of the answer and of the end of the turn."""
        answer_ids = self.tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([self.prompt_ids(row), answer_ids], dim=1)
        log_probs = self.model(ids).logits.log_softmax(dim=-1)[0, -answer_ids.shape[1] - 1 : -1]
        return log_probs.gather(1, answer_ids[0, :, None])[:, 0]

    @torch.no_grad()
    def answer(self, row: int, max_new_tokens: int) -> str:
        ids = self.prompt_ids(row)
        for _ in range(max_new_tokens):
            following = self.model(ids).logits[0, -1].argmax()
            if following == self.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
        return self.tokenizer.decode(ids[0, self.prompt_ids(row).shape[1] :], skip_special_tokens=True).strip()


def test_from_start_to_end(demo, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert main(["quickstart", "--steps", "3", "--dir", str(run_dir)]) == 0
    out = capfd.readouterr().out
    checkpoint = run_dir / "epoch_0_step_2"
    assert (checkpoint / "model" / "adapter_model.safetensors").is_file()
    assert f"report      {run_dir / 'report.html'}" in out
    assert str(checkpoint.relative_to(tmp_path)) in out
    assert len([line for line in out.splitlines() if re.match(r"  \S*automodel ", line)]) == 3

    oracle = Oracle(demo)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [row[0]["content"] for row in oracle.rows[:3]]
    assert [sample["expected"] for sample in samples] == [row[1]["content"] for row in oracle.rows[:3]]
    assert [sample["before"] for sample in samples] == [oracle.answer(i, quickstart.MAX_NEW_TOKENS) for i in range(3)]
    page = (run_dir / "report.html").read_text()
    assert "the actors was" in page or samples[0]["expected"] in page

    before = mean_loss(oracle)
    oracle.model = peft.PeftModel.from_pretrained(oracle.model, checkpoint / "model").eval()
    after = mean_loss(oracle)
    assert after < before
    assert loss_line(out).split()[-2:] == [f"{before:.3f}", f"{after:.3f}"]
    assert [sample["after"] for sample in samples] == [oracle.answer(i, quickstart.MAX_NEW_TOKENS) for i in range(3)]
    records = [json.loads(line) for line in (run_dir / "training.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]


def loss_line(out: str) -> str:
    (line,) = (line for line in out.splitlines() if "loss of an answer token" in line)
    return line


def mean_loss(oracle: Oracle) -> float:
    losses = torch.cat([-oracle.log_probs(i, row[1]["content"]) for i, row in enumerate(oracle.rows)])
    return float(losses.mean())


@pytest.fixture
def small(demo, model_dirs) -> Oracle:
    """Return an oracle of two layers only: it is asked a lot."""
    return Oracle(demo, model_dirs("llama", CHAT_TEMPLATE))


def test_scores_equal_plain_transformers(demo, small):
    from nemo_automodel._transformers.forward import LabelledForward
    from nemo_automodel.cli.held_out import HeldOut

    oracle = small
    # Scale the head so that the answers differ from row to row: a fresh model is sure of nothing.
    with torch.no_grad():
        oracle.model.get_output_embeddings().weight.mul_(30)
    held_out = HeldOut(demo.data / "validation.jsonl", oracle.tokenizer)
    score = held_out.score(LabelledForward(oracle.model), "measuring")
    assert score.loss == pytest.approx(mean_loss(oracle), rel=1e-5)
    first = [(oracle.log_probs(i, "positive")[0], oracle.log_probs(i, "negative")[0]) for i in range(len(held_out))]
    right = [
        (good > bad) == (row[1]["content"] == "positive") for row, (good, bad) in zip(oracle.rows, first, strict=True)
    ]
    assert 0 < sum(right) < len(right), "the test must be able to tell rows apart"
    assert score.preferred == sum(right) / len(right)
    exact = [oracle.answer(i, 40) == row[1]["content"] for i, row in enumerate(oracle.rows)]
    assert score.exact == sum(exact) / len(exact)


def test_exact_counts_the_whole_answer_and_its_end(demo, small):
    """A model that has learned some rows by heart gives the same answers when it is free to say what it likes."""
    from nemo_automodel._transformers.forward import LabelledForward
    from nemo_automodel.cli.held_out import HeldOut
    from nemo_automodel.components.datasets.utils import default_collater
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    oracle = small
    held_out = HeldOut(demo.data / "validation.jsonl", oracle.tokenizer)
    forward = LabelledForward(oracle.model)
    optimizer = torch.optim.AdamW(oracle.model.parameters(), lr=5e-3)
    batch = default_collater([held_out.samples[row] for row in range(len(held_out))])
    for _ in range(60):
        forward.loss(batch, MaskedCrossEntropy(), int((batch["labels"] != -100).sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
    score = held_out.score(forward, "measuring")
    answers = held_out.answers(oracle.model, len(held_out), 40)
    questions = held_out.questions(len(held_out))
    right = [answer == question.expected for answer, question in zip(answers, questions, strict=True)]
    assert score.exact == sum(right) / len(right) > 0.4
    assert [oracle.answer(row, 40) for row in range(5)] == answers[:5], "one batch, padded on the left"


def test_without_adapter_is_the_base_model(demo):
    from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
    from nemo_automodel.cli.held_out import without_adapter
    from nemo_automodel.components._peft.lora import PeftConfig, lora_layers

    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(demo.model), peft_config=PeftConfig(target_modules=["*_proj"]), torch_dtype="float32", device="cpu"
    ).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(demo.model, dtype=torch.float32).eval()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        with without_adapter(model):
            assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids).logits, adapted)
    assert not torch.allclose(adapted, base(ids).logits)


def test_the_recipe_puts_adapters_on_the_top_twelve_layers():
    from nemo_automodel.components._peft.module_matcher import matches

    pattern = yaml.safe_load(quickstart.RECIPE_FILE.read_text())["peft"]["target_modules"]
    names = [f"model.layers.{layer}.{name}" for layer in range(30) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert [name for name in names if matches(name, pattern)] == names[36:]
    assert not matches("model.layers.20.input_layernorm", pattern)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--steps", "0"], "must be at least 1"), (["--dir", "."], "not empty"), (["--dir", "a.txt"], "not empty")],
)
def test_mistakes_are_one_line(demo, tmp_path, capfd, words, message):
    (tmp_path / "a.txt").write_text("mine")
    assert main(["quickstart", *words]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_outside_a_checkout_it_says_so(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "RECIPE_FILE", tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="checkout"):
        quickstart.run(quickstart_arguments([]))


def quickstart_arguments(words: list[str]):
    import argparse

    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    return parser.parse_args(words)


def test_the_threads_are_chosen_unless_told(monkeypatch, capfd):
    number = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        quickstart.set_num_threads()
        assert torch.get_num_threads() == number
        monkeypatch.delenv("OMP_NUM_THREADS")
        torch.set_num_threads(2)
        quickstart.set_num_threads()
        assert torch.get_num_threads() in (1, 2)
        assert f"with {torch.get_num_threads()} of" in capfd.readouterr().out
    finally:
        torch.set_num_threads(number)
