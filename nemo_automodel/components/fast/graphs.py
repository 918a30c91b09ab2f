"""Decoder layers as CUDA graphs: what takes longer to start than to compute is recorded once and started whole.

A layer starts about 170 operations there and back, 3 ms for Python and the driver. A layer of a small model, or of a
large one over few tokens, computes for less than that, and the GPU waits. Recorded, a layer's forward pass is one call
and its backward pass another. Nothing else changes: the same kernels compute the same numbers in the same order.

A recording is of addresses. So what a layer reads is copied to a place of its own first: rotary tables and borders of
documents once for all layers, the hidden states for the first layer only, since every other finds them where the layer
before it left them. Gradients of what learns are added up inside the recording, in memory that stays theirs from step
to step. Layers are recorded in the order in which they run, all of them into one pool of memory, so what one recording
frees the next one uses, and activations take as much memory as without graphs.

A recording is of shapes too. Each kind of batch (`Kind`) is computed twice without, and recorded the third time it
comes; after `MAX_KINDS` kinds, others are computed as ever. One pass at a time: the backward pass must come before the
next forward pass of its kind. Whatever keeps a pass from being recorded, or from being replayed later, is logged once.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch

from nemo_automodel.components.fast.decoder_layer import DecoderCore, _Call, _Saved
from nemo_automodel.kernels.weight_grad import is_alone, packed_grad

logger = logging.getLogger(__name__)

MAX_KINDS = 8
_SEEN_BEFORE = 2
"""Passes of a kind before it is recorded: kernels are compiled, libraries have their plans and workspaces."""

Run = Callable[[], None]


class Recorder(Protocol):
    """Turns work on tensors at fixed places into something that can be done again."""

    def has_room(self) -> bool:
        """Tell whether there is memory for activations in the recordings and, beside them, for passes without."""

    def held_bytes(self) -> int:
        """Return how much memory is kept for the recordings besides what counts as allocated."""

    def record(self, work: Run) -> Run:
        """Return what does the work, the first time too: while it is recorded, results need not be there."""


class CudaRecorder:
    """Records into CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._held_bytes: int | None = None

    def has_room(self) -> bool:
        """Tell whether twice the activations of passes so far fit."""
        now = torch.cuda.memory_allocated()
        activations = torch.cuda.max_memory_allocated() - now
        torch.cuda.empty_cache()  # what passes without graphs have used goes to the pool
        free, _ = torch.cuda.mem_get_info()
        return free > 2 * activations

    def record(self, work: Run) -> Run:
        """Return the graph's replay; ``work`` runs on the host alone."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # others copy batches meanwhile: what they do concerns this thread's graph only if it did it itself
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong is more than that nothing was recorded
                    graph.capture_end()
                raise
            graph.capture_end()
        self._held_bytes = None
        return graph.replay

    def held_bytes(self) -> int:
        """Return the memory of all recordings that counts as free between them."""
        if self._held_bytes is None:
            segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            ours = [segment for segment in segments if tuple(segment["segment_pool_id"]) == tuple(self._pool)]
            self._held_bytes = sum(segment["total_size"] - segment["allocated_size"] for segment in ours)
        return self._held_bytes


@runtime_checkable
class GraphAttention(Protocol):
    """Attention that may be recorded: it says which tensors it reads and computes on others like them as well."""

    key: Hashable
    tensors: tuple[torch.Tensor, ...]

    def over(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """Return the same attention that reads ``tensors``."""


@dataclass(frozen=True)
class Kind:
    """What passes must have in common to be one recording."""

    num_rows: int
    seq_len: int
    dtype: torch.dtype
    recompute: str
    attention: Hashable
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass
class _Place:
    """Where a tensor is copied to before recordings read it; the same for all layers."""

    tensor: torch.Tensor
    source: torch.Tensor | None = None
    version: int = -1

    def fill(self, source: torch.Tensor) -> None:
        last = self.source
        if last is None or source.data_ptr() != last.data_ptr() or source._version != self.version:
            # `data`: an attention that was recorded and not yet gone back through need not know
            self.tensor.data.copy_(source)
            self.source, self.version = source, source._version


@dataclass
class _Shared:
    """What the layers of a model share for one kind of pass."""

    places: tuple[_Place, ...]
    dy_TD: torch.Tensor
    """Gradient of a layer's output, and then, in the same place, of its input."""
    first_x_TD: torch.Tensor | None = None
    last_output: torch.Tensor | None = None

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        for place, tensor in zip(self.places, tensors, strict=True):
            place.fill(tensor)


