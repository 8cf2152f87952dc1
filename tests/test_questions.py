"""PAQ's steps over its jsonl files: shapes, streaming, bad lines; and once through with tiny models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.json_records import read_records
from pipelines.models.base import Span
from pipelines.questions import Line, batches, read_lines, write_lines
from pipelines.questions.extract import extract
from pipelines.questions.generate import generate
from pipelines.questions.group import group, scores_of
from pipelines.questions.rank import DummyRanker, LookupRanker, rank
from pipelines.readers import lines

PASSAGES: list[Line] = [
    {"passage_id": "1", "passage": "Alexandria is a city.", "metadata": {"title": "Alexandria"}},
    {"passage_id": "2", "passage": "", "metadata": {"title": "Empty"}},
    {"passage_id": 3, "passage": "café 👑", "metadata": {"title": "", "source": "x"}},
]


class _Ranker:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, texts: Sequence[str]) -> Any:
        self.sizes.append(len(texts))
        return np.array([-len(text) for text in texts], dtype=np.float32)


class _Extractor:
    """Find every word."""

    def extract(self, texts: Sequence[str]) -> list[list[Span]]:
        found = []
        for text in texts:
            starts = [at for at in range(len(text)) if text[at] != " " and (at == 0 or text[at - 1] == " ")]
            ends = [text.find(" ", at) if text.find(" ", at) > 0 else len(text) for at in starts]
            found.append([Span(text[a:b], a, b, -0.5 * a) for a, b in zip(starts, ends, strict=True)])
        return found


class _Generator:
    """Ask two questions about every span."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def generate(self, titles: Sequence[str], texts: Sequence[str], spans: Sequence[Span]) -> list[list[str]]:
        self.seen += list(zip(titles, texts, strict=True))
        return [[f"what is {span.text.lower()}", f"which {span.start}"] for span in spans]


def _counting(lines: Iterable[Line], taken: list[int]) -> Iterator[Line]:
    for at, line in enumerate(lines):
        taken.append(at)
        yield line


# Files


def test_jsonl_and_tsv_give_the_same_passages(tmp_path: Path) -> None:
    rows = ['1\t"Alexandria is a ""big"" city."\tAlexandria', "2\t\tEmpty", '3\t"a\nb"\t']
    expected = [("1", 'Alexandria is a "big" city.', "Alexandria"), ("2", "", "Empty"), ("3", "a\nb", "")]
    for name, content in [
        ("with.tsv", "id\ttext\ttitle\n" + "\n".join(rows)),
        ("without.tsv", "\n".join(rows) + "\n\n"),
        ("bom.tsv", "\ufeffid\ttext\ttitle\r\n" + "\n".join(rows)),
    ]:
        (tmp_path / name).write_text(content, newline="")
        found = list(read_lines(str(tmp_path / name)))
        assert [(line["passage_id"], line["passage"], line["metadata"]["title"]) for line in found] == expected
    assert write_lines(str(tmp_path / "deep" / "copy.jsonl"), found) == 3
    assert list(read_lines(str(tmp_path / "deep" / "copy.jsonl"))) == found


def test_compressed_and_memory_files() -> None:
    import fsspec

    url = "memory://questions/test/ps.jsonl"
    assert write_lines(url, PASSAGES) == 3
    assert list(read_lines(url)) == PASSAGES
    raw = fsspec.open(url).open().read()
    with fsspec.open(f"{url}.gz", "wb") as handle:
        handle.write(gzip.compress(raw))
    assert list(read_lines(f"{url}.gz")) == PASSAGES
    assert raw.isascii()


