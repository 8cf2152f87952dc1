"""What the recall contract is worth on queries of a third set, and what a random training sample is worth.

The same functions that a build runs on a cluster, in a plain loop: train, add, tune on one half of the held-out
queries, verify on the other, and then ask queries of a third set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import embeddings
from pipelines.index.build import add, add_whole, clone_empty, finish, train
from pipelines.index.exact import exact_topk
from pipelines.index.search import search
from pipelines.index.spec import new_index, parse_spec
from pipelines.index.structure import ivf_of
from pipelines.index.tune import HeldOut, Params, Trial, knobs, tune
from pipelines.storage import Store, temporary_file
from tests.bench.index_data import NUM_UNSEEN, Array, Data, K, Result

_SEED_QUERIES = 1000  # held out for tuning and verifying, as in a config's default
TOPIC_TARGET = 0.95
_TOPIC_SHARE = 0.1


@dataclass(frozen=True)
class Small:
    """The small corpora of the seeds: their rows, drawn anew for every seed, and what is built on them."""

    seeds: int
    num_rows: int
    factories: tuple[str, ...]
    targets: tuple[float, ...]


def seeds(data: Data, small: Small) -> Result:
    """Tune every factory to every target on every seed's corpus; count how often unseen queries got it.

    A target that the verification refused to publish counts as met only if the unseen queries met it all the same.
    """
    emb_ND, asked_QD = np.load(data.vectors, mmap_mode="r"), np.load(data.questions)
    found: dict[str, list[Result]] = {f"{f} at {t}": [] for f in small.factories for t in small.targets}
    for seed in range(small.seeds):
        rng = np.random.default_rng(seed)
        vectors_ND = np.asarray(emb_ND[np.sort(rng.choice(len(emb_ND), small.num_rows, replace=False))])
        queries_QD = asked_QD[rng.permutation(len(asked_QD))[: _SEED_QUERIES + NUM_UNSEEN]]
        rows_N = np.arange(len(vectors_ND), dtype=np.int64)
        exact_QK = exact_topk(queries_QD, [(vectors_ND, rows_N)], K, "ip")[1]
        held_out = HeldOut(queries_QD[:_SEED_QUERIES], exact_QK[:_SEED_QUERIES])
        unseen = HeldOut(queries_QD[_SEED_QUERIES:], exact_QK[_SEED_QUERIES:])
        for factory in small.factories:
            index = _built(factory, vectors_ND, vectors_ND, seed)
            for target in small.targets:
                found[f"{factory} at {target}"].append(_kept(index, target, held_out, unseen, seed))
    return {name: _counted(results) for name, results in found.items()}


def _kept(index: Any, target: float, held_out: HeldOut, unseen: HeldOut, seed: int) -> Result:
    tune_on, verify_on = held_out.halves(seed)
    tuned = tune(knobs(index, index.ntotal, K), _measure(index, tune_on), target)
    verified = _measure(index, verify_on)(tuned.best.params).recall
    found = _measure(index, unseen)(tuned.best.params).recall
    published = tuned.reached and verified >= target
    return {"params": tuned.best.params, "verified": verified, "unseen": found, "published": published,
            "met": found >= target}  # fmt: skip


def _counted(results: list[Result]) -> Result:
    met, published = (sum(result[name] for result in results) for name in ("met", "published"))
    lowest = min(result["unseen"] for result in results)
    return {
        "num_seeds": len(results),
        "met": met,
        "refused": len(results) - published,
        "lowest": lowest,
        "seeds": results,
    }


def _measure(index: Any, asked: HeldOut) -> Callable[[Params], Trial]:
    def measure(params: Params) -> Trial:
        return asked.trial(params, search(index, asked.queries_QD, K, params)[1], 0.0)

    return measure


def _built(factory: str, sample_ND: Array, vectors_ND: Array, seed: int) -> Any:
    spec = parse_spec(factory, vectors_ND.shape[1], "ip")
    index = clone_empty(train(spec, sample_ND, seed)) if spec.needs_training else new_index(spec)
    rows_N = np.arange(len(vectors_ND), dtype=np.int64)
    if spec.grows:
        with temporary_file() as path:
            add_whole(index, [(vectors_ND, rows_N)], path)
    else:
        add(index, vectors_ND, rows_N)
    finish(index)
    return index


def topic(data: Data, factory: str) -> Result:
    """Train on a random sample as ours does, and on as many of the first rows as a reader of the file would take."""
    made = data.manifests()["embeddings"]
    store = Store(data.root).child("embeddings", made["snapshot"], made["encoder"]["fingerprint"])
    vectors_ND = np.load(data.vectors)
    unseen = HeldOut(np.load(data.unseen), np.load(data.exact))
    few = int(len(vectors_ND) * _TOPIC_SHARE)
    samples = {
        "random sample": embeddings.sample(store, made["parts"], made["dim"], few, 0),
        "first rows": vectors_ND[:few],
    }
    found: Result = {"factory": factory, "train_rows": few}
    for name, sample_ND in samples.items():
        index = _built(factory, sample_ND, vectors_ND, 0)
        found[name] = _curve(index, unseen)
    return found


def _curve(index: Any, unseen: HeldOut) -> Result:
    """Return recall at a few nprobe, the balance of the lists, and the cheapest search that has the target."""
    ivf, measure = ivf_of(index), _measure(index, unseen)
    assert ivf is not None, "only an inverted file has lists"
    probes = [nprobe for nprobe in (1, 4, 16, 64) if nprobe <= ivf.nlist]
    curve = {str(nprobe): round(measure({"nprobe": nprobe}).recall, 4) for nprobe in probes}
    tuned = tune(knobs(index, index.ntotal, K), measure, TOPIC_TARGET)
    best = tuned.best
    scanned = _mean_scanned(ivf, unseen.queries_QD, best.params["nprobe"])
    return {"recall_at_nprobe": curve, "imbalance": round(ivf.invlists.imbalance_factor(), 3),
            "nprobe_for_target": best.params["nprobe"], "recall_there": round(best.recall, 4),
            "vectors_scanned": round(scanned), "reached": tuned.reached}  # fmt: skip


def _mean_scanned(ivf: Any, queries_QD: Array, nprobe: int) -> float:
    """Return how many vectors a query is compared with, on average: the price of a recall, whatever the lists."""
    _, lists_QP = ivf.quantizer.search(np.ascontiguousarray(queries_QD), nprobe)
    sizes = np.array([ivf.invlists.list_size(i) for i in range(ivf.nlist)])
    return float(sizes[lists_QP].sum(1).mean())
