"""Which settings of the peers are tried, and how the best of them is found: by a pilot on the first texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.encode_jobs import WORKERS, Result, module, run_job

_SCRIPT = str(Path(__file__).with_name("encode_peers.py"))
BATCHES = (8, 16, 32, 64, 128)
_COMPILED = (8, 32)  # in one process: the workers of a pool get the model without its compiled code
_EXTRAS = {"onnx": "onnxruntime", "openvino": "openvino"}

Setting = dict[str, Any]
Run = Callable[[], Result]


@dataclass(frozen=True)
class Peers:
    """What every peer of one section gets.

    texts: a JSON file of texts, or of pairs where kind is "cross". num_pilot, batches: the texts and batch sizes of a
    pilot. exported_python: an interpreter with the ONNX and OpenVINO backends.
    """

    folder: Path
    checkpoint: str
    kind: str
    texts: Path
    num_pilot: int
    batches: tuple[int, ...] = BATCHES
    exported_python: str = sys.executable

    def vectors(self, name: str) -> Path:
        """Return the file of what a run gave."""
        return self.folder / f"{name}.npy"

    def run(self, name: str, setting: Setting, python: str = sys.executable, checkpoint: str = "") -> Run:
        """Return a function that runs one setting on all texts, in a fresh process."""
        job = {"task": "run", "kind": self.kind, "checkpoint": checkpoint or self.checkpoint, "setting": setting}
        files = {"texts": str(self.texts), "vectors": str(self.vectors(name)),
                 "lengths": str(self.folder / f"{name}-lengths.npy")}  # fmt: skip
        return lambda: run_job(_program(python), job | files, self.folder, threads=_threads(setting))

    def pilot(self, settings: list[Setting], python: str = sys.executable, checkpoint: str = "") -> list[Result]:
        """Measure settings of one kind (a pool, or none) on the first texts; print each. Returns setting and rate."""
        job = {"task": "pilot", "kind": self.kind, "checkpoint": checkpoint or self.checkpoint, "settings": settings}
        files = {"texts": str(self.texts), "num_texts": self.num_pilot}
        found = run_job(_program(python), job | files, self.folder, threads=_threads(settings[0]))["results"]
        for result in found:
            print(f"  pilot {label(result['setting']):<50} {result['rate']:8.2f} {result.get('error', '')}", flush=True)
        return list(found)


def _program(python: str) -> list[str]:
    # -P keeps tests/bench off the path: its files are not to hide anybody's modules.
    return [python, "-P", _SCRIPT]


def _threads(setting: Setting) -> int | None:
    return 1 if setting.get("pool") else None


def label(setting: Setting) -> str:
    """Return a setting in a few words."""
    words = [str(setting.get(key)) for key in ("backend", "file", "dtype") if setting.get(key)]
    words += [f"{key} {value}" for key, value in setting.get("options", {}).items()]
    words += [f"batch {setting['batch_size']}"] if "batch_size" in setting else []
    words += [f"pool of {setting['pool']}"] if setting.get("pool") else []
    words += ["compiled"] if setting.get("compile") else []
    return ", ".join(words) or "defaults"


def best_torch(peers: Peers) -> tuple[Setting, list[Result]]:
    """Return the fastest PyTorch setting on the pilot texts, and what every setting gave there.

    bf16 and batch sizes, in one process with all threads and in a pool of one-thread workers; fp32 for a machine whose
    bf16 is no faster; torch.compile.
    """
    bf16 = [{"dtype": "bfloat16", "batch_size": size} for size in peers.batches]
    fp32 = {"dtype": "float32", "batch_size": 32}
    found = peers.pilot([*bf16, fp32])
    found += peers.pilot([setting | {"pool": WORKERS} for setting in (*bf16, fp32)])
    found += peers.pilot([{"dtype": "bfloat16", "batch_size": size, "compile": True} for size in _COMPILED])
    return max(found, key=lambda result: result["rate"])["setting"], found


def exported_peers(peers: Peers) -> tuple[dict[str, Run], list[Result]]:
    """Return the best ONNX and OpenVINO settings as functions that run them, and what the pilots gave.

    int8 files are left out: their vectors are others. They are slow, so the pilot takes a quarter of its texts.
    """
    runs: dict[str, Run] = {}
    pilots: list[Result] = []
    few = replace(peers, num_pilot=max(1, peers.num_pilot // 4))
    for backend in _EXTRAS:
        python = peers.exported_python
        if not _installed(python, backend):
            print(f'  {backend}: not installed: pip install "sentence-transformers[{backend}]", and --peers-python')
            continue
        target = str(peers.folder / backend)
        job = {"task": "export", "backend": backend, "checkpoint": peers.checkpoint, "target": target}
        files = run_job(_program(python), job, peers.folder)["files"]
        found = few.pilot(_exported_settings(backend, files, peers.batches), python, target)
        best = max(found, key=lambda result: result["rate"])["setting"]
        runs[f"sentence-transformers, {label(best)}"] = peers.run(backend, best, python, target)
        pilots += found
    return runs, pilots


def _exported_settings(backend: str, files: list[str], batches: tuple[int, ...]) -> list[Setting]:
    if backend == "openvino":
        return [
            {"backend": backend, "options": {"INFERENCE_PRECISION_HINT": hint}, "batch_size": size}
            for hint in ("bf16", "f32")
            for size in (batches if hint == "bf16" else (32,))
        ]
    return [{"backend": backend, "file": file, "batch_size": size} for file in files for size in batches[:4]]


def _installed(python: str, backend: str) -> bool:
    code = f"import optimum, sentence_transformers, {_EXTRAS[backend]}"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def ray_data(peers: Peers, texts: Path) -> Run:
    """Return a function that runs Ray Data's documented way on a folder of Parquet parts."""
    job = {"checkpoint": peers.checkpoint, "texts": str(texts)}

    def run() -> Result:
        target = str(peers.folder / f"ray-data-{len(list(peers.folder.glob('ray-data-*')))}")
        return run_job(module("encode_ray_data"), job | {"target": target}, peers.folder)

    return run
