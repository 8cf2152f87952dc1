"""Every kind of published figure, measured on tiny checkpoints and files, equals an independent computation."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipelines import published
from pipelines.benchmarks import run
from pipelines.errors import CheckpointError, ConfigError, InputError, PinakesError
from pipelines.reproduce import format_reproduction, reproduce
from tests.checkpoints import WORDS, write_cross_encoder, write_dpr, write_paq, write_sentence_transformer
from tests.checkpoints.rerankers import write_paq_reranker

RNG = random.Random(7)
RARE = [a + b + "x" for a in "bcdfg" for b in "klmnp"]
EXACT = 1e-6  # of a figure in per cent


def sentence(length: int = 8) -> str:
    return " ".join(RNG.choices(WORDS, k=length))


def ours(result: dict[str, Any]) -> dict[str, float]:
    return {row["metric"]: row["ours"] for row in result["rows"]}


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_tsv(path: Path, rows: Sequence[Sequence[Any]]) -> str:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search in many blocks, so that merging them counts."""
    monkeypatch.setattr(run, "BLOCK_ROWS", 13)


# --- the oracle's own definitions --------------------------------------------------------------------------------


def squad(text: str) -> str:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def dpr_tokens(text: str) -> list[str]:
    """Return DPR's tokens, by Unicode category."""
    tokens: list[str] = []
    joined = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            tokens = [*tokens[:-1], tokens[-1] + character] if joined else [*tokens, character]
        elif kind not in "ZC":
            tokens.append(character)
        joined = kind in "LNM"
    return [token.lower() for token in tokens]


def holds(text: str, answers: Sequence[str]) -> bool:
    tokens = dpr_tokens(text)
    wanted = [dpr_tokens(answer) for answer in answers]
    return any(tokens[i : i + len(w)] == w for w in wanted for i in range(len(tokens)))


def share(ranks: Sequence[float], k: int) -> float:
    return 100 * sum(rank < k for rank in ranks) / len(ranks)


def first(flags: Sequence[bool]) -> float:
    return flags.index(True) if True in flags else math.inf


# --- questions and answers ---------------------------------------------------------------------------------------

ANSWERS = ["Alexandria", "The Nile", "king Ptolemy", "Egypt!", "331 BC", "Callimachus", "a scroll", "Homer"]
STORED = [*ANSWERS, *(f"{i} BC" for i in range(16))]
PAIRS = [{"question": sentence() + "?", "answer": [RNG.choice(STORED), "never looked at"]} for _ in range(90)]
QUESTIONS = [
    {"question": RNG.choice(["", "??"]) + sentence(6) + "?", "answer": [a, a.upper()]}
    for a in RNG.choices(ANSWERS, k=16)
]
QUESTIONS[0]["answer"] = STORED  # right whatever is found
QUESTIONS[1]["answer"] = ["in no pair"]


@pytest.fixture(scope="module")
def paq(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("paq")
    return {
        "checkpoint": write_paq(str(folder / "retriever"), 256),
        "reranker": write_paq_reranker(str(folder / "reranker")),
        "corpus": write_jsonl(folder / "pairs.jsonl", PAIRS),
        "questions": write_jsonl(folder / "questions.jsonl", QUESTIONS),
        "data": "nq-test",
    }


def paq_vectors(directory: str, questions: Sequence[str]) -> Any:
    """Return CLS then the projection, one question at a time, from transformers' own classes."""
    import torch
    from transformers import AlbertConfig, AlbertModel, AlbertTokenizer

    state = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)
    model = AlbertModel(AlbertConfig.from_pretrained(directory)).eval()
    albert = {k.removeprefix("albert."): v for k, v in state.items() if "proj" not in k and "position_ids" not in k}
    model.load_state_dict(albert, strict=True)
    tokeniser = AlbertTokenizer.from_pretrained(directory)
    rows = []
    for question in questions:
        bare = question.strip().strip("?").lower().strip()
        with torch.inference_mode():
            cls = model(**tokeniser(bare, return_tensors="pt")).last_hidden_state[0, 0]
        rows.append((state["encode_proj.weight"] @ cls + state["encode_proj.bias"]).numpy())
    return np.stack(rows)


