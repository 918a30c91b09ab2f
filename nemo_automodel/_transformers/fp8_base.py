"""Products in 8 bits: what can be had on this machine, which layers get it, and how far their outputs are off.

Layers are packed one after the other. A frozen base frees its 16-bit weights as it goes, so at no time is there more
than the model as it was loaded and one layer; weights that learn stay, beside their copies in 8 bits. On the way a few
rows of token ids run through the layers as they were: every packed matrix is asked for the outputs of inputs that
really occur, outliers included, and its distance from the exact outputs is kept. The largest is logged, all of them go
to a file of the run (`write_report`).

The ids are drawn at random, because a model has no text at hand when it is built: a report compares matrices with each
other and shows one that went wrong; it does not predict a loss.
"""

from __future__ import annotations

import json
import logging
import statistics
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.components.fast.fp8_store import Fp8Scheme, Fp8Store
from nemo_automodel.components.fast.fp8_trained import Fp8TrainedStore
from nemo_automodel.components.fast.names import GROUPS, Slot, slots_of
from nemo_automodel.components.fast.trained_layer import TrainedStore
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.components.quantization.config import FP8Config
from nemo_automodel.kernels import fp8
from nemo_automodel.shared.errors import ConfigError, UserError, did_you_mean

logger = logging.getLogger(__name__)

REPORT_FILE = "fp8_quality.json"
_LEAST_CAPABILITY = (8, 9)
_ROW_SCALES = (9, 10)
"""Major compute capabilities whose library multiplies matrices with a scale for every row."""
_MULTIPLE = 16
"""Sides of a matrix are whole multiples of this many numbers."""
_NUM_TOKENS = 256
_COPIES = {
    False: {1: "once", 2: "twice"},
    True: {0: "in 16 bits alone", 1: "once more in 8 bits", 2: "twice more in 8 bits"},
}
_PROBE = 128
"""Sides of the matrices whose product is tried."""


@dataclass(frozen=True)
class Fp8Plan:
    """What is asked of the weights, resolved for a device."""

    scheme: Fp8Scheme
    filter_fqns: tuple[str, ...] = ()
    keeps_first_last_down: bool = False
    is_trained: bool = False
    """The weights learn; otherwise they are a frozen base."""

    @property
    def store(self) -> type[Fp8Store] | type[Fp8TrainedStore]:
        """What keeps the weights."""
        return Fp8TrainedStore.under(self.scheme) if self.is_trained else Fp8Store.under(self.scheme)

    @property
    def dense_store(self) -> type[DenseStore]:
        """What keeps weights that stay as they are."""
        return TrainedStore if self.is_trained else DenseStore

    @property
    def title(self) -> str:
        """Begin a line of the log."""
        return "FP8 training" if self.is_trained else "FP8 base"


@dataclass(frozen=True)
class MatrixReport:
    """One packed matrix: how it is stored, and how far its outputs are off."""

    name: str
    stored: str
    """``fp8``, or ``dense`` with the reason."""
    output_error: float
    """2-norm of the difference between its outputs and the exact ones, over that of the exact ones."""


_reports: weakref.WeakKeyDictionary[nn.Module, list[MatrixReport]] = weakref.WeakKeyDictionary()


