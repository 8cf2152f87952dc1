"""The one place that says what a stage may take: CPUs, GPUs, actors, retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.session import our_errors
from pipelines.config import ClusterConfig

_CPU_HELPER_CPUS = 0.1  # tokenising and writing run on the sliver of a core that a CPU encoder leaves
_GPU_HELPER_CPUS = 0.5  # a GPU takes as many tokens as a core or two can tokenise
_ENCODERS_PER_HELPER = 8

_RETRIES = 4
_WINDOW_PER_CPU = 4


def run_tasks(
    function: Callable[..., Any], items: Sequence[Any], *common: Any, num_cpus: float = 1.0
) -> Iterator[tuple[int, Any]]:
    """Run `function(item, *common)` for every item as Ray tasks; yield (position, result) as they finish.

    `common` crosses the wire once. A bounded number of tasks is in flight, so the driver's memory does not grow with
    the number of items. A dead worker or node is retried; an exception of ours ends the stage.
    """
    import ray

    shared = [ray.put(c) for c in common]
    task = ray.remote(function).options(num_cpus=num_cpus, max_retries=_RETRIES)
    window = max(4, int(cluster_cpus() / num_cpus * _WINDOW_PER_CPU))
    waiting: dict[Any, int] = {}
    upcoming = iter(enumerate(items))
    for position, item in upcoming:
        waiting[task.remote(item, *shared)] = position
        if len(waiting) >= window:
            yield from _collect(waiting)
    while waiting:
        yield from _collect(waiting)


def run_on_actors(
    worker: type, arguments: Sequence[Any], items: Sequence[Any], *, num_gpus: float = 0
) -> Iterator[tuple[int, Any]]:
    """Run `worker(*arguments).work(item)` for every item; yield (position, result) as they finish.

    For work that needs a model loaded: a few actors, one for each core or GPU, that end with the stage and give their
    memory back. A dead one is started again.
    """
    import ray

    fits = ray.cluster_resources().get("GPU", 0) / num_gpus if num_gpus else cluster_cpus()
    options = {"num_cpus": 1.0, "num_gpus": num_gpus, "max_restarts": _RETRIES, "max_task_retries": _RETRIES}
    kind = ray.remote(worker).options(**options)
    actors = [kind.remote(*arguments) for _ in range(max(1, min(int(fits), len(items))))]
    waiting: dict[Any, int] = {}
    owner: dict[int, Any] = {}

    def give(actor: Any) -> None:
        if (following := next(upcoming, None)) is not None:
            position, item = following
            waiting[actor.work.remote(item)] = position
            owner[position] = actor

    upcoming = iter(enumerate(items))
    try:
        for actor in actors * 2:  # one item under way and one waiting, each
            give(actor)
        while waiting:
            for position, result in _collect(waiting):
                give(owner.pop(position))
                yield position, result
    finally:
        for actor in actors:
            ray.kill(actor)


def run_task(function: Callable[..., Any], *arguments: Any, num_cpus: float = 1.0) -> Any:
    """Run one Ray task and return its result."""
    import ray

    with our_errors():
        return ray.get(ray.remote(function).options(num_cpus=num_cpus, max_retries=_RETRIES).remote(*arguments))


def _collect(waiting: dict[Any, int]) -> Iterator[tuple[int, Any]]:
    import ray

    ready, _ = ray.wait(list(waiting), num_returns=1)
    for reference in ready:
        with our_errors():
            result = ray.get(reference)
        yield waiting.pop(reference), result


def cluster_cpus() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 1.0))


def largest_node_cpus() -> int:
    """Return the cores of the largest node: what one multi-threaded task may ask for."""
    import ray

    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))


@dataclass(frozen=True)
class EncodeResources:
    """How encoding is laid out: pools, and the resources of one actor, for the encoders and for their helpers."""

    actors: Any
    actor: dict[str, Any]
    helpers: Any
    helper: dict[str, Any]
    device: str
    threads: int


def encode_resources(config: ClusterConfig, num_parts: int) -> EncodeResources:
    """Settle the encoder pool for `num_parts` parts, and the pools that read and write beside it."""
    import ray
    from ray.data import ActorPoolStrategy

    actor: dict[str, Any] = {"num_cpus": config.cpus_per_worker}
    if config.gpus_per_worker:
        actor["num_gpus"] = config.gpus_per_worker
        fits = int(ray.cluster_resources().get("GPU", 0) / config.gpus_per_worker)
    else:
        fits = int(cluster_cpus() / max(1.0, config.cpus_per_worker))
    low, high = config.worker_range() or (max(1, fits), max(1, fits))
    high = max(1, min(high, num_parts))
    low = min(low, high)
    start = min(high, max(low, fits))
    pool = (
        ActorPoolStrategy(size=high)
        if low == high
        else ActorPoolStrategy(min_size=low, max_size=high, initial_size=start)
    )
    # Helpers are actors too: Ray ends an idle task worker after a second, and starting one anew for every part took a
    # quarter of a small machine. One tokenises for several CPU encoders; a GPU takes all that one can make.
    helper = {"num_cpus": _GPU_HELPER_CPUS if config.gpus_per_worker else _CPU_HELPER_CPUS}
    helpers = ActorPoolStrategy(size=high if config.gpus_per_worker else -(-high // _ENCODERS_PER_HELPER))
    device, threads = ("cuda" if config.gpus_per_worker else "cpu"), max(1, int(config.cpus_per_worker))
    return EncodeResources(pool, actor, helpers, helper, device, threads)