@pytest.mark.parametrize(
    ("suffix", "magic"), [("gz", b"\x1f\x8b"), ("bz2", b"BZh"), ("xz", b"\xfd7z"), ("zst", b"(\xb5/")]
)
def test_lines_are_compressed_as_the_name_says(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"ps.jsonl.{suffix}"
    assert write_lines(str(path), PASSAGES) == 3
    assert path.read_bytes().startswith(magic)
    assert list(read_lines(str(path))) == PASSAGES
    assert [record["passage_id"] for _, record in read_records(str(path), "")] == ["1", "2", 3]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    url = str(tmp_path / "out.jsonl")
    write_lines(url, PASSAGES)

    def failing() -> Iterator[Line]:
        yield PASSAGES[0]
        raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        write_lines(url, failing())
    with pytest.raises(InputError, match=r"cannot be written[\s\S]*out\.jsonl, line 2"):
        write_lines(url, [PASSAGES[0], {"score": float("nan")}])
    assert list(read_lines(url)) == PASSAGES
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none())), max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_line_comes_back(lines: list[Line]) -> None:
    write_lines("memory://questions/test/any.jsonl", lines)
    assert list(read_lines("memory://questions/test/any.jsonl")) == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"no valid JSON[\s\S]*a\.jsonl, line 3"),
        ("a.jsonl", b'{"a": 1}\n{"a": {"score": NaN}}\n', r"NaN is not part of JSON[\s\S]*line 2"),
        ("a.jsonl", b"[1]\n", r"holds a list[\s\S]*line 1"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"not UTF-8[\s\S]*line 2"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', r"no valid JSON[\s\S]*surrogates[\s\S]*line 1"),
        ("a.jsonl", b"[" * 100_000, r"no valid JSON[\s\S]*line 1"),
        ("a.tsv", b"1\ttext\ttitle\n2\ttext\n", r"has 2 fields[\s\S]*a\.tsv, line 2"),
        ("a.tsv", b'1\ttext\t"open\n2\ttext\ttitle\n', r"cannot be read[\s\S]*a\.tsv, line 1"),
        ("a.tsv", b'1\ta\tb\n2\t"a" b\tc\n', r"cannot be read[\s\S]*a\.tsv, line 2"),
        ("a.parquet", b"PAR1", "not read from parquet"),
        ("a.dat", b"", "does not tell its format"),
        ("a.jsonl.gz", b"no gzip", "damaged"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_lines(str(tmp_path / name)))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises((InputError, ArtifactError), match="no such file"):
        list(read_lines(str(tmp_path / "absent.jsonl")))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + "x" * 1000)
    monkeypatch.setattr(lines.text_lines, "__defaults__", (100,))
    with pytest.raises(InputError, match=r"too long[\s\S]*line 2"):
        list(read_lines(str(tmp_path / "a.jsonl")))


def test_a_megabyte_row(tmp_path: Path) -> None:
    url, text = str(tmp_path / "a.tsv"), "war " * 300_000
    Path(url).write_text(f"1\t{text}\ttitle\n")
    assert [line["passage"] for line in read_lines(url)] == [text]
    assert len(list(rank(read_lines(url), DummyRanker()))) == 1


# Steps


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        next(batches([1], 0))


def test_rank_adds_ps_score_in_batches() -> None:
    ranker = _Ranker()
    taken: list[int] = []
    ranked = rank(_counting(PASSAGES, taken), ranker, batch_size=2)
    first = next(ranked)
    assert taken == [0, 1]
    assert first == {"passage_id": "1", "passage": "Alexandria is a city.",
                     "metadata": {"title": "Alexandria", "ps_score": -21.0}}  # fmt: skip
    rest = list(ranked)
    assert [line["metadata"]["ps_score"] for line in rest] == [0.0, -6.0]
    assert ranker.sizes == [2, 1]
    assert "ps_score" not in PASSAGES[0]["metadata"]


def test_dummy_and_lookup_rankers(tmp_path: Path) -> None:
    assert [line["metadata"]["ps_score"] for line in rank(PASSAGES, DummyRanker(-1000.0))] == [-1000.0] * 3
    url = str(tmp_path / "PASSAGE_SCORES")
    Path(url).write_text("1\t-0.25\n3\t-1e-3\n")
    found = [line["metadata"]["ps_score"] for line in rank(PASSAGES, LookupRanker.read(url), batch_size=2)]
    assert found == [-0.25, -1000.0, -0.001]
    assert LookupRanker.read(url, default=-5.0).score_ids(["9"]) == [-5.0]


