"""The verbs from file to file, through the real command: PAQ's generation chain, reranking and answering of hits."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from cluster import files
from pipelines.config import RerankConfig
from pipelines.models import find_model
from pipelines.retrieved import RetrievedPassage
from pipelines.schema import Passage
from tests.checkpoints import write_cross_encoder, write_dpr
from tests.checkpoints.fid import write_fid, write_t5_tokeniser
from tests.checkpoints.questions import write_bart, write_span2d
from tests.checkpoints.rerankers import write_paq_reranker
from tests.checkpoints.zoo import write_spacy
from tests.test_pipeline import pinakes, pinakes_json

TEXTS = ["The library of Alexandria was built by a king.", "A great city, an ancient river.", "who wrote the scroll"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def passages(tmp_path: Path) -> str:
    rows = "".join(f"{i}\t{text}\tgreat library\n" for i, text in enumerate(TEXTS))
    (tmp_path / "passages.tsv").write_text("id\ttext\ttitle\n" + rows)
    return str(tmp_path / "passages.tsv")


def test_the_generation_chain(tmp_path: Path, passages: str) -> None:
    """rank -> extract -> generate -> filter -> group, with real (tiny) models; the result is a corpus of QA pairs."""
    at = {name: str(tmp_path / f"{name}.jsonl") for name in ("ps", "ae", "qg", "filtered", "final")}
    ranker = write_cross_encoder(str(tmp_path / "ranker"), labels=2)
    pinakes("rank", passages, "-m", ranker, "-o", at["ps"], "--quiet")
    assert all(line["metadata"]["ps_score"] <= 0 for line in lines_of(tmp_path / "ps.jsonl"))
    extractor = write_span2d(str(tmp_path / "extractor"))
    assert pinakes_json("extract", at["ps"], "-m", extractor, "-o", at["ae"], "--quiet")["num_lines"] == 3
    extracted = lines_of(tmp_path / "ae.jsonl")
    spans = [(line["passage"], answer) for line in extracted for answer in line["answers"]]
    assert len(spans) >= 3
    assert all(text[a["start"] : a["end"]] == a["text"] for text, a in spans)
    generator = write_bart(str(tmp_path / "generator"))
    models = {"generator": generator, "per_span": 2}
    content = {"corpus": {"sources": ["x"]}, "encoder": {"checkpoint": "x"}, "questions": models}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    made = pinakes_json("generate", at["ae"], "-c", str(tmp_path / "c.yaml"), "-o", at["qg"], "--quiet")
    assert made["num_lines"] == 2 * len(spans)
    reader, t5 = write_fid(str(tmp_path / "reader")), write_t5_tokeniser(str(tmp_path / "t5"))
    local = ("--reader", reader, "--tokeniser", t5, "--passages", passages)
    pinakes("filter", at["qg"], *local, "-o", at["filtered"], "--quiet")
    filtered = lines_of(tmp_path / "filtered.jsonl")
    assert [line["question"] for line in filtered] == [line["question"] for line in lines_of(tmp_path / "qg.jsonl")]
    model = find_model(reader, "reader").load(reader, "fp32", "cpu", tokeniser=t5)
    source = Passage(str(filtered[0]["passage_id"]), "great library", TEXTS[0])
    (expected,) = model.answer([filtered[0]["question"].strip()], [[source]])
    assert filtered[0]["metadata"]["filter_answer"] == expected[0].text
    pinakes("group", at["filtered"], "--scores", at["ps"], "-o", at["final"], "--quiet")
    final = lines_of(tmp_path / "final.jsonl")
    assert {line["question"] for line in final} == {line["question"] for line in filtered}
    assert sum(len(line["answer"]) for line in final) == len(filtered)
    assert all("ps_score" in about and "consistent" in about for line in final for about in line["metadata"])


def test_entities_are_extracted_by_a_spacy_pipeline(tmp_path: Path, passages: str) -> None:
    out = tmp_path / "ae.jsonl"
    pinakes("extract", passages, "-m", write_spacy(str(tmp_path / "ner")), "-o", str(out), "--quiet")
    assert [[a["text"] for a in line["answers"]] for line in lines_of(out)] == [["Alexandria"], [], []]


RETRIEVED = [
    {
        "input_qa": {"question": "who built the library", "answer": ["a king"]},
        "retrieved_qas": [
            {"question": "who wrote the book", "answer": ["the greek"], "score": 9.0},
            {"question": "who built the great library", "answer": ["A king!"], "score": 8.5},
            {"question": "when was the war", "answer": ["year 9"], "score": 1.0},
        ],
    },
    {"input_qa": {"question": "where is the river", "answer": ["egypt"]}, "retrieved_qas": []},
]


@pytest.fixture
def retrieved(tmp_path: Path) -> str:
    (tmp_path / "retrieved.jsonl").write_text("".join(json.dumps(line) + "\n" for line in RETRIEVED))
    return str(tmp_path / "retrieved.jsonl")


def test_rerank_a_file_of_qa_pairs(tmp_path: Path, retrieved: str) -> None:
    directory = write_paq_reranker(str(tmp_path / "reranker"))
    scores = find_model(directory, "cross-encoder").load(directory).score(
        ["who built the library"] * 3,
        [Passage("", "", qa["question"], qa["answer"]) for qa in RETRIEVED[0]["retrieved_qas"]],  # type: ignore[index]
    )  # fmt: skip
    best = int(scores.argmax())
    result = pinakes_json("rerank", retrieved, "-m", directory, "-o", str(tmp_path / "r.jsonl"), "--quiet")
    assert result["em"] == (0.5 if best == 1 else 0.0)
    assert result["hits@5"] == 0.5
    first, second = lines_of(tmp_path / "r.jsonl")
    assert first["retrieved_qas"][0]["question"] == RETRIEVED[0]["retrieved_qas"][best]["question"]  # type: ignore[index]
    assert second["retrieved_qas"] == []
    pinakes("rerank", retrieved, "-m", directory, "-o", str(tmp_path / "p.jsonl"), "--form", "reranked", "--quiet")
    said = lines_of(tmp_path / "p.jsonl")[0]
    assert (said["index"], said["score"]) == (best, pytest.approx(float(scores[best]), abs=1e-5))


class LivePassages:
    """A progress that counts, at each advance, the retrieved passages that are in memory."""

    def __init__(self) -> None:
        self.most = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[LivePassages]:
        yield self

    def advance(self, num: int = 1, **counts: int) -> None:
        live = sum(type(thing) is RetrievedPassage for thing in gc.get_objects())
        self.most = max(self.most, live)


def test_hits_are_not_kept_for_the_scores(tmp_path: Path) -> None:
    source, counted = tmp_path / "many.jsonl", LivePassages()
    source.write_text((json.dumps(RETRIEVED[0]) + "\n") * 160)
    model = write_paq_reranker(str(tmp_path / "reranker"))
    result = files.rerank(
        str(source),
        RerankConfig(checkpoint=model, depth=3),
        str(tmp_path / "r.jsonl"),
        "paq",
        "cpu",
        cast(Any, counted),
    )
    assert result["num_questions"] == 160
    assert 0 < counted.most < 160


def test_only_passages_that_are_asked_about_are_kept(tmp_path: Path, passages: str) -> None:
    asked = {"passage_id": 1, "question": "which river", "answer": "ancient"}
    (tmp_path / "qg.jsonl").write_text((json.dumps(asked) + "\n") * 2)
    known = files._passages_of(str(tmp_path / "qg.jsonl"), passages)
    assert known == {"1": Passage("1", "great library", TEXTS[1])}


def test_answer_a_file_from_stored_answers_and_by_a_reader(tmp_path: Path, retrieved: str) -> None:
    out = tmp_path / "a.jsonl"
    result = pinakes_json("answer", retrieved, "--reader", "stored", "-o", str(out), "--quiet")
    assert [line["prediction"] for line in lines_of(out)] == ["the greek", None]
    assert (result["num_questions"], result["answer_em"]) == (2, 0.0)
    reader = write_dpr(str(tmp_path / "reader"), "reader")
    context = {"id": "wiki:1", "title": "Library", "text": TEXTS[0], "score": "7.5", "has_answer": True}
    file = tmp_path / "dpr.json"
    file.write_text(json.dumps([{"question": "who built it", "answers": ["king"], "ctxs": [context]}]))
    pinakes("answer", str(file), "--reader", reader, "-o", str(out), "--quiet")
    (line,) = lines_of(out)
    assert line["prediction"]
    assert line["prediction"] in TEXTS[0]
    assert line["read"][0]["passage_id"] == "wiki:1"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("rank", "{gone}", "-m", "dummy", "-o", "{out}"), 3, "gone.jsonl"),
        (("extract", "{bad}", "-m", "{ner}", "-o", "{out}"), 3, "line 2"),
        (("extract", "{good}", "-m", "{reader}", "-o", "{out}"), 4, "not an answer extractor"),
        (("generate", "{good}", "-m", "{ner}", "-o", "{out}"), 4, "question generator"),
        (("generate", "{good}", "-o", "{out}"), 2, "questions.generator"),
        (("filter", "{good}", "--reader", "{reader}", "-o", "{out}"), 2, "--passages FILE"),
        (("filter", "{qg}", "--reader", "stored", "--passages", "{qg}", "-o", "{out}"), 3, "qg.jsonl, line 1"),
        (("filter", "{good}", "-o", "{out}"), 3, "good.jsonl, line 1"),
        (("filter", "{nan}", "-o", "{out}"), 3, "nan.jsonl, line 1"),
        (("rank", "{nan}", "-m", "dummy", "-o", "{out}"), 3, "nan.jsonl, line 1"),
        (("answer", "{bad}", "--reader", "stored", "-o", "{out}"), 3, "line 1"),
        (("rerank", "{bad}", "-m", "{reader}", "-o", "{out}"), 4, "not a cross encoder"),
        (("search", "x", "--tokeniser", "t5"), 2, "--answer"),
        (("evaluate",), 2, "--reproduce NAME"),
        (("evaluate", "--reproduce", "paq/multi_bse_256"), 2, "paq/multi_base_256"),
        (("evaluate", "--reproduce", "paq/multi_base_256", "--input", "checkpoint"), 2, "KEY=PATH"),
        (("evaluate", "--reproduce", "paq/multi_base_256"), 2, "checkpoint"),
    ],
)
def test_what_cannot_be_done_is_explained_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    good = '{"passage_id": 1, "passage": "the king", "metadata": {}}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(good + "{nonsense\n")
    (tmp_path / "qg.jsonl").write_text('{"passage_id": 1, "question": "who", "answer": "the king"}\n')
    (tmp_path / "nan.jsonl").write_text(good.replace("{}", '{"ps_score": NaN}'))
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("good", "bad", "gone", "out", "qg", "nan")}
    places |= {"ner": write_spacy(str(tmp_path / "ner")), "reader": write_dpr(str(tmp_path / "reader"), "reader")}
    said = pinakes(*(piece.format(**places) for piece in arguments), code=code)
    assert words in said
    assert not (tmp_path / "out.jsonl").exists()


def test_models_are_listed() -> None:
    listed = pinakes_json("models", "--released", "--published")
    assert {"paq", "dpr", "clip", "fid"} <= set(listed["families"])
    assert any(row["name"] == "facebook/dpr-reader-single-nq-base" for row in listed["released"])
    assert "paq/multi_base_256" in listed["published"]
    shown = pinakes("models", "--released", "--published")
    assert "sentence_transformers" in shown


def test_inspect_says_what_any_checkpoint_is(tmp_path: Path) -> None:
    told = pinakes_json("inspect", write_fid(str(tmp_path / "fid")))
    assert (told["family"], told["kind"]) == ("fid", "reader")
    told = pinakes_json("inspect", write_paq_reranker(str(tmp_path / "reranker")))
    assert (told["family"], told["kind"]) == ("paq_reranker", "cross-encoder")
    assert "formatting" in told
