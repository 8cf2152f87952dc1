"""PAQ's question generators: BART writes a question that a marked span of a passage answers.

The source is `answer: A | title: T | context: left** span **right`; beam search, 3 to 20 tokens. What the checkpoint's
own config says about generation (no_repeat_ngram_size, early_stopping, ...) holds too. As in transformers 4.1, where
the models were run, the last of the 20 tokens is the end token, and spaces before punctuation are removed. Source:
Lewis et al. 2021 (PAQ) and the released generators' behaviour.

The reference cuts nothing, and fails beyond the model's positions. Here a longer source loses tokens of the context's
two ends, as few as needed and evenly around the span, which always stays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError, InputError
from pipelines.models import tokens
from pipelines.models.base import ModelInfo, Span, Tokens
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes

_NUM_BEAMS = 4
_MAX_LENGTH, _MIN_LENGTH = 20, 3  # tokens of a question, the decoder's start and the end token included
_POSITIONS = 1024
_BATCH = 16
_SHARED = "model.shared.weight"
_TIED = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
_OLD_NAMES = ("model.encoder.version", "model.decoder.version")
_DEFAULT_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # BartConfig's
# Keys of generation that change the text. Sampling is no part of them: the same passage gives the same questions.
_OWN_KEYS = (
    *_DEFAULT_IDS,
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping", "length_penalty"),
    *("repetition_penalty", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def recognises(directory: str) -> bool:
    if not os.path.isdir(directory) or os.path.exists(os.path.join(directory, "modules.json")):
        return False
    try:
        config = read_json(directory, "config.json")
    except CheckpointError:
        return False
    names = [str(name) for name in config.get("architectures") or []]
    return config.get("model_type") == "bart" and not any(n.endswith("ForSequenceClassification") for n in names)


def info(directory: str) -> ModelInfo:
    """Describe the generator. Raises CheckpointError for another kind of BART, or an incomplete directory."""
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    names = list(tensor_shapes(directory))
    expected = "a fine-tuned BartForConditionalGeneration"
    other = [name for name in names if name.startswith(("classification_head.", "qa_outputs."))]
    if other:
        refuse(f"this BART classifies or reads ({other[0]})", directory, expected=expected)
    if "shared.weight" in names or not any(name.startswith("model.decoder.layers.") for name in names):
        refuse("this is a BART without its generating part", directory, expected=f"{expected}: tensors named model.*")
    return ModelInfo(
        family="bart",
        kind="question-generator",
        computes="the likeliest questions that a span of a passage answers, by beam search",
        max_length=_positions(config),
        formatting="answer: A | title: T | context: left** span **right",
        details={"generation": _own_settings(directory)},
    )


def _positions(config: dict[str, Any]) -> int:
    return int(config.get("max_position_embeddings", _POSITIONS))


def _own_settings(directory: str) -> dict[str, Any]:
    """Return what the checkpoint says about generation, in generation_config.json or (older ones) config.json."""
    config = read_json(directory, "config.json")
    if config.get("force_bos_token_to_be_generated"):  # the key of 4.1
        config.setdefault("forced_bos_token_id", config.get("bos_token_id", _DEFAULT_IDS["bos_token_id"]))
    given = config | read_json(directory, "generation_config.json")
    return _DEFAULT_IDS | {key: given[key] for key in _OWN_KEYS if given.get(key) is not None}


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    num_beams: int = _NUM_BEAMS,
    num_questions: int = 1,
    max_length: int = _MAX_LENGTH,
    min_length: int = _MIN_LENGTH,
    include_title: bool = True,
    batch_size: int = _BATCH,
) -> BartGenerator:
    """Load the generator. num_questions: for each span (the reference's num_return_sequences: 1, or 4 for L4).

    Raises CheckpointError when the directory is incomplete, ConfigError for numbers that cannot be meant.
    """
    if not 1 <= num_questions <= num_beams:
        raise ConfigError(f"num_questions is {num_questions}", expected=f"1 to num_beams ({num_beams})")
    if batch_size < 1 or not 1 < min_length < max_length:
        raise ConfigError(
            "batch_size, min_length or max_length cannot be meant", expected="1 < min_length < max_length"
        )
    described = info(directory)

    from transformers import BartForConditionalGeneration, GenerationConfig

    from pipelines.models.weights import build_model, quiet_transformers, read_config, read_weights

    own = described.details["generation"]
    state = _untied(read_weights(directory), directory)
    model = build_model(BartForConditionalGeneration, read_config(directory), state, dtype, directory)
    lengths = {"max_length": max_length, "min_length": min_length, "num_return_sequences": num_questions}
    forced = {"forced_eos_token_id": own["eos_token_id"]} | own
    with quiet_transformers():
        model.generation_config = GenerationConfig(
            **forced | lengths, num_beams=num_beams, do_sample=False, use_cache=True
        )
    backend = tokens.load_backend(directory, "BartTokenizer")
    encoder = SourceEncoder(backend, tokens.pad_id(directory, backend), described.max_length, include_title)
    return BartGenerator(model.to(device), encoder, num_questions, batch_size, device)


def _untied(state: dict[str, Any], directory: str) -> dict[str, Any]:
    """Return the state without copies of the shared embedding. Raises CheckpointError when a copy differs."""
    import torch

    kept = {name: tensor for name, tensor in state.items() if name not in _TIED + _OLD_NAMES}
    copies = {name: state[name] for name in _TIED if name in state}
    shared = kept.setdefault(_SHARED, next(iter(copies.values()), None))
    if shared is None:
        refuse(f"the weights lack {_SHARED}", directory, expected="the tensors of BartForConditionalGeneration")
    for name, copy in copies.items():
        if not torch.equal(copy, shared):
            refuse(f"{name} is not {_SHARED}", directory, expected="one embedding, shared by encoder, decoder and head")
    kept.setdefault("final_logits_bias", torch.zeros(1, shared.shape[0], dtype=shared.dtype))  # as when training begins
    return kept


def source_text(title: str | None, text: str, span: Span) -> tuple[str, int, int]:
    """Return the model's input and where in it the marked span begins and ends (its asterisks included).

    Raises InputError when the span does not lie in the text.
    """
    if not 0 <= span.start <= span.end <= len(text):
        what = f"the span {span.start} to {span.end} does not lie in a text of {len(text)} characters"
        raise InputError(what, expected="0 <= start <= end <= the length of the text, in characters")
    head = f"answer: {span.text} | " + ("" if title is None else f"title: {title} | ") + "context: "
    marked = f"** {text[span.start : span.end]} **"
    start = len(head) + span.start
    return f"{head}{text[: span.start]}{marked}{text[span.end :]}", start, start + len(marked)


class SourceEncoder:
    """Sources to ids, at most `limit` of them, special tokens included."""

    def __init__(self, backend: Any, pad_id: int, limit: int, include_title: bool) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.pad_id, self.limit, self.include_title = backend, pad_id, limit, include_title

    def encode(self, titles: Sequence[str], texts: Sequence[str], spans: Sequence[Span]) -> list[list[int]]:
        """Return the ids of each source. Raises InputError when answer, title and span alone are too long."""
        rows = zip(titles, texts, spans, strict=True)
        sources = (source_text(title if self.include_title else None, text, span) for title, text, span in rows)
        # One by one: the encoding of a text of a megabyte takes a hundred, its ids one.
        return [self._ids(*source, span) for source, span in zip(sources, spans, strict=True)]

    def _ids(self, source: str, start: int, end: int, span: Span) -> list[int]:
        encoding = self.backend.encode(source)
        if len(encoding.ids) <= self.limit:
            return list(encoding.ids)
        return self._cut(encoding, start, end, span)

    def _cut(self, encoding: Any, start: int, end: int, span: Span) -> list[int]:
        """Drop tokens from the beginning and the end of the context; characters start to end are the marked span."""
        ids, offsets = encoding.ids, encoding.offsets  # each access makes a list
        inner = range(1, len(ids) - 1)
        begins = start - span.start  # of the context
        first = next(at for at in inner if offsets[at][1] > begins)
        left = next(at for at in inner if offsets[at][1] > start)
        right = next((at for at in inner if offsets[at][0] >= end), len(ids) - 1)
        room = self.limit - (first + right - left + 1)
        if room < 0:
            what = f"the answer and the title take {self.limit - room} tokens, more than the model's {self.limit}"
            raise InputError(what, hint="leave out titles that are no titles, or answers that long")
        before, after = left - first, len(ids) - 1 - right
        keep = min(before, max(room // 2, room - after))
        return [*ids[:first], *ids[left - keep : right + min(after, room - keep)], ids[-1]]


class BartGenerator:
    """Beam search over micro-batches of sources of similar length."""

    def __init__(self, model: Any, encoder: SourceEncoder, num_questions: int, batch_size: int, device: str) -> None:
        self.model, self.encoder, self.device = model, encoder, device
        self.num_questions, self.batch_size = num_questions, batch_size

    def generate(self, titles: Sequence[str], texts: Sequence[str], spans: Sequence[Span]) -> list[list[str]]:
        """Return num_questions questions for each (title, text, span), best first; equal ones are not merged."""
        rows = tokens.flatten(self.encoder.encode(titles, texts, spans))
        order = np.argsort(rows.lengths, kind="stable")
        questions: list[list[str]] = [[] for _ in texts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            written = self._search(rows, batch)
            for place, at in enumerate(batch):
                questions[at] = written[place * self.num_questions : (place + 1) * self.num_questions]
        return questions

    def _search(self, rows: Tokens, batch: npt.NDArray[np.int64]) -> list[str]:
        import torch

        ids_BL, mask_BL, _ = tokens.pad(rows, batch, self.encoder.pad_id)
        with torch.inference_mode():
            ids, mask = torch.from_numpy(ids_BL).to(self.device), torch.from_numpy(mask_BL).to(self.device)
            out = self.model.generate(input_ids=ids, attention_mask=mask)
        texts = self.encoder.backend.decode_batch(out.tolist(), skip_special_tokens=True)
        # transformers no longer cleans what byte-level BPE decodes.
        return [tokens.clean_spaces(text).strip() for text in texts]
