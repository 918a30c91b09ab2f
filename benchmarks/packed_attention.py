"""Packed rows on a GPU: the same gradients as under a dense mask, documents apart, and what each kernel costs.

Random weights, no network. Three parts, each a table on the terminal and a list in the JSON file:

* ``parity``: loss and all gradients of a small model, with packed documents, windows and shared prefixes, against the
  dense mask in float64. float32 has to agree to 1e-4; bf16 may be 1.5 times as far off as the dense mask in bf16.
* ``proof``: the isolation proof, which has to hold, and to fail once a border is moved.
* ``speed``: a training step, forward and backward, of rows full of documents of about 170 tokens, with each kernel,
  beside rows of the same size without documents; and of the same content with shared prefixes.

    python benchmarks/packed_attention.py --out packed_attention.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.isolation_proof import ROW_LEN, prove_isolation
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.packed_row import packed_row
from nemo_automodel.components.datasets.packing import Document
from nemo_automodel.components.datasets.prefix_sharing import MIN_PREFIX, PrefixSharing
from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.packing_proof import pack_documents
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

FLOAT32_GATE = 1e-4
BF16_FACTOR = 1.5
QUESTIONS = 5
"""Questions on one paragraph; SQuAD has 4.64."""
SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS = {
    "135M Llama": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "8B Llama, 4 layers": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
SHAPES = [(2, 4096), (8, 1024)]


def make(
    config: transformers.PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """Return a model with random weights made on ``device``."""
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def copy(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Return the same model in another dtype; its rotary frequencies stay as exact as Transformers keeps them."""
    found = make(model.config, model.device, dtype)
    found.load_state_dict(model.state_dict())
    return found


# --- data ------------------------------------------------------------------------------------------------------------


