"""Queries of concurrent requests, encoded and searched together on one thread.

Nobody waits for a batch to fill: what arrives while one is at work is the next one. So a lone query is answered at
once, and under load batches grow by themselves, up to a number of tokens; a request that brings more takes its turn
again and again, between the others.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import BusyError
from pipelines.filters import Filter
from pipelines.index.structure import use_threads
from pipelines.models.base import Tokens
from pipelines.retrieve import Retriever

Array = npt.NDArray[Any]


Wanted = tuple[int, Filter | None]
"""k, and the filter that hits have to satisfy: what may differ between the requests of one batch."""


@dataclass
class Answered:
    """What came of one request's B queries: vectors (B, D), and scores and rows (B, K) where shards are here.

    seconds: of waiting, encoding and searching, the last two for the whole batches it was part of. num_batched: the
    queries of the largest of them.
    """

    emb_BD: Array
    score_BK: Array | None
    row_BK: Array | None
    seconds: dict[str, float]
    num_batched: int


@dataclass
class _Job:
    """One request under way. done: how many of its queries are."""

    retriever: Retriever
    texts: list[str]
    wanted: Wanted
    deadline: float
    future: asyncio.Future[Answered]
    loop: asyncio.AbstractEventLoop
    born: float = field(default_factory=time.perf_counter)
    tokens: Tokens | None = None
    done: int = 0
    pieces: list[Answered] = field(default_factory=list)

    def settle(self, result: Answered | BaseException) -> None:
        """Hand the result to whoever waits, on their loop; they may be gone."""

        def tell() -> None:
            if self.future.done():
                return
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(tell)


class Batcher:
    """Runs batches one after the other on a thread of its own, which ends with `close`."""

    def __init__(self, max_tokens: int, num_threads: int) -> None:
        """max_tokens: of one batch. num_threads: that encoding and searching use."""
        self._max_tokens, self._num_threads = max_tokens, num_threads
        self._arrivals: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    async def run(self, retriever: Retriever, texts: list[str], wanted: Wanted, deadline: float) -> Answered:
        """Encode the texts by the retriever's encoder, and search its shards if it has any here.

        wanted: k, and a filter or None. deadline: time.monotonic(). Raises BusyError when their turn comes
        later than that.
        """
        loop = asyncio.get_running_loop()
        job = _Job(retriever, texts, wanted, deadline, loop.create_future(), loop)
        self._arrivals.put(job)
        return await job.future

    def close(self) -> None:
        """Let the thread end once the batch at work is done."""
        self._arrivals.put(None)

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self._num_threads)
        waiting: deque[_Job] = deque()
        while self._receive(waiting):
            batch = self._choose(waiting)
            if not batch:
                continue
            self._try(batch)
            waiting.extend(job for job, _ in batch if job.done < len(job.texts))
            del batch  # it holds the retriever, which may be unloaded while this thread waits

    def _try(self, batch: list[tuple[_Job, int]]) -> None:
        """Run a batch; when it fails, each of its jobs alone, so that only the guilty one does."""
        try:
            self._run(batch)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._try([one])
                return
            job, _ = batch[0]
            job.settle(error)
            job.done = len(job.texts)

    def _receive(self, waiting: deque[_Job]) -> bool:
        """Add all that has arrived; wait for something when there is nothing to do. False: to end."""
        try:
            while True:
                job = self._arrivals.get(block=not waiting)
                if job is None:
                    return False
                waiting.append(job)
                if self._arrivals.empty():
                    return True
        except queue.Empty:
            return True

    def _choose(self, waiting: deque[_Job]) -> list[tuple[_Job, int]]:
        """Take from the front what one encoder can do in one batch: (job, how many of its queries)."""
        chosen: list[tuple[_Job, int]] = []
        left, passed = self._max_tokens, list[_Job]()
        while waiting and left > 0:
            job = waiting.popleft()
            if chosen and job.retriever is not chosen[0][0].retriever:
                passed.append(job)  # of another version: its batch is next
                continue
            if not self._is_ready(job):
                continue
            length_N = job.tokens.lengths[job.done :] if job.tokens is not None else np.zeros(0, np.int64)
            fit = int(np.searchsorted(np.cumsum(length_N), left, side="right"))
            count = max(fit, 0 if chosen else 1)
            if count:
                chosen.append((job, count))
            else:
                passed.append(job)
            left -= int(length_N[: max(fit, 1)].sum())
        waiting.extendleft(reversed(passed))
        return chosen

    def _is_ready(self, job: _Job) -> bool:
        """Tokenise a job that is new. False when nobody waits for it any more, or it is refused."""
        if job.future.cancelled():
            return False
        if time.monotonic() > job.deadline:
            job.settle(
                BusyError("the time was over before the query's turn came", hint="ask again, or allow more time")
            )
            return False
        if job.tokens is None:
            try:
                job.tokens = job.retriever.encoder.tokeniser.queries(job.texts)
            except Exception as error:
                job.settle(error)
                return False
        return True

    def _run(self, batch: list[tuple[_Job, int]]) -> None:
        """Encode and search one batch, and settle the jobs that it completes."""
        use_threads(self._num_threads)
        retriever = batch[0][0].retriever
        clock = [time.perf_counter()]
        emb_BD = retriever.encoder.encode_tokens(_together([_next_tokens(job, count) for job, count in batch]))
        clock.append(time.perf_counter())
        found = _search(retriever, emb_BD, batch)
        clock.append(time.perf_counter())
        spent = {"encode": clock[1] - clock[0], "search": clock[2] - clock[1]}
        start = 0
        for job, count in batch:
            rows = slice(start, start + count)
            score_BK, row_BK = (array[rows] for array in found[job.wanted]) if found else (None, None)
            waited = {"wait": clock[0] - job.born} if not job.pieces else {}
            job.pieces.append(Answered(emb_BD[rows], score_BK, row_BK, {**waited, **spent}, len(emb_BD)))
            job.done, start = job.done + count, start + count
            if job.done == len(job.texts):
                job.settle(_whole(job.pieces))


def _next_tokens(job: _Job, count: int) -> Tokens:
    assert job.tokens is not None  # _choose has seen to it
    return job.tokens.rows(job.done, job.done + count)


def _together(parts: list[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part.ids for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    types = [part.type_ids for part in parts if part.type_ids is not None]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Tokens(ids, offsets, np.concatenate(types) if types else None)


def _search(retriever: Retriever, emb_BD: Array, batch: list[tuple[_Job, int]]) -> dict[Wanted, tuple[Array, Array]]:
    """Return (score_BK, row_BK) by what was wanted, its rows filled where a query wanted that.

    Each k by itself, since graphs find other rows when asked for more of them. Nothing where the shards are elsewhere.
    """
    if not retriever.shards:
        return {}
    kinds = {job.wanted: number for number, (job, _) in enumerate(batch)}
    kind_B = np.repeat([kinds[job.wanted] for job, _ in batch], [count for _, count in batch])
    found = {}
    for (k, where), number in kinds.items():
        mine = kind_B == number
        score_BK, row_BK = np.full((len(emb_BD), k), -np.inf, np.float32), np.full((len(emb_BD), k), -1, np.int64)
        score_BK[mine], row_BK[mine] = retriever.search_vectors(emb_BD[mine], k, where)
        found[k, where] = score_BK, row_BK
    return found


def _whole(pieces: list[Answered]) -> Answered:
    """Return the pieces of one request as one."""
    if len(pieces) == 1:
        return pieces[0]
    names = dict.fromkeys(name for piece in pieces for name in piece.seconds)
    return Answered(
        np.concatenate([piece.emb_BD for piece in pieces]),
        _joined([piece.score_BK for piece in pieces]),
        _joined([piece.row_BK for piece in pieces]),
        {name: sum(piece.seconds.get(name, 0.0) for piece in pieces) for name in names},
        max(piece.num_batched for piece in pieces),
    )


def _joined(arrays: list[Array | None]) -> Array | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
