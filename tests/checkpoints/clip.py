"""Write tiny CLIP checkpoints: the same weights and vocabulary in OpenAI's layout and in Hugging Face's."""

from __future__ import annotations

import gzip
import json
import os
from typing import Any

import numpy as np

from tests.checkpoints import WORDS, State, save_weights

DIM, IMAGE_SIZE, PATCH, MAX_TOKENS = 48, 32, 8, 77
TEXT_WIDTH, VISION_WIDTH, LAYERS = 64, 128, 2  # OpenAI's heads are 64 wide: one head and two
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def byte_pieces() -> list[str]:
    """Return what stands for each of the 256 bytes, in the order of CLIP's vocabularies."""
    printable = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Return the merges that make every word of WORDS one piece, letter by letter from the left."""
    found: dict[tuple[str, str], None] = {}
    for word in (*WORDS, "red", "green", "blue", "photo"):
        left = word[0]
        for letter in word[1:-1]:
            found[left, letter] = None
            left += letter
        if len(word) > 1:
            found[left, word[-1] + "</w>"] = None
    return list(found)


def pieces() -> list[str]:
    """Return the vocabulary in order of the ids."""
    single = byte_pieces()
    joined = [a + b for a, b in merges()]
    return [*single, *(f"{c}</w>" for c in single), *joined, "<|startoftext|>", "<|endoftext|>"]


def clip_state(seed: int = 0) -> State:
    """Return a state dict under the names of transformers' CLIPModel, norms and biases far from their defaults."""
    rng = np.random.default_rng(seed)
    state: State = {}

    def draw(name: str, *shape: int, centre: float = 0.0, spread: float = 0.1) -> None:
        state[name] = (centre + spread * rng.standard_normal(shape)).astype(np.float32)

    def norm(name: str, width: int) -> None:
        draw(f"{name}.weight", width, centre=1.0, spread=0.3)
        draw(f"{name}.bias", width, spread=0.3)

    for side, width in (("text", TEXT_WIDTH), ("vision", VISION_WIDTH)):
        for layer in (f"{side}_model.encoder.layers.{i}" for i in range(LAYERS)):
            for part in ("q", "k", "v"):
                draw(f"{layer}.self_attn.{part}_proj.weight", width, width, spread=0.2)
                draw(f"{layer}.self_attn.{part}_proj.bias", width)
            for part, out, inside in (("self_attn.out_proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
                draw(f"{layer}.{part}.weight", out * width, inside * width)
                draw(f"{layer}.{part}.bias", out * width)
            norm(f"{layer}.layer_norm1", width)
            norm(f"{layer}.layer_norm2", width)
    draw("text_model.embeddings.token_embedding.weight", len(pieces()), TEXT_WIDTH, spread=0.5)
    draw("text_model.embeddings.position_embedding.weight", MAX_TOKENS, TEXT_WIDTH)
    norm("text_model.final_layer_norm", TEXT_WIDTH)
    draw("vision_model.embeddings.class_embedding", VISION_WIDTH, spread=0.5)
    draw("vision_model.embeddings.patch_embedding.weight", VISION_WIDTH, 3, PATCH, PATCH)
    draw("vision_model.embeddings.position_embedding.weight", (IMAGE_SIZE // PATCH) ** 2 + 1, VISION_WIDTH)
    norm("vision_model.pre_layrnorm", VISION_WIDTH)
    norm("vision_model.post_layernorm", VISION_WIDTH)
    draw("text_projection.weight", DIM, TEXT_WIDTH)
    draw("visual_projection.weight", DIM, VISION_WIDTH)
    state["logit_scale"] = np.array(4.6, np.float32)
    return state


def openai_state(state: State) -> State:
    """Return the same weights under OpenAI's names: q, k, v in one tensor, projections transposed."""
    result: State = {
        "visual.proj": state["visual_projection.weight"].T.copy(),
        "text_projection": state["text_projection.weight"].T.copy(),
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}  # fmt: skip
    inside = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        result |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in norms.items()}
        for ours, theirs in (("", "text_model"), ("visual.", "vision_model")):
            for i in range(LAYERS):
                block, layer = f"{ours}transformer.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                joint = [state[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                result[f"{block}.attn.in_proj_{kind}"] = np.concatenate(joint)
                result |= {f"{block}.{a}.{kind}": state[f"{layer}.{b}.{kind}"] for a, b in inside.items()}
    return result


def write_openai_clip(directory: str, *, seed: int = 0, dtype: str = "float16", state: State | None = None) -> str:
    """Write the v0.2 zip layout: modules.json and 0_CLIPModel with OpenAI's files."""
    import torch

    folder = os.path.join(directory, "0_CLIPModel")
    os.makedirs(folder, exist_ok=True)
    arrays = openai_state(clip_state(seed)) if state is None else state
    tensors = {name: torch.from_numpy(np.asarray(array).astype(dtype)) for name, array in arrays.items()}
    torch.save(tensors, os.path.join(folder, "CLIPModel.pt"))
    names = {"model_name": "CLIPModel.pt", "tokenizer_name": "bpe_simple_vocab_16e6.txt.gz"}
    _write_json(folder, "config.json", names)
    # The released file goes on after the merges that the model uses.
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in merges()), "z z</w>", "q q", ""]
    with gzip.open(os.path.join(folder, names["tokenizer_name"]), "wb") as handle:
        handle.write("\n".join(lines).encode())
    _write_modules(directory)
    _write_json(directory, "config.json", {"__version__": "1.0.0"})
    return directory


def write_hub_clip(
    directory: str, *, seed: int = 0, weights: str = "bin", dtype: str = "float32", modules: bool = True,
    state: State | None = None, eos_token_id: int = 2,
) -> str:  # fmt: skip
    """Write Hugging Face's layout of 2021: 0_CLIPModel under modules.json, or the plain directory without it.

    eos_token_id: 2, as the configs of that time say whatever the vocabulary has.
    """
    folder = os.path.join(directory, "0_CLIPModel") if modules else directory
    os.makedirs(folder, exist_ok=True)
    arrays = clip_state(seed) if state is None else dict(state)
    arrays["text_model.embeddings.position_ids"] = np.arange(MAX_TOKENS)[None]
    arrays["vision_model.embeddings.position_ids"] = np.arange((IMAGE_SIZE // PATCH) ** 2 + 1)[None]
    save_weights(folder, arrays, weights, dtype)
    _write_json(folder, "config.json", _config(eos_token_id))
    _write_json(folder, "preprocessor_config.json", preprocessor())
    _write_json(folder, "vocab.json", {piece: index for index, piece in enumerate(pieces())})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges()), ""]
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as handle:
        handle.write("\n".join(lines))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    limits = {"model_max_length": MAX_TOKENS, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder, "tokenizer_config.json", special | limits | {"pad_token": "<|endoftext|>"})
    if modules:
        _write_modules(directory)
        _write_json(directory, "config_sentence_transformers.json", {"__version__": {"pytorch": "1.10.0"}})
    return directory


def preprocessor() -> dict[str, Any]:
    """Return a preprocessor_config.json as transformers 4.1x wrote it: sizes are numbers."""
    steps = dict.fromkeys(("do_center_crop", "do_normalize", "do_resize"), True)
    sizes = {"crop_size": IMAGE_SIZE, "size": IMAGE_SIZE, "resample": 3}
    return {**steps, **sizes, "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD}


def _config(eos_token_id: int) -> dict[str, Any]:
    shared = {"hidden_act": "quick_gelu", "num_hidden_layers": LAYERS, "attention_dropout": 0.0, "dropout": 0.0}
    text = {"model_type": "clip_text_model", "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH}
    text |= {"num_attention_heads": 1, "vocab_size": len(pieces()), "max_position_embeddings": MAX_TOKENS}
    text |= {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 1}
    vision = {"model_type": "clip_vision_model", "hidden_size": VISION_WIDTH, "intermediate_size": 4 * VISION_WIDTH}
    vision |= {"num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    towers = {"text_config": text | shared, "vision_config": vision | shared}
    nothing = {"text_config_dict": None, "vision_config_dict": None, "transformers_version": None}
    base = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": DIM}
    return base | towers | nothing | {"logit_scale_init_value": 2.6592, "torch_dtype": "float32"}


def _write_modules(directory: str) -> None:
    kind = "sentence_transformers.models.CLIPModel"
    with open(os.path.join(directory, "modules.json"), "w", encoding="utf-8") as handle:
        json.dump([{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": kind}], handle)


def _write_json(folder: str, name: str, content: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=2)