@dataclass
class Graphs:
    """The recordings of a model's layers: which kinds there are, and what the layers share.

    Batches of more than ``max_tokens`` are not recorded, nor kinds that would take the memory of others; with
    ``is_asked`` all are.
    """

    recorder: Recorder
    max_tokens: float = math.inf
    is_asked: bool = False
    shared: dict[Kind, _Shared | None] = field(default_factory=dict)
    _noted: set[str] = field(default_factory=set)

    def note(self, reason: str, was_recorded: bool = False) -> None:
        """Say why passes are computed without recordings, each reason once: loudly where somebody counts on them."""
        if reason in self._noted:
            return
        self._noted.add(reason)
        level = logging.WARNING if was_recorded or self.is_asked else logging.INFO
        what = "no longer computed by their CUDA graphs" if was_recorded else "not recorded as CUDA graphs"
        logger.log(level, "Decoder layers: %s: %s.", what, reason)

    def share(self, kind: Kind, call: _Call, x_TD: torch.Tensor) -> _Shared | None:
        """Return what the layers share for a kind; None where it is not to be recorded."""
        if kind in self.shared:
            return self.shared[kind]
        if len(x_TD) > self.max_tokens:
            worth = f"more than {self.max_tokens:,.0f} tokens take longer to compute than to start"
            self.note(worth if self.max_tokens else "how fast this card computes is not known, so `auto` leaves it")
            return None
        if len(self.shared) == MAX_KINDS:
            self.note(f"batches of more than {MAX_KINDS} kinds came, and the others are computed as ever")
            return None
        if not self.recorder.has_room() and not self.is_asked:
            self.note(f"{call.num_rows} x {call.seq_len} tokens would take too much memory")
            self.shared[kind] = None
            return None
        places = tuple(_Place(tensor.clone(memory_format=torch.contiguous_format)) for tensor in _read_by(call))
        shared = _Shared(places, torch.empty_like(x_TD, memory_format=torch.contiguous_format))
        self.shared[kind] = shared
        logger.info(
            "Decoder layers: recorded as CUDA graphs for %d x %d tokens (%d of at most %d kinds of batches).",
            call.num_rows,
            call.seq_len,
            len(self.shared),
            MAX_KINDS,
        )
        return shared


def _read_by(call: _Call) -> tuple[torch.Tensor, ...]:
    attention: Any = call.attention
    return (call.cos, call.sin, *attention.tensors)


def kind_of(x_TD: torch.Tensor, core: DecoderCore, call: _Call) -> Kind | None:
    """Return the kind of a pass; None if its attention cannot be recorded."""
    attention = call.attention
    if not isinstance(attention, GraphAttention):
        return None
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in _read_by(call))
    return Kind(call.num_rows, call.seq_len, x_TD.dtype, core.recompute, attention.key, tensors)


