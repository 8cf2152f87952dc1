"""`verify`: look at a published version in this process, or spread over a cluster."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cluster.progress import Progress
from pipelines import publish
from pipelines.config import ClusterConfig
from pipelines.errors import ArtifactError, ConfigError
from pipelines.verify import Finding
from pipelines.verify import verify as check


def verify(
    root: str,
    name: str | None,
    version: str | None,
    num_sampled: int,
    deep: bool,
    address: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Check a version (or the one that the alias `name` points to) and return {name, version, state, counts, findings}.

    address: a cluster that shares the work; without it everything runs in this process. Raises ArtifactError for a
    version or an alias that does not exist, ConfigError when it is not clear which is meant.
    """
    name, version = _which(root, name, version)
    if address is None:
        findings = check(root, name, version, num_sampled, deep, say=progress.say)
    else:
        from cluster.pools import run_tasks
        from cluster.session import session

        with session(ClusterConfig(address=address)):
            findings = check(root, name, version, num_sampled, deep, run_tasks, progress.say)
    return _result(root, name, version, findings)


def _which(root: str, name: str | None, version: str | None) -> tuple[str, str]:
    """Return (index, version) of what is to be verified."""
    if version is None:
        from cluster.local import _only_alias

        name = name or _only_alias(root)
        return name, publish.current(root, name)
    names = [name] if name else publish.list_indexes(root)
    holding = [n for n in names if version in publish.index_store(root, n).folders()]
    if len(holding) == 1:
        return holding[0], version
    if holding:
        raise ConfigError(f"several indexes have a version {version!r}", where=root, expected=f"--name {holding[0]}, "
                          f"or another of {', '.join(holding[1:])}")  # fmt: skip
    where = publish.index_store(root, name).path() if name else root
    known = [f"{v} ({n})" for n in names for v in publish.index_store(root, n).folders()]
    expected = f"one of: {', '.join(known) or 'none'}"
    hint = "`pinakes status` lists versions and aliases"
    raise ArtifactError(f"there is no version {version!r}", where=where, expected=expected, hint=hint)


def _result(root: str, name: str, version: str, findings: list[Finding]) -> dict[str, Any]:
    counts = Counter(finding.state for finding in findings)
    return {
        "root": root,
        "name": name,
        "version": version,
        "state": "damaged" if counts["failed"] else "sound",
        "counts": {state: counts[state] for state in ("ok", "failed", "skipped")},
        "findings": [finding.as_dict() for finding in findings],
    }


def summary(result: dict[str, Any]) -> str:
    """Draw the result for people: the faults in full, what was skipped, and the rest by count."""
    counts = result["counts"]
    lines = [f"index {result['name']!r} version {result['version']}: {result['state']}; {counts['ok']} checks ok, "
             f"{counts['failed']} failed, {counts['skipped']} skipped"]  # fmt: skip
    fine = [finding for finding in result["findings"] if finding["state"] == "ok"]
    by_check = Counter(finding["check"] for finding in fine if finding["check"] != "sample")
    lines += [f"  ok       {check}: {number}" for check, number in by_check.items()]
    lines += [f"  ok       sample: {finding['what']}" for finding in fine if finding["check"] == "sample"]
    for finding in result["findings"]:
        if finding["state"] != "ok":
            lines.append(f"  {finding['state']:<8} {finding['check']}: {finding['what']}")
            keys = ("where", "expected", "found", "next")
            lines += [f"           {key + ':':<9} {finding[key]}" for key in keys if finding.get(key)]
    return "\n".join(lines)
