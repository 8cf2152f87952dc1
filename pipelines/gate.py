"""What a version must show before an alias is moved to it.

    manifest + files -> recall contract -> quality beside the current version -> (loaded:) room and smoke queries

The first three look at the store alone; the last two are asked of every replica that loads the version. `force` lets a
version pass that scores worse; nothing lets one pass whose files do not check.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import publish
from pipelines.config import PromoteConfig
from pipelines.errors import ArtifactError, PinakesError, QualityError
from pipelines.evaluate import METRIC_LABELS, STAGES
from pipelines.index.spec import is_exact
from pipelines.retrieve import Passages, Retriever
from pipelines.room import room_for
from pipelines.schema import Hit, Passage
from pipelines.verify import Finding, check_file, check_manifest

Array = npt.NDArray[Any]

_QUALITY = ("recall", "quality")
_QUERY_CHARACTERS = 2000
_ANYTHING = "what is this about"
_TWO_TOWERS = ("dpr_cp", "clip")  # from one checkpoint, for queries and for passages
_K = 10


def check_candidate(
    root: str, name: str, version: str, current: str | None, settings: PromoteConfig, force: bool = False
) -> list[Finding]:
    """Return the findings on a version's files, recall and quality.

    Raises ArtifactError when a file does not check, QualityError when its recall or quality falls short of the current
    version's or cannot be compared with it (unless `force`), naming what and by how much.
    """
    manifest, findings = check_manifest(root, name, version)
    if manifest is not None:
        standing = publish.read_version(root, name, current) if current not in (None, version) else None
        for file in sorted(manifest["files"]):
            findings += check_file(file, root, manifest)
        findings.append(_recall(manifest, standing))
        findings.append(_quality(root, manifest, standing, settings.max_quality_loss))
    for finding in findings:
        if finding.state == "failed" and not (force and finding.check in _QUALITY):
            raise _refusal(finding, name, version)
    return findings


def _refusal(finding: Finding, name: str, version: str) -> PinakesError:
    kind = QualityError if finding.check in _QUALITY else ArtifactError
    what = f"version {version} of {name!r} is not promoted: {finding.what}"
    told = f"; found {finding.found}" if finding.found else ""
    return kind(what, where=finding.where, expected=finding.expected + told, hint=finding.next)


def _recall(manifest: dict[str, Any], standing: dict[str, Any] | None) -> Finding:
    """Look whether the version keeps the recall that it, and the one before it, were built for."""
    targets = [m["config"].get("min_recall") or 0.0 for m in (manifest, standing) if m is not None]
    recall, target = manifest["recall"], max(targets)
    if not target:
        return Finding("recall", "skipped", "no recall was asked of it (index.min_recall)")
    expected = f"at least {target} (index.min_recall{' of the current version' if target > targets[0] else ''})"
    if recall is None:
        if is_exact(manifest["factory"]):
            return Finding("recall", "ok", f"{manifest['factory']} searches exactly")
        return Finding("recall", "failed", "its recall was never measured", expected=expected,
                       next="build it with index.recall_queries, or promote it with --force")  # fmt: skip
    told = f"recall@{recall['k']} is {recall['value']:.4f} on {recall['num_queries']} held-out queries"
    if recall["value"] < target:
        hint = "build it with a finer index.factory or wider search_params, or promote it with --force"
        return Finding("recall", "failed", told, expected=expected, next=hint)
    return Finding("recall", "ok", f"{told}, {expected}")


def _quality(root: str, manifest: dict[str, Any], standing: dict[str, Any] | None, allowed: float) -> Finding:
    """Compare the evaluation with the current version's: whoever was evaluated is not replaced by one that was not."""
    if standing is None:
        return Finding("quality", "skipped", "there is no other version to compare with")
    mine, its = publish.read_evaluation(root, manifest), publish.read_evaluation(root, standing)
    if its is None:
        why = f"the current version, {standing['version']}, was never evaluated"
        return Finding("quality", "skipped", why, next=_evaluate(standing))
    if mine is None:
        return _incomparable(f"it was never evaluated, and the current version, {standing['version']}, was", manifest)
    if _asked(mine) != _asked(its):
        why = "it and the current version were evaluated on different questions, or in different ways"
        return _incomparable(why, standing, manifest)
    before, after = scores(its), scores(mine)
    shared = sorted(before.keys() & after.keys())
    if not shared:
        why = "its evaluation and the current version's have no score in common"
        return _incomparable(why, standing, manifest)
    lost = max(shared, key=lambda name: before[name] - after[name])
    loss = before[lost] - after[lost]
    if loss > allowed:
        what = f"{lost} falls from {before[lost]:.4f} to {after[lost]:.4f}, on {mine['num_questions']} questions"
        return Finding("quality", "failed", what, expected=f"a loss of at most {allowed} (promote.max_quality_loss)",
                       next="look at both reports; promote it with --force if that is meant")  # fmt: skip
    told = f"no score falls by more than {allowed}; {lost} goes from {before[lost]:.4f} to {after[lost]:.4f}"
    return Finding("quality", "ok", f"{told}, on {mine['num_questions']} questions")