class LayerGraphs:
    """The recordings of one layer."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self._seen: dict[Kind, int] = {}
        self._recordings: dict[Kind, _Recording] = {}
        self._grads = _Grads()

    def forget(self) -> None:
        """Let go of all recordings and of the memory of gradients; what is recorded later starts anew."""
        self._seen, self._recordings, self._grads = {}, {}, _Grads()
        self.graphs.shared.clear()

    def forward(self, x_TD: torch.Tensor, core: DecoderCore, call: _Call, drops: bool) -> torch.Tensor | None:
        """Return the layer's output ``[T, D]``, None where this pass is not to be replayed: compute it as ever."""
        obstacle = _obstacle(core)
        kind = kind_of(x_TD, core, call) if obstacle is None else None
        if kind is None:
            self.graphs.note(obstacle or "their attention cannot be recorded")
            return None
        core.prepare()
        recording = self._recordings.get(kind)
        if recording is None:
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            shared = self.graphs.share(kind, call, x_TD) if seen > _SEEN_BEFORE else None
            if shared is None:
                return None
            recording = self._recordings[kind] = _Recording(self.graphs, shared, core, call, drops, self._grads)
        change = recording.change(x_TD, core, drops)
        if change is not None:
            self.graphs.note(change, was_recorded=True)
            return None
        weights = core.parameters()
        y_TD: torch.Tensor = _ReplayFunction.apply(x_TD, recording, call, *weights)  # type: ignore[no-untyped-call]
        return y_TD


def _obstacle(core: DecoderCore) -> str | None:
    """Return why nothing can be recorded: somebody waits for single gradients, or some places do not stay."""
    policy = core.policy
    if core.has_row_scales:
        return "DoRA makes the scales of its rows anew in every pass"
    if policy.offloads or not policy.keeps_qkv:
        return f"`activation_checkpointing: {core.recompute}` lets go of memory within a pass"
    if not is_alone():
        return "several processes exchange their gradients within a pass"
    if any(p._post_accumulate_grad_hooks or p._backward_hooks for p in core.parameters()):
        return "a hook waits for single gradients, as under `optimizer.in_backward`"
    return None