@pytest.mark.parametrize(("row", "message"), [("2\tx", "'x' is no number"), ("2", "has 1 fields"), ("2\tnan", "nan")])
def test_bad_scores_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "scores.tsv").write_text(f"1\t-0.25\n{row}\n")
    with pytest.raises(InputError, match=rf"{message}[\s\S]*scores\.tsv, line 2"):
        LookupRanker.read(str(tmp_path / "scores.tsv"))


def test_extract_writes_paqs_shape() -> None:
    found = list(extract(PASSAGES, _Extractor(), batch_size=2))
    assert [list(line) for line in found] == [["passage_id", "passage", "answers", "metadata"]] * 3
    assert found[0]["answers"][0] == {"text": "Alexandria", "start": 0, "end": 10, "score": 0.0}
    assert found[1]["answers"] == []
    assert found[2]["answers"][1] == {"text": "👑", "start": 5, "end": 6, "score": -2.5}
    assert found[2]["metadata"] == {"title": "", "source": "x"}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_generate_writes_a_line_a_question(batch_size: int) -> None:
    extracted, generator = list(extract(PASSAGES, _Extractor())), _Generator()
    found = list(generate(extracted, generator, batch_size))
    assert len(found) == 2 * (4 + 2)
    assert found[3] == {
        "passage_id": "1",
        "answer": "is",
        "question": "which 11",
        "metadata": {"answer_start": 11, "answer_end": 13, "ae_score": -5.5, "qg_score": None},
    }
    assert generator.seen[0] == ("Alexandria", "Alexandria is a city.")
    assert generator.seen[-1] == ("", "café 👑")


def test_generate_streams() -> None:
    taken: list[int] = []
    next(generate(_counting(extract(PASSAGES, _Extractor(), 1), taken), _Generator(), batch_size=2))
    assert taken == [0]
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def _generated(question: str, answer: str, passage_id: str = "1", **metadata: Any) -> Line:
    return {"passage_id": passage_id, "answer": answer, "question": question, "metadata": metadata}


def test_group_by_identical_question() -> None:
    lines = [
        _generated("who", "a", ae_score=-1.0, consistent=True),
        _generated("what", "b"),
        _generated("who", "c", "2", consistent=False),
        _generated("Who", "d"),
        _generated("who", "a", "2"),
    ]
    scores = scores_of(rank(PASSAGES, DummyRanker(-3.0)))
    assert scores == {"1": -3.0, "2": -3.0, "3": -3.0}
    who, what, capital = group(lines, scores)
    assert who == {
        "question": "who",
        "answer": ["a", "c", "a"],
        "metadata": [
            {"passage_id": "1", "ps_score": -3.0, "answer": "a", "ae_score": -1.0, "consistent": True},
            {"passage_id": "2", "ps_score": -3.0, "answer": "c", "consistent": False},
            {"passage_id": "2", "ps_score": -3.0, "answer": "a"},
        ],
    }
    assert (what["question"], capital["question"]) == ("what", "Who")
    assert next(group(lines))["metadata"][1] == {"passage_id": "2", "answer": "c", "consistent": False}
    assert list(group([])) == []


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b ä", "👑"]), st.text(max_size=2)), max_size=12), st.integers(0, 12)
)
@settings(max_examples=40, deadline=None)
def test_groups_are_the_same_through_files(pairs: list[tuple[str, str]], in_memory: int) -> None:
    lines = [_generated(question, answer) for question, answer in pairs]
    expected: dict[str, list[str]] = {}
    for question, answer in pairs:
        expected.setdefault(question, []).append(answer)
    found = [(line["question"], line["answer"]) for line in group(lines, in_memory=in_memory)]
    assert found == list(expected.items())


def test_grouping_through_files_leaves_none(tmp_path: Path) -> None:
    lines = [_generated(f"q{n % 7}", str(n)) for n in range(50)]
    groups = group(lines, in_memory=5, folder=str(tmp_path))
    assert next(groups)["answer"] == ["0", "7", "14", "21", "28", "35", "42", "49"]
    assert len(list(tmp_path.iterdir())) == 1
    assert len(list(groups)) == 6
    assert list(tmp_path.iterdir()) == []


