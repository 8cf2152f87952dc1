"""Model families: which one a checkpoint is, and what it holds.

The decision rests on what is in the directory (config.json, modules.json, tensor names), never on its name. Importing
this package is cheap; torch and transformers are imported when weights or a tokeniser are loaded.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from pipelines.errors import ConfigError
from pipelines.models.base import EncoderFamily, EncoderInfo, Kind, ModelFamily, ModelInfo
from pipelines.models.files import checkpoint_digest, checkpoint_stamps, read_json, refuse

__all__ = [
    "FAMILIES",
    "Family",
    "checkpoint_digest",
    "checkpoint_stamps",
    "describe",
    "find_family",
    "find_model",
    "kind_of",
    "tokeniser_options",
]


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint: what it is, how it lies on disk, what comes out, and the config that shows its use."""

    kind: Kind
    layout: str
    computes: str
    config: str


FAMILIES: dict[str, Family] = {
    "sentence_transformers": Family(
        "encoder",
        "modules.json: Transformer, Pooling, then Dense, LayerNorm, Normalize; hub and v0.2 layouts, legacy names",
        "one vector a text; unit vectors under cosine",
        "own-files.yaml, msmarco-tas-b.yaml, nq-distilbert.yaml, specter.yaml, multilingual.yaml",
    ),
    "word_embeddings": Family(
        "encoder",
        "modules.json: WordEmbeddings (and WordWeights), Pooling",
        "the mean of word vectors; zero where no word is known",
        "word-embeddings.yaml",
    ),
    "dpr": Family(
        "encoder",
        "Hugging Face DPR context and question encoders, RDR's too",
        "the first token's last state, projected if the weights say so; dot product",
        "wikipedia-dpr.yaml, wikipedia-rdr.yaml",
    ),
    "dpr_cp": Family(
        "encoder",
        "DPR's own .cp file beside BERT's vocab.txt; both towers in one file",
        "the same vectors as the Hugging Face layout",
        "wikipedia-dpr-cp.yaml",
    ),
    "paq": Family(
        "encoder",
        "ALBERT, with encode_proj or without",
        "256, 728, 768 … values as in the file; dot product",
        "paq-256.yaml, paq-728.yaml",
    ),
    "paq_passages": Family(
        "encoder",
        "PAQ's passage retriever: BERT beside dpr_index files",
        "question vectors for DPR passages; dot product",
        "paq-generation.yaml",
    ),
    "clip": Family(
        "encoder",
        "OpenAI's state dict in the v0.2 layout, or Hugging Face's CLIPModel",
        "text and images into one space; cosine",
        "clip-images.yaml",
    ),
    "cross_encoder": Family(
        "cross-encoder",
        "…ForSequenceClassification with 1 or 2 labels, Capreolus' ELECTRA, BERT_Cat",
        "a logit for (query, passage); 2 labels: the difference",
        "msmarco-tas-b.yaml",
    ),
    "paq_reranker": Family(
        "cross-encoder",
        "AlbertForMultipleChoice",
        "a logit for (question, QA pair)",
        "paq-rerank.yaml",
    ),
    "dpr_reader": Family(
        "reader",
        "Hugging Face DPRReader, or DPR's own .cp file",
        "the best spans of the most relevant passages",
        "wikipedia-dpr.yaml",
    ),
    "fid": Family(
        "reader",
        "T5 with FiD's wrapped keys, or already unwrapped",
        "one answer written from all passages",
        "wikipedia-fid.yaml",
    ),
    "span2d": Family(
        "answer-extractor",
        "PAQ's BERT with start, end and span heads",
        "likely answer spans of a passage",
        "paq-generation.yaml",
    ),
    "spacy_ner": Family(
        "answer-extractor",
        "a spaCy pipeline (extra `ner`)",
        "the named entities of a passage",
        "paq-generation.yaml",
    ),
    "bart": Family(
        "question-generator",
        "BartForConditionalGeneration",
        "questions that a span answers",
        "paq-generation.yaml",
    ),
}
"""Every family, a module of this package each. At most one recognises a checkpoint."""

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
    for name, family in FAMILIES.items():
        if _module(name).recognises(checkpoint):
            return name, family.kind
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


def tokeniser_options(family: ModelFamily, directory: str, tokeniser: str | None, key: str) -> dict[str, Any]:
    """Return the options of `family.load` for a `tokeniser` (directory, URL or hub name) given as config key `key`.

    Raises CheckpointError when the checkpoint lacks a tokeniser and none is given, ConfigError for one where the family
    takes none.
    """
    takes_one = "tokeniser" in inspect.signature(family.load).parameters
    if tokeniser is None:
        if takes_one and not family.info(directory).details["has_tokeniser"]:
            hint = f"set {key} (--tokeniser) to the directory of the model it was trained from"
            refuse("this checkpoint comes without a tokeniser", directory, expected="a tokeniser", hint=hint)
        return {}
    if not takes_one:
        raise ConfigError(f"{key}: this model has its own tokeniser", where=directory, expected="no such key")
    from pipelines.models.fetch import fetch

    return {"tokeniser": fetch(tokeniser)}


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
        told = _article(other) + ("" if family in _article(other) else f" ({family})")
        what = f"this is {told}, not {_article(kind)}"
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
    if model in ("t5", "mt5"):
        hint = "a seq2seq checkpoint is read as a BART question generator or a FiD reader"
    else:
        hint = _as_sentence_transformer(config.get("hidden_size", "its hidden size"))
    refuse(what, directory, expected=expected, hint=hint)


def _as_sentence_transformer(width: int | str) -> str:
    """Say how a plain transformer becomes an encoder: the pooling is part of it, and no file of its own says which."""
    prefix = '"type": "sentence_transformers.models.'
    modules = f'[{{"path": "", {prefix}Transformer"}}, {{"path": "1_Pooling", {prefix}Pooling"}}]'
    pooling = f'{{"word_embedding_dimension": {width}, "pooling_mode_mean_tokens": true}}'
    return (
        "the nearest layout is sentence-transformers; if this model's vectors are its mean-pooled tokens, add "
        f"modules.json: {modules} and 1_Pooling/config.json: {pooling}"
    )
