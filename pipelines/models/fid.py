"""FiD readers: a T5 that reads every passage alone and writes one answer from all of them together.

Each passage is encoded with the question; the encoder states of all passages, one after another, are what the decoder
attends to, so the order of the passages does not matter. Released checkpoints keep their encoder inside two wrappers
(`encoder.encoder.block.0.module.layer.0…`); a T5ForConditionalGeneration directory holds the same model without them.
The decoder's cross-attention bias in files of transformers 3.0 is dropped, and passages end in `</s>`: transformers 4
reads FiD so, and PAQ filtered its questions with it. Source: Izacard and Grave 2021, Lewis et al. 2021.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import tokens
from pipelines.models.base import Answer, ModelInfo, Tokens
from pipelines.models.files import read_json, refuse, tensor_shapes, weight_files
from pipelines.schema import Passage

MAX_LENGTH = 200
"""Tokens of a question with its passage, `</s>` included."""
ANSWER_LENGTH = 10
"""Tokens of an answer, start token included: what PAQ allows. FiD's own evaluation allows 50."""
_PASSAGE_TOKENS = 6_400  # padded tokens that the encoder sees at once: 32 passages of full length
_STATE_TOKENS = 20_000  # encoder states that the decoder sees at once: 1.5 GB of keys and values for a T5-base in fp32
_NO_READER = re.compile(r"(EncoderModel|Classification|QuestionAnswering)$")
_CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_LAYOUTS = (
    ("wrapped", re.compile(r"^encoder\.encoder\.block\.")),
    ("unwrapped", re.compile(r"^encoder\.block\.")),
)


def recognises(checkpoint: str) -> bool:
    """Say whether this is a T5 directory that may write text: no sentence encoder, no classifier."""
    if not os.path.isdir(checkpoint) or os.path.isfile(os.path.join(checkpoint, "modules.json")):
        return False
    try:
        config = read_json(checkpoint, "config.json")
    except CheckpointError:
        return False
    names = [str(name) for name in config.get("architectures") or []]
    return config.get("model_type") == "t5" and not any(_NO_READER.search(name) for name in names)


def info(directory: str) -> ModelInfo:
    """Describe the reader. Raises CheckpointError for absent weights, an encoder alone or a mixture of layouts."""
    _require_weights(directory)
    config = read_json(directory, "config.json", required=True)
    names = list(tensor_shapes(directory))
    return ModelInfo(
        family="fid",
        kind="reader",
        computes="one short answer, written from all passages together; score: its log-probability",
        max_length=MAX_LENGTH,
        formatting="question: {question} title: {title} context: {text}, each passage alone",
        details={
            "layout": _layout(names, directory),
            "hidden_size": config.get("d_model"),
            "num_layers": config.get("num_layers"),
            "answer_length": ANSWER_LENGTH,
            "has_tokeniser": _has_tokeniser(directory),
        },
    )


def _require_weights(directory: str) -> None:
    """Check that all weight files are there; a released directory has no tokeniser."""
    paths = weight_files(directory)
    if not paths:
        refuse("the checkpoint has no weights", directory, expected="model.safetensors or pytorch_model.bin")
    absent = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if absent:
        refuse(f"weight shards are missing: {', '.join(absent)}", directory)


def _layout(names: Iterable[str], directory: str) -> str:
    """Return "wrapped" or "unwrapped", from the names of the encoder's tensors."""
    names = list(names)
    found = [layout for layout, pattern in _LAYOUTS if any(pattern.match(name) for name in names)]
    if len(found) > 1:
        hint = "take all tensors from one checkpoint"
        refuse("the weights mix FiD's wrapped encoder with a plain T5 encoder", directory, hint=hint)
    if not found or not any(name.startswith("decoder.block.") for name in names):
        side = "decoder" if found else "encoder"
        refuse(f"the weights have no T5 {side}", directory, expected="a FiD reader: T5 encoder and decoder")
    return found[0]


