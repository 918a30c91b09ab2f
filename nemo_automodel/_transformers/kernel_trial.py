"""A decoder layer like those of a model, with random weights, to be computed in every way and timed.

The layer has the model's own class, size, dtype and adapter ranks; it is made beside the model and thrown away
afterwards. Its numbers in every way are compared with Transformers' own layer in fp32 on a short row; what that layer
itself loses in the model's dtype is allowed. Forward and backward pass are timed on rows as long as those to come.
Random numbers of the run are left alone.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.components._peft.lora import LinearLoRA, lora_layers
from nemo_automodel.components.fast.attention import causal_attention_by
from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.config import KERNELS
from nemo_automodel.components.fast.decoder_layer import DecoderCore
from nemo_automodel.components.fast.dispatch import Candidate, Question, UnavailableError
from nemo_automodel.components.fast.names import Adapter
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.kernels.jit import HAS_TRITON
from nemo_automodel.kernels.nf4 import quantize

_CHECKED_POSITIONS = 256
_INPUT_SIZE = 0.05
_TOLERANCES = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-6, torch.float64: 1e-6}
"""Accepted `distance` to fp32 of the output and each gradient, beyond that of Transformers' layer in that dtype."""
_PACKED_TOLERANCE = 5e-2
"""The same where products are of 8 bits: their rounding is no fault of a kernel."""


