"""Write tiny average_word_embeddings_* directories."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from tests.checkpoints import save_weights
from tests.checkpoints.sentence import HIDDEN, Model, write_layer, write_modules
from tests.checkpoints.tokenisers import write_json


def write_word_vectors(
    directory: str,
    vocabulary: Sequence[str],
    *,
    stop_words: Sequence[str] = (),
    lower_case: bool = False,
    word_weights: dict[str, float] | None = None,
    unknown_weight: float = 1.0,
    modes: Sequence[str] = ("mean_tokens",),
    extras: Sequence[str] = (),
    length: int = 1_000_000,
    layout: str = "v0.2",
    weights: str = "bin",
    dim: int = HIDDEN,
) -> str:
    """Write average_word_embeddings_*: vocabulary[0] is the padding word, of zeros. word_weights: add WordWeights.

    layout: "v0.2" (old module and tokeniser names) or "new" (the names of sentence-transformers 6).
    """
    new = layout == "new"
    root = "sentence_transformers.sentence_transformer.modules.tokenizer.whitespace" if new else ""
    tokeniser = f"{root or 'sentence_transformers.models.tokenizer.WhitespaceTokenizer'}.WhitespaceTokenizer"
    folder = os.path.join(directory, "0_WordEmbeddings")
    config = {"tokenizer_class": tokeniser, "update_embeddings": False, "max_seq_length": length}
    write_json(folder, "wordembedding_config.json", config)
    words = {"vocab": list(vocabulary), "stop_words": list(stop_words), "do_lower_case": lower_case}
    write_json(folder, "whitespacetokenizer_config.json", words)
    vectors = 0.5 * np.random.default_rng(0).standard_normal((len(vocabulary), dim)).astype(np.float32)
    vectors[0] = 0
    save_weights(folder, {"emb_layer.weight": vectors}, weights)
    modules = [("WordEmbeddings", "0_WordEmbeddings")]
    if word_weights is not None:
        weighted = {"vocab": list(vocabulary), "word_weights": word_weights, "unknown_word_weight": unknown_weight}
        write_json(os.path.join(directory, "1_WordWeights"), "config.json", weighted)
        modules.append(("WordWeights", "1_WordWeights"))
    pooling = {f"pooling_mode_{mode}": mode in modes for mode in ("cls_token", "mean_tokens", "max_tokens")}
    pooling |= {f"pooling_mode_{mode}": True for mode in modes}
    modules.append(("Pooling", f"{len(modules)}_Pooling"))
    write_json(os.path.join(directory, modules[-1][1]), "config.json", {"word_embedding_dimension": dim} | pooling)
    for extra in extras:
        modules.append((extra, f"{len(modules)}_{extra}"))
        write_layer(os.path.join(directory, modules[-1][1]), extra, Model("words", ""), weights)
    write_modules(directory, modules)
    write_json(directory, "config.json", {"__version__": "0.4.0"})
    return directory
