"""How fast a run encoded, against what its devices could do, and what held it back.

Every part leaves a record of its work: who read, encoded and wrote it, when and for how long. `summarise` folds the
records of one run into the figures of the embeddings' manifest. Moments are seconds since the epoch on the clock of the
machine where the work was done; clocks that differ by less than a part takes do no harm.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt

_MOSTLY = 0.5  # a stage that is busy for less than half of the time is not what the run waits for
_LEAST_SECONDS = 1e-3  # a shorter time is no measurement
BOTTLENECKS = ("encoder", "reading and tokenising", "writing", "start-up", "passing parts on")
"""What a run can wait for most. "passing parts on": every stage mostly waited, for parts from the one before it."""


@dataclass(frozen=True)
class Step:
    """What one worker did for one part. began: seconds since the epoch."""

    worker: str
    began: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """The record of one encoded part.

    computed_tokens: with padding. flops: of the matrix products that its tokens need, padding left out; None when they
    cannot be counted. device: what the encoder computes on; workers may share one. limit_flops: FLOP/s of the fastest
    matrix product there; None with `flops`.
    """

    num_rows: int
    num_tokens: int
    computed_tokens: int
    flops: float | None
    limit_flops: float | None
    device: str
    read: Step
    encode: Step
    write: Step

    @classmethod
    def parse(cls, record: dict[str, Any]) -> Work:
        """Return the work of a JSON record, as `asdict` makes it."""
        steps = {name: Step(**record[name]) for name in ("read", "encode", "write")}
        return cls(**{**record, **steps})


@dataclass(frozen=True)
class Throughput:
    """The figures of one run; parts that were in place before it do not count.

    seconds: from the start of the stage to its end. start_seconds: until the first encoder had its first part.
    padding_share: of the tokens computed. busy shares: of the time of the stage's workers between the first part's and
    the last part's encoding. achieved_flops: FLOP/s of all encoders while busy; limit_flops: of their devices.
    """

    num_parts: int
    num_rows: int
    num_tokens: int
    seconds: float
    start_seconds: float
    num_encoders: int
    num_devices: int
    device: str
    compute: str
    tokens_per_second: float
    rows_per_second: float
    padding_share: float
    encoder_busy_share: float
    reader_busy_share: float
    writer_busy_share: float
    achieved_flops: float | None
    limit_flops: float | None
    limit_share: float | None
    bottleneck: str


class Meter:
    """What one encoder process knows of its parts: what they cost, and what its device could do at most."""

    def __init__(self, tower: Any, compute: str, device: str) -> None:
        import torch

        from pipelines.models.cost import count_flops, measure_matrix_limit

        self.cost = count_flops(tower)
        self.limit = measure_matrix_limit(device, compute, torch.get_num_threads()) if self.cost else None
        self.device = this_device(device)

    def record(self, length_N: npt.NDArray[Any], computed_tokens: int, began: float) -> dict[str, Any]:
        """Return what is known of a part's Work when its texts are encoded, and the moment they `began` to be.

        length_N: (N,) its tokens. computed_tokens: with padding; fewer than the tokens where somebody else computed.
        """
        num_tokens = int(length_N.sum())
        return {
            "num_rows": len(length_N),
            "num_tokens": num_tokens,
            "computed_tokens": max(num_tokens, computed_tokens),
            "flops": self.cost.of(length_N) if self.cost else None,
            "limit_flops": self.limit,
            "device": self.device,
            "began": began,
        }


def timed(began: float) -> dict[str, Any]:
    """Return the record of a step of this process that began at the moment `began` and ends now."""
    return asdict(Step(f"{socket.gethostname()}:{os.getpid()}", round(began, 3), round(time.time() - began, 4)))


def this_device(device: str) -> str:
    """Return a name for what this process computes on: the GPU it was given, or itself for a CPU's threads."""
    host = socket.gethostname()
    if device == "cpu":
        return f"cpu {host}:{os.getpid()}"
    return f"{device} {host}:{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"


