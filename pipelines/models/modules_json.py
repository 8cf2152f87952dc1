"""Read a sentence-transformers `modules.json` against a fixed table of modules; import nothing it names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pipelines.models.files import read_json, refuse, require_files

_TRANSFORMERS = ("Transformer", "BERT", "RoBERTa", "DistilBERT", "XLMRoBERTa", "ALBERT", "CamemBERT", "XLNet")
_EXTRAS = ("Dense", "LayerNorm", "Normalize", "Dropout")
_LATER = {"WordEmbeddings": "average word embeddings", "WordWeights": "average word embeddings", "CLIPModel": "CLIP"}
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


def first_module(directory: str) -> str | None:
    """Return the class name of the first module of a sentence-transformers directory; None where there is none."""
    if not os.path.isfile(os.path.join(directory, "modules.json")):
        return None
    modules = read_json(directory, "modules.json", kind=list)
    first = modules[0] if modules and isinstance(modules[0], dict) else {}
    return str(first.get("type", "")).rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Layout:
    """Where the transformer is, how its tokens are pooled, and the (kind, folder) of each layer behind.

    modes: pooling modes, concatenated in this order. width: of one of them. with_prompt: whether a prompt's tokens are
    pooled too.
    """

    transformer: str
    modes: tuple[str, ...]
    width: int
    with_prompt: bool
    extras: tuple[tuple[str, str], ...]


def read_layout(directory: str) -> Layout:
    """Parse modules.json and the pooling's config. Raises CheckpointError for what is unknown, unsafe or missing."""
    modules = read_json(directory, "modules.json", required=True, kind=list)
    if not all(isinstance(module, dict) for module in modules):
        refuse("modules.json is no list of modules", directory)
    entries = [(_kind(directory, module), _folder(directory, module)) for module in modules]
    if len(entries) < 2 or entries[0][0] not in _TRANSFORMERS or entries[1][0] != "Pooling":
        found = ", ".join(kind for kind, _ in entries) or "nothing"
        refuse(f"modules.json lists {found}", directory, expected="a Transformer, then a Pooling, then other layers")
    (_, transformer), (_, pooling_folder), *extras = entries
    for kind, folder in extras:
        _check_extra(kind, folder)
    require_files(transformer)
    pooling = read_json(pooling_folder, "config.json", required=True)
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    if not isinstance(width, int):
        refuse("the pooling's config.json names no embedding_dimension", pooling_folder)
    with_prompt = pooling.get("include_prompt") is not False
    return Layout(transformer, _modes(pooling_folder, pooling), width, with_prompt, tuple(extras))


def _kind(directory: str, module: dict[str, Any]) -> str:
    """Return the module's class name, from our table only."""
    dotted = str(module.get("type", ""))
    name = dotted.rsplit(".", 1)[-1]
    if dotted.startswith("sentence_transformers."):
        if name in (*_TRANSFORMERS, "Pooling", *_EXTRAS):
            return name
        if name in _LATER:
            hint = "choose a model of the form Transformer + Pooling"
            refuse(f"{_LATER[name]} models are not supported yet ({name})", directory, hint=hint)
    expected = f"a sentence_transformers module: {', '.join(('Transformer', 'Pooling', *_EXTRAS))}"
    return refuse(f"modules.json names an unknown module type {dotted!r}", directory, expected=expected)


def _folder(directory: str, module: dict[str, Any]) -> str:
    path = str(module.get("path", ""))
    if os.path.isabs(path) or ".." in path.split("/"):
        refuse(f"modules.json points outside the checkpoint: {path!r}", directory)
    return os.path.join(directory, path) if path else directory


def _check_extra(kind: str, folder: str) -> None:
    if kind not in _EXTRAS:
        refuse(f"a {kind} module cannot follow the pooling", folder, expected=", ".join(_EXTRAS))
    config = read_json(folder, "config.json", required=kind in ("Dense", "LayerNorm"))
    names = [config.get("module_input_name"), config.get("module_output_name")]
    if config.get("use_residual") or any(name not in (None, _SENTENCE) for name in names):
        refuse(f"a {kind} layer with a residual or on token vectors is not supported", folder)


def _modes(folder: str, config: dict[str, Any]) -> tuple[str, ...]:
    declared = config.get("pooling_mode")
    modes = [declared] if isinstance(declared, str) else list(declared or [])
    if not modes:
        modes = [mode for key, mode in _OLD_POOLING.items() if config.get(key)] or ["mean"]
    unknown = [str(mode) for mode in modes if mode not in _OLD_POOLING.values()]
    if unknown:
        refuse(f"unknown pooling mode {', '.join(unknown)}", folder, expected=", ".join(_OLD_POOLING.values()))
    return tuple(modes)
