"""Whether a model's fast decoder layers are recorded as CUDA graphs: where a layer is shorter than its start takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from nemo_automodel.components.fast.decoder_layer import DecoderCore, FastDecoderLayer
from nemo_automodel.components.fast.graphs import CudaRecorder, Graphs, LayerGraphs
from nemo_automodel.components.fast.trained_layer import TrainedCore
from nemo_automodel.components.training.flops import peak_tflops
from nemo_automodel.shared.determinism import is_deterministic
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_START_SECONDS = 3.5e-3
"""What Python and the driver take to start a layer there and back: measured beside an H100, on 3 GHz cores."""
_SHARE_OF_PEAK = 0.45


def record_layers(layers: Sequence[nn.Module], wish: str, device: torch.device) -> None:
    """Have the layers recorded where they are shorter than the time it takes to start them, or where that is asked."""
    if wish == "off" or device.type != "cuda":
        if wish == "on":
            raise UserError(
                f"`model.cuda_graphs: on` needs an NVIDIA GPU, and the model is on the {device.type}. Set it to auto."
            )
        return
    core: DecoderCore = layers[0].fast_core  # type: ignore[assignment]
    is_asked = wish == "on"
    if is_deterministic() and not is_asked:
        # a resumed run computes its first batches unrecorded again, which is exact only if recordings are
        logger.info("Decoder layers: not recorded as CUDA graphs, `deterministic: true`.")
        return
    limit = math.inf if is_asked else _tokens_worth_recording(core, torch.cuda.get_device_name(device))
    graphs = Graphs(CudaRecorder(), limit, is_asked)
    for layer in layers:
        layer.graphs = LayerGraphs(graphs)  # type: ignore[assignment]


def _tokens_worth_recording(core: DecoderCore, card: str) -> float:
    """Return up to how many tokens of a micro-batch a layer is computed in less time than it takes to start it."""
    peak = peak_tflops(card)
    if peak is None:
        return 0
    num_weights = sum(store.num_in * store.num_out for store in core.stores)
    passes = 3 if isinstance(core, TrainedCore) else 2
    return _START_SECONDS * _SHARE_OF_PEAK * peak * 1e12 / (2 * passes * num_weights)


def forget_recordings(model: nn.Module) -> None:
    """Let go of what was recorded of a model's layers, and of its memory."""
    for layer in _recorded(model):
        layer.forget()


def recorded_bytes(model: nn.Module) -> int:
    """Return the memory of a model's recordings that does not count as allocated between them."""
    layers = _recorded(model)
    return layers[0].graphs.recorder.held_bytes() if layers else 0


def _recorded(model: nn.Module) -> list[LayerGraphs]:
    found = [module.graphs for module in model.modules() if isinstance(module, FastDecoderLayer)]
    return [graphs for graphs in found if isinstance(graphs, LayerGraphs)]
