"""The engine: any order, any budget, the same numbers; memory that runs out halves the budget, nothing else does."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from pipelines.errors import PinakesError
from pipelines.models import fused, packed
from pipelines.models.base import Tokens
from pipelines.models.classifier import TextClassifier
from pipelines.models.engine import Engine, is_out_of_memory
from pipelines.models.tokens import flatten
from pipelines.models.weights import build_model

_VOCABULARY = 60
_SIZES = {"vocab_size": _VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 1}
_BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_ALBERT = {**_BERT, "embedding_size": 16, "hidden_act": "gelu_new"}
_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
PACKING: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "albert": _ALBERT,
    "distilbert": _DISTILBERT,
    "electra": {**_BERT, "embedding_size": 16},
    "roberta": {**_BERT, "type_vocab_size": 1},
    "xlm-roberta": {**_BERT, "type_vocab_size": 1},
    "camembert": {**_BERT, "type_vocab_size": 1},
}
PADDING = {"mpnet": _BERT, "deberta-v2": {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}}


def make(kind: str, seed: int = 0) -> Any:
    """Return a random model of the kind, with weights large enough for attention to matter."""
    torch.manual_seed(seed)
    sizes = (PACKING | PADDING)[kind]
    model = AutoModel.from_config(AutoConfig.for_model(kind, **_SIZES, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter == 1))
    return model


def texts(lengths: list[int], seed: int = 0) -> Tokens:
    random = np.random.default_rng(seed)
    return flatten([random.integers(5, _VOCABULARY, n).tolist() for n in lengths])


def first_hidden(transformer: Any) -> Any:
    """Return a forward function that takes each text's mean hidden state."""

    def forward(ids_BL: torch.Tensor, mask_BL: torch.Tensor, types_BL: torch.Tensor | None) -> torch.Tensor:
        hidden_BLH = transformer(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return (hidden_BLH * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)

    return forward


def engine(forward: Any, budget: int = 64, width: int = 32) -> Engine:
    return Engine(forward, pad_id=1, width=width, device="cpu", budget=budget)


@pytest.mark.parametrize("kind", [*PACKING, *PADDING])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_transformer_gives_the_models_own_hidden_states(
    kind: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch_type = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    own = make(kind).to(torch_type)
    with caplog.at_level(logging.WARNING):
        ours = packed.Transformer(make(kind).to(torch_type))
    assert not caplog.records
    assert bool(ours.packs) == (kind in PACKING)
    if dtype == "fp32" or fused.can_fuse(make(kind).to(torch_type)):
        assert any(isinstance(module, fused.FusedLinear) for module in ours.modules())
    mask_BL = (torch.arange(19) < torch.tensor([19, 4, 4, 11, 1])[:, None]).long()
    ids_BL = torch.randint(5, _VOCABULARY, mask_BL.shape) * mask_BL + (1 - mask_BL)
    with torch.inference_mode():
        expected = own(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL.bool()]
        found = ours(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL.bool()]
    if dtype == "fp32":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=1)
    assert cosine.min() > (0.999999 if dtype == "fp32" else 0.99)


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert", "distilbert"])
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    budgets=st.lists(st.integers(1, 200), min_size=2, max_size=2),
    data=st.data(),
)
def test_neither_budget_nor_order_nor_neighbours_matter(
    kind: str, lengths: list[int], budgets: list[int], data: st.DataObject
) -> None:
    forward = first_hidden(_TRANSFORMERS.setdefault(kind, packed.Transformer(make(kind))))
    tokens = texts(lengths)
    one, other = (engine(forward, budget).run(tokens) for budget in budgets)
    np.testing.assert_allclose(one, other, atol=1e-4)
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    np.testing.assert_allclose(engine(forward).run(tokens.take(order)), one[order], atol=1e-4)


_TRANSFORMERS: dict[str, Any] = {}


