"""Training on a cluster: one task, or for a large sample k-means over shares of it, an iteration at a time."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.pools import products, run_task, run_tasks
from cluster.progress import Progress, Stage
from pipelines import train
from pipelines.build import BuildPlan
from pipelines.manifest import Receipt
from pipelines.train import Share, Spread, State


def train_on_cluster(plan: BuildPlan, progress: Progress) -> Receipt:
    """Train the version's quantizer, or find it in place; an interrupted k-means goes on after its last iteration."""
    spread = train.spread_of(plan)
    with progress.stage("train", spread.num_steps if spread else 1) as stage:
        if found := train.find_trained(plan):
            stage.advance(spread.num_steps if spread else 1, reused=True)
            return found
        if spread is None:
            trained: Receipt = run_task(train.train_quantizer, plan, num_cpus=plan.num_threads)
            stage.advance()
            return trained
        trained = _train_spread(plan, spread, stage)
        run_task(train.clear, plan)
    return trained


def _train_spread(plan: BuildPlan, spread: Spread, stage: Stage) -> Receipt:
    shares = _in_order(run_tasks(_draw_task, spread.shares, plan), stage)
    state: State | None = train.find_state(plan, spread)
    if state is None:
        state = run_task(train.start, plan, shares, num_cpus=plan.num_threads)
        stage.advance()
    else:
        stage.advance(1 + state.iteration * (len(shares) + 1), reused=True)
    assert state
    with products(len(shares), plan.gpus) as (run, on_gpu):
        while state.iteration < spread.coarse.num_iterations:
            sums = _in_order(run(train.sum_share, shares, plan, state, on_gpu), stage)
            before, state = state, run_task(train.step, plan, state, sums)
            stage.advance()
            if state.centroids.sha256 == before.centroids.sha256:
                break
    trained: Receipt = run_task(train.train_quantizer, plan, shares, state, num_cpus=plan.num_threads)
    stage.advance()
    return trained


def _in_order(finished: Iterable[tuple[int, Receipt]], stage: Stage) -> list[Receipt]:
    done: dict[int, Receipt] = {}
    for position, receipt in finished:
        done[position] = receipt
        stage.advance(reused=receipt.reused)
    return [done[position] for position in sorted(done)]


def _draw_task(share: Share, plan: BuildPlan) -> Receipt:
    return train.draw_share(plan, share)
