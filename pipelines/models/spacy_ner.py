"""PAQ's other answer extractor: the named entities that a spaCy pipeline finds, in reading order and without scores.

A checkpoint is a spaCy pipeline's directory (config.cfg and meta.json); `load` also takes the name of an installed
pipeline package, such as en_core_web_sm, of which only the data are read. spaCy is the optional extra `ner`.

A config.cfg can name any registered function, those of other installed packages too, and spaCy calls it. So only
spaCy's own components and functions are accepted; that excludes transformer pipelines, whose parts another package
registers.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.base import ModelInfo, Span
from pipelines.models.files import read_json, refuse

_FILES = ("config.cfg", "meta.json")
_FINDERS = ("ner", "beam_ner", "entity_ruler", "future_entity_ruler", "span_ruler")
_COMPONENTS = (
    *_FINDERS,
    *("attribute_ruler", "beam_parser", "doc_cleaner", "entity_linker", "lemmatizer", "merge_entities"),
    *("merge_noun_chunks", "merge_subtokens", "morphologizer", "parser", "sentencizer", "senter", "span_finder"),
    *("spancat", "spancat_singlelabel", "tagger", "textcat", "textcat_multilabel", "tok2vec", "token_splitter"),
    "trainable_lemmatizer",
)
_PIECE = 100_000  # characters; spaCy needs about 1 GB for as many, and refuses a million
_BATCH = 128


def recognises(directory: str) -> bool:
    return all(os.path.isfile(os.path.join(directory, name)) for name in _FILES)


def info(directory: str) -> ModelInfo:
    """Describe the pipeline, from meta.json. Raises CheckpointError when the pipeline finds no entities."""
    for name in _FILES:
        if not os.path.isfile(os.path.join(directory, name)):
            refuse(f"{name} is missing", directory, expected="a spaCy pipeline's directory")
    meta = read_json(directory, "meta.json", required=True)
    labels, pipeline = meta.get("labels") or {}, meta.get("pipeline") or []
    if not isinstance(labels, dict) or not isinstance(pipeline, list):
        refuse(
            "meta.json: labels is no object, or pipeline no list", directory, expected="a spaCy pipeline's meta.json"
        )
    own = [str(name) for name in pipeline]
    found = [labels.get(name) or [] for name in own if "ner" in name]
    return ModelInfo(
        family="spacy_ner",
        kind="answer-extractor",
        computes="the named entities of a passage, in reading order, without scores",
        max_length=_PIECE,
        formatting=f"the text alone; a longer one in pieces of at most {_PIECE:,} characters",
        details={
            "name": f"{meta.get('lang', '')}_{meta.get('name', '')} {meta.get('version', '')}".strip(),
            "pipeline": own,
            "entities": sorted({str(label) for each in found if isinstance(each, list) for label in each}),
        },
    )


def load(directory: str, dtype: str = "fp32", device: str = "cpu", *, batch_size: int = _BATCH) -> EntityExtractor:
    """Load a pipeline from its directory, or by the name of an installed package. dtype, device: fp32 on the CPU only.

    Raises ConfigError without spaCy, CheckpointError for what is no pipeline, finds no entities, is damaged, or would
    run other code than spaCy's.
    """
    if importlib.util.find_spec("spacy") is None:
        hint = 'pip install "pinakes[ner]"'
        raise ConfigError("spaCy is not installed: a spaCy pipeline needs it", where=directory, hint=hint)
    if dtype != "fp32" or device != "cpu":
        raise ConfigError(f"a spaCy pipeline runs in fp32 on the CPU, not in {dtype} on {device}", where=directory)
    if batch_size < 1:
        raise ConfigError("batch_size must be at least 1")
    path = directory if os.path.isdir(directory) else _package_data(directory)
    info(path)

    import spacy

    _check_config(path)
    try:
        return EntityExtractor(spacy.load(path), batch_size)
    except Exception as error:  # confection, srsly, numpy and Cython each have their own tree
        hint = "copy it again, or install the spaCy release that meta.json asks for"
        raise CheckpointError(f"the pipeline cannot be loaded: {_first_line(error)}", where=path, hint=hint) from error


def _package_data(name: str) -> str:
    """Return the data directory of an installed pipeline package, found without importing the package."""
    is_name = re.fullmatch(r"[A-Za-z]\w*", name) is not None
    spec = importlib.util.find_spec(name) if is_name else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        meta = read_json(folder, "meta.json")
        data = os.path.join(folder, f"{meta.get('lang')}_{meta.get('name')}-{meta.get('version')}")
        if recognises(data):
            return data
    hint = f"python -m spacy download {name}" if is_name else "check the path"
    return refuse("this is neither a directory nor an installed spaCy pipeline", name, hint=hint)


def _check_config(path: str) -> None:
    """Raise CheckpointError unless config.cfg names spaCy's own components and functions only, one finding entities."""
    nlp, components = _read_config(path)
    factories = {name: str(settings.get("factory")) for name, settings in components.items()}
    foreign = sorted(set(factories.values()) - set(_COMPONENTS))
    foreign += sorted({function for function in _functions([nlp, components]) if not _is_own(function)})
    foreign += [f"source of {name}" for name, settings in components.items() if "source" in settings]
    if foreign:
        expected = "spaCy's own components; others run code that we do not know"
        refuse(
            f"the pipeline uses {', '.join(foreign)}", path, expected=expected, hint="use en_core_web_sm or the like"
        )
    running = set(nlp.get("pipeline") or []) - set(nlp.get("disabled") or [])
    if not any(factories.get(name) in _FINDERS for name in running):
        shown = ", ".join(sorted(running)) or "nothing"
        refuse(f"the pipeline ({shown}) finds no entities", path, expected=f"one of {', '.join(_FINDERS)}")


