"""The switch ``deterministic: true``: the same run on the same GPU gives the same bits, however often it is started.

On a GPU a sum may be added up in the order in which its parts happen to be finished, and the last digits follow. The
switch leaves kernels that add in a fixed order:

* PyTorch's strict mode, in which operations take such a form or refuse. It rules cuDNN's attention out and has the
  flash and the memory-efficient backward pass add in a fixed order; `torch.compile` measures nothing in it.
* cuBLAS with work spaces of its own for every stream.
* Choices by a rule: fast layers are not measured (`_transformers/kernel_choice`) and, unless that is asked for, not
  recorded, since a resumed run computes its first batches unrecorded again.

Our own kernels need nothing: what several programs add up, they leave as partial sums, and one adds these in order.

The price is the speed of cuDNN's attention, and recordings where layers are short. PyTorch's strict mode would also
fill all new memory with NaN; that is left out, because nothing here reads memory before it is written.
"""

from __future__ import annotations

import logging
import os

import torch

from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CONFIGS = (":4096:8", ":16:8")
"""Work spaces with which cuBLAS computes alike every time, by its manual; the first is what Hopper has anyway."""
_FLASH_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"
"""Transformers reads it where the package flash_attn computes attention."""

_turned_on = False


def switch_determinism(wanted: bool) -> None:
    """Turn the switch on, before anything is computed on a GPU; or off, if it was turned on here for another run.

    What somebody else has set in this process stays as it is.

    Raises:
        UserError: cuBLAS is configured otherwise, or CUDA has started without the configuration.
    """
    global _turned_on
    if wanted:
        uses_gpu = torch.cuda.is_available()
        if uses_gpu:
            _configure_cublas()
        os.environ[_FLASH_VARIABLE] = "1"
        _set_torch(True)
        _turned_on = True
        logger.info("%s", describe(uses_gpu))
    elif _turned_on:
        del os.environ[_FLASH_VARIABLE]
        _set_torch(False)
        _turned_on = False


def describe(uses_gpu: bool) -> str:
    """Return in one line that the switch is on, and what it changes."""
    if not uses_gpu:
        return "Deterministic: on (PyTorch's strict mode); on the CPU it changes nothing but refuses what has no order."
    return (
        f"Deterministic: on ({CUBLAS_VARIABLE}={os.environ[CUBLAS_VARIABLE]}, PyTorch's strict mode): attention never "
        "by cuDNN, kernels of fast layers by a rule and not measured, layers recorded only by `model.cuda_graphs: on`."
    )


def _configure_cublas() -> None:
    given = os.environ.get(CUBLAS_VARIABLE)
    if given is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UserError(
            f"`deterministic: true`, but this process has used CUDA already, and cuBLAS reads {CUBLAS_VARIABLE} when "
            f"CUDA starts. Start Python with {CUBLAS_VARIABLE}={CUBLAS_CONFIGS[0]}."
        )
    if given is not None and given not in CUBLAS_CONFIGS:
        raise UserError(
            f"{CUBLAS_VARIABLE} is {given}, but `deterministic: true` needs {' or '.join(CUBLAS_CONFIGS)}. Unset it, "
            f"and {CUBLAS_CONFIGS[0]} is taken."
        )
    os.environ[CUBLAS_VARIABLE] = given or CUBLAS_CONFIGS[0]


def _set_torch(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted)
    # true is PyTorch's default, and costs a pass over all memory that a step asks for
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False
