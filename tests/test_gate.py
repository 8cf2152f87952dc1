"""The gate: what lets a version be promoted, what stops it, and that nothing changes when it is stopped."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import switch
from pipelines import gate, publish, room
from pipelines.config import PromoteConfig
from pipelines.errors import ArtifactError, PinakesError, QualityError, StorageError
from pipelines.index.exact import exact_topk
from pipelines.retrieve import LocalShard, Retriever, search_without
from pipelines.schema import Hit, Passage
from tests.two_versions import ALIAS, QUERIES, TwoVersions, build_two

SETTINGS = PromoteConfig()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TwoVersions:
    return build_two(tmp_path_factory.mktemp("gate"))


@pytest.fixture
def two(built: TwoVersions, tmp_path: Path) -> TwoVersions:
    """A copy of the root, whose alias points to the old version."""
    shutil.copytree(built.root, tmp_path / "root")
    copy = TwoVersions(str(tmp_path / "root"), built.old, built.new)
    publish.promote(copy.root, ALIAS, copy.old)
    return copy


def promote(two: TwoVersions, force: bool = False, **settings_: Any) -> dict[str, Any]:
    chosen = PromoteConfig(**settings_)
    return asyncio.run(switch.promote(switch.NoReplicas(two.root, chosen), two.root, ALIAS, two.new, chosen, force))


def evaluated(two: TwoVersions, version: str, **scores: Any) -> None:
    content = {"num_questions": 200, "questions": "q.jsonl", "settings": "same", **scores}
    store = publish.index_store(two.root, ALIAS).child(version)
    store.put(publish.EVALUATION, json.dumps(content).encode())


def changed(two: TwoVersions, **manifest: Any) -> None:
    """Rewrite keys of the new version's manifest; those that its name does not depend on."""
    path = Path(two.root, "indexes", ALIAS, two.new, "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest}))


def test_a_sound_version_passes_and_says_what_was_looked_at(two: TwoVersions) -> None:
    result = promote(two)
    assert (result["current"], result["previous"], result["replicas"]) == (two.new, two.old, 0)
    checks = {check["check"]: check["state"] for check in result["gate"]}
    assert checks == {"recall": "skipped", "quality": "skipped", "room": "ok", "smoke": "ok"}
    assert publish.current(two.root, ALIAS) == two.new


@pytest.mark.parametrize("name", ["shard-001.faiss", "passages-000.arrow", "trained.faiss"])
def test_a_damaged_file_is_refused_even_by_force(two: TwoVersions, name: str) -> None:
    path = Path(two.root, "indexes", ALIAS, two.new, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        promote(two, force=True)
    assert publish.current(two.root, ALIAS) == two.old


def test_an_unknown_version_is_refused(two: TwoVersions) -> None:
    with pytest.raises(ArtifactError, match="no published version"):
        asyncio.run(switch.promote(switch.NoReplicas(two.root, SETTINGS), two.root, ALIAS, "nope", SETTINGS))


def test_a_recall_below_its_target_is_refused_unless_forced(two: TwoVersions) -> None:
    manifest = two.manifest(two.new)
    recall = {"k": 10, "value": 0.8, "ci95": 0.01, "num_queries": 100}
    changed(two, recall=recall, config={**manifest["config"], "min_recall": 0.95})
    with pytest.raises(QualityError, match=r"recall@10 is 0\.8000"):
        promote(two)
    assert publish.current(two.root, ALIAS) == two.old
    assert promote(two, force=True)["current"] == two.new


def test_a_loss_of_quality_is_refused_unless_allowed_or_forced(two: TwoVersions) -> None:
    evaluated(two, two.old, **{"mrr@10": 0.6, "gold_top@5": 0.8, "num_gold_questions": 200})
    evaluated(two, two.new, **{"mrr@10": 0.7, "gold_top@5": 0.75, "num_gold_questions": 200})
    with pytest.raises(QualityError, match=r"gold_top@5 falls from 0\.8000 to 0\.7500") as refused:
        promote(two)
    assert "--force" in refused.value.hint
    assert publish.current(two.root, ALIAS) == two.old
    assert promote(two, max_quality_loss=0.06)["current"] == two.new
    publish.promote(two.root, ALIAS, two.old)
    assert promote(two, force=True)["current"] == two.new


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        (None, "was never evaluated"),
        ({"mrr@10": 0.9, "settings": "other"}, "different questions"),
        ({"em": 0.9}, "no score in common"),
    ],
)
def test_a_version_that_cannot_be_compared_with_an_evaluated_one_is_refused(
    two: TwoVersions, mine: dict[str, Any] | None, words: str
) -> None:
    evaluated(two, two.old, **{"mrr@10": 0.6})
    if mine is not None:
        evaluated(two, two.new, **mine)
    with pytest.raises(QualityError, match=words) as refused:
        promote(two)
    assert f"pinakes evaluate CONFIG --version {two.new}" in refused.value.hint
    assert "--force" in refused.value.hint
    assert promote(two, force=True)["current"] == two.new


