"""Write DPR's own `.cp` files: the 2020 form with plain options, and the 2021 form with OmegaConf objects inside."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import (
    State,
    bert_config,
    bert_state,
    bert_vocabulary,
    linear_state,
    with_prefix,
    write_bert_tokeniser,
)

OPTIONS = {
    "pretrained_model_cfg": "bert-base-uncased",
    "encoder_model_type": "hf_bert",
    "pretrained_file": None,
    "projection_dim": 0,
    "sequence_length": 256,
}


def write_dpr_cp(
    directory: str,
    dim: int = 256,
    *,
    year: int = 2021,
    reader: bool = False,
    projection: int = 0,
    legacy: bool = False,
    heads: int | None = None,
    seeds: tuple[int, int] = (0, 5),
    **options: Any,
) -> str:
    """Write hf_bert_base.cp and vocab.txt. The towers have the weights of write_dpr with the same seeds.

    year: 2020 for plain encoder_params, 2021 for OmegaConf ones. seeds: of the context and question encoders; a reader
    takes the first. legacy: torch's format before the zip. heads: written to a config.json; without it BERT's rule
    holds (4 for 256 dimensions, as in write_dpr). options: of encoder_params.
    """
    vocabulary = write_bert_tokeniser(directory, fast=False)
    os.remove(os.path.join(directory, "tokenizer_config.json"))
    if heads:
        config = bert_config(vocabulary, dim, num_attention_heads=heads)
        Path(directory, "config.json").write_text(json.dumps(config))
    if reader:
        state = _tower("encoder.", vocabulary, dim, 0, seeds[0])
        state |= linear_state("qa_outputs", 2, dim) | linear_state("qa_classifier", 1, dim)
    else:
        state = _tower("question_model.", vocabulary, dim, projection, seeds[1])
        state |= _tower("ctx_model.", vocabulary, dim, projection, seeds[0])
    save_cp(os.path.join(directory, "hf_bert_base.cp"), state, year, legacy, OPTIONS | options)
    return directory


def _tower(prefix: str, vocabulary: int, dim: int, projection: int, seed: int) -> State:
    state = bert_state(vocabulary, dim, seed=seed) | {"embeddings.position_ids": np.arange(512)[None]}
    if projection:
        state |= linear_state("encode_proj", projection, dim)
    return with_prefix(prefix, state)


def save_cp(path: str, state: State, year: int, legacy: bool, options: dict[str, Any]) -> None:
    """Write what DPR's training saves: the model, Adam's moments, a schedule with numpy numbers, the options."""
    import torch

    model = OrderedDict((name, torch.from_numpy(array)) for name, array in state.items())
    moments = {140_000_000_000_000 + i: {"step": 3, "exp_avg": t * 0} for i, t in enumerate(model.values())}
    content = {
        "model_dict": model,
        "optimizer_dict": {"state": moments, "param_groups": [{"lr": 2e-5, "params": list(moments)}]},
        "scheduler_dict": {"last_epoch": 3, "base_lrs": [np.float64(2e-5)], "lr_lambdas": [None]},
        "offset": 0,
        "epoch": 39,
    }
    lower = options.pop("do_lower_case", True)
    with omegaconf() as make:
        params = {"do_lower_case": lower} | (options if year < 2021 else {"encoder": make(options)})
        torch.save(content | {"encoder_params": params}, path, _use_new_zipfile_serialization=not legacy)


@contextlib.contextmanager
def omegaconf() -> Iterator[Any]:
    """Give a maker of OmegaConf-like objects that pickle under OmegaConf's class names, with its shape of state."""
    places = {"omegaconf.base": "ContainerMetadata Metadata", "omegaconf.nodes": "AnyNode"}
    places |= {"omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig"}
    classes: dict[str, type] = {}
    for place, names in places.items():
        module = types.ModuleType(place)
        for name in names.split():
            classes[name] = type(name, (), {"__module__": place})
            setattr(module, name, classes[name])
        sys.modules[place] = module
    sys.modules["omegaconf"] = types.ModuleType("omegaconf")
    try:
        yield lambda options: _config(classes, options)
    finally:
        for place in ("omegaconf", *places):
            del sys.modules[place]


def _config(classes: dict[str, type], options: dict[str, Any]) -> Any:
    """Return the `encoder` node of a whole configuration: it holds its parent, which holds everything else."""

    def metadata(kind: str, key: Any, object_type: Any) -> Any:
        state = {"ref_type": Any, "object_type": object_type, "optional": True, "key": key, "flags": {}}
        return _instance(classes[kind], state | {"resolver_cache": defaultdict(dict)})

    def node(value: Any, key: Any, parent: Any) -> Any:
        if not isinstance(value, dict | list):
            return _instance(classes["AnyNode"], {"_metadata": metadata("Metadata", key, None), "_val": value})
        kind = "DictConfig" if isinstance(value, dict) else "ListConfig"
        made = _instance(classes[kind], {"_metadata": metadata("ContainerMetadata", key, type(value))})
        items = value.items() if isinstance(value, dict) else enumerate(value)
        content = {name: node(item, name, made) for name, item in items}
        made.__dict__ |= {"_parent": parent, "_content": content if isinstance(value, dict) else [*content.values()]}
        return made

    root = node({"encoder": options, "train": {"lr": 2e-5, "files": ["a", "b"]}, "output_dir": "???"}, None, None)
    return root.__dict__["_content"]["encoder"]


def _instance(kind: type, state: dict[str, Any]) -> Any:
    made = kind()
    made.__dict__.update(state)
    return made


def cased_vocabulary() -> list[str]:
    """Return a cased vocabulary of the same size as write_bert_tokeniser's uncased one."""
    uncased = bert_vocabulary()
    capitals = [piece for piece in bert_vocabulary(cased=True) if piece not in set(uncased)]
    return [*uncased[: -len(capitals)], *capitals]