_STEPS: dict[str, Callable[[Iterable[Line]], Iterator[Line]]] = {
    "rank": lambda lines: rank(lines, DummyRanker()),
    "extract": lambda lines: extract(lines, _Extractor()),
    "generate": lambda lines: generate(lines, _Generator()),
    "group": group,
    "scores": lambda lines: iter([scores_of(lines)]),
}


@pytest.mark.parametrize(
    ("step", "bad", "message"),
    [
        ("rank", {"passage": "x"}, "no passage_id"),
        ("rank", {"passage_id": "1", "passage": None}, "no passage, or"),
        ("extract", {"passage_id": "1", "passage": "x", "metadata": {"title": 3}}, "title is no text"),
        ("extract", {"passage_id": "1", "passage": "x", "metadata": []}, "metadata is no object"),
        ("generate", {"passage_id": "1", "passage": "x"}, "no answers"),
        ("generate", {"passage_id": "1", "passage": "x", "answers": ["x"]}, "no object with a text"),
        ("generate", {"passage_id": "1", "passage": "x", "answers": [{"text": "x", "start": 0, "end": 2}]}, "within"),
        ("generate", {"passage_id": "1", "passage": "xy", "answers": [{"text": "x", "start": 1, "end": 2}]}, "has 'y'"),
        ("group", {"passage_id": "1", "question": "q"}, "no answer"),
        ("group", {"question": "q", "answer": "a"}, "no passage_id"),
        ("group", {"passage_id": "1", "question": "q", "answer": "a", "metadata": 1}, "metadata is no object"),
        ("scores", {"passage_id": "1", "metadata": {}}, r"no metadata\.ps_score"),
    ],
)
def test_lines_of_another_shape_are_refused_with_the_line(tmp_path: Path, step: str, bad: Line, message: str) -> None:
    (tmp_path / "in.jsonl").write_text("\n" + json.dumps(bad) + "\n")
    with pytest.raises(InputError, match=rf"{message}[\s\S]*in\.jsonl, line 2"):
        list(_STEPS[step](read_lines(str(tmp_path / "in.jsonl"))))
    with pytest.raises(InputError, match=rf"{message}[\s\S]*line 1"):
        list(_STEPS[step]([bad]))


def test_a_passage_without_score_is_refused() -> None:
    with pytest.raises(InputError, match="'2' has no ps_score"):
        list(group([_generated("q", "a", "2")], {"1": 0.0}))


def test_the_null_answer_may_be_asked_about() -> None:
    null = {"text": "null", "start": 0, "end": 0, "score": -100.0}
    assert next(generate([PASSAGES[0] | {"answers": [null]}], _Generator()))["answer"] == "null"


def test_once_through_with_models(tmp_path: Path) -> None:
    """From a TSV to grouped questions, file by file, as the reference lays them out."""
    from pipelines.models import find_model
    from tests.checkpoints.questions import write_bart, write_span2d

    extractor = find_model(write_span2d(str(tmp_path / "span2d")), "answer-extractor").load(str(tmp_path / "span2d"))
    generator = find_model(write_bart(str(tmp_path / "bart")), "question-generator").load(str(tmp_path / "bart"))
    source, ps, ae, qg, final = (
        str(tmp_path / name) for name in ("in.tsv", "ps.jsonl", "ae.jsonl", "qg.jsonl", "final_qas.jsonl")
    )
    Path(source).write_text("id\ttext\ttitle\n1\tThe library of Alexandria.\tAlexandria\n2\tA great king.\t\n")
    assert write_lines(ps, rank(read_lines(source), DummyRanker(-1.0))) == 2
    assert write_lines(ae, extract(read_lines(ps), extractor)) == 2
    assert write_lines(qg, generate(read_lines(ae), generator)) == 16
    num_groups = write_lines(final, group(read_lines(qg), scores_of(read_lines(ps))))
    lines = list(read_lines(final))
    assert len(lines) == num_groups == len({line["question"] for line in read_lines(qg)})
    assert sum(len(line["answer"]) for line in lines) == 16
    origin = lines[0]["metadata"][0]
    passage = {"1": "The library of Alexandria.", "2": "A great king."}[origin["passage_id"]]
    assert passage[origin["answer_start"] : origin["answer_end"]] == origin["answer"] == lines[0]["answer"][0]
    assert origin["ps_score"] == -1.0