def paq_ranking(directory: str) -> list[list[int]]:
    stored, asked = (paq_vectors(directory, [p["question"] for p in rows]) for rows in (PAIRS, QUESTIONS))
    return np.argsort(-(asked @ stored.T), axis=1, kind="stable").tolist()


def right_answers(question: dict[str, Any], ranking: Sequence[int]) -> list[bool]:
    golds = {squad(answer) for answer in question["answer"]}
    return [squad(PAIRS[row]["answer"][0]) in golds for row in ranking]


def reranker_best(directory: str, ranking: Sequence[Sequence[int]]) -> list[int]:
    """Return each question's pair with the highest logit of AlbertForMultipleChoice, all candidates in one batch."""
    import torch
    from transformers import AlbertForMultipleChoice, AlbertTokenizer

    model = AlbertForMultipleChoice.from_pretrained(directory, dtype=torch.float32).eval()
    tokeniser = AlbertTokenizer.from_pretrained(directory)
    best = []
    for question, found in zip(QUESTIONS, ranking, strict=True):
        told = [f"{PAIRS[row]['question']}? {PAIRS[row]['answer'][0]}" for row in found]
        asked = [question["question"] + "?"] * len(told)
        batch = tokeniser(asked, told, padding=True, return_tensors="pt", return_token_type_ids=True)
        with torch.inference_mode():
            logits = model(**{name: tensor[None] for name, tensor in batch.items()}).logits[0]
        best.append(found[int(logits.argmax())])
    return best


@pytest.fixture(scope="module")
def expected_qa(paq: dict[str, str]) -> dict[str, float]:
    """Return what hits@k and EM are by hand."""
    ranking = [found[:50] for found in paq_ranking(paq["checkpoint"])]
    ranks = [first(right_answers(q, found)) for q, found in zip(QUESTIONS, ranking, strict=True)]
    best = reranker_best(paq["reranker"], ranking)
    reranked = [right_answers(q, [row])[0] for q, row in zip(QUESTIONS, best, strict=True)]
    hits = {f"hits@{k}": share(ranks, k) for k in (1, 10, 50)}
    return hits | {"em": hits["hits@1"], "em_reranked": 100 * sum(reranked) / len(reranked)}


def test_paq_retrieval_and_reranking(paq: dict[str, str], expected_qa: dict[str, float]) -> None:
    seen: list[tuple[str, int]] = []
    result = reproduce(published.find("paq/multi_base_256"), paq, progress=lambda what, done: seen.append((what, done)))
    assert 0 < expected_qa["em"] < expected_qa["hits@10"] < expected_qa["hits@50"] < 100
    assert 0 < expected_qa["em_reranked"] < 100
    assert ours(result) == pytest.approx(expected_qa, abs=EXACT)
    assert [row["metric"] for row in result["rows"][:2]] == ["em", "em_reranked"]
    assert [row["published"] for row in result["rows"]] == [41.4, 47.3, None, None, None]
    assert {row["num_questions"] for row in result["rows"]} == {len(QUESTIONS)}
    assert seen[-1] == ("passages encoded", 90)
    assert result["inputs"] == paq
    json.dumps(result)


def test_paq_over_a_published_index(paq: dict[str, str], tmp_path: Path) -> None:
    root = write_index(tmp_path, paq["checkpoint"])
    inputs = {"root": root, "index": "paq", "questions": paq["questions"], "data": "nq-test"}
    by_index, by_search = (
        ours(reproduce(published.find("paq/multi_base"), i)) for i in (inputs, without(paq, "reranker"))
    )
    assert by_index == by_search


