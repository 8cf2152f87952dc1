"""Is a published version whole? Manifest, files, shards, passages and embeddings are looked at, every fault is told.

    manifest -> files -> shards + passages (a shard at a time) -> embeddings (a part at a time) -> encoders + sample

Each check is a plain function that returns findings and can run anywhere; a damaged version gives all its findings,
not only the first. What lies inside a file is only looked at when its checksum holds: it may not be readable at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines import corpus
from pipelines.build import TRAINED, version_name
from pipelines.errors import ArtifactError, CheckpointError, ConfigError, InputError, PinakesError
from pipelines.manifest import MANIFEST, has_manifest, read_manifest
from pipelines.publish import index_store
from pipelines.retrieve import bound_encoder
from pipelines.storage import Store

# What is told as a finding. A StorageError is none: then the version was not seen, and nothing can be said of it.
FAULTS = (ArtifactError, CheckpointError, ConfigError, InputError)
State = Literal["ok", "failed", "skipped"]
REBUILD = "restore it from a copy, or delete the version's folder and run `pinakes index` again"
RE_ENCODE = "delete it and the manifest.json beside it, then run `pinakes encode` again"
_NEEDED: dict[str, Any] = {
    **dict.fromkeys(("name", "version", "metric", "factory", "corpus", "snapshot", "embeddings", "created"), str),
    **dict.fromkeys(("format_version", "num_rows", "dim", "num_shards"), int),
    **dict.fromkeys(("encoder", "search_params", "files", "config", "packages", "timings_seconds"), dict),
}


@dataclass(frozen=True)
class Finding:
    """What one check found. `check` is its kind; a failed one says where, what was expected, found, and what to do."""

    check: str
    state: State
    what: str
    where: str = ""
    expected: str = ""
    found: str = ""
    next: str = ""

    @classmethod
    def of(cls, check: str, error: PinakesError) -> Finding:
        """Return the failed finding that an error of ours is."""
        return cls(check, "failed", error.what, error.where, error.expected, "", error.hint or REBUILD)

    def as_dict(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items() if value}


Spread = Callable[..., Iterable[tuple[int, Any]]]
"""Calls `function(item, *common)` for every item and yields (position, result): here, or on many machines."""


def in_this_process(function: Callable[..., Any], items: Sequence[Any], *common: Any) -> Iterator[tuple[int, Any]]:
    """Call the function for one item after the other."""
    return ((position, function(item, *common)) for position, item in enumerate(items))


def verify(
    root: str,
    name: str,
    version: str,
    num_sampled: int = 32,
    deep: bool = False,
    spread: Spread = in_this_process,
    say: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Return the findings of all checks of one version.

    num_sampled: passages that are encoded and searched again; 0 leaves that out. deep: read the embedding parts whole,
    not only their sizes and footers. Raises StorageError when the store cannot be read.
    """
    from pipelines.verify_embeddings import check_part
    from pipelines.verify_sample import check_encoder, check_sample
    from pipelines.verify_shard import check_passages, check_shard

    manifest, findings = check_manifest(root, name, version)
    if manifest is None:
        return findings

    def run(function: Callable[..., Any], items: Sequence[Any], *common: Any) -> None:
        for _, found in sorted(spread(function, items, *common), key=lambda result: result[0]):
            findings.extend(found)

    say(f"files of version {version} of index {name!r}: checksums")
    run(check_file, sorted(manifest["files"]), root, manifest)
    findings += check_leftovers(root, manifest)
    bad = frozenset(f.where.rpartition("/")[2] for f in findings if f.check == "files" and f.state == "failed")
    snapshot, embedded, about = _made_from(root, manifest)
    findings += about
    say("shards, passages and embedding parts")
    run(check_shard, range(manifest["num_shards"]), root, manifest, bad)
    run(check_passages, range(manifest["num_shards"]), root, manifest, bad, snapshot)
    run(check_part, embedded["parts"] if embedded else [], root, manifest, deep)
    say("encoders and a sample of the passages")
    run(check_encoder, ["passage", "query"], manifest)
    run(check_sample, [num_sampled] if num_sampled else [], root, manifest, bad, embedded, snapshot)
    return findings


