"""What an index takes of a GPU: k-means, exact results and the search of a shard's vectors, beside the CPU's cores.

    python -m tests.bench.index_gpu [--device cuda] [--rows 8000000] [--dim 768] [--out FILE]

Neither Ray nor FAISS is needed. Vectors are random, which no figure here depends on. The peer is the same product by
torch on all cores of the machine, on a part of the rows, so that it ends; both are in vectors a second. Every figure is
the best of three; the results of the GPU are compared with the CPU's on that part first. The last line is a summary.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.index.exact import exact_topk
from pipelines.index.kmeans import Coarse, add_up, first_centroids
from tests.bench.common import best_of

Result = dict[str, Any]

_K = 10
_LISTS = 16_384
_QUERIES = 1000  # that exact results are sought for
_BATCHES = (1, 16, 64)  # queries that are searched together
_BLOCK = 2**18  # rows of a shard's block, as it is kept on a GPU
_CPU_SHARE = 64  # the CPU does one row in so many


def unit_vectors(num: int, dim: int, device: str) -> torch.Tensor:
    """Return (num, dim) fp16 of length 1."""
    blocks = []
    for start in range(0, num, _BLOCK):
        block = torch.randn(min(_BLOCK, num - start), dim, device=device)
        blocks.append((block / block.norm(dim=1, keepdim=True)).half())
    return torch.cat(blocks)


def kmeans(rows_ND: Any, device: str, few: int) -> Result:
    """One share of a sample, added up once."""
    sample = rows_ND[: min(len(rows_ND), 2**19)].float().cpu().numpy()
    dim = sample.shape[1]
    coarse = Coarse(_LISTS, dim, 10, True, True)
    centroids = first_centroids(coarse, sample[:_LISTS])
    ours, theirs = (add_up(coarse, [sample[:few]], centroids, name) for name in (device, "cpu"))
    moved = float(np.abs(ours.count_C - theirs.count_C).sum() / 2 / few)
    seconds = best_of(lambda: add_up(coarse, [sample], centroids, device))
    peer = best_of(lambda: add_up(coarse, [sample[:few]], centroids, "cpu"))
    flops = 2.0 * len(sample) * _LISTS * dim
    told = {"rows_a_second": len(sample) / seconds, "tflops": flops / seconds / 1e12, "cpu_rows_a_second": few / peer}
    return {**told, "rows_in_other_lists": moved, "ratio": told["rows_a_second"] / told["cpu_rows_a_second"]}


def exact(rows_ND: Any, device: str, few: int) -> Result:
    """The exact results of held-out queries, from vectors in the machine's memory."""
    queries = unit_vectors(_QUERIES, rows_ND.shape[1], "cpu").float().numpy()
    vectors = rows_ND[: 2**21].cpu().numpy()
    place = np.arange(len(vectors))
    part = [(vectors[:few], place[:few])]
    same = agreement(*(exact_topk(queries, part, _K, "ip", device=name) for name in (device, "cpu")))
    blocks = [(vectors[i : i + _BLOCK], place[i : i + _BLOCK]) for i in range(0, len(vectors), _BLOCK)]
    seconds = best_of(lambda: exact_topk(queries, blocks, _K, "ip", device=device))
    peer = best_of(lambda: exact_topk(queries, part, _K, "ip", device="cpu"))
    told = {"rows_a_second": len(vectors) / seconds, "cpu_rows_a_second": few / peer, "agreement": same}
    return {**told, "ratio": told["rows_a_second"] / told["cpu_rows_a_second"]}


def search(rows_ND: Any, device: str, few: int) -> Result:
    """A shard's vectors in the GPU's memory: milliseconds a batch."""
    place = np.arange(len(rows_ND))
    blocks = [(rows_ND[i : i + _BLOCK], place[i : i + _BLOCK]) for i in range(0, len(rows_ND), _BLOCK)]
    gigabytes, found = rows_ND.numel() * 2 / 1e9, Result(rows=len(rows_ND))
    for num in _BATCHES:
        queries = unit_vectors(num, rows_ND.shape[1], "cpu").float().numpy()
        one = exact_topk(queries, [(rows_ND[:few], place[:few])], _K, "ip", device=device)
        other = exact_topk(queries, [(rows_ND[:few].cpu(), place[:few])], _K, "ip", device="cpu")
        seconds = best_of(lambda q=queries: exact_topk(q, blocks, _K, "ip", device=device))  # type: ignore[misc]
        of_batch = {"ms": seconds * 1000, "gb_a_second": gigabytes / seconds, "agreement": agreement(one, other)}
        found[f"batch_{num}"] = of_batch
    return found


def agreement(one: Any, other: Any) -> float:
    """Return the share of rows that both found. Raises AssertionError for scores that are not the same."""
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    return float((one[1] == other[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    rows_ND, few = unit_vectors(args.rows, args.dim, args.device), max(_LISTS, args.rows // _CPU_SHARE)
    content: Result = {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "dim": args.dim}
    for section in (kmeans, exact, search):
        content[section.__name__] = section(rows_ND, args.device, few)
        print(section.__name__, json.dumps(content[section.__name__]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(content, indent=1) + "\n")
    ratios = f"kmeans {content['kmeans']['ratio']:.1f} exact {content['exact']['ratio']:.1f}"
    print(f"{name}: against {os.cpu_count()} cores: {ratios}; a query {content['search']['batch_1']['ms']:.1f} ms")


if __name__ == "__main__":
    main()
