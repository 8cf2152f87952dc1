"""DPR's extractive reader: which passage answers a question, and with which words of it.

Input: `[CLS] question [SEP] title [SEP] text`, no [SEP] at the end, cut on the right, token types all zero. A linear
layer on [CLS] gives the passage's relevance, another on every token its start and end logits. Decoding is DPR's own:
passages by relevance; in each, spans of up to 10 of the text's tokens by start + end logit, skipping those that hold
or lie in a better one, each then widened to whole words. transformers' decoder differs: it knows no whole words, and
may answer with the title. Source: Karpukhin et al. 2020 and the released checkpoints' documented behaviour.

The answer's text is cut from the passage as it is written. DPR decodes the tokens instead, which loses case, accents
and unknown words; that string is beside it as `decoded`, because exact match as published is measured on it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.models import dpr, dpr_cp, tokens
from pipelines.models.base import Answer, ModelInfo
from pipelines.models.files import native_files, refuse, require_files, tensor_shapes

if TYPE_CHECKING:
    from pipelines.schema import Passage

MAX_LENGTH = 350
_MAX_ANSWER_TOKENS = 10
_SPANS_PER_PASSAGE = 10
_BATCH = 32
_PREFIX = "span_predictor."
_HEADS = {"qa_outputs": 2, "qa_classifier": 1}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ReaderAnswer(Answer):
    """An answer with what the model said. relevance: the passage's logit. span: start logit + end logit.

    decoded: the tokens as text, as DPR gives it. score: the relevance for a passage's best span; the others lie between
    it and half the way to the next passage's, at exp(span - best span), so the scores fall as DPR orders the answers.
    """

    relevance: float = 0.0
    span: float = 0.0
    decoded: str = ""


def recognises(directory: str) -> bool:
    return (dpr.is_dpr(directory) and dpr.is_reader(directory)) or dpr_cp.is_reader(directory)


def info(directory: str) -> ModelInfo:
    """Describe the reader. Raises CheckpointError for an incomplete or mixed-up directory."""
    native = bool(native_files(directory))
    if native:
        opened = dpr_cp.read(directory)
        shapes = {name: tuple(tensor.shape) for name, tensor in opened.tensors.items()}
        length = opened.length(MAX_LENGTH)
    else:
        require_files(directory)
        shapes, length = tensor_shapes(directory), MAX_LENGTH
    _check_heads(directory, shapes, "" if native else _PREFIX)
    return ModelInfo(
        family="dpr_reader",
        kind="reader",
        computes="the relevance of each passage, and the best spans of its text",
        max_length=length,
        formatting="[CLS] question [SEP] title [SEP] text, without a last [SEP], token types all zero",
        details={
            "layout": ".cp" if native else "Hugging Face",
            "max_answer_tokens": _MAX_ANSWER_TOKENS,
            "spans_per_passage": _SPANS_PER_PASSAGE,
            "text": "as in the passage; `decoded` is DPR's lower-cased form",
        },
    )


def _check_heads(directory: str, shapes: dict[str, tuple[int, ...]], prefix: str) -> None:
    for head, width in _HEADS.items():
        shape = shapes.get(f"{prefix}{head}.weight")
        if shape is None:
            hint = "an encoder's weights under a reader's config.json embed, they do not answer"
            refuse(f"the weights lack {prefix}{head}.weight", directory, expected="a DPR reader's tensors", hint=hint)
        if shape[0] != width:
            refuse(f"{head} has {shape[0]} outputs", directory, expected=str(width))


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    max_length: int | None = None,
    batch_size: int = _BATCH,
) -> DprReader:
    """Load the reader. Raises CheckpointError for an incomplete directory, ConfigError for an impossible max_length.

    max_length: tokens of question, title and text together; None for what the checkpoint was trained with, or 350.
    """
    from transformers import BertConfig, BertModel

    from pipelines.models.weights import build_model, check_names, load_linear, read_config, read_weights

    described = info(directory)
    if native_files(directory):
        native = dpr_cp.read(directory)
        own = {name: tensor.clone() for name, tensor in native.tensors.items()}
        bert = {name.removeprefix("encoder."): own.pop(name) for name in list(own) if name.startswith("encoder.")}
        config, backend = dpr_cp.bert_config(native, bert), native.backend
    else:
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in read_weights(directory).items()}
        inside = "encoder.bert_model."
        bert = {name.removeprefix(inside): own.pop(name) for name in list(own) if name.startswith(inside)}
        config = BertConfig(**read_config(directory).to_dict())
        backend = tokens.load_backend(directory, "BertTokenizer")
    wanted = {f"{head}.{part}" for head in _HEADS for part in ("weight", "bias")}
    check_names(sorted(wanted - set(own)), sorted(set(own) - wanted), directory, "a DPR reader")
    length = tokens.checked_length(max_length, described.max_length, config.max_position_embeddings)
    model = build_model(BertModel, config, bert, dtype, directory)
    model.pooler = None  # its output is never read
    span, relevance = (load_linear(own[f"{head}.weight"], own[f"{head}.bias"]).to(device) for head in _HEADS)
    writer = _Writer(backend, tokens.pad_id(directory, backend), length)
    return DprReader(model.to(device), span, relevance, writer, device, batch_size)


@dataclass(frozen=True)
class _Input:
    """One question with one passage. ids: the model's input; offset: where the text begins in it.

    text_ids: the text's tokens, also those that were cut off. places: their (start, end) characters in the passage.
    """

    ids: list[int]
    offset: int
    text_ids: list[int]
    places: list[tuple[int, int]]


class _Writer:
    """Turn questions and passages into inputs, and tokens back into text."""

    def __init__(self, backend: Any, pad_id: int, max_length: int) -> None:
        self.backend, self.pad_id, self.max_length = backend, pad_id, max_length
        backend.no_padding()
        backend.enable_truncation(max_length, strategy="longest_first")
        self.pieces: dict[int, str] = {index: piece for piece, index in backend.get_vocab().items()}
        special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        named = {backend.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
        self.special = special | named

    def inputs(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[_Input]:
        """Return one input for each pair (question i, passage i)."""
        titles = [passage.title.strip() for passage in passages]
        heads = [(question, title) if question else title for question, title in zip(questions, titles, strict=True)]
        bodies = [dpr.passage_body(passage.text) for passage in passages]
        shifts = [passage.text.find(body) for passage, body in zip(passages, bodies, strict=True)]
        before = self.backend.encode_batch(heads)
        behind = self.backend.encode_batch(bodies, add_special_tokens=False)
        return [self._join(*row) for row in zip(before, behind, shifts, strict=True)]

    def _join(self, before: Any, behind: Any, shift: int) -> _Input:
        # DPR ends a text of max_length tokens or more with a [SEP] in place of its last one; the input is cut before.
        text_ids = behind.ids[: self.max_length - 1]
        places = [(start + shift, end + shift) for start, end in behind.offsets[: len(text_ids)]]
        return _Input((before.ids + text_ids)[: self.max_length], len(before.ids), text_ids, places)

    def is_subword(self, index: int) -> bool:
        return self.pieces.get(index, "").startswith("##")

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text the way DPR prints them: no special tokens, no space before punctuation."""
        words = " ".join(self.pieces[index] for index in ids if index not in self.special)
        return tokens.clean_spaces(words.replace(" ##", "").strip())


