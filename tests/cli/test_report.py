"""The report page: its numbers are the record's, it loads nothing, and nothing in a file can become markup."""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny import CHAT_TEMPLATE

from nemo_automodel.cli import report
from nemo_automodel.components.loggers.charts import format_number
from nemo_automodel.components.loggers.run_record import read_run
from nemo_automodel.shared.errors import UserError

HOSTILE = "</script></pre><img src=x onerror=alert(1)><script>alert(2)</script>\"'&<b>"
VOID_TAGS = {"meta", "link", "br", "img", "rect", "circle", "line", "path"}
TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "figure", "span", "i",
    "svg", "line", "text", "path", "circle", "g", "rect", "pre", "dl", "dt", "dd", "details", "summary",
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page: charts by title with what their columns say, texts by class, all tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.columns: dict[str, list[str]] = {}
        self.texts: dict[str, list[str]] = {}
        self.text = ""
        self.chart = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "svg":
            self.chart = dict(attrs)["aria-label"] or ""
            self.columns[self.chart] = []
        if tag not in VOID_TAGS:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID_TAGS:
            return
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.stack[-1] if self.stack else ""
        if where == "style":
            return
        if where == "title" and "svg" in self.stack:
            self.columns[self.chart].append(data)
        self.texts.setdefault(where, []).append(data)
        self.text += data + "\n"


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 30 steps with two validation sets and one checkpoint."""
    directory = tmp_path / "runs" / "mine"
    checkpoint = directory / "epoch_0_step_29"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "optim").mkdir()
    (checkpoint / "optim" / ".metadata").touch()
    (checkpoint / "step_scheduler.pt").touch()
    (checkpoint / "config.yaml").write_text(
        f"recipe: TrainFinetuneRecipeForNextTokenPrediction\nmodel:\n  pretrained_model_name_or_path: some/model\n"
        f"peft:\n  dim: 8\n  alpha: 32\ndataset:\n  dataset_name: https://host.example/rows\n"
        f"note: {json.dumps(HOSTILE)}\n"
    )
    (checkpoint / "model" / "adapter_config.json").write_text('{"peft_version": "0.21.2"}')
    write_lines(
        directory / "training.jsonl",
        [
            {
                "step": step,
                "epoch": step // 15,
                "timestamp": f"2026-01-02T03:04:{step:02d}.000Z",
                "loss": 3.0 / (step + 1) if step != 7 else None,
                "grad_norm": 1.0 + step / 7,
                "lr": 1e-5 * (step + 1) / 30,
                "mem": 11.5 + step / 100,
                "tps": 1000.0 + step,
                "tps_per_gpu": 1000.0 + step,
                "num_tokens_per_step": 2000,
                "num_label_tokens": 300 + step,
                "mfu": None,
            }
            for step in range(30)
        ],
    )
    for name, shift in (("validation", 0.0), ("validation_hard", 1.0)):
        write_lines(
            directory / f"{name}.jsonl",
            [
                {"step": step, "epoch": 0, "val_loss": shift + 2.5 / (step + 1), "lr": 1e-5, "num_label_tokens": 5}
                for step in (9, 19, 29)
            ],
        )
    (directory / "LATEST").symlink_to("epoch_0_step_29")
    return directory


def make_page(path: Path | str, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(path), *arguments])) == 0
    return (Path(path) / "report.html").read_text(encoding="utf-8") if not arguments else ""


def plotted(page: Page, chart: str, name: str) -> dict[int, str]:
    """Return what a chart's columns say of one series, by step."""
    found = {}
    for column in page.columns[chart]:
        step, *values = column.split(" · ")
        for value in values:
            if value.startswith(name + " "):
                found[int(step.removeprefix("step "))] = value.removeprefix(name + " ")
    return found


