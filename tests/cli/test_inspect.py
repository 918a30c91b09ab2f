"""`automodel inspect`: what a person sees of the rows, on a terminal, without colour and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import recipe_config
from support.tiny import CHAT_TEMPLATE, make_tokenizer

from nemo_automodel.cli.app import main
from nemo_automodel.components.datasets.document_view import DocumentView
from nemo_automodel.components.datasets.token_view import show_row, token_texts, visible
from nemo_automodel.shared.errors import UserError

HOSTILE = '<script>alert(1)</script> & "quoted" \x1b[31mred\x1b[0m \u202eleft [bracket]'


@pytest.fixture
def write_run(tmp_path: Path, model_dirs, squad_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes ``run.yaml`` for rows of conversations, or of SQuAD where none are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def write(rows: list[Any] | None = None, **more: Any) -> None:
        config = recipe_config(model_dirs("llama", CHAT_TEMPLATE), squad_dir, tmp_path / "run", **more)
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            config["dataset"] = {
                "_target_": "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset",
                "path_or_dataset_id": "rows.jsonl",
                **more.get("dataset", {}),
            }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    return write


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_plain_text_shows_every_token_and_marks_what_is_learned(write_run, capsys: pytest.CaptureFixture[str]):
    write_run([chat("Where is it?", "In Paris.")])
    assert main(["inspect", "run.yaml", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no colour where nobody looks"
    assert "row 1 · rows.jsonl line 1 · " in out
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    text = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nIn Paris.<|im_end|>"
    expected = [tokenizer.decode([token]).replace("\n", "↵") for token in tokenizer(text)["input_ids"]]
    shown = "".join(re.sub(r"^ *\d+  ", "", line) for line in out.splitlines() if re.match(r" +\d+  ", line))
    num_learned = len(tokenizer("In Paris.<|im_end|>")["input_ids"])
    given = "".join(f"{token}|" for token in expected[:-num_learned])
    assert shown == given + "".join(f"[{token}]" for token in expected[-num_learned:])
    assert f"Data check, all 1 rows: {len(expected)} tokens, {num_learned} learned" in out


def test_positions_stand_at_the_start_of_lines(write_run, capsys: pytest.CaptureFixture[str]):
    write_run([chat("Where is it? " * 20, "In Paris.")])
    assert main(["inspect", "run.yaml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+  ", line)]
    position = 0
    for line in lines:
        assert int(line[:6].replace(",", "")) == position
        position += line.count("|") - line.count("<|") * 1 - line.count("|>") * 1 + line.count("[")
    assert max(map(len, lines)) <= 100


def test_colour_on_a_terminal_and_none_with_no_color(write_run, capsys, monkeypatch: pytest.MonkeyPatch):
    write_run([chat("Where is it?", "In Paris.")])
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", "run.yaml"]) == 0
    coloured = capsys.readouterr().out
    learned = re.findall(r"\x1b\[1;30;48;5;\d+m(.*?)\x1b\[0m", coloured)
    assert "".join(learned).endswith("Paris.<|im_end|>")
    assert "[In]" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", "run.yaml"]) == 0
    assert "[<|im_end|>]" in capsys.readouterr().out


def test_the_same_words_as_a_run(write_run, capsys: pytest.CaptureFixture[str]):
    write_run()
    assert main(["inspect", "--dataset.limit_dataset_samples", "5", "run.yaml", "--rows=2", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "Data check, all 5 rows" in out
    assert out.count("row 1 ·") == out.count("row 2 ·") == 1
    assert "row 3 ·" not in out
    for words, message in (
        (["inspect", "run.yaml", "--datset.split", "x"], "unknown section `datset`"),
        (["inspect"], "no config file is given"),
        (["inspect", "run.yaml", "--rows", "0"], "`--rows 0` must be 1 or more."),
        (["inspect", "run.yaml", "--rows", "many"], "invalid int value: 'many'"),
        (["inspect", "run.yaml", "--html", "no/where.html"], "`no/where.html` cannot be written: No such file"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_rows_come_in_the_order_of_training(write_run, capsys, tmp_path: Path):
    from support.recipes import set_up_recipe

    write_run(dataloader__shuffle=True)
    assert main(["inspect", "run.yaml", "--rows", "6"]) == 0
    lines = [int(line) for line in re.findall(r"row \d+ · \S+ line (\d+) · ", capsys.readouterr().out)]
    recipe = set_up_recipe(yaml.safe_load((tmp_path / "run.yaml").read_text()), tmp_path / "again.yaml")
    first = [
        tuple(row[mask.bool()].tolist())
        for batch in recipe.train_loader
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ][:6]
    dataset = recipe.train_loader.dataset
    assert [tuple(dataset[line - 1]["input_ids"]) for line in lines] == first


def test_packed_rows_show_their_documents(write_run, capsys: pytest.CaptureFixture[str]):
    write_run(packed_sequence={"packed_sequence_size": 192})
    assert main(["inspect", "run.yaml", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    documents = re.findall(r"── document (\d+) · \S+train.jsonl line (\d+)\n +(\d+)  ", out)
    assert [(int(n), int(line), int(position)) for n, line, position in documents] == [
        (n, n, 0) for n in range(1, len(documents) + 1)
    ]
    assert len(documents) >= 2
    assert re.search(r"Packed 64 documents with [\d,]+ tokens into [\d,]+ rows of 192: [\d.]+ % padding", out)


def test_packed_streams_show_their_documents(write_run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    write_run([chat(f"Where is it {n}?", "In Paris.") for n in range(12)])
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    config["dataset"]["streaming"] = True
    config["packed_sequence"] = {"packed_sequence_size": 64}
    config["step_scheduler"]["max_steps"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["inspect", "run.yaml", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"row 1 · [2-9] documents · ", out)
    assert "── document 2 · Micro-batch 1, row 1, document 2" in out
    assert "Data check, 12 rows of a stream: " in out


def test_shared_prefixes_are_shown_once(write_run, capsys: pytest.CaptureFixture[str]):
    context = "The tower was built in 1889 in Paris. " * 3
    write_run([chat(f"{context}{word}?", word) for word in ("Where", "When", "Who")])
    sharing = ["--packed_sequence.packed_sequence_size", "400", "--packed_sequence.share_prefix", "true"]
    assert main(["inspect", "run.yaml", "--rows", "1", *sharing, "--dataloader.shuffle", "false"]) == 0
    out = capsys.readouterr().out
    assert out.count("tokens are those above, stored once") == 2
    assert "Data check, all 3 rows" in out


def test_what_truncation_cuts_is_shown(write_run, capsys: pytest.CaptureFixture[str]):
    write_run([chat("Where?", "In Paris and in Rome.")], dataset={"seq_length": 20, "truncation": True})
    assert main(["inspect", "run.yaml", "--data_check.max_truncated_share", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\{\.\}\{<\|im_end\|>\}", out)
    assert ", 1 cut, " in out


def test_the_gate_speaks_after_the_rows(write_run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    write_run([chat("Where?", "In Paris and in Rome.")], dataset={"seq_length": 20, "truncation": True})
    assert main(["inspect", "run.yaml", "--html", "page.html"]) == 2
    captured = capsys.readouterr()
    assert "{<|im_end|>}" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: `dataset.seq_length` cuts the answer of 1 of 1 rows")
    assert "The label gate refuses this: `dataset.seq_length` cuts the answer" in (tmp_path / "page.html").read_text()


class Page(HTMLParser):
    """Collects the tokens of a page, and everything in it that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.active: list[str] = []
        self._kind: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag in ("script", "img", "iframe", "object", "embed", "form", "base") or "src" in names:
            self.active.append(tag)
        if tag == "link" and names.get("href") != "data:,":
            self.active.append(tag)
        self.active += [name for name in names if name.startswith("on")]
        if tag == "span" and "title" in names:
            self._kind = names["class"]

    def handle_data(self, data: str) -> None:
        if self._kind is not None:
            self.tokens.append((self._kind, data))

    def handle_endtag(self, tag: str) -> None:
        self._kind = None


