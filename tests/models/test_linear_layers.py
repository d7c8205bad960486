"""Layers on other implementations than PyTorch's first choice: the same numbers, and only where they are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kv_cache import PROMPTS, TOKENIZER, response, sequence
from torch.nn import functional as F

import nabla_fast as nf
from nabla_fast.models import linear_layers
from nabla_fast.models.fused_layers import FusedLayers, fast_kernels, fused_layers
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.ops import native
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model

# Rows that the native kernel does not take, and ones that it does; the other way is oneDNN's.
WIDTHS = {"oneDNN": 7, "native": 64}


@pytest.fixture(params=WIDTHS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies, whatever the processor."""
    if request.param == "native" and not native.available():
        pytest.skip("the native library is missing; PyTorch's products are used")
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN; its own products are used")
    monkeypatch.setattr(linear_layers, "_mkl_is_slow", lambda: request.param == "oneDNN")
    monkeypatch.setattr(linear_layers.native_linear, "_most_rows", lambda _: 16)
    return str(request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has multiplied, as often as it did."""
    made: list[str] = []

    def counted(name: str, product: Any) -> Any:
        return lambda *arguments, **named: made.append(name) or product(*arguments, **named)

    monkeypatch.setattr(linear_layers, "_onednn", counted("oneDNN", linear_layers._onednn))
    monkeypatch.setattr(linear_layers.native_linear, "linear", counted("native", linear_layers.native_linear.linear))
    return made


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (200,)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_equal_float64(shape: tuple[int, ...], bias: bool, way: str, asked: list[str]) -> None:
    width = WIDTHS[way]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=generator).requires_grad_()
    weight, b = torch.randn(32, width, generator=generator), torch.randn(32, generator=generator) if bias else None
    few = x.numel() <= 16 * width
    out = linear_layers.linear(x, weight, b)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    taken = way == "oneDNN" or few
    assert (type(out.grad_fn).__name__ == "_LinearBackward") is taken
    # The weight of the backward pass is read down its columns.
    assert asked == (["oneDNN"] * 2 if way == "oneDNN" else ["native"] if few else [])
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight.double(), None if b is None else b.double())
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not native.available(), reason="the native library is missing; PyTorch's products are used")
@pytest.mark.parametrize("rows", [1, 40, 256])
def test_gradients_in_bfloat16_by_the_native_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers.native_linear, "_most_rows", lambda _: 256)
    made = []
    own = linear_layers.native_linear.backward
    monkeypatch.setattr(linear_layers.native_linear, "backward", lambda *given: made.append(0) or own(*given))
    generator = torch.Generator().manual_seed(0)
    x, weight, sent = (torch.randn(*s, generator=generator).bfloat16() for s in ((rows, 64), (34, 64), (rows, 34)))
    out = linear_layers.linear(x.requires_grad_(), weight)
    (grad,) = torch.autograd.grad(out, x, sent)
    assert made == [0]
    torch.testing.assert_close(grad.double(), sent.double() @ weight.double(), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 40])
def test_second_derivatives_equal_float64(rows: int, way: str) -> None:
    """A derivative without one of its own would leave them out without a word."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, WIDTHS[way], generator=generator), torch.randn(32, WIDTHS[way], generator=generator)

    def twice(product: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = twice(F.linear, x.double(), weight.double())
    error = twice(linear_layers.linear, x, weight).double() - expected
    assert error.norm() < 1e-5 * expected.norm()


def test_other_products_are_left_to_pytorch(way: str, asked: list[str]) -> None:
    width = WIDTHS[way]
    x, weight = torch.randn(3, width), torch.randn(5, width)
    cases = [
        (x.double(), weight.double()),
        (x, weight.clone().requires_grad_()),
        (x[:0], weight),
        *([(x.bfloat16(), weight.bfloat16())] if way == "oneDNN" else [(torch.randn(17, width), weight)]),
    ]
    for a, b in cases:
        a = a.clone().requires_grad_()
        out = linear_layers.linear(a, b)
        assert "_Linear" not in type(out.grad_fn).__name__
        assert out.shape == (len(a), 5)
    assert not asked


def test_without_gradients_trainable_weights_do_not_matter(way: str, asked: list[str]) -> None:
    x, weight = torch.randn(3, WIDTHS[way]), torch.randn(5, WIDTHS[way]).requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(linear_layers.linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert asked == [way]


def test_autocast_chooses_the_dtype(way: str, asked: list[str]) -> None:
    x, weight = torch.randn(3, WIDTHS[way]), torch.randn(5, WIDTHS[way])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_layers.linear(x, weight)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, F.linear(x, weight))
    assert not asked


def test_layers_are_exchanged_in_blocks(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own alone, and each is put back by the last block."""

    class Other(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), Other(64, 32), torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
    )
    model.requires_grad_(False)
    monkeypatch.setattr(linear_layers, "_LEAST", 0)
    own = model[2].forward
    model[2].forward = lambda x: own(x)
    layers = linear_layers.find(model)
    assert layers == (model[0], model[3])
    x = torch.randn(2, 64)
    expected = [layer(x) for layer in model]
    before = [dict(vars(layer)) for layer in model]
    fused = FusedLayers(linear=layers)
    first, second = (fast_kernels(torch.device("cpu"), fused) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    for layer, meant in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(x), meant, rtol=1e-5, atol=1e-5)
    assert len(asked) == 2 * linear_layers.native_linear.fits(x, model[0].weight)
    second.__exit__(None, None, None)
    assert [dict(vars(layer)) for layer in model] == before


def test_a_models_layers_are_found_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_language_model("qwen2", dtype=torch.float32)
    assert fused_layers(model, "it").linear == (), "small ones are left alone"
    monkeypatch.setattr(linear_layers, "_LEAST", 0)
    found = fused_layers(model, "it").linear
    assert len(found) == len([m for m in model.modules() if isinstance(m, torch.nn.Linear)]) > 7
    assert fused_layers(model.to("meta"), "it") == FusedLayers()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_in_half_precision(dtype: torch.dtype, way: str, asked: list[str]) -> None:
    width = WIDTHS[way]
    x, weight, b = (torch.randn(*shape).to(dtype) for shape in ((4, width), (9, width), (9,)))
    with torch.no_grad():
        out = linear_layers.linear(x, weight, b)
    assert out.dtype == dtype
    assert asked == (["native"] if way == "native" else [])
    torch.testing.assert_close(out.double(), F.linear(x.double(), weight.double(), b.double()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_factors_are_the_same_either_way(checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    language = LanguageModel(tiny_language_model("qwen2", dtype=torch.float32), TOKENIZER)
    reward = RewardModel(tiny_reward_model("llama", dtype=torch.float32), None, language, TOKENIZER)
    results = []
    for slow in (True, False):
        monkeypatch.setattr(linear_layers, "_mkl_is_slow", lambda slow=slow: slow)
        monkeypatch.setattr(linear_layers, "_LEAST", 0)
        config = nf.NablaConfig(nll_coeff=0.4, gradient_cache=False, checkpoint_activations=checkpoint)
        ours = Objective(language, reward, config)
        sequences = [sequence(ours, p) for p in PROMPTS]
        requests = [Request(s, response(9, seed=5), 2) for s in sequences]
        results.append((ours.evaluate(requests), ours.rewards(sequences, [r.response[:-1] for r in requests])))
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        for one, other in zip(mine.factors, theirs.factors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("text", "amd"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)])
def test_the_processor_decides(text: str, amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers.native_linear.Path, "read_text", lambda self: text)
    monkeypatch.setattr(linear_layers.native_linear.Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    asked = linear_layers.native_linear.is_amd.__wrapped__
    assert asked() is amd
    monkeypatch.setattr(linear_layers.native_linear, "is_amd", asked)
    assert linear_layers._mkl_is_slow.__wrapped__() is amd


# weights of torchao


def quantised(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.nn.Module:
    """Its linear layers with 8-bit integers as weights, a scale for each row; all of them are large enough."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    monkeypatch.setattr(linear_layers, "_LEAST", 0)
    quantize_(model, Int8WeightOnlyConfig(**options))
    return model


@pytest.mark.skipif(not native.available(), reason="the native library is missing; torchao's products are used")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_of_integers_are_the_native_kernels(
    dtype: torch.dtype, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised(torch.nn.Sequential(torch.nn.Linear(64, 32)).to(dtype).requires_grad_(False), monkeypatch)
    layer = model[0]
    values, scale = linear_layers._int8_rows(layer.weight)
    x = torch.randn(3, 64, dtype=dtype)
    theirs, wide = layer(x), torch.randn(17, 64, dtype=dtype)
    exact = F.linear(x.double(), scale.double()[:, None] * values.double(), layer.bias.double())
    put_back = linear_layers.exchange(layer)
    assert asked == []
    out = layer(x)
    assert asked == ["native"]
    assert out.dtype == theirs.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=rounding)
    torch.testing.assert_close(theirs.double(), exact, rtol=4 * rounding, atol=4 * rounding)
    # Many rows, and what is differentiated, are torchao's.
    assert torch.equal(layer(wide), F.linear(wide, layer.weight, layer.bias))
    layer(x.requires_grad_()).float().sum().backward()
    assert x.grad is not None
    assert asked == ["native"]
    put_back()
    assert torch.equal(layer(x), theirs)


def test_other_weights_of_torchao_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerGroup, quantize_

    layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32), torch.nn.Linear(64, 32))
    quantised(layers[:1], monkeypatch)
    assert linear_layers._int8_rows(layers[0].weight) is not None
    quantised(layers[1:2], monkeypatch, granularity=PerGroup(32))
    quantize_(layers[2:], Int8DynamicActivationInt8WeightConfig())
    assert [linear_layers._int8_rows(layer.weight) for layer in layers[1:]] == [None, None]
    moved = layers[0].weight
    moved.zero_point.fill_(1)
    assert linear_layers._int8_rows(moved) is None
    assert linear_layers._int8_rows(torch.nn.Parameter(torch.ones(2, 2))) is None


@pytest.mark.skipif(not native.available(), reason="the native library is missing; torchao's products are used")
def test_a_decode_of_quantised_layers_is_that_of_their_numbers(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same model with the numbers that the integers stand for."""
    model = tiny_language_model("qwen2", dtype=torch.float32)
    layers = quantised(model.model.layers, monkeypatch)
    reward = tiny_reward_model("llama", dtype=torch.float32)
    config = nf.NablaConfig(max_new_tokens=8, max_rollouts=2, max_iters=3, seed=3)
    answers = []
    for plain in (False, True):
        if plain:
            for layer in layers.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        before = len(asked)
        out = nf.generate(model, TOKENIZER, reward, TOKENIZER, "is it on", config)
        answers.append(out.sequences[0].tolist())
        assert len(asked) > before
    assert answers[0] == answers[1]
