"""What a GPU's layers do, with plain torch in place of the kernels; the kernels themselves where CUDA is."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch

from pipelines.encode import compute_here, default_compute
from pipelines.models import fused, fused_gpu, packed
from tests.test_engine import PACKING, make

ON_GPU = torch.cuda.is_available()
STEPS = [fused_gpu.fuse_norms, fused_gpu.fuse_gelus]


def add_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor, eps: float
) -> torch.Tensor:
    total = hidden.float() + residual.float()
    return torch.nn.functional.layer_norm(total, weight_H.shape, weight_H, bias_H, eps).to(hidden.dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain torch stand for the kernel."""
    module: Any = types.ModuleType("pipelines.models.kernels")
    module.add_norm = add_norm
    monkeypatch.setitem(sys.modules, "pipelines.models.kernels", module)


def hidden_states(model: Any) -> torch.Tensor:
    mask_BL = (torch.arange(19) < torch.tensor([19, 4, 4, 11, 1])[:, None]).long()
    torch.manual_seed(1)
    ids_BL = torch.randint(5, 60, mask_BL.shape) * mask_BL + (1 - mask_BL)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    return found[mask_BL.bool()]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", PACKING)
def test_every_step_keeps_the_models_hidden_states_and_can_be_undone(kind: str) -> None:
    own, model = make(kind), make(kind)
    expected = hidden_states(own)
    for step in STEPS:
        changes = step(model)
        assert changes or (step is fused_gpu.fuse_norms and kind in ("albert", "distilbert")), step.__name__
        torch.testing.assert_close(hidden_states(model), expected, rtol=2e-3, atol=2e-3)  # GELU by its tanh form
        fused.undo(changes)
        assert torch.equal(hidden_states(model), expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_all_steps_run_packed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ways", lambda model: [(step.__name__, step) for step in STEPS])
    expected = hidden_states(make(kind))
    monkeypatch.setitem(packed._CLOSE, torch.float32, 1e-2)
    ours = packed.Transformer(make(kind))
    assert ours.packs
    assert any(isinstance(module, fused_gpu.GeluLinear) for module in ours.modules())
    torch.testing.assert_close(hidden_states(ours), expected, rtol=5e-3, atol=5e-3)


def test_norms_keep_their_unrounded_weights() -> None:
    layer = make("bert").encoder.layer[0].output
    exact = torch.randn(32), torch.randn(32)
    layer.LayerNorm.exact = exact
    found = fused_gpu.ResidualNorm(layer.dense, layer.LayerNorm)
    assert torch.equal(found.weight, exact[0])
    assert torch.equal(found.bias, exact[1])


def test_torchs_kernel_is_tried_where_ours_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def agrees(self: Any, own: torch.Tensor, what: str) -> bool:
        tried.append(what)
        return what == "torch's packed attention"

    class OnGpu(packed.Transformer):
        device = torch.device("cuda")  # type: ignore[assignment]
        dtype = torch.float16  # type: ignore[assignment]

    monkeypatch.setattr(packed.Transformer, "_agrees", agrees)
    monkeypatch.setattr(packed.Transformer, "_trial", lambda self: torch.zeros(1))
    monkeypatch.setattr(fused, "ways", lambda model: [])
    ours = OnGpu(make("bert"))
    assert tried == ["packed texts", "torch's packed attention"]
    assert (ours.packs, ours.config._attn_implementation) == (1, packed._BY_TORCH)


def test_fp16_is_a_gpus_arithmetic() -> None:
    class Spec:
        compute = "fp16"

    spec: Any = Spec()
    assert default_compute(on_gpu=True) == "fp16"
    assert compute_here(spec, "passage", "cuda") == "fp16"
    assert compute_here(spec, "passage", "cpu") == "fp32"
    assert compute_here(spec, "query", "cpu") == default_compute(on_gpu=False)
    spec.compute = "bf16"
    assert compute_here(spec, "query", "cpu") == "bf16"


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="Triton's kernels run on CUDA, which is not here")


@needs_gpu
@pytest.mark.parametrize("width", [128, 384, 768, 1000])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_kernel(width: int, rows: int, dtype: torch.dtype) -> None:
    from pipelines.models import kernels as real

    hidden, residual = (torch.randn(1, rows, width, device="cuda", dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(width, device="cuda") for _ in range(2))
    found = real.add_norm(hidden, residual, weight, bias, 1e-12)
    torch.testing.assert_close(found, add_norm(hidden, residual, weight, bias, 1e-12))


@needs_gpu
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("lengths", [[1], [64], [65, 64, 63, 1], [512, 300, 7]])
def test_the_attention_kernel(width: int, lengths: list[int]) -> None:
    from pipelines.models import kernels as real

    total, heads = sum(lengths), 3
    shared = torch.randn(total, 3 * heads * width, device="cuda", dtype=torch.float16)
    query, key, value = (x.view(total, heads, width) for x in shared.split(heads * width, -1))
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    found = real.attend(query, key, value, starts, max(lengths), width**-0.5)
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        one = [copy.copy(x[start:stop]).transpose(0, 1).float() for x in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*one).transpose(0, 1)
        torch.testing.assert_close(found[start:stop].float(), expected, rtol=5e-3, atol=5e-3)
