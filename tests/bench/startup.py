"""How long `pinakes --help` takes.

python -m tests.bench.startup
"""

from __future__ import annotations

import statistics
import subprocess
import time

from tests.bench.common import PINAKES, keep

_RUNS = 11


def main() -> None:
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        subprocess.run([PINAKES, "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    keep("startup", {"help_seconds": {"median": median, "max": max(seconds), "runs": _RUNS}})
    print(f"help_seconds {median:.3f} (largest {max(seconds):.3f}) {'ok' if median < 0.5 else 'miss'}")


if __name__ == "__main__":
    main()
