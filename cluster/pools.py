"""The one place that says what a stage may take: CPUs, GPUs, actors, retries."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.session import our_errors
from pipelines.config import ClusterConfig

_SLIVER = 0.0001  # the least that Ray counts, for what never has to wait: writers, CPU tokenisers, GPU encoders
_CORE = 0.999  # what a busy process asks of a core: one fits on each, also on a big node, and slivers fit beside them
_ENCODERS_PER_HELPER = 8  # on CPUs; one tokenises for ten times as many, so the pool may grow
_FIRST_PER_GPU, _MOST_PER_GPU = 2, 8  # tokenisers: a BERT-base takes what two make, a MiniLM many times that
_LEAST_GPUS = 4  # tokenisers may grow as for that many, since nodes may join

_RETRIES = 4
_SECONDS_BETWEEN_WORDS = 60.0
_SECONDS_TO_LET_GO = 10.0
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
    with _actors(worker, arguments, min(int(fits), len(items)), num_cpus=1.0, num_gpus=num_gpus) as run:
        yield from run([(item,) for item in items])


@contextmanager
def products(num_items: int, num_gpus: float) -> Iterator[tuple[Callable[..., Iterator[tuple[int, Any]]], bool]]:
    """Give (what runs `function(item, *common)` as `run_tasks` does, whether on GPUs), for work that is products alone.

    num_gpus: of one process. They keep their GPU until this ends: a task's process would have to end with each task,
    since a CUDA context stays on the card it began with. Where no GPU is free, or none is asked for, tasks on CPUs do
    the same work.
    """
    import ray

    free = _free_gpus(num_gpus) if num_gpus else 0.0
    if free < num_gpus or not num_gpus:
        yield run_tasks, False
        return
    with _actors(_Doer, (), min(int(free / num_gpus), num_items), num_cpus=_SLIVER, num_gpus=num_gpus) as run:

        def run_there(function: Callable[..., Any], items: Sequence[Any], *common: Any) -> Iterator[tuple[int, Any]]:
            shared = [ray.put(c) for c in common]
            return run([(function, item, *shared) for item in items])

        yield run_there, True


class _Doer:
    def work(self, function: Callable[..., Any], item: Any, *common: Any) -> Any:
        return function(item, *common)


def _free_gpus(wanted: float) -> float:
    """Return how much of the cluster's GPUs is free; the actors of the stage before take a moment to let go of them."""
    import ray

    until = time.monotonic() + _SECONDS_TO_LET_GO
    while (free := float(ray.available_resources().get("GPU", 0))) < wanted <= ray.cluster_resources().get("GPU", 0):
        if time.monotonic() > until:
            break
        time.sleep(0.5)
    return free