def _has_tokeniser(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in ("tokenizer.json", "spiece.model"))


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    tokeniser: str | None = None,
    max_length: int | None = None,
    answer_length: int = ANSWER_LENGTH,
) -> FidReader:
    """Load the reader and a T5 tokeniser.

    dtype: fp32 or bf16. tokeniser: directory of the T5 tokeniser (tokenizer.json or spiece.model), which released
    readers lack; without it the checkpoint's own. max_length: tokens of a question with one passage (default 200).
    answer_length: tokens of an answer, start token included. Raises CheckpointError when anything is missing or does
    not fit, ConfigError for a dtype or length that cannot be meant.
    """
    info(directory)
    if dtype == "fp16":
        hint = "use fp32, or bf16 where the hardware has it"
        raise ConfigError("a T5 overflows in fp16", where=directory, expected="fp32 or bf16", hint=hint)
    if answer_length < 2:
        raise ConfigError(f"answer_length {answer_length} leaves no token to write", expected="2 or more")
    encoder = _text_encoder(directory, tokeniser, tokens.checked_length(max_length, MAX_LENGTH, None))
    model = _load_model(directory, dtype, answer_length)
    vocabulary, rows = encoder.backend.get_vocab_size(), model.shared.num_embeddings
    if vocabulary > rows:
        what = f"the tokeniser has {vocabulary:,} pieces, the model {rows:,} embeddings"
        refuse(what, tokeniser or directory, expected="the tokeniser of the T5 that the reader was trained from")
    return FidReader(model.to(device), encoder, device)


def _text_encoder(directory: str, tokeniser: str | None, max_length: int) -> tokens.TextEncoder:
    """Return the T5 tokeniser, which ends every text in `</s>`, also one that is cut."""
    from tokenizers import processors

    source = tokeniser or directory
    if not _has_tokeniser(source):
        hint = "set answer.tokeniser to the directory of the T5 tokeniser (t5-base has PAQ's and FiD's)"
        expected = "tokenizer.json or spiece.model"
        refuse("a FiD reader needs the tokeniser of its T5, which is not here", source, expected=expected, hint=hint)
    backend = tokens.load_backend(source, "T5Tokenizer")
    config = read_json(directory, "config.json")
    end, end_id = "</s>", config.get("eos_token_id", 1)
    if backend.token_to_id(end) != end_id:
        refuse(f"the tokeniser has no {end} with id {end_id}", source, expected="a T5 tokeniser")
    if backend.encode("").ids != [end_id]:
        backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, end_id)])
    return tokens.TextEncoder(backend, config.get("pad_token_id", 0), max_length)


def _load_model(directory: str, dtype: str, answer_length: int) -> Any:
    """Return the T5 with greedy decoding as its only generation setting, whatever an old config.json holds."""
    from transformers import GenerationConfig, T5ForConditionalGeneration

    from pipelines.models.weights import build_model, read_config, read_weights

    raw = read_json(directory, "config.json", required=True)
    state = {plain_name(name): tensor for name, tensor in read_weights(directory).items()}
    state.pop(_CROSS_BIAS, None)
    _tie(state, raw.get("tie_word_embeddings") is not False, directory)
    model = build_model(T5ForConditionalGeneration, read_config(directory), state, dtype, directory)
    pad = raw.get("pad_token_id", 0)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=raw.get("decoder_start_token_id", pad),
        pad_token_id=pad,
        eos_token_id=raw.get("eos_token_id", 1),
        max_length=answer_length,
    )
    return model


def plain_name(name: str) -> str:
    """Return the T5 name of a tensor: without FiD's wrapper of the encoder and its wrapper of every block."""
    return re.sub(r"^encoder\.encoder\.", "encoder.", name).replace(".module.layer.", ".layer.")


def _tie(state: dict[str, Any], tied: bool, directory: str) -> None:
    """Leave one embedding, `shared.weight`, under all of its names; the output layer is one of them when `tied`.

    A T5 1.1 (`tie_word_embeddings: false`) has an output layer of its own and does not scale the decoder's output.
    Raises CheckpointError when two names hold different tensors or there is none.
    """
    import torch

    head = "lm_head.weight"
    found = {name: state.pop(name) for name in (*_EMBEDDINGS, *([head] if tied else [])) if name in state}
    if not found:
        refuse("the weights lack shared.weight", directory, expected="the tensors of T5ForConditionalGeneration")
    first, *others = found
    different = [name for name in others if not torch.equal(found[first], found[name])]
    if different:
        hint = "a T5 1.1 says tie_word_embeddings: false" if head in different else "the checkpoint is mixed up"
        refuse(f"{first} and {different[0]} differ, but config.json ties them", directory, hint=hint)
    if not tied and head not in state:
        refuse(
            f"the weights lack {head}", directory, expected="it, because config.json does not tie it to shared.weight"
        )
    state["shared.weight"] = found[first]


