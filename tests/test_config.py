"""Configs are strict, and say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.errors import ConfigError

_GOOD = """
corpus: {sources: [a.tsv]}
encoder: {checkpoint: some/model}
"""


def _load(tmp_path: Path, text: str, overrides: list[str] | None = None) -> object:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(str(path), overrides)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda p: p.name)
def test_the_shipped_configs_load(path: Path) -> None:
    assert load_config(str(path)).corpus.sources


def test_overrides_reach_deep_keys(tmp_path: Path) -> None:
    config = _load(
        tmp_path, _GOOD, ["index.factory=HNSW32", "index.search_params={efSearch: 64}", "cluster.workers=[1, 4]"]
    )
    assert config.index.factory == "HNSW32"  # type: ignore[attr-defined]
    assert config.index.search_params == {"efSearch": 64}  # type: ignore[attr-defined]
    assert config.cluster.worker_range() == (1, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (_GOOD + "indx: {}", None, r"unknown key 'indx'; did you mean 'index'\?"),
        (_GOOD, ["index.factroy=Flat"], r"unknown key 'index.factroy'; did you mean 'factory'\?"),
        (_GOOD, ["index.zzz=1"], "known keys: factory"),
        (_GOOD, ["corpus.part_size=0"], "corpus.part_size: Input should be greater than or equal to 1"),
        (_GOOD, ["corpus.name='../x'"], "corpus.name"),
        (_GOOD, ["cluster.workers=[4, 1]"], "1 <= min <= max"),
        (_GOOD, ["serve.max_k=40000"], "max_k is 40000, more than max_hits"),
        (_GOOD, ["noequals"], "cannot read the override"),
        (_GOOD, ["root.deep=1"], "root"),
        ("corpus: {sources: []}\nencoder: {checkpoint: a}", None, "corpus.sources"),
        ("- a list", None, "holds no keys"),
        ("a: [", None, "not YAML"),
    ],
)
def test_bad_configs_are_explained(tmp_path: Path, text: str, overrides: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text, overrides)


def test_a_missing_file_is_explained() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config("nowhere.yaml")
