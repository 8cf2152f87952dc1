"""Indexes over vectors: what to build (spec), how to build it (build), and how to search it (search).

This package sees arrays, FAISS indexes and local paths only: never text, models or stores.
"""