def reader_input(question: str, passage: Passage) -> str:
    """Return the text that the encoder reads: the question with one passage."""
    return f"question: {question} title: {passage.title} context: {passage.text}"


class FidReader:
    """Write one answer to each question by greedy decoding.

    Passages go through the encoder in micro-batches of similar length, questions through the decoder in groups, so
    memory does not grow with the number of questions. passage_tokens, state_tokens: padded tokens of one such batch.
    """

    def __init__(
        self,
        model: Any,
        encoder: tokens.TextEncoder,
        device: str,
        *,
        passage_tokens: int = _PASSAGE_TOKENS,
        state_tokens: int = _STATE_TOKENS,
    ) -> None:
        self.model, self.encoder, self.device = model, encoder, device
        self.passage_tokens, self.state_tokens = passage_tokens, state_tokens

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[Answer]]:
        """Return one answer a question, none where it has no passages.

        score: the sum of the log-probabilities of the answer's tokens, `</s>` included when it was written; fp32.
        """
        asked = zip(questions, passages, strict=True)
        rows = self.encoder.encode([reader_input(question, passage) for question, own in asked for passage in own])
        ends_Q = np.cumsum([len(own) for own in passages], dtype=np.int64)
        members = [np.arange(end - len(own), end) for own, end in zip(passages, ends_Q.tolist(), strict=True)]
        length_Q = np.array([rows.lengths[own].sum() for own in members], dtype=np.int64)
        answers: list[list[Answer]] = [[] for _ in questions]
        for group in tokens.micro_batches(length_Q, self.state_tokens):
            with_passages = [int(index) for index in group if length_Q[index]]
            written = self._write(rows, [members[index] for index in with_passages])
            for index, answer in zip(with_passages, written, strict=True):
                answers[index] = [answer]
        return answers

    def _write(self, rows: Tokens, members: Sequence[npt.NDArray[np.int64]]) -> list[Answer]:
        """Return the answer from each list of row numbers."""
        import torch
        from torch.nn.utils.rnn import pad_sequence
        from transformers.modeling_outputs import BaseModelOutput

        if not members:
            return []
        with torch.inference_mode():
            states = self._encode(rows, np.concatenate(members))
            fused = [torch.cat([states[int(row)] for row in own]) for own in members]
            mask_QT = pad_sequence([state.new_ones(len(state), dtype=torch.long) for state in fused], batch_first=True)
            state_QTH = BaseModelOutput(last_hidden_state=pad_sequence(fused, batch_first=True))
            options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "num_beams": 1}
            made = self.model.generate(encoder_outputs=state_QTH, attention_mask=mask_QT, **options)
            written_QS = made.sequences[:, 1:]  # without the start token
            logprob_QSV = torch.stack(made.logits, dim=1).float().log_softmax(dim=-1)
            logprob_QS = logprob_QSV.gather(2, written_QS.unsqueeze(2)).squeeze(2)
            is_end_QS = (written_QS == self.model.generation_config.eos_token_id).long()
            after_end_QS = is_end_QS.cumsum(dim=1) - is_end_QS > 0
            score_Q = logprob_QS.masked_fill(after_end_QS, 0.0).sum(dim=1)
        written = zip(written_QS.tolist(), score_Q.tolist(), strict=True)
        return [Answer(self.text(ids), score) for ids, score in written]

    def text(self, ids: Sequence[int]) -> str:
        """Return what these ids of the answer say, without special tokens, tidied as transformers 4 did."""
        return tokens.clean_spaces(self.encoder.backend.decode(list(ids), skip_special_tokens=True))

    def _encode(self, rows: Tokens, wanted: npt.NDArray[np.int64]) -> dict[int, Any]:
        """Return the encoder states (L, H) of each wanted row, without padding."""
        import torch

        states: dict[int, Any] = {}
        for positions in tokens.micro_batches(rows.lengths[wanted], self.passage_tokens):
            batch = wanted[positions]
            ids_BL, mask_BL, _ = tokens.pad(rows, batch, self.encoder.pad_id)
            inputs = [torch.from_numpy(array).to(self.device) for array in (ids_BL, mask_BL)]
            hidden_BLH = self.model.encoder(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
            for row, hidden_LH in zip(batch.tolist(), hidden_BLH, strict=True):
                states[row] = hidden_LH[: int(rows.lengths[row])]
        return states
