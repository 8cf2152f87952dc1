"""The k-means of an inverted file over a sample too large for one process: partial sums, one reduction, repeat.

    coarse_of -> first_centroids -> (add_up for each share of the sample -> next_centroids) times num_iterations

FAISS's own training (`faiss.Clustering`) holds the whole sample; here a share of it is held at a time, on any machine.
The rules are FAISS's: Lloyd's iterations from seeded random rows, centroids of length 1 where it keeps them so (inner
product), and an emptied list takes half of a full one. Sums are in fp64 and added in a fixed order, so the shares
decide the last bits and the number of workers decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.index.structure import layers, transforms, use_threads

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 16_384
_SCORES_AT_ONCE = 2**28  # of a GPU: 1 GB in fp32
_SPLIT = 1 / 1024  # how far the two halves of a split list start apart, as in FAISS


@dataclass(frozen=True)
class Coarse:
    """What is to be clustered: lists, iterations, and how centroids are compared. dim: behind any transform."""

    num_lists: int
    dim: int
    num_iterations: int
    is_similarity: bool
    spherical: bool


@dataclass
class Sums:
    """What a share of the sample says: the sum of the vectors nearest to each centroid, fp64, and how many they are.

    objective: sum of the scores of the rows, each with its centroid (inner product, or squared distance).
    """

    sum_CD: npt.NDArray[np.float64]
    count_C: npt.NDArray[np.int64]
    objective: float = 0.0

    def add(self, other: Sums) -> Sums:
        self.sum_CD += other.sum_CD
        self.count_C += other.count_C
        self.objective += other.objective
        return self


def coarse_of(index: Any) -> Coarse | None:
    """Return the k-means that training `index` begins with, None where it has none that can be spread.

    That is an inverted file whose lists are found by a flat search or a graph over flat centroids; other quantizers
    (multi-index, residual, product) are trained by FAISS itself.
    """
    import faiss

    ivf = layers(index)[-1]
    if not isinstance(ivf, faiss.IndexIVF):
        return None
    quantizer = faiss.downcast_index(ivf.quantizer)
    if not isinstance(quantizer, faiss.IndexFlat | faiss.IndexHNSWFlat):
        return None
    is_similarity = bool(faiss.is_similarity_metric(ivf.metric_type))
    return Coarse(ivf.nlist, ivf.d, ivf.cp.niter, is_similarity, bool(ivf.cp.spherical))


def in_front(index: Any, vectors_ND: Array) -> Floats:
    """Return vectors (N, D), fp16 or fp32, as they reach the lists of `index`: through its trained transforms."""
    vectors: Floats = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    for transform in transforms(index):
        vectors = transform.apply(vectors)
    return vectors


def first_centroids(coarse: Coarse, vectors_CD: Floats) -> Floats:
    """Return the centroids (C, D) to start from: rows of the sample, drawn by chance."""
    return _to_length_1(vectors_CD) if coarse.spherical else vectors_CD


def add_up(coarse: Coarse, blocks: Iterable[Floats], centroids_CD: Floats, device: str | None = None) -> Sums:
    """Find the nearest centroid of each row of `blocks` (N, D) and return their sums.

    By FAISS on one thread, so that the machine's number of cores does not decide the last bits; with `device`, such as
    "cuda", by torch there, in fp32 as well. Raises InputError for a vector that is not finite.
    """
    adder = _ByTorch(coarse, centroids_CD, device) if device else _ByFaiss(coarse, centroids_CD)
    for block in blocks:
        for start in range(0, len(block), adder.rows_at_once):
            if not adder.add(block[start : start + adder.rows_at_once]):
                raise InputError("a vector is not finite", where="k-means", hint="encode its part again")
    return adder.sums()


def next_centroids(coarse: Coarse, sums: Sums, seed: list[int]) -> Floats:
    """Return the centroids (C, D) that the sums of all shares lead to. seed: decides which lists are split."""
    counts = np.maximum(sums.count_C, 1)
    centroids = sums.sum_CD / counts[:, None]
    _split_full_lists(centroids, sums.count_C.copy(), np.random.default_rng(seed))
    result = centroids.astype(np.float32)
    return _to_length_1(result) if coarse.spherical else result


def preset(index: Any, centroids_CD: Floats) -> None:
    """Give `index` its coarse centroids; training then leaves them and goes on with what comes after."""
    import faiss

    use_threads(1)  # a graph over the centroids would differ from build to build
    ivf = layers(index)[-1]
    quantizer = faiss.downcast_index(ivf.quantizer)
    quantizer.reset()
    quantizer.add(np.ascontiguousarray(centroids_CD, dtype=np.float32))
    quantizer.is_trained = True


class _ByFaiss:
    rows_at_once = _ROWS_AT_ONCE

    def __init__(self, coarse: Coarse, centroids_CD: Floats) -> None:
        import faiss

        use_threads(1)
        self._flat = (faiss.IndexFlatIP if coarse.is_similarity else faiss.IndexFlatL2)(coarse.dim)
        self._flat.add(centroids_CD)
        self._sums = Sums(np.zeros(centroids_CD.shape), np.zeros(len(centroids_CD), np.int64))

    def add(self, vectors_ND: Floats) -> bool:
        """Add the rows to the sums of their centroids; False for one that is not finite."""
        score_N1, nearest_N1 = self._flat.search(vectors_ND, 1)
        if nearest_N1.min() < 0 or not np.isfinite(score_N1).all():
            return False
        order_N = np.argsort(nearest_N1[:, 0], kind="stable")
        found, starts = np.unique(nearest_N1[order_N, 0], return_index=True)
        self._sums.sum_CD[found] += np.add.reduceat(vectors_ND[order_N].astype(np.float64), starts, axis=0)
        self._sums.count_C[found] += np.diff([*starts, len(order_N)])
        self._sums.objective += float(score_N1.sum(dtype=np.float64))
        return True

    def sums(self) -> Sums:
        return self._sums


class _ByTorch:
    """The same on a device of torch's. Rows are sorted by centroid and summed a run at a time: no order is left open.

    Squared distances are |v|^2 - 2 v.c + |c|^2, which rounds away more than differences would: near a border between
    two lists a row may fall into the other one.
    """

    def __init__(self, coarse: Coarse, centroids_CD: Floats, device: str) -> None:
        import torch

        self._is_similarity, self._centroids_CD = coarse.is_similarity, torch.tensor(centroids_CD, device=device)
        self._squares_C = (self._centroids_CD**2).sum(1)
        self._sum_CD = torch.zeros(centroids_CD.shape, dtype=torch.float64, device=device)
        self._count_C = torch.zeros(len(centroids_CD), dtype=torch.int64, device=device)
        self._objective = 0.0
        self.rows_at_once = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // len(centroids_CD)))

    def add(self, vectors_ND: Floats) -> bool:
        """Add the rows to the sums of their centroids; False for one that is not finite."""
        import torch

        with torch.inference_mode():
            vectors = torch.tensor(vectors_ND, device=self._centroids_CD.device)
            score_NC = vectors @ self._centroids_CD.T
            if not self._is_similarity:
                score_NC = score_NC.mul_(2).sub_(self._squares_C)
            score_N, nearest_N = score_NC.max(dim=1)
            objective = score_N.double().sum()
            if not self._is_similarity:
                objective = (vectors.double() ** 2).sum() - objective
            if not torch.isfinite(objective):
                return False
            counts_C = torch.bincount(nearest_N, minlength=len(self._count_C))
            by_list = vectors[torch.argsort(nearest_N, stable=True)].double()
            self._sum_CD += torch.segment_reduce(by_list, "sum", lengths=counts_C, axis=0, initial=0.0)
            self._count_C += counts_C
            self._objective += float(objective)
        return True

    def sums(self) -> Sums:
        return Sums(self._sum_CD.cpu().numpy(), self._count_C.cpu().numpy(), self._objective)


def _split_full_lists(centroids_CD: npt.NDArray[np.float64], count_C: npt.NDArray[np.int64], rng: Any) -> None:
    """Give every empty list half of a full one's rows: the fuller, the likelier. Both start a little apart.

    Each split has a direction of its own: with one for all, halves of two halves would meet again.
    """
    for empty in np.flatnonzero(count_C == 0):
        spare_C = np.maximum(count_C - 1, 0)
        full = rng.choice(len(count_C), p=spare_C / spare_C.sum())
        apart_D = 1 + _SPLIT * rng.uniform(-1, 1, centroids_CD.shape[1])
        centroids_CD[empty] = centroids_CD[full] * apart_D
        centroids_CD[full] *= 2 - apart_D
        count_C[empty] = count_C[full] // 2
        count_C[full] -= count_C[empty]


def _to_length_1(vectors_ND: Floats) -> Floats:
    length_N1 = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))[:, None]
    scaled: Floats = np.where(length_N1 > 0, vectors_ND / np.maximum(length_N1, 1e-30), vectors_ND).astype(np.float32)
    return scaled
