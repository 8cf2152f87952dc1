"""The rules of the house: what may import what, a light command, help with examples."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERBS = [
    *("run", "ingest", "encode", "index", "evaluate", "serve", "search", "status", "models", "inspect"),
    *("promote", "rollback", "demo", "rerank", "answer", "rank", "extract", "generate", "filter", "group"),
    *("plan", "rebuild", "verify", "import-vectors", "export-vectors", "import-index"),
    *("keys create", "keys list", "keys revoke"),
]


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_pipelines_never_import_ray_or_cluster() -> None:
    files = sorted((ROOT / "pipelines").rglob("*.py"))
    assert len(files) > 20
    assert {
        str(f.relative_to(ROOT)): imported(f) & {"ray", "cluster"} for f in files if imported(f) & {"ray", "cluster"}
    } == {}


def test_nothing_reads_or_writes_pickles() -> None:
    """Only weights.py names the module, for the exception that torch's weights-only loader raises."""
    files = [*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "cluster").rglob("*.py")]
    found = {f.name for f in files if imported(f) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}}
    assert found <= {"weights.py"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
                assert node.attr == "UnpicklingError", f"{file}:{node.lineno}"


def test_the_command_starts_without_heavy_imports() -> None:
    heavy = ["ray", "torch", "transformers", "faiss", "pyarrow", "numpy", "pydantic", "fsspec"]
    code = f"import sys, cluster.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    from typer.testing import CliRunner

    from cluster.cli import app

    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: pinakes {verb}" in shown.stdout
