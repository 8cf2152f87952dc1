"""Versions and aliases: what is served, and how the name that points to it moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines.build import BuildPlan
from pipelines.errors import ArtifactError, ConfigError, QualityError, StorageError, nearest
from pipelines.index.candidates import finer
from pipelines.manifest import Receipt, drop_receipts, has_manifest, package_versions, read_manifest, write_manifest
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import Store

REPORT = "report.html"
EVALUATION = "evaluation.json"


def index_store(root: str, name: str) -> Store:
    return Store(root).child("indexes", name)


def version_content(
    plan: BuildPlan, files: Sequence[Receipt], recall: dict[str, Any] | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the manifest of a finished build."""
    return {
        "name": plan.config.name,
        "version": plan.version,
        "created": _now(),
        "num_rows": plan.num_rows,
        "dim": plan.dim,
        "metric": plan.metric,
        "factory": plan.config.factory,
        "num_shards": len(plan.shards),
        "corpus": plan.snapshot["corpus"],
        "snapshot": plan.snapshot["snapshot"],
        "embeddings": plan.embeddings["encoder"]["fingerprint"],
        "quarantined": [guilty["row"] for guilty in plan.embeddings.get("quarantined", [])],
        "encoder": plan.embeddings["encoder"],
        "search_params": plan.config.search_params,
        "recall": recall,
        "timings_seconds": seconds,
        "throughput": plan.embeddings.get("throughput"),
        "files": {r.name: {k: v for k, v in r.as_entry().items() if k != "name"} for r in files},
        "config": plan.config.model_dump(),
        "packages": package_versions(),
    }


def publish(plan: BuildPlan, content: dict[str, Any]) -> dict[str, Any]:
    """Write the report, then the manifest, last; clean up; return the manifest that stands.

    Raises QualityError when the measured recall misses the target: the files stay, nothing is published.
    """
    check_recall(plan, content)
    plan.store.put(REPORT, render(content, None))
    manifest = write_manifest(plan.store, "version", content)
    plan.work.remove_all()
    drop_receipts(plan.store)
    return manifest


def check_recall(plan: BuildPlan, content: dict[str, Any]) -> None:
    """Raise QualityError when the recall misses its target, naming the nearest that can be had."""
    recall, target = content["recall"], plan.config.min_recall
    if target is None or recall is None:
        return
    tuning = recall.get("tuning", {"reached": True})
    if recall["value"] >= target and tuning["reached"]:
        return
    told = f"recall@{recall['k']} is {recall['value']:.4f} ± {recall['ci95']:.4f}"
    setting = ", ".join(f"{name} {value}" for name, value in content["search_params"].items())
    others = " or ".join(repr(factory) for factory in finer(plan.spec))
    choose = f"set index.factory to {others}, or lower the target" if others else "lower the target"
    if not tuning["reached"]:
        what = f"{told} at best, at {setting}"
        most = f"{plan.config.factory!r} reaches {recall['value']:.2f} at {setting}"
        hint = f"{most}, and searching wider finds no more; {choose}"
    elif "tuning" in recall:
        what = f"{told} at {setting}, which reached {tuning['value']:.4f} on the {tuning['num_queries']} tuned on"
        hint = f"raise index.recall_queries to tune more surely, set index.search_params yourself, or {choose}"
    else:
        what, raised = told, "raise index.search_params (nprobe, efSearch), or " if plan.config.search_params else ""
        hint = raised + choose
    raise QualityError(
        f"{what}, on {recall['num_queries']} held-out queries",
        where=plan.store.path(),
        expected=f"at least {target} (index.min_recall)",
        hint=hint,
    )


def render(manifest: dict[str, Any], evaluation: dict[str, Any] | None) -> bytes:
    from pipelines.report.page import render_report

    files = {n: {"bytes": f["num_bytes"], **f} for n, f in manifest["files"].items()}
    return render_report({**manifest, "files": files}, evaluation).encode()


