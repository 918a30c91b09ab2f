"""Peak device memory of a run, term by term. Free of torch.

A step's peak lies either where the loss is made, all layers' activations kept, or in the backward pass of the last
layer. Both are the sum of what stays (weights, adapters, optimizer) and of what a micro-batch keeps; the larger is the
answer, unless an optimizer whose step works on all weights at once needs more than either. Where all weights learn from
a single micro-batch a step, their gradients come while activations go, so the two are not there at once: the larger
counts. The formulae of the fast layers follow `components/fast/decoder_layer.py`, tensor by tensor; those of
Transformers' layers are measured on the model's outline (`_transformers/outline.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.components.plan.machines import GIB
from nemo_automodel.components.plan.workload import Linear, Workload, rank_width

CHUNK_ROWS = 2048
"""Rows of logits that the loss of a frozen head holds at once."""
_FP32_CHUNK_BYTES = 3 * 64 * 2**20
"""Of logits in fp32, with their softmax, where the loss is made from logits."""
TERM_NAMES = {
    "weights": "frozen weights",
    "embeddings": "embedding and output head",
    "trainable": "what learns, and gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "working": "layer at work, loss",
}
_LIBRARY_BYTES = 72 * 2**20
"""Workspaces of the matrix libraries."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits with scales in 8 bits for every 64 weights."""
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory at the peak of a step, by what they are for."""

    weights: int
    embeddings: int
    trainable: int
    """Adapters or weights that learn: themselves, where they are kept beside the base, and their gradients."""
    optimizer: int
    activations: int
    working: int
    """The layer at work, the loss, workspaces."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.embeddings + self.trainable + self.optimizer + self.activations + self.working

    def terms(self) -> dict[str, float]:
        """Return the terms in GiB, by name."""
        return {name: getattr(self, name) / GIB for name in self.__dataclass_fields__}

    def largest(self, count: int = 3) -> str:
        """Return the largest terms in words, such as ``activations (40.1 GiB), frozen weights (15.0 GiB)``."""
        terms = sorted(self.terms().items(), key=lambda item: -item[1])[:count]
        return ", ".join(f"{TERM_NAMES[name]} ({gib:.2f} GiB)" for name, gib in terms)


