"""Corpus readers: files -> rows, exactly, in parallel, in bounded memory."""

from pipelines.readers.base import ReadOptions, Reject, Row, Split
from pipelines.readers.files import file_version
from pipelines.readers.splits import SplitReader, check_chain, plan_splits, read_all, settle

__all__ = [
    "ReadOptions",
    "Reject",
    "Row",
    "Split",
    "SplitReader",
    "check_chain",
    "file_version",
    "plan_splits",
    "read_all",
    "settle",
]
