"""Read a sentence-transformers directory against a fixed table of modules; import nothing it names.

`modules.json` lists the modules in their order. What the checkpoint says of itself as a whole (similarity, prompts,
truncation) is in `config_sentence_transformers.json`, which releases before 2.0 did not write.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import CheckpointError
from pipelines.models.base import Similarity
from pipelines.models.files import read_json, refuse, tensor_shapes, weight_files

TRANSFORMERS = ("Transformer", "BERT", "RoBERTa", "DistilBERT", "XLMRoBERTa", "ALBERT", "CamemBERT", "XLNet")
WORDS = ("WordEmbeddings",)
_WEIGHTS = "WordWeights"
_EXTRAS = ("Dense", "LayerNorm", "Normalize", "Dropout")
# Old pooling keys in the order in which their vectors are concatenated, with today's names.
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SENTENCE = "sentence_embedding"
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


def first_module(directory: str) -> str | None:
    """Return the class name of the first module of a sentence-transformers directory.

    None where there is no modules.json, "" where it is damaged or empty. Never raises.
    """
    if not os.path.isfile(os.path.join(directory, "modules.json")):
        return None
    try:
        modules = read_json(directory, "modules.json", kind=list)
    except CheckpointError:
        return ""
    first = modules[0] if modules and isinstance(modules[0], dict) else {}
    return str(first.get("type", "")).rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Layout:
    """Where the first module is, how its tokens are pooled, and the (kind, folder) of each layer behind.

    word_weights: the folder of a WordWeights module. modes: pooling modes, concatenated in this order. width: of one
    of them. with_prompt: whether a prompt's tokens are pooled too.
    """

    first: str
    word_weights: str | None
    modes: tuple[str, ...]
    width: int
    with_prompt: bool
    extras: tuple[tuple[str, str], ...]


def read_layout(directory: str, first: Sequence[str] = TRANSFORMERS) -> Layout:
    """Parse modules.json and the configs of all modules but the first, which must be one of the kinds `first`.

    Raises CheckpointError for what is unknown, unsafe or missing.
    """
    modules = read_json(directory, "modules.json", required=True, kind=list)
    if not all(isinstance(module, dict) for module in modules):
        refuse("modules.json is no list of modules", directory)
    entries = [(_kind(directory, module), _folder(directory, module)) for module in modules]
    kinds = [kind for kind, _ in entries]
    weighted = first == WORDS and kinds[1:2] == [_WEIGHTS]
    head, extras = entries[: 2 + weighted], entries[2 + weighted :]
    if len(head) < 2 or kinds[0] not in first or head[-1][0] != "Pooling":
        what = "WordEmbeddings" if first == WORDS else "a Transformer"
        expected = f"{what}, then a Pooling, then other layers"
        refuse(f"modules.json lists {', '.join(kinds) or 'nothing'}", directory, expected=expected)
    for kind, folder in extras:
        _check_extra(kind, folder)
    pooling_folder = head[-1][1]
    pooling = read_json(pooling_folder, "config.json", required=True)
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    if not isinstance(width, int):
        refuse("the pooling's config.json names no embedding_dimension", pooling_folder)
    weights = head[1][1] if weighted else None
    with_prompt = pooling.get("include_prompt") is not False
    return Layout(head[0][1], weights, _modes(pooling_folder, pooling), width, with_prompt, tuple(extras))


def _kind(directory: str, module: dict[str, Any]) -> str:
    """Return the module's class name, from our table only."""
    dotted = str(module.get("type", ""))
    name = dotted.rsplit(".", 1)[-1]
    known = (*TRANSFORMERS, *WORDS, _WEIGHTS, "Pooling", *_EXTRAS)
    if dotted.startswith("sentence_transformers.") and name in known:
        return name
    expected = f"a sentence_transformers module: {', '.join(('Transformer', *WORDS, _WEIGHTS, 'Pooling', *_EXTRAS))}"
    return refuse(f"modules.json names an unknown module type {dotted!r}", directory, expected=expected)


def _folder(directory: str, module: dict[str, Any]) -> str:
    path = str(module.get("path", ""))
    if os.path.isabs(path) or ".." in path.split("/"):
        refuse(f"modules.json points outside the checkpoint: {path!r}", directory)
    return os.path.join(directory, path) if path else directory


