"""What a text costs is counted right, what a device can do is measured, and a run's records say what it waited for."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from cluster.progress import Progress
from cluster.summaries import encode_summary, encoding_lines
from pipelines.config import EncoderConfig
from pipelines.encode import Encoder, ImageEncoder, resolve
from pipelines.models import find_family
from pipelines.models.cost import Cost, count_flops, measure_matrix_limit
from pipelines.models.tower import EncoderTower
from pipelines.report.page import render_report
from pipelines.throughput import BOTTLENECKS, Meter, Step, Throughput, Work, busy_share, summarise, this_device, timed
from tests.checkpoints import WORDS, write_dpr, write_paq
from tests.checkpoints.clip import write_hub_clip, write_openai_clip
from tests.checkpoints.words import write_word_vectors
from tests.test_engine import make

KINDS = ("bert", "albert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert", "mpnet")
WIDTH, INNER, LAYERS, NARROW, OUT = 32, 64, 3, 16, 8  # test_engine's models, and a layer behind them


def transformer_cost(width: int, inner: int, layers: int) -> tuple[float, float]:
    """Return (FLOPs a token, FLOPs a pair of tokens): four projections and two layers; scores and their sum."""
    return layers * (2 * 4 * width * width + 2 * 2 * width * inner), layers * 2 * 2 * width


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_text_is_the_closed_form(kind: str) -> None:
    """Also when the model is fused and packed, and for ALBERT, whose layers are one layer run three times."""
    tower = EncoderTower(make(kind), WIDTH, ["mean"], [torch.nn.Linear(WIDTH, OUT)]).on("cpu")
    linear, quadratic = transformer_cost(WIDTH, INNER, LAYERS)
    projected = 2 * NARROW * WIDTH if kind in ("albert", "electra") else 0  # narrow embeddings made wide
    assert count_flops(tower) == Cost(linear + projected, quadratic, 2 * WIDTH * OUT)


def test_positions_that_deberta_shares_in_a_batch_are_no_cost_of_a_text() -> None:
    model = make("deberta-v2").requires_grad_(False)
    found = count_flops(EncoderTower(model, WIDTH, ["mean"]))
    assert found is not None
    assert found.constant == 0
    for length in (7, 30):
        with torch.no_grad(), FlopCounterMode(display=False) as one:
            model(torch.full((1, length), 5))
        with torch.no_grad(), FlopCounterMode(display=False) as many:
            model(torch.full((5, length), 5))
        assert found.of(np.full(4, length)) == many.get_total_flops() - one.get_total_flops()


def test_a_large_model_is_counted_without_its_memory() -> None:
    """BERT-base on the meta device: the figure that everybody knows, 2 FLOPs a weight of its layers."""
    tower = torch.nn.Module()
    with torch.device("meta"):
        tower.backbone = BertModel(BertConfig(), add_pooling_layer=False)
    weights = sum(p.numel() for n, p in tower.backbone.named_parameters() if "layer" in n and p.dim() == 2)
    assert count_flops(tower) == Cost(2 * weights, 12 * 4 * 768, 0)


def test_families_count_through_their_own_loaders(tmp_path: Path) -> None:
    checkpoints = {
        "dpr": write_dpr(str(tmp_path / "dpr"), "passage"),
        "paq": write_paq(str(tmp_path / "paq")),
        "clip": write_openai_clip(str(tmp_path / "clip")),
    }
    for family, checkpoint in checkpoints.items():
        tower: Any = find_family(checkpoint).load_tower(checkpoint, "passage", "fp32", "cpu")
        config = tower.backbone.config
        linear, quadratic = transformer_cost(config.hidden_size, config.intermediate_size, config.num_hidden_layers)
        found = count_flops(tower)
        assert found is not None, family
        narrow = 2 * config.embedding_size * config.hidden_size if family == "paq" else 0
        assert (found.linear, found.quadratic) == (linear + narrow, quadratic), family
        assert (found.constant > 0) == (family != "dpr"), family  # a projection behind the pooling


def test_word_vectors_multiply_no_matrices(tmp_path: Path) -> None:
    checkpoint = write_word_vectors(str(tmp_path / "words"), ["PADDING_TOKEN", *WORDS])
    encoder = Encoder(resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32")), "passage")
    assert count_flops(encoder.tower) is None
    record = Meter(encoder.tower, "fp32", "cpu").record(np.array([3, 4]), 7, time.time())
    assert (record["flops"], record["limit_flops"], record["num_tokens"]) == (None, None, 7)


def test_an_image_costs_what_its_patches_do(tmp_path: Path) -> None:
    checkpoint = write_hub_clip(str(tmp_path / "clip"))
    tower = ImageEncoder(resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32"))).tower
    config, tokens = tower.backbone.config, tower.num_tokens
    linear, quadratic = transformer_cost(config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    pixels = 2 * (tokens - 1) * config.num_channels * config.patch_size**2 * config.hidden_size
    projected = 2 * config.hidden_size * tower.dim
    image = linear * tokens + quadratic * tokens**2 + pixels + projected
    found = count_flops(tower)
    assert found is not None
    assert found.of(np.full(3, tokens)) == 3 * image


def test_a_model_that_cannot_be_counted_costs_nothing_known(caplog: pytest.LogCaptureFixture) -> None:
    model = make("bert")
    model.config.hidden_size = 33  # not divisible by its heads: the model cannot be built once more
    assert count_flops(EncoderTower(model, WIDTH, ["mean"])) is None
    assert "cannot be counted" in caplog.text


def test_the_matrix_limit_is_near_what_products_take_here() -> None:
    found = measure_matrix_limit("cpu", "fp32", torch.get_num_threads())
    assert found is measure_matrix_limit("cpu", "fp32", torch.get_num_threads())  # measured once
    left = torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(5):
        left @ left
    assert found > 2 * 1024**3 * 5 / (time.perf_counter() - started) / 10  # others may be at work here


def work(number: int, worker: str, began: float, seconds: float, **changes: Any) -> Work:
    read = changes.pop("read", Step(f"reader of {worker}", began - 2, 0.5))
    write = changes.pop("write", Step(f"writer of {worker}", began + seconds, 0.1))
    values = {"num_rows": 10, "num_tokens": 900, "computed_tokens": 1000, "flops": 2e9, "limit_flops": 4e9}
    return Work(**(values | {"device": f"cpu {worker}"} | changes), read=read, encode=Step(worker, began, seconds),
                write=write)  # fmt: skip


def test_the_figures_of_a_run_of_two_workers() -> None:
    """100 s; the first part after 20; then two workers, 1 s a part, one of which begins 10 s later."""
    first = [work(i, "a", 1020 + i, 1.0) for i in range(80)]
    second = [work(i, "b", 1030 + i, 0.5) for i in range(70)]
    found = summarise(first + second, 1000.0, 100.0, "bf16")
    assert found is not None
    assert found["num_encoders"] == found["num_devices"] == 2
    assert (found["num_parts"], found["num_rows"], found["num_tokens"]) == (150, 1500, 135_000)
    assert (found["tokens_per_second"], found["rows_per_second"]) == (1350.0, 15.0)
    assert found["padding_share"] == pytest.approx(0.1)
    assert found["start_seconds"] == pytest.approx(20)
    assert found["encoder_busy_share"] == pytest.approx((80 + 35) / (80 + 70), abs=1e-4)
    assert found["achieved_flops"] == pytest.approx(2 * 150 * 2e9 / 115)
    assert (found["limit_flops"], found["device"], found["compute"]) == (8e9, "cpu", "bf16")
    assert found["limit_share"] == pytest.approx(found["achieved_flops"] / 8e9, abs=1e-4)
    assert found["bottleneck"] == "encoder"
    assert Throughput(**json.loads(json.dumps(found))).num_parts == 150


@pytest.mark.parametrize(
    ("encode", "read", "write", "began", "expected"),
    [
        (0.9, 0.5, 0.1, 999, "encoder"),
        (0.3, 0.95, 0.1, 999, "reading and tokenising"),
        (0.3, 0.5, 0.9, 999, "writing"),
        (0.2, 0.3, 0.1, 999, "passing parts on"),
        (0.9, 0.5, 0.1, 960, "start-up"),
    ],
)
def test_the_bottleneck_is_what_was_busy(encode: float, read: float, write: float, began: int, expected: str) -> None:
    """Thirty parts, one a second; the run began at `began`, the first part at 1000."""
    works = [
        work(i, "a", 1000 + i, encode, read=Step("r", 999 + i, read), write=Step("w", 1000 + i, write))
        for i in range(30)
    ]
    found = summarise(works, began, 1030 - began, "fp32")
    assert found is not None
    assert found["bottleneck"] == expected
    assert expected in BOTTLENECKS


def test_a_worker_that_replaced_another_is_no_second_one() -> None:
    before = [Step("a", 1000 + i, 1.0) for i in range(10)]
    after = [Step("b", 1010 + i, 1.0) for i in range(90)]
    assert busy_share(before + after, 1000, 1100) == (1, 1.0)
    works = [work(i, s.worker, s.began, s.seconds, limit_flops=4e9) for i, s in enumerate(before + after)]
    found = summarise(works, 1000, 100, "fp32")
    assert found is not None
    assert (found["num_encoders"], found["num_devices"], found["limit_flops"]) == (1, 1, 4e9)


def test_workers_that_share_a_gpu_share_its_limit() -> None:
    works = [work(i, f"w{i % 2}", 1000 + i // 2, 1.0, device="cuda host:0") for i in range(20)]
    found = summarise(works, 999, 11, "bf16")
    assert found is not None
    assert (found["num_encoders"], found["num_devices"], found["limit_flops"]) == (2, 1, 4e9)
    assert found["achieved_flops"] == 4e9


def test_what_is_not_known_of_every_part_is_not_told() -> None:
    found = summarise([work(0, "a", 1000, 1.0), work(1, "a", 1001, 1.0, flops=None)], 999, 4, "fp32")
    assert found is not None
    assert (found["achieved_flops"], found["limit_flops"], found["limit_share"]) == (None, None, None)
    assert summarise([], 999, 4, "fp32") is None


moments = st.floats(0, 1e4, allow_nan=False)


@given(
    steps=st.lists(st.tuples(st.sampled_from("abcd"), moments, st.floats(0, 1e3)), min_size=1, max_size=30),
    tokens=st.lists(st.integers(0, 10_000), min_size=30, max_size=30),
)
def test_shares_are_shares_whatever_the_clocks_say(steps: list[tuple[str, float, float]], tokens: list[int]) -> None:
    works = [
        work(i, *step, num_tokens=n, computed_tokens=n + i, read=Step(*steps[-i]), write=Step(*steps[i // 2]))
        for i, (step, n) in enumerate(zip(steps, tokens, strict=False))
    ]
    found = summarise(works, 50.0, 100.0, "fp32")
    assert found is not None
    for name in ("padding_share", "encoder_busy_share", "reader_busy_share", "writer_busy_share"):
        assert 0 <= found[name] <= 1, name
    assert 0 <= found["start_seconds"] <= 100
    assert 1 <= found["num_encoders"] <= 4
    assert found["bottleneck"] in BOTTLENECKS


def test_a_record_crosses_the_wire() -> None:
    one = work(0, "a", 1000.0, 1.0)
    assert Work.parse(json.loads(json.dumps(asdict(one)))) == one
    began = time.time()
    step = Step(**timed(began))
    assert step.began == pytest.approx(began, abs=0.01)
    assert step.seconds >= 0
    assert step.worker in this_device("cpu")


def test_computed_tokens_are_never_fewer_than_the_tokens() -> None:
    meter = Meter(EncoderTower(make("bert"), WIDTH, ["mean"]), "fp32", "cpu")
    assert meter.record(np.array([3, 4]), 0, 0.0)["computed_tokens"] == 7
    assert meter.record(np.array([3, 4]), 8, 0.0)["computed_tokens"] == 8
    assert meter.record(np.array([3, 4]), 8, 0.0)["flops"] == meter.cost.of(np.array([3, 4]))  # type: ignore[union-attr]


def told(**changes: Any) -> dict[str, Any]:
    found = summarise([work(i, "ab"[i % 2], 1000 + i // 2, 1.0) for i in range(20)], 999, 12, "bf16")
    assert found is not None
    return found | changes


def test_summaries_say_it_in_two_lines() -> None:
    lines = encoding_lines({"stages": {"encode": {"made": 20, "throughput": told()}}})
    assert lines == [
        "18,000 tokens in 12.0 s: 1,500 tokens/s (17 passages/s), padding 10.0%, encoders busy 100%",
        "4 of 8 GFLOP/s while busy (50% of 2 x the bf16 matrix limit); bottleneck: encoder (readers busy 40%, "
        "writers 10%, start-up 1.0 s)",
    ]
    again = encoding_lines({"stages": {"encode": {"made": 0, "throughput": told()}}})
    assert again[0].startswith("encoded before: 18,000 tokens")
    large = told(achieved_flops=3.1e14, limit_flops=7.2e14, limit_share=0.43, num_devices=1, bottleneck="start-up")
    assert encoding_lines({"stages": {"encode": {"made": 1, "throughput": large}}})[1] == (
        "310 of 720 TFLOP/s while busy (43% of the bf16 matrix limit); bottleneck: start-up (1.0 of 12.0 s)"
    )
    words = told(achieved_flops=None, limit_flops=None, limit_share=None)
    assert encoding_lines({"stages": {"encode": {"made": 1, "throughput": words}}})[1].startswith("bottleneck: encoder")
    assert encoding_lines({"stages": {"encode": {"made": 0}}}) == []
    encoder = {"storage": "fp16", "compute": "bf16", "checkpoint": "x", "fingerprint": "f"}
    manifest = {"snapshot": "s", "num_rows": 9, "dim": 4, "encoder": encoder, "stages": {"encode": {"made": 0}}}
    assert encode_summary(manifest).count("\n") == 0
    assert "quarantine" not in encode_summary(manifest)
    assert "2 of them zero: not encodable, see quarantine.parquet" in encode_summary(manifest | {"num_quarantined": 2})


def test_a_report_has_the_figures_when_the_manifest_has() -> None:
    page = render_report({"name": "x", "throughput": told()})
    for expected in ("1,500 tokens/s, 17 passages/s", "4 of 8 GFLOP/s (50.0%)", "Bottleneck", "10.0%", "2 (cpu)"):
        assert expected in page
    assert "Bottleneck" not in render_report({"name": "x"})
    for odd in (None, "?", [1], {"a": 1}, float("nan")):
        assert "Pinakes" in render_report({"name": "x", "throughput": odd})
        assert "Pinakes" in render_report({"name": "x", "throughput": dict.fromkeys(told(), odd)})


def test_progress_rates_are_of_what_this_run_made() -> None:
    progress = Progress(quiet=True)
    with progress.stage("encode", 3) as stage:
        stage.advance(reused=True, rows=1_000_000)
        assert "/s" not in stage.line()
        stage.advance(rows=100)
        stage.started -= 10
        assert "1,000,100 rows (10/s)" in stage.line()
        stage.throughput = told()
    assert progress.stages["encode"]["throughput"] == told()
    assert (progress.stages["encode"]["made"], progress.stages["encode"]["reused"]) == (1, 1)
    with progress.stage("index") as stage:
        stage.advance()
    assert "throughput" not in progress.stages["index"]