class DprReader:
    """A loaded reader: see `pipelines.models.base.Reader`."""

    def __init__(self, model: Any, span: Any, relevance: Any, writer: _Writer, device: str, batch_size: int) -> None:
        self.model, self.span, self.relevance = model, span, relevance
        self.writer, self.device, self.batch_size = writer, device, batch_size

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[ReaderAnswer]]:
        """Return up to 10 spans of each passage, best first: by the passage's relevance, then by the span's logits."""
        pairs = [(q, passage) for q, given in zip(questions, passages, strict=True) for passage in given]
        inputs = self.writer.inputs([q for q, _ in pairs], [passage for _, passage in pairs]) if pairs else []
        logits = self.logits([row.ids for row in inputs])
        answers: list[list[ReaderAnswer]] = []
        start = 0
        for given in passages:
            part = slice(start, start + len(given))
            answers.append(self._answers(given, inputs[part], logits[part]))
            start += len(given)
        return answers

    def logits(self, rows: Sequence[list[int]]) -> list[tuple[float, Floats, Floats]]:
        """Return (relevance, start logits (L,), end logits (L,)) of each row of L token ids."""
        import torch

        found: list[tuple[float, Floats, Floats]] = [(0.0, np.zeros(0), np.zeros(0))] * len(rows)
        ragged = tokens.flatten(rows)
        order = np.argsort(ragged.lengths, kind="stable")
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            ids_BL = torch.from_numpy(tokens.pad(ragged, chosen, self.writer.pad_id)[0]).to(self.device)
            with torch.inference_mode():
                mask_BL = (ids_BL != self.writer.pad_id).long()  # a [PAD] written in a text is masked too, as in DPR
                hidden_BLH = self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
                spans_BL2, relevance_B = self.span(hidden_BLH), self.relevance(hidden_BLH[:, 0])[:, 0]
            spans, relevance = spans_BL2.double().cpu().numpy(), relevance_B.cpu().tolist()
            for place, row in enumerate(chosen):
                start_L, end_L = spans[place, : len(rows[row])].T
                found[row] = (relevance[place], start_L, end_L)
        return found

    def _answers(
        self, passages: Sequence[Passage], inputs: list[_Input], logits: list[tuple[float, Floats, Floats]]
    ) -> list[ReaderAnswer]:
        """Return the answers to one question from its passages."""
        found = []
        for index in sorted(range(len(inputs)), key=lambda index: -logits[index][0]):
            row, (relevance, start_L, end_L) = inputs[index], logits[index]
            widened = [self.writer.is_subword(token) for token in row.text_ids]
            spans = best_spans(start_L[row.offset :], end_L[row.offset :], widened)
            if spans:
                found.append((index, relevance, spans))
        answers: list[ReaderAnswer] = []
        for rank, (index, relevance, spans) in enumerate(found):
            gap = relevance - found[rank + 1][1] if rank + 1 < len(found) else 1.0
            text, row, best = passages[index].text, inputs[index], spans[0][2]
            for first, last, span in spans:
                score = relevance - gap / 2 * (1 - math.exp(span - best))
                start, end = row.places[first][0], _with_accents(text, row.places[last][1])
                decoded = self.writer.decode(row.text_ids[first : last + 1])
                answers.append(ReaderAnswer(text[start:end], score, index, start, end, relevance, span, decoded))
        return answers


