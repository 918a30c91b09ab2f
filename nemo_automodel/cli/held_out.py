"""What a model makes of held-out rows: free answers for people to read, and numbers over many rows.

The quickstart asks the same model twice, with its adapter and without. The base weights are frozen, so the model
without its adapter is exactly the one that the training started from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_automodel.components._peft.lora import lora_layers
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from nemo_automodel.components.datasets.utils import default_collater
from nemo_automodel.components.loggers.console import progress
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nemo_automodel._transformers.forward import LabelledForward

BATCH_SIZE = 20


@dataclass(frozen=True)
class Question:
    """A held-out row as people read it."""

    prompt: str
    expected: str


@dataclass(frozen=True)
class Score:
    """Numbers over held-out rows."""

    loss: float
    """Mean loss of an answer token, as the recipe's validation measures it."""
    preferred: float
    """Share of rows where the right word is likelier than every other answer's word."""
    exact: float
    """Share of rows where greedy decoding gives the right answer, all of it and nothing else."""


class HeldOut:
    """The held-out rows of a chat file: every message but the last is the prompt, the last one is the answer."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.samples: Any = ChatDataset(str(path), tokenizer)
        with path.open(encoding="utf-8") as file:
            self.messages = [json.loads(line)["messages"] for line in file]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.messages)

    def questions(self, num_rows: int) -> list[Question]:
        """Return the first rows."""
        return [Question(m[-2]["content"], m[-1]["content"]) for m in self.messages[:num_rows]]

    def answers(self, model: PreTrainedModel, num_rows: int, max_new_tokens: int) -> list[str]:
        """Return the model's greedy answers to the first rows, all in one batch."""
        prompts = [
            self.tokenizer.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True)
            for m in self.messages[:num_rows]
        ]
        inputs = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with evaluating(model):
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    def score(self, forward: LabelledForward, what: str) -> Score:
        """Measure the model on all rows; ``what`` stands beside the progress bar."""
        first_tokens = self._first_tokens()
        # rows of like length share a batch, so that little is padding
        order = sorted(range(len(self)), key=lambda row: len(self.samples[row]["input_ids"]))
        loss_sum, num_labels, num_preferred, num_exact = 0.0, 0, 0, 0
        with evaluating(forward.model), progress(what, total=len(order)) as advance:
            for start in range(0, len(order), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                batch = default_collater([self.samples[row] for row in rows])
                logits_NV = labelled_logits(forward, batch)
                labels_N = batch["labels"][batch["labels"] != IGNORE_INDEX]
                loss_sum += float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"))
                num_labels += labels_N.numel()
                for logits_V, right in answers_in(batch, logits_NV, labels_N):
                    likeliest = max(first_tokens, key=lambda token: float(logits_V[0, token]))
                    num_preferred += int(likeliest == int(right[0]))
                    num_exact += int(torch.equal(logits_V.argmax(dim=-1), right))
                advance(len(rows))
        return Score(loss_sum / num_labels, num_preferred / len(order), num_exact / len(order))

    def _first_tokens(self) -> list[int]:
        """Return the first token of every different answer in the rows."""
        first: dict[str, int] = {}
        for row, messages in enumerate(self.messages):
            answer = messages[-1]["content"]
            if answer not in first:
                first[answer] = next(label for label in self.samples[row]["labels"] if label != IGNORE_INDEX)
        if len(set(first.values())) < len(first):
            raise UserError(f"The answers {', '.join(first)} begin with the same token, so they cannot be compared.")
        return list(first.values())


def labelled_logits(forward: LabelledForward, batch: Batch) -> torch.Tensor:
    """Return the logits ``[N, V]`` of the labelled positions, float32 on the CPU, through the recipe's own forward."""
    seen: list[torch.Tensor] = []

    def keep(*, logits: torch.Tensor, labels: torch.Tensor, num_label_tokens: int | None) -> torch.Tensor:
        seen.append(logits)
        return logits.sum()

    forward.loss(batch, keep)
    return seen[0].float().cpu()


def answers_in(
    batch: Batch, logits_NV: torch.Tensor, labels_N: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits ``[A, V]``, labels ``[A]``) of the A labelled positions of each row."""
    counts = (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist()
    yield from zip(torch.split(logits_NV, counts), torch.split(labels_N, counts), strict=True)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout and gradients off for a while."""
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Take the adapters away for a while: with ``B`` zero a layer computes what it computed before the training."""
    weights = [layer.lora_B.weight for layer in lora_layers(model).values()]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def write_samples(path: Path, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> None:
    """Write ``{"prompt", "expected", "before", "after"}``, one row a line, for `automodel report`."""
    with path.open("w", encoding="utf-8") as file:
        for question, old, new in zip(questions, before, after, strict=True):
            row = {"prompt": question.prompt, "expected": question.expected, "before": old, "after": new}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
