"""What the benchmarks share: the real data, child processes, and how results are printed and kept."""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RESULTS = Path(__file__).resolve().parent / "results"
PINAKES = str(Path(sys.executable).with_name("pinakes"))


def need_data() -> Path:
    """Return the folder of real passages and questions, or end with a word of why nothing is measured."""
    if not DATA.is_dir():
        print(f"nothing measured: the real data is not here ({DATA}); it is not part of the repository")
        sys.exit(0)
    return DATA


def write_wiki(target: Path, num_rows: int, copies: int = 1) -> str:
    """Write the first `num_rows` wiki passages as TSV, `copies` times under new ids."""
    with target.open("wb") as out:
        for copy in range(copies):
            with gzip.open(need_data() / "wiki" / "psgs_w100.tsv.gz", "rb") as lines:
                header = next(lines)
                out.write(header if copy == 0 else b"")
                for number, line in enumerate(lines):
                    if number == num_rows:
                        break
                    out.write(line if copy == 0 else b"%d-" % copy + line)
    return str(target)


def best_of(run: Callable[[], Any], rounds: int = 3) -> float:
    """Return the seconds of the best round, on a machine that others do not share; `run` waits for its GPU itself."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def pinakes(*arguments: str) -> dict[str, Any]:
    """Run the command and return its JSON result; its progress goes to the screen."""
    done = subprocess.run([PINAKES, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def keep(name: str, results: dict[str, Any], *, merge: bool = False) -> None:
    """Write the results, with machine and versions, to tests/bench/results/.

    merge: keep what earlier runs on the same machine put beside the keys of `results`. Each key then has the versions
    it was measured with as its own "packages".
    """
    from pipelines.manifest import package_versions

    with open("/proc/cpuinfo") as lines:
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    machine = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    packages = package_versions()
    RESULTS.mkdir(exist_ok=True)
    if merge:
        before = kept(name)
        results = {key: {**value, "packages": packages} for key, value in results.items()}
        content = {**(before if before.get("machine") == machine else {}), "machine": machine, **results}
    else:
        content = {"machine": machine, "packages": packages, **results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def kept(name: str) -> dict[str, Any]:
    """Return what `keep` wrote last, or {}."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
