"""PAQ's span extractor against the L x L x 2D tensor it never builds, and the reference's choice of spans."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, find_family, find_model, kind_of, span2d, span2d_head
from pipelines.models.base import Span
from tests.checkpoints import write_cross_encoder, write_dpr, write_paq, write_sentence_transformer
from tests.checkpoints.questions import rewrite_config, rewrite_weights, write_span2d

FAMILY = "PAQ answer extractor"
SHORT = "A king's war, in a river."
LONG = " ".join(f"The great library number {n} of Alexandria was built in a river city." for n in range(40))
TEXTS = [SHORT, LONG, "Ägypten, café 9,787 books", "who wrote the book?? " * 30, "war", ""]


class _Oracle:
    """The extractor by hand: BertModel, the whole tensor of pairs, its MLP layer by layer, windows of transformers."""

    def __init__(self, directory: str) -> None:
        import torch
        from transformers import BertConfig, BertModel, BertTokenizer

        raw = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)
        self.state = {name: tensor.float() for name, tensor in raw.items()}
        bert = {n.removeprefix("bert."): t for n, t in self.state.items() if n.startswith("bert.")}
        del bert["embeddings.position_ids"]
        config = BertConfig.from_pretrained(directory)
        self.bert = BertModel(config, add_pooling_layer="pooler.dense.weight" in bert).eval()
        self.bert.load_state_dict(bert, strict=True)
        self.num_hidden = len(getattr(config, "output_mlp_sizes", []))
        self.band = getattr(config, "max_answer_length", 30)
        self.tokeniser = BertTokenizer.from_pretrained(directory)

    def windows(self, text: str) -> Any:
        kinds = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "return_special_tokens_mask": True}
        return self.tokeniser(text, truncation=True, max_length=256, stride=128, padding="max_length", **kinds)

    def logits(self, ids: list[int], mask: list[int]) -> npt.NDArray[np.float32]:
        """Return the (256, 256) logits of one window, -100 added to those of no span."""
        import torch
        from torch.nn.functional import linear

        mask_L = torch.tensor(mask)
        with torch.inference_mode():
            hidden_LH = self.bert(torch.tensor([ids]), attention_mask=mask_L[None]).last_hidden_state[0]
            start_LD = linear(hidden_LH, self.state["start_outputs.weight"], self.state["start_outputs.bias"])
            end_LD = linear(hidden_LH, self.state["end_outputs.weight"], self.state["end_outputs.bias"])
            size = len(ids)
            pairs = torch.cat([start_LD[:, None].expand(-1, size, -1), end_LD[None].expand(size, -1, -1)], dim=2)
            for layer in range(self.num_hidden):
                name = f"output_mlp.{2 * layer}"
                pairs = linear(pairs, self.state[f"{name}.weight"], self.state[f"{name}.bias"]).relu()
            logit_LL = linear(pairs, self.state["span_outputs.weight"], self.state["span_outputs.bias"])[..., 0]
            is_span_LL = torch.outer(mask_L, mask_L).triu().tril(self.band)
        return (logit_LL - 100 * (1 - is_span_LL)).numpy()

    def as_reference(self, text: str, top_k: int = 8) -> list[Span]:
        """Choose as PAQ does, null span included."""
        found, windows = [], self.windows(text)
        for ids, mask, offsets in zip(
            windows["input_ids"], windows["attention_mask"], windows["offset_mapping"], strict=True
        ):
            logit_LL = self.logits(ids, mask)
            for flat in np.argsort(logit_LL, axis=None)[::-1][: top_k + 9]:
                i, j = np.unravel_index(flat, logit_LL.shape)
                if i <= j and j - i + 1 <= 30:
                    found.append((float(logit_LL[i, j]), offsets[i][0], offsets[j][1]))
        found.sort(key=lambda item: item[0], reverse=True)
        spans = [Span(text[a:b], a, b, _log_sigmoid(logit)) for logit, a, b in found[:top_k]]
        if not spans or (len(spans) == 1 and spans[0].text == ""):
            spans.insert(0, Span("null", 0, 0, -100.0))
        return spans

    def by_default(self, text: str, top_k: int = 8) -> list[Span]:
        """Choose the best different spans of text tokens among all there are."""
        best: dict[tuple[int, int], float] = {}
        windows = self.windows(text)
        rows = ("input_ids", "attention_mask", "offset_mapping", "special_tokens_mask")
        for ids, mask, offsets, special in zip(*(windows[row] for row in rows), strict=True):
            logit_LL = self.logits(ids, mask)
            inside = [at for at, is_special in enumerate(special) if not is_special]
            for i in inside:
                for j in (j for j in inside if 0 <= j - i < 30):
                    place = (offsets[i][0], offsets[j][1])
                    best[place] = max(float(logit_LL[i, j]), best.get(place, -math.inf))
        ranked = sorted(best.items(), key=lambda item: -item[1])[:top_k]
        return [Span(text[a:b], a, b, _log_sigmoid(logit)) for (a, b), logit in ranked]


def _log_sigmoid(logit: float) -> float:
    return -math.log1p(math.exp(-logit)) if logit > 0 else logit - math.log1p(math.exp(logit))


def _places(found: list[list[Span]]) -> list[str]:
    return [f"{row}: {span.text!r} {span.start} {span.end}" for row, spans in enumerate(found) for span in spans]


def _scores(found: list[list[Span]]) -> list[float]:
    return [span.score for spans in found for span in spans if span.score is not None]


def _compare(
    parity: Callable[..., None], layout: str, ours: list[list[Span]], theirs: list[list[Span]], tolerance: float = 1e-5
) -> None:
    parity(FAMILY, f"{layout}: spans", "L x L x 2D by hand", _places(ours), _places(theirs))
    parity(FAMILY, f"{layout}: scores", "L x L x 2D by hand", _scores(ours), _scores(theirs), tolerance)


@cache
def _shared(folder: Path) -> str:
    return write_span2d(str(folder / "shared-span2d"), mlp=(8,))


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An extractor that several tests read and none changes."""
    return _shared(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(("mlp", "pooler", "dtype"), [((), True, "float32"), ((8,), False, "float32"),
                                                      ((8, 6), False, "float16")])  # fmt: skip
def test_spans_equal_the_reference(
    tmp_path: Path, parity: Callable[..., None], mlp: tuple[int, ...], pooler: bool, dtype: str
) -> None:
    directory = write_span2d(str(tmp_path), mlp=mlp, pooler=pooler, dtype=dtype)
    oracle, layout = _Oracle(directory), f"{dtype} .bin, {len(mlp)} hidden layers"
    assert find_model(directory, "answer-extractor") is span2d
    quirks = span2d.load(directory, reference_quirks=True).extract(TEXTS)
    _compare(parity, f"{layout}, quirks", quirks, [oracle.as_reference(text) for text in TEXTS])
    ours = span2d.load(directory).extract(TEXTS)
    _compare(parity, layout, ours, [oracle.by_default(text) for text in TEXTS])


def test_safetensors_give_the_same(tmp_path: Path, directory: str) -> None:
    from safetensors.torch import load_file

    other = write_span2d(str(tmp_path), mlp=(8,), weights="safetensors")
    assert "span_outputs.weight" in load_file(tmp_path / "model.safetensors")
    assert span2d.load(other).extract(TEXTS) == span2d.load(directory).extract(TEXTS)


@pytest.mark.parametrize("longest", [3, 60])
def test_the_limits_on_length(tmp_path: Path, parity: Callable[..., None], longest: int) -> None:
    """max_answer_length masks; 30 tokens are the limit whatever it says."""
    directory = write_span2d(str(tmp_path), max_answer_length=longest)
    oracle = _Oracle(directory)
    assert oracle.band == longest
    quirks = span2d.load(directory, reference_quirks=True).extract([LONG])
    _compare(parity, f"max_answer_length {longest}, quirks", quirks, [oracle.as_reference(LONG)])
    (spans,) = span2d.load(directory, top_k=400).extract([LONG])
    counts = [len(oracle.tokeniser(span.text)["input_ids"]) - 2 for span in spans]
    assert max(counts) == min(longest + 1, 30)


def test_top_k(directory: str) -> None:
    everything = span2d.load(directory, top_k=20).extract([LONG])[0]
    assert len(everything) == 20
    assert _places([span2d.load(directory, top_k=5).extract([LONG])[0]]) == _places([everything[:5]])


def test_the_null_span(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = span2d.load(directory, reference_quirks=True, top_k=1)
    assert extractor._choose_as_reference("text", []) == [Span("null", 0, 0, -100.0)]
    first, second = extractor._choose_as_reference("text", [(1.0, 0, 0)])
    assert (first.text, second.text) == ("null", "")
    assert extractor._choose_as_reference("text", [(1.0, 0, 4)])[0].text == "text"
    assert [span.text for span in extractor.extract([""])[0]] == ["null", ""]


def test_scores_stay_exact_at_the_ends() -> None:
    assert span2d.log_sigmoid(-1000.0) == -1000.0
    assert span2d.log_sigmoid(50.0) == pytest.approx(-math.exp(-50.0), rel=1e-9)


def test_default_spans_are_different_and_no_special_token(directory: str) -> None:
    for text, spans in zip(TEXTS, span2d.load(directory).extract(TEXTS), strict=True):
        assert len({(span.start, span.end) for span in spans}) == len(spans)
        assert all(span.text == text[span.start : span.end] and span.text.strip() for span in spans)
    doubled = span2d.load(directory, reference_quirks=True, top_k=1500).extract([LONG])[0]
    assert len({(span.start, span.end) for span in doubled}) < len(doubled)


@pytest.mark.parametrize("quirks", [False, True])
def test_batch_and_order_do_not_matter(directory: str, quirks: bool) -> None:
    together = span2d.load(directory, reference_quirks=quirks, batch_size=3).extract(TEXTS)
    alone = [span2d.load(directory, reference_quirks=quirks).extract([text])[0] for text in TEXTS]
    turned = span2d.load(directory, reference_quirks=quirks).extract(TEXTS[::-1])[::-1]
    assert _places(together) == _places(alone) == _places(turned)
    np.testing.assert_allclose(_scores(together), _scores(alone), atol=1e-5)
    np.testing.assert_allclose(_scores(turned), _scores(alone), atol=1e-5)


def test_texts_are_tokenised_in_groups(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = span2d.load(directory).extract(TEXTS)
    monkeypatch.setattr(span2d, "_CHARACTERS", 50)
    assert [len(group) for group in span2d._groups(TEXTS)] == [1, 1, 1, 1, 2]
    assert _places(span2d.load(directory).extract(TEXTS)) == _places(whole)


def test_hidden_layers_are_computed_in_chunks(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    whole, sizes = span2d.load(directory).extract(TEXTS), []
    extractor, plain = span2d.load(directory), torch.Tensor.relu_

    def watched(tensor: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "relu_", watched)
    monkeypatch.setattr(span2d_head, "_HIDDEN_VALUES", 50_000)
    chunked = extractor.extract(TEXTS)
    assert len(sizes) > 4
    assert max(sizes) <= 50_000 < 6 * 256 * 30 * 8
    assert _places(chunked) == _places(whole)
    np.testing.assert_allclose(_scores(chunked), _scores(whole), atol=1e-6)


def test_tokens_and_windows(directory: str) -> None:
    """Lower-cased, accents stripped, offsets in characters of the text as it was given."""
    backend = span2d.load(directory).backend
    encoding = backend.encode("Ägypten, the CITY")
    assert encoding.ids == [2, 31, 76, 94, 85, 89, 74, 83, 16, 109, 124, 3]
    assert encoding.tokens[1:] == ["a", "##g", "##y", "##p", "##t", "##e", "##n", ",", "the", "city", "[SEP]"]
    assert encoding.offsets[1:4] == [(0, 1), (1, 2), (2, 3)]
    ours = backend.encode(LONG)
    theirs = _Oracle(directory).windows(LONG)
    rows = [window.ids for window in (ours, *ours.overflowing)]
    assert len(rows) > 3
    assert rows == [[i for i in row if i != 0] for row in theirs["input_ids"]]
    assert rows[0][-129:-1] == rows[1][1:129]


def test_odd_texts(directory: str) -> None:
    extractor = span2d.load(directory)
    accents = unicodedata.normalize("NFD", "café in Ägypten")
    found = extractor.extract(["", "  \n ", "??", accents, "king 👑 of 埃及", SHORT, SHORT])
    assert found[0] == found[1] == []
    assert {span.text for span in found[2]} == {"?", "??"}
    assert all(span.text == accents[span.start : span.end] for span in found[3])
    assert "👑" in {span.text for span in extractor.extract(["👑"])[0]}
    assert found[5] == found[6]
    assert extractor.extract([]) == []


def test_a_text_of_a_megabyte(directory: str) -> None:
    text = "Alexandria " * 95_000
    (spans,) = span2d.load(directory).extract([text])
    assert len(text) > 1_000_000
    assert len(spans) == 8
    assert all(span.text == text[span.start : span.end] for span in spans)


def test_half_precision_is_close(directory: str) -> None:
    half, full = span2d.load(directory, "bf16"), span2d.load(directory)
    assert str(half.head.backbone.dtype) == "torch.bfloat16"
    np.testing.assert_allclose(_scores(half.extract([SHORT])), _scores(full.extract([SHORT])), atol=0.2)


def test_what_it_is(directory: str) -> None:
    described = describe(directory)
    assert (described.family, described.kind, described.max_length) == ("span2d", "answer-extractor", 256)
    assert described.details["output_mlp_sizes"] == [8]
    with pytest.raises(CheckpointError, match="answer extractor"):
        find_family(directory)


def test_others_are_not_recognised(tmp_path: Path) -> None:
    others = [
        write_dpr(str(tmp_path / "dpr"), "query"),
        write_paq(str(tmp_path / "paq")),
        write_cross_encoder(str(tmp_path / "cross")),
        write_sentence_transformer(str(tmp_path / "st")),
        str(tmp_path),
        str(tmp_path / "dpr" / "config.json"),
        str(tmp_path / "absent"),
    ]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"span_output_size": ')
    assert [span2d.recognises(other) for other in (*others, str(damaged))] == [False] * 8


@pytest.mark.parametrize("name", ["start_outputs.bias", "output_mlp.0.weight", "span_outputs.weight",
                                  "bert.encoder.layer.1.output.dense.bias"])  # fmt: skip
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_span2d(str(tmp_path), mlp=(8,))
    rewrite_weights(directory, [name])
    with pytest.raises(CheckpointError, match=name.removeprefix("bert.").replace(".", r"\.")):
        span2d.load(directory)


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    directory = write_span2d(str(tmp_path))
    rewrite_weights(directory, **{"output_mlp.0.weight": np.zeros((4, 24), np.float32)})
    with pytest.raises(CheckpointError, match="hold unexpected output_mlp"):
        span2d.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"span_output_size": 9}, r"start_outputs\.weight has the shape \(12, 32\)"),
        ({"span_output_size": "12"}, "is no size"),
        ({"output_mlp_sizes": 8}, "is no size"),
        ({"output_mlp_sizes": [8, 7]}, r"lack output_mlp\.2\.weight"),
        ({"max_position_embeddings": 128}, "takes 128 tokens"),
        ({"intermediate_size": 63}, "do not fit"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory = write_span2d(str(tmp_path), mlp=(8,))
    rewrite_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        span2d.load(directory)


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


def test_damaged_and_malicious_files_are_refused(tmp_path: Path, directory: str) -> None:
    copy, proof = str(tmp_path / "copy"), tmp_path / "proof"
    shutil.copytree(directory, copy)
    path = Path(copy) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="damaged"):
        find_model(copy, "answer-extractor")
    path.write_bytes(pickle.dumps({"start_outputs.weight": _Evil(str(proof))}, protocol=2))
    with pytest.raises(CheckpointError, match="holds code"):
        find_model(copy, "answer-extractor")
    assert not proof.exists()
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        find_model(copy, "answer-extractor")
    assert kind_of(copy) == ("span2d", "answer-extractor")


def test_without_a_tokeniser_it_is_refused(tmp_path: Path) -> None:
    directory = write_span2d(str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser"):
        find_model(directory, "answer-extractor")


def test_options_that_cannot_be_meant(directory: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        span2d.load(directory, top_k=0)
    with pytest.raises(ConfigError, match="unknown dtype"):
        span2d.load(directory, "int8")
    assert json.loads((Path(directory) / "config.json").read_text())["span_output_size"] == 12