def _read_config(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sections nlp and components of config.cfg, the names of components in them being strings."""
    from spacy.util import load_config

    try:
        config = load_config(os.path.join(path, "config.cfg"), interpolate=True)
    except Exception as error:  # confection and configparser each have their own tree
        raise CheckpointError(f"config.cfg cannot be read: {_first_line(error)}", where=path) from error
    nlp, components = config.get("nlp"), config.get("components") or {}
    expected = "the config.cfg of a spaCy pipeline"
    if not isinstance(nlp, dict):
        refuse("config.cfg has no section [nlp]", path, expected=expected)
    if not isinstance(components, dict) or not all(isinstance(settings, dict) for settings in components.values()):
        refuse("config.cfg: a component is no section", path, expected=expected)
    for key in ("pipeline", "disabled"):
        names = nlp.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            refuse(f"config.cfg: nlp.{key} is no list of names", path, expected=expected)
    return nlp, components


def _functions(settings: Any) -> Iterator[str]:
    """Yield `registry:name` of every registered function that the settings ask for."""
    values = (
        settings.items() if isinstance(settings, dict) else enumerate(settings if isinstance(settings, list) else [])
    )
    for key, value in values:
        if isinstance(key, str) and key.startswith("@"):
            yield f"{key[1:]}:{value}"
        yield from _functions(value)


def _is_own(function: str) -> bool:
    registry, name = function.split(":", 1)
    return registry != "callbacks" and name.startswith("spacy.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class EntityExtractor:
    """A spaCy pipeline. Memory: that of one batch of texts, a long text counting for one piece at a time."""

    def __init__(self, nlp: Any, batch_size: int) -> None:
        self.nlp, self.batch_size = nlp, batch_size

    def extract(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return every entity of each text, in reading order; score None."""
        found: list[list[Span]] = [[] for _ in texts]
        pieces = ((text[a:b], (row, a)) for row, text in enumerate(texts) for a, b in _pieces(text))
        for doc, (row, start) in self.nlp.pipe(pieces, as_tuples=True, batch_size=self.batch_size):
            found[row] += [Span(e.text, start + e.start_char, start + e.end_char) for e in doc.ents]
        return found


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of pieces of at most _PIECE characters, cut after a space where there is one."""
    start = 0
    while len(text) - start > _PIECE:
        space = text.rfind(" ", start, start + _PIECE)
        end = space + 1 if space >= start else start + _PIECE
        yield start, end
        start = end
    yield start, len(text)
