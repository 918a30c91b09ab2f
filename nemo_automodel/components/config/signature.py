"""Signatures read from source text.

The signature of a target is the schema of its section, so a mistyped key must be found before torch is imported. The
sources of installed packages are parsed, never run: functions, classes (``__init__`` or dataclass fields, inherited
ones too), classmethods, names imported from elsewhere, and our lazy ``_PUBLIC`` tables. What a source does not tell
plainly (star imports, names made at run time) is answered with "unknown", and the check waits for the real object.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_automodel.shared.errors import did_you_mean

_OWN_PACKAGE = Path(__file__).resolve().parents[2]
_MAX_HOPS = 30
_SIMPLE_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "List": list,
    "Sequence": list,
    "Iterable": list,
    "tuple": list,
    "Tuple": list,
    "dict": dict,
    "Dict": dict,
    "Mapping": dict,
    "None": type(None),
}
_PLAIN_DECORATORS = ("dataclass", "classmethod", "staticmethod", "abstractmethod", "final", "override", "no_grad")
_BuiltNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Parameter:
    """One keyword a target takes."""

    hint: Any
    """A typing object; ``Any`` where the annotation says nothing that can be checked."""
    is_required: bool


@dataclass(frozen=True)
class Signature:
    """What a target takes by keyword."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    is_open: bool = False
    """It has ``**kwargs``: any other keyword is passed on."""


class TargetMissingError(LookupError):
    """The source shows that a target is not there; the message says what is missing and names a near one."""


class _UnknownError(Exception):
    """The source does not tell."""


@dataclass(frozen=True)
class _Module:
    name: str
    path: Path

    @functools.cached_property
    def body(self) -> list[ast.stmt]:
        try:
            return ast.parse(self.path.read_text(encoding="utf-8")).body
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise _UnknownError from error


@dataclass(frozen=True)
class _Definition:
    node: _BuiltNode
    module: _Module


def signature_of(path: str) -> Signature | None:
    """Read the signature of a dotted target.

    Returns:
        ``None`` where the source does not tell.

    Raises:
        TargetMissingError: a module or name on the path does not exist.
    """
    try:
        return _signature(_find(path, _MAX_HOPS), skip_first=False)
    except _UnknownError:
        return None


# --- finding ---------------------------------------------------------------------------------------------------------


@functools.cache
def _module(name: str) -> _Module | None:
    root, _, rest = name.partition(".")
    if root == _OWN_PACKAGE.name:
        folder = _OWN_PACKAGE
    else:
        spec = importlib.util.find_spec(root)
        if spec is None or not spec.submodule_search_locations:
            raise _UnknownError
        folder = Path(next(iter(spec.submodule_search_locations)))
    location = folder.joinpath(*rest.split(".")) if rest else folder
    if (location / "__init__.py").is_file():
        return _Module(name, location / "__init__.py")
    if location.with_suffix(".py").is_file() and rest:
        return _Module(name, location.with_suffix(".py"))
    return None


def _find(path: str, hops: int) -> tuple[_Definition, str | None]:
    """Return the function or class at a path, and the method of that class where the path names one."""
    if hops == 0:
        raise _UnknownError
    parts = path.split(".")
    module = _module(parts[0])
    depth = 1
    while module is not None and depth < len(parts):
        inner = _module(".".join(parts[: depth + 1]))
        if inner is None:
            break
        module, depth = inner, depth + 1
    if module is None or depth == len(parts):
        raise _UnknownError if module else TargetMissingError(f"there is no `{parts[0]}`.")
    definition = _in_module(module, parts[depth], hops)
    rest = parts[depth + 1 :]
    if not rest:
        return definition, None
    if len(rest) > 1 or not isinstance(definition.node, ast.ClassDef):
        raise _UnknownError
    return definition, rest[0]


