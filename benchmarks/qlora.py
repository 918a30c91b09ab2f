"""QLoRA on one GPU: the kernels that unpack 4-bit weights, one layer against fp32, and whole optimizer steps.

    python benchmarks/qlora.py [--seconds 15] [--cases 70b:2x1024:none:nf4,8b:2x4096:none:nf4] [--out results.json]

**Kernels**: 16 and 8 bits from NF4 on the shapes of a 70B layer, against the same in plain PyTorch, with the rate of
memory (half a byte read, one or two written, the magnitudes); ``--tune`` times other tiles. **Layer**: output and every
LoRA gradient of one layer of the shape of Llama-3.1-8B against fp32 with the same unpacked weights: cosine at least
0.9999 in bf16. **Steps**: LoRA, r 16 on all linear layers, random tokens over the full vocabulary, all of them
labelled, clipping and fused AdamW on fp32 adapters inside the clock. A case is shape (8b, 70b), rows x length, what is
recomputed (a name of `activation_checkpointing`), and nf4 or nf4_fp8; a fifth part, a number, exchanges the count of
layers. Weights are random codes made on the device by `from_config`; the peak of making them is printed beside the peak
of the steps.

`--device cpu --small` runs the script itself on any machine. Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a 70B fills the card

import torch
import transformers
from fast_core import PEAK_TFLOPS, agreement, profile, relative_error, synchronize
from measuring import environment, lora_work
from torch import nn

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.components.training.flops import FAST_RECOMPUTED, StepSize
from nemo_automodel.kernels import linear_ce, nf4
from nemo_automodel.kernels.jit import HAS_TRITON

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 512}
LORA_RANK = 16
GROUPS_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}


@dataclass(frozen=True)
class Case:
    """One timed run."""

    shape: str
    rows: int
    seq_len: int
    recompute: str
    store: str
    num_layers: int | None

    @classmethod
    def read(cls, text: str) -> Case:
        """Read ``shape:rowsxlength:recompute:store[:layers]``."""
        shape, size, recompute, store, *rest = text.split(":")
        rows, _, seq_len = size.partition("x")
        return cls(shape, int(rows), int(seq_len), recompute, store, int(rest[0]) if rest else None)

    def config(self, is_small: bool) -> Any:
        """Return the configuration of the model."""
        values = {"vocab_size": 128256, "num_key_value_heads": 8, **SHAPES[self.shape]} | (SMALL if is_small else {})
        if self.num_layers is not None:
            values["num_hidden_layers"] = self.num_layers
        return transformers.LlamaConfig(**values, max_position_embeddings=8192, tie_word_embeddings=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="timed window of each case")
    parser.add_argument(
        "--cases", default="70b:2x1024:none:nf4,70b:1x4096:full:nf4,8b:2x4096:none:nf4,8b:2x4096:full:nf4"
    )
    parser.add_argument("--grad-accum", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--loss-rows", type=int, default=linear_ce.CHUNK_ROWS, help="rows of a chunk of logits")
    parser.add_argument("--embeddings-on-host", action="store_true")
    parser.add_argument("--card-gib", type=float, help="give tensors no more memory than this, as a smaller card would")
    parser.add_argument("--skip-profile", action="store_true", help="only time steps, without a trace of one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--skip-checks", action="store_true", help="only time steps")
    parser.add_argument("--tune", action="store_true", help="time other tiles of the kernels")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    arguments = {key: str(value) for key, value in vars(args).items()}
    record: dict[str, Any] = {"environment": environment(args.device), "arguments": arguments, "steps": {}}
    print(json.dumps(record["environment"]))
    if args.card_gib and args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.card_gib * 2**30 / torch.cuda.mem_get_info()[1])
    failures: list[str] = []
    if not args.skip_checks:
        record["kernels"] = check_kernels(args, failures)
        record["layer"] = check_layer(args, failures)
    for text in filter(None, args.cases.split(",")):
        record["steps"][text] = time_case(text, args)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"FAILED {line}" for line in failures) or "all checks passed")
    return 1 if failures else 0


# --- kernels ---------------------------------------------------------------------------------------------------------


def check_kernels(args: argparse.Namespace, failures: list[str]) -> dict[str, Any]:
    """Return milliseconds and GB/s of every form on every shape."""
    if args.device != "cuda" or not HAS_TRITON:
        print("kernels: no GPU or no Triton, nothing to check")
        return {}
    found: dict[str, Any] = {}
    for name, shape in GROUPS_70B.items():
        packed = nf4.random_packed(shape, 0.02, torch.device("cuda"))
        scales = nf4.channel_scales(packed)
        wide = torch.full((shape[0], shape[1] + 64), float("nan"), dtype=torch.bfloat16, device="cuda")
        e4m3 = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
        turned = torch.empty(shape[::-1], dtype=torch.float8_e4m3fn, device="cuda")
        forms: dict[str, tuple[torch.Tensor, Callable[[], Any], Callable[[torch.Tensor], Any]]] = {
            "bf16": (
                wide[:, : shape[1]],
                lambda p=packed, o=wide[:, : shape[1]]: nf4.dequantize_triton(p, o, None),
                lambda o, p=packed: nf4.dequantize_reference(p, o, None),
            ),
            "e4m3": (
                e4m3,
                lambda p=packed, o=e4m3, s=scales: nf4.dequantize_triton(p, o, s),
                lambda o, p=packed, s=scales: nf4.dequantize_reference(p, o, s),
            ),
            "e4m3 transposed": (
                turned,
                lambda p=packed, o=turned, s=scales: nf4.dequantize_transposed_triton(p, o, s),
                lambda o, p=packed, s=scales: nf4.dequantize_transposed_reference(p, o, s),
            ),
        }
        for form, (out, run, reference) in forms.items():
            run()
            wanted = torch.empty_like(out)
            reference(wanted)
            error = relative_error(out.float(), wanted.float())
            ms = milliseconds(run)
            num_bytes = shape[0] * shape[1] * (0.516 + out.element_size())
            found[f"{name} {form}"] = {"ms": ms, "gb_per_s": num_bytes / ms / 1e6, "error": error}
            print(f"kernel {name:8s} {form:16s} {ms:7.3f} ms {num_bytes / ms / 1e6:6.0f} GB/s, error {error:.1e}")
            if not error < 1e-4:
                failures.append(f"kernel {name} {form}: differs from plain PyTorch by {error:.1e}")
            if args.tune and name == "gate_up":
                found[f"{name} {form} tiles"] = tune(form, run)
    return found


def tune(form: str, run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds under other tiles."""
    found, name = {}, "_TILE_N" if form.endswith("transposed") else "_TILE_BYTES"
    usual, warps = getattr(nf4, name), nf4._NUM_WARPS
    for tile in (64, 128, 256) if name == "_TILE_N" else (256, 512, 1024, 2048, 4096):
        for nf4._NUM_WARPS in (2, 4, 8):
            setattr(nf4, name, tile)
            found[f"{name} {tile}, {nf4._NUM_WARPS} warps"] = milliseconds(run)
    setattr(nf4, name, usual)
    nf4._NUM_WARPS = warps
    for text, ms in sorted(found.items(), key=lambda item: item[1]):
        print(f"  {form}: {text}: {ms:.3f} ms")
    return found


