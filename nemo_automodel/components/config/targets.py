"""Which callables a configuration may name.

A YAML file is data that people pass around, so a ``_target_`` resolves only inside an allow-list of packages. Comparing
the first word is not enough: allowed modules import ``os``, ``sys`` and ``subprocess`` themselves, so
``torch.os.system`` begins rightly. Therefore three things are checked: the written path (prefix, private parts,
callables that load or run code), every module and object the attribute walk passes, and the module that defines the
result.

This is a fence, not a sandbox: an allowed callable may still do what its own arguments ask for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_automodel.components.config.redact import redact
from nemo_automodel.shared.errors import ConfigError, UserError, did_you_mean
from nemo_automodel.shared.imports import require

ALLOWED_PACKAGES = (
    "nemo_automodel",
    "torch",
    "torchdata",
    "torchao",
    "transformers",
    "datasets",
    "peft",
    "bitsandbytes",
    "liger_kernel",
    "flashoptim",
    "transformer_engine",
    "diffusers",
    "dion",
)
SWITCH = "NEMO_ENABLE_USER_MODULES"

# What loads or runs code, or opens this fence, under the allowed packages: modules and callables, by the name that is
# written and by the name of the definition behind it.
_REFUSED = (
    "nemo_automodel.cli",
    "nemo_automodel.components.config",
    "nemo_automodel.shared.imports",
    "torch._dynamo",
    "torch._export",
    "torch._inductor",
    "torch.backends",
    "torch.classes",
    "torch.compiler",
    "torch.cuda.CUDAPluggableAllocator",
    "torch.cuda.jiterator",
    "torch.cuda.memory.CUDAPluggableAllocator",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.distributed.launch",
    "torch.distributed.launcher",
    "torch.distributed.nn",
    "torch.distributed.rpc",
    "torch.distributed.run",
    "torch.export",
    "torch.fx",
    "torch.hub",
    "torch.jit",
    "torch.library",
    "torch.load",
    "torch.mps",
    "torch.multiprocessing",
    "torch.onnx",
    "torch.ops",
    "torch.package",
    "torch.save",
    "torch.serialization",
    "torch.testing",
    "torch.utils.backcompat",
    "torch.utils.benchmark",
    "torch.utils.bottleneck",
    "torch.utils.bundled_inputs",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.hipify",
    "torch.utils.model_dump",
    "torch.utils.model_zoo",
    "torch.utils.show_pickle",
    "torch.xpu.memory",
    "torchao.testing",
    "transformers.agents",
    "transformers.cli",
    "transformers.commands",
    "transformers.dynamic_module_utils",
    "transformers.integrations.hub_kernels",
    "transformers.pipeline",
    "transformers.pipelines",
    "transformers.testing_utils",
    "transformers.tools",
    "transformers.utils.import_utils",
    "datasets.commands",
    "datasets.load",  # its `pandas` builder unpickles
    "datasets.load_dataset",
    "datasets.load_dataset_builder",
    "datasets.packaged_modules",
    "datasets.utils",
    "bitsandbytes.cextension",
    "bitsandbytes.diagnostics",
    "diffusers.utils.dynamic_modules_utils",
)
_REFUSED_WORDS = ("load_library", "load_pickle", "unpickle", "system", "popen", "exec", "eval", "compile_source")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FILE_TARGET = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*)")
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class _Fence:
    """What the command line and the environment opened. A configuration cannot reach it."""

    prefixes: tuple[str, ...] = ()
    allows_user_modules: bool = False


def allow_prefixes(prefixes: Iterable[str]) -> None:
    """Open the fence for more packages: the ``--allow-target`` flag.

    Raises:
        UserError: a prefix is no dotted name, or belongs to Python's standard library.
    """
    for prefix in prefixes:
        if not all(_IDENTIFIER.fullmatch(part) for part in prefix.split(".")):
            raise UserError(f"`--allow-target {prefix}` is not a dotted name. Write a package such as my_package.")
        if _is_standard_library(prefix):
            raise UserError(
                f"`--allow-target {prefix}`: Python's standard library is never a target. Write a function in a "
                "package of your own that calls it, and allow that package."
            )
        _Fence.prefixes = (*_Fence.prefixes, prefix)


def set_enable_user_modules(allow: bool = True) -> None:
    """Allow targets in any package and in local files, as ``NEMO_ENABLE_USER_MODULES=1`` does."""
    _Fence.allows_user_modules = allow


def user_modules_enabled() -> bool:
    """Tell whether any package and local files may be named."""
    return _Fence.allows_user_modules or os.environ.get(SWITCH, "").lower() in ("1", "true", "yes")


def check_path(path: Any, place: str) -> None:
    """Check a written target without importing anything.

    Raises:
        ConfigError: not a dotted path, outside the allow-list, private, or refused by name.
    """
    if callable(path):
        return  # from Python code, never from a file
    if not isinstance(path, str):
        raise ConfigError(f"`{place}` is {path!r}, but a target is a dotted path such as torch.optim.AdamW.")
    if _FILE_TARGET.fullmatch(path):
        if not user_modules_enabled():
            raise ConfigError(
                f"`{place}: {path}` names a local file, which runs its code. If you trust it, set {SWITCH}=1."
            )
        return
    parts = path.split(".")
    if not all(_IDENTIFIER.fullmatch(part) for part in parts):
        raise ConfigError(f"`{place}: {path}` is not a dotted path. Write one such as torch.optim.AdamW.")
    if len(parts) == 1 and place.split(".")[0] == "optimizer":
        return  # `adamw`: looked up by name, never imported
    if len(parts) == 1:
        raise ConfigError(f"`{place}: {path}` is a bare name. Write the whole path, package first.")
    if _is_standard_library(parts[0]):
        raise ConfigError(
            f"`{place}: {path}` is in Python's standard library, which a configuration never names. Write a function "
            "in a package of your own that calls it, and allow that package with --allow-target."
        )
    if not _is_allowed_module(parts[0], path):
        raise ConfigError(
            f"`{place}: {path}` is outside the packages a configuration may name ({', '.join(ALLOWED_PACKAGES)})."
            f"{did_you_mean(parts[0], ALLOWED_PACKAGES)} If you trust it, add --allow-target {parts[0]} to the command "
            f"line, or set {SWITCH}=1."
        )
    _check_words(parts, path, place)


def resolve(path: Any, place: str = "_target_") -> Callable[..., Any]:
    """Import a target, checking every step of the way. A callable is returned as it is.

    Raises:
        ConfigError: not allowed, not there, or not callable.
        UserError: the package is not installed.
    """
    if callable(path):
        return path
    check_path(path, place)
    file_target = _FILE_TARGET.fullmatch(path)
    target = _from_file(file_target, place) if file_target else _walk(path.split("."), path, place)
    _check_result(target, path, place)
    if not callable(target):
        raise ConfigError(f"`{place}: {path}` is a {type(target).__name__}, but a target must be a class or function.")
    return target


def check_call(
    target: Callable[..., Any],
    kwargs: Mapping[str, Any],
    place: str,
    *,
    num_positional: int = 0,
    may_lack: bool = False,
) -> None:
    """Check keyword names against the real signature of ``target``.

    Args:
        target: what will be called.
        kwargs: the keyword arguments it will get.
        place: dotted key of the section, for the message.
        num_positional: positional arguments given before them.
        may_lack: required arguments may come later.

    Raises:
        ConfigError: a keyword the target does not take, or a required one that is missing.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())
        # a decorator may take more than what it wraps: Transformers' configurations take any keyword that way
        outer = inspect.signature(target, follow_wrapped=False).parameters.values()
    except (ValueError, TypeError):
        return  # some compiled callables do not tell
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in (*parameters, *outer)):
        for key in kwargs:
            if key not in named:
                raise ConfigError(
                    f"`{place}.{key}`: {_name_of(target)} takes no `{key}`.{did_you_mean(key, named)} "
                    f"It takes: {', '.join(named)}."
                )
    filled = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:num_positional]
    lacking = [name for name, p in named.items() if p.default is p.empty and name not in kwargs and name not in filled]
    if lacking and not may_lack:
        raise ConfigError(f"`{place}` lacks `{lacking[0]}`, which {_name_of(target)} needs. Add {place}.{lacking[0]}.")


