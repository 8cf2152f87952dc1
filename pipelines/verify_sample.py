"""Do the vectors still mean the passages? A seeded sample is encoded again, compared and searched."""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines import corpus, embeddings
from pipelines.encode import Encoder, ImageEncoder, local_checkpoint
from pipelines.errors import CheckpointError
from pipelines.evaluate import Z95
from pipelines.index.build import read
from pipelines.index.search import Hits, merge_topk, search
from pipelines.index.structure import layers
from pipelines.index.tiers import with_vectors
from pipelines.retrieve import bound_encoder
from pipelines.storage import Store
from pipelines.verify import FAULTS, RE_ENCODE, REBUILD, Finding
from pipelines.verify_shard import local_path, open_table

if TYPE_CHECKING:
    from pipelines.encode import EncoderSpec
    from pipelines.models.base import Side

Array = npt.NDArray[Any]
_LEAST_COSINE = 0.999  # fp16 storage costs 1e-7, other kernels for the same bf16 arithmetic up to 1e-4
_ALIKE = 2e-3  # of |v|², twice what _LEAST_COSINE allows: scores nearer than this may change places
_MOST_STRETCH = 0.02  # of a vector's length
_K = 10  # where the manifest has no recall


class _Absent(Exception):
    """What is needed to encode is not to be had on this machine."""


def check_encoder(side: Side, manifest: dict[str, Any]) -> list[Finding]:
    """Load one side's encoder, and see that its files are those bound into the version and its vectors as wide.

    An encoder that is not to be had here is skipped, not failed.
    """
    spec = bound_encoder(manifest)
    name = spec.checkpoint if side == "passage" else spec.query_checkpoint
    try:
        _look_for(spec, side, manifest)
        if side == "query":
            emb_BD = Encoder(spec, side).encode_queries(["who wrote it"])
            if emb_BD.shape != (1, manifest["dim"]) or not np.isfinite(emb_BD).all():
                what = "the query encoder gives other vectors than the version holds"
                return [Finding("encoders", "failed", what, name, f"{manifest['dim']} finite values",
                                f"shape {emb_BD.shape}", "restore the checkpoint")]  # fmt: skip
        else:
            local_checkpoint(spec, side)
    except _Absent as absent:
        why = f"the {side} encoder is skipped, because it is not to be had here: {absent}"
        return [Finding("encoders", "skipped", why, name)]
    except FAULTS as error:
        return [Finding.of("encoders", error)]
    return [Finding("encoders", "ok", f"the {side} encoder is the bound one", name)]


def _look_for(spec: EncoderSpec, side: Side, manifest: dict[str, Any]) -> None:
    """Raise _Absent unless the manifest says for sure which encoder it means, and its files are here."""
    from pipelines.models.fetch import fetch

    recorded = manifest["encoder"].get("fingerprint"), manifest["encoder"].get("query_fingerprint")
    if recorded != (spec.fingerprint, spec.query_fingerprint) or spec.dim != manifest["dim"]:
        raise _Absent("the manifest's encoder is not what its fingerprints say")
    try:
        fetch(spec.checkpoint if side == "passage" else spec.query_checkpoint)
    except CheckpointError as error:
        raise _Absent(error.what) from error


def check_sample(
    num_sampled: int,
    root: str,
    manifest: dict[str, Any],
    bad: frozenset[str],
    embedded: dict[str, Any] | None,
    snapshot: dict[str, Any] | None,
) -> list[Finding]:
    """Encode a seeded sample of the passages again, compare with the stored vectors, and search for each passage.

    bad: files whose checksum does not hold. embedded, snapshot: manifests of what the version was made from, if there.
    """
    rows_S = _draw(num_sampled, manifest, embedded)
    findings: list[Finding] = []
    stored_SD, fresh_SD = np.full((2, len(rows_S), manifest["dim"]), np.nan, np.float32)
    if embedded is not None:
        findings += _read_stored(stored_SD, rows_S, root, manifest, embedded)
    try:
        fresh_SD[:] = _encode_again(rows_S, root, manifest, bad, snapshot)
    except _Absent as absent:
        findings.append(Finding("sample", "skipped", f"encoding again is skipped, because {absent}"))
    except FAULTS as error:
        findings.append(Finding.of("sample", error))
    findings += _compare(stored_SD, fresh_SD, rows_S, manifest)
    own_SD = np.where(np.isfinite(stored_SD), stored_SD, fresh_SD)
    known_S = np.isfinite(own_SD).all(axis=1)
    return findings + _search_again(own_SD[known_S], rows_S[known_S], root, manifest, bad)


