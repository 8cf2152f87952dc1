"""Write tiny sentence-transformers directories, one for each row of the pretrained-models page, in every layout.

Backbones are transformers' own classes with random weights; tokenisers are of the kind the released model has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.checkpoints import State, linear_state, save_weights
from tests.checkpoints.tokenisers import CLASSES, write_json, write_tokeniser

HIDDEN = 32
IDENTITY = "torch.nn.modules.linear.Identity"
TANH = "torch.nn.modules.activation.Tanh"
_TRANSFORMER = {"bert": "BERT", "roberta": "RoBERTa", "distilbert": "DistilBERT", "xlm-roberta": "XLMRoBERTa"}
_OLD_KEYS = ("dtype", "torch_dtype", "transformers_version", "is_decoder", "add_cross_attention", "use_cache")


@dataclass(frozen=True)
class Model:
    """A row of the pretrained-models page. modes, extras, dense: as in write_sentence_transformer."""

    name: str
    backbone: str
    modes: tuple[str, ...] = ("mean_tokens",)
    extras: tuple[str, ...] = ()
    dense: dict[str, Any] = field(default_factory=dict)
    similarity: str = "cosine"
    formatting: str = "title. text"
    length: int = 128
    cased: bool = False
    lower_case: bool = False

    @property
    def dim(self) -> int:
        return int(self.dense.get("out_features", HIDDEN))


_SQUARE = {"out_features": HIDDEN, "bias": True, "activation_function": IDENTITY}
_NO_BIAS = {"out_features": 24, "bias": False, "activation_function": IDENTITY}
_CLS = ("cls_token",)
MODELS = [
    Model("paraphrase-distilroberta-base-v1", "roberta"),
    Model("paraphrase-xlm-r-multilingual-v1", "xlm-roberta"),
    Model("cross-en-de-roberta-sentence-transformer", "xlm-roberta", length=64),
    Model("stsb-mpnet-base-v2", "mpnet", length=75),
    Model("nli-distilroberta-base-v2", "roberta", length=75),
    Model("quora-distilbert-base", "distilbert"),
    Model("quora-distilbert-multilingual", "distilbert", cased=True),
    Model("msmarco-distilbert-base-v3", "distilbert", length=510),
    Model(
        "msmarco-distilbert-base-dot-prod-v3",
        "distilbert",
        extras=("Dense",),
        dense=_SQUARE | {"bias": False},
        similarity="dot",
        length=350,
    ),
    Model("msmarco-distilbert-base-tas-b", "distilbert", modes=_CLS, similarity="dot", length=512),
    Model(
        "msmarco-roberta-base-ance-firstp",
        "roberta",
        modes=_CLS,
        extras=("Dense", "LayerNorm"),
        dense=_SQUARE,
        similarity="dot",
        length=512,
        lower_case=True,
    ),
    Model("nq-distilbert-base-v1", "distilbert", formatting="pair", length=512),
    Model("facebook-dpr-ctx_encoder", "bert", modes=_CLS, similarity="dot", formatting="title [SEP] text", length=509),
    Model("distiluse-base-multilingual-cased", "distilbert", extras=("Dense",), dense={"out_features": 24}, cased=True),
    Model(
        "LaBSE",
        "bert",
        modes=_CLS,
        extras=("Dense", "Normalize"),
        dense=_SQUARE | {"activation_function": TANH},
        length=256,
        cased=True,
    ),
    Model("allenai-specter", "bert", modes=_CLS, formatting="title[SEP]text", length=512),
    Model("clip-ViT-B-32-multilingual-v1", "distilbert", extras=("Dense",), dense=_NO_BIAS, cased=True),
    Model("paraphrase-albert-small-v2", "albert", length=100),
]


def write_model(directory: str, model: Model, layout: str = "hub", *, silent: bool = False, seed: int = 0) -> str:
    """Write the model.

    layout: "hub" (transformer at the root, safetensors, tokenizer.json), "v0.2" (0_Transformer, .bin with position_ids,
    slow tokeniser files alone), or "legacy" (v0.2 under the module and config names of the first releases). silent:
    leave do_lower_case out of tokenizer_config.json.
    """
    hub, legacy = layout == "hub", layout == "legacy"
    kind = _TRANSFORMER.get(model.backbone, "Transformer") if legacy else "Transformer"
    path = "" if hub else f"0_{kind}"
    transformer = os.path.join(directory, path) if path else directory
    vocabulary = write_tokeniser(transformer, model.backbone, fast=hub, cased=model.cased, silent=silent)
    write_backbone(transformer, model.backbone, vocabulary, old=not hub, seed=seed)
    stem = "bert" if kind == "Transformer" else model.backbone
    flags = {"max_seq_length": model.length, "do_lower_case": model.lower_case}
    write_json(transformer, f"sentence_{stem}_config.json", flags)
    pooling: dict[str, Any] = {"word_embedding_dimension": HIDDEN}
    pooling |= {f"pooling_mode_{mode}": mode in model.modes for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(os.path.join(directory, "1_Pooling"), "config.json", pooling)
    modules = [(kind, path), ("Pooling", "1_Pooling")]
    for index, extra in enumerate(model.extras, start=2):
        write_layer(os.path.join(directory, f"{index}_{extra}"), extra, model, "safetensors" if hub else "bin")
        modules.append((extra, f"{index}_{extra}"))
    write_modules(directory, modules)
    if hub:
        write_json(directory, "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.0.0"}})
    else:
        write_json(directory, "config.json", {"__version__": "0.4.0"})
    return directory


def write_layer(folder: str, kind: str, model: Model, weights: str) -> None:
    """Write a layer behind the pooling; `Normalize` is an empty folder, as in the released zips."""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(3)
    if kind == "Dense":
        config = {
            "in_features": HIDDEN,
            "out_features": HIDDEN,
            "bias": True,
            "activation_function": TANH,
            **model.dense,
        }
        write_json(folder, "config.json", config)
        save_weights(folder, linear_state("linear", config["out_features"], HIDDEN, bias=config["bias"]), weights)
    if kind == "LayerNorm":
        write_json(folder, "config.json", {"dimension": model.dim})
        centre = {"norm.weight": 1.0, "norm.bias": 0.0}
        state = {n: (c + 0.3 * rng.standard_normal(model.dim)).astype(np.float32) for n, c in centre.items()}
        save_weights(folder, state, weights)


# Backbones


def write_backbone(folder: str, kind: str, vocabulary: int, *, old: bool, seed: int = 0) -> None:
    """Write config.json and weights. old: a config and a .bin as transformers 4.1 wrote them."""
    model = random_model(kind, vocabulary, seed)
    if not old:
        model.save_pretrained(folder)
        return
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OLD_KEYS}
    write_json(
        folder, "config.json", config | {"gradient_checkpointing": False, "architectures": [type(model).__name__]}
    )
    state: State = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    positions = np.arange(model.config.max_position_embeddings)[None]
    save_weights(folder, state | {"embeddings.position_ids": positions}, "bin")


def random_model(kind: str, vocabulary: int, seed: int = 0) -> Any:
    """Return transformers' model of this kind: 2 layers, 32 wide, all weights drawn with a spread of 0.3."""
    import torch
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": HIDDEN}
    if kind == "distilbert":
        sizes = {"n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dim": HIDDEN}
    if kind in ("roberta", "xlm-roberta", "mpnet"):
        sizes |= {"max_position_embeddings": 514, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if kind in ("roberta", "xlm-roberta"):
        sizes |= {"type_vocab_size": 1}
    if kind == "albert":
        sizes |= {"embedding_size": 16}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(vocab_size=vocabulary, **sizes)
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[kind]}Model")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(is_norm + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_modules(directory: str, modules: Sequence[tuple[str, str]]) -> None:
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(modules)
    ]
    write_json(directory, "modules.json", rows)
