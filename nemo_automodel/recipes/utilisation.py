"""How much of the device a run uses: its model's operations, counted once, against the device's peak."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from transformers import PreTrainedModel

from nemo_automodel.components.fast.decoder_layer import FastDecoderLayer
from nemo_automodel.components.training.flops import (
    FAST_RECOMPUTED,
    PLAIN_RECOMPUTED,
    ModelWork,
    count_work,
    device_peak,
    step_size,
)
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.types import Batch


class Utilisation:
    """The operations of a model under a run's settings, and the peak of its device."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings, device: torch.device) -> None:
        self._model = model
        self._policy = settings.distributed.recompute_policy()
        packed = settings.quantization
        with_fp8 = settings.config.get("fp8.enabled") is True or (packed is not None and packed.compute_in_fp8)
        self.peak_tflops = device_peak(device, with_fp8)
        """Dense peak in the dtype of the widest products; None where it is not known."""

    @property
    def has_fast_layers(self) -> bool:
        """Tell whether the decoder layers are the fast ones."""
        return any(isinstance(module, FastDecoderLayer) for module in self._model.modules())

    @cached_property
    def work(self) -> ModelWork:
        """Return the operations of the model."""
        return count_work(self._model, (FAST_RECOMPUTED if self.has_fast_layers else PLAIN_RECOMPUTED)[self._policy])

    def mfu(self, batches: Iterable[Batch], seconds: float) -> float | None:
        """Return the share of the peak in per cent that a step reaches; None where no peak is known."""
        if self.peak_tflops is None:
            return None
        return 100 * self.work.model(step_size(batches)) / seconds / (self.peak_tflops * 1e12)
