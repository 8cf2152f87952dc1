"""The callers of the serving benchmark: many clients in one process, each with one question under way at a time.

With `rate` questions arrive at so many a second instead, whatever has become of those before.

    python -m tests.bench.serve_client JOB.json

Written on bare sockets so that the callers take as little as can be of the cores they share with the server. A `Load`
starts such a process and collects what it saw as `Answers`.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BROKEN, TIMED_OUT, UNEXPLAINED = 0, -1, -2
"""In place of a status: the connection was refused or broke off; no answer came in `_PATIENCE_SECONDS`; a refusal that
was no problem JSON, or did not say when to come back."""
_PATIENCE_SECONDS = 60.0
_RECONNECT_SECONDS = 0.05
_REFUSED = (429, 503)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_EXPLAINED = (
    re.compile(rb"\r\ncontent-type: *application/problem\+json", re.IGNORECASE),
    re.compile(rb"\r\nretry-after: *\d", re.IGNORECASE),
)
_TICK_SECONDS = 0.005
_PARTIAL = re.compile(rb'"complete": ?false')
_LINE = 1 << 20  # bytes a response's headers may take


@dataclass(frozen=True)
class Answers:
    """One entry for each request: when it was sent (time.time()), seconds until its answer was read, HTTP status or
    one of those above, the question's number, whether it said `complete: false`; and the bodies, where kept.

    caller_cores: CPU seconds of the callers' process by second.
    """

    started_N: npt.NDArray[np.float64]
    seconds_N: npt.NDArray[np.float64]
    status_N: npt.NDArray[np.int64]
    question_N: npt.NDArray[np.int64]
    partial_N: npt.NDArray[np.bool_]
    bodies: list[bytes]
    caller_cores: float = 0.0

    def __len__(self) -> int:
        return len(self.started_N)

    def where(self, mask_N: npt.NDArray[np.bool_]) -> Answers:
        kept = [self.bodies[i] for i in np.flatnonzero(mask_N)] if self.bodies else []
        arrays = (self.started_N, self.seconds_N, self.status_N, self.question_N, self.partial_N)
        return Answers(*(array[mask_N] for array in arrays), kept, self.caller_cores)

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        names = ("started_N", "seconds_N", "status_N", "question_N", "partial_N")
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(*arrays, [body for part in parts for body in part.bodies], max(part.caller_cores for part in parts))

    def sent_within(self, begin: float, end: float) -> Answers:
        return self.where((self.started_N >= begin) & (self.started_N < end))

    def good(self) -> Answers:
        return self.where(self.status_N == 200)

    @property
    def failed(self) -> int:
        return int((self.status_N != 200).sum())

    def statuses(self) -> dict[str, int]:
        return {str(status): number for status, number in sorted(Counter(self.status_N.tolist()).items())}

    def milliseconds(self, percentile: float) -> float:
        """Return a percentile of the latency of the answered requests; NaN when none was."""
        seconds = self.seconds_N[self.status_N == 200]
        return float(np.percentile(seconds, percentile)) * 1000 if len(seconds) else float("nan")

    def summary(self) -> dict[str, Any]:
        """Return queries/s over the time from the first to the last request, percentiles in ms, and error counts."""
        good = int((self.status_N == 200).sum())
        span = float((self.started_N + self.seconds_N).max() - self.started_N.min()) if len(self) else 0.0
        percentiles = {f"p{p}_ms": self.milliseconds(p) for p in (50, 95, 99)}
        slowest = {"slowest_ms": self.milliseconds(100)}
        told = {"statuses": self.statuses(), "partial": int(self.partial_N.sum()), "caller_cores": self.caller_cores}
        return {"rate": good / span if span else 0.0, **percentiles, **slowest, "failed": self.failed, **told}


class Load:
    """A client process at work from `with` to `finish()`, or until its `seconds` are over."""

    def __init__(self, folder: Path, address: str, questions: Path, **settings: Any) -> None:
        """settings: clients, seconds, warm_seconds, k, fields (of the requests), headers, keep, pause_refused, rate."""
        number = len(list(folder.glob("load-*.json")))
        self._job, self._answers, self._stop, self._log = (
            folder / f"load-{number:03d}.{end}" for end in ("json", "npz", "stop", "log")
        )
        host, _, port = address.removeprefix("http://").partition(":")
        target = {"host": host, "port": int(port), "questions": str(questions)}
        results = {"answers": str(self._answers), "stop": str(self._stop)}
        self._job.write_text(json.dumps({**target, **results, **settings}))

    def __enter__(self) -> Load:
        command = [sys.executable, "-m", "tests.bench.serve_client", str(self._job)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def finish(self) -> Answers:
        """Let the requests under way end, and return what all of them gave."""
        self._stop.touch()
        return self.wait()

    def wait(self) -> Answers:
        if self._process.wait():
            sys.exit(f"the client process failed: {self._log.read_text()[-2000:]}")
        found = np.load(self._answers)
        bodies, kept = found["bodies"].tobytes(), found["ends"]
        starts = [0, *kept[:-1].tolist()] if len(kept) else []
        split = [bodies[a:b] for a, b in zip(starts, kept.tolist(), strict=True)]
        names = ("started", "seconds", "status", "question", "partial")
        return Answers(*(found[name] for name in names), split, float(found["cores"]))


def ask(folder: Path, address: str, questions: Path, **settings: Any) -> Answers:
    """Run a load of so many seconds and return its answers."""
    with Load(folder, address, questions, **settings) as load:
        return load.wait()


class _Client:
    """One caller with one connection, which it opens again when it is lost."""

    def __init__(self, job: dict[str, Any], records: list[tuple[Any, ...]]) -> None:
        self.job, self.records = job, records
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def run(self, numbers: Iterator[int], requests: list[bytes], ends: asyncio.Event) -> None:
        while not ends.is_set():
            status = await self.ask(next(numbers) % len(requests), requests)
            if status in _REFUSED:
                await asyncio.sleep(self.job.get("pause_refused", 0))
            elif status <= 0:
                await asyncio.sleep(_RECONNECT_SECONDS)

    async def ask(self, number: int, requests: list[bytes]) -> int:
        """Send one request and record what came of it; return the status."""
        began, clock = time.time(), time.perf_counter()
        status, body = await self._exchange(requests[number])
        seconds = time.perf_counter() - clock
        partial = status == 200 and _PARTIAL.search(body) is not None
        self.records.append((began, seconds, status, number, partial, body if self.job.get("keep") else b""))
        return status

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await self._send(request)
        except TimeoutError:
            self._close()
            return TIMED_OUT, b""
        except (OSError, EOFError, ValueError):
            self._close()
            return BROKEN, b""

    async def _send(self, request: bytes) -> tuple[int, bytes]:
        if self.writer is None or self.reader is None:
            target = self.job["host"], self.job["port"]
            self.reader, self.writer = await asyncio.open_connection(*target, limit=_LINE)
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        body = await _body(self.reader, head)
        if _CLOSES.search(head):
            self._close()
        status = int(head[9:12])
        explained = status not in _REFUSED or all(pattern.search(head) for pattern in _EXPLAINED)
        return status if explained else UNEXPLAINED, body

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Return the body: of a length told before, in chunks, or up to the connection's end."""
    if length := _LENGTH.search(head):
        return await reader.readexactly(int(length[1]))
    if not _CHUNKED.search(head):
        if not _CLOSES.search(head):
            raise ValueError("the response does not tell how it ends")
        return await reader.read()
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(pieces)


