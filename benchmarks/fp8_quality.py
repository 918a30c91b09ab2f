"""Where an 8-bit base loses accuracy: LoRA gradients of a real model against fp32, one operand at a time.

    python benchmarks/fp8_quality.py MODEL TEXT [--device cpu] [--out results.json]

MODEL is a directory with a Llama-like model, TEXT a file of chat rows (`automodel fetch-demo` brings both). Everything
is computed in fp32 with the roundings of `components/fast/fp8_store.py` put in by hand, so that nothing but them
differs. **Layers**: every layer gets the inputs and the output gradient that it has in the exact model, and its LoRA
gradients (rank 16 on all projections) are compared with the exact ones; given are the worst and the median of all
adapters, the share below the gate of 0.998, and the worst of the gradients of a layer taken together. **Model**: loss
and all LoRA gradients of one batch, errors running through all layers.

Cases name what is rounded: x inputs, w weights, dy output gradients. `corrected` adds, for each matrix, the exact
product of its rounding error with the 16 directions in which its inputs are largest on other text, which would fit into
ranks that LoRA's padding leaves empty; it is a study and not part of the project.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

GATE, RANK, NUM_DIRECTIONS, LARGEST = 0.998, 16, 16, 448.0
QKV = ("q_proj", "k_proj", "v_proj")
EXACT = (None, None, None)
ROWS = ("row", "row", "row")

Modes = tuple[str | None, str | None, str | None]


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def rounded(x: torch.Tensor, mode: str | None) -> torch.Tensor:
    """Round a matrix with one scale, with one for each row, or with one for every 128 numbers of a row."""
    if mode is None:
        return x
    if mode == "matrix":
        return to_e4m3(x, x.abs().amax() / LARGEST)
    rows = x.abs().amax(1, keepdim=True) / LARGEST
    if mode == "block":
        padded = nn.functional.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
        return to_e4m3(padded, padded.abs().amax(-1, keepdim=True) / LARGEST).flatten(1)[:, : x.shape[1]]
    return to_e4m3(x, rows)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: RoundedLinear) -> torch.Tensor:
        ctx.linear = linear
        return rounded(x.flatten(0, -2), linear.modes[0]).view(x.shape) @ linear.rounded_weight(linear.modes[1]).t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dy,), linear = grad_outputs, ctx.linear
        flat, scale = dy.flatten(0, -2), linear.weight.abs().amax(1) / LARGEST
        # as the store does it: the weight's scales go into the gradient before it takes its own
        flat = rounded(flat * scale, "row") / scale if linear.modes[2] == "row" else rounded(flat, linear.modes[2])
        return (flat @ linear.rounded_weight(linear.modes[1])).view(*dy.shape[:-1], -1), None


class RoundedLinear(nn.Module):
    """A projection with an adapter, and with roundings that can be turned on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.modes: Modes = EXACT
        num_out, num_in = self.weight.shape
        self.a = nn.Parameter(torch.empty(RANK, num_in, device=self.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = nn.Parameter(torch.randn(num_out, RANK, device=self.weight.device) * 0.02)
        self._rounded: dict[str | None, torch.Tensor] = {}
        self.inputs: list[torch.Tensor] | None = None
        self.directions: torch.Tensor | None = None

    def rounded_weight(self, mode: str | None) -> torch.Tensor:
        """Return the weight rounded in one of the ways of `rounded`."""
        if mode not in self._rounded:
            self._rounded[mode] = rounded(self.weight, mode)
        return self._rounded[mode]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``, rounded as ``modes`` says."""
        if self.inputs is not None:
            self.inputs.append(x.detach().flatten(0, -2))
        y = _Product.apply(x, self) + 2 * (x @ self.a.t()) @ self.b.t()  # type: ignore[no-untyped-call]
        if self.directions is not None:
            y = y + (x @ self.directions) @ ((self.weight - self.rounded_weight("row")) @ self.directions).t()
        return y


class Study:
    """The exact model's inputs and gradients, and everything measured against them."""

    def __init__(self, model_dir: Path, text: Path, device: str) -> None:
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
        with text.open(encoding="utf-8") as file:
            rows = [json.loads(line)["messages"] for line, _ in zip(file, range(60), strict=False)]
        ids = [i for row in rows for i in tokenizer(tokenizer.apply_chat_template(row, tokenize=False))["input_ids"]]
        self.ids = torch.tensor(ids[:1024], device=device).view(2, 512)
        self.other_ids = torch.tensor(ids[-512:], device=device).view(1, 512)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device)
        self.layers = self.model.model.layers
        self.linears: dict[tuple[int, str], RoundedLinear] = {}
        for index, layer in enumerate(self.layers):
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        self.linears[index, name] = RoundedLinear(child)
                        setattr(parent, name, self.linears[index, name])
        self.model.requires_grad_(False)
        for linear in self.linears.values():
            linear.a.requires_grad_()
            linear.b.requires_grad_()
        self._note_layers()
        self.exact_layers = [self._layer_grads(index) for index in range(len(self.layers))]
        self.exact_model = self._model_grads()

    def _note_layers(self) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.grads: dict[int, torch.Tensor] = {}
        self.call: dict[str, Any] = {}
        hooks = []
        for index, layer in enumerate(self.layers):

            def before(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                self.inputs[index] = args[0].detach()
                self.call = {key: kwargs[key] for key in ("position_embeddings", "position_ids", "attention_mask")}

            def after(module: Any, args: Any, out: torch.Tensor, index: int = index) -> None:
                out.register_hook(lambda grad: self.grads.__setitem__(index, grad.detach()))

            hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        for hook in hooks:
            hook.remove()

    def _layer_grads(self, index: int) -> dict[str, torch.Tensor]:
        own = {name: linear for (layer, name), linear in self.linears.items() if layer == index}
        out = self.layers[index](self.inputs[index], **self.call)
        parameters = {f"{name}.{k}": p for name, linear in own.items() for k, p in (("A", linear.a), ("B", linear.b))}
        grads = torch.autograd.grad(out, list(parameters.values()), self.grads[index])
        return dict(zip(parameters, grads, strict=True))

    def _model_grads(self) -> tuple[float, torch.Tensor]:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, [p for linear in self.linears.values() for p in (linear.a, linear.b)])
        return float(loss.detach()), torch.cat([grad.flatten() for grad in grads])

    def correct(self, names: tuple[str, ...]) -> None:
        """Give matrices the directions in which their inputs are largest on other text."""
        chosen = {key: linear for key, linear in self.linears.items() if key[1] in names}
        for linear in chosen.values():
            linear.inputs = []
        with torch.no_grad():
            self.model(input_ids=self.other_ids, use_cache=False)
            for linear in chosen.values():
                assert linear.inputs is not None
                x, linear.inputs = torch.cat(linear.inputs), None
                linear.directions = torch.linalg.eigh(x.t() @ x)[1][:, -NUM_DIRECTIONS:]

    def measure(self, modes_of: Callable[[int, str], Modes]) -> dict[str, Any]:
        """Return the figures of one case."""
        for (index, name), linear in self.linears.items():
            linear.modes = modes_of(index, name)
        cosines: dict[str, float] = {}
        layers = []
        for index, exact in enumerate(self.exact_layers):
            found = self._layer_grads(index)
            cosines |= {f"{index}.{name}": cosine(found[name], exact[name]) for name in exact}
            layers.append(cosine(*(torch.cat([grads[name].flatten() for name in exact]) for grads in (found, exact))))
        loss, grads = self._model_grads()
        for linear in self.linears.values():
            linear.modes, linear.directions = EXACT, None
        worst = min(cosines, key=lambda name: cosines[name])
        return {
            "worst": cosines[worst],
            "worst_name": worst,
            "median": sorted(cosines.values())[len(cosines) // 2],
            "share_below_gate": sum(value < GATE for value in cosines.values()) / len(cosines),
            "worst_layer": min(layers),
            "model_cosine": cosine(grads, self.exact_model[1]),
            "model_loss_change": loss / self.exact_model[0] - 1,
        }


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / (one.norm() * other.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    study = Study(args.model, args.text, args.device)
    last = len(study.layers) - 1
    names = tuple({name for _, name in study.linears})
    cases: list[tuple[str, tuple[str, ...], Callable[[int, str], Modes]]] = [
        ("x", (), lambda i, n: ("row", None, None)),
        ("w", (), lambda i, n: (None, "row", None)),
        ("dy", (), lambda i, n: (None, None, "row")),
        ("x, w, dy: the default", (), lambda i, n: ROWS),
        ("one scale a matrix", (), lambda i, n: ("matrix",) * 3),
        ("x, dy with a scale for 128", (), lambda i, n: ("block", "row", "block")),
        ("dy exact", (), lambda i, n: ("row", "row", None)),
        ("dy exact in o, down", (), lambda i, n: ("row", "row", None if n in ("o_proj", "down_proj") else "row")),
        ("first, last down exact", (), lambda i, n: EXACT if n == "down_proj" and i in (0, last) else ROWS),
        ("every down exact", (), lambda i, n: EXACT if n == "down_proj" else ROWS),
        ("q, k, v exact", (), lambda i, n: EXACT if n in QKV else ROWS),
        ("attention exact, MLP rounded", (), lambda i, n: EXACT if n in (*QKV, "o_proj") else ROWS),
        ("q, k, v corrected", QKV, lambda i, n: ROWS),
        ("all corrected", names, lambda i, n: ROWS),
    ]
    found = {}
    print(
        "| rounded | worst adapter | median | below 0.998 | worst layer | model | loss |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for title, corrected, modes_of in cases:
        if corrected:
            study.correct(corrected)
        row = found[title] = study.measure(modes_of)
        print(
            f"| {title} | {row['worst']:.4f} | {row['median']:.5f} | {row['share_below_gate']:.1%} | "
            f"{row['worst_layer']:.4f} | {row['model_cosine']:.4f} | {row['model_loss_change']:+.2%} |",
            flush=True,
        )
    if args.out:
        record = {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model.name}
        args.out.write_text(json.dumps({**record, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
