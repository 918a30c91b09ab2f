"""Dropout on the fast layers: equal to the plain path under the same masks, and drawn anew when it must be."""

from __future__ import annotations

import pytest
import torch
from support.fast_models import PROJECTIONS, adapters_of, assert_same_step, fast_model, plain_model, tokens
from torch import nn

from nemo_automodel._transformers.assemble import recompute_activations
from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel.components._peft.lora import lora_layers
from nemo_automodel.components.fast import dropout as fast_dropout
from nemo_automodel.components.fast.fp8_store import Fp8Store
from nemo_automodel.components.fast.linear import InPlaceStore
from nemo_automodel.components.fast.names import GROUPS, Adapter, Slot
from nemo_automodel.components.fast.nf4_store import Nf4Fp8Store, Nf4Store
from nemo_automodel.components.fast.weight_store import DenseStore
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.kernels import nf4
from nemo_automodel.kernels.dropout import Dropout

TOLERANCE = 1e-11
SEEDS = [123456789012345678, 5]
"""One a layer."""


@pytest.fixture
def known_seeds(monkeypatch):
    """Give every forward pass of a model the seeds above instead of random ones."""
    given = []

    def draw(self, device):
        given.append(SEEDS[len(given) % len(SEEDS)])
        return torch.tensor([given[-1]])

    monkeypatch.setattr(fast_dropout.AdapterDropout, "draw_seed", draw)


