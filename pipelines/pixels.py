"""Image files -> upright RGB pictures -> the pixel arrays a vision tower takes. Needs Pillow (the extra `images`).

Decoding is done twice, by the same code: at ingest, so that a file that cannot be decoded goes to quarantine, and by
the encoder. Formats are a fixed list, because Pillow would hand others (PostScript) to programs of the system.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError, InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training pixels, by channel (Radford et al. 2021)."""

_BICUBIC = 3  # Pillow's number of the filter, as preprocessor_config.json has it
_MOST_PIXELS = 89_478_485  # a quarter of a gigabyte in RGB; where Pillow begins to warn of decompression bombs
_MOST_ELONGATED = 200  # times longer than wide: scaling the short edge up would make a picture of gigabytes


def require_pillow() -> None:
    """Raise ConfigError when Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        hint = "pip install 'pinakes[images]', on every machine of the cluster"
        raise ConfigError("images need Pillow, which is not installed", expected="Pillow", hint=hint) from error


def open_image(data: bytes) -> Any:
    """Return the picture in a file's bytes as a PIL image in RGB: the first frame, upright, transparency over white.

    Upright as its EXIF orientation says. Raises InputError for what cannot be decoded completely or is too large.
    """
    require_pillow()
    from PIL import Image

    if not data:
        raise InputError("the file is empty", expected="an image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_shape(*image.size)
        image.load()
        return _to_rgb(_upright(image))
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"the picture is too large to decode safely: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError("not an image that can be read", expected=", ".join(FORMATS)) from error
    except Exception as error:  # each of Pillow's decoders has its own exceptions for damaged files
        raise InputError(f"the image is damaged or cut short: {error}") from error


def _check_shape(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise InputError(f"the picture is too large to decode safely: {width} x {height} pixels")
    short, long = sorted((width, height))
    if short < 1 or long > _MOST_ELONGATED * short:
        raise InputError(f"the picture is {width} x {height} pixels", expected=f"sides within 1 : {_MOST_ELONGATED}")


def _upright(image: Any) -> Any:
    """Turn the picture as its EXIF orientation says; a damaged EXIF block says nothing."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Any) -> Any:
    """Convert to RGB; what is transparent shows white, as in transformers' image processors."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return image.convert("RGB")


@dataclass(frozen=True)
class PixelRule:
    """How a checkpoint wants its pixels: resize, crop the centre, scale to 0..1, normalise by channel.

    resize: the length of the short edge, or (height, width), or None. crop: (height, width), or None. resample:
    Pillow's number of the filter. scale: what a byte is multiplied by (1 leaves it).
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = _BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, image: Any) -> npt.NDArray[np.float32]:
        """Return pixel_CHW (3, height, width) float32 of an RGB picture."""
        if self.resize is not None:
            image = image.resize(self._target(*image.size), self.resample)
        byte_HWC = np.asarray(image)
        if self.crop is not None:
            height, width = self.crop
            top, left = (byte_HWC.shape[0] - height) // 2, (byte_HWC.shape[1] - width) // 2
            byte_HWC = byte_HWC[top : top + height, left : left + width]
        return np.stack([table[byte_HWC[..., channel]] for channel, table in enumerate(self._tables())])

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to resize to; the long edge is rounded down."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        edge = int(self.resize or 0)
        short, long = sorted((width, height))
        scaled = int(edge * long / short)
        return (edge, scaled) if width <= height else (scaled, edge)

    def _tables(self) -> npt.NDArray[np.float32]:
        """Return (3, 256) float32: the value of every byte by channel, rounded step by step as the reference does."""
        value_V = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean_C1, std_C1 = (np.array(v, np.float32)[:, None] for v in (self.mean, self.std))
        table_CV: npt.NDArray[np.float32] = (value_V - mean_C1) / std_C1
        return table_CV

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) of every result, or None when it depends on the picture."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)


def read_rule(settings: dict[str, Any], image_size: int, where: str) -> PixelRule:
    """Parse a preprocessor_config.json (empty: CLIP's own rule at `image_size`).

    Raises CheckpointError when the settings cannot be followed or the result would not fit the vision tower.
    """
    size = settings.get("size", {"shortest_edge": image_size})
    do = {step: settings.get(f"do_{step}", True) is not False for step in ("resize", "center_crop", "rescale")}
    normalises = settings.get("do_normalize", True) is not False
    try:
        rule = PixelRule(
            resize=_resize(size) if do["resize"] else None,
            crop=_box(settings.get("crop_size", image_size)) if do["center_crop"] else None,
            resample=int(settings.get("resample", _BICUBIC)),
            scale=float(settings.get("rescale_factor", 1 / 255)) if do["rescale"] else 1.0,
            mean=_channels(settings.get("image_mean", MEAN)) if normalises else (0.0, 0.0, 0.0),
            std=_channels(settings.get("image_std", STD)) if normalises else (1.0, 1.0, 1.0),
        )
    except (TypeError, ValueError, KeyError) as error:
        what = f"preprocessor_config.json cannot be followed: {error!r}"
        raise CheckpointError(what, where=where, expected="the settings of a CLIPImageProcessor") from error
    if rule.size != (image_size, image_size) or not _covers(rule):
        raise CheckpointError(
            f"preprocessor_config.json makes pictures of {rule.size or 'any size'} pixels",
            where=where,
            expected=f"{image_size} x {image_size}, which the vision tower takes, without padding",
            hint="take preprocessor_config.json and weights from the same model",
        )
    return rule


def _resize(size: Any) -> int | tuple[int, int]:
    if isinstance(size, dict) and "shortest_edge" in size:
        if size.get("longest_edge"):
            raise ValueError("longest_edge beside shortest_edge")
        return int(size["shortest_edge"])
    return int(size) if isinstance(size, int) else _box(size)


def _box(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return int(size["height"]), int(size["width"])


def _channels(values: Any) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if len(found) != 3:
        raise ValueError(f"{len(found)} channels")
    return found


def _covers(rule: PixelRule) -> bool:
    """Tell whether every picture is, once resized, at least as large as the crop."""
    if rule.crop is None:
        return True
    if rule.resize is None:
        return False
    height, width = rule.resize if isinstance(rule.resize, tuple) else (rule.resize, rule.resize)
    return height >= rule.crop[0] and width >= rule.crop[1]