def save_evaluation(root: str, manifest: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Put an evaluation beside its version and draw the report anew with it."""
    store = index_store(root, manifest["name"]).child(manifest["version"])
    store.put(EVALUATION, (json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n").encode())
    store.put(REPORT, render(manifest, evaluation))


def read_evaluation(root: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the evaluation that lies beside a version, None when it has none or one that does not read."""
    store = index_store(root, manifest["name"]).child(manifest["version"])
    try:
        found = json.loads(store.read(EVALUATION)) if store.exists(EVALUATION) else None
    except ValueError:
        return None  # it is made again
    return found if isinstance(found, dict) else None


def list_versions(root: str, name: str) -> list[str]:
    """Return the published versions of an index, oldest first."""
    store = index_store(root, name)
    found = [read_manifest(store.child(v), "version") for v in store.folders() if has_manifest(store.child(v))]
    return [str(m["version"]) for m in sorted(found, key=lambda m: m["created"])]


def list_indexes(root: str) -> list[str]:
    return Store(root).child("indexes").folders()


def read_version(root: str, name: str, version: str | None = None) -> dict[str, Any]:
    """Return the manifest of `version`, or of the version that the alias `name` points to.

    Raises ArtifactError for an alias or a version that does not exist, naming those that do.
    """
    chosen = version or current(root, name)
    store = index_store(root, name)
    if not has_manifest(store.child(chosen)):
        known = ", ".join(list_versions(root, name)) or "none"
        raise ArtifactError(
            f"index {name!r} has no published version {chosen!r}",
            where=store.path(chosen),
            expected=f"one of: {known}",
            hint="`pinakes status` lists versions and aliases",
        )
    return read_manifest(store.child(chosen), "version")


# Aliases


def list_aliases(root: str) -> list[str]:
    names = Store(root).child("aliases").files()
    return [n.removesuffix(".json") for n in names if n.endswith(".json")]


def read_alias(root: str, name: str) -> dict[str, Any]:
    """Return {current, previous, history} of an alias. Raises ArtifactError when it does not exist."""
    state, _ = _load_alias(root, name)
    if state is None:
        known = list_aliases(root)
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else "build one with `pinakes run CONFIG`"
        raise ArtifactError(
            f"there is no alias {name!r}",
            where=Store(root).child("aliases").path(f"{name}.json"),
            expected=f"one of: {', '.join(known) or 'none yet'}",
            hint=hint,
        )
    return state


def current(root: str, name: str) -> str:
    return str(read_alias(root, name)["current"])


def promote(root: str, name: str, version: str, seen: str | None = "") -> dict[str, Any]:
    """Point the alias `name` to a published version; pointing it where it points already changes nothing.

    seen: the version that the alias must still point to (None: there must be none yet); "" for whichever. Raises
    StorageError when somebody else moved it.
    """
    read_version(root, name, version)
    state, before = _load_alias(root, name)
    now = state["current"] if state else None
    if state and now == version:  # also where somebody else did it a moment ago
        return state
    if seen not in ("", now):
        raise StorageError(
            f"the alias {name!r} was moved by somebody else: it points to {now or 'nothing'}",
            where=Store(root).child("aliases").path(f"{name}.json"),
            expected=seen or "no alias yet",
            hint="look at it again (`pinakes status`) and repeat the command",
        )
    entry = {"version": version, "at": _now()}
    state = {
        "format_version": FORMAT_VERSION,
        "current": version,
        "previous": now,
        "history": [*(state["history"] if state else []), entry],
    }
    try:
        _save_alias(root, name, state, before)
    except StorageError:
        there, _ = _load_alias(root, name)
        if there is None or there["current"] != version:
            raise
        return there
    return state


def rollback(root: str, name: str) -> dict[str, Any]:
    """Point the alias back to its previous version. Raises ConfigError when there is none."""
    state = read_alias(root, name)
    return promote(root, name, previous_of(name, state), state["current"])


def previous_of(name: str, state: dict[str, Any]) -> str:
    """Return the version before the current one of an alias. Raises ConfigError when there is none."""
    if state["previous"] is None:
        raise ConfigError(
            f"alias {name!r} has no previous version to go back to", hint="`pinakes status` shows its history"
        )
    return str(state["previous"])


def _load_alias(root: str, name: str) -> tuple[dict[str, Any] | None, bytes | None]:
    store = Store(root).child("aliases")
    if not store.exists(f"{name}.json"):
        return None, None
    data = store.read(f"{name}.json")
    try:
        state: dict[str, Any] = json.loads(data)
    except ValueError as error:
        where = store.path(f"{name}.json")
        hint = "delete it and `pinakes promote` the version again"
        raise ArtifactError(f"the alias file is not JSON: {error}", where=where, hint=hint) from error
    return state, data


def _save_alias(root: str, name: str, state: dict[str, Any], before: bytes | None) -> None:
    data = (json.dumps(state, indent=1) + "\n").encode()
    Store(root).child("aliases").swap(f"{name}.json", data, before)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
