"""How a FAISS index is put together: the layers that wrap one another, from the outside in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any


def use_threads(num_threads: int | None) -> None:
    """Make FAISS use `num_threads` on the calling thread (None: every core this process may run on).

    FAISS keeps the number per calling thread (an OpenMP rule), so every heavy function sets it anew.
    """
    import faiss

    faiss.omp_set_num_threads(num_threads or len(os.sched_getaffinity(0)))


def layers(index: Any) -> list[Any]:
    """Return the index and what it wraps, outermost first, for example [IndexIDMap, IndexPreTransform, IndexFlat].

    Below a refining index only the base is followed. The inner objects belong to `index`: keep it alive.
    """
    import faiss

    found = [index]
    while True:
        top = found[-1]
        if isinstance(top, faiss.IndexIDMap | faiss.IndexPreTransform):
            found.append(faiss.downcast_index(top.index))
        elif isinstance(top, faiss.IndexRefine):
            found.append(faiss.downcast_index(top.base_index))
        else:
            return found


def ivf_of(index: Any) -> Any | None:
    """Return the inverted file that keeps the ids of `index`, or None when an id map does."""
    import faiss

    found = layers(index)
    fronts = all(isinstance(layer, faiss.IndexPreTransform) for layer in found[:-1])
    return found[-1] if fronts and isinstance(found[-1], faiss.IndexIVF) else None


def transforms(index: Any) -> list[Any]:
    """Return the vector transforms (PCA, OPQ, …) in front of `index`, in order."""
    import faiss

    chains = [layer.chain for layer in layers(index) if isinstance(layer, faiss.IndexPreTransform)]
    return [faiss.downcast_VectorTransform(chain.at(i)) for chain in chains for i in range(chain.size())]


def nsg_of(index: Any) -> Any | None:
    """Return the NSG index inside `index`, or None. Its `nsg.is_built` holds; `is_built` is lost in files."""
    import faiss

    leaf = layers(index)[-1]
    return leaf if isinstance(leaf, faiss.IndexNSG) else None


def trained_parts(index: Any) -> Iterator[Any]:
    """Yield every index that training `index` trains: its layers and their storages, refinements and quantizers."""
    import faiss

    for layer in layers(index):
        yield layer
        if isinstance(layer, faiss.IndexRefine):
            yield from trained_parts(faiss.downcast_index(layer.refine_index))
        if isinstance(layer, faiss.IndexHNSW | faiss.IndexNSG):
            yield from trained_parts(faiss.downcast_index(layer.storage))
        if isinstance(layer, faiss.IndexIVF) and not layer.quantizer.is_trained:
            yield from trained_parts(faiss.downcast_index(layer.quantizer))


def codebooks(index: Any) -> Iterator[tuple[Any, int]]:
    """Yield (ClusteringParameters or None, number of centroids) of every codebook that training `index` makes."""
    import faiss

    for part in trained_parts(index):
        if isinstance(part, faiss.IndexIVF):
            is_multi = isinstance(faiss.downcast_index(part.quantizer), faiss.MultiIndexQuantizer)
            yield part.cp, 0 if is_multi else part.nlist
        if hasattr(part, "pq"):
            yield part.pq.cp, part.pq.ksub
        for name in ("rq", "lsq", "prq", "plsq"):
            if hasattr(part, name):
                quantizer = getattr(part, name)
                yield getattr(quantizer, "cp", None), 2 ** max(faiss.vector_to_array(quantizer.nbits).tolist())
