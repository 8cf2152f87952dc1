"""Vectors from and for other tools: DPR's pickles, PAQ's `.pt` tensors, `.npy` with ids, Parquet.

Each reader yields blocks of (ids or None, vectors (N, D) float), in the order of the file, in bounded memory. No code
in a file ever runs: pickles are read as data (`pickled`), torch files weights-only, arrays without objects.
"""
