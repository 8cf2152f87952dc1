"""Laws every sentence-transformers encoder keeps: batches, order, padding, lengths, whatever the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.models import sentence_transformers as family
from pipelines.models.base import Tower
from tests.checkpoints import write_sentence_transformer
from tests.checkpoints.sentence import write_model
from tests.parity.test_st_models import BY_NAME, load
from tests.parity.towers import close, embed

ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from(
            ["", "??", " ", "cafe\u0301", "👩🏽‍🔬 war", "\x00\u200b", "king " * 700, "[SEP] </s> <pad>", "İΣ"]
        ),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Tower]]:
    names = ["quora-distilbert-multilingual", "nli-distilroberta-base-v2", "cross-en-de-roberta-sentence-transformer"]
    names += ["stsb-mpnet-base-v2", "LaBSE"]
    folders = {name: str(tmp_path_factory.mktemp("model")) for name in names}
    return [load(write_model(folders[name], BY_NAME[name]), BY_NAME[name]) for name in names]


@pytest.mark.parametrize("which", range(5))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=ANY_TEXT, titles=ANY_TEXT)
def test_batch_order_and_padding_do_not_matter(encoders: Any, which: int, texts: list[str], titles: list[str]) -> None:
    tokeniser, tower = encoders[which]
    titles = (titles * len(texts))[: len(texts)]
    vectors = embed(tower, tokeniser.passages(titles, texts), tokeniser.pad_id)
    assert np.isfinite(vectors).all()
    assert close(np.linalg.norm(vectors, axis=1), np.ones(len(texts)))
    backwards = embed(tower, tokeniser.passages(titles[::-1], texts[::-1]), tokeniser.pad_id, extra=3)
    assert close(backwards[::-1], vectors)
    for row in range(len(texts)):
        alone = embed(tower, tokeniser.passages(titles[row : row + 1], texts[row : row + 1]), tokeniser.pad_id)
        assert close(alone[0], vectors[row])


@pytest.mark.parametrize("which", range(5))
def test_a_megabyte_is_cut_to_the_length_it_is_read_at(encoders: Any, which: int) -> None:
    tokeniser, tower = encoders[which]
    long = "The great library — 図書館 é " * 35_000
    assert len(long.encode()) > 1_000_000
    tokens = tokeniser.queries([long, long[:4000], "a scroll", "a scroll"])
    lengths = tokens.lengths.tolist()
    assert lengths[0] == lengths[1] == tokeniser.encoder.max_length
    vectors = embed(tower, tokens, tokeniser.pad_id)
    assert close(vectors[0], vectors[1])
    assert close(vectors[2], vectors[3])
    assert not close(vectors[0], vectors[2])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 0}, 512),
        ({"model_type": "deberta-v2", "max_position_embeddings": None}, None),
    ],
)
def test_position_limit(config: dict[str, Any], expected: int | None) -> None:
    assert family.position_limit(config) == expected


@pytest.mark.parametrize(("declared", "expected"), [(10**30, 512), (1e30, 512), (200, 200), (None, 512), (9000, 512)])
def test_the_tokeniser_s_length_serves_a_silent_checkpoint(tmp_path: Path, declared: Any, expected: int) -> None:
    directory = write_sentence_transformer(str(tmp_path), max_seq_length=None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": declared}))
    assert family.info(directory).max_length == expected
    assert family.load_tokeniser(directory).queries(["war " * 600]).lengths.tolist() == [expected]