def test_plotted_numbers_are_the_records(run_dir: Path) -> None:
    page = Page(make_page(run_dir))
    records = [json.loads(line) for line in (run_dir / "training.jsonl").read_text().splitlines()]
    for chart, name, key in (
        ("Loss", "train", "loss"),
        ("Learning rate", "lr", "lr"),
        ("Gradient norm", "norm", "grad_norm"),
        ("Tokens per second", "tokens/s", "tps"),
        ("Memory, GiB", "GiB", "mem"),
        ("Learned tokens per step", "tokens", "num_label_tokens"),
    ):
        shown = plotted(page, f"{chart} by step", name)
        assert list(shown) == list(range(30))
        for record in records:
            if record[key] is None:
                assert shown[record["step"]] == "not finite"
            else:
                assert float(shown[record["step"]].replace(",", "")) == pytest.approx(record[key], rel=5e-4)
    for name, file in (("validation", "validation"), ("hard", "validation_hard")):
        shown = plotted(page, "Loss by step", name)
        for line in (run_dir / f"{file}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert shown.pop(record["step"]) == format_number(record["val_loss"])
        assert shown == {}


def test_facts_and_totals(run_dir: Path) -> None:
    page = Page(make_page(run_dir))
    for text in (
        "some/model",
        "LoRA, dim 8, alpha 32",
        "0.1000",  # the last training loss, 3/30
        "0.0833",  # the best validation loss, 2.5/30
        "60 k",  # 30 * 2000 tokens
        f"{sum(300 + step for step in range(30)):,} learned",
        "59.1 s",  # the sum of 2000 / (1000 + step)
        "11.79 GiB",
        "2026-01-02 03:04 UTC",
        "epoch_0_step_29",
        "peft 0.21.2",
        "1 value not finite",
    ):
        assert text in page.text, text
    assert read_run(run_dir).seconds() == pytest.approx(sum(2000 / (1000 + step) for step in range(30)))


def test_the_page_loads_nothing_and_has_no_script(run_dir: Path) -> None:
    text = make_page(run_dir)
    page = Page(text)
    assert page.tags <= TAGS
    assert page.stack == []
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [name for name in names if name.startswith("on")]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text.replace("https://host.example/rows", ""))
    policy = [value for name, value in page.attributes if name == "content" and "default-src 'none'" in str(value)]
    assert len(policy) == 1


def test_hostile_texts_stay_text(run_dir: Path) -> None:
    samples = [{"prompt": HOSTILE, "expected": HOSTILE, "before": None, "after": HOSTILE + "\ud800"}, {"prompt": "p"}]
    write_lines(run_dir / "samples.jsonl", samples)
    text = make_page(run_dir)
    page = Page(text)
    assert page.tags <= TAGS
    assert "<img" not in text
    assert "<script" not in text
    pre = page.texts["pre"]
    assert pre[0] == pre[1] == HOSTILE
    assert pre[2].startswith(HOSTILE)
    assert pre[3] == "p"
    assert json.dumps(HOSTILE) in pre[4]


def test_samples_of_the_run_are_shown_side_by_side(run_dir: Path) -> None:
    write_lines(run_dir / "samples.jsonl", [{"prompt": "2+2?", "expected": "4", "before": "5", "after": "4"}])
    page = Page(make_page(run_dir))
    assert page.texts["pre"][:4] == ["2+2?", "4", "5", "4"]
    assert {"before training", "after training", "expected"} <= set(page.texts["div"])


@pytest.mark.parametrize("name", ["run", "checkpoint", "pointer", "LATEST", "parent"])
def test_every_way_to_name_a_run(run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent.parent)
    run_dir.parent.rename("checkpoints")
    moved = Path("checkpoints/mine")
    (moved.parent / "LATEST").symlink_to("mine/epoch_0_step_29")
    given = {
        "run": moved,
        "checkpoint": moved / "epoch_0_step_29",
        "pointer": moved / "LATEST",
        "LATEST": Path("LATEST"),
        "parent": moved.parent,
    }[name]
    record = report.read_run_of(str(given))
    assert record.directory.resolve() == moved.resolve()
    assert record.checkpoint is not None
    assert record.checkpoint.resolve() == (moved / "epoch_0_step_29").resolve()
    assert len(record.train) == 30


