"""Weights as a torch distributed checkpoint, `model_dcp/`, for ``model_save_format: torch_save``.

`model/` then holds configuration and tokenizer but no weights, and its README says so. Every tensor is an entry of its
own under the name it has in the model, so another number of processes can read it later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.disk import write_file
from nemo_automodel.components.checkpoint.layout import MODEL_DCP_DIR, MODEL_DIR
from nemo_automodel.shared.errors import UserError

_SECTION = "model"
_NUM_LISTED = 3
_README = (
    f"The weights of this checkpoint are in `../{MODEL_DCP_DIR}/`, in torch's distributed format, because it was saved "
    "with `checkpoint.model_save_format: torch_save`. This directory alone holds no model: save with `safetensors` for "
    "files that other programs load.\n"
)

logger = logging.getLogger(__name__)


def write_model(checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write ``weights`` beside `model/`, which gets a note.

    Raises:
        OSError: no space, no permission.
    """
    dcp.write(checkpoint / MODEL_DCP_DIR, {_SECTION: dict(weights)})
    write_file(checkpoint / MODEL_DIR / "README.md", _README.encode())
    logger.info(
        "The weights are saved in %s/ (`model_save_format: torch_save`); %s/ has none", MODEL_DCP_DIR, MODEL_DIR
    )


def has_model(checkpoint: Path) -> bool:
    """Tell whether the weights of a checkpoint are in `model_dcp/`."""
    return (checkpoint / MODEL_DCP_DIR / dcp.METADATA_FILE).is_file()


@torch.no_grad()
def read_model(checkpoint: Path, live: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights that ``write_model`` wrote into ``live`` tensors, which keep their dtypes.

    Raises:
        UserError: files are missing or damaged, or names or shapes differ; nothing was copied then.
    """
    archive = dcp.Archive(checkpoint / MODEL_DCP_DIR)
    saved = {str(place[1]): value for place, value in archive.describe().items() if place[0] == _SECTION}
    different = sorted(saved.keys() ^ live.keys())
    different += sorted(name for name in saved.keys() & live.keys() if (saved[name] or (None,))[0] != live[name].shape)
    if different:
        more = f" and {len(different) - _NUM_LISTED} more" if len(different) > _NUM_LISTED else ""
        raise UserError(
            f"The weights in `{archive.directory}` are not those of this model: "
            f"{', '.join(different[:_NUM_LISTED])}{more} differ. Use the configuration they were saved with, or "
            "another checkpoint."
        )
    # straight into the live tensors where nothing has to be converted
    into: dict[dcp.Place, torch.Tensor] = {
        (_SECTION, name): tensor for name, tensor in live.items() if saved[name] == (tensor.shape, tensor.dtype)
    }
    read = archive.read(into)[_SECTION]
    for name, tensor in live.items():
        if (_SECTION, name) not in into:
            tensor.copy_(read[name])