@contextmanager
def _actors(
    worker: type, arguments: Sequence[Any], most: int, *, num_cpus: float, num_gpus: float
) -> Iterator[Callable[[Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]]:
    """Hold actors (one at least), and give what runs `work(*call)` for every call on one of them."""
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": _RETRIES, "max_task_retries": _RETRIES}
    kind = ray.remote(worker).options(**options)
    actors = [kind.remote(*arguments) for _ in range(max(1, most))]

    def run(calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        waiting: dict[Any, int] = {}
        owner: dict[int, Any] = {}
        upcoming = iter(enumerate(calls))

        def give(actor: Any) -> None:
            if (following := next(upcoming, None)) is not None:
                position, call = following
                waiting[actor.work.remote(*call)] = position
                owner[position] = actor

        for actor in actors * 2:  # one call under way and one waiting, each
            give(actor)
        while waiting:
            for position, result in _collect(waiting):
                give(owner.pop(position))
                yield position, result

    try:
        yield run
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
    """How encoding is laid out: the pools, and what one actor of each takes."""

    encoders: Any
    encoder: dict[str, float]
    readers: Any
    reader: dict[str, float]
    writers: Any
    writer: dict[str, float]
    device: str
    threads: int


def encode_resources(config: ClusterConfig, num_parts: int) -> EncodeResources:
    """Settle the encoder pool for `num_parts` parts, and the pools that read and write beside it.

    The encoders start with as many as fit and grow when nodes join, unless `config.workers` says otherwise; Ray Data
    keeps a second part waiting at each. The readers work ahead until their parts fill Ray Data's share of the object
    store.
    """
    import ray
    from ray.data import ActorPoolStrategy

    on_gpu, cpus = config.gpus_per_worker > 0, config.cpus_per_worker
    encoder = {"num_cpus": cpus * _CORE if cpus else (_SLIVER if on_gpu else _CORE)}
    if on_gpu:
        encoder["num_gpus"] = config.gpus_per_worker
    fits = max(1, num_fitting(config, ray.nodes()))
    low, high = config.worker_range() or (fits, num_parts)
    high = max(1, min(high, num_parts))
    low = min(low, high)
    start = min(high, max(low, fits))
    encoders = ActorPoolStrategy(min_size=low, max_size=high, initial_size=start)
    # Helpers are actors too: Ray ends an idle task worker after a second, and starting one anew for every part took a
    # quarter of a small machine.
    few = ActorPoolStrategy(size=-(-start // _ENCODERS_PER_HELPER))
    readers, writer = few, {"num_cpus": _SLIVER}
    if on_gpu:
        spare = int(cluster_cpus() - start * max(1.0, cpus or 0.0))
        first = max(1, min(_FIRST_PER_GPU * start, spare, num_parts))
        most = max(first, min(_MOST_PER_GPU * max(start, _LEAST_GPUS), num_parts))
        readers = ActorPoolStrategy(min_size=first, max_size=most)
    reader = {"num_cpus": _CORE} if on_gpu else writer
    device, threads = ("cuda" if on_gpu else "cpu"), max(1, int(cpus or 1))
    return EncodeResources(encoders, encoder, readers, reader, few, writer, device, threads)


def num_fitting(config: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return how many encoders these nodes (as `ray.nodes()` lists them) hold, counted node by node."""
    gpus, cpus = config.gpus_per_worker, config.cpus_per_worker
    count = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        bounds = [has.get("GPU", 0) / gpus + 1e-6] if gpus else []
        if cpus or not gpus:
            bounds.append(has.get("CPU", 0) / max(1.0, cpus or 1.0))
        count += int(min(bounds))
    return count


def lack(config: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return in a line what an encoder asks for and no node has; None when there is room for one."""
    if num_fitting(config, nodes):
        return None
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = config.cpus_per_worker or (0 if config.gpus_per_worker else 1)
    wanted = [f"{number:g} {name}" for number, name in ((config.gpus_per_worker, "GPUs"), (cpus, "CPUs")) if number]
    most = [f"{max([has.get(kind, 0) for has in alive], default=0):g} {kind}s" for kind in ("GPU", "CPU")]
    return (
        f"waiting for a node that has what an encoder asks for: {' and '.join(wanted)}; "
        f"of {len(alive)} now none has more than {' and '.join(most)} (see cluster.gpus_per_worker)"
    )


@contextmanager
def told_while_waiting(config: ClusterConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Say at once, and every minute, what is lacking as long as no node has room for an encoder.

    Ray would wait in silence for half an hour.
    """
    import ray

    ended = threading.Event()

    def watch() -> None:
        while (lacking := lack(config, ray.nodes())) and not ended.is_set():
            say(lacking)
            ended.wait(_SECONDS_BETWEEN_WORDS)

    watcher = threading.Thread(target=watch, name="waiting", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def stream_rows(build: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the Ray Data plan that `build` makes; its actors end when this ends, however it ends.

    Within the plan no pool shrinks before its input is used up: a lull would cost an encoder that loads again later.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    with DataContext.current(context):
        rows = iter(build().iter_rows())
    failure: BaseException | None = None
    try:
        yield from rows
    except ray.exceptions.RayError as error:
        failure = error
    if failure is None:
        return
    # A failed plan lets go of its actors, but the frames of its tracebacks hold them and their GPUs, and these lie in
    # reference cycles that may live for minutes. What happened on the worker is in the message.
    chain: list[BaseException | None] = [failure]
    while chain:
        if (seen := chain.pop()) is not None and (seen is failure or seen.__traceback__ is not None):
            chain += [seen.with_traceback(None).__cause__, seen.__context__]
    del rows
    gc.collect()
    raise failure
