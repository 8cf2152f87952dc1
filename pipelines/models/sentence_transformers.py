"""sentence-transformers bi-encoders: Transformer, Pooling, then Dense, LayerNorm and Normalize as the directory says.

Reads the hub layout (the transformer at the root) and the layout of the v0.2 zips (`0_Transformer/`). Module types
are looked up by name in a fixed table; nothing named in a checkpoint is ever imported. Texts are stripped, as the
models were trained; a passage is "title. text", or the pair (title, text) for the few models trained on pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import ConfigError
from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Side, Similarity, Tokens
from pipelines.models.files import read_json, refuse
from pipelines.models.modules_json import Layout, read_layout

Formatting = Literal["sentence", "pair"]

_ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_SETTINGS = ["sentence_bert_config.json"] + [
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start at pad_token_id + 1
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


def recognises(directory: str) -> bool:
    return os.path.isfile(os.path.join(directory, "modules.json"))


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting = "sentence") -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for unsupported modules, prompts or similarity, or lost files.

    similarity: overrides the checkpoint's; one saved before sentence-transformers 3 names none and counts as cosine.
    """
    layout = read_layout(directory)
    config = _transformer_config(layout)
    settings = read_json(directory, "config_sentence_transformers.json")
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        refuse(f"this is a {kind}", directory, expected="a SentenceTransformer: one dense vector a text")
    length, _ = _lengths(layout, config)
    title = "the pair (title, text)" if formatting == "pair" else '"title. text"'
    return EncoderInfo(
        family="sentence_transformers",
        dim=_dim(layout, settings),
        similarity=similarity or _similarity(directory, settings),
        max_length=length,
        formatting=f"{title}; the text alone when there is no title",
        prompts=_prompts(directory, settings, layout),
        details={
            "backbone": config.get("model_type"),
            "pooling": ", ".join(layout.modes),
            "layers": [kind for kind, _ in layout.extras],
            "lower_case": _lower_case(layout),
        },
    )


def _transformer_config(layout: Layout) -> dict[str, Any]:
    config: dict[str, Any] = read_json(layout.transformer, "config.json", required=True)
    kind = config.get("model_type")
    task = _settings(layout).get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        refuse(f"a transformer for {task} is not supported", layout.transformer, expected="feature-extraction")
    if kind in _ENCODER_DECODERS or kind == "clip":
        expected = "an encoder such as BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ALBERT"
        refuse(f"a {kind} backbone is not supported", layout.transformer, expected=expected)
    return config


def _dim(layout: Layout, settings: dict[str, Any]) -> int:
    """Follow the width through the layers, which must fit each other."""
    width = layout.width * len(layout.modes)
    for kind, folder in layout.extras:
        config = read_json(folder, "config.json")
        wanted = {"Dense": config.get("in_features"), "LayerNorm": config.get("dimension")}.get(kind, width)
        if wanted != width:
            refuse(f"the {kind} layer takes vectors of width {wanted}", folder, expected=f"width {width}")
        width = int(config["out_features"]) if kind == "Dense" else width
    return min(width, settings.get("truncate_dim") or width)


def _similarity(directory: str, settings: dict[str, Any]) -> Similarity:
    name = settings.get("similarity_fn_name") or "cosine"
    if name == "dot":
        return "dot"
    if name != "cosine":
        refuse(f"the similarity {name!r} is not supported", directory, expected="cosine or dot")
    return "cosine"


def _prompts(directory: str, settings: dict[str, Any], layout: Layout) -> dict[str, str]:
    """Return the non-empty prefixes by side: the side's own prompt, else the default prompt."""
    named = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if default is not None and default not in named:
        refuse(f"the default prompt {default!r} is not among the prompts", directory, expected=", ".join(named))
    passage = next((name for name in _PASSAGE_PROMPTS if named.get(name) is not None), default)
    query = "query" if named.get("query") is not None else default
    chosen = {"passage": named.get(passage) or "", "query": named.get(query) or ""}
    prompts = {side: prompt for side, prompt in chosen.items() if prompt}
    if prompts and not layout.with_prompt:
        refuse("a pooling that leaves the prompt out is not supported (include_prompt: false)", layout.transformer)
    return prompts


def _settings(layout: Layout) -> dict[str, Any]:
    found = (read_json(layout.transformer, name) for name in _SETTINGS)
    return next((settings for settings in found if settings), {})


def _lengths(layout: Layout, config: dict[str, Any]) -> tuple[int, int | None]:
    """Return (default max length, the most the position embeddings allow or None when they are relative)."""
    limit = position_limit(config)
    own = _settings(layout).get("max_seq_length")
    declared = own or read_json(layout.transformer, "tokenizer_config.json").get("model_max_length") or 512
    return min(int(declared), limit) if limit else int(declared), limit


def position_limit(config: dict[str, Any]) -> int | None:
    """Return the longest input a transformer's config.json allows; None when its positions are relative."""
    limit = config.get("max_position_embeddings", 512)
    if limit is not None and config.get("model_type") in _POSITIONS_AFTER_PADDING:
        return int(limit) - int(config.get("pad_token_id", 1)) - 1
    return limit