def _draw(num_sampled: int, manifest: dict[str, Any], embedded: dict[str, Any] | None) -> npt.NDArray[np.int64]:
    """Return up to `num_sampled` rows, ascending: always the same of one version, none that could not be encoded."""
    left_out = [guilty["row"] for guilty in (embedded or {}).get("quarantined", [])]
    rows_N = np.setdiff1d(np.arange(manifest["num_rows"]), left_out)
    rng = np.random.default_rng(zlib.crc32(manifest["version"].encode()))
    return np.sort(rng.choice(rows_N, min(num_sampled, len(rows_N)), replace=False))


def _read_stored(
    stored_SD: Array, rows_S: Array, root: str, manifest: dict[str, Any], embedded: dict[str, Any]
) -> list[Finding]:
    """Fill in the stored vectors of the rows; those of a damaged part stay NaN and give a finding."""
    store = Store(root).child("embeddings", manifest["snapshot"], manifest["embeddings"])
    findings = []
    for part in embedded["parts"]:
        low, high = np.searchsorted(rows_S, [part["first_row"], part["first_row"] + part["num_rows"]])
        if low < high:
            try:
                vectors_ND = embeddings.read_vectors(store, part, manifest["dim"])
                stored_SD[low:high] = vectors_ND[rows_S[low:high] - part["first_row"]]
            except FAULTS as error:
                findings.append(Finding.of("sample", error))
    return findings


def _encode_again(
    rows_S: Array, root: str, manifest: dict[str, Any], bad: frozenset[str], snapshot: dict[str, Any] | None
) -> Array:
    """Return (S, D) float32 of the version's own passages. Raises _Absent when they, or the encoder, are not here."""
    from pipelines.models import find_family

    spec = bound_encoder(manifest)
    _look_for(spec, "passage", manifest)
    accepts_images = getattr(find_family(local_checkpoint(spec, "passage")), "accepts_images", None)
    if snapshot is not None and snapshot.get("images"):
        return ImageEncoder(spec).encode_images(_images(rows_S, root, manifest, snapshot))
    if snapshot is None and accepts_images is not None:
        raise _Absent("the passages may be images, which a version does not hold and the snapshot did")
    names = [f"passages-{number:03d}.arrow" for number in range(manifest["num_shards"])]
    if unread := sorted(bad & set(names)):
        raise _Absent(f"{', '.join(unread)} is not the published file")
    titles, texts = [], []
    for name in names:
        first = manifest["files"][name]["first_row"]
        table = open_table(root, manifest, name)
        mine = rows_S[(rows_S >= first) & (rows_S < first + len(table))] - first
        for row in mine.tolist():
            passage = table.slice(row, 1).to_pylist()[0]
            titles.append(passage["title"])
            texts.append(passage["text"])
    return Encoder(spec, "passage").encode_passages(titles, texts)


def _images(rows_S: Array, root: str, manifest: dict[str, Any], snapshot: dict[str, Any]) -> list[bytes]:
    store = corpus.corpus_store(root, manifest["corpus"]).child(manifest["snapshot"])
    images = []
    for part in snapshot["parts"]:
        first = part["first_row"]
        mine = rows_S[(rows_S >= first) & (rows_S < first + part["num_rows"])] - first
        if len(mine):
            images += corpus.read_part(store, part, images=True).column("image").take(mine).to_pylist()
    return images


