"""Proof that the documents of a packed row do not see each other, with the loaded model and the packer of the run.

A leak is silent: the loss falls, and the model learns from contexts that no user will ever send. So before the first
step a few documents of random tokens are packed twice among neighbours of other content and other length, and computed
once more alone, unpacked. Their logits must be the same three times. That holds only if the packer's borders and
positions, the mask, the attention kernel and every layer keep documents apart.

"The same" means: within what rounding does to this model in this dtype. That noise is measured, by disturbing the
embeddings of the documents as much as rounding does; to compute twice would not show it, because kernels that see like
shapes round alike. What a leak does is measured too, by putting a stranger in front of each document. What is tolerated
lies between the two, in orders of magnitude a quarter of the way from noise to leak; no number is fitted to a model. A
model that hardly notices the stranger proves nothing, and the log says that.

The price is six forward passes over about 900 tokens in all: 14 TFLOP with an 8B model, a fraction of a second on a
GPU and less than one training step anywhere. FlexAttention is compiled for the shape first. The documents come from a
generator of their own, so neither loaders nor random numbers of the run move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.packing_masks import check_can_isolate
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

Document = tuple[list[int], list[int]]
"""Token ids and shifted labels."""
Packer = Callable[[list[Document]], Batch]
"""Packs documents into rows and collates all rows, as the run does. May put documents into any order."""

ROW_LEN = 128
"""Tokens of a row of the proof where the run's rows are longer."""
_NUM_PROBES = 6
_MIN_ROW_LEN = 32
_NUM_DRAWS = 2
"""Disturbances of which the largest effect is the noise."""
_WAY_TO_LEAK = 0.25
# When they were packed, documents of ten tiny families in bf16, fp16 and fp32 moved by at most 1.3 times the noise.
_NOISE_FACTOR = 2.0
_LEAK_FACTOR = 3.0


@dataclass(frozen=True)
class IsolationProof:
    """What was measured. Differences are relative to the spread of the logits, 1 being all of it."""

    num_documents: int
    num_rows: int
    row_len: int
    difference: float
    """Of the document that moved most when it was packed, or when its neighbours changed."""
    tolerance: float
    leak: float
    """What a stranger in front of a document does."""
    seconds: float

    @property
    def is_conclusive(self) -> bool:
        """Tell whether a leak would have shown."""
        return self.leak > _LEAK_FACTOR * self.tolerance

    def __str__(self) -> str:
        rows = f"{self.num_documents} documents in {self.num_rows} rows of {self.row_len} tokens"
        numbers = f"logits moved by {self.difference:.2g}, a leak moves them by {self.leak:.2g}"
        if self.is_conclusive:
            return f"Packed documents are isolated: proven on {rows} ({numbers}; {self.seconds:.1f} s)."
        return (
            f"Packed documents may be isolated, but it could not be proven on {rows}: this model hardly notices what "
            f"stands before a document ({numbers}, {self.tolerance:.2g} may be noise)."
        )


@dataclass(frozen=True)
class _Probe:
    """A document that is watched: ``ids`` from ``start`` on, where its tokens are its own."""

    ids: list[int]
    labels: list[int]
    start: int

    @property
    def own(self) -> list[int]:
        return self.ids[self.start :]


