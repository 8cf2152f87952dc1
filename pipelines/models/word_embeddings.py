"""Averages of word vectors: WordEmbeddings, maybe WordWeights, Pooling, then the layers the directory says.

There is no transformer: a text is split at white space, each known word gives its vector, the rest vanish, and the
vectors are pooled. A text without a known word is the zero vector, under cosine similarity too. Source: the documented
layout and behaviour of sentence-transformers' WordEmbeddings, WordWeights and WhitespaceTokenizer.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import ConfigError
from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens
from pipelines.models.files import read_json, refuse, tensor_shapes
from pipelines.models.modules_json import (
    WORDS,
    Layout,
    check_weights,
    declared_prompts,
    declared_similarity,
    final_dim,
    first_module,
    read_layout,
    read_settings,
)

_CONFIG = "wordembedding_config.json"
_VOCABULARY = "whitespacetokenizer_config.json"
_WEIGHT = "emb_layer.weight"
_MODES = ("max", "mean", "mean_sqrt_len_tokens")
_MAX_LENGTH = 1_000_000  # words; the default of sentence-transformers
_STOP = -1  # the id of a stop word
_ALONE = "the text alone when there is no title"
_FORMATTINGS: dict[Formatting, str] = {
    "title. text": f'the words of "title. text"; {_ALONE}',
    "text": "the words of the text, without its title",
}


def recognises(checkpoint: str) -> bool:
    """Tell whether the directory's modules.json starts with a WordEmbeddings module."""
    return first_module(checkpoint) in WORDS


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for another tokeniser or pooling, or lost files."""
    settings = read_settings(directory)
    layout = _layout(directory)
    return EncoderInfo(
        family="word_embeddings",
        dim=final_dim(layout, settings),
        similarity=similarity or declared_similarity(directory, settings),
        max_length=_max_length(layout),
        formatting=_FORMATTINGS[_formatting(formatting)],
        prompts=declared_prompts(directory, settings, layout),
        details={
            "backbone": "word vectors",
            "pooling": ", ".join(layout.modes),
            "word_weights": layout.word_weights is not None,
            "layers": [kind for kind, _ in layout.extras],
        },
    )


def _layout(directory: str) -> Layout:
    """Parse modules.json and check the word vectors' folder, without reading the vocabulary."""
    layout = read_layout(directory, WORDS)
    config = read_json(layout.first, _CONFIG, required=True)
    dotted = str(config.get("tokenizer_class", ""))
    if not dotted.startswith("sentence_transformers.") or not dotted.endswith(".WhitespaceTokenizer"):
        hint = "phrases need the phrase list of its training: choose a model with a WhitespaceTokenizer"
        what = f"word vectors with the tokeniser {dotted.rsplit('.', 1)[-1] or 'unnamed'} are not supported"
        refuse(what, layout.first, expected="sentence_transformers' WhitespaceTokenizer", hint=hint)
    if not os.path.isfile(os.path.join(layout.first, _VOCABULARY)):
        refuse(f"{_VOCABULARY} is missing", layout.first, expected="the vocabulary and the stop words")
    check_weights(layout.first)
    if unsuited := [mode for mode in layout.modes if mode not in _MODES]:
        refuse(f"word vectors cannot be pooled by {', '.join(unsuited)}", directory, expected=", ".join(_MODES))
    return layout


def _formatting(wanted: Formatting | None) -> Formatting:
    """Return the formatting to use. Raises ConfigError for one that needs a separator or a pair."""
    if wanted is None:
        return "title. text"
    if wanted not in _FORMATTINGS:
        raise ConfigError(f"word vectors have no formatting {wanted!r}", expected=", ".join(_FORMATTINGS))
    return wanted


def _max_length(layout: Layout) -> int:
    length = read_json(layout.first, _CONFIG).get("max_seq_length") or _MAX_LENGTH
    if not isinstance(length, int) or length < 1:
        refuse(f"max_seq_length is {length!r}", layout.first, expected="a number of words")
    return length


