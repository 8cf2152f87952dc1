"""Indexes over vectors: what there is to build (candidates), what is built (spec), how (build), how it is searched
(search), and with which parameters (tune).

This package sees arrays, FAISS indexes and local paths only: never text, models or stores.
"""
