"""Switching the retriever: the same corpus under a 256-d and a 728-d PAQ encoder, and a DPR pair; forth and back."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster import jobs
from cluster.progress import Progress
from pipelines import publish
from pipelines.config import load_config, parse_config
from pipelines.encode import Encoder, resolve
from pipelines.errors import ArtifactError, QualityError
from pipelines.retrieve import Retriever
from tests.checkpoints import WORDS, write_dpr, write_paq
from tests.local_backend import TEXTS
from tests.test_pipeline import pinakes, pinakes_json
from tests.test_serve import call
from tests.two_versions import ALIAS, build_two

_RNG = random.Random(5)
PAIRS = [{"question": " ".join(_RNG.choices(WORDS, k=9)) + "?", "answer": [f"answer {i}"]} for i in range(120)]


@pytest.fixture(scope="module")
def folder(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    folder = tmp_path_factory.mktemp("switch")
    (folder / "paq.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (folder / "questions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS[::4]))
    for projection in (256, 728):
        write_paq(str(folder / f"paq{projection}"), projection)
    write_dpr(str(folder / "ctx"), "passage", dim=32)
    write_dpr(str(folder / "question"), "query", dim=32, seed=1)
    return folder


def run(folder: Path, name: str, factory: str = "Flat", force: bool = False, **encoder: Any) -> dict[str, Any]:
    content = {
        "root": str(folder / "root"),
        "corpus": {"name": "paq", "sources": [str(folder / "paq.jsonl")], "part_size": 50},
        "encoder": {"compute": "fp32", "storage": "fp32", **encoder},
        "index": {"name": name, "num_shards": 2, "recall_queries": 10, "factory": factory},
        "evaluate": {"questions": str(folder / "questions.jsonl"), "k": [1, 10]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return jobs.run(load_config(str(path)), Progress(quiet=True), force)


def expected_em(folder: Path) -> float:
    """Compute by hand how many questions have themselves as their best inner product, and with it their answer."""
    encoder = Encoder(resolve(load_config(str(folder / "config.yaml")).encoder), "query")
    emb_ND = encoder.encode_queries([p["question"] for p in PAIRS])
    asked = np.arange(0, len(PAIRS), 4)
    return float(np.mean(np.argmax(emb_ND[asked] @ emb_ND.T, axis=1) == asked))


def test_from_256_to_728_dimensions_and_back(folder: Path) -> None:
    root = str(folder / "root")
    narrow = run(folder, "paq", checkpoint=str(folder / "paq256"))
    assert narrow["evaluation"]["em"] == pytest.approx(expected_em(folder))
    wide = run(folder, "paq", checkpoint=str(folder / "paq728"))
    assert (narrow["version"]["dim"], wide["version"]["dim"]) == (256, 728)
    assert narrow["version"]["snapshot"] == wide["version"]["snapshot"]
    assert wide["stages"]["ingest"]["made"] == 0
    assert publish.current(root, "paq") == wide["version"]["version"]
    assert Retriever.open(root, "paq").search([PAIRS[7]["question"]], 1)[0][0].passage.answers == ["answer 7"]
    publish.rollback(root, "paq")
    old = Retriever.open(root, "paq")
    assert old.manifest["dim"] == 256
    with pytest.raises(ArtifactError, match="256"):
        old.search_vectors(np.zeros((1, 728), np.float32), 1)  # a query of the other encoder never passes


def test_a_run_moves_its_alias_only_through_the_gate(folder: Path) -> None:
    """One byte for a whole vector confuses most questions."""
    root, encoder = str(folder / "root"), str(folder / "paq256")
    whole = run(folder, "gated", checkpoint=encoder)
    version = whole["version"]["version"]
    assert {check["check"]: check["state"] for check in whole["alias"]["gate"]} == {
        "recall": "skipped", "quality": "skipped", "room": "ok", "smoke": "ok"
    }  # fmt: skip
    with pytest.raises(QualityError, match=r"is not promoted: .* falls from") as refused:
        run(folder, "gated", "PQ2x4", checkpoint=encoder)
    assert "--force" in refused.value.hint
    assert publish.current(root, "gated") == version
    assert len(publish.list_versions(root, "gated")) == 2
    forced = run(folder, "gated", "PQ2x4", force=True, checkpoint=encoder)["alias"]
    assert (forced["previous"], forced["current"]) == (version, publish.current(root, "gated"))
    again = run(folder, "gated", "PQ2x4", checkpoint=encoder)["alias"]  # it is there already: there is nothing to pass
    assert again["current"] == forced["current"]


class Callers:
    """Threads that ask one question after the other; each answer is kept with its question's number."""

    def __init__(self, address: str, number: int = 4) -> None:
        self.answers: list[tuple[int, int, Any]] = []
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(number)
        self._address = address
        self._asked = [self._pool.submit(self._ask, first) for first in range(number)]

    def _ask(self, first: int) -> None:
        for number in itertools.islice(itertools.cycle(range(len(TEXTS))), first, None):
            if self._stop.is_set():
                return
            status, answer, _ = call(self._address, "/search", {"query": TEXTS[number], "k": 5})
            self.answers.append((number, status, answer))

    def more(self, count: int = 20) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted and not any(one.done() for one in self._asked):
            time.sleep(0.01)

    def finish(self) -> list[tuple[int, int, Any]]:
        self._stop.set()
        for one in self._asked:
            one.result()
        self._pool.shutdown()
        return self.answers