def test_where_the_current_version_was_never_evaluated_nothing_is_compared(two: TwoVersions) -> None:
    evaluated(two, two.new, **{"mrr@10": 0.6})
    quality = next(check for check in promote(two)["gate"] if check["check"] == "quality")
    assert (quality["state"], two.old in quality["next"]) == ("skipped", True)


@pytest.mark.parametrize(
    ("own", "standing", "measured", "factory", "state"),
    [
        (None, None, None, "SQ8", "skipped"),
        (0.9, None, None, "SQ8", "failed"),
        (None, 0.95, None, "SQ8", "failed"),
        (None, 0.95, 0.94, "SQ8", "failed"),
        (0.9, 0.95, 0.94, "SQ8", "failed"),
        (0.9, 0.95, 0.95, "SQ8", "ok"),
        (0.95, 0.9, 0.94, "SQ8", "failed"),
        (None, 0.95, None, "Flat", "ok"),
        (0.9, None, None, "IDMap2,Flat", "ok"),
        (None, 0.95, None, "PCA8,Flat", "failed"),
    ],
)
def test_recall_is_held_against_the_larger_of_both_targets(
    own: float | None, standing: float | None, measured: float | None, factory: str, state: str
) -> None:
    recall = None if measured is None else {"k": 10, "value": measured, "num_queries": 100}
    candidate = {"recall": recall, "factory": factory, "config": {"min_recall": own}}
    found = gate._recall(candidate, {"config": {"min_recall": standing}})
    assert found.state == state
    assert ("of the current version" in found.expected) == (state == "failed" and (standing or 0) > (own or 0))
    if standing is None:
        assert gate._recall(candidate, None) == found


