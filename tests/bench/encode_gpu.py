"""Encoding on one GPU: the engine, and the pipeline's own actor, against sentence-transformers on the same card.

    python -m tests.bench.encode_gpu --data DATA --minilm DIRECTORY [--only bert,cross,...] [--out FILE]

DATA holds wiki/psgs_w100.tsv.gz and nq/questions.jsonl.gz; DIRECTORY is all-MiniLM-L6-v2, in any dtype. Neither Ray nor
FAISS is needed. bert: a BERT-base of random weights in DPR's layout. cross: cross-encoders of the sizes that
sentence-transformers publishes rates for, of random weights, tokens ready. rerank: one of them from texts. minilm: how
near fp16 and bf16 come to fp32 on real weights. attention: our kernel beside torch's.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tests.bench.common import best_of
from tests.bench.encode_models import SIZES, write_bert_base, write_random_cross_encoder

Array = npt.NDArray[Any]
Result = dict[str, Any]

DEVICE = "cuda"
WIKIPEDIA = 21_015_324  # passages of DPR's psgs_w100.tsv
_PART = 16_384  # passages, the pipeline's default
_CHECKED = 1024  # texts whose vectors are compared with fp32's
_PEER_BATCHES = (32, 64, 128, 256)  # 32 is the peers' default
_SLICE = 2048  # pairs that a process tokenises at once
_TOKENISERS = max(1, (os.cpu_count() or 1) - 2)

_HEADS, _REPEATS = 12, 20
_PATIENCE = 120.0  # seconds in which the other processes must be ready

_encoder: Any = None
_barrier: Any = None


@dataclass(frozen=True)
class Texts:
    titles: list[str]
    texts: list[str]
    questions: list[str]

    def cut(self, count: int) -> Texts:
        """Return `count` passages: these again and again."""
        take = [i % len(self.texts) for i in range(count)]
        return Texts([self.titles[i] for i in take], [self.texts[i] for i in take], self.questions)


def read_texts(data: Path, limit: int) -> Texts:
    with gzip.open(data / "wiki" / "psgs_w100.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = [row for row, _ in zip(csv.DictReader(lines, delimiter="\t"), range(limit), strict=False)]
    with gzip.open(data / "nq" / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    return Texts([row["title"] for row in rows], [row["text"] for row in rows], questions)


def spec_of(passage: str, query: str, compute: str) -> Any:
    """Return the EncoderSpec of two directories, as a config with these would give it."""
    from pipelines.encode import resolve

    own = {"checkpoint": passage, "query_checkpoint": query, "compute": compute}
    config = SimpleNamespace(
        **own, similarity=None, formatting=None, max_length=None, storage="fp16", token_budget=None
    )
    return resolve(config, on_gpu=True)  # type: ignore[arg-type]


def bert(texts: Texts, minilm: str, folder: Path, count: int) -> Result:
    from pipelines.encode import Encoder
    from pipelines.models.cost import measure_matrix_limit

    paths = write_bert_base(folder, minilm)
    spec = spec_of(paths["passage"], paths["query"], "fp16")
    encoder = Encoder(spec, "passage", DEVICE)
    ready = time.perf_counter()
    tokens = encoder.tokeniser.passages(*_passages(texts.cut(count)))
    tokenised = count / (time.perf_counter() - ready)
    limit = measure_matrix_limit(DEVICE, "bf16", 1)
    rates = budgets(encoder)
    flops = flops_of(encoder, tokens.lengths)
    seconds = best_of(lambda: encoder.encode_tokens(tokens))
    rate, share = count / seconds, flops / seconds / limit
    print(f"bert, tokens ready: {len(tokens.ids) / seconds:,.0f} tokens/s, {rate:,.0f} passages/s of "
          f"{len(tokens.ids) / count:.0f} tokens, {flops / seconds / 1e12:.0f} of {limit / 1e12:.0f} TFLOP/s: "
          f"{share:.3f}; budget {encoder.engine.budget}, tokenising {tokenised:,.0f}/s", flush=True)  # fmt: skip
    found = {"tokens_per_second": len(tokens.ids) / seconds, "passages_per_second": rate, "limit_share": share,
             "limit_flops": limit, "tokens_a_passage": len(tokens.ids) / count, "budget": encoder.engine.budget,
             "tokenised_per_second": tokenised, "budgets": rates,
             "min_cosine": check(encoder, spec_of(paths["passage"], paths["query"], "fp32"), tokens)}  # fmt: skip
    found["actors"] = {str(number): actors(spec, tokens, number) for number in (1, 2)}
    best = max(actor["passages_per_second"] for actor in found["actors"].values())
    found["wikipedia_minutes"] = WIKIPEDIA / best / 60
    found["peer"] = peer(paths["peer"], [f"{t} [SEP] {x}" for t, x in zip(*_passages(texts), strict=True)])
    found["ratio_default"] = best / found["peer"]["32"]
    found["ratio_best"] = best / max(found["peer"].values())
    return found


def _passages(texts: Texts) -> tuple[list[str], list[str]]:
    return texts.titles, texts.texts


def budgets(encoder: Any) -> dict[str, float]:
    """Let the engine measure its budget, as the pipeline does; return the tokens/s of each it tried."""
    from pipelines.encode import USUAL_TEXT

    text, engine, rates = encoder.tokeniser.passages([""], [USUAL_TEXT]), encoder.engine, {}
    for budget, rate, _ in engine._rates(text):
        rates[str(budget)] = rate
    began = time.perf_counter()
    engine.measure_budget(text)
    print(f"  budgets: { ({k: f'{v:,.0f}' for k, v in rates.items()}) }, in {time.perf_counter() - began:.1f} s")
    return rates


def flops_of(encoder: Any, length_N: Array) -> float:
    from pipelines.models.cost import count_flops

    cost = count_flops(encoder.tower)
    assert cost is not None
    return cost.of(length_N)


def check(encoder: Any, exact: Any, tokens: Any) -> float:
    """Return the smallest cosine between the encoder's vectors and those of fp32 and transformers' own layers."""
    from pipelines.encode import Encoder

    few = tokens.rows(0, _CHECKED)
    own = encoder.encode_tokens(few)
    reference = Encoder(exact, "passage", DEVICE).encode_tokens(few)
    cosine_N = (own * reference).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(reference, axis=1)
    print(f"  smallest cosine to fp32 of {len(few)}: {cosine_N.min():.6f}", flush=True)
    return float(cosine_N.min())


def actors(spec: Any, tokens: Any, number: int) -> Result:
    """Run the pipeline's own encoder actor, parts of tokens in, bytes of Parquet out, in `number` processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(number)
    with (
        tempfile.TemporaryDirectory() as root,
        ProcessPoolExecutor(number, context, initializer=_share, initargs=(barrier,)) as pool,
    ):
        found = list(pool.map(_act, *([each] * number for each in (spec, tokens.ids, tokens.offsets, root))))
    rate = len(tokens) * number / (max(f["ended"] for f in found) - min(f["began"] for f in found))
    print(f"  {number} actor(s) on the card: {rate:,.0f} passages/s, ready after {found[0]['startup']:.1f} s; "
          f"all Wikipedia in {WIKIPEDIA / rate / 60:.1f} min", flush=True)  # fmt: skip
    return {"passages_per_second": rate, "startup_seconds": found[0]["startup"]}


