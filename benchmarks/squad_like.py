"""Write question-answering rows in SQuAD's schema from prose that every Python carries.

No installable package holds SQuAD. The contexts here are real paragraphs, of Python's own documentation topics and of
the docstrings of its standard library; the questions ask for the word that follows a quoted phrase, several on one
paragraph as in SQuAD (4.64 on average there). So lengths, repetition and schema are like SQuAD's; the task is not.

    python benchmarks/squad_like.py data/squad_like --train 5000 --validation 200
"""

from __future__ import annotations

import argparse
import ast
import json
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

QUESTIONS_PER_PARAGRAPH = (3, 4, 5, 6)
PHRASE_WORDS = 4


def paragraphs() -> list[str]:
    """Return paragraphs of 200 to 1,500 characters, each once, in a fixed order for one Python version."""
    texts = list(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts.extend(doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node)))
    found = {}
    for text in texts:
        for block in re.split(r"\n\s*\n", text):
            paragraph = re.sub(r"\s+", " ", block).strip()
            if 200 <= len(paragraph) <= 1500 and paragraph[0].isalpha():
                found[paragraph] = None
    return list(found)


def questions(paragraph: str, rng: random.Random, count: int) -> Iterator[dict]:
    """Yield SQuAD rows on one paragraph, each with another answer position."""
    words = [(match.group(), match.start()) for match in re.finditer(r"[A-Za-z][A-Za-z'-]+", paragraph)]
    places = range(PHRASE_WORDS, len(words))
    for place in rng.sample(places, min(count, len(places))):
        answer, start = words[place]
        phrase = paragraph[words[place - PHRASE_WORDS][1] : start].strip()
        yield {
            "title": "Python",
            "context": paragraph,
            "question": f'Which word follows "{phrase}"?',
            "answers": {"text": [answer], "answer_start": [start]},
        }


def write(directory: Path, num_train: int, num_validation: int, seed: int = 0) -> None:
    """Write ``train.jsonl`` and ``validation.jsonl``; no paragraph is in both."""
    rng = random.Random(seed)
    source = paragraphs()
    rng.shuffle(source)
    held_out = max(8, len(source) // 10)
    directory.mkdir(parents=True, exist_ok=True)
    for split, texts, count in (
        ("validation", source[:held_out], num_validation),
        ("train", source[held_out:], num_train),
    ):
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            done = 0
            while done < count:
                for text in texts:
                    for row in questions(text, rng, rng.choice(QUESTIONS_PER_PARAGRAPH)):
                        if done < count:
                            file.write(json.dumps({"id": f"{split}-{done}", **row}) + "\n")
                            done += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=5000, help="rows of train.jsonl")
    parser.add_argument("--validation", type=int, default=200, help="rows of validation.jsonl")
    args = parser.parse_args()
    write(args.directory, args.train, args.validation)
    print(f"{args.directory}: {args.train} training rows, {args.validation} validation rows")


if __name__ == "__main__":
    main()
