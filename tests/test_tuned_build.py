"""A build that tunes: what names its version, the gate that refuses it, two tiers, and all of it by the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.build import BuildPlan, plan_build
from pipelines.config import IndexConfig
from pipelines.errors import QualityError
from pipelines.index.tiers import TwoTier
from pipelines.index.tune import Params
from pipelines.publish import check_recall, list_versions, read_version
from pipelines.retrieve import LocalShard
from tests.test_pipeline import Job, pinakes, pinakes_json

D = 24


# The plan and the gate of a build


def planned(root: Path, **index: Any) -> BuildPlan:
    encoder = {"fingerprint": "e", "query_fingerprint": "q"}
    embedded = {"num_rows": 3000, "dim": D, "snapshot": "s", "encoder": encoder}
    return plan_build(str(root), IndexConfig(**index), {}, embedded, 1)


def test_a_target_names_the_version_only_where_it_is_tuned_to(tmp_path: Path) -> None:
    def version(**index: Any) -> str:
        return planned(tmp_path, **index).version

    plan = planned(tmp_path, factory="IVF16,SQ8", min_recall=0.9, num_shards=3)
    assert [(k.name, k.most) for k in plan.tunable] == [("nprobe", 16)]
    assert version(factory="IVF16,SQ8", min_recall=0.9) != version(factory="IVF16,SQ8", min_recall=0.8)
    assert version(factory="IVF16,SQ8", min_recall=0.9) != version(factory="IVF16,SQ8")
    for same in ({"factory": "SQ8"}, {"factory": "IVF16,SQ8", "search_params": {"nprobe": 4}}):
        assert version(**same, min_recall=0.9, recall_queries=10) == version(**same)
        assert planned(tmp_path, **same, min_recall=0.9).tunable == ()


@pytest.mark.parametrize(
    ("index", "params", "value", "tuning", "said"),
    [({"factory": "IVF64,PQ8"}, {"nprobe": 64}, 0.81, {"reached": False},
      ["0.8100 ± 0.0100 at best, at nprobe 64, on 500", "'IVF64,PQ8' reaches 0.81 at nprobe 64", "'IVF64,SQ8' or"]),
     ({"factory": "IVF64,PQ8"}, {"nprobe": 64}, 0.96, {"reached": False}, ["at best"]),
     ({"factory": "IVF64,SQ8"}, {"nprobe": 8}, 0.94, {"reached": True, "value": 0.97, "num_queries": 499},
      ["at nprobe 8, which reached 0.9700 on the 499 tuned on", "raise index.recall_queries"]),
     ({"factory": "IVF64,SQ8", "search_params": {"nprobe": 2}}, {"nprobe": 2}, 0.9, None, ["index.search_params"]),
     ({"factory": "SQ8"}, {}, 0.9, None, ["set index.factory to 'SQfp16' or 'Flat'"]),
     ({"factory": "Flat"}, {}, 0.9, None, ["lower the target"])],
)  # fmt: skip
def test_the_gate_refuses_and_names_what_can_be_had(
    tmp_path: Path, index: dict[str, Any], params: Params, value: float, tuning: dict[str, Any] | None, said: list[str]
) -> None:
    plan = planned(tmp_path, min_recall=0.95, **index)
    recall = {"k": 10, "value": value, "ci95": 0.01, "num_queries": 500} | ({"tuning": tuning} if tuning else {})
    with pytest.raises(QualityError, match=r"at least 0\.95") as caught:
        check_recall(plan, {"recall": recall, "search_params": params})
    assert all(words in str(caught.value) for words in said)
    good = recall | {"value": 0.95} | ({"tuning": tuning | {"reached": True}} if tuning else {})
    check_recall(plan, {"recall": good, "search_params": params})
    check_recall(planned(tmp_path, **index), {"recall": recall, "search_params": params})


# Through the command, over the shards of a cluster

SENTENCES = ("--set", "evaluate.questions=null", "--quiet")


@pytest.fixture(scope="module")
def job(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("tune"))


def test_a_build_tunes_to_its_target_over_all_shards_and_serves_what_it_found(job: Job) -> None:
    wanted = {"factory": "IVF16,SQ8", "recall_queries": 200}
    result = pinakes_json("index", job.config("t", min_recall=0.9, **wanted), *SENTENCES)
    recall, curve = result["recall"], result["recall"]["curve"]
    assert result["num_shards"] == 2
    assert result["search_params"] in [tried["params"] for tried in curve]
    assert recall["value"] >= 0.9
    assert (recall["target"], recall["num_queries"], recall["tuning"]["num_queries"]) == (0.9, 100, 100)
    assert result["stages"]["tune"]["made"] == len(curve)
    chosen = next(tried for tried in curve if tried["params"] == result["search_params"])
    assert chosen["recall"] == recall["tuning"]["value"] >= 0.9
    assert all(tried["ms"] > 0 for tried in curve)
    manifest = read_version(str(job.folder / "root"), "cats", result["version"])
    assert LocalShard(str(job.folder / "root"), manifest, 1).params == result["search_params"]
    # The target belongs to a tuned version; where parameters are given, or there are none, it only admits.
    easier = pinakes_json("index", job.config("t", min_recall=0.5, **wanted), *SENTENCES)
    assert easier["version"] != result["version"]
    assert easier["search_params"]["nprobe"] <= result["search_params"]["nprobe"]
    stages = easier["stages"]  # its files are the first version's
    assert [stages[stage]["made"] for stage in ("train", "add", "merge", "passages")] == [0, 0, 0, 0]
    given = job.config("t", search_params={"nprobe": 16}, **wanted)
    verified = pinakes_json("index", given, "--set", "index.min_recall=0.9", *SENTENCES)
    assert verified["recall"]["num_queries"] == 200
    assert "curve" not in verified["recall"]
    assert pinakes_json("index", given, *SENTENCES)["version"] == verified["version"]
    narrow = job.config("t", search_params={"nprobe": 1}, **wanted)
    found = pinakes_json("index", narrow, *SENTENCES)["recall"]["value"]
    assert found < 0.99
    assert "recall@10 is" in pinakes("index", narrow, "--set", "index.min_recall=0.99", *SENTENCES, code=7)
    flat = pinakes_json("index", job.config("t", min_recall=1.0), "--quiet")
    assert (flat["search_params"], flat["recall"]["value"]) == ({}, 1.0)


def test_codes_that_miss_the_target_have_it_with_their_vectors_beside_them(job: Job) -> None:
    wanted = {"factory": "IVF8,PQ4", "recall_queries": 100, "min_recall": 0.95, "refine": "exact"}
    result = pinakes_json("index", job.config("r", **wanted), *SENTENCES)
    assert list(result["search_params"]) == ["k_factor", "nprobe"]
    assert result["recall"]["value"] >= 0.95
    root = str(job.folder / "root")
    shard = LocalShard(root, read_version(root, "cats", result["version"]), 1)
    assert isinstance(shard.index, TwoTier)
    assert shard.index.first_row == shard.first_row == result["files"]["vectors-001.npy"]["first_row"] > 0
    own = np.asarray(shard.index.vectors_ND[:5], np.float32)
    assert (shard.search(own, 1)[0][:, 0] >= np.einsum("nd,nd->n", own, own) - 1e-3).all()
    assert pinakes_json("verify", result["version"], "--name", "cats", "--root", root)["state"] == "sound"


def test_a_hopeless_target_is_refused_with_the_nearest_that_can_be_had(job: Job) -> None:
    wanted = {"factory": "IVF8,PQ4", "recall_queries": 100}
    before = list_versions(str(job.folder / "root"), "cats")
    told = pinakes("index", job.config("h", min_recall=0.99, **wanted), *SENTENCES, code=7)
    # As many lists as hold every neighbour; more of them would find no more.
    assert re.search(r"at best, at nprobe [1-8], on 50 held-out queries", told)
    assert "at least 0.99 (index.min_recall)" in told
    assert "'IVF8,PQ4' reaches 0." in told
    assert "'IVF8,SQ8' or 'Flat'" in told
    assert list_versions(str(job.folder / "root"), "cats") == before
