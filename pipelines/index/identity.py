"""Which indexes belong together: what an index is, and a digest of all that its training decided."""

from __future__ import annotations

import hashlib
from typing import Any

from pipelines.errors import ArtifactError
from pipelines.index.spec import MERGEABLE_TYPES
from pipelines.index.structure import ivf_of, layers, transforms


def quantizer_digest(index: Any) -> str:
    """Return 32 hex digits of a hash over all that training decided: equal for shards that belong together.

    The rows of the index do not matter, nor are they read. Raises ArtifactError for a type that cannot be merged and
    holds rows: its graph is not apart from its rows.
    """
    digest = hashlib.sha256()
    if ivf_of(index) is not None:
        digest.update(serialised_without_rows(index))
    elif is_mergeable(index):
        for piece in _flat_pieces(index):
            digest.update(hashlib.sha256(piece).digest())
    elif index.ntotal:
        raise ArtifactError(f"{describe(index)} holds {index.ntotal} rows", where="quantizer_digest",
                            expected="the empty trained index")  # fmt: skip
    else:
        digest.update(_serialised(index))
    return digest.hexdigest()[:32]


def is_mergeable(index: Any) -> bool:
    """Tell whether `merge` can move rows between indexes like this one."""
    import faiss

    found = layers(index)
    fronts = all(isinstance(layer, faiss.IndexIDMap | faiss.IndexPreTransform) for layer in found[:-1])
    if isinstance(found[-1], faiss.IndexIVF) and ivf_of(index) is None:
        return False  # an id map over an inverted file merges into wrong ids
    return fronts and type(found[-1]).__name__ in MERGEABLE_TYPES


def describe(index: Any) -> str:
    """Name the layers of `index`, outermost first."""
    return " over ".join(type(layer).__name__ for layer in layers(index))


def serialised_without_rows(index: Any, num_rows: int = 0) -> bytes:
    """Serialise an inverted file without its lists, which are set aside, not copied, as if it held `num_rows`."""
    found = layers(index)
    ivf, totals, lists = found[-1], [layer.ntotal for layer in found], found[-1].invlists
    try:
        ivf.invlists = None
        for layer in found:
            layer.ntotal = num_rows
        return _serialised(index)
    finally:
        ivf.invlists = lists
        for layer, total in zip(found, totals, strict=True):
            layer.ntotal = total


def _serialised(index: Any) -> bytes:
    import faiss

    return bytes(faiss.serialize_index(index).tobytes())


def _flat_pieces(index: Any) -> list[bytes]:
    import faiss

    leaf = layers(index)[-1]
    pieces = [repr((describe(index), index.d, leaf.d, int(leaf.metric_type), int(leaf.code_size))).encode()]
    for transform in transforms(index):
        writer = faiss.VectorIOWriter()
        faiss.write_VectorTransform(transform, writer)
        pieces.append(faiss.vector_to_array(writer.data).tobytes())
    if hasattr(leaf, "sq"):
        pieces += [repr(int(leaf.sq.qtype)).encode(), faiss.vector_to_array(leaf.sq.trained).tobytes()]
    if hasattr(leaf, "pq"):
        pieces.append(faiss.vector_to_array(leaf.pq.centroids).tobytes())
    if hasattr(leaf, "rabitq"):
        pieces += [repr(int(leaf.rabitq.nb_bits)).encode(), faiss.vector_to_array(leaf.center).tobytes()]
    return pieces
