"""Named entities against spaCy's own call on one text at a time."""

from __future__ import annotations

import builtins
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, find_model, kind_of, spacy_ner
from pipelines.models.base import Span

TEXTS = [
    "The library of Alexandria, in Egypt, was not in Greece.",
    "",
    "??",
    "A king of Egypt and Egypt",
    "👑 of Alexandria " + unicodedata.normalize("NFD", "café in Ägypten"),
    "no names here",
]
PATTERNS = [
    {"label": "CITY", "pattern": "Alexandria"},
    {"label": "COUNTRY", "pattern": "Egypt"},
    {"label": "COUNTRY", "pattern": [{"LOWER": "greece"}]},
    {"label": "COUNTRY", "pattern": unicodedata.normalize("NFD", "Ägypten")},
]


def write_pipeline(directory: str, *, trained: bool = False) -> str:
    """Write an English pipeline with an entity ruler, behind a ner that learned about kings when `trained`."""
    import spacy
    from spacy.training import Example
    from spacy.util import fix_random_seed

    nlp = spacy.blank("en")
    if trained:
        fix_random_seed(1)
        ner = nlp.add_pipe("ner")
        example = Example.from_dict(nlp.make_doc("A king of Egypt"), {"entities": [(0, 6, "PERSON")]})
        ner.add_label("PERSON")
        nlp.initialize()
        for _ in range(10):
            nlp.update([example])
    nlp.add_pipe("entity_ruler").add_patterns(PATTERNS)
    Path(directory).mkdir(parents=True, exist_ok=True)
    nlp.to_disk(directory)
    return directory


@pytest.mark.parametrize("trained", [False, True])
def test_entities_equal_spacy(tmp_path: Path, parity: Callable[..., None], trained: bool) -> None:
    import spacy

    directory = write_pipeline(str(tmp_path), trained=trained)
    assert find_model(directory, "answer-extractor") is spacy_ner
    nlp = spacy.load(directory)
    theirs = [[Span(e.text, e.start_char, e.end_char, None) for e in nlp(text).ents] for text in TEXTS]
    ours = spacy_ner.load(directory).extract(TEXTS)
    assert sum(map(len, theirs)) >= 7
    assert ("A king" in {span.text for span in theirs[3]}) == trained
    layout = "ner and entity ruler" if trained else "entity ruler"
    parity("PAQ NE extractor", layout, "spaCy, one text at a time", list(map(repr, ours)), list(map(repr, theirs)))
    assert spacy_ner.load(directory, batch_size=1).extract(TEXTS) == ours
    assert spacy_ner.load(directory).extract(TEXTS[::-1])[::-1] == ours
    assert all(span.text == t[span.start : span.end] for t, spans in zip(TEXTS, ours, strict=True) for span in spans)


def test_all_entities_in_reading_order(tmp_path: Path) -> None:
    found = spacy_ner.load(write_pipeline(str(tmp_path))).extract(TEXTS)
    assert found[0] == [Span("Alexandria", 15, 25), Span("Egypt", 30, 35), Span("Greece", 48, 54)]
    assert [span.start for span in found[3]] == [10, 20]
    assert [span.text for span in found[4]] == ["Alexandria", unicodedata.normalize("NFD", "Ägypten")]
    assert found[1] == found[2] == found[5] == []


def test_a_text_of_a_megabyte(tmp_path: Path) -> None:
    """spaCy refuses a text over a million characters; in pieces, every entity is found where it is."""
    extractor = spacy_ner.load(write_pipeline(str(tmp_path)))
    text = ("x" * 1000 + " Alexandria ") * 1000
    (spans,) = extractor.extract([text])
    assert len(text) > 1_000_000
    assert [span.start for span in spans] == [1001 + 1012 * at for at in range(1000)]
    assert {text[span.start : span.end] for span in spans} == {"Alexandria"}


@pytest.mark.parametrize("text", ["", "a", "ab " * 5, "abcdefghijkl", "abcdef ghijkl mn", " " * 11])
def test_pieces_cover_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacy_ner, "_PIECE", 5)
    pieces = list(spacy_ner._pieces(text))
    assert "".join(text[start:end] for start, end in pieces) == text
    assert all(end - start <= 5 for start, end in pieces)


