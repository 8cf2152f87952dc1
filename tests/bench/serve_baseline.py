"""The obvious alternative, written with care: one FastAPI process with sentence-transformers and FAISS.

    python -m tests.bench.serve_baseline JOB.json

Imports nothing of this project but reads the same index and passages. Settings: dtype (of the model), threads (that
answer requests, each with its share of the cores), batches (requests that wait are encoded and searched together, up to
so many, on one thread). The answers carry what ours do: rows, scores, ids, titles and texts.
"""

# FastAPI reads the types at run time, so they are real objects (no `from __future__ import annotations` here).

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field
from sentence_transformers import SentenceTransformer


class Query(BaseModel):
    query: str = Field(min_length=1)
    k: int = Field(10, ge=1, le=1000)


class Searcher:
    """Model, index and passages in one process."""

    def __init__(self, job: dict[str, Any]) -> None:
        setting = job["setting"]
        dtype = {"model_kwargs": {"dtype": getattr(torch, setting["dtype"])}} if "dtype" in setting else {}
        self.model = SentenceTransformer(job["checkpoint"], device="cpu", **dtype)
        self.index = faiss.read_index(job["index"], faiss.IO_FLAG_MMAP)
        self.passages = pa.ipc.open_file(pa.memory_map(job["passages"])).read_all()
        self.share = max(1, (os.cpu_count() or 1) // setting.get("threads", 1))

    def prepare_thread(self) -> None:
        torch.set_num_threads(self.share)
        faiss.omp_set_num_threads(self.share)

    def search(self, queries: list[Query]) -> list[bytes]:
        """Return the JSON answer of each query."""
        emb_BD = self.model.encode([q.query for q in queries], convert_to_numpy=True, show_progress_bar=False)
        score_BK, row_BK = self.index.search(emb_BD.astype("float32"), max(q.k for q in queries))
        found = zip(queries, score_BK.tolist(), row_BK.tolist(), strict=True)
        return [self._answer(rows[: q.k], scores[: q.k]) for q, scores, rows in found]

    def _answer(self, rows: list[int], scores: list[float]) -> bytes:
        passages = self.passages.take(rows).to_pylist()
        hits = [{"row": r, "score": s, **p} for r, s, p in zip(rows, scores, passages, strict=True)]
        return json.dumps({"hits": hits}).encode()


class Batcher:
    """Answers requests one batch after the other: those that came while the last was under way make the next."""

    def __init__(self, searcher: Searcher, pool: ThreadPoolExecutor, most: int) -> None:
        self.searcher, self.pool, self.most = searcher, pool, most
        self.waiting: asyncio.Queue[tuple[Query, asyncio.Future[bytes]]] = asyncio.Queue()

    async def run(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.most and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            queries = [query for query, _ in batch]
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self.pool, self.searcher.search, queries)
            except Exception as error:  # whatever it is, it is the answer of these requests and of no others
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    async def search(self, query: Query) -> bytes:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((query, future))
        return await future


def build(job: dict[str, Any]) -> FastAPI:
    searcher, setting = Searcher(job), job["setting"]
    threads, most = setting.get("threads", 1), setting.get("batches", 0)
    pool = ThreadPoolExecutor(threads, initializer=searcher.prepare_thread)
    batcher = Batcher(searcher, pool, most)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/search")
    async def search(query: Query) -> Response:
        if most:
            content = await batcher.search(query)
        else:
            loop = asyncio.get_running_loop()
            content = (await loop.run_in_executor(pool, searcher.search, [query]))[0]
        return Response(content, media_type="application/json")

    return app


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    uvicorn.run(build(job), host="127.0.0.1", port=job["port"], log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
