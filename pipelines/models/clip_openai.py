"""OpenAI's CLIP as sentence-transformers 1.x saved it: a state dict in OpenAI's names, and the list of BPE merges.

    CLIPModel.pt                      fp16 state dict
    config.json                       {"model_name": "CLIPModel.pt", "tokenizer_name": "bpe_simple_vocab_16e6.txt.gz"}
    bpe_simple_vocab_16e6.txt.gz      a header line, then one merge a line (more than the model uses)

Everything is converted in memory to the names of transformers' CLIPModel. Sizes come from the tensors.
"""

from __future__ import annotations

import gzip
import os
import re
import zipfile
import zlib
from typing import Any

from pipelines.errors import CheckpointError
from pipelines.models.files import CLIP_VOCABULARY, check_counted, read_json, refuse

_HEAD_WIDTH = 64  # of every attention head in OpenAI's CLIP models
_STORED_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers kept beside the weights
_MERGE_LIMIT = 64 << 20  # bytes of the decompressed merges; the released file has 3 MB
START, END = "<|startoftext|>", "<|endoftext|>"

_NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_openai(folder: str) -> bool:
    """Tell whether the folder's config.json is the one of this layout: two file names, and no model_type."""
    config = read_json(folder, "config.json")
    return {"model_name", "tokenizer_name"} <= set(config) and "model_type" not in config


def read_state(folder: str, *, mmap: bool) -> dict[str, Any]:
    """Return the state dict in OpenAI's names.

    Raises CheckpointError when it is absent, damaged, a TorchScript archive, or of a CLIP whose image side is a ResNet.
    """
    from pipelines.models.weights import read_torch_file

    path = _named_file(folder, "model_name", "weights")
    if _is_torchscript(path):
        expected = "a state dict: only tensors in plain containers, as sentence-transformers saved it"
        hint = "convert it where you trust it: torch.save(torch.jit.load(path).state_dict(), 'CLIPModel.pt')"
        refuse("the weights are a TorchScript archive, which holds code", path, expected=expected, hint=hint)
    state = {name: tensor for name, tensor in read_torch_file(path, mmap=mmap).items() if name not in _STORED_SIZES}
    if any(name.startswith("visual.layer1.") for name in state):
        refuse("the image side of this CLIP is a ResNet", path, expected="a vision transformer, such as ViT-B/32")
    absent = sorted(name for name in (*_NAMES, *_PROJECTIONS) if name not in state)
    if absent:
        hint = "the file is incomplete, or another kind of model"
        refuse(f"the weights lack {', '.join(absent[:5])}", path, expected="OpenAI's CLIP", hint=hint)
    return state


def _named_file(folder: str, key: str, what: str) -> str:
    name = str(read_json(folder, "config.json", required=True).get(key, ""))
    path = os.path.join(folder, name)
    if not name or os.path.basename(name) != name:
        refuse(f"config.json names no {what} of its own folder: {name!r}", folder, expected=f"a file name as {key}")
    if not os.path.isfile(path):
        refuse(f"the {what} are missing: there is no {name}", folder, hint="copy the whole model directory")
    check_counted(folder, [name], expected=f"CLIPModel.pt as model_name, {CLIP_VOCABULARY} as tokenizer_name")
    return path


def _is_torchscript(path: str) -> bool:
    """Tell whether the file is a zip that holds code beside tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        return False  # torch's old format, or damaged: the reader tells
    return "constants.pkl" in names or any(name.startswith("code/") for name in names)


def convert(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors under the names of transformers' CLIPModel; an unknown name stays as it is."""
    converted: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in _PROJECTIONS:
            converted[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif match := _BLOCK.match(name):
            side, layer, inside = match.groups()
            prefix = f"{'vision' if side else 'text'}_model.encoder.layers.{layer}."
            converted.update(_block(prefix, inside, tensor, name))
        else:
            converted[_NAMES.get(name, name)] = tensor
    return converted


def _block(prefix: str, inside: str, tensor: Any, name: str) -> dict[str, Any]:
    """Rename one tensor of a transformer block; the joint projection becomes query, key and value, in that order."""
    if inside in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inside.rpartition("_")[2]
        pieces = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{letter}_proj.{kind}": piece.contiguous() for letter, piece in pieces}
    module, _, kind = inside.rpartition(".")
    return {f"{prefix}{_IN_BLOCK[module]}.{kind}" if module in _IN_BLOCK else name: tensor}


def config_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' CLIPConfig that the tensors of an OpenAI state dict imply."""
    vocabulary = len(state["token_embedding.weight"])
    text = {
        **_sizes(state, "", len(state["ln_final.weight"])),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    patch = int(state["visual.conv1.weight"].shape[-1])
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vision = {
        **_sizes(state, "visual.", len(state["visual.class_embedding"])),
        "patch_size": patch,
        "image_size": patch * grid,
    }
    dim = int(state["text_projection"].shape[1])
    return {"text_config": text, "vision_config": vision, "projection_dim": dim}


def _sizes(state: dict[str, Any], side: str, width: int) -> dict[str, Any]:
    blocks = {match.group(2) for name in state if (match := _BLOCK.match(name)) and (match.group(1) or "") == side}
    inside = state.get(f"{side}transformer.resblocks.0.mlp.c_fc.bias")
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width if inside is None else len(inside),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "hidden_act": "quick_gelu",
    }


def vocabulary(folder: str, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of all pieces and the merges, for a model with `size` token embeddings.

    OpenAI's order: the 256 bytes as printable characters, the same as the last of a word, one piece a merge, then the
    two special tokens. So the merges are the first `size` - 514 of the file, after its header. Raises CheckpointError.
    """
    path = _named_file(folder, "tokenizer_name", "BPE merges")
    characters = byte_characters()
    wanted = size - 2 * len(characters) - 2
    try:
        with gzip.open(path) as handle:
            lines = handle.read(_MERGE_LIMIT).decode().split("\n")[1:]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        what = f"the BPE merges cannot be read: {error}"
        raise CheckpointError(what, where=path, expected="gzip", hint="copy the file again") from error
    merges = [(pair[0], pair[1]) for line in lines[: max(0, wanted)] if len(pair := line.split()) == 2]
    if wanted < 0 or len(merges) != wanted:
        what = f"the file holds {len(merges)} of the {wanted} merges that the model's vocabulary of {size} needs"
        refuse(what, path, hint="take the merges and the weights from the same model")
    pieces = [*characters, *(f"{c}</w>" for c in characters), *(a + b for a, b in merges), START, END]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def byte_characters() -> list[str]:
    """Return the printable characters that stand for the 256 bytes, in the order of OpenAI's vocabularies.

    A byte that is a visible Latin-1 character stands for itself; the others get the characters from U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = sorted(set(range(256)) - set(visible))
    return [chr(byte) for byte in visible] + [chr(256 + index) for index in range(len(hidden))]
