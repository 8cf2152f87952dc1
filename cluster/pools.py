"""The one place that says what a stage may take: CPUs, GPUs, actors, retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.config import ClusterConfig

IO_CPUS = 0.1
"""Reading, tokenising and writing run beside the encoders on the sliver of a core that those leave."""

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


def run_task(function: Callable[..., Any], *arguments: Any, num_cpus: float = 1.0) -> Any:
    """Run one Ray task and return its result."""
    import ray

    return ray.get(ray.remote(function).options(num_cpus=num_cpus, max_retries=_RETRIES).remote(*arguments))


def _collect(waiting: dict[Any, int]) -> Iterator[tuple[int, Any]]:
    import ray

    ready, _ = ray.wait(list(waiting), num_returns=1)
    for reference in ready:
        yield waiting.pop(reference), ray.get(reference)


def cluster_cpus() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 1.0))


def largest_node_cpus() -> int:
    """Return the cores of the largest node: what one multi-threaded task may ask for."""
    import ray

    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))


def encoder_pool(config: ClusterConfig, num_parts: int) -> tuple[Any, dict[str, Any]]:
    """Return Ray Data's (actor pool strategy, resources of one actor) for `num_parts` parts of encoding."""
    import ray
    from ray.data import ActorPoolStrategy

    if config.gpus_per_worker:
        resources: dict[str, Any] = {"num_gpus": config.gpus_per_worker, "num_cpus": config.cpus_per_worker}
        fits = int(ray.cluster_resources().get("GPU", 0) / config.gpus_per_worker)
    else:
        resources = {"num_cpus": config.cpus_per_worker}
        fits = int(cluster_cpus() / max(1.0, config.cpus_per_worker))
    low, high = config.worker_range() or (max(1, fits), max(1, fits))
    high = max(1, min(high, num_parts))
    low = min(low, high)
    if low == high:
        return ActorPoolStrategy(size=high), resources
    return ActorPoolStrategy(min_size=low, max_size=high, initial_size=min(high, max(low, fits))), resources
