"""Filtered search of whole versions: in process, sharded, over HTTP and by the command; always as brute force says."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from starlette.testclient import TestClient

from cluster.api import build_api
from pipelines import publish, retrieve
from pipelines.config import ServeConfig
from pipelines.filters import parse_filter
from pipelines.manifest import read_manifest
from pipelines.retrieve import LocalShard, Retriever
from pipelines.staging import corpus_store
from pipelines.verify_shard import check_passages
from tests.checkpoints import write_sentence_transformer
from tests.local_backend import LocalBackend, build_root
from tests.test_filters import FIELDS, FILTERS, fits
from tests.test_pipeline import pinakes, pinakes_json

ROWS: list[dict[str, Any]] = [
    {
        "id": f"p{i}", "title": "", "text": f"the cat number {i} sat on mat {i * 7 % 13}",
        "lang": ("en", "fr", None)[i % 3], "year": 1980 + i % 25, "score": i / 4, "open": i % 2 == 0,
        "tags": [f"t{i % 4}", "all"] if i % 5 else None,
    }
    for i in range(90)
]  # fmt: skip
METADATA = [{"name": name, "type": kind} for name, kind in FIELDS.items()]
FACTS = [{name: row[name] for name in FIELDS} for row in ROWS]
QUERIES = [ROWS[7]["text"], "a mat for cats"]
SOME = {"lang": "en", "year": {"gte": 1985, "lt": 1999}, "any": [{"tags": "t1"}, {"open": True}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("filtered")
    checkpoint = write_sentence_transformer(str(folder / "model"))
    build_root(folder, checkpoint, ROWS, METADATA, name="whole")
    build_root(folder, checkpoint, ROWS, METADATA, name="sharded", num_shards=3, metric="l2", factory="HNSW8")
    return build_root(folder, checkpoint, ROWS, name="bare")


@pytest.fixture(scope="module")
def retrievers(root: str) -> dict[str, Retriever]:
    return {name: Retriever.open(root, name) for name in ("whole", "sharded", "bare")}


@pytest.fixture(scope="module")
def client(root: str) -> TestClient:
    backend = LocalBackend(root, ["whole", "sharded", "bare"], ServeConfig(access_log=False))
    return TestClient(build_api(lambda: backend, backend.config), raise_server_exceptions=False)


def by_brute_force(retriever: Retriever, content: dict[str, Any], k: int) -> list[list[int]]:
    """Return the rows of an unfiltered search for everything that satisfy the filter by plain Python, the first k."""
    everything = retriever.search(QUERIES, len(ROWS))
    return [[hit.row for hit in hits if fits(FACTS[hit.row], content)][:k] for hits in everything]


def test_a_version_finds_what_brute_force_finds(retrievers: dict[str, Retriever]) -> None:
    whole, sharded = retrievers["whole"], retrievers["sharded"]

    @settings(max_examples=40, deadline=None)
    @given(FILTERS)
    def check(content: dict[str, Any]) -> None:
        expected = by_brute_force(whole, content, 8)
        for retriever in (whole, sharded):
            found = retriever.search(QUERIES, 8, retriever.filter(content))
            assert [[hit.row for hit in hits] for hits in found] == expected

    check()
    assert by_brute_force(whole, SOME, 8) != [[], []]
    for retriever in (whole, sharded):
        hits = retriever.search(QUERIES, 8, retriever.filter(SOME))
        assert [[hit.row for hit in few] for few in hits] == by_brute_force(whole, SOME, 8)
        assert all(hit.passage.metadata == FACTS[hit.row] for few in hits for hit in few)


def test_rows_that_could_not_be_encoded_do_not_come_back_through_a_filter(root: str) -> None:
    manifest = publish.read_version(root, "whole")
    query = np.ones((1, manifest["dim"]), np.float32)
    plain = LocalShard(root, manifest, 0).search(query, 30, parse_filter({"lang": "en"}, FIELDS))[1][0]
    shard = LocalShard(root, {**manifest, "quarantined": plain[:2].tolist()}, 0)
    found = shard.search(query, 30, parse_filter({"lang": {"in": ["en"]}}, FIELDS))[1][0]
    assert found.tolist() == [*plain[2:].tolist(), -1, -1]


def test_kept_selections_hold_no_filter(root: str) -> None:
    shard, before = LocalShard(root, publish.read_version(root, "whole"), 0), set(retrieve._selections._kept)
    where = [parse_filter({"lang": {"in": [letter * 400_000, "en"]}}, FIELDS) for letter in "abca"]
    made = [shard.select(filter_) for filter_ in where if filter_]
    assert (made[0] is made[3], made[0] is made[1]) == (True, False)
    keys = set(retrieve._selections._kept) - before
    assert len(keys) == 3
    assert all(len(pickle.dumps(key)) < 1024 for key in keys)


def test_http_filters_and_shows_metadata(client: TestClient, retrievers: dict[str, Retriever]) -> None:
    expected = by_brute_force(retrievers["whole"], SOME, 5)
    for alias in ("whole", "sharded"):
        answer = client.post("/search", json={"queries": QUERIES, "k": 5, "alias": alias, "filter": SOME}).json()
        assert [[hit["row"] for hit in hits] for hits in answer["results"]] == expected
        known = [{name: v for name, v in FACTS[row].items() if v is not None} for row in expected[0]]
        assert [hit["metadata"] for hit in answer["results"][0]] == known
    assert client.get("/passages/p3").json()["metadata"] == {k: v for k, v in FACTS[3].items() if v is not None}
    assert "metadata" not in client.get("/passages/p3", params={"alias": "bare"}).json()
    nothing = client.post("/search", json={"query": "x", "filter": {"lang": "xx"}}).json()
    assert (nothing["hits"], nothing["complete"]) == ([], True)


@pytest.mark.parametrize(
    ("alias", "content", "told"),
    [
        ("whole", {"yaer": 1990}, "did you mean 'year'?; expected one of lang (string), year (int)"),
        ("whole", {"year": "1990"}, "'year' is compared with '1990'; expected a whole number"),
        ("whole", {"tags": {"gt": "a"}}, "'gt' is no operation on 'tags' (strings)"),
        ("whole", {"lang": {"in": ["x" * 1_000_000]}}, "10,000 values and 500,000 characters"),
        ("whole", {"any": {}}, "`any` is {}; expected a list of filters"),
        ("bare", {"lang": "en"}, "carries no metadata"),
    ],
)
def test_http_explains_a_filter_that_cannot_be_meant(client: TestClient, alias: str, content: Any, told: str) -> None:
    response = client.post("/search", json={"query": "x", "alias": alias, "filter": content})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert told in response.json()["detail"]


@pytest.mark.parametrize(("content", "num_hits"), [({"any": [{}]}, 5), ({}, 5)])
def test_a_filter_may_name_no_field(client: TestClient, content: Any, num_hits: int) -> None:
    for alias in ("bare", "whole"):
        response = client.post("/search", json={"query": "x", "k": 5, "alias": alias, "filter": content})
        assert (response.status_code, len(response.json()["hits"])) == (200, num_hits)


def test_the_command_filters(root: str, retrievers: dict[str, Retriever]) -> None:
    arguments = ("search", QUERIES[0], "--root", root, "--name", "sharded", "-k", "4", "--filter")
    found = pinakes_json(*arguments, json.dumps(SOME))
    assert [hit["row"] for hit in found["hits"]] == by_brute_force(retrievers["whole"], SOME, 4)[0]
    assert all(hit["metadata"]["lang"] == "en" for hit in found["hits"])
    assert "no JSON object" in pinakes(*arguments, "{lang: en}", code=2)
    assert "did you mean 'lang'" in pinakes(*arguments, '{"lng": "en"}', code=2)


def test_the_snapshot_says_what_it_carries_and_verify_compares_it(root: str) -> None:
    version = publish.read_version(root, "sharded")
    snapshot = read_manifest(corpus_store(root, "cats").child(version["snapshot"]), "snapshot")
    assert [(f["name"], f["type"]) for f in snapshot["config"]["metadata"]] == list(FIELDS.items())
    for known in (snapshot, None):
        assert {f.state for f in check_passages(1, root, version, frozenset(), known)} == {"ok"}
    fewer = {**snapshot, "config": {**snapshot["config"], "metadata": snapshot["config"]["metadata"][1:]}}
    (finding,) = check_passages(1, root, version, frozenset(), fewer)
    assert (finding.state, "schema" in finding.what) == ("failed", True)
