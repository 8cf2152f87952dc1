"""Checkpoints of released sizes with random weights, for speed: a BERT-base DPR encoder, a MiniLM-L6 cross-encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints import save_weights, with_prefix

_TOKENISER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPREAD = 0.05  # of the weights: with BERT's own 0.02 all random vectors would be nearly the same
_PREFIXES = {"passage": "ctx_encoder.bert_model.", "query": "question_encoder.bert_model."}
_CLASSES = {"passage": "DPRContextEncoder", "query": "DPRQuestionEncoder"}


def write_bert_base(folder: Path, minilm: str) -> dict[str, str]:
    """Write the DPR passage and query encoders, and a sentence-transformers directory with the passage side's weights.

    minilm: the directory of all-MiniLM-L6-v2, whose vocabulary is BERT's. The query encoder, which is not measured, has
    one layer. Returns the directories "passage", "query" and "peer".
    """
    paths = {side: str(folder / f"bert-base-{side}") for side in ("passage", "query", "peer")}
    for side in ("passage", "query"):
        config, state = _bert(12 if side == "passage" else 1)
        _write_json(paths[side], "config.json", config | {"model_type": "dpr", "architectures": [_CLASSES[side]]})
        save_weights(paths[side], with_prefix(_PREFIXES[side], state))
        _copy_tokeniser(minilm, paths[side])
        if side == "passage":
            _write_json(paths["peer"], "config.json", config | {"architectures": ["BertModel"]})
            save_weights(paths["peer"], state)
    _copy_tokeniser(minilm, paths["peer"])
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]
    _write_json(paths["peer"], "modules.json", modules)
    _write_json(paths["peer"], "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    pooling = {"word_embedding_dimension": 768, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    _write_json(str(Path(paths["peer"], "1_Pooling")), "config.json", pooling)
    return paths


def _bert(layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json's content and a random state dict of a BERT-base with `layers` layers."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers, initializer_range=_SPREAD))
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    return config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def write_cross_encoder(folder: Path, minilm: str) -> str:
    """Write a cross-encoder with the layers of all-MiniLM-L6-v2, so that its scores are spread like a trained one's,
    under a random pooler and head. Returns its directory.
    """
    import torch
    from safetensors.numpy import load_file

    directory = str(folder / "cross-encoder")
    bert = dict(load_file(str(Path(minilm, "model.safetensors"))))
    config = json.loads(Path(minilm, "config.json").read_text())
    width, draw = config["hidden_size"], torch.Generator().manual_seed(0)
    for name, size in {"bert.pooler.dense": width, "classifier": 1}.items():
        spread = 2 / width**0.5
        weight = spread * torch.randn(size, width, generator=draw)
        bert[f"{name}.weight"], bert[f"{name}.bias"] = weight.numpy(), torch.zeros(size).numpy()
    state = {name if name.startswith(("bert.", "classifier")) else f"bert.{name}": a for name, a in bert.items()
             if not name.startswith("pooler.") and not name.endswith("position_ids")}  # fmt: skip
    label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    _write_json(directory, "config.json", config | label | {"architectures": ["BertForSequenceClassification"]})
    save_weights(directory, state)
    _copy_tokeniser(minilm, directory)
    return directory


SIZES = {
    "TinyBERT-L2": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "MiniLM-L2": {"num_hidden_layers": 2},
    "MiniLM-L4": {"num_hidden_layers": 4},
    "MiniLM-L6": {"num_hidden_layers": 6},
    "MiniLM-L12": {"num_hidden_layers": 12},
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
"""The sizes of cross-encoders that sentence-transformers publishes rates for; MiniLM where nothing else is said."""
_MINILM_SIZE = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


def write_random_cross_encoder(folder: Path, minilm: str, name: str) -> str:
    """Write a cross-encoder of one of SIZES with random weights. Returns its directory."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = BertConfig(**(_MINILM_SIZE | SIZES[name]), num_labels=1, initializer_range=_SPREAD)
    model, directory = BertForSequenceClassification(shape), str(folder / name)
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    _write_json(directory, "config.json", config | {"architectures": ["BertForSequenceClassification"]})
    save_weights(directory, {key: tensor.numpy() for key, tensor in model.state_dict().items()})
    _copy_tokeniser(minilm, directory)
    return directory


def _copy_tokeniser(source: str, target: str) -> None:
    for name in _TOKENISER:
        shutil.copy(Path(source, name), Path(target, name))


def _write_json(directory: str, name: str, content: Any) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, name).write_text(json.dumps(content, indent=1))