def _lower_case(layout: Layout) -> bool | None:
    """Tell whether text is lower-cased, for `inspect`; None when the tokeniser alone decides in its own way."""
    if _settings(layout).get("do_lower_case"):
        return True
    declared = read_json(layout.transformer, "tokenizer_config.json").get("do_lower_case")
    return declared if isinstance(declared, bool) else None


@dataclass
class SentenceTokeniser:
    """Strip, join the title, put the side's prompt in front, lower-case where the checkpoint asks for it."""

    encoder: tokens.TextEncoder
    prompts: dict[str, str]
    lower_case: bool
    formatting: Formatting

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        pairs = zip(titles, texts, strict=True)
        return self.encoder.encode([self._passage(title.strip(), text.strip()) for title, text in pairs])

    def queries(self, texts: Sequence[str]) -> Tokens:
        prompt = self.prompts.get("query", "")
        return self.encoder.encode([self._cased(prompt + text.strip()) for text in texts])

    def _passage(self, title: str, text: str) -> tokens.Text:
        prompt = self.prompts.get("passage", "")
        if title and self.formatting == "pair":
            return self._cased(prompt + title), self._cased(text)
        return self._cased(prompt + join_title(title, text))

    def _cased(self, text: str) -> str:
        return text.lower() if self.lower_case else text


def join_title(title: str, text: str) -> str:
    """Return "title. text", or the text alone when the title is empty."""
    return f"{title}. {text}" if title else text


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting = "sentence"
) -> SentenceTokeniser:
    """Load the tokeniser. formatting "pair" suits models trained on (title, text) pairs, such as nq-distilbert."""
    if formatting not in ("sentence", "pair"):
        raise ConfigError(f"unknown formatting {formatting!r}", expected="sentence or pair")
    layout = read_layout(directory)
    config = _transformer_config(layout)
    backend = tokens.load_backend(layout.transformer)
    length = tokens.checked_length(max_length, *_lengths(layout, config))
    segments = config.get("type_vocab_size", 2 if config.get("model_type") == "bert" else 0)
    with_types = formatting == "pair" and segments > 1
    encoder = tokens.TextEncoder(backend, tokens.pad_id(layout.transformer, backend), length, with_types)
    prompts = _prompts(directory, read_json(directory, "config_sentence_transformers.json"), layout)
    return SentenceTokeniser(encoder, prompts, bool(_settings(layout).get("do_lower_case")), formatting)


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the encoder; both sides share it. Under cosine similarity its vectors are L2-normalised.

    Raises CheckpointError when the weights are incomplete, damaged or do not fit the configs.
    """
    from transformers import MODEL_MAPPING

    from pipelines.models.tower import EncoderTower, Truncate
    from pipelines.models.weights import build_model, read_config, read_weights

    described = info(directory, similarity=similarity)
    layout = read_layout(directory)
    config = read_config(layout.transformer)
    if type(config) not in MODEL_MAPPING:
        refuse(f"a {config.model_type} backbone is not supported", layout.transformer)
    state = read_weights(layout.transformer)
    backbone = build_model(MODEL_MAPPING[type(config)], config, state, dtype, layout.transformer)
    width = getattr(config, "hidden_size", layout.width)
    if width != layout.width:
        refuse(f"the pooling is {layout.width} wide, the transformer {width}", directory)
    layers = [_layer(kind, folder) for kind, folder in layout.extras if kind != "Dropout"]
    if read_json(directory, "config_sentence_transformers.json").get("truncate_dim"):
        layers.append(Truncate(described.dim))
    normalise = described.similarity == "cosine"
    return EncoderTower(backbone, described.dim, layout.modes, layers, normalise=normalise).eval().to(device)


def _layer(kind: str, folder: str) -> Any:
    from torch import nn

    from pipelines.models.tower import Normalise
    from pipelines.models.weights import check_names, load_linear, read_weights

    if kind == "Normalize":
        return Normalise()
    config, state = read_json(folder, "config.json"), read_weights(folder)
    wanted = {"norm.weight", "norm.bias"} if kind == "LayerNorm" else {"linear.weight"}
    if kind == "Dense" and config.get("bias", True):
        wanted.add("linear.bias")
    check_names(sorted(wanted - set(state)), sorted(set(state) - wanted), folder, f"a {kind} layer")
    if kind == "LayerNorm":
        norm = nn.LayerNorm(config["dimension"])
        norm.load_state_dict({"weight": state["norm.weight"], "bias": state["norm.bias"]})
        return norm
    linear = load_linear(state["linear.weight"], state.get("linear.bias"))
    if (linear.in_features, linear.out_features) != (config["in_features"], config["out_features"]):
        refuse("the Dense weights do not have the shape config.json gives", folder)
    return nn.Sequential(linear, getattr(nn, _activation(folder, config))())


def _activation(folder: str, config: dict[str, Any]) -> str:
    dotted = config.get("activation_function") or "torch.nn.modules.linear.Identity"
    name = str(dotted).rsplit(".", 1)[-1]
    if not str(dotted).startswith("torch.nn.") or name not in _ACTIVATIONS:
        refuse(f"unknown activation {dotted!r}", folder, expected=", ".join(_ACTIVATIONS))
    return name
