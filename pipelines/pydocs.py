"""Read the documentation of installed Python packages as passages: a real corpus that every machine already has.

The sources are parsed with `ast`; nothing is imported or executed. Every public module, class, function, method and
property that has a docstring becomes one or more passages of about a hundred words.

What counts as public, in the order it is decided:

1. A module is public when no part of its path below the package starts with an underscore and it is no test.
2. A module's public names are those in its `__all__` where that is a literal; otherwise the names it defines without
   a leading underscore, and those it re-exports: by `from m import *`, by `from m import x as x`, or, in an
   `__init__.py`, by any import.
3. An object has one passage name however many modules export it: its own name is preferred to an alias, then the
   shortest path. `numpy.fft._pocketfft.fft` is therefore `numpy.fft.fft`.

Not read: compiled modules and `.pyi` stubs (no docstrings in their sources), double-underscore methods other than
`__init__` (its documentation joins that of its class), docstrings built at run time, folders without `__init__.py`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import itertools
import re
import site
import sysconfig
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.docstrings import Doc, Module, Target, read_module
from pipelines.errors import InputError

WORDS = 100
"""Words in a passage, as in the Wikipedia passages of DPR (Karpukhin et al., 2020, section 4.1)."""

_SHORTEST_TAIL = 25  # words; a shorter last passage joins the one before it
_NOT_API = frozenset({"tests", "test", "conftest", "vendor", "vendored", "vendored_packages", "thirdparty_files"})


@dataclass(frozen=True)
class PackageSource:
    """An installed package, or a part of one: its import name, its distribution's version, its folder or file."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True)
class SkippedFile:
    """A source file that could not be read; `reason` is one of `schema.REASONS`."""

    source: str
    reason: str
    detail: str


def installed_packages(names: Sequence[str] | None = None) -> list[PackageSource]:
    """Find installed packages by import name, sorted by name; all top-level ones when `names` is None.

    A name may be dotted (`torch.nn`): then only that part of the package is read.
    Raises InputError for a name that is not installed as Python source, and for one given twice or inside another.
    """
    found = _top_level_packages()
    if names is None:
        return [PackageSource(name, version, path) for name, (version, path) in sorted(found.items())]
    ordered = sorted(names)
    for i, name in enumerate(ordered):
        for other in ordered[:i]:
            if f"{name}.".startswith(f"{other}."):
                raise InputError(f"package {name!r} is already read as part of {other!r}", hint="name it once")
    return [_locate(name, found) for name in ordered]


def _top_level_packages() -> dict[str, tuple[str, Path]]:
    """Map each import name in the environment's site folders to its version and path; the first folder wins."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
    if site.ENABLE_USER_SITE:
        folders[site.getusersitepackages()] = None
    found: dict[str, tuple[str, Path]] = {}
    distributions = importlib.metadata.distributions(path=list(folders))
    for distribution in sorted(distributions, key=lambda each: each.name):
        for name in sorted({file.parts[0].removesuffix(".py") for file in distribution.files or []}):
            path = _source_path(Path(str(distribution.locate_file(name))))
            if path is not None and name.isidentifier() and not name.startswith("_"):
                found.setdefault(name, (distribution.version, path))
    return found


def _source_path(path: Path) -> Path | None:
    """Return the package folder or the module file that `path` (without suffix) names."""
    if path.is_dir():
        return path
    module = path.with_suffix(".py")
    return module if module.is_file() else None


def _locate(name: str, found: dict[str, tuple[str, Path]]) -> PackageSource:
    top, *rest = name.split(".")
    version, base = found.get(top, ("", None))
    path = _source_path(base.joinpath(*rest)) if base is not None and rest else base
    if path is None:
        near = difflib.get_close_matches(top, found, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near and near[0] != top else "install it, or drop it from the list"
        raise InputError(
            f"no installed Python package is called {name!r}",
            where=sysconfig.get_path("purelib"),
            expected="an import name such as 'numpy' or 'torch.nn', installed as Python source",
            hint=hint,
        )
    return PackageSource(name, version, path)


def read_package(source: PackageSource, skipped: list[SkippedFile] | None = None) -> Iterator[dict[str, str]]:
    """Yield {"id", "title", "text"} for each passage of the package, sorted by name; ids are unique within it.

    The first passage of an object has its qualified name as id, the next ones `name#2`, `name#3`. A file that does
    not decode or parse is appended to `skipped`; where no list is given it raises InputError instead.
    """
    modules = {}
    for name, path in _module_files(source):
        try:
            modules[name] = read_module(name, path)
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            reason = "undecodable" if isinstance(error, UnicodeError) else "malformed"
            if skipped is None:
                raise InputError(f"cannot read Python source: {error}", where=str(path)) from error
            skipped.append(SkippedFile(str(path), reason, f"{type(error).__name__}: {error}"))
    entries: dict[str, Doc] = {}
    for name, doc in _public_docs(source.name, modules):
        entries[_free_name(name, doc, entries)] = doc
    for name, doc in sorted(entries.items()):
        yield from _passages(name, doc)


def _free_name(name: str, doc: Doc, taken: Container[str]) -> str:
    """Return `name`; where another object has it already, `name (module)` or `name (2)`, `name (3)`, ..."""
    module = [f"{name} (module)"] if doc.kind == "module " else []
    numbered = (f"{name} ({i})" for i in itertools.count(2))
    return next(free for free in itertools.chain([name], module, numbered) if free not in taken)


def _module_files(source: PackageSource) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and file of each module in name order; private ones too, for what they define."""
    if source.path.is_file():
        yield source.name, source.path
        return
    for path in sorted(source.path.iterdir()):
        name = f"{source.name}.{path.stem}"
        if path.name == "__init__.py":
            yield source.name, path
        elif path.stem in _NOT_API or path.stem == "_vendor" or not path.stem.isidentifier():
            continue
        elif path.suffix == ".py" and path.is_file():
            yield name, path
        elif not path.suffix and path.joinpath("__init__.py").is_file():
            yield from _module_files(PackageSource(name, source.version, path))