def test_the_page_holds_every_token_and_nothing_that_acts(write_run, tmp_path: Path):
    write_run([chat(HOSTILE, "In Paris.")])
    assert main(["inspect", "run.yaml", "--html", "page.html"]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.active == []
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv", "", text)
    learned = "".join(data for kind, data in page.tokens if kind == "learned")
    assert learned == "In Paris.<|im_end|>"
    given = "".join(data for kind, data in page.tokens if kind == "given")
    assert '<script>alert(1)</script> & "quoted" \\x1b[31mred\\x1b[0m \\u202eleft [bracket]' in given.replace("‥", "")


def test_hostile_text_cannot_act_on_a_terminal(write_run, capsys: pytest.CaptureFixture[str]):
    write_run([chat(HOSTILE, "In Paris.")])
    assert main(["inspect", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    shown = out.replace("|", "")
    assert "\\x1b[31mred" in shown
    assert "[bracket" in shown, "nothing is read as markup"


def test_a_picture_fetches_nothing(write_run, tmp_path: Path):
    write_run([chat("Where is it?", "In Paris.")])
    assert main(["inspect", "run.yaml", "--svg", "rows.svg"]) == 0
    text = (tmp_path / "rows.svg").read_text()
    assert text.startswith("<svg")
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "Paris" in text


# --- the view itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain words", "日本語 🙂", "👨‍👩‍👧‍👦", "a\n\tb", "\u200b\x00"])
def test_tokens_spell_the_text(text: str):
    tokenizer = make_tokenizer()
    texts = token_texts(tokenizer(text)["input_ids"], tokenizer)
    assert "".join(texts).replace("‥", "") == text


def test_half_a_character_has_a_name():
    tokenizer = make_tokenizer()
    ids = tokenizer("🙂")["input_ids"]
    assert token_texts(ids[:1], tokenizer) == [tokenizer.convert_ids_to_tokens(ids[0])]
    assert token_texts([7, 8], None) == [" 7", " 8"]


def test_visible():
    assert visible("a\tb\r\n") == "a⇥b␍↵"
    assert visible("\x1b\u202e\ue000") == "\\x1b\\u202e\\ue000"
    assert visible("日本 é") == "日本 é"


def test_a_row_of_a_users_builder():
    row = show_row(3, [DocumentView("Row 9 of the data set", [5, 6], [-100, 7])], None)
    assert row.heading == "row 3 · Row 9 of the data set · 3 tokens, 1 learned"
    assert [(token.text, token.kind.value) for token in row.documents[0].tokens] == [
        (" 5", "given"),
        (" 6", "given"),
        (" 7", "learned"),
    ]


def test_no_model_is_loaded(write_run, monkeypatch: pytest.MonkeyPatch):
    from nemo_automodel.recipes.llm import train_ft

    def never(*_: object) -> None:
        raise UserError("a model is loaded")

    monkeypatch.setattr(train_ft.TrainFinetuneRecipeForNextTokenPrediction, "build_model", never)
    write_run()
    assert main(["inspect", "run.yaml", "--rows", "1"]) == 0