# The manifest


def check_manifest(root: str, name: str, version: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return (manifest, findings); no manifest when it is too damaged for the other checks to rest on it."""
    store = index_store(root, name).child(version)
    where = store.path(MANIFEST)
    try:
        manifest = read_manifest(store, "version")
    except ArtifactError as error:
        return None, [Finding.of("manifest", error)]
    except AttributeError:  # JSON, but no object
        return None, [Finding("manifest", "failed", "the manifest is no JSON object", where, next=REBUILD)]
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(manifest.get(key), kind)]
    wrong += [] if _means_a_recall(manifest.get("recall", "")) else ["recall"]
    wrong += [] if wrong or _names_an_encoder(manifest) else ["encoder"]
    wrong += _wrong_entries(manifest) if not wrong else []
    if wrong:
        what = f"the manifest lacks, or does not mean, {', '.join(wrong)}"
        return None, [Finding("manifest", "failed", what, where, "what `pinakes index` writes", "", REBUILD)]
    findings = [
        Finding("manifest", "failed", f"the manifest's {what} is not what the rest of it says", where, expected, found,
                REBUILD)
        for what, expected, found in _identities(manifest, name, version) if expected != found
    ]  # fmt: skip
    return manifest, findings or [Finding("manifest", "ok", "it is whole and names itself", where)]


def _means_a_recall(recall: Any) -> bool:
    """Tell whether this is what a build measured; None where it measured nothing."""
    if not isinstance(recall, dict):
        return recall is None
    shares = [recall.get(key) for key in ("value", "ci95")]
    return isinstance(recall.get("k"), int) and all(isinstance(s, int | float) and 0 <= s <= 1 for s in shares)


def _names_an_encoder(manifest: dict[str, Any]) -> bool:
    try:
        spec = bound_encoder(manifest)
    except TypeError:  # a field is missing
        return False
    texts = (spec.checkpoint, spec.query_checkpoint, spec.family, spec.compute, spec.digest, spec.query_digest)
    return all(isinstance(t, str) for t in texts) and isinstance(spec.dim, int) and isinstance(spec.max_length, int)


def _wrong_entries(manifest: dict[str, Any]) -> list[str]:
    """Return the names of files whose entry is missing or malformed, and of kinds that do not cover all rows."""
    files, numbers = manifest["files"], range(manifest["num_shards"])
    patterns = ("shard-{:03d}.faiss", "passages-{:03d}.arrow", "ids-{:03d}.arrow")
    names = [TRAINED, *(pattern.format(number) for pattern in patterns for number in numbers)]
    wrong = [
        name
        for name in sorted({*names, *files})
        if not isinstance(entry := files.get(name), dict)
        or not isinstance(entry.get("num_bytes"), int)
        or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
    ]
    if wrong or not numbers:
        return wrong or ["num_shards"]
    for pattern in patterns:
        entries = [files[pattern.format(number)] for number in numbers]
        rows = 0
        for entry in entries:
            rows += entry.get("num_rows", -1) if entry.get("first_row") == rows else -1
        wrong += [] if rows == manifest["num_rows"] else [f"the rows of {pattern.format(0)} to {len(numbers) - 1:03d}"]
    return wrong


def _identities(manifest: dict[str, Any], name: str, version: str) -> Iterator[tuple[str, str, str]]:
    """Yield (what, expected, found) of everything in the manifest that follows from something else."""
    encoder = manifest["encoder"]
    yield "index name", name, manifest["name"]
    yield "version", version, manifest["version"]
    spec = bound_encoder(manifest)
    passage, query = spec.fingerprint, spec.query_fingerprint
    yield "encoder.fingerprint", passage, str(encoder.get("fingerprint"))
    yield "encoder.query_fingerprint", query, str(encoder.get("query_fingerprint"))
    yield "embeddings", passage, manifest["embeddings"]
    yield "dim", str(spec.dim), str(manifest["dim"])
    # From the settings as they were then: newer programs may know more of them.
    identity = [manifest["format_version"], passage, query, manifest["snapshot"]]
    shape = [manifest["metric"], manifest["num_shards"], *filter(None, [manifest.get("order")])]
    is_tuned = "tuning" in (manifest["recall"] or {})
    yield "settings", version, version_name([*identity, *shape], manifest["config"], tuned=is_tuned)


# Files


def check_file(name: str, root: str, manifest: dict[str, Any]) -> list[Finding]:
    """Compare one file's size and checksum with its entry."""
    store = index_store(root, manifest["name"]).child(manifest["version"])
    return [compared("files", store, {**manifest["files"][name], "name": name}, True, REBUILD)]


def compared(check: str, store: Store, entry: dict[str, Any], checksum: bool, hint: str) -> Finding:
    """Compare a file with its entry {name, num_bytes, sha256}: first what costs nothing, then the checksum if asked."""
    name, where = entry["name"], store.path(entry["name"])
    if not store.exists(name):
        return Finding(check, "failed", f"{name} is not there", where, f"{entry['num_bytes']} bytes", "nothing", hint)
    if (size := store.size(name)) != entry["num_bytes"]:
        what = f"{name} is not as long as it was"
        return Finding(check, "failed", what, where, f"{entry['num_bytes']} bytes", f"{size} bytes", hint)
    if checksum and (found := store.sha256(name)) != entry["sha256"]:
        what = "the file is damaged: its checksum is not the recorded one"
        return Finding(check, "failed", what, where, entry["sha256"], found, hint)
    return Finding(
        check, "ok", f"{name} is there, {size:,} bytes" + (", its checksum holds" if checksum else ""), where
    )


def check_leftovers(root: str, manifest: dict[str, Any]) -> list[Finding]:
    """Look for what a killed writer left beside the published files."""
    store = index_store(root, manifest["name"]).child(manifest["version"])
    half = [*store.files(".tmp-"), *(f for f in store.folders() if f in ("receipts", "work"))]
    hint = "delete it, unless a `pinakes index` or `pinakes evaluate` is writing here right now"
    found = [Finding("leftovers", "failed", "a half-written thing lies beside the version", store.path(name),
                     "only published files", name, hint) for name in half]  # fmt: skip
    return found or [Finding("leftovers", "ok", "nothing half-written lies beside it", store.path())]


# What the version was made from


def _made_from(
    root: str, manifest: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[Finding]]:
    """Return the manifests of the snapshot and of the embeddings, None where they are gone or damaged, and findings."""
    from pipelines.verify_embeddings import check_embeddings, vectors_of

    snapshot, findings = _folder(corpus.corpus_store(root, manifest["corpus"]).child(manifest["snapshot"]), "snapshot")
    embedded, about = _folder(vectors_of(root, manifest), "embeddings")
    findings += about
    if embedded is not None:
        findings += check_embeddings(root, manifest, embedded, snapshot)
    return snapshot, embedded, findings


def _folder(store: Store, kind: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return (manifest or None, findings) of a folder that a version was made from but does not need any more."""
    if not has_manifest(store) and not store.files():
        why = f"skipped, because the {kind} is no longer in the root"
        return None, [Finding(kind, "skipped", why, store.path())]
    try:
        manifest = read_manifest(store, kind)
        parts = [(p["name"], p["sha256"], p["num_rows"] + p["first_row"] + p["num_bytes"]) for p in manifest["parts"]]
    except ArtifactError as error:
        return None, [Finding.of(kind, error)]
    except (KeyError, TypeError, ValueError) as error:
        what = f"the manifest's parts do not read: {error!r}"
        return None, [Finding(kind, "failed", what, store.path(MANIFEST), next=f"restore it, or make the {kind} anew")]
    return manifest, [Finding(kind, "ok", f"its manifest lists {len(parts)} parts", store.path(MANIFEST))]