def milliseconds(run: Callable[[], Any], count: int = 10) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


# --- one layer -------------------------------------------------------------------------------------------------------


def check_layer(args: argparse.Namespace, failures: list[str]) -> dict[str, float]:
    """Compare one layer with packed weights, plain and fast, with the same numbers in fp32."""
    config = Case("8b", 1, 64, "none", "nf4", 1).config(args.small)
    config.vocab_size = 512
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    results, oracle = {}, None
    x = torch.randn(2, 64 if args.small else 512, config.hidden_size, device=args.device).to(dtype)
    dy = torch.randn_like(x)
    positions = torch.arange(x.shape[1], device=args.device)[None]
    for name, fast, store in (("plain", "off", "nf4"), ("fast", "on", "nf4"), ("fast fp8", "on", "nf4_fp8")):
        torch.manual_seed(1)
        model = build(config, "none", store, args.device, dtype, fast)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B.weight, std=0.02)
        if oracle is None:
            oracle = in_fp32(model)
            results["oracle"] = one_pass(oracle, x.float(), dy.float(), positions)
        results[name] = one_pass(model, x, dy, positions)
    summary: dict[str, float] = {}
    for name in ("plain", "fast", "fast fp8"):
        values = {key: agreement(value, results["oracle"][key]) for key, value in results[name].items()}
        key = min(values, key=lambda k: values[k][0])
        summary[f"{name} worst cosine"] = values[key][0]
        summary[f"{name} worst ratio"] = max((ratio for _, ratio in values.values()), key=lambda r: abs(r - 1))
        print(f"layer {name:9s}: worst cosine {values[key][0]:.6f} ({key}), ratio {summary[f'{name} worst ratio']:.4f}")
        least = {"plain": 0, "fast": 0.9999, "fast fp8": 0.99}[name]
        if not values[key][0] >= least:
            failures.append(f"layer {name} {key}: cosine {values[key][0]:.6f} < {least}")
    return summary


