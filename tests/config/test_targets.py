"""The fence around `_target_`: what may be named, and that nothing else is reached by any detour."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode, load_yaml_config
from nemo_automodel.shared.errors import ConfigError, UserError

ALLOWED = [
    "torch.optim.AdamW",
    "torch.optim.Adafactor",
    "torch.add",
    "torch.nn.functional.linear",
    "torch.utils.data.DataLoader",
    "torch.utils.data.default_collate",
    "torch.distributed.fsdp.MixedPrecisionPolicy",
    "torchdata.stateful_dataloader.StatefulDataLoader",
    "transformers.AutoConfig.from_pretrained",
    "transformers.AutoTokenizer.from_pretrained",
    "transformers.models.qwen3_moe.configuration_qwen3_moe.Qwen3MoeConfig",
    "peft.LoraConfig",
    "bitsandbytes.optim.AdamW8bit",
    "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy",
    "nemo_automodel.components._peft.lora.PeftConfig",
]
HOSTILE = [
    # outside
    "os.system",
    "posix.system",
    "builtins.eval",
    "subprocess.run",
    "pickle.loads",
    "importlib.import_module",
    "functools.partial",
    "yaml.unsafe_load",
    "numpy.load",
    # bare names and nonsense
    "eval",
    "exec",
    "",
    "torch.",
    ".os",
    "torch.optim.AdamW()",
    "torch .load",
    "os;torch.optim",
    "nemo_automodel",
    # standard modules that allowed modules import
    "torch.os.system",
    "torch.sys.exit",
    "torch.sys.modules.get",
    "torch.serialization.pickle.loads",
    "torch.utils.data.dataloader.functools.partial",
    "torch.utils.data.dataloader.os.remove",
    "torch.optim.optimizer.warnings.warn",
    "torch.nn.modules.module.itertools.count",
    "transformers.utils.import_utils.os.system",
    "transformers.utils.import_utils.importlib.import_module",
    "transformers.utils.import_utils.subprocess.run",
    "transformers.utils.logging.os.remove",
    "transformers.utils.logging.threading.Thread",
    "datasets.arrow_dataset.os.remove",
    "datasets.arrow_dataset.tempfile.mkdtemp",
    "datasets.arrow_dataset.Path",
    "peft.peft_model.os.remove",
    "peft.peft_model.warnings.warn",
    "bitsandbytes.functional.ct.CDLL",
    "nemo_automodel.import_module",
    # names from elsewhere that allowed modules hold
    "torch.optim.optimizer.deepcopy",
    "torch.utils.data.dataset.Generic",
    "torch.nn.modules.module.OrderedDict",
    "transformers.modeling_utils.partial",
    "peft.peft_model.snapshot_download",
    # private parts
    "torch.nn.Module.__init__",
    "torch.nn.Module.__class__",
    "torch.nn.Module.forward.__globals__",
    "torch._C._load_for_lite_interpreter",
    "torch._inductor.codecache.PyCodeCache.load",
    "torch._utils_internal.get_file_path",
    "nemo_automodel._PUBLIC",
    "nemo_automodel.components.loss.masked_ce._x",
    # what loads or runs code
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.storage.torch.load",
    "bitsandbytes.functional.torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.model_zoo.load_url",
    "torch.utils.collect_env.run",
    "torch.utils.benchmark.Timer",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.ops.load_library",
    "torch.classes.load_library",
    "torch.compiler.load_cache_artifacts",
    "torch.cuda.memory.CUDAPluggableAllocator",
    "torch.cuda.CUDAPluggableAllocator",
    "torch.distributed.run.main",
    "torch.multiprocessing.spawn",
    "transformers.pipeline",
    "transformers.pipelines.pipeline",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "transformers.testing_utils.run_command",
    "datasets.load_dataset",
    "datasets.load.load_dataset",
    "datasets.utils.py_utils.dill.loads",
    # our own levers
    "nemo_automodel.components.config.targets.set_enable_user_modules",
    "nemo_automodel.components.config.targets.allow_prefixes",
    "nemo_automodel.components.loss.masked_ce.nemo_automodel.cli.app.main",
    "nemo_automodel.cli.app.main",
    "nemo_automodel.shared.imports.require",
    # files
    "evil.py:main",
    "/tmp/evil.py:main",
    # not there
    "torch.optim.Adm",
    "torch.nowhere.Thing",
    "torch.float32",
]


@pytest.fixture(autouse=True)
def closed_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets._Fence, "prefixes", ())
    monkeypatch.setattr(targets._Fence, "allows_user_modules", False)
    monkeypatch.delenv(targets.SWITCH, raising=False)


@pytest.mark.parametrize("path", ALLOWED)
def test_what_recipes_name_resolves(path: str):
    target = targets.resolve(path, "x._target_")
    assert target.__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_targets_are_refused(path: str):
    with pytest.raises(ConfigError) as caught:
        targets.resolve(path, "x._target_")
    message = str(caught.value)
    assert "`x._target_" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [3, None, True, ["torch.load"], {"a": 1}])
def test_a_target_is_text(value: object):
    with pytest.raises(ConfigError, match="a target is a dotted path"):
        targets.resolve(value, "x._target_")


@pytest.mark.parametrize(
    "text",
    [
        "never_read: {_target_: os.system}",
        "ci: {nightly: [{_target_: builtins.exec}]}",
        "_parked: {_target_: torch.load}",
        "wandb: {enable: false, x: {_target_: subprocess.run}}",
        "dataloader: {collate_fn: os.system}",
        "dataloader: {collate_fn: torch.hub.load}",
        "dataloader: {collate_fn: {_target_: torch.hub.load}}",
        "packed_sequence: {post_tokenize_hook_fn: evil.py:run}",
        "model: {_target_: $NM_TARGET}",
        "model: {_target_: '${NM_UNSET,os.system}'}",
        "model: {_target_: '${NM_ROOT}.load'}",
        "model: \"{'_target_': 'os.system'}\"",
        "model: \"{'a': [{'b_fn': 'os.system'}]}\"",
        "a: &a {_target_: os.system}\nb: {<<: *a}",
    ],
)
def test_every_target_in_the_file_is_checked_at_load(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_TARGET", "os.system")
    monkeypatch.setenv("NM_ROOT", "torch")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_yaml_config(tmp_path / "run.yaml")


def test_a_nested_target_is_checked_before_any_call():
    node = ConfigNode({"x": {"_target_": "torch.nn.Linear", "in_features": {"_target_": "os.getcwd"}}})
    with pytest.raises(ConfigError, match=r"os\.getcwd"):
        node.x.instantiate()


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "nm_users").mkdir()
    (tmp_path / "nm_users/__init__.py").write_text("import os\nfrom subprocess import run\n")
    (tmp_path / "nm_users/inner.py").write_text("class Thing:\n    @classmethod\n    def make(cls, a): return a\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "nm_users"
    for name in [name for name in sys.modules if name.startswith("nm_users")]:
        del sys.modules[name]


@pytest.mark.usefixtures("user_package")
def test_more_packages_by_flag():
    with pytest.raises(ConfigError, match="--allow-target nm_users"):
        targets.resolve("nm_users.inner.Thing", "x")
    targets.allow_prefixes(["nm_users.inner"])
    assert targets.resolve("nm_users.inner.Thing.make", "x")(a=3) == 3
    with pytest.raises(ConfigError):
        targets.resolve("nm_users.run", "x")
    targets.allow_prefixes(["nm_users"])
    for path in ("nm_users.run", "nm_users.os.system", "nm_users.inner.__name__", "numpy.load"):
        with pytest.raises(ConfigError):
            targets.resolve(path, "x")


@pytest.mark.parametrize("prefix", ["os", "os.path", "builtins", "subprocess", "pickle", "a b", ""])
def test_the_standard_library_is_never_allowed(prefix: str):
    with pytest.raises(UserError):
        targets.allow_prefixes([prefix])


@pytest.mark.usefixtures("user_package")
@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_the_switch_opens_packages_and_files_but_not_the_system(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(targets.SWITCH, value)
    assert targets.resolve("nm_users.inner.Thing", "x").__name__ == "Thing"
    file = tmp_path / "mine.py"
    file.write_text("import os\nfrom os import system\ndef f(a): return a + 1\nnumber = 3\n")
    assert targets.resolve(f"{file}:f", "x")(2) == 3
    assert targets.resolve(f"{file}:f", "x") is targets.resolve(f"{file}:f", "x")
    for path in (
        "os.system",
        "builtins.eval",
        "torch.load",
        f"{file}:system",
        f"{file}:number",
        f"{file}:g",
        "no.py:f",
    ):
        with pytest.raises(ConfigError):
            targets.resolve(path, "x")


def test_neither_switch_nor_prefix_comes_from_a_file(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("allow_target: os\nNEMO_ENABLE_USER_MODULES: 1\nx: {_target_: numpy.load}\n")
    with pytest.raises(ConfigError, match="outside the packages"):
        load_yaml_config(tmp_path / "run.yaml")


def test_a_missing_package_names_the_pip_line():
    with pytest.raises(UserError, match="pip install flashoptim"):
        targets.resolve("flashoptim.FlashAdamW", "optimizer._target_")


def test_check_call():
    def make(a, /, b, *, c=1):
        return a, b, c

    targets.check_call(make, {"b": 1}, "x", num_positional=1)
    targets.check_call(make, {}, "x", num_positional=2)
    targets.check_call(make, {}, "x", may_lack=True)
    with pytest.raises(ConfigError, match=r"`x\.d`.*takes no `d`"):
        targets.check_call(make, {"b": 1, "d": 1}, "x", num_positional=1)
    with pytest.raises(ConfigError, match=r"`x` lacks `b`"):
        targets.check_call(make, {"c": 1}, "x", num_positional=1)


def test_secrets_do_not_stand_in_the_message_of_a_failed_call():
    node = ConfigNode({"x": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": "a", "bias": 1}})
    with pytest.raises(ConfigError, match="Linear refused its arguments"):
        node.x.instantiate()
    node = ConfigNode({"x": {"_target_": "transformers.AutoTokenizer.from_pretrained", "token": "hf_" + "a" * 30}})
    with pytest.raises(ConfigError) as caught:
        node.x.instantiate()
    assert "hf_a" not in str(caught.value)
