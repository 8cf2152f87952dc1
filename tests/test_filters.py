"""Metadata filters: the language and its refusals, masks against plain Python, searches against brute force."""

from __future__ import annotations

import math
import pickle
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import ArtifactError, ConfigError
from pipelines.filters import Filter, fields_of, mask, parse_filter
from pipelines.index.among import Selection, Selections, search_among, select
from pipelines.index.build import add, finish, read, train, write
from pipelines.index.exact import exact_topk
from pipelines.index.spec import parse_spec
from pipelines.schema import METADATA, MetadataField, passage_schema

FIELDS = {"lang": "string", "year": "int", "score": "float", "open": "bool", "tags": "strings"}
SCHEMA = passage_schema([MetadataField(name, kind, name) for name, kind in FIELDS.items()])
DIM = 16

TEXTS = st.one_of(st.sampled_from(["en", "fr", "é", "", "🙂"]), st.text(max_size=4).filter(lambda t: t.isprintable()))
FLOATS = st.one_of(st.sampled_from([0.0, -0.0, 0.5, 1e300]), st.floats(allow_nan=False, allow_infinity=False))
INTS = st.one_of(st.integers(-3, 3), st.sampled_from([2**63 - 1, -(2**63), 2**53 + 1]))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lang": TEXTS, "year": INTS, "score": FLOATS, "open": st.booleans(), "tags": TEXTS,
}  # fmt: skip
ROWS = st.fixed_dictionaries(
    {name: st.none() | (st.lists(TEXTS, max_size=3) if name == "tags" else VALUES[name]) for name in FIELDS}
)


def conditions(name: str) -> st.SearchStrategy[Any]:
    value = VALUES[name]
    operations: dict[str, st.SearchStrategy[Any]] = {"in": st.lists(value, max_size=3), "exists": st.booleans()}
    operations |= {"eq": value}
    if name not in ("open", "tags"):
        operations |= dict.fromkeys(("lt", "lte", "gt", "gte"), value)
    return value | st.fixed_dictionaries({}, optional=operations).filter(bool)


PLAIN = st.fixed_dictionaries({}, optional={name: conditions(name) for name in FIELDS})
FILTERS = st.recursive(
    PLAIN, lambda inner: st.tuples(PLAIN, st.lists(inner, min_size=1, max_size=3)).map(lambda p: {**p[0], "any": p[1]}),
    max_leaves=4,
)  # fmt: skip


def fits(row: dict[str, Any], content: dict[str, Any]) -> bool:
    """Say in plain Python whether a row satisfies a filter."""
    return all(
        any(fits(row, other) for other in wanted) if name == "any" else condition_holds(row[name], wanted)
        for name, wanted in content.items()
    )


def condition_holds(value: Any, wanted: Any) -> bool:
    operations = wanted if isinstance(wanted, dict) else {"eq": wanted}
    return all(operation_holds(value, name, other) for name, other in operations.items())


def operation_holds(value: Any, operation: str, other: Any) -> bool:
    if operation == "exists":
        return (value is not None) == other
    if value is None:
        return False
    if operation in ("eq", "in"):
        others = other if operation == "in" else [other]
        return any(o in value for o in others) if isinstance(value, list) else value in others
    return {"lt": value < other, "lte": value <= other, "gt": value > other, "gte": value >= other}[operation]