def resolve_fp8(value: FP8Config | dict[str, Any] | None, has_adapter: bool, device: torch.device) -> Fp8Plan | None:
    """Return how the weights are to be multiplied, None for as they are. Without an adapter they learn.

    Raises:
        ConfigError: a bad key or value.
        UserError: the device has no such product.
    """
    if isinstance(value, dict):
        known = [item.name for item in fields(FP8Config)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ConfigError(f"`fp8.{unknown[0]}` is not known.{did_you_mean(unknown[0], known)}")
        value = FP8Config(**value)
    if value is None or not value.enabled:
        return None
    scheme = choose_scheme(value, device, not has_adapter)
    return Fp8Plan(scheme, tuple(value.filter_fqns), value.first_last_down_proj_bf16, not has_adapter)


def choose_scheme(cfg: FP8Config, device: torch.device, is_trained: bool = False) -> Fp8Scheme:
    """Return how weights are multiplied on ``device``, and log it.

    Raises:
        UserError: they cannot be.
    """
    copies, weight_grads = cfg.num_copies(is_trained), is_trained and cfg.has_weight_grads
    title = "FP8 training" if is_trained else "FP8 base"
    if cfg.emulate:
        scheme = Fp8Scheme(cfg.recipe_name != "tensorwise", copies, emulate=True, weight_grads=weight_grads)
        logger.info("%s: emulated in PyTorch, %s.", title, _name_of(scheme, is_trained))
        return scheme
    remedy = "Set `fp8.emulate: true` to round in the same places in PyTorch, which is slow."
    if device.type != "cuda":
        raise UserError(
            f"`fp8.enabled: true` needs compute capability 8.9, but the model is on the {device.type}. {remedy}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        raise UserError(f"`fp8.enabled: true` needs compute capability 8.9, but this GPU has {found}. {remedy}")
    by_rows = capability[0] in _ROW_SCALES if cfg.recipe_name is None else cfg.recipe_name != "tensorwise"
    scheme = Fp8Scheme(by_rows, copies, weight_grads=weight_grads)
    _try_product(scheme, device)
    asked = "" if cfg.recipe_name is None else " as `fp8.recipe_name` says"
    logger.info(
        "%s: %s%s, weights stored %s (compute capability %d.%d).",
        title,
        _name_of(scheme, is_trained),
        asked,
        _COPIES[is_trained][copies],
        *capability,
    )
    return scheme


def _name_of(scheme: Fp8Scheme, is_trained: bool = False) -> str:
    scales = "a scale for each row" if scheme.by_rows else "a scale for each matrix"
    if not is_trained:
        return scales
    return f"{scales}, weight gradients in {'8 bits' if scheme.weight_grads else 'the dtype of the model'}"


def _try_product(scheme: Fp8Scheme, device: torch.device) -> None:
    """Multiply two small matrices: what a library leaves out shows here and not in the first step."""
    x = torch.zeros((_PROBE, _PROBE), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.ones((_PROBE if scheme.by_rows else 1, 1), device=device)
    try:
        fp8.scaled_product(x, scale, x, scale, torch.bfloat16)
        if scheme.weight_grads:
            fp8.scaled_product(x, scale, x, scale, torch.bfloat16, fast_accum=False)
    except (RuntimeError, ValueError) as error:
        other = "tensorwise" if scheme.by_rows else "rowwise"
        raise UserError(
            f"FP8 products with {_name_of(scheme)} do not run on this GPU: {str(error).splitlines()[0]}. "
            f"Set `fp8.recipe_name: {other}`."
        ) from error


class Fp8Packer:
    """Makes the stores of a model's layers, and measures them.

    Call `packing` around the exchange of every layer, in their order, and `finish` after the last.

    Raises:
        UserError: a filter that matches nothing, or nothing left to store in 8 bits.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], plan: Fp8Plan) -> None:
        self._model, self._plan, self._store = model, plan, plan.store
        self._names = {module: name for name, module in model.named_modules()}
        self._kept = _kept_matrices(layers, self._names, plan)
        self._stores: list[tuple[str, WeightStore]] = []
        self._errors: list[torch.Tensor] = []
        ids = torch.randint(
            model.config.get_text_config().vocab_size,
            (1, _NUM_TOKENS),
            generator=torch.Generator().manual_seed(0),
        ).to(model.device)
        with torch.no_grad():
            self._hidden_BSD: torch.Tensor = model.get_input_embeddings()(ids)
            positions = torch.arange(_NUM_TOKENS, device=model.device).unsqueeze(0)
            self._call = {
                "position_ids": positions,
                "position_embeddings": model.base_model.rotary_emb(self._hidden_BSD, positions),  # type: ignore[operator]
            }

    def store(self, slots: Sequence[Slot]) -> WeightStore:
        """Return what keeps the weights of one matrix."""
        name = self._matrix_name(slots)
        made = self._plan.dense_store(slots) if name in self._kept else self._store(slots)
        self._stores.append((name, made))
        return made

    def _matrix_name(self, slots: Sequence[Slot]) -> str:
        return "+".join([self._names[slots[0].linear], *(slot.name for slot in slots[1:])])

    @contextmanager
    def packing(self, layer: nn.Module) -> Iterator[None]:
        """Compare the matrices of ``layer`` before and after what the caller does to it."""
        with torch.no_grad():
            pairs = self._run_dense(layer)
            yield
            for (_, made), (x_TK, exact_TN) in zip(self._stores[-len(GROUPS) :], pairs, strict=True):
                made.prepare()
                found_TN = made.forward_pending(x_TK, None)[:, : made.num_out]
                self._errors.append((found_TN.float() - exact_TN).norm() / exact_TN.norm())

    def _run_dense(self, layer: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run the layer on the hidden states so far; return inputs and exact outputs of each matrix."""
        inputs: dict[str, torch.Tensor] = {}

        def note(group: str) -> Any:
            return lambda module, args: inputs.__setitem__(group, args[0].flatten(0, -2))

        with ExitStack() as hooks:
            for group, paths in GROUPS.items():
                handle = layer.get_submodule(paths[0]).register_forward_pre_hook(note(group))
                hooks.callback(handle.remove)
            self._hidden_BSD = layer(self._hidden_BSD, **self._call)
        pairs = []
        for group, slots in slots_of(layer, {}).items():
            weights = [slot.linear.weight for slot in slots]
            exact = [nn.functional.linear(inputs[group], weight) for weight in weights]
            pairs.append((inputs[group], torch.cat(exact, dim=1).float()))
        return pairs

    def finish(self) -> None:
        """Log the largest error and keep all of them for `write_report`."""
        errors = torch.stack(self._errors).tolist()
        reports = [
            MatrixReport(name, f"dense: {self._kept[name]}" if name in self._kept else "fp8", error)
            for (name, _), error in zip(self._stores, errors, strict=True)
        ]
        _reports[self._model] = reports
        packed = [report for report in reports if report.stored == "fp8"]
        worst = max(packed, key=lambda report: report.output_error)
        logger.info(
            "%s: %d of %d matrices in 8 bits; largest output error %.1f %% (%s), median %.1f %%. All: %s.",
            self._plan.title,
            len(packed),
            len(reports),
            100 * worst.output_error,
            worst.name,
            100 * statistics.median(report.output_error for report in packed),
            REPORT_FILE,
        )


def _kept_matrices(layers: Sequence[nn.Module], names: dict[nn.Module, str], plan: Fp8Plan) -> dict[str, str]:
    """Return the matrices that stay as they are, by name, and why."""
    check_filters(plan.filter_fqns, [name for module, name in names.items() if isinstance(module, nn.Linear)])
    kept, total = {}, 0
    for index, layer in enumerate(layers):
        for group, slots in slots_of(layer, {}).items():
            found = [names[slot.linear] for slot in slots]
            name, total = "+".join([found[0], *(slot.name for slot in slots[1:])]), total + 1
            sides = {side for slot in slots for side in slot.linear.weight.shape}
            if any(word in linear for word in plan.filter_fqns for linear in found):
                kept[name] = "fp8.filter_fqns"
            elif plan.keeps_first_last_down and group == "down" and index in (0, len(layers) - 1):
                kept[name] = "fp8.first_last_down_proj_bf16"
            elif (odd := odd_side(sides)) is not None:
                kept[name] = odd
    if len(kept) == total:
        reason = next(iter(kept.values()))
        raise UserError(f"`fp8.enabled: true` leaves no matrix in 8 bits ({reason}). Set it to false.")
    return kept


def check_filters(words: Sequence[str], linears: Sequence[str]) -> None:
    """Refuse a word of ``filter_fqns`` that is part of no name.

    Raises:
        UserError: the first such word.
    """
    for word in words:
        if not any(word in name for name in linears):
            near = did_you_mean(word, {name.rpartition(".")[2] for name in linears})
            raise UserError(
                f"`fp8.filter_fqns: {word}` is part of no layer's name.{near} Use a part of a name such as "
                f"`{linears[0]}`."
            )


def odd_side(sides: Collection[int]) -> str | None:
    """Return why a matrix with these sides has no product in 8 bits, None if it has."""
    odd = [side for side in sides if side % _MULTIPLE]
    return f"a side of {min(odd)} is no multiple of 16" if odd else None


def write_report(model: nn.Module, directory: Path) -> None:
    """Write the errors of every matrix to ``directory``; a model without 8 bits leaves no file."""
    if model in _reports:
        rows = [asdict(report) for report in _reports[model]]
        (directory / REPORT_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
