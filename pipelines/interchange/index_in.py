"""Publish an index that others built as a version of ours: its file adopted, the snapshot's passages beside it.

    FAISS file + ids -> rows of the snapshot -> adopted shard -> passages -> recall -> version

The vectors stay where the graph and the codes have them: nothing is trained or added. The file is mapped while it is
read, so memory is about 60 bytes a passage, however large the index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipelines import build, publish, recall
from pipelines.build import TRAINED, BuildPlan, Rows, ShardPlan
from pipelines.config import IndexConfig
from pipelines.encode import Encoder, EncoderSpec
from pipelines.errors import ConfigError, InputError
from pipelines.evaluate import recall_at, recall_half_width
from pipelines.index.build import read, write
from pipelines.index.exact import exact_topk
from pipelines.index.identity import quantizer_digest
from pipelines.index.search import check_params
from pipelines.interchange.foreign_index import Foreign, adopt, open_foreign
from pipelines.interchange.matching import Count, RowLookup, read_part_ids, refuse_misfits
from pipelines.interchange.sample import check_sample
from pipelines.interchange.sources import BY_POSITION, IdSource, open_ids
from pipelines.manifest import Receipt, find_finished, put_done
from pipelines.retrieve import LocalShard, bound_encoder
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import temporary_file

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]

_IDS_AT_ONCE = 16_384
_RECALL_K = 10


@dataclass(frozen=True)
class ForeignPlan(BuildPlan):
    """The build of a version whose one shard is the adopted file of this checksum, with these ids."""

    path: str = ""
    sha256: str = ""
    ids: IdSource = BY_POSITION
    strip_prefix: str = ""
    trust: bool = False

    @property
    def encoder(self) -> EncoderSpec:
        return bound_encoder(self.embeddings)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the config that the manifest shows: that of an index of this type, and what was imported as one."""
        given = {"sha256": self.sha256, "ids_sha256": self.ids.sha256 or None, "strip_prefix": self.strip_prefix}
        return {**self.config.model_dump(), "imported": given}

    @property
    def version(self) -> str:
        """Return the version's name: a fingerprint as of any build, with the imported file among its settings."""
        identity = [self.encoder.fingerprint, self.encoder.query_fingerprint, self.snapshot["snapshot"]]
        shape = [self.metric, len(self.shards)]
        return build.version_name([FORMAT_VERSION, *identity, *shape], self.settings, tuned=False)


def plan_import(
    root: str,
    name: str,
    snapshot: dict[str, Any],
    spec: EncoderSpec,
    path: str,
    ids: IdSource,
    *,
    strip_prefix: str = "",
    trust: bool = False,
    min_recall: float | None = None,
    params: dict[str, int | float] | None = None,
) -> ForeignPlan:
    """Look at the file and return what importing it means. params: search parameters instead of those in the file.

    Raises ArtifactError for a file that is no such index, ConfigError for parameters that it does not take.
    """
    foreign = open_foreign(read(path, mmap=True), spec.dim, path)
    wanted = check_params(foreign.index, params or {})
    with open(path, "rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    num_rows = int(snapshot["num_rows"])
    rows = Rows(0, num_rows)
    embedded = {"encoder": spec.as_dict(), "snapshot": snapshot["snapshot"], "dim": spec.dim, "num_rows": num_rows}
    config = _config(name, factory=foreign.factory, metric=foreign.metric, search_params=wanted, min_recall=min_recall)
    built: dict[str, Any] = {"shards": (ShardPlan(0, rows, (rows,)),), "num_threads": 1}
    given: dict[str, Any] = {"path": path, "sha256": sha256, "ids": ids, "strip_prefix": strip_prefix, "trust": trust}
    return ForeignPlan(root, config, embedded, snapshot, foreign.metric, **built, **given)


def _config(name: str, **settings: Any) -> IndexConfig:
    try:
        return IndexConfig(name=name, **settings)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"this cannot be a version of {name!r}: {told}", expected="a plain name") from error


def import_index(plan: ForeignPlan) -> dict[str, Any]:
    """Publish the plan's file as a version; return the version's manifest, at once where it exists already.

    Raises InputError when the ids are not those of the snapshot, one a passage, or the vectors are not the encoder's,
    QualityError when the measured recall misses the target.
    """
    if published := find_finished(plan.store, "version", plan.work):
        return published
    foreign = open_foreign(read(plan.path, mmap=True), plan.dim, plan.path)
    rows_N = settle_rows(plan, foreign.index.ntotal)
    checked = None if plan.trust else _check(plan, foreign, rows_N)
    files = [*_put_index(plan, rows_N), *build.write_passages(plan, plan.shards[0])]
    content = publish.version_content(plan, files, None, {})
    content |= {"config": plan.settings, "imported": {"name": os.path.basename(plan.path), "checked": checked}}
    content["recall"] = _measure_recall(plan, content, foreign, rows_N)
    manifest = publish.publish(plan, content)
    if plan.config.name not in publish.list_aliases(plan.root):
        publish.promote(plan.root, plan.config.name, manifest["version"])
    return manifest


