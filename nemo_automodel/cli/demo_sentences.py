"""The demo's data: sentences of film and product reviews with the mean rating that people gave them.

Source: Hutto & Gilbert (2014), whose archive holds one sentence a line: id, mean rating from -4 to 4, text. Clear
sentences of moderate length become question and answer; neutral ones (|rating| < 1) are left out, because people do
not agree on them. The rows whose salted hash comes first are held out: the same rows on every machine, in no order that
anybody chose.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_automodel.shared.errors import UserError

SOURCES = {"movie": "movieReviewSnippets_GroundTruth.txt", "amazon": "amazonReviewSnippets_GroundTruth.txt"}
QUESTION = "Is this review positive or negative?\n\n{sentence}"
NUM_HELD_OUT = 200
SPLIT_SALT = "42"
MIN_ABS_RATING = 1.0
MIN_LENGTH, MAX_LENGTH = 20, 200


@dataclass(frozen=True)
class Sentence:
    """One rated sentence."""

    id: str
    """Source and the source's own id: ``movie-17``."""
    rating: float
    """Mean of the human ratings, -4 to 4."""
    text: str

    @property
    def key(self) -> str:
        """What makes two sentences the same: their words, without case and punctuation."""
        return " ".join(re.findall(r"\w+", self.text.lower()))

    def row(self) -> dict[str, object]:
        """Return the chat row to train on."""
        answer = "positive" if self.rating > 0 else "negative"
        messages = [
            {"role": "user", "content": QUESTION.format(sentence=self.text)},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "id": self.id, "rating": self.rating}


def read_sentences(archive: Path) -> list[Sentence]:
    """Read the rated sentences of the ``.tar.gz`` archive.

    Raises:
        UserError: the archive lacks a file, or a line is not id, rating and text.
    """
    sentences: list[Sentence] = []
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
        for source, file_name in SOURCES.items():
            file = tar.extractfile(members[file_name]) if file_name in members else None
            if file is None:
                raise UserError(f"{archive} holds no {file_name}. Delete it and fetch again.")
            sentences += _parse(source, file_name, file.read().decode("utf-8-sig"))
    return sentences


def _parse(source: str, file_name: str, text: str) -> Iterable[Sentence]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            own_id, rating, sentence = line.split("\t", 2)
            yield Sentence(f"{source}-{own_id}", float(rating), sentence.strip())
        except ValueError as error:
            raise UserError(
                f"{file_name}, line {number}, is not id, rating and text. Delete the file and fetch again."
            ) from error


def choose(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Keep the first of equal sentences, of those that are clear in meaning and moderate in length (characters)."""
    chosen: dict[str, Sentence] = {}
    for sentence in sentences:
        if abs(sentence.rating) >= MIN_ABS_RATING and MIN_LENGTH <= len(sentence.text) <= MAX_LENGTH:
            chosen.setdefault(sentence.key, sentence)
    return list(chosen.values())


def split(sentences: Iterable[Sentence], num_held_out: int = NUM_HELD_OUT) -> tuple[list[Sentence], list[Sentence]]:
    """Return training and held-out sentences, both in the order of their salted hashes."""
    ordered = sorted(sentences, key=lambda s: hashlib.sha256(f"{SPLIT_SALT}:{s.key}".encode()).digest())
    return ordered[num_held_out:], ordered[:num_held_out]


def write_rows(archive: Path, target: Path, num_held_out: int = NUM_HELD_OUT) -> tuple[int, int]:
    """Write ``train.jsonl`` and ``validation.jsonl`` to the new directory ``target``; return their numbers of rows."""
    train, held_out = split(choose(read_sentences(archive)), num_held_out)
    target.mkdir(parents=True)
    for name, part in (("train", train), ("validation", held_out)):
        lines = "".join(json.dumps(sentence.row(), ensure_ascii=False) + "\n" for sentence in part)
        (target / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return len(train), len(held_out)
