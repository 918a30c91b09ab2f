"""Prefix sharing: documents that begin alike are stored, and computed, once.

Several questions on one paragraph, several answers to one prompt, branches of one dialogue: what they have in common
is most of their tokens. Such documents become one, ``[prefix][branch 1][branch 2]…``: a branch attends to the prefix
and to itself, and its positions go on where the prefix ends, so each of its tokens computes what it would have computed
in a row of its own, and so does each token of the prefix. Loss and gradients are those of the documents alone. What is
not the same is random: dropout draws once for a shared token, not once for each document.

A position is shared where all documents have the same token and learn nothing: a prefix ends before the first position
with a label. That position predicts the first learned token, which differs from branch to branch even where the token
at it does not; so every branch keeps its own copy.

Documents are compared with those of their neighbourhood in the data, where what begins alike usually stands. The price:
what shares a row falls into one step, so the documents of a step are less independent than without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nemo_automodel.components.datasets.packing import Document
from nemo_automodel.shared.types import IGNORE_INDEX

MIN_PREFIX = 16
"""Tokens; less is not worth a branch. Templates begin alike in every row."""


@dataclass(frozen=True)
class PrefixSharing:
    """Turns a window of documents into as few tokens as their neighbourhoods allow.

    No document comes out longer than ``size`` tokens: what would be is stored as several, each with its own prefix.
    ``shuffle`` mixes what comes out, the same way for the same number of documents.
    """

    size: int
    shuffle: bool

    def __call__(self, documents: list[Document]) -> list[Document]:
        """Return plain documents and shared ones, holding every learned token of ``documents`` once."""
        # sorted by their bytes, documents that begin alike are neighbours, however far apart they stood
        order = sorted(range(len(documents)), key=lambda number: documents[number].ids.tobytes())
        cuts = group([documents[number] for number in order], self.size, MIN_PREFIX)
        members = sorted((sorted(order[start:end]), prefix) for start, end, prefix in cuts)
        found = [join([documents[number] for number in numbers], prefix) for numbers, prefix in members]
        if self.shuffle:
            order = np.random.default_rng(len(documents)).permutation(len(found)).tolist()
            found = [found[number] for number in order]
        return found


def group(documents: Sequence[Document], size: int, min_prefix: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, length of the prefix) of consecutive groups; a group of one has no prefix.

    Of all ways to cut the sequence this takes one that saves most tokens, with groups of at most ``size`` tokens.
    """
    common = [_common_prefix(one, other) for one, other in pairwise(documents)]
    start = 0
    for index in range(len(documents)):
        if index == len(common) or common[index] < min_prefix:
            yield from _cut([len(d.ids) for d in documents[start : index + 1]], common[start:index], size, start)
            start = index + 1


def _common_prefix(one: Document, other: Document) -> int:
    """Return the number of leading positions with equal tokens and nothing learned."""
    if one.branches is not None or other.branches is not None:
        return 0
    limit = min(_num_unlearned(one.labels), _num_unlearned(other.labels))
    differs = one.ids[:limit] != other.ids[:limit]
    return int(differs.argmax()) if differs.any() else limit


def _num_unlearned(labels: np.ndarray) -> int:
    """Return the number of leading positions without a label; at least one position is not counted."""
    is_learned = labels != IGNORE_INDEX
    return int(is_learned.argmax()) if is_learned.any() else len(labels) - 1


def _cut(lengths: list[int], common: list[int], size: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of documents, each of which begins like its neighbours, into groups that save most tokens."""
    saved = [0] * (len(lengths) + 1)  # by the documents from an index on
    ends, prefixes = [0] * len(lengths), [0] * len(lengths)
    for start in reversed(range(len(lengths))):
        prefix, total, best = 0, 0, -1
        for end in range(start + 1, len(lengths) + 1):
            total += lengths[end - 1]
            num_more = end - start - 1
            if num_more:
                prefix = min(prefix, common[end - 2]) if num_more > 1 else common[end - 2]
            if num_more and total - prefix * num_more > size:
                break
            if prefix * num_more + saved[end] > best:
                best = prefix * num_more + saved[end]
                ends[start], prefixes[start] = end, prefix
        saved[start] = best
    start = 0
    while start < len(lengths):
        yield offset + start, offset + ends[start], prefixes[start]
        start = ends[start]


def join(documents: Sequence[Document], prefix: int) -> Document:
    """Return one document of the ``prefix`` first positions, which all have in common, and the rest of each."""
    if len(documents) == 1:
        return documents[0]
    head = documents[0]
    return Document(
        np.concatenate([head.ids[:prefix], *(document.ids[prefix:] for document in documents)]),
        np.concatenate([head.labels[:prefix], *(document.labels[prefix:] for document in documents)]),
        np.array([prefix, *(len(document.ids) - prefix for document in documents)], dtype=np.int32),
    )
