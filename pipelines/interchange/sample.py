"""See that vectors from elsewhere are what an encoder makes of the passages, on a sample encoded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import corpus
from pipelines.encode import Encoder, EncoderSpec, ImageEncoder
from pipelines.errors import InputError
from pipelines.storage import Store

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

_PARTS_CHECKED, _ROWS_CHECKED = 8, 8  # 64 passages take a second, and show any wrong order
_MIN_COSINE = 0.99  # between arithmetic in bf16 and fp32, and through 8-bit codes, it stays above 0.999
_MAX_LENGTH_RATIO = 1.02
_SEED = 0


def check_sample(
    snapshot: dict[str, Any], passages: Store, spec: EncoderSpec, vectors_of: Callable[[Rows], Array]
) -> dict[str, Any]:
    """Encode a seeded sample of the passages again and compare; return how many, and the smallest cosine.

    vectors_of: gives (N, D) float32, the vectors of rows (N,). Lengths are compared, too: a dot product ranks by them.
    Raises InputError when a vector is not what the encoder makes of its passage.
    """
    rows, own_ND = _encode_sample(snapshot, passages, spec)
    given_ND = vectors_of(rows)
    own, given = np.linalg.norm(own_ND, axis=1), np.linalg.norm(given_ND, axis=1)
    both_zero = (own == 0) & (given == 0)
    cosine = np.where(both_zero, 1, np.einsum("nd,nd->n", own_ND, given_ND) / np.maximum(own * given, 1e-30))
    ratio = np.where(both_zero, 1, np.maximum(own, given) / np.maximum(np.minimum(own, given), 1e-30))
    if cosine.min() < _MIN_COSINE:
        worst, told = int(cosine.argmin()), f"cosine {cosine.min():.4f} (median {np.median(cosine):.4f})"
    elif ratio.max() > _MAX_LENGTH_RATIO:
        worst, told = int(ratio.argmax()), f"lengths {given[ratio.argmax()]:.4g} and {own[ratio.argmax()]:.4g}"
    else:
        return {"num_passages": len(rows), "min_cosine": round(float(cosine.min()), 5)}
    raise InputError(
        f"the vectors are not what this encoder makes of the passages: {told}",
        where=f"row {rows[worst]} of snapshot {snapshot['snapshot']}",
        expected=f"cosine of at least {_MIN_COSINE}, lengths within 2 %, on {len(rows)} passages encoded again",
        hint="check encoder, its formatting and the order of the files; --trust imports them all the same",
    )


def _encode_sample(snapshot: dict[str, Any], passages: Store, spec: EncoderSpec) -> tuple[Rows, Array]:
    """Return the rows of a few passages from a few parts all over the snapshot, and their vectors by the encoder."""
    rng, images = np.random.default_rng(_SEED), bool(snapshot.get("images"))
    chosen = np.sort(rng.choice(len(snapshot["parts"]), min(_PARTS_CHECKED, len(snapshot["parts"])), replace=False))
    encoder = ImageEncoder(spec) if images else Encoder(spec, "passage")
    rows, vectors = [], []
    for part in (snapshot["parts"][i] for i in chosen):
        inside = np.sort(rng.choice(part["num_rows"], min(_ROWS_CHECKED, part["num_rows"]), replace=False))
        table = corpus.read_part(passages, part, images=images).take(inside)
        if isinstance(encoder, ImageEncoder):
            vectors.append(encoder.encode_images(table["image"].to_pylist()))
        else:
            vectors.append(encoder.encode_passages(table["title"].to_pylist(), table["text"].to_pylist()))
        rows.append(inside + part["first_row"])
    return np.concatenate(rows), np.concatenate(vectors)
