"""`torch.compile` over a model, whole or decoder layer by decoder layer.

Compiled in place, so that no name changes. The work is done when the first batches come, minutes for a large model and
again for shapes that were not seen: layer by layer it is done once for all layers, which are alike. What would fail
then is asked before: settings that PyTorch refuses, and compilers that are not there.

A compiled model computes with Transformers' layers (`fast_layers` says so); its loss is made of logits where the whole
model is one graph, and with the head in one step where only layers are compiled.
"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nemo_automodel._transformers.packing_masks import Machine
from nemo_automodel.components.quantization.config import CompileConfig
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_DEFAULT_BACKEND = "inductor"


def compile_model(model: PreTrainedModel, cfg: CompileConfig | None, compile_layers: bool) -> None:
    """Compile the whole model if ``cfg`` is enabled, else every decoder layer if ``compile_layers``; log which.

    Raises:
        UserError: PyTorch refuses a setting, a compiler is missing, or there are no decoder layers.
    """
    is_whole = cfg is not None and cfg.enabled
    if not (is_whole or compile_layers):
        return
    cfg = cfg or CompileConfig()
    modules: list[torch.nn.Module] = [model]
    if not is_whole:
        modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not modules:
        raise UserError(
            f"{type(model).__name__} has no decoder layers to compile one by one. Use `compile.enabled: true`."
        )
    backend = cfg.backend or _DEFAULT_BACKEND
    _check_compilers(backend, model.device)
    torch._dynamo.config.recompile_limit = cfg.dynamo_cache_size_limit
    kwargs: dict[str, Any] = {
        "fullgraph": cfg.fullgraph,
        # rows differ in length: `False` would compile again for every length, `None` makes lengths symbolic when needed
        "dynamic": cfg.dynamic or None,
        "backend": backend,
        "mode": None if cfg.mode == "default" else cfg.mode,
        "options": cfg.options or None,
    }
    try:
        for module in modules:
            module.compile(**kwargs)
    except RuntimeError as error:  # nothing is compiled yet: these are settings that are not known
        reason = str(error).splitlines()[0].partition(", known options")[0].rstrip(".")
        raise UserError(f"`compile`: PyTorch refuses its settings: {reason}. Change that key.") from error
    what = "the whole model" if is_whole else f"{len(modules)} decoder layers, one by one"
    logger.info("Compiled: %s, backend %s, mode %s. The first steps are slow.", what, backend, cfg.mode)


def _check_compilers(backend: str, device: torch.device) -> None:
    """Refuse the default backend where it cannot make machine code, before the first batch.

    Raises:
        UserError: Triton or a compiler is missing.
    """
    if backend != _DEFAULT_BACKEND:
        return
    machine = Machine.of(device)
    if device.type == "cuda" and not machine.has_triton:
        missing, remedy = "the package triton", "Run: pip install triton"
    elif device.type == "cuda" and not machine.has_compiler:
        missing, remedy = "a C compiler and Python's headers", "Install gcc and python3-dev"
    elif device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing, remedy = "a C++ compiler", "Install g++"
    else:
        return
    raise UserError(
        f"Compiling needs {missing}, which this machine has not. {remedy}, or set `compile.enabled` and "
        "`distributed.enable_compile` to false."
    )