def test_packed_attention_equals_attention_text_by_text() -> None:
    """The reference is written out: softmax of scaled products within each text, in fp64."""
    torch.manual_seed(1)
    lengths, heads, width = torch.tensor([7, 7, 7, 3, 1, 1, 5]), 3, 8
    query, key, value = (torch.randn(1, heads, int(lengths.sum()), width) for _ in range(3))
    boundaries = packed._boundaries(lengths, torch.device("cpu"))
    assert boundaries.runs == ((0, 3, 7), (21, 1, 3), (24, 2, 1), (26, 1, 5))
    assert boundaries.starts_B1.tolist() == [0, 7, 14, 21, 24, 25, 26, 31]
    assert boundaries.longest == 7
    attend = packed._interface(packed._attend)
    found, _ = attend(torch.nn.Identity(), query, key, value, None, boundaries=boundaries)
    start = 0
    for length in lengths.tolist():
        q, k, v = (x[0, :, start : start + length].double() for x in (query, key, value))
        expected = torch.softmax(q @ k.transpose(1, 2) * width**-0.5, -1) @ v
        torch.testing.assert_close(found[0, start : start + length], expected.transpose(0, 1).float())
        start += length
    halves = [x.bfloat16() for x in (query, key, value)]
    rough, _ = attend(torch.nn.Identity(), *halves, None, boundaries=boundaries)
    torch.testing.assert_close(rough.float(), found, atol=0.05, rtol=0.05)


def test_attention_scores_are_computed_in_bounded_pieces() -> None:
    boundaries = packed._boundaries(torch.tensor([200] * 50 + [9] * 7), torch.device("cpu"))
    pieces = list(packed._chunks(boundaries, heads=12))
    assert all(count == 1 or 12 * length * length * count <= packed._SCORES for _, length, count in pieces)
    covered = [first + i for first, length, count in pieces for i in range(0, length * count, 1)]
    assert covered == list(range(50 * 200 + 7 * 9))


def test_a_device_without_the_kernel_runs_padded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any) -> Any:
        raise NotImplementedError("no such kernel on this device\nand a long list of others")

    monkeypatch.setattr(packed, "_attend_on_cpu", missing)
    assert not packed.Transformer(make("bert")).packs
    assert caplog.messages == ["bert: packed texts are not used: no such kernel on this device"]


