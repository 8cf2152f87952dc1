"""CLIP: texts and images as vectors of one space, so that a text finds the images it describes.

Reads three layouts: OpenAI's state dict as sentence-transformers 1.x saved it (`0_CLIPModel/CLIPModel.pt`, see
clip_openai), a Hugging Face CLIPModel inside a sentence-transformers directory, and one by itself. Texts are
lower-cased, cut to 77 tokens with the end token kept, and read at that token; vectors are not normalised on disk, and
compared by cosine. Source: Radford et al. 2021 and the released checkpoints' configs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError
from pipelines.models import clip_openai, tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens, refuse_options
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes
from pipelines.models.modules_json import first_module

_MODULE = "CLIPModel"
_AFTER = ("Normalize",)  # modules that may follow: under cosine they change nothing
_PROJECTIONS = ("text_projection.weight", "visual_projection.weight")
_POSITIONS = "text_model.embeddings.position_embedding.weight"
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_END_LEGACY = 2  # eos_token_id of configs before transformers 4.31, which then took the highest id for the end


class ImageTower(Protocol):
    """The image side of an encoder family that has `load_image_tower` and `accepts_images`.

    num_tokens: how many tokens of the budget one image takes.
    """

    dim: int
    num_tokens: int

    def encode_images(self, images: Sequence[bytes], batch_images: int = 32) -> npt.NDArray[np.float32]:
        """Return emb_ND (N, D) fp32 of N image files' bytes, in their order, `batch_images` at a time."""
        ...


def recognises(checkpoint: str) -> bool:
    if not os.path.isdir(checkpoint):
        return False
    try:
        first = first_module(checkpoint)
        return first == _MODULE if first is not None else _is_clip(checkpoint)
    except (CheckpointError, AttributeError):
        return False


def _is_clip(folder: str) -> bool:
    """Tell whether a folder itself holds a CLIP with both towers, in either form."""
    if clip_openai.is_openai(folder):
        return True
    config = read_json(folder, "config.json")
    names = [str(name) for name in config.get("architectures") or [_MODULE]]
    has_both = all(f"{side}_config" in config or f"{side}_config_dict" in config for side in ("text", "vision"))
    return config.get("model_type") == "clip" and has_both and _MODULE in names


def accepts_images(directory: str) -> bool:
    """Tell whether the checkpoint embeds images: every CLIP does."""
    return recognises(directory)


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for an incomplete or mixed-up one, ConfigError for `formatting`."""
    refuse_options("CLIP", similarity or "cosine", similarity, formatting)
    folder = _folder(directory)
    if clip_openai.is_openai(folder):
        layout, shapes = "OpenAI", _openai_shapes(folder)
    else:
        layout, shapes = "Hugging Face", _hub_shapes(folder)
    text, vision = (shapes[name] for name in _PROJECTIONS)
    if text[0] != vision[0]:
        refuse(f"texts get {text[0]} values and images {vision[0]}", folder, expected="one width for both")
    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    return EncoderInfo(
        family="clip",
        dim=text[0],
        similarity=similarity or "cosine",
        max_length=shapes[_POSITIONS][0],
        formatting='"title. text"; the text alone when there is no title',
        details={"layout": layout, "images": True, "image_size": _image_size(shapes), "patch_size": patch},
    )


def _folder(directory: str) -> str:
    """Return the folder of config and weights. Raises CheckpointError for modules behind CLIP that change vectors."""
    if first_module(directory) is None:
        return directory
    modules = read_json(directory, "modules.json", kind=list)
    if not all(isinstance(module, dict) for module in modules):
        refuse("modules.json is no list of modules", directory)
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds[0] != _MODULE or any(kind not in _AFTER for kind in kinds[1:]):
        refuse(f"modules.json lists {', '.join(kinds)}", directory, expected="CLIPModel, alone")
    path = str(modules[0].get("path", ""))
    if os.path.isabs(path) or ".." in path.split("/"):
        refuse(f"modules.json points outside the checkpoint: {path!r}", directory)
    folder = os.path.join(directory, path) if path else directory
    if not _is_clip(folder):
        expected = "a CLIPModel: OpenAI's CLIPModel.pt, or Hugging Face's config.json with model_type clip"
        refuse("the folder of the CLIP module holds none", folder, expected=expected)
    return folder


def _openai_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes under transformers' names; checks the merges too."""
    state = clip_openai.read_state(folder, mmap=True)
    clip_openai.vocabulary(folder, len(state["token_embedding.weight"]))
    return {name: tuple(tensor.shape) for name, tensor in clip_openai.convert(state).items()}


