"""`rebuild`: the published snapshot under another encoder, built and evaluated beside the version that stays published.

Nothing is ingested again and no alias moves: promoting is a step of its own, once the two were compared.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from cluster import jobs
from cluster.evaluate import evaluate, latency, settings_key
from cluster.progress import Progress
from cluster.session import session
from pipelines import publish
from pipelines.config import Config, EncoderConfig
from pipelines.errors import ConfigError
from pipelines.evaluate import metric_rows, read_questions
from pipelines.interchange.vectors_in import find_snapshot
from pipelines.manifest import has_manifest, read_manifest
from pipelines.retrieve import Retriever
from pipelines.schema import Question
from pipelines.sizes import human_bytes
from pipelines.verify_embeddings import vectors_of

if TYPE_CHECKING:
    from rich.table import Table

_PASSAGE_CHARS = 100  # of a passage that stands in for a question where there are none


def rebuild(config: Config, encoder: EncoderConfig, progress: Progress) -> dict[str, Any]:
    """Build the alias's snapshot anew with `encoder` and the config's index; return both versions' facts.

    The facts are quality (the version's evaluation on the config's questions, made now where it lacks one of them;
    and its recall against exact search), latency measured now, one after the other, memory and disk. Raises
    ArtifactError when nothing is published yet, ConfigError when the build is the very version that is.
    """
    old = publish.read_version(config.root, config.index.name)
    changed = config.model_copy(update={"encoder": encoder})
    spec = jobs.encoder_of(changed)
    jobs.check_index(changed, spec)
    questions = read_questions(config.evaluate.questions) if config.evaluate.questions else []
    snapshot = find_snapshot(config.root, old["corpus"], old["snapshot"])
    with session(config.cluster):
        new = jobs.embed_and_index(changed, spec, snapshot, progress)
        if new["version"] == old["version"]:
            raise ConfigError(
                f"version {old['version']} is this encoder's already",
                where=f"index {config.index.name!r}",
                expected="another encoder, or another index through --set",
            )
        facts = [_facts(changed, manifest, questions, progress) for manifest in (old, new)]
    command = ["pinakes", "promote", config.index.name, new["version"], "--root", config.root]
    told = {"name": config.index.name, "old": facts[0], "new": facts[1], "promote": shlex.join(command)}
    return {**told, "stages": progress.stages}


def _facts(config: Config, manifest: dict[str, Any], questions: list[Question], progress: Progress) -> dict[str, Any]:
    files, encoder = manifest["files"], manifest["encoder"]
    embedded = vectors_of(config.root, manifest)
    parts = read_manifest(embedded, "embeddings")["parts"] if has_manifest(embedded) else []
    evaluation = _evaluation(config, manifest, questions, progress)
    return {
        **{key: manifest[key] for key in ("version", "dim", "metric", "factory", "num_shards", "num_rows", "recall")},
        "search_params": manifest["search_params"],
        "encoder": {key: encoder[key] for key in ("checkpoint", "family", "fingerprint")},
        "latency": _latency_now(Retriever(config.root, manifest), questions),
        "memory_bytes": sum(f["num_bytes"] for name, f in files.items() if name.startswith("shard-")),
        "disk_bytes": sum(f["num_bytes"] for f in files.values()),
        "embedding_bytes": sum(part["num_bytes"] for part in parts),
        "evaluation": evaluation,
    }


def _evaluation(
    config: Config, manifest: dict[str, Any], questions: list[Question], progress: Progress
) -> dict[str, Any] | None:
    """Return the version's evaluation on these very questions and settings, running it where there is none."""
    if not questions:
        return None
    found = publish.read_evaluation(config.root, manifest)
    if found and found.get("settings") == settings_key(config, questions):
        return found
    return evaluate(config.root, manifest, config, progress)


def _latency_now(retriever: Retriever, questions: list[Question]) -> dict[str, float]:
    """Time searches of the questions; without any, of the beginnings of passages."""
    texts = [question.text for question in questions]
    if not texts:
        rows = range(0, len(retriever.passages), max(1, len(retriever.passages) // 100))
        texts = [retriever.passages.by_row(row).text[:_PASSAGE_CHARS] for row in rows]
    return latency(retriever, texts)


def rebuild_summary(result: dict[str, Any]) -> Table:
    """Return both versions side by side as a table for the terminal, with the command that switches."""
    from rich.table import Table

    old, new = result["old"], result["new"]
    caption = f"{old['version']} stays published; to switch: {result['promote']}"
    table = Table(title=f"Index {result['name']!r}: {old['num_rows']:,} passages under two encoders", caption=caption)
    table.add_column("")
    table.add_column(f"published: {old['version']}", justify="right")
    table.add_column(f"new: {new['version']}", justify="right")
    for label, *cells in _rows(old, new):
        table.add_row(label, *cells)
    return table


def _rows(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    both = (old, new)
    scores = [
        {f"{label}, k={k}": f"{value:.1%}" for label, found in metric_rows(v["evaluation"] or {}) for k, value in
         found.items()}
        for v in both
    ]  # fmt: skip
    told = [
        ("encoder", *(v["encoder"]["checkpoint"] for v in both)),
        ("dimension", *(str(v["dim"]) for v in both)),
        ("index", *(v["factory"] for v in both)),
        *((label, *(found.get(label, "") for found in scores)) for label in dict.fromkeys([*scores[0], *scores[1]])),
        ("recall of the index", *(_recall(v["recall"]) for v in both)),
        ("query, median", *(f"{v['latency']['p50_ms']:.3g} ms" for v in both)),
        ("query, 95th percentile", *(f"{v['latency']['p95_ms']:.3g} ms" for v in both)),
        ("index in memory", *(human_bytes(v["memory_bytes"]) for v in both)),
        ("version on disk", *(human_bytes(v["disk_bytes"]) for v in both)),
        ("embeddings on disk", *(human_bytes(v["embedding_bytes"]) for v in both)),
    ]
    return [(label, one, other) for label, one, other in told]


def _recall(recall: dict[str, Any] | None) -> str:
    return f"{recall['value']:.4f} ± {recall['ci95']:.4f} at {recall['k']}" if recall else "not measured"
