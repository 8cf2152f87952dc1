"""One tiny checkpoint of every family and layout, for the tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.checkpoints import WORDS, write_cross_encoder, write_dpr, write_paq, write_sentence_transformer
from tests.checkpoints.clip import write_hub_clip, write_openai_clip
from tests.checkpoints.dpr import write_dpr_cp
from tests.checkpoints.fid import write_fid, write_paq_passages
from tests.checkpoints.questions import write_bart, write_span2d
from tests.checkpoints.rerankers import write_bert_cat, write_capreolus, write_paq_reranker
from tests.checkpoints.words import write_word_vectors


def write_spacy(directory: str) -> str:
    """Write a spaCy pipeline whose entities come from a rule."""
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "GPE", "pattern": "Alexandria"}])  # type: ignore[attr-defined]
    pipeline.to_disk(directory)
    return directory


ZOO: dict[str, tuple[str, Callable[[str], str]]] = {
    "sentence-transformers, hub": ("sentence_transformers", write_sentence_transformer),
    "sentence-transformers, v0.2": (
        "sentence_transformers",
        lambda d: write_sentence_transformer(d, layout="v0.2", weights="bin"),
    ),
    "word embeddings": ("word_embeddings", lambda d: write_word_vectors(d, ["PADDING_TOKEN", *WORDS])),
    "DPR context encoder": ("dpr", lambda d: write_dpr(d, "passage")),
    "DPR question encoder": ("dpr", lambda d: write_dpr(d, "query", weights="safetensors")),
    "DPR .cp": ("dpr_cp", lambda d: write_dpr_cp(d, year=2020)),
    "PAQ retriever": ("paq", write_paq),
    "PAQ passage retriever": ("paq_passages", write_paq_passages),
    "CLIP, OpenAI": ("clip", write_openai_clip),
    "CLIP, Hugging Face": ("clip", write_hub_clip),
    "cross-encoder": ("cross_encoder", write_cross_encoder),
    "cross-encoder, Capreolus": ("cross_encoder", write_capreolus),
    "cross-encoder, BERT_Cat": ("cross_encoder", write_bert_cat),
    "PAQ reranker": ("paq_reranker", write_paq_reranker),
    "DPR reader": ("dpr_reader", lambda d: write_dpr(d, "reader")),
    "DPR reader .cp": ("dpr_reader", lambda d: write_dpr_cp(d, reader=True, year=2020)),
    "FiD": ("fid", write_fid),
    "span2d": ("span2d", write_span2d),
    "spaCy": ("spacy_ner", write_spacy),
    "BART": ("bart", write_bart),
}
"""By a name for people: the family that must recognise it, and the function that writes it into a directory."""


def write_all(folder: Path) -> dict[str, str]:
    """Write the whole zoo. Returns name -> directory."""
    written = {}
    for number, (name, (_, write)) in enumerate(ZOO.items()):
        directory = str(folder / f"{number:02d}")
        Path(directory).mkdir(parents=True)
        written[name] = write(directory)
    return written
