"""interim"""
from __future__ import annotations
import hashlib
from typing import Any
import numpy as np

def train(spec, sample_ND, seed, num_threads):
    import faiss
    faiss.omp_set_num_threads(num_threads)
    index = spec.make()
    if not index.is_trained:
        index.train(np.ascontiguousarray(sample_ND, np.float32))
    return index

def add(index, vectors_ND, rows_N, num_threads=1):
    import faiss
    faiss.omp_set_num_threads(num_threads)
    index.add_with_ids(np.ascontiguousarray(vectors_ND, np.float32), np.ascontiguousarray(rows_N, np.int64))

def quantizer_digest(index):
    import faiss
    return hashlib.sha256(faiss.serialize_index(index).tobytes()).hexdigest()[:16]

def clone_empty(index):
    import faiss
    return faiss.clone_index(index)

def merge(into, other):
    into.merge_from(other, 0)

def write(index, path):
    import faiss
    faiss.write_index(index, path)

def read(path, mmap):
    import faiss
    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mmap else 0)
