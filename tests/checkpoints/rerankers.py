"""Write tiny rerankers in the layouts of the released ones: sequence classifiers of every backbone, PAQ rerankers."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from tests.checkpoints import (
    State,
    albert_state,
    bert_config,
    bert_state,
    linear_state,
    save_weights,
    with_prefix,
    write_bert_tokeniser,
    write_spiece,
)

_CLASSES = {
    "bert": "BertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "albert": "AlbertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
}
_POSITION_IDS = ("bert", "electra", "albert", "roberta", "xlm-roberta")  # whose old files hold the buffer


def write_classifier(
    directory: str, kind: str, labels: int = 1, *, weights: str = "bin", dtype: str = "float32", **more: Any
) -> str:
    """Write a sequence classifier as transformers 4.1 saved it: slow tokeniser, position_ids, old config.json.

    more: further keys of config.json.
    """
    vocabulary = _TOKENISERS.get(kind, lambda folder: write_bert_tokeniser(folder, fast=False))(directory)
    config = _config(kind, vocabulary) | {"id2label": {str(i): f"LABEL_{i}" for i in range(labels)}} | more
    _write_json(directory, "config.json", config)
    save_weights(directory, classifier_state(kind, config, labels), weights, dtype)
    return directory


def _config(kind: str, vocabulary: int, dim: int = 32) -> dict[str, Any]:
    config = bert_config(vocabulary, dim, model_type=kind, architectures=[_CLASSES[kind]])
    if kind == "distilbert":
        sizes = {"dim": dim, "hidden_dim": 2 * dim, "n_layers": 2, "n_heads": 4, "activation": "gelu"}
        base = {"model_type": kind, "architectures": [_CLASSES[kind]], "vocab_size": vocabulary, "pad_token_id": 0}
        return base | sizes | {"max_position_embeddings": 512, "sinusoidal_pos_embds": False}
    if kind in ("electra", "albert"):
        config |= {"embedding_size": 16}
    if kind in ("roberta", "xlm-roberta"):
        config |= {"type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 514}
    if kind == "deberta-v2":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        config |= {"type_vocab_size": 0, "pooler_hidden_size": dim, "pooler_hidden_act": "gelu", **relative}
    return config


def classifier_state(kind: str, config: dict[str, Any], labels: int, seed: int = 0) -> State:
    """Return random weights under the names of the transformers class: norms around 1, all else around 0."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    rng = np.random.default_rng(seed)
    options = {key: value for key, value in config.items() if key not in ("id2label", "model_type", "architectures")}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, num_labels=labels, **options))
    state: State = {}
    for name, tensor in model.state_dict().items():
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        state[name] = (centre + 0.3 * rng.standard_normal(tuple(tensor.shape))).astype(np.float32)
    if kind in _POSITION_IDS:
        prefix = {"xlm-roberta": "roberta"}.get(kind, kind)
        state[f"{prefix}.embeddings.position_ids"] = np.arange(config["max_position_embeddings"])[None]
    return state


def write_google_bert(directory: str, labels: int = 2, *, named: bool = False) -> str:
    """Write a two-label BERT as early fine-tuning scripts left it: the starting model's config, gamma and beta.

    named: whether config.json has model_type and architectures at all. Holds TinyBERT's fit_dense, too.
    """
    vocabulary = write_bert_tokeniser(directory, fast=False, settings={})
    config = bert_config(vocabulary, 32, architectures=["BertForMaskedLM"], emb_size=312, structure=[], cell={})
    unnamed = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    _write_json(directory, "config.json", config if named else unnamed)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state: State = {}
    for name, array in with_prefix("bert.", bert_state(vocabulary, 32)).items():
        for new_end, old_end in old.items():
            name = name.replace(new_end, old_end)
        state[name] = array
    save_weights(directory, state | linear_state("classifier", labels, 32) | linear_state("fit_dense", 8, 32), "bin")
    return directory