def one_pass(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    layer: Any = model.model.layers[0]  # type: ignore[union-attr, index]
    leaf = x.clone().requires_grad_()
    tables = tuple(t.to(x.dtype) for t in model.model.rotary_emb(x.bfloat16(), positions))  # type: ignore[union-attr, operator]
    out = layer(leaf, position_embeddings=tables, position_ids=positions)
    out.backward(dy)
    assert leaf.grad is not None
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return {"output": out.detach() - x, "dx": leaf.grad - dy, **grads}


def in_fp32(model: nn.Module) -> nn.Module:
    """Return a copy of a packed model with Transformers' layers and its numbers in fp32."""
    plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).to(model.device)
    from nemo_automodel.components._peft.lora import apply_lora

    apply_lora(plain, PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=2 * LORA_RANK))
    state = {name: value for name, value in model.state_dict().items() if ".weight." not in name}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            packed = module.packed
            state[f"{name}.weight"] = nf4.dequantize(packed, torch.empty(packed.shape, device=model.device))
    plain.load_state_dict(state)
    return plain


# --- steps -----------------------------------------------------------------------------------------------------------


def build(
    config: Any, recompute: str, store: str, device: str, dtype: torch.dtype, fast: str = "on", **more: Any
) -> Any:
    return NeMoAutoModelForCausalLM.from_config(
        config,
        torch_dtype=dtype,
        device=device,
        fast_layers=fast,
        **more,
        activation_checkpointing=recompute,
        quantization_config=QuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=str(dtype).removeprefix("torch."),
            compute_in_fp8=store == "nf4_fp8",
        ),
        peft_config=PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=2 * LORA_RANK),
    ).train()


def time_case(text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of one case; out of memory is a result, not an error."""
    print(f"--- {text}")
    try:
        return _time_case(text, Case.read(text), args)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        print(f"{text}: out of memory: {message[:200]}")
        return {"out_of_memory": message}
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def peak_gib(device: str) -> float:
    """Return the peak since the last call, and forget it."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _time_case(text: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    device, config = args.device, case.config(args.small)
    seq_len = 32 if args.small else case.seq_len
    peak_gib(device)
    started = time.perf_counter()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    more = {"embeddings_on_host": args.embeddings_on_host, "row_shape": (case.rows, seq_len)}
    model = build(config, case.recompute, case.store, device, dtype, **more)
    synchronize(device)
    build_s, build_peak = time.perf_counter() - started, peak_gib(device)
    built = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device == "cuda")
    batches = [torch.randint(0, config.vocab_size, (case.rows, seq_len), device=device) for _ in range(4)]
    num_tokens = case.rows * seq_len
    scale = torch.tensor(1.0 / (args.grad_accum * num_tokens), device=device)

    def micro_batch(index: int) -> torch.Tensor:
        ids = batches[index % len(batches)]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        labels = ids.roll(-1, dims=1).flatten()
        loss = linear_ce.frozen_head_loss(hidden, model.lm_head.weight, labels, scale, -100, args.loss_rows)
        loss.backward()
        return loss.detach()

    def step() -> float:
        total = torch.zeros((), device=device)
        for index in range(args.grad_accum):
            total += micro_batch(index)
        grad_norm = clip_grad_norm(parameters, 1.0)
        loss, norm = torch.stack([total, grad_norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(norm)
        return loss

    step()
    losses, num_steps = [], 0
    synchronize(device)
    peak_gib(device)
    started = time.perf_counter()
    while num_steps == 0 or time.perf_counter() - started < args.seconds:
        losses.append(step())
        num_steps += 1
    synchronize(device)
    elapsed, peak = time.perf_counter() - started, peak_gib(device)
    rate = num_steps * args.grad_accum * num_tokens / elapsed
    recomputed = FAST_RECOMPUTED[case.recompute]
    row = StepSize(seq_len, seq_len, seq_len, seq_len**2)
    tflops = rate * lora_work(config, recomputed).hardware(row) / seq_len / 1e12
    if device == "cuda":
        name = torch.cuda.get_device_name()
        limit = next((value for key, value in PEAK_TFLOPS.items() if key in name), math.inf)
        assert tflops < limit * (2 if case.store == "nf4_fp8" else 1), f"{tflops:.0f} TFLOP/s is above the peak"
    print(
        f"{text}: {rate:,.0f} tok/s, {tflops:.0f} TFLOP/s, peak {peak:.2f} GiB; built in {build_s:.1f} s, "
        f"{built:.2f} GiB, at most {build_peak:.2f}; {num_steps} steps in {elapsed:.1f} s, "
        f"losses {losses[0]:.4f} to {losses[-1]:.4f}"
    )
    result = {
        "tokens_per_s": rate,
        "hardware_tflops": tflops,
        "peak_gib": peak,
        "build_s": build_s,
        "built_gib": built,
        "build_peak_gib": build_peak,
        "timed_s": elapsed,
        "losses": losses,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0,
        "profile": {} if args.skip_profile else profile(lambda: micro_batch(0), device),
    }
    optimizer.zero_grad()
    return result


if __name__ == "__main__":
    raise SystemExit(main())