class LayerTrial:
    """A layer like those of a model, to be computed in every way. Nothing is made before somebody asks for a number."""

    def __init__(
        self, model: PreTrainedModel, layer: nn.Module, store: type[WeightStore], shape: tuple[int, int]
    ) -> None:
        self.store, self.shape, self.device, self.dtype = store, shape, model.device, model.dtype
        self._model, self._layer = model, layer

    def question(self, operation: str, chosen: Choices, subject: str) -> Question:
        """Return the question about one operation, the others being as in ``chosen``."""
        tolerance = _TOLERANCES[self.dtype] if issubclass(self.store, DenseStore) else _PACKED_TOLERANCE
        if operation == "attention":
            names = {name: self._attention(name) for name in KERNELS[operation]}
            return Question(operation, subject, DEFAULT.attention, names, _TOLERANCES[self.dtype])
        names = {name: self._layer_candidate(_with(chosen, operation, name)) for name in KERNELS[operation]}
        return Question(operation, subject, DEFAULT.names()[operation], names, tolerance)

    def matters(self, operation: str) -> bool:
        """Tell whether the ways to compute an operation differ in this model."""
        if operation == "attention":
            return True
        has_down = isinstance(self._layer.get_submodule("mlp.down_proj"), LinearLoRA)
        if operation == "down_in_depth":
            return has_down and issubclass(self.store, DenseStore)
        return has_down or any(
            isinstance(self._layer.get_submodule(f"mlp.{name}_proj"), LinearLoRA) for name in ("gate", "up")
        )

    def leaving_no_trace(self) -> Any:
        """Return a context after which random numbers and memory are as they were."""
        return NoTrace(self)

    # The layer.

    def _layer_candidate(self, choices: Choices) -> Candidate:
        return Candidate(
            run=partial(_guarded, self._run, choices, self.shape),
            error=partial(_guarded, self._layer_error, choices),
        )

    @cached_property
    def _scratch(self) -> nn.Module:
        """A layer of the same class with random weights, packed where those are, and adapters that matter."""
        config = self._layer.self_attn.config  # type: ignore[union-attr]
        with torch.device(self.device):
            made: nn.Module = type(self._layer)(config, 0)
        made.to(self.dtype).requires_grad_(False)
        for name, linear in self._layer.named_modules():
            if isinstance(linear, Linear4bit):
                own: Any = made.get_submodule(name)
                packed = quantize(own.weight, linear.packed.quant_type, linear.packed.is_nested)
                Linear4bit.pack(own, packed, linear.compute_dtype, linear.weight.dtype)
            if isinstance(linear, LinearLoRA):
                cfg = replace(
                    linear.peft_config,
                    dim=linear.lora_A.out_features,
                    dropout=0.0,
                    use_dora=False,
                    rank_pattern={},
                    alpha_pattern={},
                )
                twin = LinearLoRA.attach(made.get_submodule(name), cfg)  # type: ignore[arg-type]
                nn.init.normal_(twin.lora_B.weight, std=0.02)
        return made

    @cached_property
    def _reference(self) -> dict[str, torch.Tensor]:
        """What Transformers' own layer computes in fp32 on the short row."""
        return self._by_transformers(torch.promote_types(self.dtype, torch.float32))

    @cached_property
    def _plain_distances(self) -> dict[str, float]:
        """How far Transformers' own layer in the dtype of the model is from that."""
        plain = self._by_transformers(self.dtype)
        return {name: distance(value, self._reference[name]) for name, value in plain.items()}

    def _by_transformers(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        layer = copy.deepcopy(self._scratch).to(dtype)
        for module in layer.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = dtype
        x, dy = self._inputs(self._short_shape)
        leaf = x.to(dtype).requires_grad_()
        tables = tuple(t.to(dtype) for t in self._tables(x))
        y = layer(leaf, position_embeddings=tables, position_ids=None)
        y.backward(dy.to(dtype))
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert leaf.grad is not None
        return {"output": y.detach() - leaf.detach(), "dx": leaf.grad - dy.to(dtype), **grads}

    @cached_property
    def _core(self) -> DecoderCore:
        assert self._plain_distances  # made first: the core moves the weights
        adapters: dict[nn.Module, Adapter] = {
            m: Adapter(m.lora_A, m.lora_B, m.scaling) for m in lora_layers(self._scratch).values()
        }
        return DecoderCore(self._scratch, adapters, store=self.store)

    @property
    def _short_shape(self) -> tuple[int, int]:
        return 1, min(_CHECKED_POSITIONS, self.shape[1])

    def _inputs(self, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        attention: Any = self._layer.self_attn
        size = (*shape, attention.config.hidden_size)
        x, dy = (torch.randn(size, generator=generator, device=self.device) for _ in range(2))
        # the layer normalises x: beside a small x its own part of the output is large, and not lost in the rounding
        return (x * _INPUT_SIZE).to(self.dtype), dy.to(self.dtype)

    def _tables(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(x_BSD.shape[1], device=self.device)[None]
        rotary: Any = self._model.base_model.rotary_emb
        cos, sin = rotary(x_BSD, positions)
        return cos, sin

    def _run(self, choices: Choices, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run the layer forward and back; return output, gradient of the input and those of the adapters."""
        self._core.choices = choices
        x, dy, tables = self._timed_inputs if shape == self.shape else self._inputs_and_tables(shape)
        return self._core.there_and_back(x, dy, tables)

    @cached_property
    def _timed_inputs(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return self._inputs_and_tables(self.shape)

    def _inputs_and_tables(
        self, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        x, dy = self._inputs(shape)
        return x, dy, self._tables(x)

    def _layer_error(self, choices: Choices) -> float:
        y, dx, grads = self._run(choices, self._short_shape)
        x, dy = self._inputs(self._short_shape)
        names: dict[Any, str] = {p: name for name, p in self._scratch.named_parameters()}
        found = {"output": y - x, "dx": dx - dy}
        found |= {names[p]: grad for p, grad in zip(self._core.parameters(), grads, strict=True)}
        return _worst(
            distance(found[name], wanted) - self._plain_distances[name] for name, wanted in self._reference.items()
        )

    # Attention alone.

    def _attention(self, name: str) -> Candidate:
        return Candidate(
            run=partial(_guarded, self._attend, name, self.shape),
            error=partial(_guarded, self._attention_error, name),
        )

    def _heads(self, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return queries, keys, values and the output's gradient as leaves ``[B, H, S, E]``."""
        attention: Any = self._layer.self_attn
        config, generator = attention.config, torch.Generator(self.device).manual_seed(0)
        counts = [config.num_attention_heads, *[config.num_key_value_heads] * 2, config.num_attention_heads]
        return [
            torch.randn((shape[0], shape[1], n, attention.head_dim), generator=generator, device=self.device)
            .to(self.dtype).to(dtype).transpose(1, 2).requires_grad_()
            for n in counts
        ]  # fmt: skip

    def _attend(self, name: str, shape: tuple[int, int], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        q, k, v, dy = self._heads(shape, dtype or self.dtype) if shape != self.shape else self._timed_heads
        attention: Any = self._layer.self_attn
        out = causal_attention_by(name, only=True)(q, k, v, attention.scaling)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dy)]

    @cached_property
    def _timed_heads(self) -> list[torch.Tensor]:
        return self._heads(self.shape, self.dtype)

    def _attention_error(self, name: str) -> float:
        found = self._attend(name, self._short_shape)
        exact = self._attend("math", self._short_shape, torch.promote_types(self.dtype, torch.float32))
        return _worst(distance(value, wanted) for value, wanted in zip(found, exact, strict=True))


class NoTrace:
    """Random numbers as they were, and no memory kept."""

    def __init__(self, trial: LayerTrial) -> None:
        self.trial = trial
        devices = [trial.device] if trial.device.type == "cuda" else []
        self._fork = torch.random.fork_rng(devices)

    def __enter__(self) -> None:
        self._fork.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._fork.__exit__(*details)
        self.trial.__dict__.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return 1 − cosine, NaN when a number is not finite; a wrong length counts as well, as the square of its share."""
    a, b = found.double().flatten(), wanted.double().flatten()
    length_a, length_b = a.norm(), b.norm()
    return float(1 - a @ b / (length_a * length_b) + (length_a / length_b - 1).square())


def _worst(distances: Iterable[float]) -> float:
    """Return the largest, at least 0, or NaN if one is NaN."""
    found = list(distances)
    return math.nan if any(math.isnan(number) for number in found) else max(0.0, *found)


def _with(choices: Choices, operation: str, name: str) -> Choices:
    return Choices.from_names({**choices.names(), operation: name})


def _guarded(run: Callable[..., Any], *args: Any) -> Any:
    """Run, and say that it is not available where a kernel does not run; a lack of memory is another matter.

    Raises:
        UnavailableError: the kernel does not run here.
    """
    try:
        with warnings.catch_warnings():  # PyTorch says for every backend why it does not run
            warnings.simplefilter("ignore", UserWarning)
            return run(*args)
    except torch.OutOfMemoryError:
        raise
    except _failures() as error:
        text = str(error).strip() or type(error).__name__
        raise UnavailableError(text.splitlines()[0].partition(". ")[0].rstrip(".")) from error


def _failures() -> tuple[type[Exception], ...]:
    if not HAS_TRITON:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def measure(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds that ``run`` takes on ``device``, the median of a tenth of a second or so."""
    for _ in range(2):
        run()
    if device.type != "cuda":
        return median(_clocked(run) for _ in range(3)) * 1e3
    torch.cuda.synchronize(device)

    def once() -> None:
        run()
        torch.cuda.synchronize(device)

    repeats = max(4, min(20, int(0.08 / max(_clocked(once), 1e-4))))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize(device)
    return float(median(start.elapsed_time(end) for start, end in times))


def _clocked(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
