"""DPR bi-encoders as DPR itself saves them: one `.cp` file with both towers, beside BERT's vocabulary.

The file (`hf_bert_base.cp`) holds `question_model.*` and `ctx_model.*` under `model_dict`, the training options under
`encoder_params`, and no vocabulary: put it into a directory of its own with bert-base-uncased's vocab.txt (or
tokenizer.json). BERT's sizes are read from the tensors; a config.json beside the file overrides what they leave open.
Formatting, pooling and score are those of `dpr`. Source: DPR's published checkpoint layout.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from pipelines.errors import CheckpointError
from pipelines.models import dpr, tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, refuse_options
from pipelines.models.files import TOKENISER_FILES, mentions, native_files, read_json, refuse

BIENCODER, READER = "question_model.", "qa_classifier."
_PREFIXES: dict[Side, str] = {"passage": "ctx_model.", "query": "question_model."}
_HEAD_WIDTH = 64  # of every BERT that was released
_PROJECTION = "encode_proj."
_TABLES = ("word", "position", "token_type")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_HINT = "copy vocab.txt of the BERT it was trained from (bert-base-uncased for the released ones) beside it"


@dataclass(frozen=True)
class Native:
    """An opened `.cp` file. tensors: all of them, by their names in the file. params: its training options.

    backend: the tokeniser beside it, lower-casing as the model was trained.
    """

    path: str
    directory: str
    tensors: dict[str, Any]
    params: dict[str, Any]
    backend: Any

    def part(self, prefix: str) -> dict[str, Any]:
        """Return the tensors under `prefix`, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def length(self, default: int) -> int:
        """Return the number of tokens the model was trained with."""
        length = self.params.get("sequence_length")
        return length if isinstance(length, int) and length > 0 else default


def recognises(directory: str) -> bool:
    """Say whether this holds a `.cp` file that is no reader; a damaged one counts, for `info` to explain."""
    return bool(native_files(directory)) and not is_reader(directory)


def is_reader(directory: str) -> bool:
    """Say whether the directory's `.cp` file names a reader's tensors and no bi-encoder's."""
    return any(mentions(path, (BIENCODER, READER)) == {READER} for path in native_files(directory))


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe both encoders. Raises CheckpointError for an incomplete directory, ConfigError for options."""
    refuse_options("DPR", "dot", similarity, formatting)
    native = read(directory)
    towers = {side: native.part(prefix) for side, prefix in _PREFIXES.items()}
    for side, part in towers.items():
        if not part:
            refuse(f"the .cp file has no {dpr.NAMES[side]}", native.path, expected=f"tensors named {_PREFIXES[side]}*")
    foreign = sorted(name for name in native.tensors if not name.startswith(tuple(_PREFIXES.values())))
    if foreign:
        refuse(f"the weights hold unexpected {', '.join(foreign[:5])}", native.path, expected="two DPR encoders")
    dims = {width(native, part) for part in towers.values()}
    if len(dims) != 1:
        refuse(f"the two encoders have {' and '.join(map(str, sorted(dims)))} dimensions", native.path)
    return EncoderInfo(
        family="dpr_cp",
        dim=dims.pop(),
        similarity="dot",
        max_length=native.length(dpr.MAX_LENGTH),
        formatting=dpr.FORMATTING,
        details={
            "side": "both",
            "projected": f"{_PROJECTION}weight" in towers["query"],
            "pooling": "cls",
            "file": os.path.basename(native.path),
            "trained_from": native.params.get("pretrained_model_cfg"),
        },
    )


def read(directory: str) -> Native:
    """Open the directory's `.cp` file and check it against the vocabulary. Raises CheckpointError."""
    from pipelines.models.weights import read_native_file

    paths = native_files(directory)
    if len(paths) != 1:
        found = ", ".join(os.path.basename(path) for path in paths) or "none"
        refuse(f"{len(paths)} .cp files: {found}", directory, expected="exactly one, in a directory of its own")
    if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENISER_FILES):
        refuse("the checkpoint has no tokeniser", directory, expected="vocab.txt or tokenizer.json", hint=_HINT)
    content = read_native_file(paths[0])
    kind = content.params.get("encoder_model_type")
    if kind not in (None, "hf_bert"):
        refuse(f"a {kind} encoder is not supported", paths[0], expected="encoder_model_type hf_bert")
    backend = tokens.load_backend(directory, "BertTokenizer")
    native = Native(paths[0], directory, content.tensors, content.params, backend)
    _check_vocabulary(native)
    lower = content.params.get("do_lower_case")
    if isinstance(lower, bool) and type(backend.normalizer).__name__ == "BertNormalizer":
        backend.normalizer.lowercase = lower
    return native