@pytest.mark.parametrize("break_what", ["fused", "packed"])
def test_a_model_that_differs_in_the_fast_form_runs_in_its_own(
    break_what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if break_what == "fused":  # a linear layer whose bias got lost
        monkeypatch.setattr(fused.FusedLinear, "plus", lambda self, hidden, residual: hidden[..., :32] + residual)
    else:  # positions that run on through the whole row, as for a family that ignores them
        monkeypatch.setattr(packed, "_positions", lambda place_T, *_: torch.arange(len(place_T)))
    ours, own = packed.Transformer(make("bert")), make("bert")
    assert "change the model's result" in caplog.text
    assert bool(ours.packs) == (break_what == "fused")
    assert any(isinstance(module, fused.FusedLinear) for module in ours.modules()) == (break_what == "packed")
    mask_BL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids_BL = torch.tensor([[7, 8, 9, 10], [11, 12, 1, 1]])
    with torch.inference_mode():
        expected = own(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        found = ours(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    torch.testing.assert_close(found[mask_BL.bool()], expected[mask_BL.bool()], rtol=1e-4, atol=1e-4)


def test_a_bf16_model_keeps_its_norms_unrounded() -> None:
    """The cosine to fp32 is the better for it; without the exact weights the model computes all the same."""
    full = make("bert")
    state = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    model = build_model(type(full), full.config, state, "bf16", "here")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 7
    assert all(torch.equal(norm.exact[0].bfloat16(), norm.weight) for norm in norms)  # type: ignore[union-attr]
    assert any(not torch.equal(norm.exact[0], norm.weight.float()) for norm in norms)  # type: ignore[union-attr]
    if not fused.can_fuse(model):
        pytest.skip("this CPU does not multiply bf16")
    ours = packed.Transformer(model)
    exact = [module for module in ours.modules() if isinstance(module, fused.ExactNorm)]
    assert len(exact) == 7
    assert all(norm.weight.dtype is torch.float32 for norm in exact)


def test_running_out_of_memory_halves_the_budget_and_loses_nothing() -> None:
    seen: list[tuple[int, int]] = []

    def forward(ids_BL: torch.Tensor, mask_BL: torch.Tensor, types_BL: None) -> torch.Tensor:
        if ids_BL.numel() > 100:
            torch.empty(1 << 60)  # torch's own words for a CPU that has no more memory
        seen.append(tuple(ids_BL.shape))  # type: ignore[arg-type]
        return (ids_BL * mask_BL).sum(1, keepdim=True)

    tokens = texts([10] * 40 + [3, 50, 7])
    runner = engine(forward, budget=1000, width=1)
    found = runner.run(tokens)
    expected = [tokens.ids[a:b].sum() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    assert found[:, 0].tolist() == expected
    assert runner.budget <= 100
    assert all(rows * columns <= 100 for rows, columns in seen)
    assert sum(rows for rows, _ in seen) == len(tokens)
    with pytest.raises(PinakesError, match="150 tokens does not fit the memory of cpu, even alone"):
        runner.run(texts([3, 150]))


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    def forward(ids_BL: torch.Tensor, mask_BL: torch.Tensor, types_BL: None) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    runner = engine(forward, width=1)
    with pytest.raises(RuntimeError, match="mat1"):
        runner.run(texts([3, 4]))
    assert runner.budget == 64
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(KeyError("can"))


def test_padding_is_counted_where_it_is_computed() -> None:
    tokens = texts([10, 4, 4])
    padded, packing = (
        Engine(first_hidden(packed.Transformer(make("bert"))), 1, 32, "cpu", 100, packs=packs) for packs in (0, 16)
    )
    padded.run(tokens)
    packing.run(tokens)
    assert (padded.computed_tokens, packing.computed_tokens) == (30, 32)
    assert padded.run(texts([])).shape == (0, 32)
    assert padded.computed_tokens == 0


def test_the_measured_budget_is_the_smallest_near_the_best() -> None:
    """A model that computes a row as fast as ten rows gains from larger micro-batches until memory ends."""
    calls: list[int] = []

    def forward(ids_BL: torch.Tensor, mask_BL: torch.Tensor, types_BL: None) -> torch.Tensor:
        calls.append(ids_BL.numel())
        if ids_BL.numel() > 5000:
            raise MemoryError
        time.sleep(0.03)
        return torch.zeros(len(ids_BL), 1)

    runner = engine(forward, width=1)
    assert runner.measure_budget(texts([16])) == 4096 == runner.budget
    assert max(calls) == 8192


def test_a_texts_bits_do_not_depend_on_those_beside_it() -> None:
    lengths = [3, 31, 31, 32, 32, 33, 39, 7] * 40
    model = first_hidden(packed.Transformer(make("bert").to(torch.bfloat16)))
    found = [Engine(model, 1, 32, "cpu", budget).run(texts(lengths)) for budget in (1, 100, 2048, 100_000)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_threads_load_one_at_a_time() -> None:
    """transformers patches its classes while it loads: two loads at once left them so, and tied weights missing."""
    from transformers import PreTrainedModel

    before, dtype, inside, most = PreTrainedModel.tie_weights, torch.get_default_dtype(), 0, 0

    class Model(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> tuple[Any, dict[str, list[str]]]:
            nonlocal inside, most
            inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.01)
            inside -= 1
            return cls(), {"missing_keys": [], "unexpected_keys": []}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: build_model(Model, None, {}, "fp32", "here"), range(8)))
        list(pool.map(lambda _: make("bert"), range(4)))
    assert most == 1
    assert (PreTrainedModel.tie_weights, torch.get_default_dtype()) == (before, dtype)


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(logit: float) -> None:
    """They would have no place in an order."""

    def forward(ids_BL: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.where(ids_BL[:, :1] == 7, logit, 1.0)

    class Encoder:
        pad_id = 1

        def encode(self, rows: Any) -> Tokens:
            return flatten(rows)

    scorer = TextClassifier(forward, Encoder(), 1, "cpu")  # type: ignore[arg-type]
    assert scorer.logits([[5, 6], [8]]).tolist() == [[1.0], [1.0]]  # type: ignore[list-item]
    assert scorer.logits([]).shape == (0, 1)
    with pytest.raises(PinakesError, match="not finite") as refused:
        scorer.logits([[5, 6], [7]])  # type: ignore[list-item]
    assert "bf16" in refused.value.hint
