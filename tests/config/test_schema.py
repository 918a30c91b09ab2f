"""Sections against dataclasses and signatures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.config.schema import build, check_target, near_miss
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError


@dataclass(frozen=True)
class Sample:
    """A section."""

    count: int = 3
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    limit: int | None = None
    mode: bool | str = False
    signal: str | int | list[str | int] | None = "A"
    tags: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("count", 4, 4),
        ("count", "4", 4),
        ("rate", 1, 1.0),
        ("rate", "1e-8", 1e-8),
        ("name", "run", "run"),
        ("name", "1.10", "1.10"),
        ("name", "2024_01", "2024_01"),
        ("name", 7, "7"),
        ("flag", "true", True),
        ("limit", None, None),
        ("limit", "none", None),
        ("mode", "final", "final"),
        ("mode", True, True),
        ("signal", 12, 12),
        ("signal", ["A", 2], ["A", 2]),
        ("signal", None, None),
        ("tags", "['a']", ["a"]),
        ("options", {"a": {"b": 1}}, {"a": {"b": 1}}),
        ("anything", {"a": 1}, ConfigNode({"a": 1})),
    ],
)
def test_values_that_fit(key: str, written: Any, value: Any):
    built = getattr(build(Sample, ConfigNode({key: written}), "s"), key)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("count", "many", "`s.count` is `many`, but it must be a whole number. Change it, or leave it out for 3."),
        (
            "limit",
            "null",
            "`s.limit` is `null`, but it must be a whole number or null. On the command line null is written none.",
        ),
        ("count", True, "`s.count` is true, but it must be a whole number."),
        ("count", 3.0, "`s.count` is 3.0, but it must be a whole number. Write 3."),
        ("count", None, "`s.count` is null, but it must be a whole number."),
        ("count", [1], "`s.count` is [1], but it must be a whole number."),
        ("count", {"a": 1}, "`s.count` is a mapping, but it must be a whole number."),
        ("rate", "fast", "`s.rate` is `fast`, but it must be a number."),
        ("rate", False, "`s.rate` is false, but it must be a number."),
        ("name", None, "`s.name` is null, but it must be text."),
        ("name", True, "`s.name` is true, but it must be text."),
        ("flag", "yess", "`s.flag` is `yess`, but it must be true or false. Write true or false without quotes."),
        ("flag", 1, "`s.flag` is 1, but it must be true or false."),
        ("limit", 1.5, "`s.limit` is 1.5, but it must be a whole number or null."),
        ("tags", "a", "`s.tags` is `a`, but it must be a list of texts."),
        ("tags", [1], "`s.tags` is [1], but it must be a list of texts."),
        ("options", "x", "`s.options` is `x`, but it must be a mapping."),
        ("cuont", 1, "`s.cuont`: unknown key `cuont`. Did you mean `count`? Correct or remove it."),
        ("zzz", 1, "Known: count, rate, name"),
    ],
)
def test_values_that_do_not(key: str, written: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        build(Sample, ConfigNode({key: written}), "s")
    assert message in str(caught.value)


def test_sections():
    assert build(Sample, None, "s") == Sample()
    with pytest.raises(ConfigError, match="`s` is 3, but it must be a mapping of keys"):
        build(Sample, 3, "s")
    built = build(Sample, ConfigNode({"count": 1, "other": {"a": [1, {"b": 2}]}}), "s", open_field="options")
    assert built.options == {"other": {"a": [1, {"b": 2}]}}
    with pytest.raises(ConfigError, match="Did you mean `count`"):
        build(Sample, ConfigNode({"cuont": 1}), "s", open_field="options")


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("torch_dtpye", "torch_dtype"),
        ("attn_implementaton", "attn_implementation"),
        ("atn_implementaton", "attn_implementation"),
        ("backand", "backend"),
        ("torch_dtype", None),
        ("dtype", None),
        ("device_map", None),
        ("rope_scaling", None),
        ("num_hidden_layers", None),
    ],
)
def test_near_misses(word: str, known: str | None):
    assert near_miss(word, ["torch_dtype", "attn_implementation", "backend", "device_mesh"]) == known


LOSS = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"


@pytest.mark.parametrize(
    ("section", "runtime", "message"),
    [
        (
            {"_target_": LOSS, "ignore_indx": 1},
            (),
            "`x.ignore_indx`.*takes no `ignore_indx`. Did you mean `ignore_index`",
        ),
        ({"_target_": LOSS, "fp32_upcast": "maybe"}, (), "`x.fp32_upcast` is `maybe`, but it must be true or false"),
        ({"_target_": LOSS, "ignore_index": 1.5}, (), "must be a whole number"),
        ({"_target_": "torch.optim.AdamW", "lr": 1}, (), "`x` lacks `params`"),
        (
            {"_target_": "torch.optim.AdamW", "params": 1, "beta": 1},
            ("params",),
            "takes no `beta`. Did you mean `betas`",
        ),
        ({"_target_": "torch.optim.AdamW", "weight_decay": "big"}, ("params",), "`x.weight_decay` is `big`"),
        ({"_target_": f"{LOSS}s"}, (), r"has no `MaskedCrossEntropys`\. Did you mean `MaskedCrossEntropy`"),
        ({"a": 1}, (), "`x` has no `_target_`"),
        ({"_target_": LOSS, "ignore_index": {"_target_": f"{LOSS}", "q": 1}}, (), r"`x\.ignore_index\.q`"),
        (
            {"_target_": "transformers.AutoConfig.from_pretrained", "a": [{"_target_": LOSS, "q": 1}]},
            (),
            r"`x\.a\.0\.q`",
        ),
    ],
)
def test_calls_that_do_not_fit(section: dict, runtime: tuple, message: str):
    with pytest.raises(ConfigError, match=message):
        check_target(ConfigNode({"x": section}).x, runtime=runtime)


def test_calls_that_fit():
    node = ConfigNode({"x": {"_target_": LOSS, "reduction": "1.10", "_recursive_": True}})
    signature = check_target(node.x)
    assert signature is not None
    assert node.x.reduction == "1.10"
    assert ConfigNode(node.to_yaml_dict()).x.reduction == "1.10"
    assert check_target(ConfigNode({"x": {"_target_": "transformers.AutoConfig.from_pretrained", "any": 1}}).x) is None


@pytest.mark.parametrize(
    "path",
    [
        "nemo_automodel.components.datasets.vlm.datasets.make_medpix_dataset",
        "nemo_automodel.components.loss.kd_loss.KDLoss",
        "nemo_automodel.NeMoAutoModelBiEncoder.from_pretrained",
        "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining",
        "nemo_automodel.components.models.deepseek_v4.config.DeepseekV4Config",
    ],
)
def test_targets_of_later_versions(path: str):
    with pytest.raises(NotSupportedYetError, match="not supported yet"):
        check_target(ConfigNode({"x": {"_target_": path}}).x)
