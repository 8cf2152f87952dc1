"""Versions that differ in how they are searched share their files; nothing is taken that the plan would not make."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import embeddings, recall, train, twins
from pipelines.build import BuildPlan, add_group, find_shard, merge_shard, plan_build, write_passages
from pipelines.config import IndexConfig
from pipelines.index.exact import exact_topk
from pipelines.manifest import Receipt, drop_receipts, put_done, write_manifest
from tests.test_corpus import ingest

D, N = 8, 400
X = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
ENCODER = {"fingerprint": "e" * 16, "query_fingerprint": "q" * 16}


class World:
    """A snapshot and its embeddings, and plans of indexes over them."""

    def __init__(self, folder: Path) -> None:
        source = folder / "a.jsonl"
        source.write_text("".join(json.dumps({"id": f"p{i}", "text": f"text {i}"}) + "\n" for i in range(N)))
        self.root = str(folder)
        self.snapshot, _ = ingest(folder, sources=[str(source)], part_size=90)
        self.embedded = {"encoder": ENCODER, "snapshot": self.snapshot["snapshot"], "dim": D, "num_rows": N}
        store, entries = self.plan().vectors, []
        for number, part in enumerate(self.snapshot["parts"]):
            rows = slice(part["first_row"], part["first_row"] + part["num_rows"])
            data = embeddings.to_parquet([""] * part["num_rows"], X[rows], "fp32")
            receipt = put_done(store, embeddings.part_name(number), data, "", {"num_rows": part["num_rows"]})
            entries.append({**receipt.as_entry(), "first_row": part["first_row"]})
        self.embedded["parts"] = entries

    def plan(self, **index: Any) -> BuildPlan:
        given = {"factory": "IVF4,SQ8", "num_shards": 2, "group_rows": 70, **index}
        return plan_build(self.root, IndexConfig(**given), self.snapshot, self.embedded, 1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def build(plan: BuildPlan) -> list[Receipt]:
    """Do the steps of a build in a plain loop, up to what is measured."""
    trained = train.train_quantizer(plan)
    receipts = [trained]
    for shard in plan.shards:
        found = find_shard(plan, trained, shard)
        groups = [] if found else [add_group(plan, trained, shard, g) for g in range(len(shard.groups))]
        receipts += [found or merge_shard(plan, trained, shard, groups), *write_passages(plan, shard)]
    return receipts


def publish(plan: BuildPlan, receipts: list[Receipt]) -> None:
    files = {r.name: {k: v for k, v in r.as_entry().items() if k != "name"} for r in receipts}
    write_manifest(plan.store, "version", {"build": plan.build, "files": files})
    plan.work.remove_all()
    drop_receipts(plan.store)


@pytest.mark.parametrize("published", [True, False])
def test_another_target_or_other_parameters_take_the_files_that_are_there(world: World, published: bool) -> None:
    first = world.plan(min_recall=0.9)
    made = build(first)
    if published:
        publish(first, made)
    for index in ({"min_recall": 0.8}, {"search_params": {"nprobe": 2}}, {"min_recall": 0.9, "recall_queries": 5}):
        other = world.plan(**index)
        assert other.version != first.version
        assert twins.adopt(other) == len(made) == 7
        again = build(other)
        assert all(receipt.reused for receipt in again)
        assert [(r.name, r.sha256, r.facts) for r in again] == [(r.name, r.sha256, r.facts) for r in made]
        assert os.path.samefile(other.store.path("shard-001.faiss"), first.store.path("shard-001.faiss"))
        assert twins.adopt(other) == 0
        other.store.remove_all()
    assert all(first.store.exists(receipt.name) for receipt in made)


@pytest.mark.parametrize("index", [{"seed": 1}, {"factory": "IVF5,SQ8"}, {"num_shards": 3}, {"train_rows": 300},
                                   {"metric": "l2"}, {"group_rows": 40}])  # fmt: skip
def test_another_build_takes_nothing(world: World, index: dict[str, Any]) -> None:
    publish(first := world.plan(), build(first))
    other = world.plan(**index)
    assert other.build != first.build
    assert twins.adopt(other) == 0


def test_what_is_damaged_or_gone_in_the_twin_is_made_anew(world: World) -> None:
    made = build(first := world.plan())
    publish(first, made)
    damaged = Path(first.store.path("shard-000.faiss"))
    contents = damaged.read_bytes()
    damaged.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    os.unlink(first.store.path("passages-001.arrow"))
    other = world.plan(search_params={"nprobe": 1})
    assert twins.adopt(other) == len(made) - 1
    again = build(other)
    assert {r.name for r in again if not r.reused} == {"shard-000.faiss", "passages-001.arrow"}
    assert [r.sha256 for r in again] == [r.sha256 for r in made]
    assert damaged.read_bytes() != Path(other.store.path("shard-000.faiss")).read_bytes() == contents


def test_files_are_copied_where_there_are_no_links(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    build(world.plan())

    def refuse(*_: object) -> None:
        raise OSError(1, "links are not permitted")

    monkeypatch.setattr(os, "link", refuse)
    other = world.plan(search_params={"nprobe": 1})
    assert twins.adopt(other) == 7
    assert all(receipt.reused for receipt in build(other))


def test_searches_of_a_version_are_kept_until_it_is_published(world: World) -> None:
    plan, queries = world.plan(), X[:5] + 0.1
    rows = plan.shards[1].groups[1]
    exact = recall.exact_in(plan, rows, queries, 3)
    expected = exact_topk(queries, [(X[rows.start : rows.stop], np.arange(rows.start, rows.stop))], 3, "ip")
    np.testing.assert_array_equal(exact[1], expected[1])
    kept, entry = plan.work.files(), {"sha256": "a" * 64}
    found = recall.found_in(plan, entry, (queries, 3, {"nprobe": 2}), lambda: (exact, 0.25))

    def never() -> Any:
        raise AssertionError("searched again")

    again = recall.found_in(plan, entry, (queries, 3, {"nprobe": 2}), never)
    assert again[1] == found[1] == 0.25
    np.testing.assert_array_equal(again[0][1], exact[1])
    shutil.rmtree(plan.vectors.path())
    np.testing.assert_array_equal(recall.exact_in(plan, rows, queries, 3)[0], exact[0])
    for other in ((queries, 2, {"nprobe": 2}), (queries, 3, {"nprobe": 3}), (queries[:4], 3, {"nprobe": 2})):
        with pytest.raises(AssertionError, match="searched again"):
            recall.found_in(plan, entry, other, never)
    with pytest.raises(AssertionError, match="searched again"):
        recall.found_in(plan, {"sha256": "b" * 64}, (queries, 3, {"nprobe": 2}), never)
    assert len(plan.work.files()) == len(kept) + 1