class _Grads:
    """Memory for the gradients of a layer's parameters that stays where it is when ``zero_grad`` lets go of it."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def ready(self, core: DecoderCore) -> list[torch.Tensor]:
        """Give every parameter a gradient in the kept memory, zero where it had none, and return them."""
        if not self._kept:
            for together in core.trained_together():
                packed, is_new = packed_grad(together)
                if is_new:
                    packed.zero_()
            self._kept = [(p, _gradient_of(p)) for p in core.parameters()]
        gone = []
        for parameter, grad in self._kept:
            if parameter.grad is None:
                gone.append(grad)
            elif parameter.grad.data_ptr() != grad.data_ptr():
                grad.copy_(parameter.grad)
            else:
                continue
            parameter.grad = grad
        if gone:
            torch._foreach_zero_(gone)
        return [grad for _, grad in self._kept]


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter's gradient, made where there is none, zero."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return parameter.grad


class _Recording:
    """One layer over one kind of batch, recorded at its first use, the backward pass when it first comes."""

    def __init__(
        self, graphs: Graphs, shared: _Shared, core: DecoderCore, call: _Call, drops: bool, grads: _Grads
    ) -> None:
        self._graphs, self._shared, self._grads = graphs, shared, grads
        tables = [place.tensor for place in shared.places]
        attention: Any = call.attention
        self._call = replace(call, cos=tables[0], sin=tables[1], attention=attention.over(tuple(tables[2:])))
        self._plain_core = core
        self._drops = core.drops(drops)
        self._seed = torch.zeros(1, dtype=torch.int64, device=tables[0].device) if self._drops else None
        self._core = core.under_seed(self._seed) if self._seed is not None else core
        self._weight_places = core.addresses()
        self._x_TD: torch.Tensor | None = None
        self._x_place = 0
        self._y_TD: torch.Tensor | None = None
        self._saved: _Saved | None = None
        self._wants_dx = False
        self._replay_forward: Run | None = None
        self._replay_backward: Run | None = None
        self.pass_number = 0

    def change(self, x_TD: torch.Tensor, core: DecoderCore, drops: bool) -> str | None:
        """Return why the recording does not compute this pass; None if all it reads is, or can be put, in its place."""
        if core.drops(drops) != self._drops:
            return "dropout was switched"
        if core.addresses() != self._weight_places:
            return "weights have moved in memory"
        if self._replay_forward is None:
            return None
        if x_TD.requires_grad != self._wants_dx:
            return "a layer's input wants a gradient now and did not before, or the other way round"
        if x_TD.data_ptr() != self._x_place and not self._is_first:
            return "a layer's input is not what the layer before it wrote"
        return None

    @property
    def _is_first(self) -> bool:
        """Whether the layer reads what no other layer of this kind has written."""
        first = self._shared.first_x_TD
        return first is not None and first.data_ptr() == self._x_place

    def forward(self, x_TD: torch.Tensor, call: _Call) -> torch.Tensor:
        """Return the output, in memory that the next pass overwrites."""
        self._shared.fill(_read_by(call))
        if self._seed is not None:
            self._seed.copy_(self._plain_core.draw_seed(self._seed.device))
        if self._replay_forward is None:
            self._place_input(x_TD)
            self._wants_dx = x_TD.requires_grad
            self._replay_forward = self._graphs.recorder.record(self._forward_work)
        elif x_TD.data_ptr() != self._x_place:
            assert self._shared.first_x_TD is not None
            self._shared.first_x_TD.copy_(x_TD)
        self._replay_forward()
        self.pass_number += 1
        y_TD = self._shared.last_output = self._y_TD
        assert y_TD is not None
        return y_TD.detach()

    def _place_input(self, x_TD: torch.Tensor) -> None:
        last = self._shared.last_output
        if last is not None and last.data_ptr() == x_TD.data_ptr():
            self._x_TD = x_TD.detach()
        else:
            self._x_TD = self._shared.first_x_TD = x_TD.detach().clone(memory_format=torch.contiguous_format)
        self._x_place = self._x_TD.data_ptr()

    def _forward_work(self) -> None:
        core, x_TD = self._core, self._x_TD
        assert x_TD is not None
        self._y_TD, self._saved = core.run(x_TD, self._call, keeps=core.policy.keeps_layer)

    def backward(self, dy_TD: torch.Tensor) -> torch.Tensor | None:
        """Add to the gradients of what learns and return that of the input, where the next layer overwrites it."""
        grads, shared = self._grads.ready(self._plain_core), self._shared
        if dy_TD.data_ptr() != shared.dy_TD.data_ptr():
            shared.dy_TD.copy_(dy_TD)
        if self._replay_backward is None:
            self._replay_backward = self._graphs.recorder.record(lambda: self._backward_work(grads))
            # the addresses are in the recording: now the memory is free for the recordings of other layers
            self._x_TD = self._saved = None
        self._replay_backward()
        return shared.dy_TD if self._wants_dx else None

    def _backward_work(self, kept: list[torch.Tensor]) -> None:
        core, x_TD, saved = self._core, self._x_TD, self._saved
        assert x_TD is not None
        if saved is None:
            saved = core.again(x_TD, self._call)
        dx_TD, grads = core.backward(self._shared.dy_TD, x_TD, self._call, saved, self._wants_dx)
        pairs = [(into, grad) for into, grad in zip(kept, grads, strict=True) if grad is not None]
        if pairs:
            torch._foreach_add_([into for into, _ in pairs], [grad.to(into.dtype) for into, grad in pairs])
        if dx_TD is not None and self._wants_dx:
            self._shared.dy_TD.copy_(dx_TD)


class _ReplayFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, recording: _Recording, call: _Call, *weights: torch.Tensor
    ) -> torch.Tensor:
        y_TD = recording.forward(x_TD, call)
        ctx.recording, ctx.pass_number, ctx.num_weights = recording, recording.pass_number, len(weights)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recording: _Recording = ctx.recording
        if recording.pass_number != ctx.pass_number:
            raise RuntimeError(
                "The activations of this pass were overwritten by a later one, or used by a backward pass before. Run "
                "forward and backward pass in turn, or load the model with `cuda_graphs: off`."
            )
        recording.pass_number += 1
        dx_TD = recording.backward(grad_outputs[0])
        return dx_TD, None, None, *([None] * ctx.num_weights)