def _requests(job: dict[str, Any]) -> list[bytes]:
    """Return the bytes of one request for each question."""
    headers = {"Host": f"{job['host']}:{job['port']}", "Content-Type": "application/json", **job.get("headers", {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    made = []
    for question in json.loads(Path(job["questions"]).read_text()):
        body = json.dumps({"query": question, "k": job.get("k", 10), **job.get("fields", {})}).encode()
        made.append(f"POST /search HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


async def _arrive(
    free: list[_Client], rate: float, numbers: Iterator[int], requests: list[bytes], ends: asyncio.Event
) -> None:
    """Send `rate` requests a second, each by a caller that is free; none is sent while all of them wait."""
    tasks: set[asyncio.Task[None]] = set()

    async def ask(caller: _Client) -> None:
        await caller.ask(next(numbers) % len(requests), requests)
        free.append(caller)

    sent, began = 0, time.perf_counter()
    while not ends.is_set():
        due = int((time.perf_counter() - began) * rate) - sent
        for _ in range(min(due, len(free))):
            task = asyncio.create_task(ask(free.pop()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        sent += due
        await asyncio.sleep(_TICK_SECONDS)
    await asyncio.gather(*tasks)


async def _run(job: dict[str, Any]) -> tuple[list[tuple[Any, ...]], float]:
    """Return the records after the warm-up, and the cores that they took of this process."""
    records: list[tuple[Any, ...]] = []
    ends, numbers, requests = asyncio.Event(), count(job.get("first", 0)), _requests(job)
    callers = [_Client(job, records) for _ in range(job["clients"])]
    if job.get("rate"):
        clients = [asyncio.create_task(_arrive(callers, job["rate"], numbers, requests, ends))]
    else:
        clients = [asyncio.create_task(caller.run(numbers, requests, ends)) for caller in callers]
    await asyncio.sleep(job.get("warm_seconds", 0))
    begin, cpu, stop = time.time(), time.process_time(), Path(job["stop"])
    while time.time() - begin < job["seconds"] and not stop.exists():
        await asyncio.sleep(0.1)
    ends.set()
    await asyncio.gather(*clients)
    cores = (time.process_time() - cpu) / (time.time() - begin)
    return [record for record in records if record[0] >= begin], cores


def _save(records: list[tuple[Any, ...]], cores: float, path: str) -> None:
    started, seconds, status, question, partial, bodies = zip(*records, strict=True) if records else [()] * 6
    ends = np.cumsum([len(body) for body in bodies], dtype=np.int64) if any(bodies) else np.zeros(0, np.int64)
    np.savez(
        path,
        started=np.array(started, np.float64),
        seconds=np.array(seconds, np.float64),
        status=np.array(status, np.int64),
        question=np.array(question, np.int64),
        partial=np.array(partial, np.bool_),
        bodies=np.frombuffer(b"".join(bodies), np.uint8),
        ends=ends,
        cores=cores,
    )


def main() -> None:
    import uvloop

    job = json.loads(Path(sys.argv[1]).read_text())
    _save(*uvloop.run(_run(job)), job["answers"])


if __name__ == "__main__":
    main()
