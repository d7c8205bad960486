"""Layers on other implementations than PyTorch's first choice: the same numbers, and only where they are meant."""

from __future__ import annotations

import pytest
import torch
from test_kv_cache import PROMPTS, TOKENIZER, response, sequence
from torch.nn import functional as F

import nabla_fast as nf
from nabla_fast.models import torch_kernels
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN; its own products are used"
)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (200, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_equal_float64(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight, b = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator) if bias else None
    with torch_kernels._OneDNN():
        out = F.linear(x, weight, b)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert type(out.grad_fn).__name__ == "_LinearBackward"
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight.double(), None if b is None else b.double())
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-4)


def test_other_products_are_left_to_pytorch() -> None:
    x, weight = torch.randn(3, 7), torch.randn(5, 7)
    cases = [
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
        (x, weight.clone().requires_grad_()),
        (x[:0], weight),
    ]
    with torch_kernels._OneDNN():
        for a, b in cases:
            a = a.clone().requires_grad_()
            out = F.linear(a, b)
            assert "_Linear" not in type(out.grad_fn).__name__
            assert out.shape == (len(a), 5)
    assert F.linear(x.requires_grad_(), weight).grad_fn is not None
    assert "_Linear" not in type(F.linear(x, weight).grad_fn).__name__, "the mode ends with its block"


def test_without_gradients_trainable_weights_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 7), torch.randn(5, 7).requires_grad_()
    asked = []
    monkeypatch.setattr(
        torch_kernels, "_product", lambda *args, _real=torch_kernels._product: asked.append(args) or _real(*args)
    )
    with torch_kernels._OneDNN(), torch.no_grad():
        torch.testing.assert_close(F.linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_factors_are_the_same_either_way(checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    language = LanguageModel(tiny_language_model("qwen2", dtype=torch.float32), TOKENIZER)
    reward = RewardModel(tiny_reward_model("llama", dtype=torch.float32), None, language, TOKENIZER)
    results = []
    for slow in (True, False):
        monkeypatch.setattr(torch_kernels, "_mkl_is_slow", lambda slow=slow: slow)
        config = nf.NablaConfig(nll_coeff=0.4, gradient_cache=False, checkpoint_activations=checkpoint)
        ours = Objective(language, reward, config)
        sequences = [sequence(ours, p) for p in PROMPTS]
        requests = [Request(s, response(9, seed=5), 2) for s in sequences]
        results.append((ours.evaluate(requests), ours.rewards(sequences, [r.response[:-1] for r in requests])))
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        for one, other in zip(mine.factors, theirs.factors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("text", "slow"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)])
def test_the_processor_decides(text: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels.Path, "read_text", lambda self: text)
    monkeypatch.setattr(torch_kernels.Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert torch_kernels._mkl_is_slow.__wrapped__() is slow


def test_cudnn_attention_is_off_in_a_gpus_blocks_and_put_back() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        for setting in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(setting)
            with torch_kernels.fast_kernels(torch.device("cuda")):
                with pytest.raises(KeyError), torch_kernels.fast_kernels(torch.device("cuda")):
                    raise KeyError
                assert not enabled()
            assert enabled() is setting
            with torch_kernels.fast_kernels(torch.device("cpu")):
                assert enabled() is setting
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_blocks_of_threads_may_overlap() -> None:
    """The first to begin ends first, and the switch stays off until the other ends."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        first, second = (torch_kernels.fast_kernels(torch.device("cuda")) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not enabled()
        second.__exit__(None, None, None)
        assert enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
