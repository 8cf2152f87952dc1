"""The reader of installed packages' documentation, on a hand-made package and on real ones."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import pydocs
from pipelines.errors import InputError
from pipelines.pydocs import PackageSource, SkippedFile, installed_packages, read_package

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# The packages that configs/demo.yaml reads; every gold id of demo-questions.jsonl is in one of them.
DEMO_PACKAGES = [
    "click",
    "fastapi",
    "numpy",
    "pyarrow",
    "pydantic",
    "ray.data",
    "ray.serve",
    "requests",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "typer",
    "yaml",
]

TREE = {
    "__init__.py": '''
        """The zoo package."""
        from typing import TYPE_CHECKING
        from ._impl import feed, _hidden as groom
        from zoo._impl import Cage
        from .shapes import area
        from ._starred import *
        from missing_elsewhere import nothing
        if TYPE_CHECKING:
            from ._lazy import later
    ''',
    "_impl.py": '''
        """A private module's docstring is not a passage."""
        from typing import overload
        def feed(animal, /, food="hay", *, hours: int = 3, **extra: object) -> bool:
            """Feed an animal."""
        def _hidden():
            """Groom it."""
        def never_exported():
            """Nobody can import this by a public name."""
        class Cage:
            """Hold one animal."""
            def __init__(self, width, height=2):
                """Measure the cage."""
            @property
            def area(self):
                """Floor in square metres."""
            @area.setter
            def area(self, value):
                """Never shown."""
            @overload
            def open(self, key: int):
                """An overload's docstring is not the implementation's."""
            @overload
            def open(self, key: str): ...
            def open(self, key):
                """Open the door."""
            @classmethod
            def of(cls, animal):
                """Build a cage for it."""
            @staticmethod
            def count(where=None):
                """Count the cages."""
            def _lock(self):
                """Private."""
            def undocumented(self):
                return 1
            class Door:
                """A door."""
                def close(self):
                    """Close it."""
                class _Hinge:
                    """Private too."""
    ''',
    "_starred.py": '''
        __all__ = ["starred"]
        __all__ += ["added"]
        __all__.append("appended")
        def starred():
            """Come by star."""
        def added():
            """Come by plus."""
        def appended():
            """Come by append."""
        def left_out():
            """Not in __all__."""
    ''',
    "_lazy.py": '''
        def later():
            """Imported late."""
    ''',
    "shapes.py": '''
        """Shapes."""
        __all__ = ["area", "perimeter"]
        import functools
        def area(r=3.14159265358979323846264338327):
            """Compute an area: πr² — naïve."""
        def helper():
            """Defined here, but not in __all__."""
        @functools.cache
        @another.decorator(1)
        async def perimeter(r):
            """Compute a perimeter."""
    ''',
    "plain.py": '''
        from ._impl import never_exported
        from ._lazy import later as later
        try:
            import fast
        except ImportError:
            def fallback():
                """Work without it."""
        def _secret():
            """Found through its alias."""
        told = _secret
        "not a docstring"
    ''',
    "sub/__init__.py": "from .sub import sub\nfrom . import loop\n",
    "sub/sub.py": '"""The module."""\ndef sub():\n    """The function of the same name."""\n',
    "sub/loop.py": "from .loop2 import *\nfrom .loop2 import ghost as ghost\n",
    "sub/loop2.py": "from .loop import *\nfrom .loop import ghost as ghost\n",
    "_private/__init__.py": '"""Private package."""\n',
    "_private/public.py": '"""Public name in a private place."""\n',
    "tests/__init__.py": '"""Tests are not documentation."""\n',
    "data/readme.py": '"""No __init__.py beside it: not a package."""\n',
    "not-a-module.py": '"""Cannot be imported."""\n',
    "empty.py": "",
}


def dedent(text: str) -> str:
    lines = [line[8:] if line.startswith(" " * 8) else line for line in text.split("\n")]
    return "\n".join(lines).strip() + "\n"


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[PackageSource]:
    for name, text in TREE.items():
        path = tmp_path / "zoo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    yield PackageSource("zoo", "1.0", tmp_path / "zoo")
    assert not [name for name in sys.modules if name.split(".")[0] == "zoo"], "the reader imported what it read"


def read(source: PackageSource) -> dict[str, str]:
    return {passage["id"]: passage["text"] for passage in read_package(source)}


def test_every_public_object_once_under_its_public_name(zoo: PackageSource) -> None:
    assert sorted(read(zoo)) == [
        "zoo",
        "zoo.Cage",
        "zoo.Cage.Door",
        "zoo.Cage.Door.close",
        "zoo.Cage.area",
        "zoo.Cage.count",
        "zoo.Cage.of",
        "zoo.Cage.open",
        "zoo.added",
        "zoo.appended",
        "zoo.area",
        "zoo.feed",
        "zoo.groom",
        "zoo.later",
        "zoo.plain.fallback",
        "zoo.plain.told",
        "zoo.shapes",
        "zoo.shapes.perimeter",
        "zoo.starred",
        "zoo.sub.sub",
        "zoo.sub.sub (module)",
    ]


def test_text_is_signature_then_docstring(zoo: PackageSource) -> None:
    texts = read(zoo)
    assert texts["zoo.feed"] == "zoo.feed(animal, food='hay', *, hours=3, **extra)\nFeed an animal."
    assert texts["zoo.Cage"] == "class zoo.Cage(width, height=2)\nHold one animal.\n\nMeasure the cage."
    assert texts["zoo.Cage.area"] == "property zoo.Cage.area\nFloor in square metres."
    assert texts["zoo.Cage.open"] == "zoo.Cage.open(key)\nOpen the door."
    assert texts["zoo.Cage.of"] == "zoo.Cage.of(animal)\nBuild a cage for it."
    assert texts["zoo.Cage.count"] == "zoo.Cage.count(where=None)\nCount the cages."
    assert texts["zoo.area"] == "zoo.area(r=3.141592653589793)\nCompute an area: πr² — naïve."
    assert texts["zoo.shapes.perimeter"] == "async zoo.shapes.perimeter(r)\nCompute a perimeter."
    assert texts["zoo"] == "module zoo\nThe zoo package."
    assert texts["zoo.sub.sub"].startswith("zoo.sub.sub()\n")
    assert texts["zoo.sub.sub (module)"] == "module zoo.sub.sub\nThe module."


def test_reading_twice_gives_the_same_rows_in_name_order(zoo: PackageSource) -> None:
    first, second = list(read_package(zoo)), list(read_package(zoo))
    assert first == second
    assert [p["title"] for p in first] == sorted(p["title"] for p in first)
    assert all(set(p) == {"id", "title", "text"} for p in first)


def test_unreadable_files_are_skipped_and_counted(zoo: PackageSource) -> None:
    (zoo.path / "broken.py").write_text("def f(:\n")
    (zoo.path / "binary.py").write_bytes(b'"""\xff\xfe"""\n')
    (zoo.path / "null.py").write_bytes(b'"""a"""\0\n')
    whole = dict(read(PackageSource("zoo.sub", "", zoo.path / "sub")).items())
    skipped: list[SkippedFile] = []
    ids = [p["id"] for p in read_package(zoo, skipped)]
    assert set(whole) <= set(ids)
    assert [Path(s.source).name for s in skipped] == ["binary.py", "broken.py", "null.py"]
    assert {s.reason for s in skipped} <= {"undecodable", "malformed"}
    assert all(s.detail for s in skipped)


def test_a_broken_init_hides_nothing_else(zoo: PackageSource) -> None:
    (zoo.path / "__init__.py").write_text("def f(:\n")
    skipped: list[SkippedFile] = []
    ids = [p["id"] for p in read_package(zoo, skipped)]
    assert len(skipped) == 1
    assert "zoo.shapes.area" in ids
    assert not [name for name in ids if "_" in name]


def test_an_unreadable_file_is_an_error_where_nobody_counts(zoo: PackageSource) -> None:
    (zoo.path / "broken.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=r"broken\.py"):
        list(read_package(zoo))


def test_a_single_module_is_a_package_too(tmp_path: Path) -> None:
    (tmp_path / "six.py").write_text('"""Six."""\ndef moves():\n    """Move."""\n')
    assert list(read(PackageSource("six", "1", tmp_path / "six.py"))) == ["six", "six.moves"]


def test_a_long_docstring_is_cut_into_passages_that_stand_alone(tmp_path: Path) -> None:
    paragraphs = "\n\n".join(f"Paragraph {i} " + "word " * 58 for i in range(4))
    (tmp_path / "m.py").write_text(f'def f(x):\n    """{paragraphs}"""\n')
    passages = list(read_package(PackageSource("m", "1", tmp_path / "m.py")))
    assert [p["id"] for p in passages] == ["m.f", "m.f#2", "m.f#3", "m.f#4"]
    assert passages[0]["text"].startswith("m.f(x)\nParagraph 0")
    assert passages[1]["text"].startswith("m.f (continued):\nParagraph 1")
    assert {p["title"] for p in passages} == {"m.f"}


def test_parameter_docs_of_pep_727_are_told_once_a_class(tmp_path: Path) -> None:
    text = '''
        class App:
            def get(self, path: Annotated[str, Doc("""
                Where it is.

                Twice.""")]):
                """Get."""
            def put(self, path: Annotated[str, Doc("""
                Where it is.

                Twice.""")], body: Annotated[str, doc.Doc("What it is.")] = ""):
                """Put."""
    '''
    (tmp_path / "m.py").write_text(dedent(text))
    assert read(PackageSource("m", "1", tmp_path / "m.py")) == {
        "m.App.get": "m.App.get(path)\nGet.\n\npath: Where it is.\n\nTwice.",
        "m.App.put": "m.App.put(path, body='')\nPut.\n\nbody: What it is.",
    }


def test_objects_that_share_a_name_all_stay(tmp_path: Path) -> None:
    files = {
        "__init__.py": 'class Box:\n    """A class."""\n    def open(self):\n        """A method."""\n',
        "Box.py": '"""A module."""\ndef open():\n    """A function."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read(PackageSource("m", "1", tmp_path)) == {
        "m.Box": "class m.Box\nA class.",
        "m.Box (module)": "module m.Box\nA module.",
        "m.Box.open": "m.Box.open()\nA function.",
        "m.Box.open (2)": "m.Box.open()\nA method.",
    }


def test_long_signatures_are_shortened(tmp_path: Path) -> None:
    many = ", ".join(f"p{i}={i}" for i in range(30))
    (tmp_path / "m.py").write_text(f'def f({many}):\n    """F."""\ndef g(x="{"long" * 20}"):\n    """G."""\n')
    texts = read(PackageSource("m", "1", tmp_path / "m.py"))
    assert texts["m.f"].startswith("m.f(p0, p1, ")
    assert ", ...)\n" in texts["m.f"]
    assert texts["m.g"] == "m.g(x=...)\nG."


def test_text_always_encodes_as_utf8(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text('def f():\n    "Lone \\ud800 surrogate and \\0 null, \\q escape."\n')
    (text,) = read(PackageSource("m", "1", tmp_path / "m.py")).values()
    assert text.encode("utf-8").decode() == "m.f()\nLone ? surrogate and  null, \\q escape."


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab é\n\t"), max_size=600), st.integers(1, 30))
def test_cutting_loses_and_doubles_no_word(text: str, words: int) -> None:
    pieces = pydocs._cut(text, words)
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece.split()) <= words for piece in pieces[:-1])
    assert all(pieces) or not text.split()


def test_finding_installed_packages() -> None:
    every = installed_packages()
    names = [source.name for source in every]
    assert names == sorted(set(names))
    assert {"numpy", "yaml", "typing_extensions"} <= set(names)
    (numpy,) = installed_packages(["numpy"])
    assert numpy in every
    assert numpy.version == __import__("numpy").__version__
    (linalg,) = installed_packages(["numpy.linalg"])
    assert linalg.name == "numpy.linalg"
    assert linalg.version == numpy.version
    (module,) = installed_packages(["torch.nn.functional"])
    assert module.path.name == "functional.py"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nunpy"], "did you mean 'numpy'"),
        (["numpy.nothing_here"], "numpy.nothing_here"),
        (["numpy", "numpy.fft"], "already read as part of 'numpy'"),
        (["yaml", "yaml"], "name it once"),
        (["../numpy"], "no installed Python package"),
        ([""], "no installed Python package"),
    ],
)
def test_a_wrong_name_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        installed_packages(names)


def test_the_demo_packages_and_questions() -> None:
    """Read the demo's packages for real: enough passages, quickly, and every gold id is one of them."""
    start, skipped = time.process_time(), list[SkippedFile]()
    passages = [p for source in installed_packages(DEMO_PACKAGES) for p in read_package(source, skipped)]
    seconds = time.process_time() - start
    ids = {p["id"] for p in passages}
    assert not skipped
    assert len(ids) == len(passages)
    assert 5_000 <= len(passages) <= 10_000
    assert seconds < 10
    assert "numpy.fft.fft" in ids
    assert "torch.nn.Linear" in ids
    assert "requests.get" in ids
    assert not [i for i in ids if any(part.startswith("_") for part in i.split("."))]

    lines = (CONFIGS / "demo-questions.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    assert len(questions) >= 70
    assert all(set(q) == {"id", "question", "positive"} and q["positive"] for q in questions)
    assert len({q["id"] for q in questions}) == len({q["question"] for q in questions}) == len(questions)
    missing = {positive for q in questions for positive in q["positive"]} - ids
    assert not missing
