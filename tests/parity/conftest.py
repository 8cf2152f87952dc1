"""One thread for the tiny models (they are too small to share, the machine may be busy), and the parity table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_ROWS: list[tuple[str, str, str, float, float]] = []


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parity() -> Callable[..., None]:
    """Assert that ours equals the oracle's within a tolerance, and put the pair into the table of `make parity`.

    parity(family, layout, oracle, ours, theirs, tolerance=1e-5): ours and theirs are arrays of numbers, or lists of
    anything else, which must be equal.
    """

    def check(family: str, layout: str, oracle: str, ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
        difference = _difference(ours, theirs)
        _ROWS.append((family, layout, oracle, difference, tolerance))
        assert difference <= tolerance, f"{family}, {layout}: {difference} from {oracle}"

    return check


def _difference(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference; infinity for another shape, NaN, or unequal lists."""
    import numpy as np

    if isinstance(ours, list) and not all(isinstance(item, int | float) for item in ours):
        return 0.0 if ours == theirs else math.inf  # ids, texts, spans: no numpy, they may be ragged
    left, right = np.asarray(ours), np.asarray(theirs)
    if left.dtype.kind not in "fiu" or right.dtype.kind not in "fiu":
        return 0.0 if ours == theirs else math.inf
    if left.shape != right.shape or left.size == 0:
        return math.inf
    worst = float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
    return math.inf if math.isnan(worst) else worst


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS or terminalreporter.config.getoption("verbose") < 0:
        return
    terminalreporter.section("parity")
    widths = [max(len(row[i]) for row in _ROWS) for i in range(3)]
    for family, layout, oracle, difference, tolerance in sorted(_ROWS):
        names = "  ".join(n.ljust(w) for n, w in zip((family, layout, oracle), widths, strict=True))
        state = "ok" if difference <= tolerance else "FAILED"
        terminalreporter.write_line(f"{names}  max |difference| {difference:.1e}  {state}")