def write_capreolus(directory: str, labels: int = 2, *, weights: str = "bin") -> str:
    """Write an ELECTRA whose head is one Linear, `classifier.out_proj`."""
    vocabulary = write_bert_tokeniser(directory, fast=False)
    config = _config("electra", vocabulary)
    _write_json(directory, "config.json", config)
    state = classifier_state("electra", config, labels)
    kept = {name: array for name, array in state.items() if not name.startswith("classifier.dense.")}
    save_weights(directory, kept, weights)
    return directory


def write_bert_cat(directory: str, dim: int = 64, *, tokeniser: bool = True, dtype: str = "float32") -> str:
    """Write a BERT_Cat: DistilBERT under bert_model.*, a config.json that only names a model, no tokeniser of its own.

    tokeniser: whether the user put DistilBERT's beside it.
    """
    os.makedirs(directory, exist_ok=True)
    vocabulary = write_bert_tokeniser(directory, fast=False) if tokeniser else 100
    named = {"model_type": "BERT_Cat", "architectures": ["BERT_Cat"], "bert_model": "distilbert-base-uncased"}
    _write_json(directory, "config.json", named | {"trainable": True})
    config = _config("distilbert", vocabulary, dim) | {"n_heads": 1}
    state = classifier_state("distilbert", config, 1)
    prefix = "distilbert."
    inner = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    save_weights(
        directory, with_prefix("bert_model.", inner) | linear_state("_classification_layer", 1, dim), "bin", dtype
    )
    return directory


def write_paq_reranker(
    directory: str,
    dim: int = 32,
    *,
    heads: int = 4,
    layers: int = 2,
    weights: str = "bin",
    dtype: str = "float32",
    architecture: str = "AlbertForMultipleChoice",
    seed: int = 0,
) -> str:
    """Write a PAQ reranker: multiple-choice ALBERT with spiece.model alone."""
    vocabulary = write_spiece(directory)
    old = {"net_structure_type": 0, "gap_size": 0, "num_memory_blocks": 0, "down_scale_factor": 1, "embedding_size": 16}
    shape = {"num_hidden_groups": 1, "inner_group_num": 1, "num_hidden_layers": layers, "hidden_act": "gelu_new"}
    config = bert_config(vocabulary, dim, model_type="albert", architectures=[architecture], num_attention_heads=heads)
    _write_json(directory, "config.json", config | old | shape | {"classifier_dropout_prob": 0.1})
    position_ids = {"embeddings.position_ids": np.arange(512)[None]}
    state = with_prefix("albert.", albert_state(vocabulary, dim, seed=seed) | position_ids)
    save_weights(directory, state | linear_state("classifier", 1, dim), weights, dtype)
    return directory


# Tokenisers that only the rerankers need


def _write_byte_bpe(directory: str) -> int:
    """Write vocab.json and merges.txt, as RoBERTa's slow tokeniser saved them."""
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *characters, "Ġt", "he", "Ġthe", "<mask>"]
    os.makedirs(directory, exist_ok=True)
    _write_json(directory, "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    with open(os.path.join(directory, "merges.txt"), "w", encoding="utf-8") as handle:
        handle.write("#version: 0.2\nĠ t\nh e\nĠt he\n")
    _write_json(directory, "tokenizer_config.json", {"model_max_length": 512})
    return len(pieces)


def _write_xlmr_spiece(directory: str) -> int:
    """Write sentencepiece.bpe.model, whose first ids XLM-R moves to make room for <pad>; <mask> comes last."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    kinds = pb.ModelProto.SentencePiece
    proto = pb.ModelProto()
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'\"äéüß"
    scored = {"▁": -3.0} | dict.fromkeys(characters, -6.0) | {"▁the": -4.0, "library": -4.0}
    for piece, score in scored.items():
        proto.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    proto.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    proto.normalizer_spec.name = "identity"
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "sentencepiece.bpe.model"), "wb") as handle:
        handle.write(proto.SerializeToString())
    _write_json(directory, "tokenizer_config.json", {"model_max_length": 512})
    return len(proto.pieces) + 2


_TOKENISERS: dict[str, Any] = {
    "roberta": _write_byte_bpe,
    "xlm-roberta": _write_xlmr_spiece,
    "albert": write_spiece,
    "deberta-v2": write_bert_tokeniser,
}


def _write_json(directory: str, name: str, content: Any) -> None:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, name), "w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=2)