def _compare(stored_SD: Array, fresh_SD: Array, rows_S: Array, manifest: dict[str, Any]) -> list[Finding]:
    both_S = np.isfinite(stored_SD).all(axis=1) & np.isfinite(fresh_SD).all(axis=1)
    if not both_S.any():
        return [Finding("sample", "skipped", "stored and fresh vectors are not compared: one or the other is missing")]
    stored_SD, fresh_SD = stored_SD[both_S].astype(np.float64), fresh_SD[both_S].astype(np.float64)
    norms_S = np.linalg.norm(stored_SD, axis=1) * np.linalg.norm(fresh_SD, axis=1)
    cosine_S = np.einsum("sd,sd->s", stored_SD, fresh_SD) / np.maximum(norms_S, np.finfo(np.float64).tiny)
    length_S = np.linalg.norm(fresh_SD, axis=1) / np.maximum(np.linalg.norm(stored_SD, axis=1), 1e-30)
    least, worst = float(cosine_S.min()), int(rows_S[both_S][int(cosine_S.argmin())])
    apart = float(np.abs(length_S - 1).max())
    told = f"smallest cosine {least:.6f} (row {worst}), lengths within {apart:.1e}, of {len(cosine_S)} passages"
    if least < _LEAST_COSINE or apart > _MOST_STRETCH:
        what = "the encoder does not give the stored vectors again"
        expected = f"cosine of {_LEAST_COSINE} or more"
        return [Finding("sample", "failed", what, manifest["encoder"]["checkpoint"], expected, told, RE_ENCODE)]
    return [Finding("sample", "ok", f"encoded again: {told}")]


def _search_again(
    own_SD: Array, rows_S: Array, root: str, manifest: dict[str, Any], bad: frozenset[str]
) -> list[Finding]:
    """Search the shards for each passage's own vector, with the version's search parameters."""
    names = [f"shard-{number:03d}.faiss" for number in range(manifest["num_shards"])]
    if unread := sorted(bad & set(names)):
        why = f"searching is skipped, because {', '.join(unread)} is not the published file"
        return [Finding("sample", "skipped", why)]
    if not len(rows_S):
        return [Finding("sample", "skipped", "searching is skipped, because no vector of the sample is known")]
    recall = manifest.get("recall") or {}
    k = min(recall.get("k", _K), manifest["num_rows"])
    hits, exact = [], True
    try:
        for number, name in enumerate(names):
            codes = read(local_path(root, manifest, name), mmap=True)
            index = with_vectors(codes, number, manifest["files"], partial(local_path, root, manifest))
            exact = exact and _is_exact(codes)
            hits.append(search(index, own_SD, k, manifest["search_params"]))
    except FAULTS as error:
        return [Finding.of("sample", error)]
    found_S = _found(merge_topk(hits, k), own_SD, rows_S, manifest["metric"], exact)
    if not exact and not recall:
        return [Finding("sample", "skipped", "searching is skipped, because the version has no measured recall")]
    least = 1.0 if exact else _least_share(recall, len(rows_S))
    told = f"{int(found_S.sum())} of {len(found_S)} passages in the first {k} of their own vectors"
    if found_S.mean() < least:
        what = f"the index does not find its own passages: row {int(rows_S[np.flatnonzero(~found_S)[0]])}, for one"
        expected = f"a share of {least:.4f} or more"
        return [Finding("sample", "failed", what, f"version {manifest['version']}", expected, told, REBUILD)]
    return [Finding("sample", "ok", f"searched: {told}" + ("" if exact else f" ({least:.4f} needed)"))]


def _is_exact(index: Any) -> bool:
    import faiss

    return all(isinstance(layer, faiss.IndexIDMap | faiss.IndexFlat) for layer in layers(index))


def _found(hits: Hits, own_SD: Array, rows_S: Array, metric: str, exact: bool) -> npt.NDArray[np.bool_]:
    """Tell for each vector whether its passage was found, or k others rightly score as high (twins, longer vectors).

    In an exact index the passage's score must also be the one that its vector has with itself.
    """
    score_SK, row_SK = hits
    length_S = np.einsum("sd,sd->s", own_SD, own_SD)
    self_S = length_S if metric == "ip" else np.zeros(len(own_SD), np.float32)
    room_S = _ALIKE * length_S
    here_SK = row_SK == rows_S[:, None]
    if exact:
        here_SK &= np.abs(score_SK - self_S[:, None]) <= room_S[:, None]
    beaten_S = (score_SK[:, -1] >= self_S - room_S) & ~(row_SK == rows_S[:, None]).any(axis=1)
    return np.asarray(here_SK.any(axis=1) | beaten_S)


def _least_share(recall: dict[str, Any], num_sampled: int) -> float:
    """Return the recall measured when the version was built, less its interval and the chance of so small a sample."""
    value = float(recall["value"])
    chance = Z95 * math.sqrt(value * (1 - value) / num_sampled)
    return max(0.0, value - float(recall["ci95"]) - chance)
