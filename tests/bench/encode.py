"""Encoding at the speed of the hardware: the whole pipeline against its peers, on the same cores, in the same run.

    python -m tests.bench.encode [--only wiki,bert,cross,linear] [--passages 8192] [--quick] [--peers-python PYTHON]

wiki: real passages through all-MiniLM-L6-v2. bert: the same with a BERT-base of random weights in DPR's layout. cross:
a MiniLM-L6-sized cross-encoder. linear: three sizes of corpus. Ours is read from files, tokenised, encoded and written;
the peers get their texts in memory, are loaded and warm when their clock starts, and only encode.

--quick: a few texts and no `linear`, to see that it all works; its figures are not kept.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.common import keep, kept, need_data, write_wiki
from tests.bench.encode_jobs import (
    WORKERS,
    Result,
    Row,
    agreement,
    compare,
    judge,
    module,
    print_table,
    run_job,
)
from tests.bench.encode_limits import matrix_limit, transformer_flops
from tests.bench.encode_models import write_bert_base, write_cross_encoder
from tests.bench.encode_settings import BATCHES, Peers, Run, best_torch, exported_peers, label, ray_data

PART_SIZE = 512
FULL = {"wiki": 8192, "bert": 1024, "cross": 2048, "linear": 8192}
QUICK = {"wiki": 512, "bert": 64, "cross": 256, "linear": 1024}
_QUICK_BATCHES = (8, 32)
_PILOT = {"wiki": 1024, "bert": 128, "cross": 512}
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_TARGETS = {"ratio_default": 6.0, "ratio_best": 1.5, "limit_share": 0.45}
_QUIET_LOAD = 0.5  # processes, over the last minute: with more, somebody else takes part of the cores
_DEFAULT = "sentence-transformers, defaults"
_RAY_DATA = "Ray Data with a SentenceTransformer actor"


@dataclass(frozen=True)
class Options:
    """What the command line says. sizes: texts, by section. batches: batch sizes of the peers that a pilot tries."""

    sizes: dict[str, int]
    rounds: int
    part_size: int
    peers_python: str
    batches: tuple[int, ...]

    def pilot(self, section: str) -> int:
        return min(_PILOT[section], max(32, self.sizes[section] // 8))


def wiki(options: Options, folder: Path) -> Result:
    ready = _Prepared(options, folder, "wiki", options.sizes["wiki"], {"checkpoint": _MINILM}, "joined")
    peers = ready.peers(_minilm())
    others, pilots = exported_peers(peers)
    runs = {**others, _RAY_DATA: ray_data(peers, ready.folder / "texts")}
    section = _bi_encoder(ready, peers, _minilm(), runs, pilots)
    print(judge("ratio_ray_data", section["rows"][_RAY_DATA]["ratio"], 6.0))
    for backend in others:
        print(judge(f"ratio {backend}", section["rows"][backend]["ratio"], 1.3))
    print(judge("startup_seconds", section["startup_seconds"], 25.0, at_most=True))
    return section


def bert(options: Options, folder: Path) -> Result:
    paths = write_bert_base(folder, _minilm())
    checkpoints = {"checkpoint": paths["passage"], "query_checkpoint": paths["query"]}
    ready = _Prepared(options, folder, "bert", options.sizes["bert"], checkpoints, "separated")
    return _bi_encoder(ready, ready.peers(paths["peer"]), paths["passage"], {}, [])


class _Prepared:
    """An ingested corpus, its texts as the peers get them, and the model's dtype."""

    def __init__(
        self, options: Options, folder: Path, section: str, num_rows: int, checkpoints: dict[str, str], form: str
    ) -> None:
        self.options, self.section, self.checkpoints = options, section, checkpoints
        self.root, self.folder = str(folder), folder / str(num_rows)
        self.folder.mkdir(parents=True)
        source = write_wiki(self.folder / "wiki.tsv", num_rows)
        part_size = max(1, min(options.part_size, num_rows // (8 * WORKERS)))
        job = {"task": "prepare", "root": self.root, "name": f"bench{num_rows}", "source": source, "form": form,
               "folder": str(self.folder), "part_size": part_size, **checkpoints}  # fmt: skip
        found = run_job(module("encode_ours"), job, self.folder)
        self.snapshot, self.compute = found["snapshot"], found["compute"]
        self.length_N = np.load(self.folder / "lengths.npy")

    def ours(self) -> Result:
        """Run the whole pipeline in a fresh process, on a cluster of its own, from nothing."""
        job = {"task": "encode", "root": self.root, "snapshot": self.snapshot, "vectors": str(self.folder / "ours.npy")}
        return run_job(module("encode_ours"), job | self.checkpoints, self.folder)

    def peers(self, checkpoint: str) -> Peers:
        pilot = self.options.pilot(self.section)
        options, texts = self.options, self.folder / "texts.json"
        return Peers(self.folder, checkpoint, "encode", texts, pilot, options.batches, options.peers_python)


def _bi_encoder(ready: _Prepared, peers: Peers, model: str, others: dict[str, Run], pilots: list[Result]) -> Result:
    """Compare, print the table, and return the section's results. model: the directory with the config of its sizes."""
    best, found = best_torch(peers)
    name_of_best = f"sentence-transformers, {label(best)}"
    runs = {_DEFAULT: peers.run("default", {}), name_of_best: peers.run("best", best), **others}
    limits = [matrix_limit(model, ready.compute, WORKERS)]
    rows = compare(ready.ours, runs, ready.options.rounds, "passages")
    limits.append(matrix_limit(model, ready.compute, WORKERS))
    files = {"ours": "ours", _DEFAULT: "default", name_of_best: "best"}
    files |= {name: backend for name in others for backend in ("onnx", "openvino") if f" {backend}," in name}
    _check_tokens(rows["ours"], rows[_DEFAULT])
    for name, file in files.items():
        rows[name].facts |= agreement(peers.vectors(file), peers.vectors("default"))
    flops = transformer_flops(model, ready.length_N) / len(ready.length_N)
    section = _summary(rows, limits, flops, "passages", {"pilots": pilots + found, "best": name_of_best})
    throughput = rows["ours"].runs[-1]["manifest"].get("throughput")  # what the run says of itself
    if throughput:
        section["padding_share"] = throughput["padding_share"]
        print(judge("padding_share", section["padding_share"], 0.02, at_most=True))
    return section


def _check_tokens(ours: Row, peer: Row) -> None:
    """End the run unless both sides computed the very same number of tokens."""
    counts = {run["num_tokens"] for run in ours.runs + peer.runs}
    assert len(counts) == 1, f"ours and the peer were not given the same texts: {counts} tokens"


def _summary(rows: dict[str, Row], limits: list[Result], flops: float, unit: str, facts: dict[str, Any]) -> Result:
    """Print the table and what the machine allows. flops: of the matrix products of one text or pair."""
    limit = max(found["flops"] for found in limits)
    print_table(rows, unit, limit / flops)
    share = rows["ours"].rate * flops / limit
    print(f"matrix limit {limit / 1e9:.0f} GFLOP/s in {limits[0]['compute']} over {WORKERS} processes "
          f"= {limit / flops:.1f} {unit}/s; ours reached {share:.3f} of it")  # fmt: skip
    startup = float(np.median([run["startup"] for run in rows["ours"].runs]))
    content = {"unit": unit, "num_rows": rows["ours"].runs[0]["num_rows"], "rate": rows["ours"].rate}
    measured = {"startup_seconds": startup, "limit_share": share, "limits": limits, "flops_a_text": flops}
    ratios = {"ratio_default": rows[_DEFAULT].ratio, "ratio_best": rows[facts["best"]].ratio}
    most = {f"{name}_at_limit": limit / flops / rows[row].rate
            for name, row in (("ratio_default", _DEFAULT), ("ratio_best", facts["best"]))}  # fmt: skip
    print("with nothing but matrix products, at their limit: "
          + ", ".join(f"{name.removesuffix('_at_limit')} {value:.2f}" for name, value in most.items()))  # fmt: skip
    return {**content, **ratios, **most, **measured, "rows": {n: r.as_dict() for n, r in rows.items()}, **facts}


def cross(options: Options, folder: Path) -> Result:
    checkpoint = write_cross_encoder(folder, _minilm())
    pairs = _pairs(options.sizes["cross"])
    (folder / "pairs.json").write_text(json.dumps(pairs))
    joined = [[question, f"{title}. {text}" if title else text] for question, title, text in pairs]
    (folder / "joined.json").write_text(json.dumps(joined))
    peers = Peers(folder, checkpoint, "cross", folder / "joined.json", options.pilot("cross"), options.batches)
    job = {"task": "cross", "checkpoint": checkpoint, "pairs": str(folder / "pairs.json")}
    ours = partial(run_job, module("encode_ours"), job | {"vectors": str(folder / "ours.npy")}, folder)
    best, pilots = best_torch(peers)
    name_of_best = f"sentence-transformers, {label(best)}"
    from pipelines.encode import default_compute

    limits = [matrix_limit(checkpoint, default_compute(on_gpu=False), WORKERS)]
    runs = {_DEFAULT: peers.run("default", {}), name_of_best: peers.run("best", best)}
    rows = compare(ours, runs, options.rounds, "pairs")
    reference = np.load(peers.vectors("default"))
    for name, file in (("ours", "ours"), (name_of_best, "best")):
        scores = np.load(peers.vectors(file))
        off = float(np.abs(scores - reference).max() / reference.std())
        rows[name].facts |= {"max_off_in_std": off, "correlation": float(np.corrcoef(scores, reference)[0, 1])}
    lengths = np.load(folder / "default-lengths.npy")
    flops = transformer_flops(checkpoint, lengths) / len(lengths)
    section = _summary(rows, limits, flops, "pairs", {"pilots": pilots, "best": name_of_best})
    print(judge("cross_ratio_default", section["ratio_default"], 4.0))
    return section


def _pairs(count: int) -> list[list[str]]:
    """Return (question, title, text): each real question with its own passage, then with the next ones."""
    folder = need_data() / "nq"
    with gzip.open(folder / "passages.tsv.gz", "rt", encoding="utf-8") as lines:
        passages = [(row["title"], row["text"]) for row in csv.DictReader(lines, delimiter="\t")]
    with gzip.open(folder / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    few = max(1, count // 8)  # eight passages a question
    return [[questions[i % few], *(p.strip() for p in passages[i % len(passages)])] for i in range(count)]


def linear(options: Options, folder: Path) -> Result:
    """Measure the larger sizes, each between two runs of the first: the machine's speed drifts by more than 5 %."""
    first, *larger = (options.sizes["linear"] * times for times in (1, 2, 4))
    ready = {n: _Prepared(options, folder, "wiki", n, {"checkpoint": _MINILM}, "joined") for n in (first, *larger)}
    seconds: list[tuple[int, float]] = []
    for size in (first, *(n for more in larger for n in (more, first))):
        result = ready[size].ours()
        seconds.append((size, 1 / result["rate"]))
        print(f"  {size:>8} passages: {1000 / result['rate']:.3f} ms a passage, start-up {result['startup']:.1f} s")
    own = [a_passage for _, a_passage in seconds]
    growth = {larger[i]: own[2 * i + 1] * 2 / (own[2 * i] + own[2 * i + 2]) - 1 for i in range(len(larger))}
    print(judge("linear_growth", max(growth.values()), 0.05, at_most=True))
    return {"milliseconds_a_passage": [(n, 1000 * s) for n, s in seconds], "growth": growth}


def _minilm() -> str:
    from pipelines.models.fetch import fetch

    return fetch(_MINILM)


SECTIONS: dict[str, Callable[[Options, Path], Result]] = {"wiki": wiki, "bert": bert, "cross": cross, "linear": linear}


def main() -> None:
    arguments = _arguments()
    chosen = [name for name in arguments.only.split(",") if name] or [
        name for name in SECTIONS if not (arguments.quick and name == "linear")
    ]
    sizes = {**(QUICK if arguments.quick else FULL)}
    if arguments.passages:
        sizes["wiki"] = arguments.passages
    options = Options(
        sizes,
        arguments.rounds,
        arguments.part_size,
        arguments.peers_python,
        _QUICK_BATCHES if arguments.quick else BATCHES,
    )
    results: dict[str, Result] = {}
    for name in chosen:
        load = os.getloadavg()[0]
        busy = "; OTHERS ARE AT WORK HERE, the figures mean little" if load > _QUIET_LOAD and not results else ""
        print(f"{name}: {sizes[name]} texts, {WORKERS} cores, load {load:.2f}{busy}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {**SECTIONS[name](options, Path(folder)), "load_before": load}
        if sizes[name] == FULL[name]:
            keep("encode", {name: results[name]}, merge=True)
    shown = results.get("wiki") or kept("encode").get("wiki")
    if not shown:
        print("wiki was not run, and no earlier run of it is kept: there is no summary")
        return
    print(", ".join(judge(name, shown[name], wanted) for name, wanted in _TARGETS.items()))
    print(" ".join(f"{name} {shown[name]:.2f}" for name in _TARGETS))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sections, separated by commas: " + ", ".join(SECTIONS))
    parser.add_argument("--passages", type=int, help=f"of the wiki section (default {FULL['wiki']})")
    parser.add_argument("--quick", action="store_true", help="few texts, nothing kept")
    parser.add_argument("--rounds", type=int, default=1, help="how often each peer is run (ours: once more)")
    parser.add_argument("--part-size", type=int, default=PART_SIZE, help="passages in a part")
    parser.add_argument(
        "--peers-python", default=sys.executable, help="an interpreter with the onnx and openvino extras"
    )
    return parser.parse_args()


if __name__ == "__main__":
    need_data()
    main()