def summarise(works: Sequence[Work], began: float, seconds: float, compute: str) -> dict[str, Any] | None:
    """Return the Throughput of a run as a JSON-able dict; None when it encoded nothing.

    works: its parts'. began: the moment the stage began, since the epoch. compute: the encoder's arithmetic.
    """
    if not works:
        return None
    encodes = [work.encode for work in works]
    first, last = min(s.began for s in encodes), max(s.began + s.seconds for s in encodes)
    num_encoders, encoder_busy = busy_share(encodes, first, last)
    _, reader_busy = busy_share([work.read for work in works], first, last)
    _, writer_busy = busy_share([work.write for work in works], first, last)
    start_seconds = min(max(0.0, first - began), seconds)
    tokens, computed = sum(w.num_tokens for w in works), sum(w.computed_tokens for w in works)
    rows = sum(w.num_rows for w in works)
    devices = _devices(works)
    achieved, limit = _flops(works, num_encoders, devices)
    shares = {"encoder": encoder_busy, "reading and tokenising": reader_busy, "writing": writer_busy}
    found = Throughput(
        num_parts=len(works),
        num_rows=rows,
        num_tokens=tokens,
        seconds=round(seconds, 3),
        start_seconds=round(start_seconds, 3),
        num_encoders=num_encoders,
        num_devices=min(num_encoders, len(devices)),
        device=works[0].device.partition(" ")[0],
        compute=compute,
        tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
        rows_per_second=round(rows / max(seconds, 1e-9), 1),
        padding_share=round(1 - tokens / computed, 4) if computed else 0.0,
        encoder_busy_share=round(encoder_busy, 4),
        reader_busy_share=round(reader_busy, 4),
        writer_busy_share=round(writer_busy, 4),
        achieved_flops=achieved,
        limit_flops=limit,
        limit_share=None if achieved is None or not limit else round(achieved / limit, 4),
        bottleneck=_bottleneck(shares, start_seconds, seconds),
    )
    return asdict(found)


def busy_share(steps: Sequence[Step], start: float, end: float) -> tuple[int, float]:
    """Return (workers, busy share) of one stage between two moments.

    workers: the most that were there at once. A worker's time begins with its first part, when that is later than
    `start`, and lasts to the `end`: waiting for the others counts. One that another replaced (as many are there at once
    as before) has its time end with its last part.
    """
    mine: dict[str, list[Step]] = {}
    for step in steps:
        mine.setdefault(step.worker, []).append(step)
    there = [(min(s.began for s in own), max(s.began + s.seconds for s in own)) for own in mine.values()]
    workers = _most_at_once(there)
    there.sort(key=lambda window: window[1], reverse=True)
    windows = [(began, end if i < workers else last) for i, (began, last) in enumerate(there)]
    time_there = sum(_within(began, until, start, end) for began, until in windows)
    busy = sum(_within(s.began, s.began + s.seconds, start, end) for s in steps)
    return workers, min(1.0, busy / time_there) if time_there > 0 else 0.0


def _within(began: float, until: float, start: float, end: float) -> float:
    return max(0.0, min(until, end) - max(began, start))


def _most_at_once(windows: Sequence[tuple[float, float]]) -> int:
    changes = sorted([(began, 1) for began, _ in windows] + [(until, -1) for _, until in windows])
    most = now = 0
    for _, change in changes:  # at one moment, those that leave come first
        now += change
        most = max(most, now)
    return max(most, 1)


def _devices(works: Sequence[Work]) -> dict[str, float]:
    """Return the limit of each device that took part, 0 where it was not measured."""
    limits: dict[str, float] = {}
    for work in works:
        limits[work.device] = max(limits.get(work.device, 0.0), work.limit_flops or 0.0)
    return limits


def _flops(works: Sequence[Work], num_encoders: int, limits: dict[str, float]) -> tuple[float | None, float | None]:
    """Return FLOP/s (achieved while busy, limit) of all encoders together; None for what is not known of every part.

    Of devices that came one after the other, as a restarted worker's do, the fastest count.
    """
    flops = [work.flops for work in works if work.flops is not None]
    seconds = sum(work.encode.seconds for work in works)
    if len(flops) < len(works) or seconds < _LEAST_SECONDS:
        return None, None
    limit = sum(sorted(limits.values(), reverse=True)[:num_encoders])
    return float(round(sum(flops) / seconds * num_encoders)), float(round(limit)) or None


def _bottleneck(shares: dict[str, float], start_seconds: float, seconds: float) -> str:
    """Return what the run waited for most: its start, or the stage whose workers had the least time to spare."""
    if start_seconds > _MOSTLY * seconds:
        return "start-up"
    busiest = max(shares, key=lambda stage: shares[stage])
    return busiest if shares[busiest] >= _MOSTLY else "passing parts on"
