"""Small states on disk: schedule, data position, random numbers.

A file of a checkpoint is input like any other. It may come from elsewhere, so it is only ever read with
``weights_only=True``, which builds tensors and plain containers and calls nothing that the file names; and it may be
damaged, so whatever a decoder makes of broken bytes becomes one line that names the file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nemo_automodel.components.checkpoint.layout import LEGACY_RNG_FILE, RNG_FILE
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Stateful

UNREADABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)
"""What decoders raise on bytes that are damaged or meant to do harm."""

T = TypeVar("T")

_REMEDY = "Go on from another checkpoint with --checkpoint.restore_from"
_LEGACY_RNG_CLASS = "nemo_automodel.components.training.rng.RNGState"
_LEGACY_FIELDS = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")


def to_bytes(state: Any) -> bytes:
    """Return ``state`` as ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_state(path: Path) -> Any:
    """Read what ``to_bytes`` wrote, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"The checkpoint lacks `{path}`. {_REMEDY}")
    return guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def guarded(path: Path, read: Callable[[], T]) -> T:
    """Return ``read()``; whatever it raises because of the bytes at ``path`` becomes one line."""
    try:
        return read()
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"`{path}` is damaged, or holds objects that loading would have to run ({_forbidden(error)}), which is "
            f"never done. {_REMEDY}"
        ) from error
    except UNREADABLE as error:
        raise UserError(f"`{path}` is damaged and cannot be read ({type(error).__name__}). {_REMEDY}") from error


def hand_over(path: Path, part: Stateful, state: Any) -> None:
    """Give a part of the run the state read from ``path``.

    Raises:
        UserError: the state is well-formed, but not this part's.
    """
    try:
        part.load_state_dict(state)
    except UserError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"`{path}` does not fit this run ({type(error).__name__}: {reason}). {_REMEDY}") from error


def _forbidden(error: pickle.UnpicklingError) -> str:
    """Return the name that torch refused, out of a message of many lines."""
    lines = str(error).splitlines()
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "Trying" in line]
    words = (named or lines or ["no reason given"])[0].split("Please use", 1)[0]
    return " ".join(words.replace("WeightsUnpickler error:", "").split())[:160].rstrip(" .")


def read_rng_state(checkpoint: Path, allow_legacy_pickle: bool) -> dict[str, Any]:
    """Read the random number state under either of its file names, in today's form.

    Raises:
        UserError: no file, a damaged one, or one in the pickled form of v0.2 that ``allow_legacy_pickle`` does not
            admit.
    """
    legacy_file = checkpoint / LEGACY_RNG_FILE
    path = legacy_file if legacy_file.is_file() else checkpoint / RNG_FILE
    if path.is_file() and guarded(path, lambda: _LEGACY_RNG_CLASS in _unsafe_names(path)):
        if not allow_legacy_pickle:
            raise UserError(
                f"`{path}` holds a pickled object, as v0.2 wrote it. If you trust the file, read its four fields with "
                "--checkpoint.allow_legacy_pickle_restore true"
            )
        return guarded(path, lambda: _read_legacy_rng(path))
    state: dict[str, Any] = read_state(path)
    return state


def _unsafe_names(path: Path) -> list[str]:
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


class _LegacyRNGState:
    """Stands in for v0.2's class while its fields are read; takes both ways in which Python pickles a small class."""

    def __new__(cls, *values: Any) -> _LegacyRNGState:
        state = super().__new__(cls)
        state.__dict__.update(zip(_LEGACY_FIELDS, values, strict=False))
        return state


def _read_legacy_rng(path: Path) -> dict[str, Any]:
    make_array = np.empty(0).__reduce__()[0]
    admitted: list[Any] = [
        (_LegacyRNGState, _LEGACY_RNG_CLASS),
        *((make_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
    ]
    with torch.serialization.safe_globals(admitted):
        fields: dict[str, Any] = vars(torch.load(path, map_location="cpu", weights_only=True))
    if sorted(fields) != sorted(_LEGACY_FIELDS):
        raise ValueError(f"fields {sorted(fields)}")
    bit_generator, keys, position, has_gauss, cached_gaussian = fields.pop("np_rng_state")
    return {
        **fields,
        "np_bit_generator": str(bit_generator),
        "np_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "np_position": int(position),
        "np_has_gauss": int(has_gauss),
        "np_cached_gaussian": float(cached_gaussian),
    }