def _share(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _act(spec: Any, ids: Array, offsets: Array, root: str) -> dict[str, float]:
    from cluster.encode_workers import EncoderActor
    from pipelines.models.base import Tokens
    from pipelines.storage import Store

    started = time.time()
    actor = EncoderActor(spec, DEVICE, 1, Store(root), 0)
    tokens = Tokens(ids, offsets)
    parts = [_part(tokens, start) for start in range(0, len(tokens), _PART)]
    actor(parts[0])
    ready = time.time()
    _barrier.wait(_PATIENCE)
    began = time.time()
    for part in parts:
        actor(part)
    return {"began": began, "ended": time.time(), "startup": ready - started}


def _part(tokens: Any, start: int) -> pa.Table:
    """Return a part as the reader passes it to the encoder."""
    few = tokens.rows(start, min(start + _PART, len(tokens)))

    def one(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values, kind))

    names = pa.array([[str(start + i) for i in range(len(few))]], pa.list_(pa.string()))
    return pa.table({"part": [start // _PART], "id": names, "tokens": one(few.ids, pa.int32()),
                     "offsets": one(few.offsets, pa.int64()), "types": pa.nulls(1, pa.large_list(pa.int8())),
                     "read": [json.dumps({"worker": "bench", "began": 0.0, "seconds": 0.0})]})  # fmt: skip


def peer(directory: str, texts: list[str]) -> dict[str, float]:
    """Return the passages/s of sentence-transformers in fp16, by batch size."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(directory, device=DEVICE, model_kwargs={"dtype": torch.float16})
    return peer_rates("encode", lambda some, size: model.encode(some, batch_size=size), texts)


def peer_rates(what: str, run: Callable[[list[Any], int], Any], texts: list[Any]) -> dict[str, float]:
    rates = {}
    for size in _PEER_BATCHES:
        run(texts[: 2 * size], size)
        began = time.perf_counter()
        run(texts, size)
        rates[str(size)] = len(texts) / (time.perf_counter() - began)
        print(f"  sentence-transformers fp16, {what}, batch {size}: {rates[str(size)]:,.0f}/s", flush=True)
    return rates


def cross(texts: Texts, minilm: str, folder: Path, count: int) -> Result:
    """Measure every published size; the peer at MiniLM-L6."""

    from pipelines.models import cross_encoder
    from pipelines.schema import Passage

    many = texts.cut(count)
    passages = [Passage(str(i), text, title) for i, (title, text) in enumerate(zip(*_passages(many), strict=True))]
    queries = [many.questions[i % len(many.questions)] for i in range(count)]
    pairs: list[Any] = [(q, f"{p.title}. {p.text}") for q, p in zip(queries, passages, strict=True)]
    found: Result = {}
    tokens: Any = None
    for name in SIZES:
        directory = write_random_cross_encoder(folder, minilm, name)
        model: Any = cross_encoder.load(directory, "fp16", DEVICE)
        exact = cross_encoder.load(directory, "fp32", DEVICE)
        tokens = tokens or model.classifier.encoder.encode(pairs)  # alike for all of them
        engine, few = model.classifier.engine, slice(0, _CHECKED)
        ours, reference = (m.score(queries[few], passages[few]) for m in (model, exact))
        rate = count / best_of(partial(engine.run, tokens))
        alike = float(np.corrcoef(ours, reference)[0, 1])
        found[name] = {"from_tokens": rate, "correlation_with_fp32": alike}
        print(f"cross {name}: {rate:,.0f} docs/s ({len(tokens.ids) / count:.0f} tokens each), correlation {alike:.6f}")
    return found | {"tokens_a_pair": len(tokens.ids) / count}


def rerank(texts: Texts, minilm: str, folder: Path, count: int) -> Result:
    """Score pairs from their texts by a MiniLM-L6 cross-encoder: alone, tokenised by others, and the peer."""
    import torch
    from sentence_transformers import CrossEncoder

    from pipelines.models import cross_encoder
    from pipelines.schema import Passage

    many = texts.cut(count)
    passages = [Passage(str(i), text, title) for i, (title, text) in enumerate(zip(*_passages(many), strict=True))]
    queries = [many.questions[i % len(many.questions)] for i in range(count)]
    pairs: list[Any] = [(q, f"{p.title}. {p.text}") for q, p in zip(queries, passages, strict=True)]
    directory = write_random_cross_encoder(folder / "rerank", minilm, "MiniLM-L6")
    model: Any = cross_encoder.load(directory, "fp16", DEVICE)
    found: Result = {"alone": count / best_of(lambda: model.score(queries, passages))}
    found["tokenised_ahead"] = tokenised_ahead(model, pairs)
    print(f"MiniLM-L6 from texts: {found['alone']:,.0f} docs/s in one process, {found['tokenised_ahead']:,.0f} with "
          f"{_TOKENISERS} processes that tokenise", flush=True)  # fmt: skip
    other = CrossEncoder(directory, device=DEVICE, model_kwargs={"dtype": torch.float16})
    found["peer"] = peer_rates("predict", lambda some, size: other.predict(some, batch_size=size), pairs[: count // 4])
    found["ratio_default"] = found["tokenised_ahead"] / found["peer"]["32"]
    return found


def tokenised_ahead(model: Any, pairs: list[Any]) -> float:
    """Return the docs/s from texts when other processes tokenise them, as in the pipeline."""
    from pipelines.models.engine import fetch

    slices = [pairs[start : start + _SLICE] for start in range(0, len(pairs), _SLICE)]
    with multiprocessing.get_context("spawn").Pool(_TOKENISERS, _hold, (model.classifier.encoder,)) as pool:
        pool.map(_tokenise, [pairs[:64]] * _TOKENISERS, chunksize=1)

        def run() -> None:
            started = [model.classifier.engine.start(tokens) for tokens in pool.imap(_tokenise, slices)]
            for some in started:
                fetch(some)

        return len(pairs) / best_of(run)


def _hold(encoder: Any) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process with its own core
    _encoder = encoder


def _tokenise(pairs: list[Any]) -> Any:
    return _encoder.encode(pairs)


def minilm_check(texts: Texts, minilm: str, folder: Path, count: int) -> Result:
    """Compare fp16 and bf16 with fp32 on real weights."""
    from pipelines.encode import Encoder

    exact = spec_of(minilm, minilm, "fp32")
    found: Result = {}
    for compute in ("fp16", "bf16"):
        ours = Encoder(spec_of(minilm, minilm, compute), "passage", DEVICE)
        tokens = ours.tokeniser.passages(*_passages(texts.cut(count)))
        budgets(ours)
        seconds = best_of(lambda ours=ours, tokens=tokens: ours.encode_tokens(tokens))
        print(
            f"minilm {compute}: {count / seconds:,.0f} passages/s, {len(tokens.ids) / seconds:,.0f} tokens/s",
            flush=True,
        )
        found[compute] = {"passages_per_second": count / seconds, "min_cosine": check(ours, exact, tokens)}
    return found


def attention(texts: Texts, minilm: str, folder: Path, count: int) -> Result:
    """Time our kernel for attention within texts against torch's, on lengths of real passages, heads of 64 and 32."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from pipelines.encode import load_tokeniser
    from pipelines.models import kernels

    tokeniser = load_tokeniser(spec_of(minilm, minilm, "fp16"), "passage")
    length_N = np.sort(tokeniser.passages(*_passages(texts.cut(_CHECKED))).lengths)[::-1].copy()
    starts = torch.zeros(len(length_N) + 1, dtype=torch.int32, device=DEVICE)
    starts[1:] = torch.from_numpy(length_N).cumsum(0)
    total, longest, found = int(length_N.sum()), int(length_N.max()), dict[str, Any]()
    for width in (64, 32):
        shared = torch.randn(total, 3 * _HEADS * width, device=DEVICE, dtype=torch.bfloat16)
        inputs = [x.view(total, _HEADS, width) for x in shared.split(_HEADS * width, -1)]
        ours = partial(kernels.attend, *inputs, starts, longest, width**-0.5)
        torchs = partial(varlen_attn, *inputs, starts, starts, longest, longest, scale=width**-0.5)
        apart = float((ours().float() - torchs().float()).norm() / torchs().float().norm())
        found[str(width)] = {"ours_us": _microseconds(ours), "torch_us": _microseconds(torchs), "difference": apart}
        print(f"attention, {total} tokens, heads of {width}: {found[str(width)]}", flush=True)
    return found


def _microseconds(run: Callable[[], Any]) -> float:
    import torch

    def repeat() -> None:
        for _ in range(_REPEATS):
            run()
        torch.cuda.synchronize()

    repeat()
    return best_of(repeat) / _REPEATS * 1e6


def machine() -> Result:
    import torch
    import transformers

    card = torch.cuda.get_device_properties(0)
    return {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30), "torch": torch.__version__,
            "transformers": transformers.__version__, DEVICE: torch.version.cuda}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", required=True)
    parser.add_argument("--only", default="bert,cross,rerank,minilm,attention")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="a few texts, to see that it all works")
    options = parser.parse_args()
    import_module("cluster.encode_workers")  # what the last steps need is missed before the card's time is spent
    results: Result = {"machine": machine()}
    print(results["machine"], flush=True)
    texts = read_texts(options.data, 512 if options.quick else 16_384)
    sections = {"bert": bert, "cross": cross, "rerank": rerank, "minilm": minilm_check,
                "attention": attention}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            count = 1024 if options.quick else 65_536
            results[name] = sections[name](texts, options.minilm, Path(folder), count)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    if "bert" in results:
        own = results["bert"]
        met = own["limit_share"] >= 0.55 and own["wikipedia_minutes"] < 20 and own["ratio_default"] >= 4
        verdict = "ok" if met else "miss"
        print(f"limit_share {own['limit_share']:.3f} wikipedia_minutes {own['wikipedia_minutes']:.1f} "
              f"ratio_default {own['ratio_default']:.2f} ratio_best {own['ratio_best']:.2f} {verdict}")  # fmt: skip


if __name__ == "__main__":
    main()