def _check_extra(kind: str, folder: str) -> None:
    if kind not in _EXTRAS:
        refuse(f"a {kind} module cannot follow the pooling", folder, expected=", ".join(_EXTRAS))
    with_weights = kind in ("Dense", "LayerNorm")
    config = read_json(folder, "config.json", required=with_weights)
    names = [config.get("module_input_name"), config.get("module_output_name")]
    if config.get("use_residual") or any(name not in (None, _SENTENCE) for name in names):
        refuse(f"a {kind} layer with a residual or on token vectors is not supported", folder)
    sizes = {"Dense": ("in_features", "out_features"), "LayerNorm": ("dimension",)}.get(kind, ())
    if lost := [size for size in sizes if not isinstance(config.get(size), int)]:
        refuse(f"the {kind} layer's config.json lacks {', '.join(lost)}", folder)
    if with_weights:
        check_weights(folder)


def check_weights(folder: str) -> None:
    """Check cheaply, without torch, that a folder's weights are there and whole. Raises CheckpointError."""
    paths = weight_files(folder)
    if not paths:
        expected = "model.safetensors or pytorch_model.bin"
        hint = "copy the whole model directory; a git clone without LFS leaves the weights out"
        refuse("the weights are missing", folder, expected=expected, hint=hint)
    if lost := [os.path.basename(path) for path in paths if not os.path.isfile(path)]:
        refuse(f"weight shards are missing: {', '.join(lost)}", folder)
    if paths[0].endswith(".safetensors"):
        tensor_shapes(folder)
    for path in paths:
        with open(path, "rb") as handle:
            start = handle.read(11)
        if start == b"version htt":
            refuse("the weights are a git LFS pointer, not the file", path, hint="run git lfs pull, or download it")
        if start[:4] == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            refuse("the weights are cut off", path, hint="copy or download them again")


def _modes(folder: str, config: dict[str, Any]) -> tuple[str, ...]:
    declared = config.get("pooling_mode")
    modes = [declared] if isinstance(declared, str) else list(declared or [])
    if not modes:
        modes = [mode for key, mode in _OLD_POOLING.items() if config.get(key)] or ["mean"]
    unknown = [str(mode) for mode in modes if mode not in _OLD_POOLING.values()]
    if unknown:
        refuse(f"unknown pooling mode {', '.join(unknown)}", folder, expected=", ".join(_OLD_POOLING.values()))
    return tuple(modes)


# What the checkpoint says of itself as a whole


def read_settings(directory: str) -> dict[str, Any]:
    """Return config_sentence_transformers.json. Raises CheckpointError unless it is a bi-encoder's, or absent."""
    settings: dict[str, Any] = read_json(directory, "config_sentence_transformers.json")
    kind = settings.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        refuse(f"this is a {kind}", directory, expected="a SentenceTransformer: one dense vector a text")
    truncate = settings.get("truncate_dim")
    if truncate is not None and (not isinstance(truncate, int) or truncate < 1):
        refuse(f"truncate_dim is {truncate!r}", directory, expected="a number of dimensions, or null")
    return settings


def final_dim(layout: Layout, settings: dict[str, Any]) -> int:
    """Follow the width through the layers, which must fit each other, down to the truncated vector."""
    width = layout.width * len(layout.modes)
    for kind, folder in layout.extras:
        config = read_json(folder, "config.json")
        wanted = {"Dense": config.get("in_features"), "LayerNorm": config.get("dimension")}.get(kind, width)
        if wanted != width:
            refuse(f"the {kind} layer takes vectors of width {wanted}", folder, expected=f"width {width}")
        width = config["out_features"] if kind == "Dense" else width
    return min(width, settings.get("truncate_dim") or width)


def declared_similarity(directory: str, settings: dict[str, Any]) -> Similarity:
    """Return the similarity; a checkpoint saved before sentence-transformers 3.0 names none and counts as cosine."""
    name = settings.get("similarity_fn_name") or "cosine"
    if name == "dot":
        return "dot"
    if name != "cosine":
        refuse(f"the similarity {name!r} is not supported", directory, expected="cosine or dot")
    return "cosine"


def declared_prompts(directory: str, settings: dict[str, Any], layout: Layout) -> dict[str, str]:
    """Return the non-empty prefixes by side: the side's own prompt, else the default prompt."""
    named = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if not isinstance(named, dict) or not all(isinstance(prompt, str) for prompt in named.values()):
        refuse("the prompts are no table of texts", directory, expected='{"query": "...", "document": "..."}')
    if default is not None and default not in named:
        refuse(f"the default prompt {default!r} is not among the prompts", directory, expected=", ".join(named))
    passage = next((name for name in _PASSAGE_PROMPTS if named.get(name) is not None), default)
    query = "query" if named.get("query") is not None else default
    chosen = {"passage": named.get(passage) or "", "query": named.get(query) or ""}
    prompts = {side: prompt for side, prompt in chosen.items() if prompt}
    if prompts and not layout.with_prompt:
        refuse("a pooling that leaves the prompt out is not supported (include_prompt: false)", directory)
    return prompts
