"""Texts to token ids and back: a checkpoint's Rust tokeniser, its output as one flat array, and that in padded batches.

Nothing here touches weights or imports torch. `transformers` is imported only for a directory without
`tokenizer.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.base import Tokens
from pipelines.models.files import TOKENISER_FILES, read_json, refuse

_LONG = 4  # characters a token: only pairs whose both sides are longer than this times max_length are looked at
_PIECES = 3  # of max_length tokens each; one more than truncation can ever reach, for a word cut in two at the end
_SHORTEST = 8  # tokens; below it hardly anything of a text is left beside the special tokens
_CASED_SHARE = 0.01  # of the vocabulary; cased BERT vocabularies have over 20% upper-case pieces, uncased ones none
_BERT_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# What the clean-up of tokenisation spaces in transformers 4 closes up, in its order.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

Array = npt.NDArray[Any]

Text = str | tuple[str, str]


@dataclass
class TextEncoder:
    """A checkpoint's tokeniser: texts, or pairs of texts, to ids with special tokens, cut to `max_length`.

    A pair is cut longest side first. with_types: give token type ids (segment 1 for the second text of a pair).
    Pickles whole, so a worker needs no file.
    """

    backend: Any
    pad_id: int
    max_length: int
    with_types: bool = False

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.enable_truncation(self.max_length, strategy="longest_first")

    def encode(self, texts: Sequence[Text]) -> Tokens:
        encodings = self.backend.encode_batch_fast(shorten(self, texts))
        rows = flatten([encoding.ids for encoding in encodings])
        if not self.with_types:
            return rows
        types = chain.from_iterable(encoding.type_ids for encoding in encodings)
        return Tokens(rows.ids, rows.offsets, np.fromiter(types, dtype=np.int8, count=len(rows.ids)))


def flatten(rows: Sequence[Sequence[int]]) -> Tokens:
    """Return lists of ids as one ragged array."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return Tokens(np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1])), offsets)


def micro_batches(length_N: Array, token_budget: int) -> Iterator[Array]:
    """Yield index arrays that cover 0..N-1 once: longest first, each of at most `token_budget` padded tokens.

    A text longer than the budget gets a micro-batch of its own.
    """
    rest = longest_first(length_N)
    while len(rest):
        batch = first_batch(rest, length_N, token_budget)
        yield batch
        rest = rest[len(batch) :]


def longest_first(length_N: Array) -> Array:
    """Return 0..N-1 by length, equal lengths in their order."""
    return np.argsort(-np.asarray(length_N), kind="stable")


def first_batch(rest: Array, length_N: Array, token_budget: int) -> Array:
    """Return the first of `rest`, longest first, that fit the budget together; one at least."""
    longest = max(1, int(length_N[rest[0]]))
    return rest[: max(1, token_budget // longest)]


def pad(tokens: Tokens, batch: Array, pad_id: int, least: int = 1) -> tuple[Array, Array, Array | None]:
    """Return ids_BL, mask_BL and types_BL (int64; types None when the model takes none) for the texts in `batch`.

    L: the longest text's tokens, or `least`.
    """
    starts, length_B = tokens.offsets[batch], tokens.lengths[batch]
    column = np.arange(max(least, int(length_B.max(initial=0))))
    mask_BL = column[None, :] < length_B[:, None]
    source = (starts[:, None] + column[None, :])[mask_BL]
    ids_BL = np.full(mask_BL.shape, pad_id, np.int64)
    ids_BL[mask_BL] = tokens.ids[source]
    if tokens.type_ids is None:
        return ids_BL, mask_BL.astype(np.int64), None
    types_BL = np.zeros(mask_BL.shape, np.int64)
    types_BL[mask_BL] = tokens.type_ids[source]
    return ids_BL, mask_BL.astype(np.int64), types_BL


def shorten(encoder: TextEncoder, texts: Sequence[Text]) -> list[Text]:
    """Return the texts with the sides of long pairs cut well behind the last token that truncation could leave.

    The Rust tokeniser also builds what it cuts off, every piece of one side with every piece of the other: two sides
    of a megabyte each would take tens of gigabytes. The longer side stays the longer one, so that the tokeniser's own
    truncation, longest side first, ends as it would have.
    """
    long = _LONG * encoder.max_length
    pieces: dict[str, tuple[int, list[int]]] = {}

    def measure(text: str) -> tuple[int, list[int]]:
        if text not in pieces:
            pieces[text] = _measure(encoder, text)
        return pieces[text]

    def cut(text: Text) -> Text:
        if isinstance(text, str) or min(len(text[0]), len(text[1])) <= long:
            return text
        first, second = text
        (first_count, first_ends), (second_count, second_ends) = measure(first), measure(second)
        first_most, second_most = _PIECES + (first_count > second_count), _PIECES + (second_count > first_count)
        return first[: first_ends[:first_most][-1]], second[: second_ends[:second_most][-1]]

    return [cut(text) for text in texts]


def _measure(encoder: TextEncoder, text: str) -> tuple[int, list[int]]:
    """Return the number of tokens, and where, in characters, each piece of max_length tokens ends."""
    whole = encoder.backend.encode(text)
    parts = [whole, *whole.overflowing]
    return sum(len(part.ids) for part in parts), [max((end for _, end in part.offsets), default=0) for part in parts]


def load_backend(directory: str, kind: str = "AutoTokenizer") -> Any:
    """Return the `tokenizers.Tokenizer` of the directory, with the lower-casing the checkpoint declares.

    kind: the transformers class that reads a directory without tokenizer.json. Lower-casing of BERT vocabularies is
    what tokenizer_config.json says; where it is silent, what tokenizer.json says, or whether the vocabulary holds
    capitals (transformers 5 would lower-case a cased model then). Raises CheckpointError.
    """
    from tokenizers import Tokenizer

    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        return _convert(directory, kind)
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # the Rust binding raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be read: {error}", where=directory) from error
    if type(backend.normalizer).__name__ == "BertNormalizer":
        settings = read_json(directory, "tokenizer_config.json")
        for key, attribute in _BERT_SETTINGS.items():
            if isinstance(settings.get(key), bool):
                setattr(backend.normalizer, attribute, settings[key])
    return backend


def _convert(directory: str, kind: str) -> Any:
    """Build the backend from vocab.txt, vocab.json + merges.txt or a SentencePiece model, through transformers."""
    import transformers

    from pipelines.models.weights import quiet_transformers

    if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENISER_FILES):
        refuse("the checkpoint has no tokeniser", directory, expected=f"one of {', '.join(TOKENISER_FILES)}")
    settings = read_json(directory, "tokenizer_config.json")
    options: dict[str, Any] = {}
    vocabulary = os.path.join(directory, "vocab.txt")
    if os.path.isfile(vocabulary) and "do_lower_case" not in settings:
        with open(vocabulary, encoding="utf-8") as handle:
            options["do_lower_case"] = not is_cased(line.strip() for line in handle)
    try:
        with quiet_transformers():
            tokeniser = getattr(transformers, kind).from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"the tokeniser cannot be loaded: {error}", where=directory) from error
    backend = tokeniser.backend_tokenizer
    is_albert = read_json(directory, "config.json").get("model_type") == "albert"
    # An ALBERT may also come with BERT's vocabulary.
    return _as_albert(backend) if is_albert and type(backend.model).__name__ == "Unigram" else backend