def peak(load: Workload) -> Memory:
    """Return the memory of ``load`` at its peak."""
    shape = load.shape
    embedding_bytes = load.trainable_bytes if load.is_full else load.weight_bytes
    trained = load.num_trainable
    own = 0 if load.is_full else load.trainable_bytes  # full training: the weights are counted as weights
    gradients = trained
    if load.steps_in_backward:  # the largest that are there at once
        gradients = max(shape.num_linear // shape.num_layers, shape.num_embedding, shape.num_head)
    trainable = trained * own + gradients * load.trainable_bytes
    activations, loss, layer = _kept(load), _loss_working(load), _layer_peak(load)
    working = max(loss, layer)
    scratch = _scratch(load)
    if load.is_full and load.grad_accum == 1:
        activations, working = max(0, activations + loss - trainable - layer), layer
    if load.steps_in_backward:
        working += gradients * load.step_bytes
    else:  # activations are gone by then
        working = max(working, trained * load.step_bytes - activations)
    return Memory(
        weights=int(_weight_bytes(load) + shape.num_other * load.weight_bytes),
        embeddings=((0 if load.embeddings_on_host else shape.num_embedding) + shape.num_head) * embedding_bytes,
        trainable=int(trainable),
        optimizer=int(trained * load.state_bytes),
        activations=int(activations),
        working=int(working + scratch + _LIBRARY_BYTES),
    )


def _weight_bytes(load: Workload) -> float:
    """Return the bytes of the linear layers of all decoder layers."""
    linears = load.shape.linears
    if load.is_full:
        weights = load.shape.num_linear * load.trainable_bytes
        return weights + (_beside_trained(load) if load.store == "fp8" else 0)
    if load.store == "nf4":
        return load.shape.num_linear * _NF4_BYTES + _folded(load)
    if load.store == "int8":
        return load.shape.num_linear + sum(4 * x.count * x.num_out for x in linears)
    if load.store == "fp8":
        scales = sum(4 * x.count * (x.num_out + (x.num_in if load.fp8_copies == 2 else 0)) for x in linears)
        return load.shape.num_linear * load.fp8_copies + scales + _folded(load)
    return load.shape.num_linear * load.weight_bytes + _folded(load)


def _beside_trained(load: Workload) -> int:
    """Return the bytes of copies in 8 bits of weights that learn, and of their scales."""
    scales = sum(4 * count * (num_in + num_out) for num_in, num_out, _, count in _packs(load))
    return load.shape.num_linear * load.fp8_copies + scales


def _folded(load: Workload) -> float:
    """Return the bytes of the adapters' copies in the packed matrices of the fast layers."""
    if load.plain is not None:
        return load.plain.adapter_copies
    total = 0
    for num_in, num_out, rank, count in _packs(load):
        width = rank_width(rank, load.store)
        corner = width * width if load.store == "dense" else 0
        total += count * (width * (num_in + num_out) + corner) * load.weight_bytes
    return total


def _packs(load: Workload) -> list[tuple[int, int, int, int]]:
    """Return inputs, outputs, ranks and number of every packed matrix."""
    by_name = {linear.name: linear for linear in load.shape.linears}
    packs = []
    for names in _GROUPS:
        members: list[Linear] = [by_name[name] for name in names if name in by_name]
        if members:
            ranks = sum(member.rank for member in members)
            packs.append((members[0].num_in, sum(m.num_out for m in members), ranks, members[0].count))
    return packs


def _kept(load: Workload) -> float:
    """Return what the layers keep from the forward pass, and the hidden states around them."""
    around = 3 * load.tokens * load.shape.hidden_size * load.weight_bytes  # the last output, its norm, its gradient
    if load.plain is not None:
        return load.plain.kept + around
    on_their_way = 2 * load.tokens * load.shape.hidden_size * load.weight_bytes if offloaded(load) else 0
    return load.tokens * load.shape.num_layers * fast_kept(load, load.recompute) + around + on_their_way


def offloaded(load: Workload) -> int:
    """Return the bytes of activations that wait in the host's memory."""
    if load.recompute != "full_offload":
        return 0
    return load.tokens * load.shape.num_layers * load.shape.hidden_size * load.weight_bytes


def fast_kept(load: Workload, recompute: str) -> float:
    """Return the bytes that one fast layer keeps on the GPU for a token."""
    if recompute == "full_offload":
        return 0
    if recompute == "full":
        return load.shape.hidden_size * load.weight_bytes
    halves = 2 * next(x.num_out for x in load.shape.linears if x.name == "gate_proj")
    if recompute == "fp8_gate_up":  # a byte each and two scales; the margin of a buffer is not kept
        return _fast_kept(load, keeps_gate_up=False) + halves + 8
    return _fast_kept(load, keeps_gate_up=recompute == "none", keeps_qkv=recompute != "sac1")


def _fast_kept(load: Workload, keeps_gate_up: bool, keeps_qkv: bool = True) -> float:
    shape = load.shape
    widths = [rank_width(rank, load.store) for _, _, rank, _ in _packs(load)]
    margins = widths if load.store in ("dense", "nf4") and load.dropout == 0 else [0] * len(widths)
    qkv, o, gate_up = margins[0], margins[1], margins[2]
    intermediate = next(x.num_out for x in shape.linears if x.name == "gate_proj")
    elements = shape.hidden_size  # the input
    elements += shape.q_width + 2 * shape.kv_width + qkv if keeps_qkv else 0
    if shape.has_qk_norm and keeps_qkv:  # finished queries and keys lie beside the raw ones
        elements += shape.q_width + shape.kv_width
    elements += shape.q_width  # attention's output
    elements += shape.hidden_size + o  # the middle of the residual stream
    elements += 2 * intermediate + gate_up if keeps_gate_up else 0
    elements += sum(widths)
    numbers = 2 + shape.num_heads + (shape.num_heads + shape.num_kv_heads if shape.has_qk_norm and keeps_qkv else 0)
    return elements * load.weight_bytes + 4 * numbers


def _loss_working(load: Workload) -> float:
    """Return what the loss needs beside what is kept."""
    shape, labelled = load.shape, load.tokens * load.labelled_share
    logits = shape.vocab_size * load.weight_bytes
    hidden = labelled * shape.hidden_size * load.weight_bytes
    if load.logits_copies:
        return load.logits_copies * labelled * logits + _FP32_CHUNK_BYTES
    if not load.is_full:
        return min(CHUNK_ROWS, labelled) * logits + hidden
    if labelled <= shape.hidden_size:  # the gradient of the logits waits for the backward pass, or that of the head
        return labelled * logits + hidden
    return (shape.hidden_size + min(CHUNK_ROWS, labelled)) * logits + hidden


def _layer_peak(load: Workload) -> float:
    """Return what the widest moment of a layer's backward pass needs beside what is kept."""
    if load.plain is not None:
        return load.plain.working
    # of the hidden states around the layers only a gradient is left by then
    gone = 2 * load.tokens * load.shape.hidden_size * load.weight_bytes
    return max(_mlp_turn(load), _attention_turn(load)) + _weight_grad_operands(load) - gone


def _mlp_turn(load: Workload) -> float:
    """Return what the backward pass of one fast layer's MLP needs, all that was made again beside it."""
    stream = load.tokens * load.shape.hidden_size * load.weight_bytes
    tile, is_all = load.mlp_tokens, load.makes_again == "all"
    if tile == load.tokens:
        working = load.tokens * _layer_working(load, has_gate_up=is_all or load.recompute == "none")
    else:  # the gradient of the middle, for all tiles
        working = tile * _layer_working(load, has_gate_up=load.recompute == "none") + stream
    # what was made again, without the layer's input, which was there
    again = load.tokens * _fast_kept(load, keeps_gate_up=tile == load.tokens) - stream if is_all else 0
    return working + again


def _attention_turn(load: Workload) -> float:
    """Return what the backward pass of one fast layer's attention needs; the MLP's share of what is kept is gone.

    Beside the gradients: cuDNN and FlashAttention add up that of the queries in fp32, and where query heads share keys
    and values they make gradients of these for every query head first. With both, the peak that
    `benchmarks/results/row_128k_h100.json` measured is planned to 0.3 %.
    """
    shape, tokens = load.shape, load.tokens
    stream = tokens * shape.hidden_size * load.weight_bytes
    # gradients of the middle, of attention's output, of queries, keys and values, and of the packed projection
    elements = shape.hidden_size + 3 * shape.q_width + 4 * shape.kv_width
    elements += 2 * shape.q_width if shape.num_heads != shape.num_kv_heads else 0
    working = tokens * (elements * load.weight_bytes + 4 * shape.q_width + 8 * shape.num_heads) - stream
    if load.makes_again == "all":
        return working + tokens * _fast_kept(load, keeps_gate_up=False) - stream
    # gate and up were kept and are gone; queries, keys and values were not and are there again
    return working + tokens * (_fast_kept(load, keeps_gate_up=False) - fast_kept(load, load.recompute))


def _layer_working(load: Workload, has_gate_up: bool) -> float:
    """Return the bytes for a token that the MLP's backward pass in one fast layer needs; ``has_gate_up``: beside it."""
    shape = load.shape
    intermediate = next(x.num_out for x in shape.linears if x.name == "gate_proj")
    gate_up = 0 if has_gate_up else 2 * intermediate * load.weight_bytes
    swiglu = (intermediate + 2 * shape.hidden_size) * load.weight_bytes
    if load.store == "fp8":  # gradients of gate and up once more, in 8 bits, and the gradient of their input
        swiglu = max(swiglu, 2 * intermediate + 2 * shape.hidden_size * load.weight_bytes)
    return gate_up + swiglu


def _scratch(load: Workload) -> float:
    """Return what unpacking the widest frozen matrix takes; it is kept from product to product."""
    if load.plain is not None:
        largest = max(linear.num_in * linear.num_out for linear in load.shape.linears)
    else:
        largest = max(num_in * num_out for num_in, num_out, _, _ in _packs(load))
    if load.store == "nf4":
        return largest * (1 if load.computes_in_fp8 else load.weight_bytes)
    if load.store == "int8":  # unpacked for the way back; on the way there products are whole numbers of four bytes
        return max(largest * load.weight_bytes, 4 * load.tokens * max(linear.num_out for linear in load.shape.linears))
    return largest if load.store == "fp8" and load.fp8_copies < 2 else 0


def _weight_grad_operands(load: Workload) -> float:
    """Return what gradients of weights in 8 bits take: both operands turned round, the product before it is added."""
    if load.store != "fp8" or not (load.is_full and load.fp8_weight_grads):
        return 0
    packs = _packs(load)
    largest = max(num_in * num_out for num_in, num_out, _, _ in packs)
    return max(num_in + num_out for num_in, num_out, _, _ in packs) * load.tokens + largest * load.trainable_bytes
