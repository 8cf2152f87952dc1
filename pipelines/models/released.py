"""The released checkpoints Pinakes is made for, by the names their authors gave them.

What a checkpoint *is* comes from its files alone. This table adds the two things that old sentence-transformers files
do not say, how vectors are compared and how title and text are joined, and feeds `pinakes models`. Sources: the
authors' model cards and the sentence-transformers 1.2 pages on pretrained models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.models.base import Formatting, Kind, Similarity
from pipelines.models.files import peek_json


@dataclass(frozen=True)
class Released:
    """One released checkpoint. similarity, formatting: only where its files are silent or may be."""

    name: str
    family: str
    kind: Kind
    group: str
    similarity: Similarity | None = None
    formatting: Formatting | None = None


def rows() -> Iterator[Released]:
    """Yield every released checkpoint, family by family."""
    for group, family, kind, names in _TABLE:
        for name in names.split():
            yield Released(name, family, kind, group, _similarity(name), _formatting(name))


def find(checkpoint: str) -> Released | None:
    """Return the released checkpoint that a path, URL or hub name leads to by its name, or None.

    The name is the last component, also as caches spell it: `models--org--NAME/snapshots/…` (Hugging Face),
    `sentence-transformers_NAME`, `sbert.net_models_NAME` (sentence-transformers), `NAME.zip`.
    """
    path = checkpoint.rstrip("/").replace("\\", "/")
    if "/snapshots/" in path:
        path = path[: path.rindex("/snapshots/")]
    last = re.split(r"--|_models_|sentence-transformers_", path.rsplit("/", 1)[-1])[-1].removesuffix(".zip")
    return next((row for row in rows() if row.name.rsplit("/", 1)[-1].casefold() == last.casefold()), None)


def settle(
    checkpoint: str, directory: str, family: str, similarity: Similarity | None, formatting: Formatting | None
) -> tuple[Similarity | None, Formatting | None]:
    """Return similarity and formatting as asked for, else as known of the released checkpoint of this name and family.

    What the files in `directory` say themselves comes before the table.
    """
    row = find(checkpoint)
    if row is None or row.family != family:
        return similarity, formatting
    declared = peek_json(directory, "config_sentence_transformers.json").get("similarity_fn_name")
    return similarity or (None if declared else row.similarity), formatting or row.formatting


_ST = "sentence-transformers"
_TABLE: tuple[tuple[str, str, Kind, str], ...] = (
    ("PAQ retriever", "paq", "encoder",
     "retriever_multi_base_256 retriever_multi_base retriever_multi_large retriever_multi_xlarge retriever_nq_base "
     "retriever_nq_large retriever_nq_xlarge retriever_tqa_base retriever_tqa_large retriever_tqa_xlarge"),
    ("PAQ reranker", "paq_reranker", "cross-encoder",
     "reranker_multi_base reranker_multi_large reranker_multi_xlarge reranker_multi_xxlarge reranker_nq_xlarge "
     "reranker_nq_xxlarge reranker_tqa_xlarge reranker_tqa_xxlarge"),
    ("PAQ generation", "cross_encoder", "cross-encoder", "passage_ranker_base"),
    ("PAQ generation", "span2d", "answer-extractor", "answer_extractor_nq_base"),
    ("PAQ generation", "spacy_ner", "answer-extractor", "en_core_web_sm"),
    ("PAQ generation", "bart", "question-generator", "qgen_nq_base qgen_multi_base"),
    ("PAQ generation", "paq_passages", "encoder", "dpr_nq_passage_retriever"),
    ("PAQ generation", "fid", "reader", "fid_reader_nq_base"),
    ("DPR", "dpr", "encoder",
     "facebook/dpr-ctx_encoder-single-nq-base facebook/dpr-question_encoder-single-nq-base "
     "facebook/dpr-ctx_encoder-multiset-base facebook/dpr-question_encoder-multiset-base"),
    ("DPR", "dpr_reader", "reader", "facebook/dpr-reader-single-nq-base facebook/dpr-reader-multiset-base"),
    ("RDR", "dpr", "encoder",
     "soheeyang/rdr-ctx_encoder-single-nq-base soheeyang/rdr-question_encoder-single-nq-base "
     "soheeyang/rdr-ctx_encoder-single-trivia-base soheeyang/rdr-question_encoder-single-trivia-base "
     "soheeyang/dpr-ctx_encoder-single-trivia-base soheeyang/dpr-question_encoder-single-trivia-base"),
    (_ST, "sentence_transformers", "encoder",
     "all-MiniLM-L6-v2 paraphrase-distilroberta-base-v1 paraphrase-xlm-r-multilingual-v1 stsb-xlm-r-multilingual "
     "T-Systems-onsite/cross-en-de-roberta-sentence-transformer stsb-mpnet-base-v2 stsb-roberta-base-v2 "
     "stsb-distilroberta-base-v2 nli-mpnet-base-v2 nli-roberta-base-v2 nli-distilroberta-base-v2 "
     "quora-distilbert-base quora-distilbert-multilingual msmarco-distilbert-base-v3 "
     "msmarco-distilbert-base-dot-prod-v3 msmarco-distilbert-base-tas-b msmarco-roberta-base-ance-fristp "
     "msmarco-roberta-base-ance-firstp nq-distilbert-base-v1 facebook-dpr-ctx_encoder-single-nq-base "
     "facebook-dpr-question_encoder-single-nq-base facebook-dpr-ctx_encoder-multiset-base "
     "facebook-dpr-question_encoder-multiset-base distiluse-base-multilingual-cased-v1 "
     "distiluse-base-multilingual-cased-v2 LaBSE allenai-specter clip-ViT-B-32-multilingual-v1"),
    (_ST, "word_embeddings", "encoder",
     "average_word_embeddings_glove.6B.300d average_word_embeddings_glove.840B.300d "
     "average_word_embeddings_komninos average_word_embeddings_levy_dependency"),
    ("CLIP", "clip", "encoder", "clip-ViT-B-32"),
    ("MS MARCO cross-encoder", "cross_encoder", "cross-encoder",
     "cross-encoder/ms-marco-TinyBERT-L-2-v2 cross-encoder/ms-marco-MiniLM-L-2-v2 "
     "cross-encoder/ms-marco-MiniLM-L-4-v2 cross-encoder/ms-marco-MiniLM-L-6-v2 "
     "cross-encoder/ms-marco-MiniLM-L-12-v2 cross-encoder/ms-marco-TinyBERT-L-2 cross-encoder/ms-marco-TinyBERT-L-4 "
     "cross-encoder/ms-marco-TinyBERT-L-6 cross-encoder/ms-marco-electra-base nboost/pt-tinybert-msmarco "
     "nboost/pt-bert-base-uncased-msmarco nboost/pt-bert-large-msmarco Capreolus/electra-base-msmarco "
     "amberoad/bert-multilingual-passage-reranking-msmarco "
     "sebastian-hofstaetter/distilbert-cat-margin_mse-T2-msmarco"),
)  # fmt: skip

_DOT = ("dot-prod", "tas-b", "ance-f", "facebook-dpr-")


def _similarity(name: str) -> Similarity | None:
    return "dot" if any(piece in name for piece in _DOT) else None


def _formatting(name: str) -> Formatting | None:
    if "facebook-dpr-" in name:
        return "title [SEP] text"
    known: dict[str, Formatting] = {"nq-distilbert-base-v1": "pair", "allenai-specter": "title[SEP]text"}
    return known.get(name)
