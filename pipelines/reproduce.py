"""Measure a published figure again, with the user's own copy of the weights and the data, and print both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import published
from pipelines.benchmarks.run import Progress, Run
from pipelines.benchmarks.tasks import TASKS, Scores
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def reproduce(
    row: published.Row,
    inputs: dict[str, str],
    *,
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `row` on the files in `inputs` and return ours beside the published figures, ready for JSON.

    inputs: paths or URLs by the keys of `published.describe_inputs(row)`. limit: take the first so many questions only;
    then, and when the file holds another number of questions than the published figure was taken over, no difference is
    given. Rows without a published figure are measured on the way. Raises ConfigError for inputs that do not suffice,
    InputError for files that cannot be read, CheckpointError for models that cannot.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"cannot take the first {limit} questions", expected="limit: a whole number from 1")
    data = published.check_inputs(row, inputs)
    started = time.perf_counter()
    run = Run(row, inputs, data, limit, device, progress or (lambda what, done: None))
    scores = TASKS[row.task](run)
    figures = {figure.metric: figure.value for figure in row.figures if figure.data == data}
    notes = _doubts(scores, data, limit)
    rows = [_line(metric, *scores[metric], figures.get(metric), bool(notes)) for metric in _ordered(scores, figures)]
    return {
        "name": row.name,
        "task": row.task,
        "data": data,
        "rows": rows,
        "comparable": not notes,
        "seconds": time.perf_counter() - started,
        "inputs": dict(inputs),
        "notes": [*notes, *row.notes],
        "source": row.source,
    }


def _ordered(scores: Scores, figures: Mapping[str, float]) -> list[str]:
    """Return the metrics measured, those with a published figure first."""
    return [m for m in figures if m in scores] + [m for m in scores if m not in figures]


def _doubts(scores: Scores, data: str, limit: int | None) -> list[str]:
    """Return why the figures cannot be compared; empty when they can."""
    expected = published.DATA[data].num_questions
    if limit is not None:
        return [f"measured on the first {limit:,} questions only: not comparable with the published figures"]
    counts = {count for _, count in scores.values()}
    if expected is not None and counts != {expected}:
        found = ", ".join(f"{count:,}" for count in sorted(counts))
        title = published.DATA[data].title
        return [f"measured on {found} questions where {title} has {expected:,}: not comparable"]
    return []


def _line(metric: str, ours: float, count: int, figure: float | None, in_doubt: bool) -> dict[str, Any]:
    comparable = figure is not None and not in_doubt and metric != "docs_per_second"  # another machine, another speed
    difference = ours - figure if figure is not None and comparable else None
    return {"metric": metric, "published": figure, "ours": ours, "difference": difference, "num_questions": count}


def format_reproduction(result: Mapping[str, Any]) -> Table:
    """Return the result of `reproduce` as a table for the terminal."""
    from rich.table import Table

    title = f"{result['name']}: {published.DATA[result['data']].title}"
    caption = "\n".join([f"published in: {result['source']}", *result["notes"], f"{result['seconds']:,.1f} s"])
    table = Table(title=title, caption=caption)
    table.add_column("measure")
    for name in ("published", "ours", "difference", "questions"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        figure, difference = row["published"], row["difference"]
        table.add_row(
            _LABELS.get(row["metric"], row["metric"]),
            "" if figure is None else f"{figure:,.2f}",
            f"{row['ours']:,.2f}",
            "" if difference is None else f"{difference:+.2f}",
            f"{row['num_questions']:,}",
        )
    return table


_LABELS = {
    "em": "exact match of the first answer, %",
    "em_reranked": "exact match after reranking, %",
    "em_retrieved": "exact match before reranking, %",
    "spearman": "Spearman correlation x 100",
    "mrr@10": "MRR@10 x 100",
    "ndcg@10": "nDCG@10 x 100",
    "docs_per_second": "documents a second (published: V100)",
    **{f"hits@{k}": f"exact answer among the first {k} pairs, %" for k in (1, 10, 50)},
    **{f"top@{k}": f"answer in the first {k} passages, %" for k in (1, 5, 20, 50, 100)},
}
