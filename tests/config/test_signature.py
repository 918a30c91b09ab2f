"""Signatures from source text agree with those of the real objects, without importing them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from nemo_automodel.components.config import signature, targets
from nemo_automodel.components.config.signature import TargetMissingError, signature_of

REAL = [
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "torch.optim.SGD",
    "torch.optim.Muon",
    "torchdata.stateful_dataloader.StatefulDataLoader",
    "torch.utils.data.DataLoader",
    "torch.distributed.fsdp.MixedPrecisionPolicy",
    "bitsandbytes.optim.AdamW8bit",
    "peft.LoraConfig",
    "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy",
    "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy",
    "nemo_automodel.components._peft.lora.PeftConfig",
    "nemo_automodel.components.models.common.BackendConfig",
]


@pytest.mark.parametrize("path", REAL)
def test_agrees_with_the_real_signature(path: str):
    found = signature_of(path)
    assert found is not None
    real = inspect.signature(targets.resolve(path))
    taken = {name: p for name, p in real.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    assert list(found.parameters) == list(taken)
    assert {n: p.is_required for n, p in found.parameters.items()} == {
        n: p.default is p.empty for n, p in taken.items()
    }
    assert found.is_open == any(p.kind is p.VAR_KEYWORD for p in real.parameters.values())


def test_torch_is_not_imported():
    code = (
        "import sys; from nemo_automodel.components.config.signature import signature_of as s; "
        f"assert all(s(p) for p in {REAL!r}); "
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SOURCE = '''
"""Doc."""
from __future__ import annotations
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional, Union
import torch
from .other import Elsewhere as Renamed

_LAZY = {"Lazy": "nemo_automodel.fake.other"}

def function(a, b: int, /, c: float = 1.0, *rest: str, d: "str | None", e: Optional[bool] = None, **more: Any): ...

def closed(a: Union[int, list[str]], b: torch.Tensor | int, c: Literal["x", 3] = "x", d: dict[str, int] = {}): ...

@functools.cache
def decorated(a): ...

@dataclass
class Base:
    x: int
    shared: ClassVar[int] = 3
    y: list[str] = field(default_factory=list)

@dataclasses.dataclass
class Data(Base):
    z: float | None = None
    hidden: int = field(init=False, default=3)
    needed: str = field(metadata={})

class Plain:
    def __init__(self, a, *, b=2): ...

class Child(Plain):
    @classmethod
    def make(cls, n: int): ...

    @staticmethod
    def still(n: int): ...

class Outside(torch.nn.Module):
    pass

if torch:
    class Conditional:
        def __init__(self, q): ...
else:
    pass
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "nemo_automodel/fake"
    folder.mkdir(parents=True)
    for path in (folder.parent / "__init__.py", folder / "__init__.py"):
        path.write_text("")
    (folder / "main.py").write_text(SOURCE)
    (folder / "other.py").write_text("class Elsewhere:\n    def __init__(self, w): ...\n\nclass Lazy(Elsewhere): ...\n")
    monkeypatch.setattr(signature, "_OWN_PACKAGE", tmp_path / "nemo_automodel")
    signature._module.cache_clear()
    yield "nemo_automodel.fake.main"
    signature._module.cache_clear()


def names(path: str) -> dict[str, bool]:
    found = signature_of(path)
    assert found is not None
    return {name: parameter.is_required for name, parameter in found.parameters.items()}


def test_forms_of_definitions(fake: str):
    assert names(f"{fake}.function") == {"a": True, "b": True, "c": False, "d": True, "e": False}
    assert signature_of(f"{fake}.function").is_open
    assert names(f"{fake}.Data") == {"x": True, "y": False, "z": False, "needed": True}
    assert names(f"{fake}.Child") == names(f"{fake}.Plain") == {"a": True, "b": False}
    assert names(f"{fake}.Child.make") == names(f"{fake}.Child.still") == {"n": True}
    assert names(f"{fake}.Renamed") == names(f"{fake}.Lazy") == {"w": True}
    assert names(f"{fake}.Conditional") == {"q": True}


def test_hints(fake: str):
    hints = {name: parameter.hint for name, parameter in signature_of(f"{fake}.closed").parameters.items()}
    assert hints == {"a": int | list[str], "b": Any, "c": Literal["x", 3], "d": dict}
    hints = {name: parameter.hint for name, parameter in signature_of(f"{fake}.function").parameters.items()}
    assert hints == {"a": Any, "b": int, "c": float, "d": str | None, "e": bool | None}


@pytest.mark.parametrize("path", ["decorated", "Outside", "Child.make.deeper"])
def test_what_the_source_does_not_tell(fake: str, path: str):
    assert signature_of(f"{fake}.{path}") is None


@pytest.mark.parametrize(
    ("path", "near"),
    [("Daata", "Data"), ("Lazzy", "Lazy"), ("Child.mike", "make"), ("Renamd", "Renamed")],
)
def test_what_is_not_there(fake: str, path: str, near: str):
    with pytest.raises(TargetMissingError, match=f"Did you mean `{near}`"):
        signature_of(f"{fake}.{path}")


def test_missing_names_of_ours():
    for path, near in (
        ("nemo_automodel.NeMoAutoModelForCausalM.from_pretrained", "NeMoAutoModelForCausalLM"),
        ("nemo_automodel.components.lss.masked_ce.MaskedCrossEntropy", "loss"),
        ("nemo_automodel.components.loss.masked_c.MaskedCrossEntropy", "masked_ce"),
        ("nemo_automodel.components.loss.masked_ce.MaskdCrossEntropy", "MaskedCrossEntropy"),
    ):
        with pytest.raises(TargetMissingError, match=f"Did you mean `{near}`"):
            signature_of(path)