class Both:
    """Two versions of one index, of 256 dimensions in two shards and of 728 in three, and what each answers."""

    def __init__(self, folder: Path) -> None:
        encoders = [write_paq(str(folder / f"paq{projection}"), projection) for projection in (256, 728)]
        two = build_two(folder, encoders, (2, 3))
        self.root, self.name, self.narrow, self.wide = two.root, ALIAS, two.old, two.new
        self.expected = {}
        for version in (self.narrow, self.wide):
            retriever = Retriever(self.root, two.manifest(version))
            self.expected[version] = retriever.search_vectors(retriever.encoder.encode_queries(TEXTS), 5)

    def serving(self, port: int, **settings: Any) -> Any:
        content = {
            "root": self.root,
            "corpus": {"sources": ["-"]},
            "encoder": {"checkpoint": "-"},
            "index": {"name": self.name},
            "serve": {"port": port, "replicas": 2, "follow_seconds": 0.2, **settings},
        }
        return jobs.serving(parse_config(content))

    def check(self, answers: list[tuple[int, int, Any]]) -> set[str]:
        """See that nobody failed, and that each answer is that of the version it names; return the versions."""
        assert {status for _, status, _ in answers} == {200}
        for number, _, answer in answers:
            score_BK, row_BK = self.expected[answer["version"]]
            assert answer["complete"] is True
            assert [hit["row"] for hit in answer["hits"]] == row_BK[number].tolist()
            np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], score_BK[number], rtol=1e-4)
        return {answer["version"] for _, _, answer in answers}

    def versions_now(self, address: str) -> set[str]:
        return {call(address, "/search", {"query": "who", "k": 1})[1]["version"] for _ in range(12)}


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield Both(tmp_path_factory.mktemp("both"))
    from ray import serve

    serve.shutdown()


@pytest.fixture(scope="module")
def port() -> int:
    return jobs.free_port()  # Serve keeps the port it was started with


@pytest.mark.parametrize("placement", ["together", "spread"])
def test_switching_under_load_fails_nobody_and_mixes_nothing(both: Both, port: int, placement: str) -> None:
    publish.promote(both.root, both.name, both.narrow)
    told = pinakes("promote", both.name, both.wide, "--root", both.root, "--prepare", code=8)
    assert "no server" in told
    with both.serving(port, placement=placement) as address:
        callers = Callers(address)
        prepared = pinakes_json("promote", both.name, both.wide, "--root", both.root, "--prepare")
        assert (prepared["current"], prepared["prepared"], prepared["replicas"]) == (both.narrow, both.wide, 2)
        assert both.versions_now(address) == {both.narrow}
        for _ in range(6):  # of whichever replica
            status, answer, _ = call(address, "/search", {"query": "who", "k": 1, "version": both.wide})
            assert (status, answer["version"]) == (200, both.wide)
        for _ in range(3):
            switched = pinakes_json("promote", both.name, both.wide, "--root", both.root)
            assert (switched["current"], switched["replicas"]) == (both.wide, 2)
            assert both.versions_now(address) == {both.wide}
            callers.more()
            back = pinakes_json("rollback", both.name, "--root", both.root)
            assert (back["current"], back["replicas"]) == (both.narrow, 2)
            assert both.versions_now(address) == {both.narrow}
            callers.more()
        answers = callers.finish()
        listed = call(address, "/versions")[1]["versions"]
    assert both.check(answers) == {both.narrow, both.wide}
    assert {(v["version"], v["state"]) for v in listed} == {(both.narrow, "current"), (both.wide, "previous")}


def test_a_refused_promotion_leaves_the_server_as_it_is(both: Both, port: int) -> None:
    Path(both.root, "aliases", f"{both.name}.json").unlink()  # no version before, which would be kept loaded
    publish.promote(both.root, both.name, both.narrow)
    path = Path(both.root, "indexes", both.name, both.wide, "shard-001.faiss")
    sound = path.read_bytes()
    with both.serving(port, replicas=1) as address:
        callers = Callers(address)
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        try:
            told = pinakes("promote", both.name, both.wide, "--root", both.root, "--force", code=5)
            assert "damaged" in told
            # Moved by somebody who did not look, it is not followed either, and what is wrong is told.
            publish.promote(both.root, both.name, both.wide)
            while not (problems := call(address, "/aliases")[1]["aliases"][both.name].get("problems")):
                assert both.versions_now(address) == {both.narrow}
            assert "damaged" in problems[both.wide]
            assert both.versions_now(address) == {both.narrow}
            assert both.check(callers.finish()) == {both.narrow}
        finally:
            path.write_bytes(sound)


def test_a_server_follows_what_was_promoted_elsewhere(both: Both, port: int) -> None:
    publish.promote(both.root, both.name, both.narrow)
    with both.serving(port) as address:
        callers = Callers(address)
        publish.promote(both.root, both.name, both.wide)
        while both.versions_now(address) != {both.wide}:
            time.sleep(0.05)
        callers.more()
        assert both.check(callers.finish()) >= {both.wide}


def test_dpr_passages_and_questions_each_have_their_tower(folder: Path) -> None:
    made = run(folder, "dpr", checkpoint=str(folder / "ctx"), query_checkpoint=str(folder / "question"))
    assert made["version"]["dim"] == 32
    spec = resolve(load_config(str(folder / "config.yaml")).encoder)
    texts = [p["question"] for p in PAIRS]
    passages = Encoder(spec, "passage").encode_passages([""] * len(texts), texts)
    query = Encoder(spec, "query").encode_queries(["who wrote the book"])
    expected = np.argsort(-(query @ passages.T)[0])[:5]
    hits = Retriever.open(str(folder / "root"), "dpr").search(["who wrote the book"], 5)[0]
    assert [h.row for h in hits] == expected.tolist()
