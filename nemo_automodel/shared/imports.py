"""Optional packages: one way to ask for them, one message when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from nemo_automodel.shared.errors import UserError

# package → the extra of this project that installs it; packages without an extra are installed by their own name
_EXTRAS = {
    "bitsandbytes": "qlora",
    "accelerate": "qlora",
    "gguf": "demo",
    "triton": "kernels",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


def is_available(package: str) -> bool:
    """Tell whether ``package`` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: the package is not installed; the message holds the exact pip line.
    """
    name = package.partition(".")[0]
    if not is_available(name):
        extra = _EXTRAS.get(name)
        what = f"'nemo-automodel[{extra}]'" if extra else name
        raise UserError(f"{purpose} needs the package `{name}`, which is not installed. Run: pip install {what}")
    return importlib.import_module(package)
