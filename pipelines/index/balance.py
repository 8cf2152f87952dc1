"""How evenly the rows of an inverted file are spread over its lists: what uneven lists cost every search."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.index.structure import layers
from pipelines.index.tiers import codes_of

Sizes = npt.NDArray[np.int64]
_SHARES = (1 / 4, 1 / 2, 1, 2, 4)  # of the mean size: where the bars of the histogram end


def list_sizes(index: Any) -> Sizes | None:
    """Return the rows (C,) int64 in each list of `index`, None for an index without lists."""
    import faiss

    ivf = layers(codes_of(index))[-1]
    if not isinstance(ivf, faiss.IndexIVF):
        return None
    return np.asarray([ivf.invlists.list_size(n) for n in range(ivf.nlist)], np.int64)


def balance(size_C: Sizes) -> dict[str, Any]:
    """Return what the sizes of lists (C,) say.

    imbalance: C·Σn² / (Σn)², FAISS's imbalance factor: how many times as many rows a search of the lists that queries
    fall into reads as if all were equal (1.0), given that queries fall where rows lie. histogram: lists by size, each
    bar with its largest size `up_to` (rows) and `lists`, their number; the first holds the empty ones.
    """
    total, largest = int(size_C.sum()), int(size_C.max())
    edges = sorted({0, *(int(total / len(size_C) * share) for share in _SHARES), largest})
    edges = [edge for edge in edges if edge <= largest]
    counts = np.diff([0, *np.searchsorted(np.sort(size_C), edges, side="right")])
    return {
        "num_lists": len(size_C),
        "imbalance": round(len(size_C) * float((size_C.astype(float) ** 2).sum()) / max(total, 1) ** 2, 4),
        "smallest": int(size_C.min()),
        "median": float(np.median(size_C)),
        "largest": largest,
        "histogram": [{"up_to": edge, "lists": int(n)} for edge, n in zip(edges, counts, strict=True)],
    }