def prove_isolation(forward: LabelledForward, pack: Packer, row_len: int, prefix_len: int = 0) -> IsolationProof:
    """Prove that packed documents do not see each other.

    ``row_len`` is what ``pack`` packs into; half of the documents begin with the same ``prefix_len`` tokens, for a
    packer that shares prefixes. Dropout is off meanwhile, and the model's mode is restored.

    Raises:
        UserError: the model cannot, positions do not restart, a document is not to be found in the packed rows, or
            logits move.
    """
    begin = time.perf_counter()
    model = forward.model
    check_can_isolate(model)
    embedding: Any = model.get_input_embeddings()
    vocab_size = int(embedding.weight.shape[0])
    tokens = _RandomTokens(vocab_size, max(row_len, _MIN_ROW_LEN) // 10)
    probes = tokens.probes(prefix_len)
    dtype = _precision(model)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            alone = _alone(forward, [[]] * len(probes), probes, padding=0)
            rounded = []
            for draw in range(_NUM_DRAWS):
                with _rounded(model, dtype, seed=draw + 1):
                    rounded.append(_alone(forward, [[]] * len(probes), probes, padding=0))
            leaking = _alone(forward, [tokens.ids(tokens.size) for _ in probes], probes, padding=0)
            num_rows, packed = 0, []
            for _ in range(2):
                batch = pack(_among_strangers(probes, tokens))
                num_rows = max(num_rows, len(batch["input_ids"]))
                packed.append(_packed(forward, batch, probes))
    finally:
        model.train(was_training)

    def moved(found: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([_moved(one, other, dtype) for one, other in zip(found, alone, strict=True)])

    noise = float(torch.cat([moved(found) for found in rounded]).max())
    leak = float(moved(leaking).min())
    proof = IsolationProof(
        num_documents=len(probes),
        num_rows=num_rows,
        row_len=row_len,
        difference=float(torch.cat([moved(found) for found in packed]).max()),
        tolerance=_tolerance(noise, leak, dtype),
        leak=leak,
        seconds=time.perf_counter() - begin,
    )
    if not proof.difference <= proof.tolerance:  # NaN is no proof
        raise UserError(
            f"The documents of a packed row see each other: with other neighbours the logits of a document moved by "
            f"{proof.difference:.2g} of their spread, more than {proof.tolerance:.2g}, which may be noise (a stranger "
            f"in front of it moves them by {proof.leak:.2g}). Turn packing off: "
            "`--packed_sequence.packed_sequence_size 0`, or try `--packed_sequence.attention dense`."
        )
    return proof


def _tolerance(noise: float, leak: float, dtype: torch.dtype) -> float:
    """Return the largest difference that is not taken for a leak; all are relative to the spread of the logits."""
    noise = max(noise, torch.finfo(dtype).eps / 4)  # logits are rounded at the end at least
    return noise * max(_NOISE_FACTOR, math.pow(leak / noise, _WAY_TO_LEAK))


def _precision(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that is about as precise as the model's arithmetic."""
    device_type = model.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if model.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.float16  # TF32 has as many digits
    return model.dtype


@contextmanager
def _rounded(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Disturb the embeddings, each number by about what rounding to ``dtype`` does."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.finfo(dtype).eps / 4

    def disturb(module: torch.nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        factor = 1 + size * torch.randn(embedded.shape, generator=generator, dtype=torch.float64)
        return (embedded.double() * factor.to(embedded.device)).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


class _RandomTokens:
    """Documents of random tokens, the same in every run."""

    def __init__(self, vocab_size: int, size: int) -> None:
        self.size = size
        """Tokens of a watched document."""
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def ids(self, length: int) -> list[int]:
        return torch.randint(self._vocab_size, (length,), generator=self._generator).tolist()

    def document(self, length: int) -> Document:
        ids = self.ids(length + 1)
        return ids[:-1], ids[1:]

    def stranger(self) -> Document:
        """Return a document of any length up to two watched ones."""
        return self.document(int(torch.randint(1, 2 * self.size, (1,), generator=self._generator)))

    def probes(self, prefix_len: int) -> list[_Probe]:
        """Return the watched documents, the first half of them behind one prefix."""
        prefix, found = self.ids(prefix_len), []
        for number in range(_NUM_PROBES):
            ids, labels = self.document(self.size)
            if number < _NUM_PROBES // 2:
                found.append(_Probe(prefix + ids, [IGNORE_INDEX] * prefix_len + labels, prefix_len))
            else:
                found.append(_Probe(ids, labels, 0))
        return found


def _among_strangers(probes: Sequence[_Probe], tokens: _RandomTokens) -> list[Document]:
    """Return the watched documents in their order with strangers between them, but not inside a shared prefix."""
    documents = []
    for number, probe in enumerate(probes):
        if number == 0 or not (probe.start and probes[number - 1].start):
            documents.append(tokens.stranger())
        documents.append((probe.ids, probe.labels))
    return [*documents, tokens.stranger()]


def _alone(
    forward: LabelledForward, before: Sequence[list[int]], probes: Sequence[_Probe], padding: int
) -> list[torch.Tensor]:
    """Return the logits ``[N, V]`` of each watched document in an unpacked row of its own, after ``before`` if any."""
    rows = [head + probe.ids for head, probe in zip(before, probes, strict=True)]
    size = max(map(len, rows)) + padding
    shape = len(rows), size
    batch = {key: torch.zeros(shape, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
    wanted = torch.zeros(shape, dtype=torch.bool)
    for number, (row, probe) in enumerate(zip(rows, probes, strict=True)):
        batch["input_ids"][number, : len(row)] = torch.tensor(row)
        batch["attention_mask"][number, : len(row)] = 1
        wanted[number, len(row) - len(probe.own) : len(row)] = True
    logits = _logits(forward, batch, wanted)
    return list(torch.split(logits, [len(probe.own) for probe in probes]))


def _packed(forward: LabelledForward, batch: Batch, probes: Sequence[_Probe]) -> list[torch.Tensor]:
    """Return the logits ``[N, V]`` of each watched document in packed rows."""
    ids_BS, positions_BS = batch["input_ids"], batch["position_ids"]
    places = [_find(ids_BS, probe.own) for probe in probes]
    for probe, (row, start) in zip(probes, places, strict=True):
        found = positions_BS[row, start : start + len(probe.own)].tolist()
        expected = list(range(probe.start, len(probe.ids)))
        if found != expected:
            raise UserError(
                f"Positions do not restart in the documents of a packed row: a token that is number {expected[0]} of "
                f"its document has position {found[0]}. Take the packer of `packed_sequence`, or mend your own."
            )
    wanted = torch.zeros(ids_BS.shape, dtype=torch.bool)
    for probe, (row, start) in zip(probes, places, strict=True):
        wanted[row, start : start + len(probe.own)] = True
    logits = _logits(forward, batch, wanted)
    index_BS = torch.full(ids_BS.shape, -1)
    index_BS[wanted] = torch.arange(int(wanted.sum()))
    return [
        logits[index_BS[row, start : start + len(probe.own)].to(logits.device)]
        for probe, (row, start) in zip(probes, places, strict=True)
    ]


def _find(ids_BS: torch.Tensor, needle: list[int]) -> tuple[int, int]:
    """Return row and place of the one occurrence of ``needle``."""
    hits = (ids_BS.unfold(1, len(needle), 1) == torch.tensor(needle)).all(dim=-1).nonzero().tolist()
    if len(hits) != 1:
        raise UserError(
            f"A document of {len(needle)} tokens stands {len(hits)} times in the packed rows, but it was packed once. "
            "Turn packing off: `--packed_sequence.packed_sequence_size 0`."
        )
    return hits[0][0], hits[0][1]


def _logits(forward: LabelledForward, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
    """Return the logits of the wanted positions, in order, by the way of training: they are the labelled ones."""
    seen: list[torch.Tensor] = []

    def keep(*, logits: torch.Tensor, labels: torch.Tensor, num_label_tokens: int | None) -> torch.Tensor:
        seen.append(logits.float())
        return logits.sum()

    forward.loss({**batch, "labels": torch.where(wanted, 0, IGNORE_INDEX)}, keep)
    return seen[0]


def _moved(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far a document's logits ``[N, V]`` moved, relative to their spread.

    That is the position that moved most where arithmetic is exact enough, and else the median position: in bf16 a few
    positions of any document are ten times as noisy as the others.
    """
    spread_N = (expected - expected.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()
    # logits without any spread, as of a padding token with an empty embedding, should not move at all
    moved_N = (found - expected).square().mean(dim=-1).sqrt() / spread_N.clamp(min=torch.finfo(spread_N.dtype).tiny)
    return moved_N.median() if torch.finfo(dtype).bits < 32 else moved_N.max()