def write_index(folder: Path, checkpoint: str) -> str:
    """Publish a version of PAIRS by hand, vectors by the oracle."""
    import faiss
    import pyarrow as pa

    from pipelines.build import id_digests
    from pipelines.config import EncoderConfig
    from pipelines.encode import resolve
    from pipelines.manifest import put_done, write_manifest
    from pipelines.publish import index_store, promote
    from pipelines.schema import PASSAGE

    def arrow(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    spec = resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32"))
    index = faiss.IndexFlatIP(spec.dim)
    index.add(paq_vectors(checkpoint, [p["question"] for p in PAIRS]))
    ids = [str(i) for i in range(len(PAIRS))]
    rows = [
        {"id": i, "title": "", "text": p["question"], "answers": p["answer"]} for i, p in zip(ids, PAIRS, strict=True)
    ]
    digests = id_digests(ids)
    order = np.argsort(digests)
    contents = {
        "shard-000.faiss": faiss.serialize_index(index).tobytes(),
        "passages-000.arrow": arrow(pa.Table.from_pylist(rows, PASSAGE)),
        "ids-000.arrow": arrow(pa.table({"id_digest": digests[order], "row": order})),
    }
    store = index_store(str(folder), "paq").child("v1")
    facts = {"num_rows": len(rows), "first_row": 0}
    entries = [put_done(store, name, content, "test", facts).as_entry() for name, content in contents.items()]
    described = {"name": "paq", "version": "v1", "num_rows": len(rows), "dim": spec.dim, "num_shards": 1}
    described |= {"encoder": spec.as_dict(), "search_params": {}, "files": {e.pop("name"): e for e in entries}}
    write_manifest(store, "version", described)
    promote(str(folder), "paq", "v1")
    return str(folder)


def without(inputs: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in inputs.items() if key not in keys}


def test_a_reranker_over_retrieved_pairs(paq: dict[str, str], expected_qa: dict[str, float], tmp_path: Path) -> None:
    ranking = paq_ranking(paq["checkpoint"])
    lines = [
        {"input_qa": q, "retrieved_qas": [PAIRS[row] | {"score": -float(i)} for i, row in enumerate(found[:60])]}
        for q, found in zip(QUESTIONS, ranking, strict=True)
    ]
    inputs = {"reranker": paq["reranker"], "retrieved": write_jsonl(tmp_path / "found.jsonl", lines), "data": "nq-test"}
    result = ours(reproduce(published.find("paq/reranker_multi_xxlarge"), inputs))
    expected = {"em": expected_qa["em_reranked"], "em_retrieved": expected_qa["em"]}
    assert result == pytest.approx(expected, abs=EXACT)
    limited = reproduce(published.find("paq/reranker_multi_xxlarge"), inputs, limit=4)
    assert limited["rows"][0]["num_questions"] == 4
    no_gold = [line | {"input_qa": {"question": "who"}} for line in lines]
    inputs["retrieved"] = write_jsonl(tmp_path / "bare.jsonl", no_gold)
    with pytest.raises(InputError):
        reproduce(published.find("paq/reranker_multi_xxlarge"), inputs)


# --- passages ----------------------------------------------------------------------------------------------------

PASSAGES = [
    (str(i + 1), RNG.choice(["", sentence(2).title()]), f'{sentence()} "{RNG.choice(RARE)}" {sentence(4)}')
    for i in range(160)
]
ASKED = [(sentence(6), [answer.title(), "not there"]) for answer in RNG.choices(RARE, k=24)]


@pytest.fixture(scope="module")
def dpr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dpr")
    with gzip.open(folder / "psgs_w100.tsv.gz", "wt", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "text", "title"])
        writer.writerows([identity, text, title] for identity, title, text in PASSAGES)
    return {
        "checkpoint": write_dpr(str(folder / "ctx"), "passage"),
        "query_checkpoint": write_dpr(str(folder / "question"), "query", seed=1),
        "corpus": str(folder / "psgs_w100.tsv.gz"),
        "questions": write_tsv(folder / "nq-test.csv", [(text, repr(answers)) for text, answers in ASKED]),
        "data": "nq-test",
    }


@pytest.fixture(scope="module")
def dpr_ranking(dpr: dict[str, str]) -> list[list[int]]:
    """Rank the passages for each question with transformers' own classes, one text at a time."""
    import torch
    from transformers import DPRContextEncoder, DPRQuestionEncoder
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    def vectors(kind: Any, directory: str, texts: Sequence[tuple[str, ...]]) -> Any:
        model = kind.from_pretrained(directory, dtype=torch.float32).eval()
        tokeniser = BertTokenizerLegacy(f"{directory}/vocab.txt", do_lower_case=True)
        inputs = [tokeniser(*text, max_length=256, truncation=True, return_tensors="pt") for text in texts]
        with torch.inference_mode():
            zeros = [torch.zeros_like(one["input_ids"]) for one in inputs]
            pairs = zip(inputs, zeros, strict=True)
            return torch.cat([model(one["input_ids"], token_type_ids=z).pooler_output for one, z in pairs]).numpy()

    stored = vectors(DPRContextEncoder, dpr["checkpoint"], [(t, x) if t else (x,) for _, t, x in PASSAGES])
    asked = vectors(DPRQuestionEncoder, dpr["query_checkpoint"], [(text,) for text, _ in ASKED])
    return np.argsort(-(asked @ stored.T), axis=1, kind="stable").tolist()


