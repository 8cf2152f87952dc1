"""PAQ's answer extractor: a BERT that scores every pair (first token, last token) of a passage as an answer.

With s = start_outputs(h) and e = end_outputs(h), the logit of the span from token i to token j is an MLP of s_i and e_j
side by side. Its first layer splits into A s_i + B e_j + b, so the (L, L, 2D) tensor is never built, and only the
spans that may be chosen are computed. Source: Lewis et al. 2021 (PAQ) and the released extractor's behaviour.

Two of the reference's habits are left out unless `reference_quirks` asks for them: it lets special tokens begin or end
a span (whose text may then be empty, or run from the passage's first character), and it keeps a span once for each
window that holds it. When it is left with nothing, or with one empty text, it puts a span "null" first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import tokens
from pipelines.models.base import ModelInfo, Span
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes

_WINDOW = 256  # tokens of a window, special tokens included
_STRIDE = 128  # tokens that a window shares with the one before
_LONGEST = 30  # tokens of a chosen span
_SPARE = 9  # spans taken from a window beyond top_k, as in the reference
_MASKED = -100.0  # added to the logit of a pair that is no span; the logit of "null"
_TOP_K = 8
_BATCH = 16  # windows
_CHARACTERS = 1_000_000  # of the texts that are tokenised at once; a token takes about 100 bytes

Found = tuple[float, int, int]
"""(logit, first character, character after the last)."""


def recognises(directory: str) -> bool:
    if not os.path.isdir(directory) or os.path.exists(os.path.join(directory, "modules.json")):
        return False
    try:
        config = read_json(directory, "config.json")
    except CheckpointError:
        return False
    return config.get("model_type") == "bert" and "span_output_size" in config


def info(directory: str) -> ModelInfo:
    """Describe the extractor. Raises CheckpointError when the heads are incomplete or not what config.json says."""
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    sizes = _mlp_sizes(directory, config)
    limit = int(config.get("max_position_embeddings", 512))
    if limit < _WINDOW:
        refuse(f"the model takes {limit} tokens", directory, expected=f"windows of {_WINDOW} tokens")
    wanted = _head_shapes(int(config.get("hidden_size", 768)), int(config["span_output_size"]), sizes)
    shapes = tensor_shapes(directory)
    for name, shape in wanted.items():
        if name not in shapes:
            refuse(f"the weights lack {name}", directory, expected=f"the tensors {', '.join(wanted)}")
        if tuple(shapes[name]) != shape:
            what = f"{name} has the shape {tuple(shapes[name])}"
            refuse(what, directory, expected=f"{shape}, from hidden_size, span_output_size and output_mlp_sizes")
    return ModelInfo(
        family="span2d",
        kind="answer-extractor",
        computes=f"the {_TOP_K} likeliest answer spans of a passage, each with its log-probability",
        max_length=_WINDOW,
        formatting=f"the text alone, in windows of {_WINDOW} tokens that share {_STRIDE}",
        details={"span_output_size": config["span_output_size"], "output_mlp_sizes": sizes, "max_tokens": _LONGEST},
    )


def _mlp_sizes(directory: str, config: dict[str, Any]) -> list[int]:
    sizes = config.get("output_mlp_sizes") or []
    numbers = [config.get("span_output_size"), *(sizes if isinstance(sizes, list) else [None])]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        refuse(
            "span_output_size or output_mlp_sizes is no size", directory, expected="a positive number; a list of them"
        )
    return list(sizes)


def _head_shapes(hidden: int, width: int, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor behind the BERT."""
    layers = {"start_outputs": (width, hidden), "end_outputs": (width, hidden)}
    widths = [2 * width, *sizes]
    # Every second module of the list is a ReLU, which has no weights.
    layers |= {f"output_mlp.{2 * i}": (after, before) for i, (before, after) in enumerate(pairwise(widths))}
    layers["span_outputs"] = (1, widths[-1])
    return {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in layers.items()
        for part in ("weight", "bias")
    }


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    top_k: int = _TOP_K,
    reference_quirks: bool = False,
    batch_size: int = _BATCH,
) -> SpanExtractor:
    """Load the extractor; dtype is the BERT's, the heads compute in fp32.

    top_k: spans kept of a passage. reference_quirks: choose spans exactly as the reference does (see above).
    Raises CheckpointError when the directory is incomplete, ConfigError for numbers that cannot be meant.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError("top_k and batch_size must be at least 1")
    described = info(directory)

    from transformers import BertModel

    from pipelines.models.span2d_head import PairHead
    from pipelines.models.weights import build_model, check_names, load_linear, read_config, read_weights

    state = read_weights(directory)
    bert = {name.removeprefix("bert."): state.pop(name) for name in list(state) if name.startswith("bert.")}
    names = [f"output_mlp.{2 * i}" for i in range(len(described.details["output_mlp_sizes"]))]
    names = ["start_outputs", "end_outputs", *names, "span_outputs"]
    linears = [load_linear(state.pop(f"{name}.weight"), state.pop(f"{name}.bias")) for name in names]
    check_names([], sorted(state), directory, "PAQ's span extractor")
    config = read_config(directory)
    backbone = build_model(BertModel, config, bert, dtype, directory)
    backbone.pooler = None  # its output is never read
    head = PairHead(backbone, linears[0], linears[1], linears[2:]).eval().to(device)
    longest = int(config.to_dict().get("max_answer_length") or _LONGEST)
    backend = tokens.load_backend(directory, "BertTokenizer")
    backend.no_padding()
    backend.enable_truncation(_WINDOW, stride=_STRIDE)
    return SpanExtractor(head, backend, tokens.pad_id(directory, backend), longest, top_k, reference_quirks, batch_size)


class SpanExtractor:
    """Windows in, spans out. Memory: the tokens of a million characters or of one text, and a micro-batch."""

    def __init__(
        self, head: Any, backend: Any, pad_id: int, longest: int, top_k: int, quirks: bool, batch_size: int
    ) -> None:
        self.head, self.backend, self.pad_id, self.batch_size = head, backend, pad_id, batch_size
        self.longest, self.top_k, self.quirks = longest, top_k, quirks

    def extract(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the spans of each text, likeliest first; score: log sigmoid of the logit.

        A text without tokens has none (unless `reference_quirks`). The score of a span in two windows is the better.
        """
        return [spans for group in _groups(texts) for spans in self._extract(group)]

    def _extract(self, texts: Sequence[str]) -> list[list[Span]]:
        windows: list[tuple[int, Any]] = []
        for row, encoding in enumerate(self.backend.encode_batch(list(texts))):
            windows += [(row, window) for window in (encoding, *encoding.overflowing)]
        found: list[list[Found]] = [[] for _ in texts]
        by_window: list[list[Found]] = [[] for _ in windows]
        order = sorted(range(len(windows)), key=lambda at: len(windows[at][1].ids))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for at, spans in zip(batch, self._score([windows[at][1] for at in batch]), strict=True):
                by_window[at] = spans
        for (row, _), spans in zip(windows, by_window, strict=True):
            found[row] += spans
        choose = self._choose_as_reference if self.quirks else self._choose
        return [choose(text, spans) for text, spans in zip(texts, found, strict=True)]

    def _score(self, batch: list[Any]) -> list[list[Found]]:
        """Return the best spans of each window: text tokens only, or, with quirks, whatever scores highest."""
        rows = tokens.flatten([window.ids for window in batch])
        ids_BL, mask_BL, _ = tokens.pad(rows, np.arange(len(batch)), self.pad_id, _WINDOW if self.quirks else 1)
        if self.quirks:
            return self._best_of_all(batch, ids_BL, mask_BL)
        text_BL = np.zeros(ids_BL.shape, dtype=bool)
        text_BL[mask_BL == 1] = [
            start < end and not is_special
            for window in batch
            for (start, end), is_special in zip(window.offsets, window.special_tokens_mask, strict=True)
        ]
        size = min(_LONGEST, self.longest + 1, ids_BL.shape[1])
        best = self.head.best_in_band(ids_BL, mask_BL, text_BL, size, self.top_k + _SPARE)
        return [
            [(logit, window.offsets[i][0], window.offsets[j][1]) for logit, i, j in spans]
            for window, spans in zip(batch, best, strict=True)
        ]

    def _best_of_all(
        self, batch: list[Any], ids_BL: npt.NDArray[np.int64], mask_BL: npt.NDArray[np.int64]
    ) -> list[list[Found]]:
        """Take the top_k + 9 highest of all L x L logits of each window, then drop reversed and long spans."""
        result = []
        rows = np.arange(_WINDOW)
        offset_II = rows[None, :] - rows[:, None]
        allowed_II = (offset_II >= 0) & (offset_II <= self.longest)
        for window, logit_II, mask_I in zip(batch, self.head.all_pairs(ids_BL, mask_BL), mask_BL, strict=True):
            is_span_II = allowed_II & (np.outer(mask_I, mask_I) == 1)
            logit_II = np.where(is_span_II, logit_II, logit_II + np.float32(_MASKED))
            top = np.argsort(logit_II, axis=None, kind="stable")[::-1][: self.top_k + _SPARE]
            padded = [*window.offsets, *[(0, 0)] * (_WINDOW - len(window.offsets))]
            pairs = [divmod(int(flat), _WINDOW) for flat in top]
            kept = [(i, j) for i, j in pairs if 0 <= j - i < _LONGEST]
            result.append([(float(logit_II[i, j]), padded[i][0], padded[j][1]) for i, j in kept])
        return result

    def _choose(self, text: str, spans: list[Found]) -> list[Span]:
        """Return the top_k different spans."""
        best: dict[tuple[int, int], float] = {}
        for logit, start, end in spans:
            best[start, end] = max(logit, best.get((start, end), logit))
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: self.top_k]
        return [_span(text, logit, start, end) for (start, end), logit in ranked]

    def _choose_as_reference(self, text: str, spans: list[Found]) -> list[Span]:
        ranked = sorted(spans, key=lambda span: -span[0])[: self.top_k]
        chosen = [_span(text, *span) for span in ranked]
        if not chosen or (len(chosen) == 1 and not chosen[0].text):
            chosen.insert(0, Span("null", 0, 0, log_sigmoid(_MASKED)))
        return chosen


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in groups of at most _CHARACTERS, or of one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > _CHARACTERS:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _span(text: str, logit: float, start: int, end: int) -> Span:
    return Span(text[start:end], start, end, log_sigmoid(logit))


def log_sigmoid(logit: float) -> float:
    """Return log(1 / (1 + exp(-logit))), exact where the sigmoid itself would round to 0 or 1."""
    return float(-np.logaddexp(0.0, -np.float64(logit)))