def test_what_it_is(tmp_path: Path) -> None:
    described = describe(write_pipeline(str(tmp_path), trained=True))
    assert (described.family, described.kind) == ("spacy_ner", "answer-extractor")
    assert described.details["pipeline"] == ["ner", "entity_ruler"]
    assert described.details["entities"] == ["PERSON"]
    assert kind_of(str(tmp_path / "config.cfg")) is None
    assert not spacy_ner.recognises(str(tmp_path / "absent"))
    (tmp_path / "meta.json").unlink()
    assert not spacy_ner.recognises(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"meta\.json is missing"):
        spacy_ner.load(str(tmp_path))


def test_it_is_described_without_importing_spacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, plain = write_pipeline(str(tmp_path)), builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("spacy")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert spacy_ner.info(directory).kind == "answer-extractor"


def test_without_spacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacy_ner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "pinakes\[ner\]"'):
        spacy_ner.load(str(tmp_path))


def test_an_installed_package_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its data are read: the package itself would run its code."""
    package = tmp_path / "en_tiny_names"
    write_pipeline(str(package / "en_tiny_names-1.2.3"))
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "meta.json").write_text(json.dumps({"lang": "en", "name": "tiny_names", "version": "1.2.3"}))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert spacy_ner.load("en_tiny_names").extract(["in Egypt"]) == [[Span("Egypt", 3, 8)]]
    assert "en_tiny_names" not in sys.modules
    for name, hint in [("en_core_web_none", "spacy download en_core_web_none"), ("../nowhere", "check the path")]:
        with pytest.raises(CheckpointError, match=f"neither a directory nor an installed spaCy pipeline[^$]*{hint}"):
            spacy_ner.load(name)
    with pytest.raises(CheckpointError, match="neither"):
        spacy_ner.load("json")


def _edit(directory: str, old: str, new: str) -> None:
    path = Path(directory) / "config.cfg"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('factory = "entity_ruler"', 'factory = "my_component"', "uses my_component"),
        ("before_creation = null", "", r"uses callbacks:spacy\.copy_from_base_model\.v1"),
        ("spacy.levenshtein_compare.v1", "mine.compare.v1", r"uses misc:mine\.compare\.v1"),
        ('@tokenizers = "spacy.Tokenizer.v1"', '@tokenizers = "mine.Tokenizer"', r"uses tokenizers:mine\.Tokenizer"),
        ('factory = "entity_ruler"', 'source = "en_core_web_sm"', "source of entity_ruler"),
        ('pipeline = ["entity_ruler"]', "pipeline = []", "finds no entities"),
        ("disabled = []", 'disabled = ["entity_ruler"]', "finds no entities"),
        ("[nlp]", "[nlp", "cannot be read"),
        ("[nlp", "[other", r"no section \[nlp\]"),
        ('pipeline = ["entity_ruler"]', "pipeline = 3", "pipeline is no list"),
        ('pipeline = ["entity_ruler"]', 'pipeline = [["entity_ruler"]]', "pipeline is no list"),
        ("[components]", "[components]\nother = 3", "a component is no section"),
    ],
)
def test_other_code_and_other_pipelines_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    directory = write_pipeline(str(tmp_path))
    _edit(directory, old, new)
    if "callbacks" in message:
        block = '\n[nlp.before_creation]\n@callbacks = "spacy.copy_from_base_model.v1"\ntokenizer = "en"\n'
        (tmp_path / "config.cfg").write_text((tmp_path / "config.cfg").read_text() + block)
    with pytest.raises(CheckpointError, match=message):
        spacy_ner.load(directory)


@pytest.mark.parametrize("change", [{"labels": ["PERSON"]}, {"pipeline": 3}])
def test_a_description_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    directory = write_pipeline(str(tmp_path))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        spacy_ner.info(directory)


@pytest.mark.parametrize("name", ["ner/model", "vocab/strings.json", "tokenizer"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_pipeline(str(tmp_path), trained=True)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        spacy_ner.load(directory)


def test_options_that_cannot_be_meant(tmp_path: Path) -> None:
    directory = write_pipeline(str(tmp_path))
    for options in ({"dtype": "bf16"}, {"device": "cuda"}):
        with pytest.raises(ConfigError, match="fp32 on the CPU"):
            spacy_ner.load(directory, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        spacy_ner.load(directory, batch_size=0)
