"""What stands behind the gateway when it fails or is late: the rest of an answer still counts."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from cluster.serve_gateway import _stage_result
from cluster.serve_stages import Shard, ShardDeployments, ShardGroup
from pipelines.errors import BusyError, InputError


async def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), BackPressureError(num_queued_requests=9, max_queued_requests=9)]
)
def test_a_stage_that_fails_is_left_out(error: Exception) -> None:
    assert asyncio.run(_stage_result("rerank", _raise(error))) is None


def test_what_a_stage_says_of_the_request_is_told() -> None:
    with pytest.raises(InputError, match="no text"):
        asyncio.run(_stage_result("rerank", _raise(InputError("no text"))))


class _Flat:
    """A shard that knows one row."""

    searched = 0

    def search(self, queries_BD: Any, k: int, where: Any) -> Any:
        self.searched += 1
        return np.ones((len(queries_BD), k), np.float32), np.zeros((len(queries_BD), k), np.int64)


def _shard(flat: _Flat) -> Any:
    kind = Shard.func_or_class  # type: ignore[attr-defined]
    shard = object.__new__(kind)
    group = ShardGroup({"name": "cats", "version": "1", "num_shards": 1}, {0: flat})  # type: ignore[dict-item]
    shard.versions = SimpleNamespace(now=SimpleNamespace(loaded={("cats", "1"): group}))
    shard.device_watch = nullcontext()
    return shard


def test_a_shard_does_not_search_for_who_has_left() -> None:
    flat, query_BD = _Flat(), np.zeros((1, 4), np.float32)
    shard = _shard(flat)
    score_BK, row_BK = asyncio.run(shard.search("cats", "1", query_BD, 1, None, 60.0))
    assert (score_BK.tolist(), row_BK.tolist(), flat.searched) == ([[1.0]], [[0]], 1)
    with pytest.raises(BusyError, match="the time was over"):
        asyncio.run(shard.search("cats", "1", query_BD, 1, None, -1.0))
    assert flat.searched == 1


def test_shards_are_told_how_long_they_are_waited_for() -> None:
    told: list[float] = []

    class Handle:
        @property
        def search(self) -> Any:
            return self

        def remote(self, alias: str, version: str, queries_BD: Any, k: int, where: Any, seconds: float) -> Any:
            told.append(seconds)
            return _found(k)

    async def _found(k: int) -> Any:
        return np.ones((1, k), np.float32), np.zeros((1, k), np.int64)

    async def ask() -> Any:
        manifest = {"name": "cats", "version": "1", "num_shards": 2}
        shards = ShardDeployments([Handle(), Handle()], 5.0)
        now = asyncio.get_running_loop().time()
        near = await shards.search(manifest, np.zeros((1, 4)), (1, None), now + 1.0)
        far = await shards.search(manifest, np.zeros((1, 4)), (1, None), now + 3600.0)
        return near[1], far[1]

    assert asyncio.run(ask()) == ([], [])
    assert all(0 < seconds <= 1.0 for seconds in told[:2])
    assert all(4.0 < seconds <= 5.0 for seconds in told[2:])
