"""Benchmarks: the fine-tuning recipe's own loop, with a clock around its later steps.

What is timed is what a user gets: the data loader, the one device sync of a step, clipping, the optimizer, the console
line and the JSONL record are all inside. The first ``benchmark.warmup_steps`` steps are not counted; between the marks
nothing waits that would not wait in training. Nothing is validated and nothing is saved.

The result is printed and written as JSON: tokens a second (supervised, real, processed), operations a second by the
counts of `components/training/flops.py`, peak memory, and the conditions without which the numbers mean nothing. A rate
above the device's peak is refused.

Run it as a program: ``python nemo_automodel/recipes/llm/benchmark.py -c config.yaml --section.key value``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_automodel import __version__
from nemo_automodel.components.checkpoint.disk import check_writable
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, run_safely
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.training.flops import StepSize, check_rate, step_size
from nemo_automodel.components.training.step_scheduler import Step
from nemo_automodel.components.training.stopwatch import Mark, Stopwatch
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.recipes.several import refuse_benchmark
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.processes import num_processes
from nemo_automodel.shared.types import Batch, StepMetrics

logger = logging.getLogger(__name__)

RESULT_FILE = "benchmark.json"
_MOCK_BATCHES = "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset"
_LIBRARIES = ("torch", "transformers", "triton", "bitsandbytes")


class BenchmarkingRecipeForNextTokenPrediction(TrainFinetuneRecipeForNextTokenPrediction):
    """Train a causal language model for a few steps and report how fast that was."""

    def __init__(self, cfg: ConfigNode) -> None:
        super().__init__(as_benchmark(cfg))
        self._start: Mark | None = None
        self._end: Mark | None = None
        self._size = StepSize(0, 0, 0, 0)
        self._num_micro_batches = 0
        self._timed: list[StepMetrics] = []

    def setup(self) -> None:
        """Prepare the run as for training; see the base class."""
        refuse_benchmark(num_processes())
        super().setup()
        self._watch = Stopwatch(self.device)
        if self.settings.benchmark.peak_tflops is not None:
            self.utilisation.peak_tflops = self.settings.benchmark.peak_tflops

    def build_data(self) -> None:
        """Set tokenizer and training loader, once it is clear that there will be something to time and to write.

        Raises:
            ConfigError: every step is a warm-up step.
            UserError: the result cannot be written.
        """
        benchmark, max_steps = self.settings.benchmark, self.settings.step_scheduler.max_steps
        if max_steps is not None and benchmark.warmup_steps >= max_steps:
            raise ConfigError(
                f"`benchmark.warmup_steps` is {benchmark.warmup_steps}, but it must be below "
                f"`step_scheduler.max_steps` = {max_steps}, or nothing is timed. Lower it, or set max_steps to "
                f"{benchmark.warmup_steps + 10}."
            )
        check_writable(self.result_path.parent)
        super().build_data()

    @property
    def result_path(self) -> Path:
        """Return where the result is written."""
        named = self.settings.benchmark.json_output_path
        return self.run_directory.path / RESULT_FILE if named is None else Path(named).expanduser()

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """Train one step, and time it once the warm-up is over."""
        warmup_steps, index = self.settings.benchmark.warmup_steps, self.schedule.step - 1
        if index == warmup_steps == 0:
            self._start = self._watch.mark()
        self._profile(index, is_before=True)
        metrics = super().train_step(batches)
        if index == warmup_steps - 1:
            self._start = self._watch.mark()  # here, so that the first timed step pays for its data as well
        if index >= warmup_steps:
            self._end = self._watch.mark()
            self._timed.append(metrics)
            self._size += step_size(batches)
            self._num_micro_batches += len(batches)
        self._profile(index, is_before=False)
        return metrics

    def _profile(self, step: int, is_before: bool) -> None:
        """Tell CUDA's profiler (``nsys profile -c cudaProfilerApi``) where it starts and stops."""
        benchmark = self.settings.benchmark
        if self.device.type != "cuda" or self.dist.rank not in (benchmark.nsys_ranks or [0]):
            return
        if is_before and step == benchmark.nsys_start:
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        if not is_before and step == benchmark.nsys_end:
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]

    def _say_what_next(self, step: Step | None) -> None:
        if self._start is None or self._end is None:
            raise UserError(
                f"The run ended within its {self.settings.benchmark.warmup_steps} warm-up steps, so nothing was timed. "
                "Set `step_scheduler.max_steps` higher or `benchmark.warmup_steps` lower."
            )
        result = self.result(self._watch.seconds(self._start, self._end))
        if self.dist.rank == 0:
            self.result_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            logger.info("%s\n  written to        %s", describe(result), self.result_path)

    def result(self, seconds: float) -> dict[str, Any]:
        """Return the record of a timed window that took ``seconds``.

        Raises:
            UserError: the rate is above the device's peak.
        """
        work, size = self.utilisation.work, self._size
        rates = {
            "hardware": work.hardware(size) / seconds / 1e12,
            "model": work.model(size) / seconds / 1e12,
            "six_n_style": work.six_n_style(size) / seconds / 1e12,
        }
        peak = self.utilisation.peak_tflops
        check_rate(rates["hardware"], peak, self._device_name())
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": self.model_name(),
            "architecture": self._architecture(),
            "device": self._device_name(),
            "num_devices": self.dist.world_size,
            "versions": self._versions(),
            "conditions": self._conditions(),
            "window": {
                "warmup_steps": self.settings.benchmark.warmup_steps,
                "steps": len(self._timed),
                "micro_batches": self._num_micro_batches,
                "tokens_per_micro_batch": size.num_tokens / self._num_micro_batches,
                "seconds": seconds,
            },
            "tokens_per_s": {
                "supervised": size.num_label_tokens / seconds,
                "real": size.num_real_tokens / seconds,
                "processed": size.num_tokens / seconds,
            },
            "tflops": {**rates, "peak": peak},
            "mfu_percent": None if peak is None else 100 * rates["model"] / peak,
            "seconds_per_step": seconds / len(self._timed),
            "peak_gib": max(metrics.mem_gib for metrics in self._timed),
            "first_loss": _finite(self._timed[0].loss),
            "last_loss": _finite(self._timed[-1].loss),
        }

    def _architecture(self) -> dict[str, Any]:
        config = self.model.config.get_text_config()
        sizes = {key: getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
        return {"class": type(self.model).__name__, **sizes}

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"

    def _versions(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {"nemo_automodel": __version__, "python": platform.python_version()}
        for name in _LIBRARIES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        cudnn = torch.backends.cudnn.version() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        return {**found, "cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}

    def _conditions(self) -> dict[str, Any]:
        """Return what the numbers depend on, besides model, device and versions."""
        settings, peft = self.settings, self.effective.get("peft")
        adapters = None if peft is None else {"dropout": 0.0, **{k: v for k, v in peft.items() if k != "_target_"}}
        return {
            "dtype": dtype_name(self.model.dtype),
            "decoder_layers": "fast" if self.utilisation.has_fast_layers else "plain",
            "recompute": settings.distributed.recompute_policy(),
            "adapters": adapters,
            "quantization": None if settings.quantization is None else vars(settings.quantization),
            "fp8": settings.config.get("fp8.enabled") is True,
            "compiled": settings.compile.enabled or settings.distributed.enable_compile,
            "optimizer": settings.optimizer.get("_target_"),
            "max_grad_norm": settings.max_grad_norm,
            "global_batch_size": settings.step_scheduler.global_batch_size,
            "local_batch_size": settings.step_scheduler.local_batch_size,
            "data": self.effective["dataset"],
            "packed_sequence_size": settings.packed_sequence.packed_sequence_size,
        }


def as_benchmark(cfg: ConfigNode) -> ConfigNode:
    """Return a copy of a configuration that neither validates nor saves, since both would be timed.

    Nor is a step that does not fit done again, unless that is asked for: the result would be of another batch.

    Mock batches that do not say how many rows they have get those of a micro-batch.

    Raises:
        ConfigError: they say another number, so that a step would not be the global batch.
    """
    config = cfg.copy()
    config.set_by_dotted("checkpoint.enabled", False)
    if isinstance(config.get("memory"), str):
        config["memory"] = {"policy": config["memory"]}
    if config.get("memory.rescue") is None:
        config.set_by_dotted("memory.rescue", False)
    for section in config:
        if section.startswith("validation_dataset"):
            config.remove(section)
    if config.get("dataset._target_") != _MOCK_BATCHES or config.get("dataloader.batch_size", 0) is not None:
        return config
    num_rows = config.get("step_scheduler.local_batch_size", 1)
    given = config.get("dataset.batch_size")
    if given is None:
        config.set_by_dotted("dataset.batch_size", num_rows)
    elif given != num_rows:
        raise ConfigError(
            f"`dataset.batch_size` is {given}, but with `dataloader.batch_size: null` it is the micro-batch, so it "
            f"must be `step_scheduler.local_batch_size` = {num_rows}. Set it to {num_rows}, or leave it out."
        )
    return config


def describe(result: dict[str, Any]) -> str:
    """Return a result for people to read."""
    window, tokens, tflops = result["window"], result["tokens_per_s"], result["tflops"]
    architecture, conditions = result["architecture"], result["conditions"]
    peak, adapters = tflops["peak"], conditions["adapters"]
    share = "the device's peak is not known" if peak is None else f"{tflops['hardware'] / peak:.1%} of {peak:,.0f}"
    trained = "all weights" if adapters is None else f"LoRA r {adapters.get('dim')}, dropout {adapters['dropout']:g}"
    return "\n".join(
        [
            f"Benchmark of {result['model']} ({architecture['class']}, {architecture['num_hidden_layers']} layers of "
            f"{architecture['hidden_size']}) on {result['device']}:",
            f"  tokens/s          {tokens['processed']:,.0f} processed, {tokens['real']:,.0f} real, "
            f"{tokens['supervised']:,.0f} supervised",
            f"  TFLOP/s           {tflops['hardware']:,.3g} hardware ({share}); for comparison, 6N style: "
            f"{tflops['six_n_style']:,.3g}",
            f"  peak memory       {result['peak_gib']:.2f} GiB",
            f"  timed             {window['seconds']:.1f} s, {window['steps']} steps of "
            f"{result['seconds_per_step']:.3g} s after {window['warmup_steps']} of warm-up",
            f"  trained           {trained}; {conditions['dtype']}, {conditions['decoder_layers']} layers, "
            f"recomputed: {conditions['recompute']}",
        ]
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(config_path: str | Path | None = None) -> None:
    """Time as the command line says; ``config_path`` is used when it names no file.

    Raises:
        UserError: anything the user has to mend.
    """
    recipe = BenchmarkingRecipeForNextTokenPrediction(parse_args_and_load_config(config_path))
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    raise SystemExit(run_safely(main))
