"""What proves that an exported model is the one that was trained.

The model of the checkpoint and the exported one answer the same held-out tokens, and their answers are compared where
it matters: in the probabilities of the next token. The distance of two models is the typical change of a log
probability,

    d(p, q) = sqrt( mean over positions of  Σ_v p(v)·(log p(v) − log q(v))² )        in nats,

weighted by how likely a token is, so that the tail of the vocabulary does not drown the rest (``d²/2`` is the KL
divergence to second order). A format rounds weights, so the distance is never zero; `LIMITS` says how much a format may
cost. It must also stay below half of what the training changed, ``d(trained, base)``: a smaller change than the
format's rounding would be lost in it, and an export of the base itself would pass.

The certificate holds the checksums of the files it is about, so it cannot be used for others by accident.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from nemo_automodel.shared.errors import UserError

CERTIFICATE_FILE = "certificate.json"
LIMITS = {"float32": 2e-3, "float16": 0.01, "bfloat16": 0.05, "q8_0": 0.1}
"""Largest distance in nats that a format's rounding may make, fp32 computation; measured, see docs/export.md."""
BF16_COMPUTE = 0.1
"""Added where the models are too large to be compared in fp32."""
MAX_LOSS_RISE = 0.02
"""Share by which the held-out loss of a merged model may exceed the trained one's."""

_FORMAT = 1
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Answers:
    """What a model says at N held-out positions."""

    log_probs_NV: torch.Tensor
    """fp32 on the CPU."""
    loss: float
    """Mean loss of the tokens that stand there, in nats."""


@dataclass
class Check:
    """One thing that was compared."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None


@dataclass
class Certificate:
    """The checks of one export."""

    source: str
    """What was exported, without the path of this machine."""
    kind: str
    """``hf``, ``peft``, ``gguf``, …"""
    dtype: str
    prompts: str
    """Where the held-out tokens come from, and how many."""
    compute_dtype: str
    checks: list[Check] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    """Held-out loss by model."""
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Tell whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def line(self) -> str:
        """Return the verdict as people read it."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            more = f" ({len(failed) - 1} more checks failed)" if len(failed) > 1 else ""
            return f"certificate: FAILED: {failed[0].detail}{more}"
        what = "; ".join(check.detail for check in self.checks)
        return f"certificate: passed on {self.prompts}: {what}"

    def write(self, directory: Path) -> None:
        """Write ``certificate.json`` about every other file in ``directory``."""
        content = {
            "format": _FORMAT,
            "passed": self.passed,
            "line": self.line(),
            **asdict(self),
            "versions": _versions(),
            "files": file_records(directory),
        }
        (directory / CERTIFICATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compare(
    trained: Answers, exported: Answers, base: Answers | None, dtype: str, is_bf16_compute: bool, name: str
) -> list[Check]:
    """Return the checks of an exported model: near the trained one, and not the base."""
    noise = distance(trained.log_probs_NV, exported.log_probs_NV)
    limit = LIMITS[dtype] + (BF16_COMPUTE if is_bf16_compute else 0.0)
    checks = [
        Check(
            f"{name} = trained",
            noise <= limit,
            f"{name} differs from the trained model by {noise:.2g} nats (limit for {dtype}: {limit:g})",
            noise,
            limit,
        )
    ]
    if base is not None:
        effect = distance(trained.log_probs_NV, base.log_probs_NV)
        checks.append(
            Check(
                f"{name} ≠ base",
                effect > 0 and noise <= effect / 2,
                _effect(effect, noise),
                noise,
                effect / 2,
            )
        )
    return checks


def _effect(effect: float, noise: float) -> str:
    if effect == 0:
        return "the trained model answers exactly as its base, so nothing was trained"
    if noise > effect / 2:
        return (
            f"training changed the base by only {effect:.2g} nats, which is lost in the {noise:.2g} of the export "
            "(train longer, keep the adapter, or use a wider dtype)"
        )
    return f"training changed the base by {effect:.2g} nats"


def distance(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> float:
    """Return the typical change of a log probability, weighted by ``p``; infinite where something is not finite.

    Models with another number of tokens are compared over those that both have.
    """
    num_tokens = min(log_p_NV.shape[1], log_q_NV.shape[1])
    total = 0.0
    for start in range(0, log_p_NV.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_p, log_q = log_p_NV[rows, :num_tokens].double(), log_q_NV[rows, :num_tokens].double()
        total += float((log_p.exp() * (log_p - log_q).square()).sum())
    mean = total / log_p_NV.shape[0]
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def compare_losses(merged: Answers, trained: Answers, name: str) -> Check:
    """Return the check that merging did not make the model worse on held-out tokens."""
    limit = trained.loss * (1 + MAX_LOSS_RISE) + 0.01
    return Check(
        f"{name} loss",
        merged.loss <= limit,
        f"held-out loss {trained.loss:.4f} trained, {merged.loss:.4f} {name}",
        merged.loss,
        limit,
    )


def file_records(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum (XXH3, 128 bits) of every file but the certificate, the model card and hidden ones."""
    records = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (CERTIFICATE_FILE, "README.md") and not name.startswith("."):
            records[name] = {"num_bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
    return records


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def check_certificate(directory: Path) -> dict[str, Any]:
    """Return the certificate of a directory, after comparing all files with it.

    Raises:
        UserError: there is none, it failed, or it is about other files.
    """
    path = directory / CERTIFICATE_FILE
    if not path.is_file():
        raise UserError(
            f"`{directory}` has no {CERTIFICATE_FILE}, so nothing shows that it is what was trained. Make it with "
            "`automodel export`, or insist with --no-certificate."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        passed, line, files = content["passed"], content["line"], content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{path}` cannot be read. Run `automodel export` again.") from error
    if not passed:
        raise UserError(f"`{path}` says: {line}. Mend that, or insist with --no-certificate.")
    found = file_records(directory)
    different = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if different:
        raise UserError(
            f"`{path}` is about other files: `{different[0]}` was changed, added or removed since "
            f"({len(different)} such). Run `automodel export` again, or insist with --no-certificate."
        )
    result: dict[str, Any] = content
    return result


def _versions() -> dict[str, str]:
    names = ("nemo-automodel", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