def top_k(ranking: Sequence[Sequence[int]], match: Callable[[str, list[str]], bool]) -> dict[str, float]:
    ranks = [
        first([match(PASSAGES[row][2], answers) for row in found[:100]])
        for found, (_, answers) in zip(ranking, ASKED, strict=True)
    ]
    return {f"top@{k}": share(ranks, k) for k in (1, 5, 20, 50, 100)}


def dpr_results(path: Path, ranking: Sequence[Sequence[int]], answers: Sequence[list[str]]) -> str:
    def context(row: int) -> dict[str, Any]:
        identity, title, text = PASSAGES[row]
        return {"id": f"wiki:{identity}", "title": title, "text": text, "score": "1.5", "has_answer": True}

    asked = zip([question for question, _ in ASKED], answers, ranking, strict=True)
    results = [{"question": q, "answers": golds, "ctxs": [context(r) for r in rows[:100]]} for q, golds, rows in asked]
    path.write_text(json.dumps(results))
    return str(path)


def test_dpr_passages_that_hold_an_answer(dpr: dict[str, str], dpr_ranking: list[list[int]], tmp_path: Path) -> None:
    result = reproduce(published.find("rdr/single-nq"), dpr)
    expected = top_k(dpr_ranking, holds)
    assert 0 < expected["top@5"] < expected["top@20"] < expected["top@50"] <= 100
    assert ours(result) == pytest.approx(expected, abs=EXACT)
    results = {"results": dpr_results(tmp_path / "r.json", dpr_ranking, [a for _, a in ASKED]), "data": "nq-test"}
    assert ours(reproduce(published.find("dpr/single-nq"), results)) == pytest.approx(expected, abs=EXACT)


def test_curated_trec_answers_are_patterns(dpr_ranking: list[list[int]], tmp_path: Path) -> None:
    patterns = [[a[0].lower()[:2] + r"[xyz]\b", "(unclosed"] for _, a in ASKED]
    found = reproduce(
        published.find("dpr/multiset"),
        {"results": dpr_results(tmp_path / "t.json", dpr_ranking, patterns), "data": "trec-test"},
    )
    by_word = top_k(dpr_ranking, lambda text, answers: answers[0].lower() in re.findall(r"\w+", text.lower()))
    assert ours(found) == pytest.approx(by_word, abs=EXACT)


# --- sentence similarity -----------------------------------------------------------------------------------------

STS = [(RNG.randrange(11) / 2, sentence(5) + ' say "no"', sentence(5) + ", so") for _ in range(60)]


def write_sts(path: Path, kind: str) -> str:
    noise = [("train", 0.5, "to be", "left out")]
    if kind == "sentence-transformers":
        header = ["split", "genre", "dataset", "year", "sid", "score", "sentence1", "sentence2"]
        rows = [(s, "main", "x", 2012, 1, *row) for s, *row in [*noise, *[("test", *row) for row in STS]]]
        text = "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "original":
        write_tsv(path, [("main", "x", "2012", i, *row, *(["more"] * (i % 2))) for i, row in enumerate(STS)])
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([("sentence1", "sentence2", "score"), *[(a, b, s) for s, a, b in STS]])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "name"), [("sentence-transformers", "sts.tsv.gz"), ("original", "sts-test.csv"), ("commas", "sts.csv")]
)
def test_sts_spearman(tmp_path: Path, kind: str, name: str) -> None:
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer

    directory = write_sentence_transformer(str(tmp_path / "model"), extras=())
    model = SentenceTransformer(directory, device="cpu", local_files_only=True)
    left, right = (model.encode([row[i] for row in STS], normalize_embeddings=True) for i in (1, 2))
    expected = 100 * spearmanr([row[0] for row in STS], (left * right).sum(1)).statistic
    inputs = {"checkpoint": directory, "sts": write_sts(tmp_path / name, kind)}
    found = reproduce(published.find("st/stsb-mpnet-base-v2"), inputs)
    assert ours(found) == pytest.approx({"spearman": expected}, abs=EXACT)