def call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], place: str) -> Any:
    """Call a target. A value that a library refuses comes back as one line; our own code speaks for itself.

    Raises:
        ConfigError: a callable of another package raised ValueError or TypeError, or its checks of types did.
    """
    if _name_of(target).startswith("nemo_automodel."):
        return target(*args, **kwargs)
    from huggingface_hub.errors import StrictDataclassError  # whatever is called here is heavier

    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        shown = ", ".join(f"{key}={redact(key, value)!r}"[:80] for key, value in kwargs.items())
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"`{place}`: {_name_of(target)} refused its arguments: {reason}. It was given {shown or 'none'}."
        ) from error


# --- the walk --------------------------------------------------------------------------------------------------------


def _walk(parts: list[str], path: str, place: str) -> Any:
    require(parts[0], f"`{place}: {path}`")
    current: Any = _import(parts[0], path, place)
    for depth, part in enumerate(parts[1:], start=1):
        try:
            current = getattr(current, part)
        except AttributeError:
            current = _submodule(current, part, ".".join(parts[: depth + 1]), path, place)
        except ImportError as error:  # lazy packages import on first use
            raise _import_failed(path, place, error) from error
        _check_step(current, path, place)
    return current


def _submodule(parent: Any, part: str, name: str, path: str, place: str) -> ModuleType:
    if not isinstance(parent, ModuleType) or not hasattr(parent, "__path__"):
        raise ConfigError(_not_there(parent, part, path, place))
    if importlib.util.find_spec(f"{parent.__name__}.{part}") is None:
        raise ConfigError(_not_there(parent, part, path, place))
    return _import(f"{parent.__name__}.{part}", path, place)