def _public_docs(root: str, modules: dict[str, Module]) -> Iterator[tuple[str, Doc]]:
    """Yield every documented public object once, with the name a user would import it by; modules come last."""
    names: dict[Target, list[str]] = {}
    public = [module for module in modules.values() if "._" not in module.name.removeprefix(root)]
    for module in public:
        for name in _public_names(module, modules):
            target = _resolve((module.name, name), modules, set())
            if target is not None:
                names.setdefault(target, []).append(f"{module.name}.{name}")
    for (origin, own), candidates in names.items():
        best = min(candidates, key=lambda name: (not name.endswith(f".{own}"), name.count("."), name))
        for doc in modules[origin].definitions[own]:
            yield f"{best}{doc.member}", doc
    for module in public:
        if module.doc:
            yield module.name, Doc("module ", "", "", module.doc)


def _public_names(module: Module, modules: dict[str, Module]) -> list[str]:
    """Return what `module` offers its users, without modules: rule 2 above."""
    if module.exported is not None:
        return [name for name in dict.fromkeys(module.exported) if not name.startswith("_")]
    names = dict.fromkeys([*module.definitions, *sorted(module.reexported)])
    for star in module.stars:
        names.update(dict.fromkeys(_star_names(star, modules, {module.name})))
    return [name for name in names if not name.startswith("_")]


def _star_names(origin: str, modules: dict[str, Module], seen: set[str]) -> list[str]:
    """Return the names that `from origin import *` brings in, following its own star imports."""
    module = modules.get(origin)
    if module is None or origin in seen:
        return []
    if module.exported is not None:
        return module.exported
    names = [*module.definitions, *module.imports]
    for star in module.stars:
        names += _star_names(star, modules, seen | {origin})
    return [name for name in names if not name.startswith("_")]


def _resolve(name: Target, modules: dict[str, Module], seen: set[Target]) -> Target | None:
    """Follow imports to the module that defines a name; None for modules, values, cycles and other packages."""
    module = modules.get(name[0])
    if module is None or name in seen:
        return None
    if name[1] in module.definitions:
        return name
    seen.add(name)
    if name[1] in module.imports:
        return _resolve(module.imports[name[1]], modules, seen)
    for star in module.stars:
        found = _resolve((star, name[1]), modules, seen) if name[1] in _star_names(star, modules, set()) else None
        if found is not None:
            return found
    return None


# Passages


def _passages(name: str, doc: Doc) -> Iterator[dict[str, str]]:
    """Cut one object's documentation into passages that each say what they are about."""
    head = f"{doc.kind}{name.partition(' (')[0]}{doc.parameters}"
    words = max(WORDS - _size(head), WORDS // 2)
    for i, text in enumerate(_cut(doc.text, words), start=1):
        passage_id = name if i == 1 else f"{name}#{i}"
        start = head if i == 1 else f"{name} (continued):"
        yield {"id": passage_id, "title": name, "text": f"{start}\n{text}"}


def _cut(text: str, words: int) -> list[str]:
    """Pack paragraphs, then lines, into pieces of at most `words` words; a short last one joins the one before."""
    pieces: list[str] = []
    count = 0
    for separator, block in _blocks(text, words):
        size = _size(block)
        if not pieces or count + size > words:
            pieces.append(block)
            count = size
        else:
            pieces[-1] += separator + block
            count += size
    if len(pieces) > 1 and count < _SHORTEST_TAIL:
        tail = pieces.pop()
        pieces[-1] += "\n\n" + tail
    return pieces


def _size(text: str) -> int:
    """Count words; those of code and tables are long, and eight characters of them cost an encoder what a word does."""
    return max(len(text.split()), len(text) // 8)


def _blocks(text: str, words: int) -> Iterator[tuple[str, str]]:
    """Yield (separator, block): paragraphs, and the lines or runs of words of a paragraph longer than `words`."""
    for paragraph in re.split(r"\n\s*\n", text):
        if _size(paragraph) <= words:
            yield "\n\n", paragraph
            continue
        separator = "\n\n"
        for line in paragraph.split("\n"):
            tokens = line.split()
            runs = [" ".join(tokens[i : i + words]) for i in range(0, len(tokens), words)]
            for run in runs if len(runs) > 1 else [line]:  # a line that fits keeps its indentation
                yield separator, run
                separator = "\n"
