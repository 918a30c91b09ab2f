"""How many operations a training step takes, and how many a device can do.

Two numbers follow from one count. **Hardware** operations are all the device does: a frozen matrix costs a forward pass
and an input gradient (4 a weight and token), a trained one a weight gradient as well (6), a matrix below the lowest
trained layer the forward pass alone (2), the head only the positions that carry a label; attention's backward pass is
2.5 times its forward pass, because the scores are made again, and recomputed layers count twice forward. **Model**
operations leave out whatever is done a second time; they are what utilisation (``mfu``) is measured with.

A third number, **6N style**, is the count that NVIDIA's NeMo AutoModel publishes rates in: full training's operations
with a whole head, times (2 + adapter/frozen)/3 under adapters. It is kept for comparison only: it counts two of the
three and a half attention passes and nothing that is recomputed. Name the count beside every rate.

Embedding look-ups, norms, activations and the optimizer are left out of all of them: less than 1 % of the operations.
Attention is counted as causal over each document. Windows shorter than a document are not taken off.

Attention's forward pass takes 2 · (heads · head size, over all layers) · Σ length² over documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, SEQ_LENS_PADDING, Batch

RECOMPUTED = ("none", "gate_up", "qkv_gate_up", "all_but_down", "all")
"""What the backward pass computes again: nothing, the two widest matrices of each layer, these and queries, keys and
values, or whole layers; fast layers leave out the last product, whose result nobody needs again."""
FAST_RECOMPUTED = {"none": "none", "fp8_gate_up": "none", "selective": "gate_up", "sac2": "gate_up"}
FAST_RECOMPUTED |= {"sac1": "qkv_gate_up", "full": "all_but_down", "full_offload": "all_but_down"}
"""What fast layers compute again under a policy."""
PLAIN_RECOMPUTED = {"none": "none", "selective": "none", "full": "all"}
"""What Transformers' layers do: `selective` repeats no matrix product."""

PEAK_TFLOPS: Mapping[str, tuple[float, float | None]] = {
    "GB200": (2500, 5000),
    "B200": (2250, 4500),
    "GB10": (125, 250),
    "H100 PCIe": (756, 1513),
    "H100 NVL": (835, 1671),
    "GH200": (989, 1979),
    "H200": (989, 1979),
    "H100": (989, 1979),
    "A100": (312, None),
    "L40S": (362, 733),
}
"""Part of a device's name → its peak without sparsity in bf16 and in FP8, TFLOP/s, from the makers' data sheets; the
first that matches counts."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_ADAPTERS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class StepSize:
    """The tokens of a step, or of many."""

    num_tokens: int
    """Positions that are computed, padding included."""
    num_real_tokens: int
    """Positions of documents."""
    num_label_tokens: int
    """Positions that carry a label."""
    sum_squares: int
    """Σ length² over documents, padding a document of its own: what attention grows with."""

    def __add__(self, other: StepSize) -> StepSize:
        return StepSize(
            self.num_tokens + other.num_tokens,
            self.num_real_tokens + other.num_real_tokens,
            self.num_label_tokens + other.num_label_tokens,
            self.sum_squares + other.sum_squares,
        )


def step_size(batches: Iterable[Batch]) -> StepSize:
    """Count the tokens of CPU batches."""
    total = StepSize(0, 0, 0, 0)
    for batch in batches:
        num_rows, seq_len = batch["input_ids"].shape
        num_tokens = num_real = num_rows * seq_len
        sum_squares = num_rows * seq_len**2
        if "seq_lens" in batch:
            lengths = batch["seq_lens"] * (batch["seq_lens"] != SEQ_LENS_PADDING)
            num_real = int(lengths.sum())
            sum_squares = int((lengths**2).sum() + ((seq_len - lengths.sum(dim=1)) ** 2).sum())
        elif "attention_mask" in batch:
            num_real = int(batch["attention_mask"].sum())
        total += StepSize(num_tokens, num_real, int((batch["labels"] != IGNORE_INDEX).sum()), sum_squares)
    return total


@dataclass(frozen=True)
class ModelWork:
    """The matrices of a model by what a training step does with them; all but the last are weights a token meets."""

    trained: float = 0
    frozen: float = 0
    """Frozen, with a gradient that passes through."""
    forward_only: float = 0
    """Below the lowest trained layer."""
    head: float = 0
    head_is_trained: bool = False
    adapters: float = 0
    gate_up: float = 0
    """Part of ``frozen`` and ``trained`` in the two widest matrices of each layer."""
    qkv: float = 0
    """Part of ``frozen`` and ``trained`` in the projections to queries, keys and values."""
    down: float = 0
    """Part of ``frozen`` and ``trained`` in the last matrix of each layer."""
    attention: float = 0
    """Heads times head size, over the layers a gradient passes."""
    attention_forward_only: float = 0
    frozen_share: float = 0
    """Adapter weights to frozen weights, embeddings included; 0 without adapters."""
    recomputed: str = "none"

    def hardware(self, size: StepSize) -> float:
        """Return the operations a device does for ``size``."""
        weights = 4 * self.frozen + 6 * self.trained + 2 * self.forward_only + 6 * self.adapters
        attention = 3.5 * self.attention + self.attention_forward_only
        if self.recomputed in ("all", "all_but_down"):
            weights += 2 * (self.frozen + self.trained - (self.down if self.recomputed == "all_but_down" else 0))
            attention += self.attention
        elif self.recomputed in ("gate_up", "qkv_gate_up"):
            weights += 2 * (self.gate_up + (self.qkv if self.recomputed == "qkv_gate_up" else 0))
        return weights * size.num_tokens + self._head(size.num_label_tokens) + 2 * attention * size.sum_squares

    def model(self, size: StepSize) -> float:
        """Return the operations the mathematics of a step needs, each once."""
        weights = 4 * self.frozen + 6 * self.trained + 2 * self.forward_only + 6 * self.adapters
        attention = 3 * self.attention + self.attention_forward_only
        return weights * size.num_tokens + self._head(size.num_label_tokens) + 2 * attention * size.sum_squares

    def six_n_style(self, size: StepSize) -> float:
        """Return the count of published rates of NeMo AutoModel, see the module."""
        weights = 6 * (self.frozen + self.trained + self.forward_only + self.head)
        attention = 3 * (self.attention + self.attention_forward_only)
        share = (2 + self.frozen_share) / 3 if self.adapters else 1.0
        return (weights * size.num_tokens + 2 * attention * size.sum_squares) * share

    def _head(self, num_label_tokens: int) -> float:
        return (6 if self.head_is_trained else 4) * self.head * num_label_tokens


_SUMS = ("trained", "frozen", "forward_only", "adapters", "gate_up", "qkv", "down")


def count_work(model: nn.Module, recomputed: str = "none") -> ModelWork:
    """Count the matrices of a Hugging Face language model, which may be on the meta device.

    Linear layers are told by their ``in_features`` and ``out_features``, so packed weights count whole; of experts, the
    share that a token meets.
    """
    assert recomputed in RECOMPUTED
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    head = model.get_output_embeddings()  # type: ignore[operator]
    lowest = _lowest_trained_layer(model)
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0)
    for name, module in model.named_modules():
        size = _matrix(module, config)
        if name.rpartition(".")[2] in _ADAPTERS:
            sums["adapters"] += size
        elif size and module is not head:
            is_trained = any(p.requires_grad for p in module.parameters(recurse=False))
            layer = _layer_of(name)
            kind = "trained" if is_trained else "forward_only" if layer is not None and layer < lowest else "frozen"
            sums[kind] += size
            if kind != "forward_only" and name.endswith(("gate_proj", "up_proj", "gate_up_proj")):
                sums["gate_up"] += size
            if kind != "forward_only" and name.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj")):
                sums["qkv"] += size
            if kind != "forward_only" and name.endswith("down_proj"):
                sums["down"] += size
    frozen_parameters = sums["frozen"] + sums["trained"] + sums["forward_only"] + _outside_layers(model, head)
    width = _attention_width(config)
    num_layers = config.num_hidden_layers
    num_below = min(lowest, num_layers)
    return ModelWork(
        **sums,
        head=0 if head is None else _matrix(head, config),
        head_is_trained=head is not None and any(p.requires_grad for p in head.parameters()),
        attention=width * (num_layers - num_below),
        attention_forward_only=width * num_below,
        frozen_share=sums["adapters"] / frozen_parameters if frozen_parameters else 0,
        recomputed=recomputed,
    )


def _outside_layers(model: nn.Module, head: nn.Module | None) -> float:
    """Return the weights of the embedding, and of a head that is a matrix of its own."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    own_head: Any = None if head is None or head.weight is embedding.weight else head.weight
    return float(embedding.weight.numel()) + (0 if own_head is None else own_head.numel())


