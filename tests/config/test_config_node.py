"""The tree: reading, editing, printing, calling."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from nemo_automodel.components.config.loader import ConfigNode, load_yaml_config, to_callable
from nemo_automodel.shared.errors import ConfigError

LOSS = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"


@pytest.fixture
def node() -> ConfigNode:
    return ConfigNode(
        {
            "optimizer": {"_target_": "torch.optim.Adam", "lr": "1e-5", "eps": "1e-8"},
            "lst": [{"a": 1}, "2", "x"],
            "version": "1.10",
            "id2label": {0: "no", 1: "yes"},
        }
    )


def test_reading(node: ConfigNode):
    assert node.optimizer.lr == 1e-5
    assert node["optimizer"].eps == 1e-8
    assert node.get("lst.0.a") == 1
    assert node.get("lst.1") == 2
    assert node.get("lst.9.a", "none there") == "none there"
    assert "optimizer.lr" in node
    assert "optimizer.momentum" not in node
    assert node.get("id2label.1") == "yes"
    assert node.get_as_string("version") == "1.10"
    assert node.version == 1.1
    assert list(node) == ["optimizer", "lst", "version", "id2label"]
    with pytest.raises(AttributeError, match=r"`optimizer` has no key `momentum`"):
        _ = node.optimizer.momentum
    with pytest.raises(KeyError):
        node["nothing"]


def test_editing(node: ConfigNode):
    node.set_by_dotted("lst.0.a", "5")
    node.set_by_dotted("lst.2", "y")
    node.set_by_dotted("a.new.place", "[1, 'b']")
    node.set_by_dotted("version.major", 1)
    node.seed = "3"
    assert node.to_dict() == {
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-5, "eps": 1e-8},
        "lst": [{"a": 5}, 2, "y"],
        "version": {"major": 1},
        "id2label": {0: "no", 1: "yes"},
        "a": {"new": {"place": [1, "b"]}},
        "seed": 3,
    }


@pytest.mark.parametrize("key", ["lst.x", "lst.3", "lst.x.y", "lst.-1", "a..b", ".a", "a."])
def test_edits_that_hit_nothing_are_refused(node: ConfigNode, key: str):
    before = node.to_dict()
    with pytest.raises(ConfigError):
        node.set_by_dotted(key, 1)
    assert node.to_dict() == before


def test_copies_are_independent(node: ConfigNode):
    for other in (node.copy(), copy.copy(node.copy())):
        other.optimizer.set_by_dotted("lr", 1)
        assert node.optimizer.lr == 1e-5
        assert other != node


def test_raw_config_is_the_file_before_overrides(node: ConfigNode):
    node.set_by_dotted("optimizer.lr", "3")
    assert node.raw_config["optimizer"]["lr"] == "1e-5"


def test_placeholders_and_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_TOKEN", "hf_secretsecretsecretsecret")
    monkeypatch.setenv("NM_TAGS", "['a', 'b']")
    node = ConfigNode(
        {
            "model": {"token": "${NM_TOKEN}", "pad_token": "<pad>", "lr": "1e-3"},
            "wandb": {"api_key": "literal", "tags": "${NM_TAGS}", "url": "https://me:pw@host/x", "auth": {"user": "u"}},
            "dataset": {"hf_token": "${NM_TOKEN,hf_default_default_default}"},
        }
    )
    assert node.model.token == "hf_secretsecretsecretsecret"
    assert node.wandb.tags == ["a", "b"]
    assert node.to_yaml_dict() == {
        "model": {"token": "${NM_TOKEN}", "pad_token": "<pad>", "lr": 1e-3},
        "wandb": {
            "api_key": "******",
            "tags": "${NM_TAGS}",
            "url": "https://******@host/x",
            "auth": {"user": "******"},
        },
        "dataset": {"hf_token": "******"},
    }
    assert node.to_yaml_dict(use_orig_values=True)["model"]["lr"] == "1e-3"
    assert node.to_yaml_dict(resolve_env=True)["model"]["token"] == "******"
    assert node.to_yaml_dict(resolve_env=True, redact_sensitive=False)["model"]["token"].startswith("hf_secret")
    assert "secretsecret" not in repr(node)


def test_a_value_from_the_environment_is_not_edited_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_ARGS", "{'a': 1}")
    node = ConfigNode({"x": "${NM_ARGS}"})
    assert node.x.a == 1
    with pytest.raises(ConfigError, match="comes from the environment"):
        node.set_by_dotted("x.a", 2)
    assert node.to_yaml_dict() == {"x": "${NM_ARGS}"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_loading_checks_variables_in_sections_in_use(tmp_path: Path):
    parked = "ci: {a: $NM_UNSET}\n_old: {b: $NM_UNSET}\nwandb: {enable: false, name: $NM_UNSET}\n"
    assert "ci" in load_yaml_config(write(tmp_path, parked))
    with pytest.raises(ConfigError, match=r"`model\.x\.0`.*NM_UNSET"):
        load_yaml_config(write(tmp_path, parked + "model: {x: [$NM_UNSET]}\n"))


def test_dates_and_anchors(tmp_path: Path):
    config = load_yaml_config(write(tmp_path, "a: &x {d: 2024-01-05}\nb: {<<: *x, e: 1}\nc: *x\n"))
    assert config.to_dict() == {"a": {"d": "2024-01-05"}, "b": {"d": "2024-01-05", "e": 1}, "c": {"d": "2024-01-05"}}


def bomb() -> str:
    return "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- 1\n- 2\n", "is a mapping of sections"),
        ("just text\n", "is a mapping of sections"),
        ("a: 1\nb: 2\na: 3\n", "line 3: the key `a` was already given on line 1"),
        ("x:\n  b: 2\n  b: 3\n", "line 3: the key `b` was already given on line 2"),
        ("a: [1, 2\n", "line 2, column 1"),
        ("a: 1\n b: 2\n", "line 2, column 3"),
        ("a: 'x\n", "line 2"),
        ("a: *nowhere\n", "line 1, column 4"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1, column 4"),
        ("a: &a [*a]\n", "nested too deeply"),
        (bomb(), "too large"),
        ("a: \x01\n", "not YAML"),
        ("a: {2.5: x}\n", "not text"),
        ("true: x\n", "not text"),
        ("? [1, 2]\n: x\n", "line 1"),
        ("a: !!map foo\n", "run.yaml"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError) as caught:
        load_yaml_config(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path):
    write(tmp_path, "a: 1")
    with pytest.raises(ConfigError, match=r"does not exist.*Did you mean `run\.yaml`"):
        load_yaml_config(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="Neither does its directory"):
        load_yaml_config(tmp_path / "no" / "run.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_yaml_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_yaml_config(tmp_path / ("x" * 300))


def test_instantiate():
    node = ConfigNode({"loss": {"_target_": LOSS, "ignore_index": 5}})
    assert node.loss.instantiate().ignore_index == 5
    assert node.loss.instantiate(ignore_index=6).ignore_index == 6
    assert node.instantiate_path("loss", None, ignore_index=7).ignore_index == 7
    assert node.instantiate_path("nothing", "default") == "default"


def test_instantiate_makes_nested_calls_and_plain_mappings():
    node = ConfigNode(
        {
            "a": {
                "_target_": "torch.utils.data.DataLoader",
                "dataset": {"_target_": "torch.utils.data.TensorDataset"},
                "batch_size": "2",
                "collate_fn": "torch.utils.data.default_collate",
            }
        }
    )
    import torch
    from torch.utils.data import DataLoader, TensorDataset, default_collate

    node.a.dataset["_target_"] = lambda: TensorDataset(torch.arange(5))
    loader = node.a.instantiate()
    assert isinstance(loader, DataLoader)
    assert loader.collate_fn is default_collate
    assert [len(batch[0]) for batch in loader] == [2, 2, 1]
    config = ConfigNode({"c": {"_target_": "transformers.GPT2Config", "n_embd": 32, "extra": {"b": [1, {"c": 2}]}}})
    made = config.c.instantiate()
    assert (made.n_embd, made.extra) == (32, {"b": [1, {"c": 2}]})


def test_instantiate_refuses_what_the_target_does_not_take():
    node = ConfigNode({"opt": {"_target_": "torch.optim.AdamW", "lr": -1.0}})
    with pytest.raises(ConfigError, match=r"`opt` lacks `params`"):
        node.opt.instantiate()
    import torch

    weights = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ConfigError, match=r"AdamW refused its arguments: Invalid learning rate: -1\.0"):
        node.opt.instantiate(params=weights)
    node.set_by_dotted("opt.betaz", 1)
    with pytest.raises(ConfigError, match=r"takes no `betaz`. Did you mean `betas`"):
        node.opt.instantiate(params=weights)
    with pytest.raises(ConfigError, match="has no `_target_`"):
        ConfigNode({"x": {"a": 1}}).x.instantiate()


def test_to_callable():
    from torch.utils.data import default_collate

    assert to_callable("torch.utils.data.default_collate", "collate_fn") is default_collate
    node = ConfigNode({"collate_fn": {"_target_": "torch.nn.functional.cross_entropy", "ignore_index": 3}})
    assert to_callable(node.collate_fn, "collate_fn").keywords == {"ignore_index": 3}
    with pytest.raises(ConfigError, match="but a target is a dotted path"):
        to_callable(3, "collate_fn")


def test_saved_yaml_is_plain(tmp_path: Path):
    node = ConfigNode({"betas": "(0.9, 0.95)", "name": "'1'", "f": yaml.safe_load})
    text = yaml.safe_dump(node.to_yaml_dict())
    assert yaml.safe_load(text) == {"betas": [0.9, 0.95], "name": "'1'", "f": "yaml.safe_load"}
    assert ConfigNode(yaml.safe_load(text)).name == "1"