def test_an_older_run_beside_a_newer_one_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run_dir, run_dir / "newer", symlinks=True)
    (run_dir / "LATEST").unlink()
    (run_dir / "LATEST").symlink_to("newer/epoch_0_step_29")
    assert report.find_run(run_dir)[0] == run_dir
    assert capsys.readouterr().err == (
        f"This page is about the run in {run_dir} itself; the newest one is in {run_dir / 'newer'}.\n"
    )


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere` holds no run: there is no training\.jsonl") as caught:
        report.read_run_of(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_is_one_line(run_dir: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        make_page(run_dir, "--out", str(run_dir))


def test_a_run_that_has_just_begun_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").touch()
    page = Page(make_page(tmp_path))
    assert "No loss was recorded." in page.text
    assert "No samples: this run has no complete checkpoint yet." in page.text
    assert page.columns == {}


def test_a_step_recorded_twice_counts_once(run_dir: Path) -> None:
    with (run_dir / "training.jsonl").open("a") as file:
        file.write('{"step": 5, "epoch": 0, "loss": 42.0}\n{"step": 6, "ep')
    record = read_run(run_dir)
    assert [entry["step"] for entry in record.train] == list(range(30))
    assert dict(record.series("loss"))[5] == 42.0


def test_no_validation_set_is_said_on_the_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(make_page(run_dir))
    assert "No samples: the configuration names no validation_dataset." in page.text
    assert capsys.readouterr().err.startswith("No samples: ")


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "training.jsonl",
        [{"step": step, "epoch": 0, "loss": 1 + (step % 97) / 97, "lr": 1e-5, "tps": 5.0} for step in range(20_000)],
    )
    assert len(make_page(tmp_path)) < 600_000


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_samples_are_the_checkpoints_greedy_answers_to_held_out_rows(
    model_dirs, squad_dir: Path, tmp_path: Path, chat_template: str | None
) -> None:
    checkpoint = tmp_path / "epoch_0_step_1"
    shutil.copytree(model_dirs("llama", chat_template), checkpoint / "model")
    (checkpoint / "optim").mkdir()
    (checkpoint / "optim" / ".metadata").touch()
    (checkpoint / "step_scheduler.pt").touch()
    (checkpoint / "config.yaml").write_text(
        "validation_dataset:\n  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset\n"
        f"  dataset_name: {squad_dir}\n  split: validation\n"
    )
    (tmp_path / "training.jsonl").touch()
    page = Page(make_page(tmp_path))

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "model")
    rows = [json.loads(line) for line in (squad_dir / "validation.jsonl").read_text().splitlines()]
    expected = []
    for row in (rows[0], rows[5], rows[10]):  # a third of 16 rows apart
        prompt, place = f"Context: {row['context']} Question: {row['question']} Answer: ", row["answers"]["text"][0]
        if chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        both = tokenizer(prompt + place, add_special_tokens=False, return_offsets_mapping=True)
        # a token may hold the prompt's last space and the answer's first letters: it belongs to the answer
        borders = zip(both["input_ids"], both["offset_mapping"], strict=True)
        ids = torch.tensor([[token for token, (_, end) in borders if end <= len(prompt)]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        expected += [prompt, place, answer]
    assert [text.strip() for text in page.texts["pre"][:9]] == [text.strip() for text in expected]
    assert "epoch_0_step_1, greedy, on rows 0, 5, 10 of `validation_dataset`." in page.text


def test_samples_that_cannot_be_made_do_not_stop_the_page(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_dir / "epoch_0_step_29" / "config.yaml"
    config.write_text("validation_dataset:\n  _target_: os.system\n  command: touch owned\n")
    monkeypatch.chdir(run_dir)
    text = make_page(run_dir)
    reason = capsys.readouterr().err.splitlines()[-1]
    assert reason.startswith("No samples: ")
    assert html.escape(reason) in text
    assert not (run_dir / "owned").exists()
    assert "Samples" in Page(text).text


def test_split_row_ends_the_prompt_before_the_first_answer() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, -100, 3]}
    assert report.split_row(row) == ([5, 6, 7], [8, 9])
    assert report.split_row({"input_ids": [5, 6], "labels": [-100, -100]}) == ([5, 6], [])


def test_rows_are_spread_over_the_set() -> None:
    rows = [{"n": n} for n in range(10)]
    assert [number for number, _ in report.spread(rows, 3)] == [0, 3, 6]
    assert [number for number, _ in report.spread(rows, 20)] == list(range(10))
    assert list(report.spread(iter(rows), 2)) == [(0, {"n": 0}), (1, {"n": 1})]
