"""interim"""
from __future__ import annotations
import numpy as np

def search(index, queries_BD, k, params, num_threads=1):
    import faiss
    faiss.omp_set_num_threads(num_threads)
    ps = faiss.ParameterSpace()
    for key, value in (params or {}).items():
        ps.set_index_parameter(index, key, value)
    s, r = index.search(np.ascontiguousarray(queries_BD, np.float32), k)
    return (s if index.metric_type == faiss.METRIC_INNER_PRODUCT else -s), r

def merge_topk(parts, k):
    s = np.concatenate([p[0] for p in parts], 1); r = np.concatenate([p[1] for p in parts], 1)
    s = np.where(r < 0, -np.inf, s)
    o = np.lexsort((r, -s), axis=1)[:, :k]
    return np.take_along_axis(s, o, 1), np.take_along_axis(r, o, 1)

def exact_topk(queries_BD, blocks, k, metric, num_threads=1):
    best = None
    for v, rows in blocks:
        s = queries_BD @ v.T if metric == "ip" else -((queries_BD[:, None] - v[None]) ** 2).sum(-1)
        r = np.broadcast_to(rows, s.shape)
        best = merge_topk([(s, r)] if best is None else [best, (s, r)], k)
    return best