def _not_there(parent: Any, part: str, path: str, place: str) -> str:
    names = [name for name in dir(parent) if not name.startswith("_")]
    where = parent.__name__ if isinstance(parent, ModuleType) else _name_of(parent)
    return f"`{place}: {path}`: {where} has no `{part}`.{did_you_mean(part, names)} Correct the path."


def _import(name: str, path: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _import_failed(path, place, error) from error


def _import_failed(path: str, place: str, error: ImportError) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"`{place}: {path}` cannot be imported: {reason}. Install what is missing, or name another.")


def _from_file(match: re.Match[str], place: str) -> Any:
    path, name = Path(match["file"]), match["name"]
    if not path.is_file():
        raise ConfigError(f"`{place}: {match[0]}`: the file `{path}` does not exist. Give its path.")
    if name.startswith("_"):
        raise ConfigError(f"`{place}: {match[0]}` names a private `{name}`. Name a public class or function.")
    module = _load_file(path.resolve())
    if name not in vars(module):
        raise ConfigError(f"`{place}: {match[0]}`: the file has no `{name}`.{did_you_mean(name, vars(module))}")
    return vars(module)[name]


def _load_file(path: Path) -> ModuleType:
    module_name = f"nemo_user_file_{path.stem}"
    loaded = sys.modules.get(module_name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that worker processes can pickle what the file defines
    spec.loader.exec_module(module)
    return module


# --- the checks ------------------------------------------------------------------------------------------------------


def _is_standard_library(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _is_allowed_module(module: str, path: str) -> bool:
    """Tell whether a module (or the root of a written path) lies inside the fence."""
    if _is_standard_library(module):
        return False
    if user_modules_enabled() or module.partition(".")[0] in ALLOWED_PACKAGES:
        return True
    full = path if "." not in module else module
    return any(full == prefix or full.startswith(f"{prefix}.") for prefix in _Fence.prefixes)


def _check_words(parts: list[str], path: str, place: str) -> None:
    for depth, part in enumerate(parts[1:], start=1):
        is_own_module = parts[0] == "nemo_automodel" and _is_module(parts[: depth + 1])
        is_private = "__" in part or (part.startswith("_") and not is_own_module)
        if is_private and not user_modules_enabled():
            raise ConfigError(f"`{place}: {path}` reaches into the private `{part}`. Name a public class or function.")
        if part in _REFUSED_WORDS or (parts[0] == "transformers" and part.startswith("convert_")):
            raise ConfigError(_refusal(path, place))
    if _is_refused(path):
        raise ConfigError(_refusal(path, place))


def _is_module(parts: list[str]) -> bool:
    location = _PACKAGE_ROOT.parent.joinpath(*parts)
    return location.is_dir() or location.with_suffix(".py").is_file()


def _is_refused(name: str) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in _REFUSED)


def _refusal(path: str, place: str) -> str:
    return (
        f"`{place}: {path}` loads or runs code of the caller's choice, so a configuration cannot name it. "
        "Name the class or function to use directly."
    )


def _check_step(value: Any, path: str, place: str) -> None:
    """Check one module or object on the way: it must be of an allowed package by its own name."""
    if isinstance(value, ModuleType):
        if not _is_allowed_module(value.__name__, value.__name__):
            raise ConfigError(_escape(path, place, value.__name__))
        if _is_refused(value.__name__):
            raise ConfigError(_refusal(path, place))
        return
    _check_result(value, path, place)


def _check_result(value: Any, path: str, place: str) -> None:
    for module, name in _origins(value):
        if module is None or not _is_allowed_origin(module):
            raise ConfigError(_escape(path, place, module or "an unknown module"))
        if _is_refused(module) or _is_refused(f"{module}.{name}"):
            raise ConfigError(_refusal(path, place))


def _is_allowed_origin(module: str) -> bool:
    return module.startswith("nemo_user_file_") or _is_allowed_module(module, module)


def _escape(path: str, place: str, module: str) -> str:
    return (
        f"`{place}: {path}` leads to {module}, which a configuration may not name. "
        "Name a class or function of an allowed package itself."
    )


def _origins(value: Any) -> Iterable[tuple[str | None, str]]:
    """Yield the module and qualified name of everything a value is made of."""
    if inspect.ismethod(value):
        yield value.__func__.__module__, value.__func__.__qualname__
        value = value.__self__
    while hasattr(value, "func") and hasattr(value, "args") and hasattr(value, "keywords"):
        value = value.func  # functools.partial
    if isinstance(value, type) or inspect.isroutine(value):
        owner = _builtin_owner(value)
        if owner is not None:
            yield owner.__module__, owner.__qualname__
        elif value.__module__ is None and isinstance(value.__self__, ModuleType):
            yield value.__self__.__name__, value.__qualname__
        else:
            yield value.__module__, value.__qualname__
    elif not isinstance(value, ModuleType):
        yield type(value).__module__, type(value).__qualname__


def _builtin_owner(value: Any) -> type | None:
    """Return the class that defines a compiled method: `dict` for an inherited `fromkeys`."""
    if isinstance(value, type):
        return None
    if inspect.ismethoddescriptor(value) and hasattr(value, "__objclass__"):
        return value.__objclass__
    owner = getattr(value, "__self__", None)
    if inspect.isbuiltin(value) and isinstance(owner, type):
        return next((base for base in owner.__mro__ if value.__name__ in vars(base)), owner)
    return None


def _name_of(target: Any) -> str:
    func = getattr(target, "func", target)
    if not hasattr(func, "__qualname__"):
        func = type(func)
    return f"{func.__module__}.{func.__qualname__}"