def documents(rng: np.random.Generator, vocab_size: int, num_tokens: int, mean: int) -> list[Document]:
    """Return documents of a half to one and a half times ``mean`` tokens; the last tenth of each is learned."""
    found = []
    while num_tokens > 0:
        length = min(int(rng.integers(mean // 2, mean + mean // 2)), num_tokens)
        found.append(_document(rng.integers(4, vocab_size, length + 1)))
        num_tokens -= length
    return found


def questions(rng: np.random.Generator, vocab_size: int, num_paragraphs: int) -> list[Document]:
    """Return documents of about 170 tokens, several beginning with the same 130."""
    found = []
    for _ in range(num_paragraphs):
        paragraph = rng.integers(4, vocab_size, int(rng.integers(100, 160)))
        for _ in range(QUESTIONS):
            own = rng.integers(4, vocab_size, int(rng.integers(25, 55)))
            found.append(_document(np.concatenate([paragraph, own]), num_learned=5))
    return found


def _document(ids: np.ndarray, num_learned: int | None = None) -> Document:
    ids, labels = ids[:-1].astype(np.int32), ids[1:].astype(np.int32)
    labels[: -(num_learned or max(1, len(ids) // 10))] = IGNORE_INDEX
    return Document(ids, labels)


def rows_of(pieces: list[Document], num_rows: int | None, row_len: int) -> Batch:
    """Fill rows in order; with ``num_rows`` exactly so many of them."""
    rows: list[list[Document]] = [[]]
    for piece in pieces:
        if sum(len(one.ids) for one in rows[-1]) + len(piece.ids) > row_len:
            rows.append([])
        rows[-1].append(piece)
    return packed_sequence_thd_collater([packed_row(row, row_len, 0) for row in rows[:num_rows]])


def plain(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("input_ids", "labels")}


def num_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum())


# --- parity ----------------------------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, transformers.PretrainedConfig, Batch]]:
    """Yield name, model and packed rows; one row length, so that each kernel is compiled for few shapes."""
    rng = np.random.default_rng(0)
    llama = transformers.LlamaConfig(**SMALL)
    mixed = transformers.Gemma3TextConfig(
        **SMALL, sliding_window=100, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    short = documents(rng, 512, 900, 60)
    yield "short documents", llama, rows_of(short, 2, 512)
    whole = [*documents(rng, 512, 1, 2), *(_document(rng.integers(4, 512, n + 1)) for n in (511, 300))]
    yield "one long document and padding", llama, rows_of(whole, 2, 512)
    yield "windows", mixed, rows_of(short, 2, 512)
    shared = PrefixSharing(512, shuffle=False)(questions(rng, 512, 3))
    yield "shared prefixes", llama, rows_of(shared, 2, 512)
    yield "shared prefixes and windows", mixed, rows_of(shared, 2, 512)


def gradients(model: transformers.PreTrainedModel, batch: Batch, backend: str) -> list[torch.Tensor]:
    model.zero_grad()
    loss = LabelledForward(model, backend).loss(batch, MaskedCrossEntropy(), num_labels(batch))
    loss.backward()
    return [loss.detach().double(), *(p.grad.double() for p in model.parameters())]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference of the loss or a gradient, relative to the norm of the expected one."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def check_parity(device: torch.device, backends: list[str]) -> list[dict]:
    results = []
    for name, config, batch in cases():
        base = make(config, device, torch.float32)
        exact = gradients(copy(base, torch.float64), batch, "dense")
        for dtype in (torch.float32, torch.bfloat16):
            gate = FLOAT32_GATE
            for backend in ("dense", *backends):
                begin = time.perf_counter()
                model = copy(base, dtype)
                try:
                    found = gradients(model, batch, backend)
                except UserError as refusal:
                    print(f"{name:32s} {dtype!s:15s} {backend:7s} does not run: {str(refusal).split('. ')[0]}")
                    continue
                off = error(found, exact)
                if backend == "dense" and dtype == torch.bfloat16:
                    gate = BF16_FACTOR * off
                holds = off <= gate
                seconds = time.perf_counter() - begin
                verdict = "ok" if holds else "WRONG"
                print(f"{name:32s} {dtype!s:15s} {backend:7s} error {off:.2e}  {verdict}  {seconds:.1f} s")
                results.append({"case": name, "dtype": str(dtype), "kernel": backend, "error": off, "holds": holds})
    return results


# --- proof -----------------------------------------------------------------------------------------------------------


def check_proof(device: torch.device, backends: list[str]) -> list[dict]:
    config = transformers.LlamaConfig(**SMALL)
    results = []
    for dtype, backend in ((d, b) for d in (torch.float32, torch.bfloat16) for b in ("dense", *backends)):
        if backend == "varlen" and dtype == torch.float32:
            continue
        model = make(config, device, dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that documents notice what stands before them
        forward = LabelledForward(model, backend)
        for shares in (False, True):
            if shares and backend == "varlen":
                continue
            cfg = PackedSequenceConfig(packed_sequence_size=ROW_LEN, share_prefix=shares)
            prefix_len = MIN_PREFIX if shares else 0
            proof = prove_isolation(forward, lambda d, cfg=cfg: pack_documents(d, cfg), ROW_LEN, prefix_len)
            again = prove_isolation(forward, lambda d, cfg=cfg: pack_documents(d, cfg), ROW_LEN, prefix_len)

            def moved(d: list, cfg: PackedSequenceConfig = cfg) -> Batch:
                batch = pack_documents(d, cfg)
                batch["seq_lens"][:, 0] += 1
                batch["seq_lens"][:, 1] -= 1
                return batch

            try:
                prove_isolation(forward, moved, ROW_LEN, prefix_len)
                fails = False
            except UserError:
                fails = True
            holds = proof.is_conclusive and fails
            print(f"{dtype!s:15s} {backend:7s} shared={shares!s:5s} {'ok' if holds else 'WRONG'}  {again}")
            results.append(
                {
                    "dtype": str(dtype), "kernel": backend, "shares_prefixes": shares, "difference": proof.difference,
                    "tolerance": proof.tolerance, "leak": proof.leak, "seconds": again.seconds, "holds": holds,
                }
            )  # fmt: skip
    return results


# --- speed -----------------------------------------------------------------------------------------------------------


def measure(model: transformers.PreTrainedModel, batch: Batch, backend: str, steps: int) -> dict:
    """Return the seconds of a first step, the median of the others, and the peak of memory of a step."""
    forward, labels = LabelledForward(model, backend), num_labels(batch)
    on_gpu = model.device.type == "cuda"
    times = []
    for step in range(steps):
        model.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
            if step == steps - 1:
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        forward.loss(batch, MaskedCrossEntropy(), labels).backward()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"first_s": times[0], "step_ms": 1e3 * statistics.median(times[3:] or times), "peak_gib": peak}


def time_proof(name: str, model: transformers.PreTrainedModel, backend: str) -> dict:
    """Return how long the isolation proof takes, the first time and the second."""
    model.set_attn_implementation("sdpa")
    cfg = PackedSequenceConfig(packed_sequence_size=ROW_LEN)
    forward, seconds = LabelledForward(model, backend), []
    for _ in range(2):
        begin = time.perf_counter()
        prove_isolation(forward, lambda documents: pack_documents(documents, cfg), ROW_LEN)
        seconds.append(time.perf_counter() - begin)
    print(f"{name:20s} proof with {backend}: {seconds[1]:.2f} s, the first time {seconds[0]:.2f} s")
    return {"model": name, "what": f"proof, {backend}", "first_s": seconds[0], "seconds": seconds[1]}


def check_speed(device: torch.device, backends: list[str], models: dict, shapes: list, steps: int) -> list[dict]:
    results = []
    for name, sizes in models.items():
        config = transformers.LlamaConfig(**{**sizes, "max_position_embeddings": 8192, "tie_word_embeddings": True})
        model = make(config, device, torch.bfloat16)
        results += [time_proof(name, model, backend) for backend in backends or ["dense"]]
        for num_rows, row_len in shapes:
            rng = np.random.default_rng(1)
            packed = rows_of(
                [d for _ in range(num_rows) for d in documents(rng, config.vocab_size, row_len, 170)], num_rows, row_len
            )
            asked = questions(rng, config.vocab_size, num_rows * row_len // 100)
            shared_pieces = PrefixSharing(row_len, shuffle=False)(asked)
            shared = rows_of(shared_pieces, num_rows, row_len)
            runs = [("rows without documents", plain(packed), "dense")]
            runs += [(f"packed, {backend}", packed, backend) for backend in (*backends, "dense")]
            if "flex" in backends:
                runs.append(("shared prefixes, flex", shared, "flex"))
            for what, batch, backend in runs:
                # under a name of its own the maskless way is taken only where the model runs SDPA
                model.set_attn_implementation("sdpa")
                found = measure(model, batch, backend, steps)
                tokens = (
                    int(batch["seq_lens"].clamp(min=0).sum()) if "seq_lens" in batch else batch["input_ids"].numel()
                )
                stands_for = tokens + _num_saved(batch)
                rate = stands_for / found["step_ms"] * 1e3
                print(
                    f"{name:20s} {num_rows} x {row_len:4d}  {what:24s} {found['step_ms']:8.1f} ms "
                    f"{found['peak_gib']:6.2f} GiB {rate:9,.0f} document tokens/s, first step {found['first_s']:.1f} s"
                )
                results.append(
                    {
                        "model": name, "num_rows": num_rows, "row_len": row_len, "what": what, **found,
                        "num_tokens": tokens, "num_tokens_of_documents": stands_for, "document_tokens_per_s": rate,
                    }
                )  # fmt: skip
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return results


def _num_saved(batch: Batch) -> int:
    """Return the tokens that the documents of a batch would have more if no prefix were shared."""
    if "branch_ids" not in batch:
        return 0
    saved = 0
    for lengths, branches in zip(batch["seq_lens"].tolist(), batch["branch_ids"].tolist(), strict=True):
        start = 0
        for length in (length for length in lengths if length > 0):
            of_document = branches[start : start + length]
            saved += of_document.count(0) * max(0, max(of_document) - 1)
            start += length
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", choices=["parity", "proof", "speed"], help="one part alone")
    parser.add_argument("--steps", type=int, default=10, help="steps of a timing, the first three of them uncounted")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does the script itself work?")
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke else "cuda")
    backends = [] if args.smoke else ["varlen", "flex"]
    begin = time.perf_counter()
    results: dict = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu" if args.smoke else torch.cuda.get_device_name(),
    }
    models, shapes = ({"tiny": {**SMALL, "num_hidden_layers": 1}}, [(2, 512)]) if args.smoke else (MODELS, SHAPES)
    parts = {
        "parity": lambda: check_parity(device, backends),
        "proof": lambda: check_proof(device, backends),
        "speed": lambda: check_speed(device, backends, models, shapes, args.steps),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"--- {name}")
            results[name] = part()
    results["seconds"] = time.perf_counter() - begin
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [entry for name in ("parity", "proof") for entry in results.get(name, []) if not entry["holds"]]
    print(f"{results['seconds']:.0f} s; {len(wrong)} of the checks do not hold.")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