def is_cased(pieces: Iterable[str]) -> bool:
    """Tell whether the pieces of a BERT vocabulary hold capitals; special pieces such as [CLS] do not count."""
    words = [piece for piece in pieces if piece and not piece.startswith("[")]
    return sum(piece != piece.lower() for piece in words) > _CASED_SHARE * len(words)


def _as_albert(backend: Any) -> Any:
    """Return an ALBERT backend built from spiece.model as ALBERT's own tokeniser works.

    Pieces "digit + comma" score 100 less, so that `9,787` splits at the comma. The user-defined pieces of the model
    (ALBERT's has brackets, quotes, dots, dashes) are pieces as any other: transformers 5 makes added tokens of them,
    which cut the text before the model sees it, and puts a word boundary behind each.
    """
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    for entry in content["model"]["vocab"]:
        piece = entry[0]
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            entry[1] -= 100.0
    return Tokenizer.from_str(json.dumps(content))


def pad_id(directory: str, backend: Any) -> int:
    """Return the padding id: the model config's, because RoBERTa-like models compute positions from it."""
    declared = read_json(directory, "config.json").get("pad_token_id")
    if isinstance(declared, int):
        return declared
    known = (backend.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((found for found in known if found is not None), 0)


def add_separator(directory: str, backend: Any) -> str:
    """Return the separator token (BERT's [SEP], RoBERTa's </s>), made special so that it is found inside a text.

    Raises CheckpointError when the tokeniser has none.
    """
    declared = [read_json(directory, name).get("sep_token") for name in _SPECIAL_FILES]
    names = [token.get("content") if isinstance(token, dict) else token for token in declared]
    for name in (*names, "[SEP]", "</s>"):
        if isinstance(name, str) and backend.token_to_id(name) is not None:
            backend.add_special_tokens([name])
            return name
    return refuse("the tokeniser has no separator token", directory, expected="[SEP] or </s> in its vocabulary")


def checked_length(wanted: int | None, default: int, limit: int | None) -> int:
    """Return the token limit to use: `wanted` or the checkpoint's own. Raises ConfigError when it can't be meant."""
    length = min(default, limit or default) if wanted is None else wanted
    if length < _SHORTEST or (limit is not None and length > limit):
        top = limit if limit is not None else "any length"
        raise ConfigError(f"max_length {length} does not suit the model", expected=f"{_SHORTEST} to {top}")
    return length


def join_title(title: str, text: str) -> str:
    """Return "title. text", or the text alone when the title is empty."""
    return f"{title}. {text}" if title else text


def clean_spaces(text: str) -> str:
    """Return the text without the spaces that tokenisation puts before punctuation and English contractions."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text