@dataclass
class WordTokeniser:
    """Split at white space and look each word up: as it is, bare of outer punctuation, then in lower case.

    At each step a stop word drops the word and a known one gives its id; what is never known vanishes, so a text may
    have no tokens. table: word -> row of the vectors, or -1 for a stop word. prompts: by side. Row 0 (the padding
    word's) pads.
    """

    table: dict[str, int]
    prompts: dict[str, str]
    lower_case: bool
    max_length: int
    formatting: Formatting
    pad_id: int = 0

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        prompt = self.prompts.get("passage", "")
        pairs = zip(titles, texts, strict=True)
        return self._encode([prompt + self._joined(title.strip(), text) for title, text in pairs])

    def queries(self, texts: Sequence[str]) -> Tokens:
        prompt = self.prompts.get("query", "")
        return self._encode([prompt + text for text in texts])

    def _joined(self, title: str, text: str) -> str:
        return tokens.join_title(title, text) if self.formatting == "title. text" else text

    def _encode(self, texts: Sequence[str]) -> Tokens:
        return tokens.flatten([self._ids(text) for text in texts])

    def _ids(self, text: str) -> list[int]:
        words = (text.lower() if self.lower_case else text).split()
        found = list(map(self.table.get, words))  # most words are known as they are: the loop below is rare
        if None in found:
            found = [self._rarer(word) if index is None else index for word, index in zip(words, found, strict=True)]
        return [index for index in found if index is not None and index != _STOP][: self.max_length]

    def _rarer(self, word: str) -> int:
        """Look up a word that is not in the table as it is. Returns -1 for nothing."""
        bare = word.strip(string.punctuation)
        found = self.table.get(bare)
        return self.table.get(bare.lower(), _STOP) if found is None else found


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> WordTokeniser:
    """Load the vocabulary. max_length: known words kept of each text.

    Raises CheckpointError when the vocabulary and the vectors differ in number.
    """
    chosen = _formatting(formatting)
    layout = _layout(directory)
    own = _max_length(layout)
    if max_length is not None and not 1 <= max_length <= own:
        raise ConfigError(f"max_length {max_length} does not suit the model", expected=f"1 to {own}")
    table, lower_case = _read_vocabulary(layout.first)
    prompts = declared_prompts(directory, read_settings(directory), layout)
    return WordTokeniser(table, prompts, lower_case, max_length or own, chosen)


def _read_vocabulary(folder: str) -> tuple[dict[str, int], bool]:
    """Return word -> row, with stop words at -1, and whether text is lower-cased first."""
    config = read_json(folder, _VOCABULARY, required=True)
    vocabulary, stop_words = config.get("vocab"), config.get("stop_words")
    if not isinstance(vocabulary, list) or not isinstance(stop_words, list):
        refuse(f"{_VOCABULARY} lacks vocab or stop_words", folder, expected="two lists of words")
    rows, _ = _table_shape(folder)
    if len(vocabulary) != rows:
        refuse(f"the vocabulary has {len(vocabulary):,} words, the weights {rows:,} vectors", folder)
    table = {word: index for index, word in enumerate(vocabulary)} | dict.fromkeys(stop_words, _STOP)
    return table, bool(config.get("do_lower_case", False))


def _table_shape(folder: str) -> tuple[int, int]:
    shapes = tensor_shapes(folder)
    if set(shapes) != {_WEIGHT} or len(shapes[_WEIGHT]) != 2:
        refuse(f"the weights hold {', '.join(sorted(shapes)[:5]) or 'nothing'}", folder, expected=f"{_WEIGHT} alone")
    rows, width = shapes[_WEIGHT]
    return rows, width


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the word vectors; both sides share them. Under cosine similarity texts' vectors are L2-normalised.

    Raises CheckpointError when weights are missing, damaged or of another shape than the configs say.
    """
    from pipelines.models.tower import WordTower, load_layers
    from pipelines.models.weights import read_weights, torch_dtype

    described = info(directory, similarity=similarity)
    layout = _layout(directory)
    rows, width = _table_shape(layout.first)
    if width != layout.width:
        refuse(f"the pooling is {layout.width} wide, the word vectors {width}", directory)
    vectors = read_weights(layout.first)[_WEIGHT].to(torch_dtype(dtype))
    weights = _word_weights(layout.word_weights, rows) if layout.word_weights else None
    layers = load_layers(layout.extras, read_settings(directory).get("truncate_dim"))
    normalise = described.similarity == "cosine"
    return WordTower(vectors, weights, described.dim, layout.modes, layers, normalise=normalise).eval().to(device)


def _word_weights(folder: str, rows: int) -> list[float]:
    """Return the weight of each word: its own, its lower-cased form's, or the one of unknown words."""
    config = read_json(folder, "config.json", required=True)
    vocabulary, known, other = config.get("vocab"), config.get("word_weights"), config.get("unknown_word_weight", 1)
    if not isinstance(vocabulary, list) or not isinstance(known, dict) or not isinstance(other, int | float):
        refuse("the word weights' config.json lacks vocab, word_weights or unknown_word_weight", folder)
    if len(vocabulary) != rows:
        refuse(f"there are weights for {len(vocabulary):,} words and {rows:,} word vectors", folder)
    weights: list[Any] = [known.get(word, known.get(word.lower(), other)) for word in vocabulary]
    return [float(weight) for weight in weights]
