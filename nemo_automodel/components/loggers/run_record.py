"""The record of a run read back: the numbers of every step, and what the run was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_automodel.components.loggers.charts import Point, format_number
from nemo_automodel.components.loggers.metric_logger import TRAINING_FILE, read_records

KERNELS_FILE = "kernels.json"
"""How the fast layers of a run were computed."""


@dataclass(frozen=True)
class Sample:
    """A prompt of a row that was not trained on, and what the model makes of it; None is unknown."""

    prompt: str
    expected: str | None
    before: str | None
    after: str | None


@dataclass
class RunRecord:
    """What a report is made of."""

    directory: Path
    train: list[dict[str, Any]]
    """Records of ``training.jsonl``, one a step, in order."""
    validation: dict[str, list[dict[str, Any]]]
    """The same of every validation set, by name; ``default`` for the plain one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str | None = None
    """``config.yaml`` of the newest checkpoint, as it stands in the file."""
    checkpoint: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    """Operation of the fast layers → how it was computed."""
    samples: list[Sample] = field(default_factory=list)
    samples_note: str | None = None
    """Where the samples come from, or why there are none."""

    def series(self, key: str) -> list[Point]:
        """Return ``(step, value)`` of one key of the training records."""
        return points(self.train, key)

    def total(self, key: str) -> int:
        """Return the sum of a count over all steps."""
        return int(sum(record.get(key) or 0 for record in self.train))

    def seconds(self) -> float | None:
        """Return the time spent training, pauses between interrupted processes left out; None when unknown.

        A step's time is its tokens over its tokens per second. Records without them leave the clock times.
        """
        spans = [
            record["num_tokens_per_step"] / record["tps"]
            for record in self.train
            if record.get("tps") and record.get("num_tokens_per_step")
        ]
        if spans:
            return math.fsum(spans)
        times = [_parse_time(record["timestamp"]) for record in self.train if record.get("timestamp")]
        return (max(times) - min(times)).total_seconds() if len(times) > 1 else None

    def facts(self) -> list[tuple[str, str]]:
        """Return what is known about the run as label and text; what is not known is left out."""
        model = self.config.get("model") or {}
        peft = self.config.get("peft")
        found: list[tuple[str, str | None]] = [
            ("Model", _text(model.get("pretrained_model_name_or_path") or model.get("config"))),
            ("Method", self._method(peft) if self.config else None),
            ("Recipe", _text(self.config.get("recipe"))),
            ("Data", self._data()),
            ("Epochs", format_number(self.train[-1]["epoch"] + 1) if self.train else None),
            ("Learned tokens", f"{self.total('num_label_tokens'):,}" if self.train else None),
            ("Started", _clock(self.train[0]) if self.train else None),
            ("Ended", _clock(self.train[-1]) if self.train else None),
            ("Newest checkpoint", self.checkpoint.name if self.checkpoint else None),
            ("Kernels", ", ".join(f"{operation} {name}" for operation, name in self.kernels.items()) or None),
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items()) or None),
            ("Directory", str(self.directory)),
        ]
        return [(label, text) for label, text in found if text]

    def _method(self, peft: Mapping[str, Any] | None) -> str:
        if not peft:
            return "full fine-tuning"
        quantization = self.config.get("quantization") or {}
        bits = next((bits for bits in (4, 8) if quantization.get(f"load_in_{bits}bit")), None)
        name = f"QLoRA ({bits} bit)" if bits else "LoRA"
        return f"{name}, dim {peft.get('dim', '?')}, alpha {peft.get('alpha', '?')}"

    def _data(self) -> str | None:
        dataset = self.config.get("dataset") or {}
        for key in ("path_or_dataset_id", "path_or_dataset", "dataset_name", "path"):
            if dataset.get(key):
                return _text(dataset[key])
        return _text(dataset.get("_target_"))


def read_run(directory: Path) -> RunRecord:
    """Read ``training.jsonl`` and ``validation*.jsonl``; of a step recorded twice the later record counts.

    Raises:
        UserError: a line is no JSON object.
    """
    validation = {}
    for path in sorted(directory.glob("validation*.jsonl")):
        name = path.stem.removeprefix("validation").removeprefix("_") or "default"
        validation[name] = _read_steps(path)
    training = directory / TRAINING_FILE
    return RunRecord(
        directory,
        _read_steps(training) if training.is_file() else [],
        validation,
        kernels=_read_kernels(directory / KERNELS_FILE),
    )


def points(records: list[dict[str, Any]], key: str) -> list[Point]:
    """Return ``(step, value)`` of one key; records without the key are left out, ``null`` stays a gap."""
    return [(record["step"], record[key]) for record in records if key in record]


def extreme(values: list[Point], choose: Callable[..., Any]) -> tuple[float, int] | None:
    """Return the value that ``choose`` (``min`` or ``max``) picks and its step; None when there is no finite value."""
    finite = [(value, step) for step, value in values if value is not None and math.isfinite(value)]
    return choose(finite) if finite else None


def _read_kernels(path: Path) -> dict[str, str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return {entry["operation"]: entry["implementation"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a report goes without it; training refuses a damaged file


def _read_steps(path: Path) -> list[dict[str, Any]]:
    by_step = {record["step"]: record for record in read_records(path) if "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def _parse_time(timestamp: str) -> datetime:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00"))


def _clock(record: Mapping[str, Any]) -> str | None:
    timestamp = record.get("timestamp")
    return _parse_time(timestamp).strftime("%Y-%m-%d %H:%M UTC") if timestamp else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