def _incomparable(why: str, *lacking: dict[str, Any]) -> Finding:
    commands = ", then ".join(_evaluate(manifest) for manifest in lacking)
    expected = "evaluations of both versions on the same questions"
    return Finding("quality", "failed", why, expected=expected, next=f"{commands}, with one config; or --force")


def _evaluate(manifest: dict[str, Any]) -> str:
    return f"pinakes evaluate CONFIG --version {manifest['version']}"


def _asked(evaluation: dict[str, Any]) -> Any:
    """Return what has to be equal for two evaluations to be compared (older ones lack the fingerprint)."""
    return evaluation.get("settings") or (evaluation.get("questions"), evaluation.get("num_questions"))


def scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return every score of an evaluation by its name; those of later stages as `rerank.mrr@10`."""
    parts = {"": evaluation, **{f"{stage}.": evaluation.get(stage) or {} for stage in STAGES}}
    return {
        part + name: float(value)
        for part, content in parts.items()
        for name, value in content.items()
        if name.partition("@")[0] in METRIC_LABELS
    }


# Once it is loaded


def open_candidate(root: str, name: str, version: str, settings: PromoteConfig) -> list[Finding]:
    """Load a version in this process, ask it the smoke queries, and let go of it. Raises what they raise."""
    manifest = publish.read_version(root, name, version)
    with room_for(root, manifest) as room:
        retriever = Retriever(root, manifest)
    queries = smoke_queries(manifest, retriever.passages, settings.smoke_queries)
    k = smoke_k(manifest)
    emb_BD = retriever.encoder.encode_queries(queries)
    score_BK, row_BK = retriever.search_vectors(emb_BD, k)
    hits = retriever.passages.hits(score_BK, row_BK)
    return [Finding("room", "ok", room), check_smoke(manifest, queries, score_BK, row_BK, hits)]


def smoke_queries(manifest: dict[str, Any], passages: Passages, num: int) -> list[str]:
    """Return up to `num` texts to search for: the texts of passages, drawn by the version's name."""
    rng = np.random.default_rng(zlib.crc32(manifest["version"].encode()))
    rows = rng.choice(len(passages), size=min(num, len(passages)), replace=False)
    drawn = np.setdiff1d(rows, manifest.get("quarantined", []))
    texts = [_smoke_text(passages.by_row(int(row))) for row in drawn]
    return [text for text in texts if text] or [_ANYTHING]


def _smoke_text(passage: Passage) -> str:
    return (passage.text.strip() or passage.title.strip())[:_QUERY_CHARACTERS]


def _finds_itself(manifest: dict[str, Any]) -> bool:
    """Tell whether a passage's text, as a query, comes about where the passage lies."""
    encoder = manifest["encoder"]
    return bool(encoder["query_digest"] == encoder["digest"] and encoder["family"] not in _TWO_TOWERS)


def smoke_k(manifest: dict[str, Any]) -> int:
    return min(_K, int(manifest["num_rows"]) - len(manifest.get("quarantined", []))) or 1


def check_smoke(
    manifest: dict[str, Any], queries: Sequence[str], score_BK: Array, row_BK: Array, hits: Sequence[Sequence[Hit]]
) -> Finding:
    """Return the finding on the answers to the smoke queries. Raises ArtifactError when one has none, or no score.

    How many find a passage of their own text is told, not held against the version: an encoder may well make much of
    titles, which queries lack.
    """
    where = f"index {manifest['name']!r}, version {manifest['version']}"
    for query, score_K, row_K, found in zip(queries, score_BK, row_BK, hits, strict=True):
        wrong = ""
        if not found:
            wrong = "finds nothing"
        elif not np.isfinite(score_K[row_K >= 0]).all():
            wrong = "gives scores that are not finite"
        elif any(not (hit.passage.text or hit.passage.title) for hit in found):
            wrong = "finds passages without text"
        if wrong:
            raise ArtifactError(f"a smoke query {wrong}: {query[:60]!r}", where=where, expected="hits with scores",
                                hint="`pinakes verify` says what is wrong with the version")  # fmt: skip
    told = f"{len(queries)} smoke queries give hits with finite scores"
    if not _finds_itself(manifest) or list(queries) == [_ANYTHING]:
        return Finding("smoke", "ok", told)
    own = sum(any(_smoke_text(h.passage) == query for h in found) for query, found in zip(queries, hits, strict=True))
    hint = "" if own else "`pinakes verify` tells whether the vectors are its passages'"
    return Finding("smoke", "ok", f"{told}; {own or 'none'} of them find their own passage", next=hint)
