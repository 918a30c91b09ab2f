"""The grammar of the command line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_automodel.components.config import targets
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, parse_command_line
from nemo_automodel.shared.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--a.b", "1"], [("a.b", "1")]),
        (["--a.b=1"], [("a.b", "1")]),
        (["--a.b="], [("a.b", "")]),
        (["--a.b=x=y"], [("a.b", "x=y")]),
        (["--a.b=--c"], [("a.b", "--c")]),
        (["--a.b", "-1"], [("a.b", "-1")]),
        (["--a.b", "--c"], [("a.b", True), ("c", True)]),
        (["--a.b"], [("a.b", True)]),
        (["--a", "1", "--a", "2"], [("a", "1"), ("a", "2")]),
        (["--seed", "3", "--lst.0.x-y", "z"], [("seed", "3"), ("lst.0.x-y", "z")]),
    ],
)
@pytest.mark.parametrize("config", [["-c", "r.yaml"], ["--config", "r.yaml"], ["--config=r.yaml"]])
@pytest.mark.parametrize("config_first", [True, False])
def test_overrides(words: list[str], overrides: list, config: list[str], config_first: bool):
    line = parse_command_line(config + words if config_first else words + config)
    assert line.overrides == overrides
    assert line.config_path == "r.yaml"


@pytest.mark.parametrize(
    "words",
    [
        ["run.yaml", "--a.b", "100"],
        ["--a.b", "100", "run.yaml"],
        ["--a.b=100", "run.yaml"],
        ["--nproc-per-node", "1", "run.yaml", "--a.b", "100"],
        ["--nproc_per_node=1", "--debug", "run.yaml", "--a.b", "100"],
        ["--allow-target", "my_package", "--a.b", "100", "run.yaml"],
    ],
)
def test_the_config_path_stands_anywhere(words: list[str]):
    line = parse_command_line(words, takes_positional=True)
    assert (line.config_path, line.overrides) == ("run.yaml", [("a.b", "100")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "`stray` is neither"),
        (["--a.b", "1", "stray"], r"`stray` \(after `--a\.b`\) is neither"),
        (["-x", "1"], "`-x` is neither"),
        (["-c"], "`-c` needs a value"),
        (["--config"], "`--config` needs a value"),
        (["-c", "a.yaml", "-c", "b.yaml"], "two config files"),
        (["-c", "a.yaml", "--config", "b.yaml"], "two config files"),
        (["--"], "is not an override"),
        (["--=3"], "is not an override"),
        (["--a..b", "3"], "is not an override"),
        (["--.a", "3"], "is not an override"),
        (["--a.", "3"], "is not an override"),
        (["--3", "x"], "is not an override"),
        (["--nproc-per-node", "two"], "not a number of processes"),
        (["--nproc-per-node", "0"], "not a number of processes"),
        (["--nproc-per-node"], "needs a value"),
        (["--allow-target"], "needs a value"),
    ],
)
def test_words_that_fit_nowhere(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        parse_command_line(words)


@given(st.lists(st.text(max_size=8) | st.sampled_from(["--a.b", "--a.b=1", "-c", "x.yaml", "--debug"]), max_size=6))
def test_nothing_but_user_errors(words: list[str]):
    for takes_positional in (True, False):
        with contextlib.suppress(UserError):
            parse_command_line(words, takes_positional)


key = st.from_regex(r"[a-z_]{1,5}(\.[a-z0-9_]{1,5}){0,2}", fullmatch=True).filter(
    lambda name: name not in ("debug", "config", "allow_target", "nproc_per_node")
)
value = st.text(max_size=8).filter(lambda text: not text.startswith("--") and text != "-c")


@given(st.lists(st.tuples(key, value, st.booleans()), max_size=5))
def test_what_is_written_is_what_is_read(pairs: list[tuple[str, str, bool]]):
    words = [word for k, v, joined in pairs for word in ([f"--{k}={v}"] if joined else [f"--{k}", v])]
    assert parse_command_line(words).overrides == [(k, v) for k, v, _ in pairs]


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("a: {b: 1, c: [{x: 1}, {x: 2}]}\nname: ${NM_UNSET}\n")
    return path


def test_overrides_come_before_everything_else(run_yaml: Path):
    argv = ["-c", str(run_yaml), "--a.b", "1e-3", "--a.c.1.x", "none", "--a.new", "--name", "given"]
    config = parse_args_and_load_config(argv=argv)
    assert config.to_dict() == {"a": {"b": 1e-3, "c": [{"x": 1}, {"x": None}], "new": True}, "name": "given"}
    assert config.raw_config == {"a": {"b": 1, "c": [{"x": 1}, {"x": 2}]}, "name": "${NM_UNSET}"}


def test_overrides_understand_the_environment(run_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_LR", "0.5")
    config = parse_args_and_load_config(argv=["-c", str(run_yaml), "--a.b", "$NM_LR", "--name", "x"])
    assert config.a.b == 0.5
    assert config.to_yaml_dict()["a"]["b"] == "$NM_LR"


def test_the_default_config(run_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run_yaml.parent)
    assert parse_args_and_load_config("run.yaml", ["--name", "x"]).a.b == 1
    with pytest.raises(ConfigError, match=r"`other\.yaml` does not exist"):
        parse_args_and_load_config("other.yaml", [])
    with pytest.raises(ConfigError, match="no config file is given"):
        parse_args_and_load_config(None, [])
    with pytest.raises(ConfigError, match=r"`run\.yaml` was read as the value of --a\.flag"):
        parse_args_and_load_config(None, ["--a.flag", "run.yaml"])


@pytest.mark.parametrize(
    "override",
    [
        ["--a._target_", "os.system"],
        ["--collate_fn", "os.system"],
        ["--a", "{'_target_': 'os.system'}"],
        ["--a.c.0._target_=torch.load"],
    ],
)
def test_hostile_overrides(run_yaml: Path, override: list[str]):
    with pytest.raises(ConfigError, match=r"os\.system|torch\.load"):
        parse_args_and_load_config(argv=["-c", str(run_yaml), "--name", "x", *override])


def test_allow_target_is_a_flag_and_no_override(run_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets._Fence, "prefixes", ())
    argv = ["-c", str(run_yaml), "--name", "x", "--a._target_", "numpy.linalg.norm"]
    with pytest.raises(ConfigError, match="--allow-target numpy"):
        parse_args_and_load_config(argv=argv)
    config = parse_args_and_load_config(argv=[*argv, "--allow-target", "numpy"])
    assert "allow_target" not in config.to_yaml_dict()
    assert targets._Fence.prefixes == ("numpy",)


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_request:
        parse_args_and_load_config("default.yaml", ["--help"])
    assert exit_request.value.code == 0
    assert "default.yaml" in capsys.readouterr().out
