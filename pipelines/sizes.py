"""Sizes in bytes, as people write them and read them."""

from __future__ import annotations

import re

from pipelines.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes that `8GB`, `512 MiB` or a plain number says. Raises ConfigError for anything else, and 0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise ConfigError(f"cannot read the size {text!r}", where="--memory", expected="for example 8GB, 512MiB, 1.5TB")
    return size


def human_bytes(count: float) -> str:
    """Return a size with three digits and its decimal unit: `76.8 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
