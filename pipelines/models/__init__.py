"""Model families: which one a checkpoint directory is, and what it holds.

The decision rests on what is in the directory (config.json, modules.json, tensor names), never on its name. Importing
this package is cheap; torch and transformers are imported when weights or a tokeniser are loaded.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn, cast

from pipelines.models.base import EncoderFamily, EncoderInfo
from pipelines.models.files import checkpoint_digest, read_json, refuse

__all__ = ["checkpoint_digest", "describe", "find_family"]

_FAMILIES = ("sentence_transformers", "dpr", "paq")
_SUPPORTED = (
    "a sentence-transformers directory (modules.json), a Hugging Face DPR context or question encoder (config.json "
    "with model_type dpr) or a PAQ retriever (config.json with model_type albert, encode_proj in the weights)"
)


def find_family(directory: str) -> EncoderFamily:
    """Return the family module that reads this bi-encoder directory.

    Raises CheckpointError when the directory is absent, of no supported kind, or lacks weights or a tokeniser; the
    message names the nearest supported layout.
    """
    if not os.path.isdir(directory):
        refuse("the checkpoint directory does not exist", directory, hint="pipelines.models.fetch downloads one")
    for name in _FAMILIES:
        family = cast(EncoderFamily, importlib.import_module(f"pipelines.models.{name}"))
        if family.recognises(directory):
            family.info(directory)  # refuses what is incomplete
            return family
    return _refuse_unknown(directory)


def describe(directory: str) -> EncoderInfo:
    """Return what the checkpoint is, from its configs and tensor names. Raises CheckpointError as find_family does."""
    return find_family(directory).info(directory)


def _refuse_unknown(directory: str) -> NoReturn:
    """Raise with the reason and the nearest layout that is supported."""
    if not os.listdir(directory):
        refuse("the checkpoint directory is empty", directory, expected=_SUPPORTED)
    config: dict[str, Any] = read_json(directory, "config.json")
    if not config:
        cp_files = [name for name in os.listdir(directory) if name.endswith(".cp")]
        hint = "convert the .cp file to the Hugging Face DPR layout first" if cp_files else ""
        refuse("the directory has neither config.json nor modules.json", directory, expected=_SUPPORTED, hint=hint)
    kind = str(config.get("model_type", "unknown"))
    architectures = [str(name) for name in config.get("architectures") or []]
    what = f"a {kind} model ({', '.join(architectures) or 'no architecture named'}) is no supported bi-encoder"
    refuse(what, directory, expected=_SUPPORTED, hint=_nearest(kind, architectures))


def _nearest(kind: str, architectures: list[str]) -> str:
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "this is a cross-encoder: use it to rerank, not to embed"
    if kind in ("t5", "mt5", "bart"):
        return "this is a text generator; encoders of questions and passages are DPR, PAQ or sentence-transformers"
    if kind == "clip":
        return "CLIP is not supported yet; clip-ViT-B-32-multilingual-v1 is, for text"
    return (
        "the nearest layout is sentence-transformers: beside this transformer it needs modules.json and "
        "1_Pooling/config.json, because the pooling is part of the encoder"
    )
