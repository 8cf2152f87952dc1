"""Model families: which one a checkpoint is, and what it holds.

The decision rests on what is in the directory (config.json, modules.json, tensor names), never on its name. Importing
this package is cheap; torch and transformers are imported when weights or a tokeniser are loaded.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NoReturn, cast

from pipelines.models.base import EncoderFamily, EncoderInfo, Kind, ModelFamily, ModelInfo
from pipelines.models.files import checkpoint_digest, read_json, refuse

__all__ = ["FAMILIES", "checkpoint_digest", "describe", "find_family", "find_model", "kind_of"]

FAMILIES: dict[str, Kind] = {
    "sentence_transformers": "encoder",
    "word_embeddings": "encoder",
    "dpr": "encoder",
    "dpr_cp": "encoder",
    "paq": "encoder",
    "paq_passages": "encoder",
    "clip": "encoder",
    "cross_encoder": "cross-encoder",
    "paq_reranker": "cross-encoder",
    "dpr_reader": "reader",
    "fid": "reader",
    "span2d": "answer-extractor",
    "spacy_ner": "answer-extractor",
    "bart": "question-generator",
}
"""Every family, a module of this package each, with the kind of model it reads. At most one recognises a checkpoint."""

_ARTICLE = {"encoder": "an encoder", "answer-extractor": "an answer extractor"}
_SUPPORTED: dict[Kind, str] = {
    "encoder": (
        "a sentence-transformers directory (modules.json), DPR encoders (Hugging Face layout or a .cp file), a PAQ "
        "retriever (ALBERT, encode_proj in the weights) or CLIP"
    ),
    "cross-encoder": "a Hugging Face ...ForSequenceClassification directory with 1 or 2 labels, or a PAQ reranker",
    "reader": "a DPR reader (Hugging Face layout or a .cp file) or a FiD reader (T5)",
    "answer-extractor": "PAQ's span extractor (start_outputs and end_outputs in the weights) or a spaCy pipeline",
    "question-generator": "a BART directory (BartForConditionalGeneration)",
}


def kind_of(checkpoint: str) -> tuple[str, Kind] | None:
    """Return the (family, kind) whose layout this local directory or file has, or None."""
    for name, kind in FAMILIES.items():
        if importlib.util.find_spec(f"pipelines.models.{name}") is None:
            continue  # while the families are being written
        if _module(name).recognises(checkpoint):
            return name, kind
    return None


def find_family(directory: str) -> EncoderFamily:
    """Return the family module that reads this bi-encoder.

    Raises CheckpointError when the checkpoint is absent, of another kind, or lacks weights or a tokeniser; the message
    names the nearest supported layout.
    """
    family: EncoderFamily = _find(directory, "encoder")
    return family


def find_model(directory: str, kind: Kind) -> ModelFamily:
    """Return the family module that reads this model of `kind`. Raises CheckpointError as find_family does."""
    family: ModelFamily = _find(directory, kind)
    return family


def describe(directory: str) -> EncoderInfo | ModelInfo:
    """Return what the checkpoint is, from its configs and tensor names. Raises CheckpointError as find_family does."""
    found = kind_of(directory) if os.path.exists(directory) else None
    family = _find(directory, found[1] if found else "encoder")
    return cast("EncoderInfo | ModelInfo", family.info(directory))


def _find(directory: str, kind: Kind) -> Any:
    if not os.path.exists(directory):
        refuse("the checkpoint directory does not exist", directory, hint="pipelines.models.fetch downloads one")
    found = kind_of(directory)
    if found is None:
        _refuse_unknown(directory, kind)
    name, other = found
    if other != kind:
        family = name.replace("_", " ")
        what = f"this is {_article(other)} ({family}), not {_article(kind)}"
        refuse(what, directory, expected=_SUPPORTED[kind], hint=_USES[other])
    family = _module(name)
    family.info(directory)  # refuses what is incomplete
    return family


_USES: dict[Kind, str] = {
    "encoder": "use it to embed: encoder.checkpoint",
    "cross-encoder": "use it to rerank, not to embed: rerank.checkpoint",
    "reader": "it answers, it does not embed: answer.reader",
    "answer-extractor": "use it with `pinakes extract`",
    "question-generator": "use it with `pinakes generate`",
}


def _article(kind: Kind) -> str:
    return _ARTICLE.get(kind, f"a {kind}").replace("-", " ")


def _module(name: str) -> Any:
    return importlib.import_module(f"pipelines.models.{name}")


def _refuse_unknown(directory: str, kind: Kind) -> NoReturn:
    """Raise with the reason and the nearest layout that is supported."""
    expected = _SUPPORTED[kind]
    if os.path.isfile(directory):
        refuse("the checkpoint is a file of no known kind", directory, expected=expected, hint="DPR's end in .cp")
    if not os.listdir(directory):
        refuse("the checkpoint directory is empty", directory, expected=expected)
    config: dict[str, Any] = read_json(directory, "config.json")
    if not config:
        refuse("the directory has neither config.json nor modules.json", directory, expected=expected)
    model = str(config.get("model_type", "unknown"))
    architectures = [str(name) for name in config.get("architectures") or []]
    what = f"a {model} model ({', '.join(architectures) or 'no architecture named'}) is not supported"
    hint = (
        "a seq2seq checkpoint is read as a BART question generator or a FiD reader"
        if model in ("t5", "mt5")
        else (
            "the nearest layout is sentence-transformers: beside this transformer it needs modules.json and "
            "1_Pooling/config.json, because the pooling is part of the encoder"
        )
    )
    refuse(what, directory, expected=expected, hint=hint)