def _in_module(module: _Module, name: str, hops: int) -> _Definition:
    names: list[str] = []
    is_closed = True
    for statement in _flat(module.body):
        if isinstance(statement, _BuiltNode):
            if statement.name == name:
                return _Definition(statement, module)
            is_closed &= statement.name != "__getattr__"
            names.append(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _follow(f"{_source_of(statement, module)}.{alias.name}", hops)
                is_closed &= alias.name != "*"
                names.append(alias.asname or alias.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            target = _lazy_target(statement, name)
            if target is not None:
                return _follow(target, hops)
            is_closed &= _assigned_name(statement) != name
        elif not isinstance(statement, ast.Import | ast.Pass) and not _is_docstring(statement):
            is_closed = False  # code that may bind names at run time
    is_ours = module.name.partition(".")[0] == _OWN_PACKAGE.name
    if is_ours and module.path.name == "__init__.py":
        names += [entry.stem for entry in module.path.parent.iterdir() if entry.suffix == ".py" or entry.is_dir()]
    lazy_names = _lazy_names(module)
    names += lazy_names
    if is_closed or lazy_names:  # a lazy table comes with a `__getattr__` that serves nothing else
        public = [known for known in names if not known.startswith("_")]
        raise TargetMissingError(f"`{module.name}` has no `{name}`.{did_you_mean(name, public)}")
    raise _UnknownError


def _follow(path: str, hops: int) -> _Definition:
    definition, method = _find(path, hops - 1)
    if method is not None:
        raise _UnknownError
    return definition


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module with those under ``if`` and ``try``."""
    found: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If):
            found += _flat(statement.body) + _flat(statement.orelse)
        elif isinstance(statement, ast.Try):
            found += _flat(statement.body) + [s for handler in statement.handlers for s in _flat(handler.body)]
            found += _flat(statement.orelse)
        else:
            found.append(statement)
    return found


def _source_of(statement: ast.ImportFrom, module: _Module) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    keep = len(parts) - statement.level + (module.path.name == "__init__.py")
    return ".".join([*parts[:keep], *([statement.module] if statement.module else [])])


def _assigned_name(statement: ast.Assign | ast.AnnAssign) -> str | None:
    target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
    return target.id if isinstance(target, ast.Name) else None


def _lazy_table(statement: ast.stmt) -> dict[str, str]:
    """Return a ``{"Name": "package.module"}`` table, the way our packages write their lazy names."""
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    if not isinstance(value, ast.Dict) or not value.keys:
        return {}
    try:
        table = ast.literal_eval(value)
    except (ValueError, TypeError):
        return {}
    own = f"{_OWN_PACKAGE.name}."
    is_lazy = all(isinstance(k, str) and isinstance(v, str) and v.startswith(own) for k, v in table.items())
    return table if is_lazy else {}


def _lazy_target(statement: ast.Assign | ast.AnnAssign, name: str) -> str | None:
    module = _lazy_table(statement).get(name)
    return None if module is None else f"{module}.{name}"


def _lazy_names(module: _Module) -> list[str]:
    return [name for statement in module.body for name in _lazy_table(statement)]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# --- reading ---------------------------------------------------------------------------------------------------------


def _signature(found: tuple[_Definition, str | None], skip_first: bool) -> Signature:
    definition, method = found
    _require_plain(definition.node)
    if not isinstance(definition.node, ast.ClassDef):
        return _of_function(definition.node, skip_first)
    if method is None:
        return _of_class(definition)
    function = _method(definition, method)
    _require_plain(function)
    decorators = {_last_name(decorator) for decorator in function.decorator_list}
    return _of_function(function, skip_first="staticmethod" not in decorators)


def _require_plain(node: _BuiltNode) -> None:
    """Leave decorators that may change a signature to the real object."""
    if any(_last_name(decorator) not in _PLAIN_DECORATORS for decorator in node.decorator_list):
        raise _UnknownError


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = {
        argument.arg: Parameter(_hint(argument.annotation), index < num_required)
        for index, argument in enumerate(positional)
    }
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[argument.arg] = Parameter(_hint(argument.annotation), default is None)
    if skip_first and positional:
        del parameters[positional[0].arg]
    return Signature(parameters, arguments.kwarg is not None)


def _of_class(definition: _Definition) -> Signature:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _of_function(statement, skip_first=True)
    if any(_last_name(decorator) == "dataclass" for decorator in node.decorator_list):
        return Signature(_fields(definition))
    for base in _bases(definition):
        return _of_class(base)
    raise _UnknownError  # what an outside base takes is not ours to tell


def _fields(definition: _Definition) -> dict[str, Parameter]:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    parameters: dict[str, Parameter] = {}
    for base in _bases(definition):
        parameters.update(_fields(base))
    for statement in node.body:
        name = _assigned_name(statement) if isinstance(statement, ast.AnnAssign) else None
        if name is None or not isinstance(statement, ast.AnnAssign) or _last_name(statement.annotation) == "ClassVar":
            continue
        options = _field_options(statement.value)
        if options.get("init") is False:
            continue
        is_required = statement.value is None or (
            options.keys().isdisjoint(("default", "default_factory")) and options != {}
        )
        parameters[name] = Parameter(_hint(statement.annotation), is_required)
    return parameters


def _field_options(value: ast.expr | None) -> dict[str, Any]:
    """Return the keywords of a ``field(...)`` call; constants by value, anything else as True."""
    if not isinstance(value, ast.Call) or _last_name(value) != "field":
        return {}
    return {k.arg or "": k.value.value if isinstance(k.value, ast.Constant) else True for k in value.keywords}


def _bases(definition: _Definition) -> list[_Definition]:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    found = []
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id not in ("object", "Protocol", "Generic", "ABC"):
            inner = _in_module(definition.module, base.id, _MAX_HOPS)
            if isinstance(inner.node, ast.ClassDef):
                found.append(inner)
    return found


def _method(definition: _Definition, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name:
            return statement
    for base in _bases(definition):
        try:
            return _method(base, name)
        except TargetMissingError:
            continue
    if node.bases and not all(isinstance(base, ast.Name) for base in node.bases):
        raise _UnknownError
    methods = [s.name for s in node.body if isinstance(s, ast.FunctionDef) and not s.name.startswith("_")]
    raise TargetMissingError(f"`{node.name}` has no `{name}`.{did_you_mean(name, methods)}")


def _last_name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _hint(annotation: ast.expr | None) -> Any:
    """Turn an annotation into a typing object; ``Any`` for whatever is not a plain type."""
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            return types.NoneType
        return _hint(ast.parse(annotation.value, mode="eval").body) if isinstance(annotation.value, str) else Any
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _union([_hint(annotation.left), _hint(annotation.right)])
    if isinstance(annotation, ast.Subscript):
        return _generic(_last_name(annotation), annotation.slice)
    return _SIMPLE_TYPES.get(_last_name(annotation), Any)


def _generic(name: str, inner: ast.expr) -> Any:
    arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Optional":
        return _union([_hint(inner), types.NoneType])
    if name == "Union":
        return _union([_hint(argument) for argument in arguments])
    if name == "Literal" and all(isinstance(argument, ast.Constant) for argument in arguments):
        return typing.Literal[tuple(argument.value for argument in arguments if isinstance(argument, ast.Constant))]
    if name in ("list", "List", "Sequence", "Iterable"):
        item = _hint(inner)
        return list[item]  # type: ignore[valid-type]
    return _SIMPLE_TYPES.get(name, Any)


def _union(hints: list[Any]) -> Any:
    return Any if Any in hints else functools.reduce(operator.or_, hints)
