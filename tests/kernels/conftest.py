"""Triton's kernels run in its interpreter here, and only here: the rest of the test process sees Triton as it is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_automodel.kernels import dropped_products, lora, swiglu_lora_triton
from nemo_automodel.kernels.jit import HAS_TRITON

KERNELS = Path(__file__).resolve().parents[2] / "nemo_automodel" / "kernels"


@pytest.fixture(scope="module", autouse=True)
def interpreted_kernels() -> Iterator[None]:
    """Put an interpreted function in the place of every kernel of the package and of every function of Triton's own.

    `TRITON_INTERPRET=1` does the same for a whole process, if it is set before anybody imports Triton.
    """
    if not HAS_TRITON:
        yield
        return
    importlib.import_module("triton.experimental.gluon")  # Triton loads it in the first call, too late for us
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names = ["triton.language", "triton.language.standard"]
    names += [f"nemo_automodel.kernels.{path.stem}" for path in KERNELS.glob("[!_]*.py")]
    with pytest.MonkeyPatch.context() as patch:
        for module in map(importlib.import_module, names):
            for name, value in vars(module).copy().items():
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        yield


@pytest.fixture(params=[32, 64], ids="{} rows".format)
def tile_height(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tiles the height they have on Hopper with a sound assembler, and the height they have elsewhere."""
    for module in (lora, dropped_products, swiglu_lora_triton):
        monkeypatch.setattr(module, "tile_rows", lambda device: request.param)
