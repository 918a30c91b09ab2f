"""The training data of a configuration without its model, for whoever only looks.

It is opened as the recipe opens it, with the same seed and the same loader, so what is seen is what will be trained.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nemo_automodel._transformers.model_source import hide_bars_without_terminal
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.components.datasets.document_view import DocumentView, rows_in, rows_of
from nemo_automodel.components.datasets.label_check import LabelStatistics
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.datasets.packed_rows import PackedRows
from nemo_automodel.components.datasets.packed_stream import PackedStream
from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.training.rng import ScopedRNG
from nemo_automodel.components.training.step_scheduler import StepScheduler
from nemo_automodel.recipes.data_check import DataCheck, limits_of
from nemo_automodel.recipes.llm.text_data import TextData, model_path_of
from nemo_automodel.recipes.settings import load_settings


@dataclass
class OpenData:
    """The training loader of a configuration, and the label gate over it."""

    tokenizer: PreTrainedTokenizerBase | None
    loader: ResumableDataLoader
    num_batches: int
    """Micro-batches of a step."""
    gate: DataCheck

    def first_rows(self, num_rows: int) -> list[list[DocumentView]]:
        """Return the documents of each of the first rows, in the order of training."""
        batches = self.loader.peek(num_rows)
        if batches is not None:
            return rows_of(self.loader.dataset, [index for batch in batches for index in batch][:num_rows])
        found: list[list[DocumentView]] = []
        for number, item in enumerate(itertools.islice(self.loader, num_rows), start=1):
            for batch in item if isinstance(item, list) else [item]:  # a token budget makes a step's list of them
                found += rows_in(batch, f"Micro-batch {number}")
        return found[:num_rows]

    def check(self) -> None:
        """Let the label gate look at the rows of step 0 and a sample.

        Raises:
            UserError: what it refuses.
        """
        self.gate.look(self.num_batches)

    @property
    def statistics(self) -> LabelStatistics | None:
        """What the label gate counted, unless it refused."""
        return self.gate.statistics

    @property
    def packing_report(self) -> str | None:
        """What packing does: to the whole set, of a stream to what was read; None without packing."""
        packed = self.loader.dataset
        if isinstance(packed, PackedRows):
            len(packed)  # waits until all of it is packed
        return str(packed.report) if isinstance(packed, PackedRows | PackedStream) else None


def open_training_data(cfg: ConfigNode) -> OpenData:
    """Open tokenizer and training rows of a configuration; the label gate looks even where ``data_check`` is off.

    Raises:
        UserError: anything the user has to mend.
    """
    hide_bars_without_terminal()
    settings = load_settings(cfg)
    mesh = Mesh()
    model_path = model_path_of(settings.model)
    data = TextData(settings, mesh, model_path)
    with ScopedRNG(settings.seed, ranked=True):
        data.check_names()
        tokenizer = data.build_tokenizer()
        loader = data.build_train_loader(tokenizer)
    gate = DataCheck(
        settings.data_check or DataCheckConfig(),
        loader,
        data.train_source,
        tokenizer,
        settings.seed,
        limits_of(settings.model, model_path),
    )
    schedule = StepScheduler(settings.step_scheduler, loader, mesh.dp_size)
    return OpenData(tokenizer, loader, schedule.grad_accum, gate)
