"""Read what one Python source file documents, imports and exports, without importing it: the `ast` side of `pydocs`."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LONGEST_DEFAULT = 24  # characters of a parameter's default value that are worth showing
_MOST_PARAMETERS = 16

_Function = ast.FunctionDef | ast.AsyncFunctionDef
Target = tuple[str, str]
"""A module and a name in it."""


@dataclass(frozen=True)
class Doc:
    """The documentation of one object: `member` is its path below the top-level name, such as `.fit`."""

    kind: str
    member: str
    parameters: str
    text: str


@dataclass
class Module:
    """A module's docstring, what it defines, imports and star-imports, and its `__all__` (None: not a literal)."""

    name: str
    is_package: bool
    doc: str
    definitions: dict[str, list[Doc]] = field(default_factory=dict)
    imports: dict[str, Target] = field(default_factory=dict)
    reexported: set[str] = field(default_factory=set)
    stars: list[str] = field(default_factory=list)
    exported: list[str] | None = None


def read_module(name: str, path: Path) -> Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not ours to report
        tree = ast.parse(path.read_bytes())
    statements = list(_statements(tree.body))
    module = Module(name, path.name == "__init__.py", _docstring(tree), exported=_exported(statements))
    for node in statements:
        if isinstance(node, _Function | ast.ClassDef):
            _define(module, node)
        elif isinstance(node, ast.ImportFrom):
            _import(module, node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            _alias(module, node.targets[0], node.value)
    return module


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class body, those under `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            handlers = [h.body for h in getattr(node, "handlers", [])]
            blocks = [node.body, *handlers, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            for block in blocks:
                yield from _statements(block)


def _define(module: Module, node: _Function | ast.ClassDef) -> None:
    """Record a top-level definition; of several of one name (overloads, branches) the first documented one counts."""
    if not module.definitions.get(node.name):
        module.definitions[node.name] = list(_docs(node, "", set()))


def _import(module: Module, node: ast.ImportFrom) -> None:
    parts = module.name.split(".")
    keep = len(parts) - node.level + module.is_package if node.level else 0
    origin = ".".join([*parts[: max(keep, 0)], *([node.module] if node.module else [])])
    for name in node.names:
        if name.name == "*":
            module.stars.append(origin)
            continue
        module.imports.setdefault(name.asname or name.name, (origin, name.name))
        if module.is_package or name.asname == name.name:
            module.reexported.add(name.asname or name.name)


def _alias(module: Module, target: ast.expr, value: ast.Name) -> None:
    """Record `public = _private` at top level as one more name of the same object."""
    if isinstance(target, ast.Name):
        module.imports.setdefault(target.id, (module.name, value.id))
        module.reexported.add(target.id)


def _exported(statements: Iterable[ast.stmt]) -> list[str] | None:
    """Return the names of `__all__`, or None where there is none or one of its pieces is not a literal."""
    names: list[str] | None = None
    for node in statements:
        value = _added_to_all(node)
        if value is None:
            continue
        added = _literal_names(value)
        if added is None:
            return None
        names = (names or []) + added
    return names


def _added_to_all(node: ast.stmt) -> ast.expr | None:
    """Return the list that an assignment, `+=`, `.extend()` or `.append()` gives to `__all__`; None for the rest."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and len(node.value.args) == 1:
        (argument,) = node.value.args
        method = ast.unparse(node.value.func)
        if method == "__all__.append":
            return ast.List(elts=[argument])
        return argument if method == "__all__.extend" else None
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return node.value
    return None


def _literal_names(value: ast.expr) -> list[str] | None:
    """Return the strings of a literal list, or of a sum of them; None for anything else."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        left, right = _literal_names(value.left), _literal_names(value.right)
        return None if left is None or right is None else left + right
    if not isinstance(value, ast.List | ast.Tuple | ast.Set):
        return None
    names = [e.value for e in value.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    return names if len(names) == len(value.elts) else None


# Docstrings and signatures


def _docstring(node: ast.Module | ast.ClassDef | _Function) -> str:
    """Return the cleaned docstring or ""; lone surrogates, which no UTF-8 file can hold, become question marks."""
    text = ast.get_docstring(node) or ""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8").strip()


def _docs(node: _Function | ast.ClassDef, member: str, told: set[str]) -> Iterator[Doc]:
    """Yield the documentation of a function, or of a class and its public members, nested classes included.

    `told` holds the parameter texts given so far: methods that share a parameter (`get`, `put`, ...) tell it once.
    """
    if not isinstance(node, ast.ClassDef):
        doc = _function_doc(node, member, told)
        if doc is not None:
            yield doc
        return
    children = [child for child in _statements(node.body) if isinstance(child, _Function | ast.ClassDef)]
    yield from _class_doc(node, member, children, told)
    seen = set()
    for child in children:
        if child.name.startswith("_") or child.name in seen:
            continue
        for doc in _docs(child, f"{member}.{child.name}", told):
            seen.add(child.name)
            yield doc


def _class_doc(node: ast.ClassDef, member: str, children: Sequence[ast.stmt], told: set[str]) -> Iterator[Doc]:
    """Yield the class's own docstring with its constructor's parameters and documentation."""
    texts, parameters = [_docstring(node)], ""
    for child in children:
        if isinstance(child, _Function) and child.name == "__init__" and "overload" not in _decorators(child):
            texts += [_docstring(child), _parameter_docs(child.args, told)]
            parameters = _parameters(child.args, bound=True)
            break
    text = "\n\n".join(text for text in texts if text)
    if text:
        yield Doc("class ", member, parameters, text)


def _function_doc(node: _Function, member: str, told: set[str]) -> Doc | None:
    """Return the documentation of a function, method or property; None without any, or for overloads and setters."""
    decorators = _decorators(node)
    texts = [text for text in (_docstring(node), _parameter_docs(node.args, told)) if text]
    if not texts or decorators & {"overload", "setter", "deleter"}:
        return None
    if any(name.endswith("property") for name in decorators):
        return Doc("property ", member, "", texts[0])
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    bound = bool(member) and "staticmethod" not in decorators
    return Doc(kind, member, _parameters(node.args, bound=bound), "\n\n".join(texts))


def _decorators(node: _Function) -> set[str]:
    """Return the last part of each decorator's name: `overload` for `@typing.overload`."""
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {d.attr if isinstance(d, ast.Attribute) else d.id for d in calls if isinstance(d, ast.Attribute | ast.Name)}


def _parameters(arguments: ast.arguments, *, bound: bool) -> str:
    """Return `(a, b=1, *, c=...)`: names and short defaults; annotations and long defaults would bury the text."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = zip(positional, [*missing, *arguments.defaults], strict=True)
    parts = [_parameter(a.arg, default) for a, default in pairs][bound:]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_parameter(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parts += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    if len(parts) > _MOST_PARAMETERS:
        parts = [*(part.partition("=")[0] for part in parts[:_MOST_PARAMETERS]), "..."]
    return f"({', '.join(parts)})"


def _parameter(name: str, default: ast.expr | None) -> str:
    if default is None:
        return name
    value = ast.unparse(default)
    return f"{name}={value if len(value) <= _LONGEST_DEFAULT else '...'}"


def _parameter_docs(arguments: ast.arguments, told: set[str]) -> str:
    """Return the `Annotated[..., Doc("...")]` texts of the parameters (PEP 727), one `name: text` a paragraph."""
    texts = []
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        for node in ast.walk(argument.annotation) if argument.annotation else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Doc") and node.args:
                text = node.args[0]
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    texts.append(f"{argument.arg}: {inspect.cleandoc(text.value)}")
    fresh = [text for text in texts if text not in told]
    told.update(fresh)
    return "\n\n".join(fresh)