def _matrix(module: nn.Module, config: Any) -> float:
    """Return how many weights of a module one token meets; 0 for what multiplies no matrix."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows * columns
    own = list(module.parameters(recurse=False))
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, by name: Transformers has it under several paths
        return own[0].numel()
    experts = sum(p.numel() for p in own if p.ndim == 3)
    num_experts = next((p.shape[0] for p in own if p.ndim == 3), 1)
    per_token = getattr(config, "num_experts_per_tok", None) or getattr(config, "num_experts_per_token", None) or 1
    return experts * min(1, per_token / num_experts) if experts else 0


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(f"{name}.")
    return int(found.group(1)) if found else None


def _lowest_trained_layer(model: nn.Module) -> int:
    """Return the first layer that a gradient must reach: 0 where the embedding is trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = [_layer_of(name) for name in trained]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if any(p.requires_grad for p in embedding.parameters()):
        return 0
    inside = [layer for layer in layers if layer is not None]
    return min(inside) if inside else model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]


def _attention_width(config: Any) -> float:
    """Return heads times head size: the mean of that of the scores and of the values where they differ.

    0 for models without attention.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    value_size = getattr(config, "v_head_dim", None) or head_size
    score_size = getattr(config, "qk_head_dim", None) or head_size
    return float(heads * (score_size + value_size) / 2)


# --- what a device can do --------------------------------------------------------------------------------------------


def peak_tflops(device_name: str, with_fp8: bool = False) -> float | None:
    """Return the peak of a device by its name, in TFLOP/s; None where it is not known."""
    for part, (half, eighth) in PEAK_TFLOPS.items():
        if part in device_name:
            return eighth if with_fp8 else half
    return None


def device_peak(device: torch.device, with_fp8: bool = False) -> float | None:
    """Return the peak of a device in TFLOP/s; None on the CPU and where it is not known."""
    return None if device.type != "cuda" else peak_tflops(torch.cuda.get_device_name(device), with_fp8)


def check_rate(tflops: float, peak: float | None, device_name: str) -> None:
    """Refuse a rate that the device cannot have reached.

    Raises:
        UserError: it is above the peak: the count or the clock is wrong, and the number must not be shown.
    """
    if peak is not None and tflops > peak:
        raise UserError(
            f"The measured rate is {tflops:.4g} TFLOP/s, above the {peak:.4g} that {device_name} can do: the count or "
            "the clock is wrong, and no rate is reported. If the device's peak is another, set `benchmark.peak_tflops`."
        )
