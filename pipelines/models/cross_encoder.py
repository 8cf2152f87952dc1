"""Cross-encoders: Hugging Face sequence-classification directories that score a (query, passage) pair.

One label: the score is the raw logit. Two labels (not relevant, relevant): logit 1 minus logit 0, which orders exactly
like softmax[:, 1] but does not saturate. Anything that would leave a head randomly initialised is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.models import tokens
from pipelines.models.base import CrossEncoder, Tokens
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes
from pipelines.models.sentence_transformers import join_title, position_limit

_MAX_LENGTH = 512
_BATCH = 32
_HEAD = re.compile(r"^(classifier|classifier\.out_proj|classifier\.dense|score)\.weight$")


def recognises(directory: str) -> bool:
    names = read_json(directory, "config.json").get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def num_labels(directory: str) -> int:
    """Return the width of the classification head, from the weights. Raises CheckpointError unless it is 1 or 2."""
    require_files(directory)
    if not recognises(directory):
        names = read_json(directory, "config.json").get("architectures") or ["no architecture named"]
        hint = "a PAQ reranker or a bi-encoder is another kind of model"
        expected = "a model whose config.json names ...ForSequenceClassification"
        refuse(f"this is no cross-encoder ({', '.join(map(str, names))})", directory, expected=expected, hint=hint)
    heads = {name: shape for name, shape in tensor_shapes(directory).items() if _HEAD.match(name)}
    last = heads.get("classifier.out_proj.weight") or heads.get("classifier.weight") or heads.get("score.weight")
    if last is None:
        refuse("the weights have no classification head", directory, expected="classifier.weight or the like")
    if last[0] not in (1, 2):
        refuse(f"the head has {last[0]} labels", directory, expected="1 (a score) or 2 (not relevant, relevant)")
    return int(last[0])


def load_cross_encoder(
    directory: str, dtype: str, device: str, *, max_length: int | None = None, batch_size: int = _BATCH
) -> CrossEncoder:
    """Load the model and its tokeniser. Raises CheckpointError when the directory is incomplete or of another kind."""
    labels = num_labels(directory)

    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as MAPPING

    from pipelines.models.weights import build_model, read_config, read_weights

    config = read_config(directory)
    if type(config) not in MAPPING:
        refuse(f"a {config.model_type} cross-encoder is not supported", directory)
    config.num_labels = labels  # the weights decide; an old config.json may say otherwise
    model = build_model(MAPPING[type(config)], config, read_weights(directory), dtype, directory, needs_pooler=True)
    backend = tokens.load_backend(directory)
    raw = read_json(directory, "config.json")
    default = min(read_json(directory, "tokenizer_config.json").get("model_max_length") or _MAX_LENGTH, _MAX_LENGTH)
    length = tokens.checked_length(max_length, default, position_limit(raw))
    segments = int(getattr(config, "type_vocab_size", 0) or 0)
    encoder = tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length, segments > 1)
    return PairScorer(model.to(device), encoder, batch_size, device)


class PairScorer:
    """A sequence-classification model over (query, "title. text") pairs, in micro-batches of similar length."""

    def __init__(self, model: Any, encoder: tokens.TextEncoder, batch_size: int, device: str) -> None:
        self.model, self.encoder, self.batch_size, self.device = model, encoder, batch_size, device

    def score(self, query: str, titles: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 raw logits (or logit differences), one for each passage, in the order given."""
        pairs = zip(titles, texts, strict=True)
        asked = query.strip()
        rows = self.encoder.encode([(asked, join_title(title.strip(), text.strip())) for title, text in pairs])
        order = np.argsort(rows.lengths, kind="stable")
        scores = np.zeros(len(rows), dtype=np.float32)
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._logits(rows, batch)
        return scores

    def _logits(self, rows: Tokens, batch: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Pad the rows `batch` and run them."""
        import torch

        longest = int(rows.lengths[batch].max())
        ids_BL = np.full((len(batch), longest), self.encoder.pad_id, dtype=np.int64)
        mask_BL, types_BL = np.zeros_like(ids_BL), np.zeros_like(ids_BL)
        for position, row in enumerate(batch):
            start, end = rows.offsets[row], rows.offsets[row + 1]
            ids_BL[position, : end - start] = rows.ids[start:end]
            mask_BL[position, : end - start] = 1
            if rows.type_ids is not None:
                types_BL[position, : end - start] = rows.type_ids[start:end]
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        inputs |= {"token_type_ids": types_BL} if rows.type_ids is not None else {}
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
            logits = self.model(**tensors).logits.float()
        relevant = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        scores: npt.NDArray[np.float32] = relevant.cpu().numpy()
        return scores