SCORES = st.dictionaries(
    st.sampled_from(["mrr@10", "ndcg@10", "gold_top@1", "em", "num_questions"]), st.floats(0, 1), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(before=SCORES, after=SCORES, allowed=st.floats(0, 1))
def test_quality_fails_just_when_a_shared_score_falls_too_far(
    built: TwoVersions, before: dict[str, float], after: dict[str, float], allowed: float
) -> None:
    base = {"questions": "q", "settings": "s"}
    kept = {built.old: {**before, **base, "num_questions": 9}, built.new: {**after, **base, "num_questions": 9}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "read_evaluation", lambda root, manifest: kept[manifest["version"]])
        found = gate._quality(built.root, built.manifest(built.new), built.manifest(built.old), allowed)
    losses = [before[name] - after[name] for name in before.keys() & after.keys() - {"num_questions"}]
    expected = "failed" if not losses or max(losses) > allowed else "ok"
    assert found.state == expected


def test_no_room_for_another_encoder_is_refused(two: TwoVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 1000)
    with pytest.raises(PinakesError, match="no room"):
        promote(two, force=True)
    assert publish.current(two.root, ALIAS) == two.old


def test_room_is_told_from_what_is_there(two: TwoVersions) -> None:
    manifest = two.manifest(two.new)
    weights = Path(manifest["encoder"]["query_checkpoint"], "model.safetensors").stat().st_size
    assert room.encoder_bytes(manifest) == 2 * weights
    assert 0 < room.free_memory() < 1 << 50
    assert "free memory" in room.check_room(two.root, manifest)


def test_only_what_is_loaded_counts(two: TwoVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, seen = two.manifest(two.new), set[str]()
    monkeypatch.setattr(room, "_not_cached", lambda root, name, served: seen.update(served) or 0)

    def count(*arguments: Any) -> None:
        seen.clear()
        room.check_room(two.root, manifest, *arguments)

    everything = {name for name in manifest["files"] if name.startswith(("shard-", "passages-", "ids-"))}
    count()
    assert seen == everything
    count(room.of_passages)
    assert seen == {name for name in everything if not name.startswith("shard-")}
    count(room.of_shards(1, 2), False)
    assert seen == {"shard-001.faiss", "passages-001.arrow", "ids-001.arrow"}
    count(room.of_shards(0, 2), False)
    assert {name for name in seen if name.startswith("shard-")} == {"shard-000.faiss", "shard-002.faiss"}
    monkeypatch.setattr(room, "free_memory", lambda: 1000)
    room.check_room(two.root, manifest, room.of_shards(0, 2), False)  # no encoder: nothing that has to fit


def test_replicas_of_one_machine_make_sure_of_room_one_after_the_other(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = two.manifest(two.new)
    taken, weights = [0], room.encoder_bytes(manifest)
    monkeypatch.setattr(room, "free_memory", lambda: 2 * weights - taken[0])

    def load(_: int) -> str:
        try:
            with room.room_for(two.root, manifest):
                time.sleep(0.05)
                taken[0] += weights
                return "loaded"
        except PinakesError:
            return "no room"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(load, range(4))) == ["loaded", "loaded", "no room", "no room"]


def test_an_alias_moved_meanwhile_is_left_alone(two: TwoVersions) -> None:
    with pytest.raises(StorageError, match="moved by somebody else"):
        publish.promote(two.root, ALIAS, two.new, seen="another")
    with pytest.raises(StorageError, match="moved by somebody else"):
        publish.promote(two.root, ALIAS, two.new, seen=None)
    assert publish.promote(two.root, ALIAS, two.new, seen=two.old)["current"] == two.new
    # Two drivers that want the same: the later one finds it done.
    assert publish.promote(two.root, ALIAS, two.new, seen=two.old) == publish.read_alias(two.root, ALIAS)


def test_two_that_move_an_alias_to_the_same_version_at_once_agree(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, before = publish._save_alias, publish.promote(two.root, ALIAS, two.old)["history"]

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(publish, "_save_alias", save)
        publish.promote(two.root, ALIAS, two.new)  # the other one, between our look and our write
        save(*arguments)

    monkeypatch.setattr(publish, "_save_alias", late)
    assert publish.promote(two.root, ALIAS, two.new) == publish.read_alias(two.root, ALIAS)
    assert publish.read_alias(two.root, ALIAS)["history"][:-1] == before


@pytest.mark.parametrize(
    ("score", "row", "hits", "message"),
    [
        (np.nan, 3, [Hit(3, 1.0, Passage("a", "", "text"))], "not finite"),
        (1.0, -1, [], "finds nothing"),
        (1.0, 3, [Hit(3, 1.0, Passage("a", "", ""))], "without text"),
    ],
)
def test_smoke_queries_want_finite_scores_and_text(
    two: TwoVersions, score: float, row: int, hits: list[Hit], message: str
) -> None:
    scores, rows = np.array([[score]], np.float32), np.array([[row]], np.int64)
    with pytest.raises(ArtifactError, match=message):
        gate.check_smoke(two.manifest(two.new), ["who"], scores, rows, [hits])


def smoke(two: TwoVersions, shift: int, **encoder: Any) -> gate.Finding:
    """Ask the smoke queries, and take for each hit the passage that lies `shift` rows further on."""
    retriever = Retriever(two.root, two.manifest(two.new))
    queries = gate.smoke_queries(retriever.manifest, retriever.passages, 8)
    score_BK, row_BK = retriever.search_vectors(retriever.encoder.encode_queries(queries), 3)
    row_BK = (row_BK + shift) % len(retriever.passages)
    manifest = {**retriever.manifest, "encoder": {**retriever.manifest["encoder"], **encoder}}
    return gate.check_smoke(manifest, queries, score_BK, row_BK, retriever.passages.hits(score_BK, row_BK))


def test_smoke_tells_how_many_find_their_own_passage_where_queries_are_encoded_alike(two: TwoVersions) -> None:
    found, lost = smoke(two, 0), smoke(two, 30)
    assert ("8 of them find their own passage" in found.what, found.next) == (True, "")
    assert ("none of them find their own passage" in lost.what, "pinakes verify" in lost.next) == (True, True)
    assert "own passage" not in smoke(two, 30, query_digest="another tower's").what
    assert "own passage" not in smoke(two, 30, family="clip").what


# Rows that could not be encoded


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_search_without_rows_equals_an_index_that_never_had_them(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 30))
    unfit = np.array(sorted(data.draw(st.sets(st.integers(0, num - 1)))), np.int64)
    metric = data.draw(st.sampled_from(["ip", "l2"]))
    k, rng = data.draw(st.integers(1, num)), np.random.default_rng(num)
    vectors = rng.integers(-3, 4, (num, 3)).astype(np.float32)
    vectors[unfit] = 0
    queries = rng.integers(-3, 4, (4, 3)).astype(np.float32)

    def found_in(rows: Any, k: int) -> Any:
        return exact_topk(queries, [(vectors[rows], rows)], k, metric)

    everything = np.arange(num)
    score_BK, row_BK = search_without(unfit, lambda depth: found_in(everything, depth), k, num)
    expected = found_in(np.setdiff1d(everything, unfit), k)
    np.testing.assert_array_equal(row_BK, expected[1])
    np.testing.assert_array_equal(score_BK, expected[0])


@pytest.mark.parametrize("version", ["old", "new"])  # of one shard, and of three
def test_quarantined_rows_are_never_hits(two: TwoVersions, version: str) -> None:
    manifest = two.manifest(getattr(two, version))
    plain = Retriever(two.root, manifest)
    best = sorted({hit.row for hits in plain.search(QUERIES, 2) for hit in hits})
    without = Retriever(two.root, {**manifest, "quarantined": best})
    num_left = manifest["num_rows"] - len(best)
    for mine, all_hits in zip(without.search(QUERIES, 8), plain.search(QUERIES, manifest["num_rows"]), strict=True):
        assert [hit.row for hit in mine] == [hit.row for hit in all_hits if hit.row not in best][:8]
    assert all(len(hits) == num_left for hits in without.search(QUERIES, manifest["num_rows"]))
    shard = LocalShard(two.root, {**manifest, "quarantined": best}, 0)
    assert set(shard.unfit) == {row for row in best if row < shard.index.ntotal}
    assert not set(gate.smoke_queries({**manifest, "quarantined": best}, plain.passages, 99)) & {
        plain.passages.by_row(row).text for row in best
    }


def test_a_version_says_which_rows_were_quarantined(two: TwoVersions) -> None:
    assert two.manifest(two.new)["quarantined"] == []