def settle_rows(plan: ForeignPlan, num_vectors: int) -> Places:
    """Return (N,) int64: the row of each place of the index. Raises InputError unless each row has exactly one."""
    if not plan.ids.path:
        if num_vectors != plan.num_rows:
            what = f"the index holds {num_vectors:,} vectors, the snapshot {plan.num_rows:,} passages"
            raise InputError(what, where=plan.path, expected="as many, in the same order", hint="give --ids")
        return np.arange(num_vectors, dtype=np.int64)
    lookup = RowLookup(plan.passages, plan.snapshot["parts"])
    rows_N, seen_N = np.empty(num_vectors, np.int64), np.zeros(plan.num_rows, bool)
    unknown, doubled, absent, done = Count(), Count(), Count(), 0
    for ids in _blocks(plan):
        rows, names = lookup.rows(ids), np.array(ids, object)
        if done + len(ids) > num_vectors:
            raise InputError("there are more ids than vectors", where=plan.ids.path, expected=f"{num_vectors:,}")
        rows_N[done : done + len(ids)] = rows
        done += len(ids)
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True
        unknown.add(names[rows < 0])
        doubled.add(names[(rows >= 0) & ~(first & ~seen_N[rows])])
        seen_N[rows[rows >= 0]] = True
    if done < num_vectors:
        raise InputError(f"there are {done:,} ids only", where=plan.ids.path, expected=f"{num_vectors:,}, one a vector")
    for part in plan.snapshot["parts"] if not seen_N.all() else ():
        ids = read_part_ids(plan.passages, part)
        absent.add([ids[i] for i in np.flatnonzero(~seen_N[part["first_row"] : part["first_row"] + len(ids)])])
    counts = {"passages without a vector": absent, "vectors of unknown passages": unknown}
    refuse_misfits({**counts, "passages with more than one vector": doubled}, unknown)
    return rows_N


def _blocks(plan: ForeignPlan) -> Iterator[list[str]]:
    source = open_ids(plan.ids.path)
    while block := [identity.removeprefix(plan.strip_prefix) for identity in islice(source, _IDS_AT_ONCE)]:
        yield block


def _check(plan: ForeignPlan, foreign: Foreign, rows_N: Places) -> dict[str, Any]:
    place_N = np.argsort(rows_N)
    return check_sample(plan.snapshot, plan.passages, plan.encoder, lambda rows: foreign.vectors(place_N[rows]))


def _put_index(plan: ForeignPlan, rows_N: Places) -> list[Receipt]:
    """Put the empty and the full index in place."""
    folder = plan.store.path() if plan.store.is_local else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    # Opened anew: adopting changes how an index searches, and the other one is still asked for its vectors.
    foreign = open_foreign(read(plan.path, mmap=True), plan.dim, plan.path)
    trained = adopt(foreign.empty(), np.zeros(0, np.int64))
    quantizer = {"quantizer": quantizer_digest(trained)}
    shard = {"num_rows": len(rows_N), "first_row": 0, **quantizer}
    made = ((TRAINED, trained, {"train_rows": 0, **quantizer}), (plan.shards[0].name, adopt(foreign, rows_N), shard))
    receipts = []
    for name, index, facts in made:
        with temporary_file(folder) as temp:
            write(index, temp)
            receipts.append(put_done(plan.store, name, temp, plan.version, facts))
    return receipts


def _measure_recall(plan: ForeignPlan, content: dict[str, Any], foreign: Foreign, rows_N: Places) -> dict[str, Any]:
    """Return recall@k of the shard against exact search over the vectors as they are stored in it."""
    k = min(_RECALL_K, plan.num_rows)
    texts = recall.sample_sentences(plan, plan.config.recall_queries)
    queries_BD = Encoder(plan.encoder, "query").encode_queries(texts)
    places = np.arange(len(rows_N), dtype=np.int64)
    blocks = (places[start : start + _IDS_AT_ONCE] for start in range(0, len(places), _IDS_AT_ONCE))
    decoded = ((foreign.vectors(block), rows_N[block]) for block in blocks)
    _, exact_BK = exact_topk(queries_BD, decoded, k, plan.metric)
    _, found_BK = LocalShard(plan.root, content, 0).search(queries_BD, k)
    return {
        "k": k,
        "value": round(recall_at(found_BK, exact_BK, k), 5),
        "ci95": round(recall_half_width(found_BK, exact_BK, k), 5),
        "num_queries": len(queries_BD),
        "target": plan.config.min_recall,
        "queries": "sampled sentences",
    }