def force_masks(model, position: str, probability: float, num_rows: int) -> None:
    """Have every adapter of a plain model use the masks of the fast layers in the place of torch's."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        number, path = int(name.split(".")[2]), name.split(".", 3)[3]
        group, paths = next((g, p) for g, p in GROUPS.items() if path in p)
        stream, slot, seed = 4 * list(GROUPS).index(group), paths.index(path), torch.tensor([SEEDS[number]])
        if position == "pre":
            mask = Dropout(seed, stream + slot, probability)
            factors = mask.apply(torch.ones(num_rows, layer.in_features, dtype=torch.float64))
        else:
            block = model.model.layers[number]
            widths = [block.get_submodule(p).out_features for p in paths]
            all_factors = Dropout(seed, stream, probability).apply(torch.ones(num_rows, sum(widths)).double())
            factors = all_factors.split(widths, dim=1)[slot]
        layer._update = update_with(layer, factors, position)


def update_with(layer, factors: torch.Tensor, position: str):
    def update(x: torch.Tensor) -> torch.Tensor:
        here = factors.view(*x.shape[:-1], -1)
        return layer._low_rank(x * here) if position == "pre" else layer._low_rank(x) * here

    return update


@pytest.mark.usefixtures("known_seeds")
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_same_as_the_plain_path_under_the_same_masks(family, recompute, position):
    for targets in (PROJECTIONS, ["q_proj", "v_proj"], ["o_proj"], ["k_proj", "up_proj"], ["down_proj"]):
        peft = adapters_of(targets, dropout=0.3, dropout_position=position)
        plain, fast = plain_model(family, peft), fast_model(family, peft, recompute=recompute)
        force_masks(plain, position, 0.3, 14)
        assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


@pytest.mark.usefixtures("known_seeds")
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("settings", [{"dim": 70}, {"use_rslora": True, "dim": 5}])
def test_ranks_and_scales(position, settings):
    peft = adapters_of(dropout=0.1, dropout_position=position, **settings)
    plain, fast = plain_model("qwen3", peft), fast_model("qwen3", peft)
    force_masks(plain, position, 0.1, 6)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(1, 6))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("make", [DenseStore, InPlaceStore, Fp8Store, Nf4Store, Nf4Fp8Store])
def test_every_store_leaves_the_adapters_to_the_masks(make, position):
    """Whatever a store makes of its weights, the masked share comes on top of what it gives without adapters."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    if make in (Nf4Store, Nf4Fp8Store):
        linear = Linear4bit.pack(linear, nf4.quantize(linear.weight.data), torch.float32, torch.uint8)
    adapter = Adapter(nn.Linear(64, 4, bias=False), nn.Linear(4, 48, bias=False), 1.5)
    store = make([Slot("o_proj", linear, adapter)])
    store.prepare()
    dropped = fast_dropout.AdapterDropout(0.4, position).over(store, torch.tensor([77]), 2)
    x, dy, residual = torch.randn(10, 64), torch.randn(10, 48), torch.randn(10, 48)
    x_TM, dy_TM = store.input_buffer(10), store.output_buffer(10)
    x_TM[:, :64], dy_TM[:, :48] = x, dy
    a, b, ones = adapter.lora_A.weight.detach(), 1.5 * adapter.lora_B.weight.detach(), torch.ones(10, 64)
    over_x, over_y = ones, ones[:, :48]
    if position == "pre":
        over_x = Dropout(torch.tensor([77]), 8, 0.4).apply(over_x)
    else:
        over_y = Dropout(torch.tensor([77]), 8, 0.4).apply(over_y)
    base, base_dx = store.forward(x_TM, None)[:, :48].clone(), store.dgrad(dy_TM, None).clone()
    low, dlow = dropped.low(x_TM), dropped.low_grad(dy_TM)
    update, dx_update = ((x * over_x) @ a.t() @ b.t()) * over_y, ((dy * over_y) @ b @ a) * over_x
    pending = dropped.pending(low)
    rest = 0 if pending is None else pending.product(torch.float32)
    torch.testing.assert_close(dropped.forward_pending(x_TM, low)[:, :48] + rest, base + update)
    torch.testing.assert_close(dropped.forward(x_TM, low)[:, :48], base + update)
    torch.testing.assert_close(dropped.forward_added(residual, x_TM, low), residual + base + update)
    da, db = dropped.adapter_grads(x_TM, dy_TM, low, dlow)
    torch.testing.assert_close(da, ((dy * over_y) @ b).t() @ (x * over_x))
    torch.testing.assert_close(db, 1.5 * (dy * over_y).t() @ ((x * over_x) @ a.t()))
    torch.testing.assert_close(dropped.dgrad(dy_TM, dlow), base_dx + dx_update)
    dx, pending = dropped.dgrad_pending(dy_TM, dlow)
    rest = 0 if pending is None else pending.product(torch.float32)
    torch.testing.assert_close(dx + rest, base_dx + dx_update)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_fused_with_their_layers(family, recompute, position, monkeypatch):
    """Each layer draws its own seed; one that is recomputed draws the same again."""
    peft = adapters_of(dropout=0.3, dropout_position=position)
    plain, fast = plain_model(family, peft), plain_model(family, peft)
    fuse_adapters(fast, recompute, fast_dropout.AdapterDropout(0.3, position))
    seeds: dict[int, list[int]] = {}
    over = fast_dropout.AdapterDropout.over

    def recorded(self, store, seed):
        seeds.setdefault(id(store), []).append(int(seed))
        return over(self, store, seed)

    monkeypatch.setattr(fast_dropout.AdapterDropout, "over", recorded)
    if recompute != "none":
        recompute_activations(fast, recompute)
    found = one_step(fast)
    layers, plain_layers = lora_layers(fast), lora_layers(plain)
    for name, layer in layers.items():
        drawn = seeds[id(layer.fused_core.store)]
        assert len(drawn) == (1 if recompute == "none" else 2)
        assert len(set(drawn)) == 1
        mask, other = Dropout(torch.tensor(drawn[:1]), 0, 0.3), plain_layers[name]
        width = other.in_features if position == "pre" else other.out_features
        other._update = update_with(other, mask.apply(torch.ones(14, width).double()), position)
    assert len({drawn[0] for drawn in seeds.values()}) == len(layers)
    for value, expected in zip(found, one_step(plain), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def one_step(model) -> list[torch.Tensor]:
    """Return the logits and the gradients of one step."""
    logits = model(input_ids=tokens(2, 7), use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.detach()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_masks_change_with_every_pass_and_follow_the_saved_random_state(position):
    fast = fast_model("llama", adapters_of(dropout=0.5, dropout_position=position))
    rng, ids = StatefulRNG(7), tokens(2, 5)
    first, state = logits_of(fast, ids), rng.state_dict()
    second = logits_of(fast, ids)
    assert not torch.equal(first, second)
    rng.load_state_dict(state)
    assert torch.equal(logits_of(fast, ids), second)
    StatefulRNG(7)
    assert torch.equal(logits_of(fast, ids), first)
    StatefulRNG(8)
    assert not torch.equal(logits_of(fast, ids), first)


def test_equal_layers_and_equal_rows_get_different_masks():
    """The same two rows, through layers with the same weights: nothing repeats."""
    fast = fast_model("llama", adapters_of(["down_proj"], dropout=0.5))
    ids = tokens(1, 5).repeat(2, 1)
    logits = logits_of(fast, ids)
    assert not torch.equal(logits[0], logits[1])
    seeds = [
        fast.model.layers[0].fast_core.for_pass(torch.device("cpu"), drops=True).down.masks[0].seed for _ in range(3)
    ]
    assert len({int(seed) for seed in seeds}) == 3


def test_nothing_is_dropped_in_evaluation():
    peft = adapters_of(dropout=0.5)
    plain, fast = plain_model("llama", peft).eval(), fast_model("llama", peft).eval()
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


def test_the_expected_update_is_the_one_without_dropout():
    """Averaged over many passes the output of one linear layer's adapter is what it is without dropout."""
    torch.manual_seed(0)
    x, b = torch.randn(4, 6, dtype=torch.float64), nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
    masks = [Dropout(torch.tensor([seed]), 0, 0.25) for seed in range(4000)]
    mean = torch.stack([mask.apply(x @ b.t()) for mask in masks]).mean(0)
    spread = (x @ b.t()).abs() * (1 / 3 / 4000) ** 0.5
    assert bool(((mean - x @ b.t()).abs() < 5 * spread).all())