def table_of(rows: list[dict[str, Any]], chunk: int) -> pa.Table:
    passages = [{"id": str(i), "title": "", "text": "x", METADATA: row} for i, row in enumerate(rows)]
    return pa.Table.from_batches(
        [pa.RecordBatch.from_pylist(passages[i : i + chunk], SCHEMA) for i in range(0, len(passages), chunk)], SCHEMA
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, max_size=12), FILTERS, st.integers(1, 5), st.integers(0, 3))
def test_a_mask_is_what_plain_python_says(rows: list[dict[str, Any]], content: Any, chunk: int, skipped: int) -> None:
    table = table_of(rows, chunk).slice(skipped)  # also where arrays do not begin at their buffers' start
    assert fields_of(table.schema) == FIELDS
    where = parse_filter(content, FIELDS)
    expected = [fits(row, content) for row in rows[skipped:]]
    assert (mask(where, table).tolist() if where else [True] * len(expected)) == expected
    assert pickle.loads(pickle.dumps(where)) == where
    assert hash(parse_filter(content, FIELDS)) == hash(where)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"holds \[\].*"),
        ({"yaer": 1}, "unknown field 'yaer'; did you mean 'year'"),
        ({"zzz": 1}, "unknown field 'zzz'\n"),
        ({"year": "1990"}, "'year' is compared with '1990'"),
        ({"year": True}, "compared with True"),
        ({"year": 1.5}, "compared with 1.5"),
        ({"year": 2**63}, "compared with"),
        ({"year": math.nan}, "compared with nan"),
        ({"score": math.inf}, "compared with inf"),
        ({"score": 10**400}, "compared with 1000"),
        ({"lang": None}, "compared with None"),
        ({"lang": "\ud800"}, "compared with"),
        ({"lang": {}}, "'{}' is no operation"),
        ({"lang": {"like": "e%"}}, "'like' is no operation on 'lang'"),
        ({"tags": {"lt": "a"}}, "'lt' is no operation on 'tags'"),
        ({"tags": {"in": "a"}}, "`in` of 'tags' is 'a'"),
        ({"open": {"exists": 1}}, "compared with 1"),
        ({"any": []}, "`any` is"),
        ({"any": [{"lang": 1}]}, "compared with 1"),
        ({"any": [{"any": [{"any": [{"any": [{"any": [{}]}]}]}]}]}, "nested too deeply"),
        ({"any": [{"lang": "x"}] * 65}, "too long"),
        ({"any": [{}] * 65}, "too long"),
        ({"year": {"in": list(range(10_001))}}, "too long"),
        ({"lang": "x" * 500_001}, "too long"),
        ({"lang": {"in": ["x" * 250_001] * 2}}, "500,000 characters"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_filter(content, FIELDS)


def test_a_version_without_metadata_says_so() -> None:
    with pytest.raises(ConfigError, match="carries no metadata"):
        parse_filter({"year": 1}, {})
    assert parse_filter({}, {}) is None
    assert parse_filter({"year": 3.0}, FIELDS) == parse_filter({"year": {"eq": 3}}, FIELDS)


# Searching


def vectors(num: int, seed: int = 0) -> np.ndarray:
    """Return (num, DIM) fp32 unit vectors in a few clusters."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((8, DIM))
    found = centre[rng.integers(8, size=num)] + 0.5 * rng.standard_normal((num, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def built(factory: str, metric: str, vectors_ND: np.ndarray, first_row: int) -> Any:
    spec = parse_spec(factory, DIM, metric)  # type: ignore[arg-type]
    index = train(spec, vectors_ND, num_threads=1)
    add(index, vectors_ND, np.arange(len(vectors_ND)) + first_row, num_threads=1)
    finish(index)
    return index


EXACT = ("Flat", "SQfp16", "HNSW8", "NSG8", "IVF8,Flat", "SQ8,RFlat", "HNSW8,RFlat", "PCA16,Flat")
CODED = ("SQ8", "PQ8", "PQ8x4fs", "IVF8,SQ8", "IVF8,PQ8", "IVF8,PQ8x4fs", "IVF8,RaBitQ", "RaBitQ", "HNSW8_SQ8",
         "IVF8_HNSW4,Flat", "PQ8x4fs,RFlat", "LSH")  # fmt: skip


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return vectors(700)


@pytest.fixture(scope="module")
def indexes(data: np.ndarray) -> dict[tuple[str, str, int], Any]:
    """Every type, built once: the metrics alternate, and the rows begin at 0 or at a number that no byte ends at."""
    found = {}
    for number, factory in enumerate((*EXACT, *CODED)):
        metric = "l2" if factory == "LSH" or number % 2 else "ip"
        first_row = 0 if number % 3 == 0 else 1003
        found[factory, metric, first_row] = built(factory, metric, data, first_row)
    return found


def test_flat_equals_brute_force_whatever_is_selected(data: np.ndarray) -> None:
    queries = vectors(4, seed=1)
    index = {metric: built("Flat", metric, data, 5) for metric in ("ip", "l2")}

    @settings(max_examples=60, deadline=None)
    @given(st.floats(0, 1), st.integers(0, 2**16), st.sampled_from(["ip", "l2"]), st.integers(1, 30))
    def check(share: float, seed: int, metric: Any, k: int) -> None:
        mask_N = np.random.default_rng(seed).random(len(data)) < share**3
        found = search_among(index[metric], select(index[metric], mask_N, 5), queries, k, num_threads=1)
        rows = np.flatnonzero(mask_N)
        score_BK, row_BK = exact_topk(queries, [(data[rows], rows + 5)], k, metric, num_threads=1)
        np.testing.assert_array_equal(found[1], row_BK)
        np.testing.assert_allclose(found[0], score_BK, atol=1e-5)

    check()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([0.0, 0.004, 0.05, 0.5, 1.0]), st.integers(0, 99), st.sampled_from([1, 10, 60]))
def test_every_type_finds_selected_rows_alone_and_as_many_as_there_are(
    indexes: dict[tuple[str, str, int], Any], share: float, seed: int, k: int
) -> None:
    queries = vectors(3, seed=2)
    mask_N = np.random.default_rng(seed).random(700) < share
    for (factory, _, first_row), index in indexes.items():
        score_BK, row_BK = search_among(index, select(index, mask_N, first_row), queries, k, num_threads=1)
        expected = min(k, int(mask_N.sum()))
        assert ((row_BK >= 0).sum(axis=1) == expected).all(), factory
        assert mask_N[row_BK[row_BK >= 0] - first_row].all(), factory
        assert all(len(set(rows)) == len(rows) for rows in (r[r >= 0].tolist() for r in row_BK)), factory
        assert (np.diff(score_BK[:, :expected], axis=1) <= 0).all(), factory


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_recall_holds_among_a_few(indexes: dict[tuple[str, str, int], Any], data: np.ndarray, share: float) -> None:
    """With an nprobe and an efSearch that suffice among all rows; types that store vectors as they are."""
    queries = vectors(50, seed=3)
    mask_N = np.random.default_rng(4).random(len(data)) < share
    rows = np.flatnonzero(mask_N)
    for (factory, metric, first_row), index in indexes.items():
        if factory not in EXACT:
            continue
        params = {"nprobe": 3} if "IVF" in factory else {"efSearch": 32} if "HNSW" in factory else {}
        _, row_BK = search_among(index, select(index, mask_N, first_row), queries, 5, params, num_threads=1)
        _, best_BK = exact_topk(queries, [(data[rows], rows + first_row)], 5, metric, num_threads=1)  # type: ignore[arg-type]
        recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(row_BK, best_BK, strict=True)])
        assert recall > (0.95 if share < 0.5 else 0.9), (factory, recall)


def test_a_filter_far_from_the_query_still_fills_the_answer(data: np.ndarray) -> None:
    """The rows selected are those that nprobe 1 and efSearch 1 would never come to: the least like the query."""
    query = data[:1]
    far = np.argsort(data @ query[0])[:40]
    mask_N = np.isin(np.arange(len(data)), far)
    for factory, params in (("IVF8,Flat", {"nprobe": 1}), ("HNSW8", {"efSearch": 1})):
        index = built(factory, "ip", data, 0)
        score_BK, row_BK = search_among(index, select(index, mask_N, 0), query, 40, params)
        assert set(row_BK[0].tolist()) == set(far.tolist())
        np.testing.assert_allclose(score_BK[0], np.sort(data[far] @ query[0])[::-1], atol=1e-5)


def test_a_mapped_index_is_searched_as_one_in_memory(data: np.ndarray, tmp_path: Any) -> None:
    mask_N = np.arange(len(data)) % 3 == 0
    for factory in ("Flat", "IVF8,SQ8", "HNSW8"):
        index = built(factory, "ip", data, 9)
        write(index, str(tmp_path / "x.faiss"))
        mapped = read(str(tmp_path / "x.faiss"), mmap=True)
        one, other = (search_among(i, select(i, mask_N, 9), data[:5], 8, num_threads=1) for i in (index, mapped))
        np.testing.assert_array_equal(one[1], other[1])


def test_rows_in_another_order_than_the_index_keeps_them(data: np.ndarray) -> None:
    """An index that others built may hold its vectors in any order."""
    order = np.random.default_rng(0).permutation(len(data))
    index = faiss.IndexIDMap(faiss.IndexFlatIP(DIM))
    index.add_with_ids(data[order], order + 7)
    mask_N = np.arange(len(data)) < 20
    _, row_BK = search_among(index, select(index, mask_N, 7), data[:20], 1)
    assert row_BK[:, 0].tolist() == list(range(7, 27))


def test_a_mask_of_another_length_is_refused(data: np.ndarray) -> None:
    index = built("Flat", "ip", data, 0)
    with pytest.raises(ArtifactError, match="699 rows to select from, but the index holds 700"):
        select(index, np.ones(699, np.bool_), 0)


def test_selections_are_kept_within_their_bytes(data: np.ndarray) -> None:
    index = built("Flat", "ip", data, 0)
    made: list[int] = []

    def make(number: int) -> Selection:
        made.append(number)
        return select(index, np.arange(len(data)) % 2 == 0, 0)

    each = make(-1).num_bytes + 1024
    kept = Selections(3 * each)
    for number in (0, 1, 2, 0, 3, 0, 1):  # 3 pushes 1 out, the one used longest ago
        kept.get(number, lambda n=number: make(n))  # type: ignore[misc]
    assert made == [-1, 0, 1, 2, 3, 1]
    assert kept.num_bytes == 3 * each
    none = Selections(each - 1)
    assert none.get(0, lambda: make(7)) is not none.get(0, lambda: make(8))
    assert none.num_bytes == 0


def test_a_filter_is_hashable_by_what_it_means() -> None:
    one, other = (parse_filter({"lang": {"in": [a, "b"]}}, FIELDS) for a in ("a", "c"))
    again = parse_filter({"lang": {"in": ["a", "b"]}}, FIELDS)
    assert isinstance(one, Filter)
    assert isinstance(other, Filter)
    assert isinstance(again, Filter)
    assert len({one, other, again}) == len({f.digest for f in (one, other, again)}) == 2
    assert one.digest == pickle.loads(pickle.dumps(again)).digest


def test_a_refusal_repeats_no_long_names() -> None:
    for content in ({"x" * 1_000_000: 1}, {"lang": {"x" * 1_000_000: 1}}):
        with pytest.raises(ConfigError) as caught:
            parse_filter(content, FIELDS)
        assert len(str(caught.value)) < 1000
