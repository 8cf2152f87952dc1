"""The vectors that a version keeps beside its codes, to decide among the candidates these find (`index.refine`)."""

from __future__ import annotations

from pipelines.build import BuildPlan, ShardPlan, iter_rows
from pipelines.index import tiers
from pipelines.manifest import Receipt, ensure, fingerprint, put_done
from pipelines.schema import FORMAT_VERSION


def write_vectors(plan: BuildPlan, shard: ShardPlan) -> Receipt:
    """Write the shard's vectors in row order as fp16, or find them in place."""
    name, facts = tiers.vectors_name(shard.number), {"num_rows": len(shard.rows), "first_row": shard.rows.start}
    encoder = plan.embeddings["encoder"]["fingerprint"]
    made_from = fingerprint([FORMAT_VERSION, encoder, plan.snapshot["snapshot"], facts])

    def make() -> Receipt:
        with plan.work.temporary() as temp:
            tiers.write_vectors(temp, iter_rows(plan, shard.rows), len(shard.rows), plan.dim)
            return put_done(plan.store, name, temp, made_from, facts)

    return ensure(plan.store, name, made_from, make)
