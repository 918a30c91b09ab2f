"""What the scripts of this directory share: shapes of real models, random tokens, a clock, the card's own readings."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_automodel._transformers.kernel_choice import describe_machine
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.datasets.llm.mock_iterable_dataset import MockIterableDataset
from nemo_automodel.components.training.flops import ModelWork, count_work
from nemo_automodel.components.training.stopwatch import Stopwatch
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

LORA_RANK, LORA_ALPHA = 16, 32
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_1_8b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    ),
    "qwen2_5_7b": (
        "Qwen2Config",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    ),
    "qwen3_8b": (
        "Qwen3Config",
        {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6},
    ),
    "smollm2_135m": (
        "LlamaConfig",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ),
    "llama3_70b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    ),
    "llama3_2_1b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": True},
    ),
    "llama3_2_3b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": True},
    ),
    "phi3_mini": (
        "Phi3Config",
        {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "pad_token_id": 0},
    ),
    "olmo2_7b": (
        "Olmo2Config",
        {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6},
    ),
}
"""Name → class and sizes of a configuration."""
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 512, "head_dim": 16, "num_hidden_layers": 2}


def make_config(shape: str, num_layers: int | None = None, small: bool = False) -> Any:
    """Return a configuration of a known shape, shortened or made tiny."""
    name, sizes = SHAPES[shape]
    sizes = {**sizes, **(SMALL if small else {}), "max_position_embeddings": 8192}
    if num_layers is not None:
        sizes["num_hidden_layers"] = num_layers
    return getattr(transformers, name)(**sizes)


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def random_model(config: Any, device: str) -> Any:
    """Return Transformers' model with random weights, made on the device in the dtype it computes in."""
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype_of(device), attn_implementation="sdpa")


def write_model_directory(config: Any, path: Path, device: str, shard_size: str = "5GB") -> None:
    """Write a model of random weights in bf16, and a tokenizer of three words, as a Hugging Face directory."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size=shard_size)
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)


def lora_work(config: Any, recomputed: str = "none") -> ModelWork:
    """Count LoRA on all projections of a model that is never made."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        apply_lora(model, PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA))  # type: ignore[arg-type]
    return count_work(model, recomputed)


# --- tokens ----------------------------------------------------------------------------------------------------------


def random_batches(vocab_size: int, rows: int, seq_len: int, num_batches: int) -> list[Batch]:
    """Return micro-batches of random tokens, all of them learned, the same for everybody who asks."""
    dataset = MockIterableDataset(vocab_size, seq_len, num_batches * rows, rows)
    return [dataset.item(index) for index in range(num_batches)]


def packed_batches(
    vocab_size: int, rows: int, seq_len: int, num_batches: int, mean_len: int, std_len: int
) -> list[Batch]:
    """Return the tokens of `random_batches` cut into documents that fill every row; the last of a row is cut off."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch in random_batches(vocab_size, rows, seq_len, num_batches):
        lengths = [_document_lengths(seq_len, mean_len, std_len, generator) for _ in range(rows)]
        seq_lens = torch.full((rows, max(map(len, lengths))), -1000)
        for row, documents in enumerate(lengths):
            seq_lens[row, : len(documents)] = torch.tensor(documents)
            ends = torch.tensor(documents).cumsum(0)
            batch["labels"][row, ends - 1] = IGNORE_INDEX
            batch["position_ids"][row] = torch.cat([torch.arange(length) for length in documents])
        batches.append({**batch, "seq_lens": seq_lens})
    return batches


def _document_lengths(seq_len: int, mean_len: int, std_len: int, generator: torch.Generator) -> list[int]:
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        drawn = int(torch.normal(float(mean_len), float(std_len), (1,), generator=generator))
        lengths.append(min(left, max(4, drawn)))
    return lengths


def split_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Return the same rows in micro-batches of ``rows``."""
    return [
        {key: value[start : start + rows] for key, value in batch.items()}
        for batch in batches
        for start in range(0, len(batch["input_ids"]), rows)
    ]


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """A timed window of whole steps."""

    seconds: float
    num_steps: int
    losses: list[float]
    peak_gib: float | None
    clocks: dict[str, Any] = field(default_factory=dict)


def time_steps(step: Callable[[], float], seconds: float, device: str) -> Window:
    """Repeat ``step``, which waits for its loss, until ``seconds`` are over; the device's own clock counts."""
    watch = Stopwatch(torch.device(device))
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    losses = []
    with Clocks(is_cuda) as clocks:
        start = watch.mark()
        elapsed = 0.0
        while elapsed < seconds:
            losses.append(step())
            elapsed = watch.seconds(start, watch.mark())
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None
    return Window(elapsed, len(losses), losses, peak_gib, clocks.summary())


class Clocks:
    """Reads SM clock, power and temperature once a second while the block runs."""

    _COLUMNS = ("sm_mhz", "watts", "celsius")

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._lines = ""

    def __enter__(self) -> Clocks:
        if self._is_cuda:
            self._file = tempfile.TemporaryFile("w+")
            query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu"]
            query += ["--format=csv,noheader,nounits", "-lms", "1000", "-i", "0"]
            self._process = subprocess.Popen(query, stdout=self._file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_cuda:
            self._process.terminate()
            self._process.wait()
            self._file.seek(0)
            self._lines = self._file.read()
            self._file.close()

    def summary(self) -> dict[str, Any]:
        """Return mean, least and most of each reading; empty without a GPU."""
        rows = [[float(cell) for cell in line.split(",")] for line in self._lines.splitlines() if "N/A" not in line]
        if not rows:
            return {}
        columns = zip(self._COLUMNS, zip(*rows, strict=True), strict=True)
        found = {name: {"mean": sum(v) / len(v), "min": min(v), "max": max(v)} for name, v in columns}
        return {"num_readings": len(rows), **found}


def environment(device: str, *packages: str) -> dict[str, Any]:
    """Return the versions and the card."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        found["ptxas"] = describe_machine(torch.device(device)).get("ptxas")
    return found
