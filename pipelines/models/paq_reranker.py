"""PAQ (RePAQ) rerankers: a multiple-choice ALBERT that reads the question and a stored QA pair together.

First text: the question and "?"; second: the stored question, "? " and its first answer; token types 0 and 1. Nothing
is normalised: a question that already ends in "?" gets a second one, as in the reference. The score is the raw logit,
`classifier` on ALBERT's tanh pooler; a candidate's logit does not depend on the others, so flat pairs are scored.
The reference never cuts; here a pair is cut to 512 tokens, longest side first, because the model has no more positions.
Source: Lewis et al. 2021 and the released rerankers' documented formatting.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, InputError
from pipelines.models import tokens
from pipelines.models.base import CrossEncoder, ModelInfo
from pipelines.models.classifier import TextClassifier
from pipelines.models.cross_encoder import architectures
from pipelines.models.files import peek_json, read_json, refuse, require_files, tensor_shapes
from pipelines.schema import Passage

_MAX_LENGTH = 512
_OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def recognises(directory: str) -> bool:
    """Tell by the class that config.json names; where it is the one training started from, by the head's tensor."""
    if os.path.isfile(os.path.join(directory, "modules.json")):
        return False
    config = peek_json(directory, "config.json")
    names = architectures(config)
    if config.get("model_type") != "albert" or any(name.endswith(_OTHER_TASKS) for name in names):
        return False
    try:
        return "AlbertForMultipleChoice" in names or "classifier.weight" in tensor_shapes(directory)
    except CheckpointError:
        return False


def info(directory: str) -> ModelInfo:
    """Describe the reranker. Raises CheckpointError for a mixed-up or incomplete directory."""
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    shapes = tensor_shapes(directory)
    if any("encode_proj" in name for name in shapes):
        hint = "take config.json and weights from the same model"
        refuse("the weights are a PAQ retriever's (encode_proj)", directory, expected="a PAQ reranker", hint=hint)
    head = shapes.get("classifier.weight")
    if head is None or head[0] != 1:
        found = "no classifier" if head is None else f"a classifier of {head[0]} labels"
        refuse(f"the weights have {found}", directory, expected="a PAQ reranker: classifier.weight of one row")
    limit = int(config.get("max_position_embeddings", _MAX_LENGTH))
    return ModelInfo(
        family="paq_reranker",
        kind="cross-encoder",
        computes="the raw logit",
        max_length=min(limit, _MAX_LENGTH),
        formatting='the pair ("question?", "stored question? first answer"); only QA pairs can be scored',
        details={"backbone": "albert", "labels": 1},
    )


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    max_length: int | None = None,
    token_budget: int | None = None,
) -> CrossEncoder:
    """Load the reranker and its tokeniser. Raises CheckpointError when the directory is incomplete or mixed up."""
    from transformers import AlbertForMultipleChoice

    from pipelines.models.packed import pack
    from pipelines.models.weights import build_model, read_config, read_weights

    described = info(directory)
    length = tokens.checked_length(max_length, described.max_length, described.max_length)
    config = read_config(directory)
    state = read_weights(directory)
    model = build_model(AlbertForMultipleChoice, config, state, dtype, directory, needs_pooler=True)
    pack(model.to(device))

    def forward(ids_BL: Any, mask_BL: Any, types_BL: Any) -> Any:
        one_choice = {"input_ids": ids_BL, "attention_mask": mask_BL, "token_type_ids": types_BL}
        return model(**{name: tensor.unsqueeze(1) for name, tensor in one_choice.items()}).logits.float()

    backend = tokens.load_backend(directory, "AlbertTokenizer")
    encoder = tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length, with_types=True)
    return PaqReranker(TextClassifier(forward, encoder, 1, device, token_budget))


@dataclass
class PaqReranker:
    """Scores stored QA pairs for a question."""

    classifier: TextClassifier

    def score(self, queries: Sequence[str], passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 raw logits, one for each pair. Raises InputError for a passage that has no answer."""
        pairs = [format_pair(query, passage) for query, passage in zip(queries, passages, strict=True)]
        return self.classifier.logits(pairs)[:, 0]


def format_pair(query: str, passage: Passage) -> tuple[str, str]:
    """Return the two texts of one input. Raises InputError when the passage is no QA pair."""
    if not passage.answers:
        expected = "QA pairs: passages with answers, whose text is a question"
        hint = "rerank text passages with a cross-encoder such as ms-marco-MiniLM-L-6-v2"
        where = f"passage {passage.id!r}"
        raise InputError(
            "a PAQ reranker cannot read a passage without answers", where=where, expected=expected, hint=hint
        )
    return f"{query}?", f"{passage.text}? {passage.answers[0]}"
