"""What recall is measured on: held-out queries, what exact search finds for them, and what the shards find.

Each piece is a file in the work folder, so a killed tuning or verification goes on with the searches it still lacks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import corpus
from pipelines.build import BuildPlan, Rows, iter_rows
from pipelines.encode import Encoder
from pipelines.evaluate import read_questions
from pipelines.index.exact import exact_topk, gpu_here
from pipelines.index.search import Hits
from pipelines.manifest import Receipt, ensure, fingerprint, put_done
from pipelines.retrieve import bound_encoder
from pipelines.storage import Store

Array = npt.NDArray[Any]


def encode_queries(plan: BuildPlan, questions: str | None) -> Array:
    """Return (Q, D): the vectors of a seeded sample of the questions, or without any of sampled sentences."""
    if questions:
        texts = [question.text for question in read_questions(questions)]
        picked = np.random.default_rng(plan.config.seed).permutation(len(texts))[: plan.config.recall_queries]
        texts = [texts[i] for i in np.sort(picked)]
    else:
        texts = sample_sentences(plan, plan.config.recall_queries)
    encoder = plan.embeddings["encoder"]

    def make() -> tuple[dict[str, Array], dict[str, Any]]:
        return {"queries_QD": Encoder(bound_encoder({"encoder": encoder}), "query").encode_queries(texts)}, {}

    return _kept(plan.work, "queries.npz", [encoder["query_fingerprint"], texts], make)[0]["queries_QD"]


def sample_sentences(plan: BuildPlan, num: int) -> list[str]:
    """Return `num` query-like texts: one sentence from inside each of a seeded random sample of passages.

    Passages that could not be encoded are left out: nothing can be found for them.
    """
    rng = np.random.default_rng([plan.config.seed, 1])
    unfit = plan.unfit_rows
    drawn = rng.choice(plan.num_rows, size=min(num + len(unfit), plan.num_rows), replace=False)
    rows = np.sort(drawn[~np.isin(drawn, unfit)][:num])
    sentences = []
    for entry in plan.snapshot["parts"]:
        mine = rows[(rows >= entry["first_row"]) & (rows < entry["first_row"] + entry["num_rows"])] - entry["first_row"]
        if len(mine):
            texts = corpus.read_part(plan.passages, entry).column("text").take(mine).to_pylist()
            sentences += [_a_sentence(text, rng) for text in texts]
    return sentences


def _a_sentence(text: str, rng: np.random.Generator) -> str:
    pieces = [p.strip() for p in re.split(r"(?<=[.!?])\s+", text) if len(p.split()) >= 3]
    return pieces[int(rng.integers(len(pieces)))] if pieces else text


def exact_in(plan: BuildPlan, rows: Rows, queries_QD: Array, k: int, *, on_gpu: bool = False) -> Hits:
    """Return the exact (score_QK, row_QK) of the queries among `rows`, by brute force over the embeddings.

    Rows that could not be encoded are left out, as in every search of a version: zero vectors may lie near a query.
    """
    unfit = [row for row in plan.unfit_rows if rows.start <= row < rows.stop]
    made_from = [plan.embeddings["encoder"]["fingerprint"], plan.embeddings["snapshot"], plan.metric, unfit]

    def make() -> tuple[dict[str, Array], dict[str, Any]]:
        blocks = iter_rows(plan, rows)
        if unfit:
            blocks = ((vectors_ND[fit_N], row_N[fit_N]) for vectors_ND, row_N in blocks
                      for fit_N in [~np.isin(row_N, unfit)])  # fmt: skip
        device = gpu_here() if on_gpu else None
        score_QK, row_QK = exact_topk(queries_QD, blocks, k, plan.metric, num_threads=1, device=device)
        return {"score_QK": score_QK, "row_QK": row_QK}, {}

    name = f"exact-{rows.start}-{rows.stop}.npz"
    found, _ = _kept(plan.work, name, [*made_from, name, _digest(queries_QD), k], make)
    return found["score_QK"], found["row_QK"]


def found_in(
    plan: BuildPlan,
    shard: Mapping[str, Any],
    asked: tuple[Array, int, Mapping[str, float]],
    search: Callable[[], tuple[Hits, float]],
) -> tuple[Hits, float]:
    """Return what `search` gives, (score_QK, row_QK) and seconds, or what it gave before.

    shard: manifest entry of the shard's file; asked: queries (Q, D), hits wanted, search parameters.
    """
    queries_QD, k, params = asked
    made_from = [shard["sha256"], _digest(queries_QD), k, dict(params)]

    def make() -> tuple[dict[str, Array], dict[str, Any]]:
        (score_QK, row_QK), seconds = search()
        return {"score_QK": score_QK, "row_QK": row_QK}, {"seconds": seconds}

    found, facts = _kept(plan.work, f"found-{fingerprint(made_from)}.npz", made_from, make)
    return (found["score_QK"], found["row_QK"]), float(facts["seconds"])


def _kept(
    store: Store, name: str, made_from: list[Any], make: Callable[[], tuple[dict[str, Array], dict[str, Any]]]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and facts of the file `name`, made now unless it is in place."""
    key = fingerprint(made_from)

    def put() -> Receipt:
        arrays, facts = make()
        with store.temporary() as temp:
            with open(temp, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            return put_done(store, name, temp, key, facts)

    receipt = ensure(store, name, key, put)
    with np.load(store.local(name, receipt.sha256), allow_pickle=False) as file:
        return dict(file), receipt.facts


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
