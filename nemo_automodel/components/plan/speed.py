"""How long a step takes, by a roofline with measured rates. Free of torch.

Products count their operations, everything else the bytes it moves; attention counts the documents of packed rows.
Operations are those of the hardware: the weights' gradients only where they learn, what is recomputed twice.

Two costs do not shrink with the work. The GPU is not full while a kernel begins and ends: some microseconds for each,
half a millisecond a layer there and back. And the host takes longer to start a small layer than the GPU to compute it,
unless the layers are recorded; the larger of both counts. Every constant says what it was measured in, always beside an
H100: `benchmarks/results` has the files.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.components.plan.machines import Machine
from nemo_automodel.components.plan.workload import Workload

_GAPS_S, _GAPS_WITHOUT_ADAPTERS_S = 0.5e-3, 0.22e-3
"""Of a fast layer there and back. What recorded layers take beyond the rest of this file, in `graphs_h100.json`: 0.46
to 0.66 ms with adapters, 0.21 and 0.24 without."""
_HOST_LAYER_S, _HOST_STEP_S = 3.6e-3, 12e-3
"""To start a fast layer there and back, and whatever else a micro-batch starts: from what the same layers take without
recordings there, 8 and 30 of them with adapters, 8 and 32 or 36 (`sft_h100.json`) without."""
_HOST_PLAIN_LAYER_S = 7.5e-3
_HOST_PLAIN_FACTORS = {"selective": 1.9, "full": 1.4}
"""Layers of Transformers with fused adapters: the three runs of Phi-3 in `plan_runs_part_h100.json`."""
_DROPOUT_BYTES = {"pre": 4.0, "post": 6.5}
"""Of an element that an adapter reads: masks are drawn and applied, there and back. In `fast_core_30s_h100.json` an 8B
lost 0.47 ms a layer under `pre` and 0.77 under `post`."""
_MADE_AGAIN = {"none": (), "gate_up": ("gate_proj", "up_proj")}
_MADE_AGAIN["qkv_gate_up"] = ("q_proj", "k_proj", "v_proj", *_MADE_AGAIN["gate_up"])
_READS_PER_WRITE = 1.6
"""Bytes that Transformers' operations read for each that they write."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one micro-batch by part, and of the optimizer's step."""

    products: float
    attention: float
    memory: float
    """Norms, activations, adapters, casts: what moves bytes."""
    optimizer: float
    """A step's, not a micro-batch's."""
    gaps: float
    """In which the GPU is not full."""
    launches: float
    """The host's, a lower bound for the micro-batch."""
    tokens_per_step: int
    grad_accum: int

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        micro_batch = max(self.products + self.attention + self.memory + self.gaps, self.launches)
        return self.grad_accum * micro_batch + self.optimizer

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the rows, padding included, in a second."""
        return self.tokens_per_step / self.step_s


def estimate(load: Workload, machine: Machine) -> Speed:
    """Return the time of a step of ``load`` on ``machine``."""
    shape, tera = load.shape, 1e12
    passes = 3.0 if load.is_full else 2.0
    if load.makes_again == "all":
        # fast layers leave out their last product
        passes += 1 - (_share_of(load, ("down_proj",)) if load.plain is None else 0)
    elif load.plain is None:
        passes += _share_of(load, _MADE_AGAIN[load.makes_again])
    linear = 2 * passes * load.tokens * shape.num_linear
    in_fp8 = load.store == "fp8" or load.computes_in_fp8
    rate = machine.fp8_tflops if in_fp8 and machine.fp8_tflops else machine.bf16_tflops
    head_passes = 3 if load.is_full else 2
    head = 2 * head_passes * load.tokens * load.labelled_share * shape.hidden_size * shape.vocab_size
    attended = load.document_len or load.seq_len
    attention = (3.5 + (load.makes_again == "all")) * 2 * shape.num_layers * shape.q_width * attended * load.tokens
    state = load.num_trainable * (load.trainable_bytes * 4 + 2 * load.state_bytes)
    if in_fp8 and load.is_full and not load.fp8_weight_grads:  # one of the three products of a weight is in 16 bits
        linear += 2 * load.tokens * shape.num_linear * (rate / machine.bf16_tflops - 1)
    return Speed(
        products=linear / rate / tera + head / machine.bf16_tflops / tera,
        attention=attention / machine.attention_tflops / tera,
        memory=_moved_bytes(load) / machine.memory_tb_s / tera,
        optimizer=state / machine.memory_tb_s / tera,
        gaps=_gaps(load),
        launches=_launches(load),
        tokens_per_step=load.tokens * load.grad_accum,
        grad_accum=load.grad_accum,
    )


def _gaps(load: Workload) -> float:
    if load.plain is not None:  # their operations were timed as they are
        return 0
    gaps = _GAPS_WITHOUT_ADAPTERS_S if load.is_full else _GAPS_S
    return load.shape.num_layers * gaps * (1.4 if load.makes_again == "all" else 1)


def _launches(load: Workload) -> float:
    if load.plain is not None:
        layer = _HOST_PLAIN_LAYER_S * _HOST_PLAIN_FACTORS.get(load.recompute, 1)
    elif load.is_recorded:
        layer = 0
    else:
        layer = _HOST_LAYER_S * (1.4 if load.makes_again == "all" else 1)
    return _HOST_STEP_S + load.shape.num_layers * layer


def _share_of(load: Workload, names: tuple[str, ...]) -> float:
    chosen = sum(linear.num_weights for linear in load.shape.linears if linear.name in names)
    return chosen / load.shape.num_linear


def _moved_bytes(load: Workload) -> float:
    """Return the bytes of a micro-batch that no product hides."""
    shape = load.shape
    if load.plain is None:
        intermediate = next(x.num_out for x in shape.linears if x.name == "gate_proj")
        qkv = shape.q_width + 2 * shape.kv_width
        # norms, rotation and SwiGLU, both ways; adapters read inputs and output gradients twice each
        elements = 17 * shape.hidden_size + 5 * qkv + 13 * intermediate
        elements += 2 * (4 * shape.hidden_size + qkv + 3 * intermediate) if not load.is_full else 0
        per_token: float = elements * load.weight_bytes * shape.num_layers
        if load.makes_again == "all":
            per_token *= 1.35
        if load.store == "fp8" or load.computes_in_fp8:  # casts, and updates that are added afterwards
            per_token += 3 * (5 * shape.hidden_size + 2 * qkv + 6 * intermediate) * shape.num_layers
        if load.dropout:
            read = sum(linear.num_in * linear.count for linear in shape.linears if linear.rank)
            per_token += _DROPOUT_BYTES[load.dropout_position] * read
    else:
        per_token = load.plain.written * (1 + _READS_PER_WRITE) / load.tokens
    moved = load.tokens * per_token
    if load.is_full and load.plain is None:  # products write gradients, and add to those of earlier micro-batches
        moved += (1 if load.grad_accum == 1 else 2) * load.num_trainable * load.trainable_bytes
    if load.is_full and load.store == "fp8" and load.fp8_copies < 2:  # transposed, or rounded there and back
        moved += shape.num_linear * (2 if load.fp8_copies == 1 else 6)
    if load.store in ("nf4", "int8"):  # unpacked for each pass
        moved += (3 if load.makes_again == "all" else 2) * (1.55 if load.computes_in_fp8 else 2.55) * shape.num_linear
    return moved