def _hub_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    require_files(folder)
    shapes = tensor_shapes(folder)
    needed = (*_PROJECTIONS, _POSITIONS, "vision_model.embeddings.patch_embedding.weight",
              "vision_model.embeddings.position_embedding.weight")  # fmt: skip
    absent = [name for name in needed if name not in shapes]
    if absent:
        hint = "the checkpoint is incomplete, or one half of CLIP: both the text and the image side are needed"
        refuse(f"the weights lack {', '.join(absent)}", folder, expected="the tensors of CLIPModel", hint=hint)
    return shapes


def _image_size(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the edge of the square pictures, in pixels: the patches are a square too."""
    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    num_positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return int(patch * round((num_positions - 1) ** 0.5))


@dataclass
class ClipTokeniser:
    """Passages as "title. text", queries alone; the backend lower-cases and adds both special tokens."""

    encoder: tokens.TextEncoder

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        pairs = ((title.strip(), text.strip()) for title, text in zip(titles, texts, strict=True))
        return self.encoder.encode([tokens.join_title(title, text) for title, text in pairs])

    def queries(self, texts: Sequence[str]) -> Tokens:
        return self.encoder.encode([text.strip() for text in texts])


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> ClipTokeniser:
    """Load the tokeniser; `formatting` is refused in `info`. Raises CheckpointError, ConfigError for the length."""
    limit = info(directory).max_length
    length = tokens.checked_length(max_length, limit, limit)
    return ClipTokeniser(tokens.TextEncoder(_backend(_folder(directory)), 0, length))


def _backend(folder: str) -> Any:
    """Return the `tokenizers.Tokenizer` of the folder. Raises CheckpointError when it is no CLIP tokeniser."""
    from tokenizers import Tokenizer

    if clip_openai.is_openai(folder):
        from transformers import CLIPTokenizer

        size = len(clip_openai.read_state(folder, mmap=True)["token_embedding.weight"])
        pieces, merges = clip_openai.vocabulary(folder, size)
        backend = CLIPTokenizer(vocab=pieces, merges=merges).backend_tokenizer
    else:
        backend = tokens.load_backend(folder, "CLIPTokenizer")
    if any(backend.token_to_id(piece) is None for piece in (clip_openai.START, clip_openai.END)):
        expected = f"the pieces {clip_openai.START} and {clip_openai.END}"
        refuse("the tokeniser is not CLIP's", folder, expected=expected)
    return Tokenizer.from_str(backend.to_str())  # transformers' copy carries a patched method that does not pickle


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the text tower; passages and queries share it. Under cosine similarity its vectors are L2-normalised.

    Raises CheckpointError when the weights, also those of the image side, are incomplete or do not fit.
    """
    from pipelines.models.clip_tower import ClipTextTower

    normalise = info(directory, similarity=similarity).similarity == "cosine"
    folder = _folder(directory)
    model = _load(folder, dtype)
    end = _backend(folder).token_to_id(clip_openai.END)
    declared = model.config.text_config.eos_token_id
    if declared not in (end, _END_LEGACY):
        what = f"the tokeniser ends texts with {end}, the model reads them at {declared}"
        refuse(what, folder, hint="take config.json and the tokeniser from the same model")
    return ClipTextTower(model.text_model, model.text_projection, end, normalise=normalise).eval().to(device)


def load_image_tower(directory: str, dtype: str, device: str, *, similarity: Similarity | None = None) -> ImageTower:
    """Load the image tower. Under cosine similarity its vectors are L2-normalised.

    Raises ConfigError without Pillow, CheckpointError when weights or pixel settings are incomplete or do not fit.
    """
    from pipelines.models.clip_tower import ClipImageTower
    from pipelines.pixels import read_rule, require_pillow

    require_pillow()
    described = info(directory, similarity=similarity)
    folder = _folder(directory)
    rule = read_rule(_pixel_settings(folder), described.details["image_size"], folder)
    model = _load(folder, dtype)
    normalise = described.similarity == "cosine"
    tower: ImageTower = ClipImageTower(model.vision_model, model.visual_projection, rule, normalise=normalise)
    return tower.eval().to(device)  # type: ignore[attr-defined]


def _pixel_settings(folder: str) -> dict[str, Any]:
    """Return the settings of the image processor; empty when the checkpoint has none, as in OpenAI's layout."""
    for name in _PREPROCESSORS:
        settings: dict[str, Any] = read_json(folder, name)
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings or "size" in settings or "crop_size" in settings:
            return settings
    return {}


def _load(folder: str, dtype: str) -> Any:
    """Return transformers' CLIPModel, every tensor from the checkpoint."""
    from transformers import CLIPConfig, CLIPModel

    from pipelines.models.weights import build_model, read_config, read_weights

    if not clip_openai.is_openai(folder):
        return build_model(CLIPModel, read_config(folder), read_weights(folder), dtype, folder)
    state = clip_openai.read_state(folder, mmap=False)
    config = CLIPConfig(**clip_openai.config_of(state))
    return build_model(CLIPModel, config, clip_openai.convert(state), dtype, folder)