# --- MS MARCO ----------------------------------------------------------------------------------------------------

COLLECTION = [(str(1000 + i), f'"{sentence()} {i}') for i in range(70)]  # an unpaired quote, as in the real file
QUERIES = [(str(i), sentence(4)) for i in range(24)]
QRELS = [(q, 0, RNG.choice(COLLECTION)[0], 1) for q, _ in QUERIES[:20] for _ in range(3)] + [("20", 0, "1000", 0)]


@pytest.fixture
def msmarco(tmp_path: Path) -> dict[str, str]:
    return {
        "collection": write_tsv(tmp_path / "collection.tsv", COLLECTION),
        "queries": write_tsv(tmp_path / "queries.dev.small.tsv", QUERIES),
        "qrels": write_tsv(tmp_path / "qrels.dev.small.tsv", QRELS),
    }


def relevant() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for query, _, passage, grade in QRELS:
        if grade:
            found.setdefault(query, {})[passage] = grade
    return found


def expected_mrr(ranked: dict[str, list[str]]) -> float:
    ranks = [first([p in relevant()[q] for p in found[:10]]) for q, found in ranked.items()]
    return 100 * sum(1 / (rank + 1) for rank in ranks if rank < math.inf) / len(ranks)


@pytest.mark.parametrize(
    ("name", "similarity", "declared", "titled"),
    [
        ("st/msmarco-distilbert-base-tas-b", "dot", True, False),
        ("st/msmarco-distilbert-base-tas-b", "dot", False, False),
        ("st/msmarco-distilbert-base-v3", "cosine", False, False),
        ("st/nq-distilbert-base-v1", "cosine", False, True),
    ],
)
def test_msmarco_retrieval(
    tmp_path: Path, msmarco: dict[str, str], name: str, similarity: str, declared: bool, titled: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    settings = {"similarity_fn_name": similarity} if declared else {}
    directory = write_sentence_transformer(str(tmp_path / "m"), modes=("cls_token",), extras=(), settings=settings)
    passages: list[Any] = [text for _, text in COLLECTION]
    if titled:
        titles = [sentence(2) for _ in COLLECTION]
        passages = [[title, text] for title, (_, text) in zip(titles, COLLECTION, strict=True)]
        rows = [(i, title, text) for title, (i, text) in zip(titles, COLLECTION, strict=True)]
        msmarco["collection"] = write_tsv(tmp_path / "titled.tsv", rows)
    model = SentenceTransformer(directory, device="cpu", local_files_only=True)
    stored, asked = model.encode(passages), model.encode([text for _, text in QUERIES[:20]])
    if similarity == "cosine":
        stored = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    order = np.argsort(-(asked @ stored.T), axis=1)
    ranked = {q: [COLLECTION[row][0] for row in rows] for (q, _), rows in zip(QUERIES, order.tolist(), strict=False)}
    result = reproduce(published.find(name), {"checkpoint": directory, **msmarco})
    assert 0 < expected_mrr(ranked) < 100
    assert ours(result) == pytest.approx({"mrr@10": expected_mrr(ranked)}, abs=EXACT)
    assert result["rows"][0]["num_questions"] == 20  # the four queries without a relevant passage do not count


def test_a_model_of_another_similarity_is_refused(tmp_path: Path, msmarco: dict[str, str]) -> None:
    directory = write_dpr(str(tmp_path / "ctx"), "passage")
    with pytest.raises(PinakesError, match="dot"):
        reproduce(published.find("st/msmarco-distilbert-base-v3"), {"checkpoint": directory, **msmarco})


CANDIDATES = [(q, p) for q, _ in QUERIES[:22] if q != "3" for p in sorted(RNG.sample([i for i, _ in COLLECTION], 13))]
CANDIDATES += CANDIDATES[:5]  # some come twice
RNG.shuffle(CANDIDATES)
GRADED = [(q, "Q0", p, RNG.randrange(4)) for q, _ in QUERIES[:15] for p, _ in COLLECTION]


def top1000(path: Path) -> str:
    query_text, text = dict(QUERIES), dict(COLLECTION)
    return write_tsv(path, [(q, p, query_text[q], text[p]) for q, p in CANDIDATES])


def reranked(directory: str, labels: int) -> dict[str, list[str]]:
    """Rank each query's candidates by transformers' classifier, one pair at a time; ties do not occur."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokeniser = AutoTokenizer.from_pretrained(directory)
    query_text, text = dict(QUERIES), dict(COLLECTION)
    scores: dict[str, dict[str, float]] = {q: {} for q, _ in QUERIES}
    for query, passage in CANDIDATES:
        inputs = tokeniser(query_text[query], text[passage], truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        scores[query][passage] = float(logits[0] if labels == 1 else torch.softmax(logits, 0)[1])
    return {q: sorted(found, key=lambda p: -found[p]) for q, found in scores.items()}


@pytest.mark.parametrize("labels", [1, 2])
def test_reranked_candidates_of_dev(tmp_path: Path, msmarco: dict[str, str], labels: int) -> None:
    directory = write_cross_encoder(str(tmp_path / "ce"), labels)
    expected = expected_mrr({q: found for q, found in reranked(directory, labels).items() if q in relevant()})
    inline = {
        "reranker": directory,
        "top1000": top1000(tmp_path / "top.tsv"),
        "qrels": msmarco["qrels"],
        "data": "msmarco-dev",
    }
    ids = {"top1000": write_tsv(tmp_path / "ids.tsv", CANDIDATES)}
    trec = {"top1000": write_tsv(tmp_path / "run.trec", [(q, "Q0", p, 1, 0.5, "bm25") for q, p in CANDIDATES])}
    row = published.find("ce/ms-marco-MiniLM-L-6-v2")
    assert 0 < expected < 100
    for more in ({}, msmarco, msmarco | ids, msmarco | trec):
        result = reproduce(row, {**inline, **more})
        assert ours(result)["mrr@10"] == pytest.approx(expected, abs=EXACT)
        assert result["rows"][0]["num_questions"] == 20  # query 3 has no candidates and scores 0
    assert ours(result)["docs_per_second"] > 0
    assert next(r for r in result["rows"] if r["metric"] == "docs_per_second")["difference"] is None


def test_reranked_candidates_of_trec_dl(tmp_path: Path) -> None:
    directory = write_cross_encoder(str(tmp_path / "ce"))
    gains = {(q, p): grade for q, _, p, grade in GRADED}

    def ndcg(query: str, found: list[str]) -> float:
        ideal = sorted((g for (q, _), g in gains.items() if q == query), reverse=True)
        terms = [[gains.get((query, p), 0) for p in found[:10]], ideal[:10]]
        dcg, best = (sum(gain / math.log2(i + 2) for i, gain in enumerate(row)) for row in terms)
        return dcg / best

    judged = {q for q, _, _, _ in GRADED}
    values = [ndcg(q, found) for q, found in reranked(directory, 1).items() if q in judged and found]
    qrels = tmp_path / "2019qrels-pass.txt"
    qrels.write_text("".join(f"{q} {zero} {p} {grade}\n" for q, zero, p, grade in GRADED))
    inputs = {"reranker": directory, "top1000": top1000(tmp_path / "top.tsv"), "qrels": str(qrels), "data": "dl19"}
    result = reproduce(published.find("ce/ms-marco-MiniLM-L-6-v2"), inputs)
    assert ours(result)["ndcg@10"] == pytest.approx(100 * sum(values) / len(values), abs=EXACT)
    assert result["rows"][0]["num_questions"] == len(values) == 14
    first_three = reproduce(published.find("ce/ms-marco-MiniLM-L-6-v2"), inputs, limit=3)
    assert first_three["rows"][0]["num_questions"] == 3


# --- what is told ------------------------------------------------------------------------------------------------


def shown(result: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_reproduction(result))
    return console.export_text()


def test_a_difference_only_where_the_questions_are_those_published(
    paq: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, inputs = published.find("paq/nq_base"), without(paq, "reranker")
    other = reproduce(row, inputs)
    assert other["comparable"] is False
    assert other["rows"][0]["difference"] is None
    assert "measured on 16 questions where Natural Questions, test has 3,610" in shown(other)

    monkeypatch.setitem(published.DATA, "nq-test", published.Data("sixteen questions", 16))
    same = reproduce(row, inputs)
    em = same["rows"][0]
    assert same["comparable"] is True
    assert em["difference"] == pytest.approx(em["ours"] - 41.0)
    assert f"{em['difference']:+.2f}" in shown(same)
    assert "41.00" in shown(same)

    few = reproduce(row, inputs, limit=5)
    assert few["rows"][0]["difference"] is None
    assert few["rows"][0]["num_questions"] == 5
    assert "first 5 questions only: not comparable" in shown(few)
    with pytest.raises(ConfigError, match="first 0 questions"):
        reproduce(row, inputs, limit=0)


# --- bad inputs --------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_each_other(tmp_path: Path, msmarco: dict[str, str], dpr: dict[str, str]) -> None:
    directory = write_cross_encoder(str(tmp_path / "ce"))
    row, dev = published.find("ce/ms-marco-MiniLM-L-6-v2"), {"reranker": directory, "data": "msmarco-dev"}
    other = write_tsv(tmp_path / "other.qrels", [("99", 0, "1000", 1)])
    with pytest.raises(InputError, match="candidates and qrels of the same data set"):
        reproduce(row, dev | {"top1000": top1000(tmp_path / "top.tsv"), "qrels": other})
    with pytest.raises(InputError, match="no query has a relevant passage"):
        reproduce(row, dev | msmarco | {"top1000": top1000(tmp_path / "top.tsv"), "qrels": other})
    strange = write_tsv(tmp_path / "strange.tsv", [("0", "77")])
    with pytest.raises(InputError, match="'77' is not in the collection"):
        reproduce(row, dev | msmarco | {"top1000": strange})
    with pytest.raises(InputError, match="no such file"):
        reproduce(row, dev | {"top1000": str(tmp_path / "nowhere"), "qrels": msmarco["qrels"]})
    silent = write_jsonl(tmp_path / "silent.jsonl", [{"question": "who wrote it"}])
    with pytest.raises(InputError, match="no accepted answers"):
        reproduce(published.find("dpr/single-nq"), dpr | {"questions": silent})


def test_only_fifty_retrieved_pairs_are_reranked(paq: dict[str, str], tmp_path: Path) -> None:
    wrong, right = ([pair | {"answer": [answer]} for pair in PAIRS] for answer in ("no", "yes"))
    lines = [
        {"input_qa": question | {"answer": ["yes"]}, "retrieved_qas": wrong[:50] + right[50:]} for question in QUESTIONS
    ]
    inputs = {"reranker": paq["reranker"], "retrieved": write_jsonl(tmp_path / "f.jsonl", lines), "data": "nq-test"}
    assert ours(reproduce(published.find("paq/reranker_multi_base"), inputs)) == {"em": 0, "em_retrieved": 0}


def test_results_of_another_kind_are_refused(paq: dict[str, str], tmp_path: Path) -> None:
    pairs = [{"input_qa": QUESTIONS[0], "retrieved_qas": PAIRS[:2]}]
    passages = [{"question": "who", "answers": ["x"], "ctxs": [{"id": "1", "title": "", "text": "x"}]}]
    for_dpr = {"results": write_jsonl(tmp_path / "p.jsonl", pairs)}
    for_paq = {"retrieved": write_jsonl(tmp_path / "r.jsonl", passages), "reranker": paq["reranker"]}
    with pytest.raises(InputError, match="has QA pairs for hits"):
        reproduce(published.find("dpr/single-nq"), for_dpr | {"data": "nq-test"})
    with pytest.raises(InputError, match="has passages for hits"):
        reproduce(published.find("paq/reranker_multi_base"), for_paq | {"data": "nq-test"})


def test_models_of_another_kind_are_refused(tmp_path: Path, paq: dict[str, str], msmarco: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match=r"cross.encoder"):
        reproduce(published.find("paq/multi_base"), paq | {"checkpoint": write_cross_encoder(str(tmp_path / "ce"))})
    inputs = {"reranker": paq["checkpoint"], "top1000": top1000(tmp_path / "t.tsv"), "qrels": msmarco["qrels"]}
    with pytest.raises(CheckpointError, match="encoder"):
        reproduce(published.find("ce/ms-marco-MiniLM-L-6-v2"), inputs | {"data": "msmarco-dev"})
    with pytest.raises(ConfigError, match="lacks checkpoint"):
        reproduce(published.find("paq/multi_base"), without(paq, "checkpoint"))
