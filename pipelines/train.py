"""Train the one quantizer that all shards of a version start from, on a random sample of the whole corpus.

A small sample is held by one process, and FAISS trains on it. For a large one the lists' centroids are found by all
workers, each holding one share of it at a time; FAISS then trains what is left (ranges, codebooks) on some of its rows:

    draw_share (many) -> start -> (sum_share (many) -> step) for each iteration -> train_quantizer

Each of these leaves a file with a receipt in the work folder, so a killed training goes on after its last step. The
shares follow from the data alone: any number of workers gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import embeddings
from pipelines.build import TRAINED, BuildPlan, put_index
from pipelines.errors import ConfigError
from pipelines.index import kmeans
from pipelines.index.build import read, train, train_front
from pipelines.index.exact import gpu_here
from pipelines.index.identity import quantizer_digest
from pipelines.index.spec import new_index
from pipelines.manifest import Receipt, ensure, find_done, fingerprint, put_done
from pipelines.storage import Store

Array = npt.NDArray[Any]

# A sample beyond one of these is spread over the workers, unless `index.train` says otherwise.
_MOST_LOCAL_ROWS, _MOST_LOCAL_BYTES = 1_000_000, 1_000_000_000
_MOST_SHARE_ROWS = 65_536
_ROWS_PER_LIST = 4  # in a share at least: below, its sums of all lists would be larger than itself
# Of the sample, for all that comes after the centroids: product quantizers take 65,536, scalar ones 100,000.
_REST_ROWS = 131_072
_FRONT = "front.faiss"
_SCRATCH = re.compile(r"(sample|sums|centroids)-[\d-]+\.np[yz]|front\.faiss")


@dataclass(frozen=True)
class Share:
    """A share of the sample: for each part of the embeddings that it comes from, (manifest entry, rows drawn)."""

    number: int
    parts: tuple[tuple[dict[str, Any], int], ...]

    def __len__(self) -> int:
        return sum(count for _, count in self.parts)

    @property
    def name(self) -> str:
        return f"sample-{self.number:04d}.npy"


@dataclass(frozen=True)
class Spread:
    """The k-means of a plan, and the shares of the sample that it runs over."""

    coarse: kmeans.Coarse
    shares: tuple[Share, ...]

    @property
    def num_steps(self) -> int:
        """Return how many files training makes at most; k-means may settle earlier."""
        per_iteration = len(self.shares) + 1
        return per_iteration + self.coarse.num_iterations * per_iteration + 1


@dataclass(frozen=True)
class State:
    """Where k-means stands: the index whose transforms are trained, the centroids, and the iterations behind them."""

    front: Receipt
    centroids: Receipt

    @property
    def iteration(self) -> int:
        return int(self.centroids.facts["iteration"])


def find_trained(plan: BuildPlan) -> Receipt | None:
    """Return the receipt of the trained index when it is in place and whole."""
    return find_done(plan.store, TRAINED, plan.build)


def spread_of(plan: BuildPlan) -> Spread | None:
    """Return how the training of `plan` is spread over workers, None where one process does it.

    Raises ConfigError when `index.train` asks for what this type of index does not have.
    """
    num_rows, wanted = _num_sample_rows(plan), plan.config.train
    coarse = kmeans.coarse_of(new_index(plan.spec))
    if wanted == "distributed" and coarse is None:
        raise ConfigError(f"{plan.config.factory!r} has no lists whose centroids workers could find together",
                          where="index.train", expected="auto or local", hint="or an inverted file, IVF…")  # fmt: skip
    is_large = num_rows > _MOST_LOCAL_ROWS or 4 * num_rows * plan.dim > _MOST_LOCAL_BYTES
    if coarse is None or wanted == "local" or not (is_large or wanted == "distributed"):
        return None
    if num_rows < plan.spec.min_train_rows:
        return None  # training refuses it with numbers
    share_rows = max(min(plan.config.group_rows, _MOST_SHARE_ROWS), _ROWS_PER_LIST * coarse.num_lists)
    return Spread(coarse, tuple(_shares(plan.embeddings["parts"], num_rows, share_rows)))


def _num_sample_rows(plan: BuildPlan) -> int:
    wanted = plan.config.train_rows or plan.spec.default_train_rows(plan.num_rows)
    return min(wanted, plan.num_rows) if plan.spec.needs_training else 0


def _shares(entries: Sequence[dict[str, Any]], num_rows: int, share_rows: int) -> Iterator[Share]:
    number, parts, held = 0, [], 0
    for entry, count in zip(entries, embeddings.sample_counts(entries, num_rows), strict=True):
        if count:
            parts.append((entry, count))
            held += count
        if held >= share_rows:
            yield Share(number, tuple(parts))
            number, parts, held = number + 1, [], 0
    if parts:
        yield Share(number, tuple(parts))


def train_quantizer(plan: BuildPlan, shares: Sequence[Receipt] = (), state: State | None = None) -> Receipt:
    """Train the quantizer, or what k-means over `shares` left of it, and put it in place, empty."""

    def make() -> Receipt:
        num_rows, seed = _num_sample_rows(plan), plan.config.seed
        if state is None:
            sample = embeddings.sample(
                plan.vectors, plan.embeddings["parts"], plan.dim, num_rows, seed, plan.num_threads
            )
            index = train(plan.spec, sample, seed, plan.num_threads)
        else:
            started = read(plan.work.local(_FRONT, state.front.sha256))
            kmeans.preset(started, _open(plan.work, state.centroids))
            index = train(plan.spec, _rows_of(plan, shares, _REST_ROWS), seed, plan.num_threads, started)
        facts = {"train_rows": num_rows, "quantizer": quantizer_digest(index)}
        return put_index(plan, plan.store, TRAINED, index, plan.build, facts)

    return ensure(plan.store, TRAINED, plan.build, make)


def draw_share(plan: BuildPlan, share: Share) -> Receipt:
    """Draw one share of the sample from the embeddings, in their storage type."""

    def make() -> Receipt:
        seed = plan.config.seed
        drawn = [embeddings.sample_part(plan.vectors, entry, plan.dim, n, seed) for entry, n in share.parts]
        return _put(plan, share.name, np.concatenate(drawn), {"num_rows": len(share)})

    return ensure(plan.work, share.name, _made_from(plan, share.name), make)


def start(plan: BuildPlan, shares: Sequence[Receipt]) -> State:
    """Train the transforms in front of the lists, if any, and draw the centroids to start from."""
    coarse = kmeans.coarse_of(new_index(plan.spec))
    assert coarse

    def make_front() -> Receipt:
        sample = _rows_of(plan, shares, _REST_ROWS)
        index = train_front(plan.spec, sample, plan.config.seed, plan.num_threads)
        return put_index(plan, plan.work, _FRONT, index, _made_from(plan, _FRONT), {})

    def make_centroids() -> Receipt:
        index = read(plan.work.local(_FRONT, front.sha256))
        vectors = kmeans.in_front(index, _rows_of(plan, shares, coarse.num_lists))
        return _put(plan, _centroids(0), kmeans.first_centroids(coarse, vectors), {"iteration": 0})

    front = ensure(plan.work, _FRONT, _made_from(plan, _FRONT), make_front)
    return State(front, ensure(plan.work, _centroids(0), _made_from(plan, _centroids(0)), make_centroids))


def find_state(plan: BuildPlan, spread: Spread) -> State | None:
    """Return the last state that an interrupted k-means left, None where it has to start."""
    front = find_done(plan.work, _FRONT, _made_from(plan, _FRONT))
    for iteration in reversed(range(spread.coarse.num_iterations + 1)) if front else ():
        name = _centroids(iteration)
        if front and (centroids := find_done(plan.work, name, _made_from(plan, name))):
            return State(front, centroids)
    return None


def sum_share(share: Receipt, plan: BuildPlan, state: State, on_gpu: bool = False) -> Receipt:
    """Add up the rows of one share by their nearest centroid, by torch where the process has a GPU to do it on."""
    name = f"sums-{state.iteration:03d}-{share.name.removeprefix('sample-').removesuffix('.npy')}.npz"
    by_torch = ["torch"] if on_gpu else []  # the last bits differ: sums of both would be neither's
    made_from = fingerprint([plan.build, name, state.centroids.sha256, share.sha256, *by_torch])

    def make() -> Receipt:
        index = read(plan.work.local(_FRONT, state.front.sha256))
        coarse = kmeans.coarse_of(index)
        assert coarse
        blocks = (kmeans.in_front(index, block) for block in _blocks(_open(plan.work, share)))
        centroids = np.ascontiguousarray(_open(plan.work, state.centroids))
        sums = kmeans.add_up(coarse, blocks, centroids, gpu_here() if on_gpu else None)
        write = _npz(sum_CD=sums.sum_CD, count_C=sums.count_C, objective=np.float64(sums.objective))
        return _put_file(plan.work, name, write, made_from, {})

    return ensure(plan.work, name, made_from, make)


def step(plan: BuildPlan, state: State, sums: Sequence[Receipt]) -> State:
    """Reduce the sums of all shares, in their order, to the next centroids; what led to them is then removed."""
    coarse = kmeans.coarse_of(new_index(plan.spec))
    assert coarse
    iteration, total = state.iteration + 1, None
    for receipt in sums:
        with np.load(plan.work.local(receipt.name, receipt.sha256), allow_pickle=False) as file:
            share = kmeans.Sums(file["sum_CD"], file["count_C"], float(file["objective"]))
        total = share if total is None else total.add(share)
    assert total
    centroids = kmeans.next_centroids(coarse, total, [plan.config.seed, iteration])
    facts = {"iteration": iteration, "objective": total.objective}
    done = State(state.front, _put(plan, _centroids(iteration), centroids, facts))
    for receipt in (*sums, state.centroids):
        plan.work.remove(receipt.name)
    return done


def clear(plan: BuildPlan) -> None:
    """Remove what training leaves once the quantizer is in place: the sample is as large as the corpus may be."""
    for name in plan.work.files():
        if _SCRATCH.fullmatch(name):
            plan.work.remove(name)


# Files


def _centroids(iteration: int) -> str:
    return f"centroids-{iteration:03d}.npy"


def _made_from(plan: BuildPlan, name: str) -> str:
    return fingerprint([plan.build, name])


def _put(plan: BuildPlan, name: str, array: Array, facts: dict[str, Any]) -> Receipt:
    return _put_file(plan.work, name, lambda file: np.save(file, array), _made_from(plan, name), facts)


def _put_file(store: Store, name: str, write: Callable[[Any], None], made_from: str, facts: dict[str, Any]) -> Receipt:
    with store.temporary() as temp:
        with open(temp, "wb") as file:
            write(file)
        return put_done(store, name, temp, made_from, facts)


def _npz(**arrays: Any) -> Callable[[Any], None]:
    return lambda file: np.savez(file, **arrays)


def _open(store: Store, receipt: Receipt) -> Array:
    return _map(store.url, receipt.name, receipt.sha256)


@lru_cache(maxsize=64)
def _map(url: str, name: str, sha256: str) -> Array:
    """Map a file, whose checksum is compared once a process: k-means comes back to its share in every iteration."""
    mapped: Array = np.load(Store(url).local(name, sha256), mmap_mode="r", allow_pickle=False)
    return mapped


def _blocks(rows_ND: Array, size: int = 16_384) -> Iterator[Array]:
    return (rows_ND[first : first + size] for first in range(0, len(rows_ND), size))


def _rows_of(plan: BuildPlan, shares: Sequence[Receipt], num_rows: int) -> Array:
    """Return (num_rows, D): rows of the sample drawn by chance, of every share as many as it is large."""
    counts = embeddings.sample_counts([receipt.facts for receipt in shares], num_rows)
    drawn = []
    for number, (receipt, count) in enumerate(zip(shares, counts, strict=True)):
        rng = np.random.default_rng([plan.config.seed, number, num_rows])
        rows = np.sort(rng.choice(receipt.facts["num_rows"], size=count, replace=False))
        drawn.append(_open(plan.work, receipt)[rows])
    return np.concatenate(drawn)
