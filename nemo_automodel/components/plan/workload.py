"""What a run asks of a machine, as numbers. Free of torch.

A `Workload` is made from a configuration and a model's outline; `memory` and `speed` turn it into bytes and seconds.
Shapes: D hidden size, V vocabulary, T tokens of a micro-batch, N and K outputs and inputs of a linear layer, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_automodel.shared.memory_policies import tile_tokens

_RANK_TILE = 64
"""The fast layers round the ranks of a packed matrix up to this."""


@dataclass(frozen=True)
class Linear:
    """The linear layers of one name in all decoder layers, and the rank of their adapters (0: none)."""

    name: str
    count: int
    num_in: int
    num_out: int
    rank: int = 0

    @property
    def num_weights(self) -> int:
        """Weights of all of them."""
        return self.count * self.num_in * self.num_out

    @property
    def num_adapter_weights(self) -> int:
        """Weights of their adapters."""
        return self.count * self.rank * (self.num_in + self.num_out)


@dataclass(frozen=True)
class PlainRun:
    """What Transformers' layers keep and move in a micro-batch, found by running them without data. Bytes."""

    kept: int
    """From the forward pass to the backward pass."""
    working: int
    """More than that at the peak of the backward pass."""
    written: int
    """By all operations of both passes."""
    adapter_copies: int = 0
    """A and B in the dtype of the layers, where adapters are fused with their linear layers."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that its memory and speed depend on."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    linears: tuple[Linear, ...]
    num_embedding: int
    """Weights of the input embedding."""
    num_head: int
    """Weights of the output head; 0 when it shares the embedding's."""
    num_other: int
    """Norms, biases and whatever else."""
    has_qk_norm: bool = False

    @property
    def num_linear(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return sum(linear.num_weights for linear in self.linears)

    @property
    def num_weights(self) -> int:
        """All weights of the base model."""
        return self.num_linear + self.num_embedding + self.num_head + self.num_other

    @property
    def num_adapter_weights(self) -> int:
        """Weights of all adapters."""
        return sum(linear.num_adapter_weights for linear in self.linears)

    @property
    def q_width(self) -> int:
        """Elements of the queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of the keys of a token."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Workload:
    """One training configuration of one model."""

    shape: ModelShape
    rows: int
    """Rows of a micro-batch."""
    seq_len: int
    grad_accum: int
    store: str = "dense"
    """How weights are multiplied: dense, fp8, nf4 or int8. Frozen ones lie so in memory."""
    fp8_copies: int = 2
    """Of a weight in 8 bits; beside the weight itself where it learns."""
    fp8_weight_grads: bool = False
    """Gradients of weights that learn are products in 8 bits too."""
    computes_in_fp8: bool = False
    """Weights in 4 bits are multiplied in 8."""
    embeddings_on_host: bool = False
    weight_bytes: int = 2
    """Of a dense weight, and of activations."""
    trainable_bytes: int = 4
    """Of a weight that learns."""
    state_bytes: float = 8
    """The optimizer's, for a weight that learns."""
    step_bytes: float = 0
    """What the optimizer's step needs for a moment, for a weight that learns."""
    is_full: bool = False
    """All weights learn."""
    steps_in_backward: bool = False
    """Gradients are freed as soon as they are complete."""
    recompute: str = "none"
    """A name of `shared.memory_policies`."""
    mlp_tile_tokens: int | None = None
    labelled_share: float = 1.0
    document_len: int | None = None
    """Mean tokens of a document in a packed row; None: a row is one document."""
    dropout: float = 0.0
    dropout_position: str = "post"
    may_record: bool = True
    """Batches have one shape, and nobody turned recordings off."""
    logits_copies: int = 0
    """Whole logits that are there at once; 0: output head and loss are one step, which needs a chunk."""
    plain: PlainRun | None = None
    """Where Transformers' layers compute; None: the fast decoder layers do."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.seq_len

    @property
    def mlp_tokens(self) -> int:
        """Tokens that the MLP of a fast layer works on at a time."""
        return tile_tokens(self.mlp_tile_tokens, self.recompute, self.tokens)

    @property
    def makes_again(self) -> str:
        """What is computed twice: none, gate_up, qkv_gate_up or all."""
        again = {"selective": "gate_up", "sac2": "gate_up", "sac1": "qkv_gate_up"}
        return "all" if self.recompute.startswith("full") else again.get(self.recompute, "none")

    @property
    def is_recorded(self) -> bool:
        """Whether the fast layers are started whole, where the host would be slower than the GPU."""
        return self.may_record and not self.steps_in_backward and self.recompute not in ("sac1", "full_offload")

    @property
    def num_trainable(self) -> int:
        """Weights that learn."""
        return self.shape.num_weights if self.is_full else self.shape.num_adapter_weights

    def changed(self, **changes: object) -> Workload:
        """Return a copy with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


def rank_width(rank: int, store: str = "dense") -> int:
    """Return the columns that adapters of ``rank`` together take in a packed matrix."""
    if store == "nf4" and rank <= _RANK_TILE:
        return 0 if rank == 0 else max(16, 1 << (rank - 1).bit_length())
    return -(-rank // _RANK_TILE) * _RANK_TILE
