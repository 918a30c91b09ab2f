"""Reading of texts: literals, environment placeholders, overrides."""

from __future__ import annotations

import ast
import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_automodel.components.config.env import interpolate
from nemo_automodel.components.config.loader import ConfigNode, translate_value
from nemo_automodel.shared.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", None),
        ("None", None),
        ("null", "null"),
        ("~", "~"),
        ("true", True),
        ("True", True),
        ("TRUE", "TRUE"),
        ("false", False),
        ("False", False),
        ("yes", "yes"),
        ("1", 1),
        ("-3", -3),
        ("1.10", 1.1),
        ("2024_01", 202401),
        ("1e-8", 1e-8),
        ("1e999", float("inf")),
        ("nan", "nan"),
        ("[1,2]", [1, 2]),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("[a,b]", "[a,b]"),
        ("['a','b']", ["a", "b"]),
        ("{'a':1}", {"a": 1}),
        ("{1, 2}", "{1, 2}"),
        ("b'x'", "b'x'"),
        ("1j", "1j"),
        ("...", "..."),
        ("'1'", "1"),
        ("train[:10]", "train[:10]"),
        ("*_proj", "*_proj"),
        ("{{ bos_token }}", "{{ bos_token }}"),
        ("", ""),
        (" 7", 7),
        ("'\\d'", "\\d"),
        ("1" * 1000, int("1" * 1000)),
        ("1" * 1001, "1" * 1001),
        ("[" * 500, "[" * 500),
        ("\0", "\0"),
    ],
)
def test_translate_value(text: str, value: object):
    found = translate_value(text)
    assert found == value
    assert type(found) is type(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=8,
)


@given(st.text())
def test_translate_value_never_raises(text: str):
    value = translate_value(text)
    assert isinstance(value, str | int | float | bool | list | tuple | dict | None)


@given(plain)
def test_literals_read_as_they_are_written(value: object):
    text = repr(value)
    if len(text) <= 1000:
        assert translate_value(text) == value == ast.literal_eval(text)


keys = st.from_regex(r"[a-z_][a-z0-9_]{0,5}(\.([a-z_][a-z0-9_]{0,5}|[0-9]{1,2})){0,3}", fullmatch=True)


@given(keys, st.text())
def test_an_override_is_had_back_under_its_key(key: str, text: str):
    node = ConfigNode({"lst": [{"a": 1}, {"a": 2}], "number": 3, "tree": {"b": {"c": 4}}})
    try:
        node.set_by_dotted(key, text)
        found = node.get(key)
    except ConfigError:
        assert key.startswith("lst.") or "$" in text
        return
    expected = translate_value(text)
    if "$" not in text:
        assert (found.to_dict() if isinstance(found, ConfigNode) else found) == (
            list(expected) if isinstance(expected, tuple) else expected
        )


trees = st.dictionaries(
    st.from_regex(r"[a-z_]{1,6}", fullmatch=True).filter(lambda key: key != "_target_" and not key.endswith("_fn")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        max_leaves=10,
    ),
    max_size=5,
)


@given(trees)
def test_a_saved_tree_reads_back_as_the_same_tree(tree: dict):
    try:
        node = ConfigNode(tree)
        values = node.to_dict()
    except ConfigError:
        assert "$" in repr(tree)
        return
    for use_orig_values in (False, True):
        text = yaml.safe_dump(node.to_yaml_dict(redact_sensitive=False, use_orig_values=use_orig_values))
        assert ConfigNode(yaml.safe_load(text)).to_dict() == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${NM_SET}", "seven"),
        ("${NM_SET,other}", "seven"),
        ("${oc.env:NM_SET}", "seven"),
        ("${oc.env:NM_SET,other}", "seven"),
        ("$NM_SET", "seven"),
        ("${NM_UNSET,other}", "other"),
        ("${NM_UNSET, 8}", "8"),
        ("${NM_UNSET,}", ""),
        ("${oc.env:NM_UNSET,a/b:c}", "a/b:c"),
        ("${nm.dotted}", "dot"),
        ("$nm.dotted", "dot"),
        ("$NM_SET.jsonl", "seven.jsonl"),
        ("a-${NM_SET}-$NM_SET/b", "a-seven-seven/b"),
        ("costs $5 or $", "costs $5 or $"),
        ("$$NM_SET and $${NM_SET}", "$NM_SET and ${NM_SET}"),
    ],
)
def test_interpolation(text: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_SET", "seven")
    monkeypatch.setenv("nm.dotted", "dot")
    monkeypatch.delenv("NM_UNSET", raising=False)
    assert interpolate(text, "a.b") == value


@pytest.mark.parametrize("text", ["${NM_UNSET}", "$NM_UNSET", "${oc.env:NM_UNSET}", "x ${NM_UNSET} y"])
def test_an_unset_variable_is_named_with_its_place(text: str):
    with pytest.raises(ConfigError, match=r"`wandb\.name`.*NM_UNSET"):
        interpolate(text, "wandb.name")


@pytest.mark.parametrize("text", ["${}", "${a b}", "${NM_SET", "${hydra:x}"])
def test_a_strange_placeholder_is_refused(text: str):
    with pytest.raises(ConfigError, match="not a placeholder"):
        interpolate(text, "a")


@given(st.text())
def test_interpolation_raises_nothing_but_config_errors(text: str):
    with contextlib.suppress(ConfigError):
        interpolate(text, "a")
