"""Building optimizers: what trains, in which group, and what a wrong key says."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components.optim.optimizer import build_optimizer, parse_overrides, prepare_kwargs
from nemo_automodel.shared.errors import ConfigError, UserError


def make_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    model[0].weight.requires_grad = False
    return model


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("extra", [{}, {"foreach": True}, {"fused": True}])
def test_updates_equal_an_optimizer_built_by_hand(extra):
    values = {"lr": 1e-2, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.1, **extra}
    ours, theirs = make_model(), make_model()
    built = train(ours, build_optimizer(ours, torch.optim.AdamW, values))
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    by_hand = torch.optim.AdamW(
        trainable, lr=1e-2, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.1, **(extra or {"fused": True})
    )
    expected = train(theirs, by_hand)
    assert all(torch.equal(built[name], expected[name]) for name in expected)
    assert torch.equal(built["0.weight"], make_model()[0].weight)


def test_overrides_make_groups_and_the_first_match_wins():
    entries = [{"pattern": r"^2\.", "lr_mult": 0.1}, {"pattern": "bias", "wd_mult": 0.0}]
    model = make_model()
    optimizer = build_optimizer(model, torch.optim.Adam, {"lr": 1.0}, parse_overrides(entries))
    names = {p: name for name, p in model.named_parameters()}
    groups = [([names[p] for p in g["params"]], g.get("lr_mult"), g.get("wd_mult")) for g in optimizer.param_groups]
    assert groups == [
        (["1.weight"], None, None),
        (["2.weight", "2.bias"], 0.1, 1.0),
        (["0.bias", "1.bias"], 1.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"pattern": "x", "lr": 0.1}], "unknown key `lr`"),
        ([{"lr_mult": 0.1}], "has no `pattern`"),
        ([{"pattern": "("}], "is not a regular expression"),
    ],
)
def test_wrong_overrides_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(entries)


def test_an_override_that_finds_nothing_is_refused():
    with pytest.raises(UserError, match=r"`router` finds no trainable parameter.*`0.bias`"):
        build_optimizer(make_model(), torch.optim.Adam, {}, parse_overrides([{"pattern": "router"}]))


def test_an_unknown_key_is_refused_before_a_model_exists():
    with pytest.raises(ConfigError, match=r"`optimizer.weight_decy`: Adam takes no.*Did you mean `weight_decay`"):
        prepare_kwargs(torch.optim.Adam, {"weight_decy": 0.1})


def test_dtype_words_become_dtypes():
    def optimizer(params, master_weight_dtype=None, exp_avg_dtype=None): ...

    prepared = prepare_kwargs(optimizer, {"master_weight_dtype": "torch.bfloat16", "exp_avg_dtype": "fp32"})
    assert prepared == {"master_weight_dtype": torch.bfloat16, "exp_avg_dtype": torch.float32}
    with pytest.raises(ConfigError, match=r"`optimizer.exp_avg_dtype: float33` is not a dtype"):
        prepare_kwargs(optimizer, {"exp_avg_dtype": "float33"})


@pytest.mark.parametrize("values", [{"lr": -1.0}, {"fused": True, "foreach": True}, {"betas": 3}])
def test_what_the_optimizer_refuses_is_one_line(values):
    with pytest.raises(UserError, match=r"^`optimizer`: Adam refuses its arguments: .*\.$"):
        build_optimizer(make_model(), torch.optim.Adam, values)


def test_nothing_to_train_is_refused():
    model = make_model().requires_grad_(False)
    with pytest.raises(UserError, match="No parameter of the model is trainable"):
        build_optimizer(model, torch.optim.Adam, {})


def test_small_updates_of_16_bit_weights_are_warned_of_once(caplog):
    build_optimizer(make_model(), torch.optim.Adam, {})
    assert caplog.text == ""
    build_optimizer(make_model().bfloat16(), torch.optim.Adam, {})
    assert len(caplog.records) == 1
    assert "is rounded away, and Adam keeps no finer copy" in caplog.text


def test_an_optimizer_of_another_package_trains():
    bnb = pytest.importorskip("bitsandbytes")
    model = make_model()
    optimizer = build_optimizer(model, bnb.optim.AdamW8bit, {"lr": 1e-2, "betas": [0.9, 0.95]})
    before = model[2].weight.detach().clone()
    train(model, optimizer, steps=1)
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("target", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("kwargs", "is_fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, False), ({"fused": True}, True)]
)
def test_torchs_adam_is_fused_unless_the_user_chose(target, kwargs, is_fused):
    values = {"lr": 1e-2, "weight_decay": 0.1}
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, target, {**values, **kwargs})
    assert bool(optimizer.defaults["fused"]) is is_fused
    by_hand = target([p for p in theirs.parameters() if p.requires_grad], foreach=False, **values)
    built, expected = train(ours, optimizer), train(theirs, by_hand)
    for name, weight in expected.items():
        torch.testing.assert_close(built[name], weight, rtol=1e-6, atol=1e-7)