def _with_accents(text: str, end: int) -> int:
    """Return `end` moved behind the combining marks there: a decomposed accent belongs to the letter before it."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return end


def best_spans(start_L: Floats, end_L: Floats, subword: Sequence[bool]) -> list[tuple[int, int, float]]:
    """Return up to 10 (first token, last token, start + end logit) of a text, best first, as DPR chooses them.

    start_L, end_L: logits of the tokens that the model saw. subword: for every token of the text, seen or not, whether
    it goes on with the word before. A span is compared with the widened ones before it, and is widened when it is
    taken; of equal ones the first start, then the shortest, comes first.
    """
    length = len(start_L)
    if length == 0:
        return []
    ends_LA = np.full((length, _MAX_ANSWER_TOKENS), -np.inf)
    for more in range(min(_MAX_ANSWER_TOKENS, length)):
        ends_LA[: length - more, more] = end_L[more:]
    scores = (start_L[:, None] + ends_LA).ravel()
    chosen: list[tuple[int, int, float]] = []
    for place in np.argsort(-scores, kind="stable"):
        if scores[place] == -np.inf or len(chosen) == _SPANS_PER_PASSAGE:
            break
        first, more = divmod(int(place), _MAX_ANSWER_TOKENS)
        last = first + more
        if any((first <= a and b <= last) or (a <= first and last <= b) for a, b, _ in chosen):
            continue
        while first > 0 and subword[first]:
            first -= 1
        while last < len(subword) - 1 and subword[last + 1]:
            last += 1
        chosen.append((first, last, float(scores[place])))
    return chosen