def _check_vocabulary(native: Native) -> None:
    """Refuse a vocabulary of another size, or of the other case, than the model was trained with."""
    tables = [t for name, t in native.tensors.items() if name.endswith(".word_embeddings.weight")]
    rows = {int(table.shape[0]) for table in tables if table.dim() == 2}
    pieces = native.backend.get_vocab()
    if rows and rows != {len(pieces)}:
        sizes = " and ".join(f"{row:,}" for row in sorted(rows))
        what = f"the vocabulary has {len(pieces):,} pieces, the model {sizes}"
        refuse(what, native.directory, expected="the vocabulary it was trained with", hint=_HINT)
    if native.params.get("do_lower_case") is True and tokens.is_cased(pieces):
        what = "the vocabulary is cased, but the model was trained on lower-cased text"
        refuse(what, native.directory, expected="an uncased vocabulary", hint=_HINT)


def width(native: Native, part: dict[str, Any]) -> int:
    """Return the width of a tower's vectors, from its tensors. Raises CheckpointError when they are no BERT's."""
    for name in (f"{_PROJECTION}weight", "embeddings.word_embeddings.weight"):
        if name in part and part[name].dim() == 2:
            return int(part[name].shape[0 if name.startswith(_PROJECTION) else 1])
    return refuse("the weights lack embeddings.word_embeddings.weight", native.path, expected="the tensors of a BERT")


def bert_config(native: Native, part: dict[str, Any]) -> Any:
    """Return the BertConfig of a tower: sizes of its tensors, then config.json. Raises CheckpointError."""
    from transformers import BertConfig

    try:
        words, positions, types = (part[f"embeddings.{name}_embeddings.weight"].shape for name in _TABLES)
        (inner, hidden), (vocabulary, _) = part["encoder.layer.0.intermediate.dense.weight"].shape, words
    except KeyError as error:
        raise CheckpointError(f"the weights lack {error.args[0]}", where=native.path, expected="a BERT's") from error
    except ValueError as error:
        raise CheckpointError("the weights are no BERT's", where=native.path) from error
    layers = {int(found[1]) for name in part if (found := _LAYER.match(name))}
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": max(layers, default=0) + 1,
        "num_attention_heads": max(hidden // _HEAD_WIDTH, 1),
        "intermediate_size": inner,
        "max_position_embeddings": positions[0],
        "type_vocab_size": types[0],
    }
    beside = read_json(native.directory, "config.json")
    try:
        return BertConfig(**(sizes | {key: value for key, value in beside.items() if key != "model_type"}))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}", where=native.directory) from error


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> dpr.DprTokeniser:
    native = read(directory)
    positions = native.tensors.get(f"{BIENCODER}embeddings.position_embeddings.weight")
    limit = None if positions is None else int(positions.shape[0])
    length = tokens.checked_length(max_length, native.length(dpr.MAX_LENGTH), limit)
    pad_id = tokens.pad_id(directory, native.backend)
    return dpr.DprTokeniser(tokens.TextEncoder(native.backend, pad_id, length))


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the encoder of `side` from the file that holds both. Raises CheckpointError when it is incomplete."""
    native = read(directory)
    part = native.part(_PREFIXES[side])
    if not part:
        refuse(f"the .cp file has no {dpr.NAMES[side]}", native.path, expected=f"tensors named {_PREFIXES[side]}*")
    config = bert_config(native, part)
    # Copies, so that the tower does not hang on the mapped file.
    projection = {name: part.pop(name).clone() for name in list(part) if name.startswith(_PROJECTION)}
    bert = {name: tensor.clone() for name, tensor in part.items()}
    return dpr.build_tower(config, bert, projection, dtype, native.path, side).on(device)
