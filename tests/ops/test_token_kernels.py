"""Layers and modules of few tokens by the native kernels, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from guard_pages import guarded
from torch import Tensor
from torch.nn import functional as F

from nabla_fast.ops import native, token_layers
from nabla_fast.ops.rotary import reference as rotary_reference

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
DTYPES = list(token_layers.DTYPES)
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_near(ours: Tensor, exact: Tensor) -> None:
    rounding = ROUNDING[ours.dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=rounding)


def norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: bool) -> Tensor:
    wide = x.double()
    scale = 1 if weight is None else weight.double() + offset
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 31, 32, 33, 64, 576, 1001])
@pytest.mark.parametrize("rows", [1, 5])
def test_norms_equal_float64(dtype: torch.dtype, width: int, rows: int) -> None:
    """Behind pages nobody may touch; small numbers show the epsilon."""
    for size in (1.0, 1e-3, 30.0):
        x = guarded(size * random(rows, width, dtype=dtype), at_start=bool(rows % 2))
        weight = guarded(random(width, dtype=dtype, seed=1), at_start=bool(width % 2))
        for given, offset in ((None, False), (weight, False), (weight, True)):
            out = token_layers.rms_norm(x, given, 1e-5, offset)
            assert out.dtype == dtype
            assert_near(out, norm(x, given, 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33, 64, 576, 1001])
def test_gradients_of_norms_equal_float64(dtype: torch.dtype, width: int) -> None:
    for size in (1.0, 1e-3, 30.0):
        x, grad = (guarded(size * random(5, width, dtype=dtype, seed=seed)) for seed in (0, 2))
        weight = guarded(random(width, dtype=dtype, seed=1), at_start=bool(width % 2))
        for given, offset in ((None, False), (weight, False), (weight, True)):
            wide, leaf = (y.clone().requires_grad_() for y in (x.double(), x))
            (exact,) = torch.autograd.grad(norm(wide, given, 1e-5, offset), wide, grad.double())
            (ours,) = torch.autograd.grad(token_layers.rms_norm(leaf, given, 1e-5, offset), leaf, grad)
            assert ours.dtype == dtype
            # What is left is a difference of what is taken away.
            scale = (grad.double() / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).norm()
            assert (ours.double() - exact).norm() <= 4 * ROUNDING[dtype] * (exact.norm() + scale * (width == 1))
    (twice,) = torch.autograd.grad(token_layers.rms_norm(leaf, None, 1e-5).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative of rms_norm"):
        twice.sum().backward()


def test_norms_of_views() -> None:
    x, weight = random(3, 4, 64), random(128)[::2]
    expected = token_layers.rms_norm(x, weight.contiguous(), 1e-5)
    assert torch.equal(token_layers.rms_norm(x.transpose(0, 1), weight, 1e-5), expected.transpose(0, 1))
    assert torch.equal(token_layers.rms_norm(x[:, ::2], weight, 1e-5), expected[:, ::2])
    assert torch.equal(token_layers.rms_norm(x[1, 2], weight, 1e-5), expected[1, 2])
    assert token_layers.rms_norm(x[:0], weight, 1e-5).shape == (0, 4, 64)
    assert token_layers.rms_norm(x[..., :0], None, 1e-5).shape == (3, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 6, 32, 64, 96, 128])
@pytest.mark.parametrize("tables", [1, 2])
def test_rotary_embeddings_equal_float64(dtype: torch.dtype, width: int, tables: int) -> None:
    """Of queries and keys as attention layers have them, heads inside tokens, and as they lie here."""
    q, k = random(2, 3, 5, width, dtype=dtype), random(2, 3, 1, width, dtype=dtype)
    cos, sin = (random(tables, 3, width, dtype=dtype, seed=seed) for seed in (1, 2))
    for moved in (q.transpose(1, 2), q.transpose(1, 2).contiguous(), guarded(q).transpose(1, 2)):
        keys = guarded(k, at_start=True).transpose(1, 2)
        ours = token_layers.rotary(moved, keys, guarded(cos), guarded(sin, at_start=True))
        meant = rotary_reference(moved.double(), keys.double(), cos.double(), sin.double())
        for one, exact, like in zip(ours, meant, (moved, keys), strict=True):
            assert_near(one, exact)
            assert one.stride() == torch.empty_like(like).stride()
    backwards = torch.randn(2, 5, width, 3).to(dtype).transpose(2, 3)
    ours = token_layers.rotary(backwards, backwards, cos, sin)
    meant = rotary_reference(*(x.double() for x in (backwards, backwards, cos, sin)))
    assert_near(ours[0], meant[0])
    assert_near(ours[1], meant[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rotary_embeddings_equal_float64(dtype: torch.dtype) -> None:
    """With cosines and sines that differ between the halves; the second derivative, too."""
    q, k = random(2, 5, 3, 32, dtype=dtype), random(2, 1, 3, 32, dtype=dtype)
    cos, sin = (random(1, 3, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    sent = [random(*x.shape, dtype=dtype, seed=3) for x in (q, k)]
    found = []
    for function, kind in ((token_layers.rotary, dtype), (rotary_reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k)]
        weights = [x.to(kind).requires_grad_() for x in sent]
        out = function(*leaves, cos.to(kind), sin.to(kind))
        first = torch.autograd.grad(out, leaves, weights, create_graph=True)
        found.append([*first, *torch.autograd.grad([x.square().sum() for x in first], weights)])
    for one, exact in zip(*found, strict=True):
        assert one.dtype == dtype
        assert (one.double() - exact).norm() <= 4 * ROUNDING[dtype] * exact.norm()


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (k, v))
    scores = scale * q.double() @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ values).transpose(1, 2)


def columns(kind: str, shape: tuple[int, int, int, int]) -> Tensor | None:
    batch, heads, tokens, width = shape
    if kind == "none":
        return None
    if kind == "causal":
        return (torch.arange(width) <= torch.arange(width - tokens, width)[:, None])[None, None]
    sizes = (batch, heads, tokens, width) if kind == "of each head" else (batch, 1, 1, width)
    mask = random(*sizes, seed=3) > 0
    mask[..., -1] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "causal", "of each row", "of each head"])
@pytest.mark.parametrize(
    ("heads", "sizes", "tokens", "width"),
    [((4, 2), (64, 64), 3, 50), ((3, 3), (6, 10), 1, 1), ((9, 3), (96, 33), 9, 200), ((2, 1), (128, 300), 2, 17)],
)
def test_attention_equals_float64(
    dtype: torch.dtype, kind: str, heads: tuple[int, int], sizes: tuple[int, int], tokens: int, width: int
) -> None:
    tokens = min(tokens, width)
    q = random(2, tokens, heads[0], sizes[0], dtype=dtype).transpose(1, 2)
    k, v = (random(2, heads[1], width, size, dtype=dtype, seed=i) for i, size in enumerate(sizes))
    mask = columns(kind, (2, heads[0], tokens, width))
    given = [guarded(x, at_start=bool(width % 2)) for x in (q, k, v)]
    out = token_layers.attention(*given, None if mask is None else guarded(mask), 0.3)
    assert out.shape == (2, tokens, heads[0], sizes[1])
    assert out.is_contiguous()
    assert_near(out, softmax(q, k, v, mask, 0.3))


def test_attention_of_views_and_nothing() -> None:
    q, k, v = random(2, 4, 3, 32), random(2, 2, 20, 32, seed=1), random(2, 2, 20, 32, seed=2)
    expected = token_layers.attention(q, k[:, :, :9].contiguous(), v[:, :, :9].contiguous(), None, 0.2)
    assert torch.equal(token_layers.attention(q, k[:, :, :9], v[:, :, :9], None, 0.2), expected), "buffers with room"
    turned = [x[:, :, :9].transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v)]
    assert torch.equal(token_layers.attention(q, *turned, None, 0.2), expected)
    assert token_layers.attention(q[:, :, :0], k, v, None, 0.2).shape == (2, 0, 4, 32)
    nobody = torch.zeros(2, 1, 3, 20, dtype=torch.bool)
    assert torch.equal(token_layers.attention(q, k, v, nobody, 0.2), torch.zeros(2, 3, 4, 32))
    assert torch.equal(token_layers.attention(q, k[:, :, :0], v[:, :, :0], None, 0.2), torch.zeros(2, 3, 4, 32))


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "causal", "of each row", "of each head"])
@pytest.mark.parametrize(
    ("heads", "sizes", "tokens", "width"),
    [
        ((4, 2), (64, 64), 3, 50),
        ((9, 3), (96, 16), 70, 300),
        ((16, 16), (16, 32), 64, 64),
        ((2, 1), (80, 160), 150, 600),
    ],
)
def test_attention_and_its_gradient_equal_float64(
    dtype: torch.dtype, kind: str, heads: tuple[int, int], sizes: tuple[int, int], tokens: int, width: int
) -> None:
    """With one and several blocks and chunks, heads apart and together, vectors of every number in a tile."""
    q = random(2, tokens, heads[0], sizes[0], dtype=dtype).transpose(1, 2)
    k, v = (random(2, heads[1], width, size, dtype=dtype, seed=i) for i, size in enumerate(sizes))
    mask = columns(kind, (2, heads[0], tokens, width))
    grad = random(2, tokens, heads[0], sizes[1], dtype=dtype, seed=5)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    meant = softmax(*exact, mask, 0.3)
    given = [guarded(x, at_start=bool(width % 3)).requires_grad_() for x in (q, k, v)]
    out = token_layers.attention_with_gradient(*given, None if mask is None else guarded(mask), 0.3)
    assert out.shape == meant.shape
    assert out.is_contiguous()
    assert relative(out, meant) < ROUNDING[dtype]
    gradients = torch.autograd.grad(out, given, guarded(grad))
    for ours, theirs, x in zip(gradients, torch.autograd.grad(meant, exact, grad.double()), given, strict=True):
        assert (ours.shape, ours.dtype) == (x.shape, dtype)
        assert relative(ours, theirs) < ROUNDING[dtype]


def test_gradients_of_attention_that_reads_nothing() -> None:
    """Zeros, for queries that read no column and columns that no query reads."""
    q, k, v = (random(2, heads, 20, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 7] = mask[:, :, :, 3] = False
    out = token_layers.attention_with_gradient(q, k, v, mask, 0.2)
    gradients = torch.autograd.grad(out.sum() + out.square().sum(), [q, k, v])
    assert torch.equal(out[0, 7], torch.zeros(4, 16))
    assert torch.equal(gradients[0][0, :, 7], torch.zeros(4, 16))
    for gradient in gradients[1:]:
        assert torch.equal(gradient[:, :, 3], torch.zeros(2, 2, 16))
        assert gradient.isfinite().all()
    nobody = token_layers.attention_with_gradient(q, k, v, torch.zeros(1, 1, 1, 20, dtype=torch.bool), 0.2)
    assert not any(gradient.any() for gradient in (nobody, *torch.autograd.grad(nobody.sum(), [q, k, v])))
    nothing = token_layers.attention_with_gradient(q, k[:, :, :0], v[:, :, :0], None, 0.2)
    assert not nothing.any()
    assert not torch.autograd.grad(nothing.sum(), q)[0].any()
    assert token_layers.attention_with_gradient(q[:, :, :0], k, v, None, 0.2).shape == (2, 0, 4, 16)


def test_gradients_of_attention_of_views() -> None:
    q, k, v = random(2, 4, 30, 32), random(2, 2, 40, 32, seed=1), random(2, 2, 40, 32, seed=2)
    mask, grad = columns("causal", (2, 4, 30, 40)), random(2, 30, 32, 4, seed=3)

    def gradients(*given: Tensor, mask: Tensor | None = mask, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in given]
        return torch.autograd.grad(token_layers.attention_with_gradient(*leaves, mask, 0.2), leaves, grad)

    expected = gradients(q.clone(), k.clone(), v.clone(), grad=grad.transpose(2, 3).contiguous())
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    wide = mask.expand(2, 4, 30, 40)
    roomy = torch.cat([k, k], 2)[:, :, :40]
    for given, own in ((turned, mask), ((q, roomy, v), mask), ((q, k, v), wide), ((q, k, v), wide.contiguous())):
        found = gradients(*(x.detach() for x in given), mask=own, grad=grad.transpose(2, 3))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_attention_has_one_derivative() -> None:
    q, k, v = (random(1, 2, 4, 16, seed=i).requires_grad_() for i in range(3))
    out = token_layers.attention_with_gradient(q, k, v, None, 0.2)
    for gradient in torch.autograd.grad(out.sum(), [q, k, v], create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative of attention"):
            gradient.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(token_layers.ACTIVATIONS))
@pytest.mark.parametrize(
    ("rows", "sizes", "bias"), [(1, (32, 64), False), (5, (64, 96), True), (8, (576, 1536), False)]
)
def test_gated_networks_equal_float64(
    dtype: torch.dtype, activation: str, rows: int, sizes: tuple[int, int], bias: bool
) -> None:
    d, inner = sizes
    x = random(2, rows, d, dtype=dtype)
    shapes = ((inner, d), (inner, d), (d, inner))
    layers = [
        (random(*s, dtype=dtype, seed=i) / s[1] ** 0.5, random(s[0], seed=9) if bias else None)
        for i, s in enumerate(shapes)
    ]
    for size in (1, 20):  # where activations are flat, too
        given = guarded(size * x, at_start=bool(rows % 2))
        gate, up, down = [(guarded(w), None if b is None else guarded(b)) for w, b in layers]
        out = token_layers.gated_mlp(given, gate, up, down, activation)
        exact = [(w.double(), None if b is None else b.double()) for w, b in layers]
        wide = size * x.double()
        product = token_layers.ACTIVATIONS[activation](F.linear(wide, *exact[0])) * F.linear(wide, *exact[1])
        meant = F.linear(product, *exact[2])
        assert out.dtype == dtype
        assert out.shape == (2, rows, d)
        # Three roundings of products' results, and float32's own.
        assert (out.double() - meant).norm() <= 3 * ROUNDING[dtype] * meant.norm()
    alone = [token_layers.gated_mlp(x[1, n], gate, up, down, activation) for n in range(rows)]
    assert torch.equal(torch.stack(alone), token_layers.gated_mlp(x, gate, up, down, activation)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bias", "norms", "offset"), [(False, False, False), (True, False, False), (False, True, True)]
)
@pytest.mark.parametrize("tables", [1, 2])
def test_inputs_of_attention_equal_float64(
    dtype: torch.dtype, bias: bool, norms: bool, offset: bool, tables: int
) -> None:
    d, size, heads = 64, 32, (4, 2, 2)
    x = guarded(random(2, 3, d, dtype=dtype))
    cos, sin = (guarded(random(tables, 3, size, dtype=dtype, seed=i)) for i in (1, 2))
    layers = [
        (random(n * size, d, dtype=dtype, seed=i) / 8, random(n * size, dtype=dtype, seed=i) if bias else None)
        for i, n in enumerate(heads)
    ]
    weights = [random(size, dtype=dtype, seed=i) if norms else None for i in (5, 6)]
    ours = token_layers.attention_inputs(x, *layers, (weights[0], weights[1]), cos, sin, 1e-5, offset)
    meant = []
    for (weight, own), scale, n in zip(layers, [*weights, None], heads, strict=True):
        rows = F.linear(x.double(), weight.double(), None if own is None else own.double()).view(2, 3, n, size)
        meant.append((rows if scale is None else norm(rows, scale, 1e-5, offset)).transpose(1, 2))
    meant[:2] = rotary_reference(*meant[:2], cos.double(), sin.double())
    for one, exact in zip(ours, meant, strict=True):
        assert one.shape == exact.shape
        assert one.dtype == dtype
        assert (one.double() - exact).norm() <= 3 * ROUNDING[dtype] * exact.norm()
    alone = token_layers.attention_inputs(
        x[1:, 2:], *layers, (weights[0], weights[1]), cos[-1:, 2:], sin[-1:, 2:], 1e-5, offset
    )
    for one, whole in zip(alone, ours, strict=True):
        assert torch.equal(one[0], whole[1, :, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit: with columns masked before and between its own, whatever they hold, and beside other queries."""
    q, k, v = random(1, 4, 6, 40, dtype=dtype), random(1, 2, 37, 40, dtype=dtype), random(1, 2, 37, 24, dtype=dtype)
    whole = token_layers.attention(q, k, v, None, 0.2)
    for n in range(6):
        assert torch.equal(token_layers.attention(q[:, :, n : n + 1], k, v, None, 0.2), whole[:, n : n + 1])
    places = torch.arange(37) + 5 + (torch.arange(37) > 11) * 3
    wide_k, wide_v = (torch.full((3, 2, 50, x.shape[3]), torch.nan, dtype=dtype) for x in (k, v))
    wide_k[1, :, places], wide_v[1, :, places] = k[0], v[0]
    mask = torch.zeros(3, 1, 1, 50, dtype=torch.bool)
    mask[1, :, :, places] = True
    mask[0] = True
    several = token_layers.attention(q.expand(3, -1, -1, -1), wide_k, wide_v, mask, 0.2)
    assert torch.equal(several[1], whole[0])
    assert several[0].isnan().all()
    x, weight = random(8, 99, dtype=dtype), random(99, dtype=dtype)
    norms = token_layers.rms_norm(x, weight, 1e-6)
    for n in range(8):
        assert torch.equal(token_layers.rms_norm(x[n], weight, 1e-6), norms[n])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    q, k, v = random(2, 8, 5, 64), random(2, 4, 700, 64), random(2, 4, 700, 64, seed=1)
    x, weight = random(300, 576), random(576)

    def run() -> list[Tensor]:
        cos, sin = random(1, 300, 576), random(1, 300, 576, seed=1)
        rotated = token_layers.rotary(x[None, None], x[None, None], cos, sin)
        blocks = [y.repeat(1, 1, 40, 1)[:, :, :200].clone().requires_grad_() for y in (q, k, v)]
        out = token_layers.attention_with_gradient(*blocks, None, 0.1)
        found = [out.detach(), *torch.autograd.grad(out.square().sum(), blocks)]
        return [*found, token_layers.attention(q, k, v, None, 0.1), token_layers.rms_norm(x, weight, 1e-6), *rotated]

    before, expected = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(threads)
        for one, other in zip(run(), expected, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_missing_numbers(dtype: torch.dtype) -> None:
    q, k, v = random(1, 1, 2, 8, dtype=dtype), random(1, 1, 5, 8, dtype=dtype), random(1, 1, 5, 8, dtype=dtype)
    large = 200 * q
    assert_near(token_layers.attention(large, k, v, None, 1.0), softmax(large, k, v, None, 1.0))
    k[0, 0, 2, 3] = torch.nan
    assert token_layers.attention(q, k, v, None, 1.0).isnan().all()
    wide = [x.repeat(1, 1, 1, 2).requires_grad_() for x in (large, k, v)]
    out = token_layers.attention_with_gradient(*wide, None, 1.0)
    assert out.isnan().all()
    assert all(gradient.isnan().any() for gradient in torch.autograd.grad(out.sum(), wide))
    # Scores of -infinity alone are no scores that a mask took out.
    low = torch.full_like(wide[0], torch.inf), torch.full_like(wide[1], -1.0)
    reads = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    for mask in (None, reads, reads.tril()):
        for attention in (token_layers.attention, token_layers.attention_with_gradient):
            assert attention(*low, wide[2].detach(), mask, 1.0).isnan().all()
    with torch.no_grad():
        wide[1].nan_to_num_(0.5)
    out = token_layers.attention_with_gradient(*wide, None, 1.0)
    assert_near(out.detach(), softmax(*(x.detach() for x in wide), None, 1.0))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), wide))
    x = random(2, 40, dtype=dtype)
    x[1, 5] = torch.nan
    out = token_layers.rms_norm(x, None, 1e-6)
    assert out[1].isnan().all()
    assert_near(out[:1], norm(x[:1], None, 1e-6, False))
    assert math.isclose(float(token_layers.rms_norm(torch.zeros(4), None, 1e-6).sum()), 0.0)


def test_what_the_kernels_refuse() -> None:
    q, k, cos, mask = random(2, 4, 3, 8), random(2, 2, 7, 8), random(1, 3, 8), torch.ones(2, 1, 3, 7, dtype=torch.bool)
    w, tables = random(96, 64), [random(1, 96, 8)] * 2
    heads = (w, None, w, None, w, None, None, None)
    ops: Any = torch.ops.nabla_fast
    many = [x.repeat(1, 1, 1, 2) for x in (q, k, k)]
    out, sums = ops.native_attention_blocks(*many, None, 1.0)
    for kernel, wrong, said in [
        (ops.native_rms_norm, (q[0, 0, 0, 0], None, 1e-6, False), r"\(\.\.\., d\)"),
        (ops.native_rms_norm, (q, q[0, 0, 0, :7], 1e-6, False), r"\(8"),
        (ops.native_rms_norm, (q, q[0, 0, 0].bfloat16(), 1e-6, False), "the dtype of x"),
        (ops.native_rms_norm, (q.double(), None, 1e-6, False), "float32, bfloat16 or float16"),
        (ops.native_rms_norm, (q.long(), None, 1e-6, False), "float32, bfloat16 or float16"),
        (ops.native_rms_norm_backward, (q[:1], q, None, 1e-6, False), "the shape of x"),
        (ops.native_rms_norm_backward, (q.half(), q, None, 1e-6, False), "the dtype of x"),
        (ops.native_rms_norm_backward, (q, q, q[0, 0, 0, :7], 1e-6, False), r"\(8"),
        (ops.native_rotary, (q[0], q[0], cos, cos), "q must have shape"),
        (ops.native_rotary, (q, q[:, :, :2], cos, cos), "k must have shape"),
        (ops.native_rotary, (q, q, cos[:, :2], cos), "cos must have shape"),
        (ops.native_rotary, (q, q, cos, cos.expand(2, -1, -1)), "sin must have shape"),
        (ops.native_rotary, (q[..., :7], q[..., :7], cos[..., :7], cos[..., :7]), "even number"),
        (ops.native_rotary, (q, q.bfloat16(), cos, cos), "one dtype"),
        (ops.native_rotary, (*[q.double()] * 2, *[cos.double()] * 2), "float32, bfloat16 or float16"),
        (ops.native_attention, (q[0], k, k, None, 1.0), "q must have shape"),
        (ops.native_attention, (q, k[..., :7], k, None, 1.0), "k must have shape"),
        (ops.native_attention, (q, k, k[:, :, :6], None, 1.0), "v must have shape"),
        (ops.native_attention, (q[:, :3], k, k, None, 1.0), "multiple of the 2 heads"),
        (ops.native_attention, (q, k, k.half(), None, 1.0), "one dtype"),
        (ops.native_attention, (q, k, k, mask.float(), 1.0), "mask must be bool"),
        (ops.native_attention, (q, k, k, mask[..., :6], 1.0), "mask must be bool"),
        (ops.native_attention, (q, k, k, mask[0, 0], 1.0), "mask must be bool"),
        (ops.native_attention, (q, k, k, mask[:, :, :2], 1.0), "mask must be bool"),
        (ops.native_attention, (q.double(), k.double(), k.double(), None, 1.0), "float32, bfloat16 or float16"),
        (ops.native_attention, (q.to_sparse(), k, k, None, 1.0), "q"),
        (ops.native_attention_blocks, (q, k, k, mask, 1.0), "multiple of 16 features, got 8 and 8"),
        (ops.native_attention_blocks, (q[:, :3], k, k, None, 1.0), "multiple of the 2 heads"),
        (ops.native_attention_blocks, (*(x.double() for x in many), None, 1.0), "float32, bfloat16 or float16"),
        (ops.native_attention_blocks_backward, (out[:1], *many, None, out, sums, 1.0), "grad must have shape"),
        (ops.native_attention_blocks_backward, (out, *many, None, out[..., :8], sums, 1.0), "out must have shape"),
        (ops.native_attention_blocks_backward, (out, *many, None, out, sums[:1], 1.0), "log_sums must have shape"),
        (ops.native_attention_blocks_backward, (out.half(), *many, None, out, sums, 1.0), "grad and out must be"),
        (ops.native_gated_mlp, (w[0], w, None, w, None, w.t(), None, "relu"), "silu, gelu or gelu_tanh"),
        (ops.native_gated_mlp, (w[0], w, None, w[:32], None, w.t(), None, "silu"), "up must have shape"),
        (ops.native_gated_mlp, (w[0], w, None, w, None, w, None, "silu"), "down must have shape"),
        (ops.native_gated_mlp, (w[0], w.half(), None, w, None, w.t(), None, "silu"), "x must be float32"),
        (ops.native_gated_mlp, (w[0, :32], w, None, w, None, w.t(), None, "silu"), "weight must have shape"),
        (ops.native_attention_inputs, (w, *heads, *tables, 0.0, False), "x must have shape"),
        (ops.native_attention_inputs, (w[None], *heads, tables[0][0], tables[1], 0.0, False), "cos must have shape"),
        (
            ops.native_attention_inputs,
            (w[None], *heads, tables[0], tables[1][:, :2], 0.0, False),
            "sin must have shape",
        ),
        (ops.native_attention_inputs, (w[None, :2], *heads, *tables, 0.0, False), "cos must have shape"),
        (ops.native_attention_inputs, (w[None], w[:60], *heads[1:], *tables, 0.0, False), "multiple of the 8 features"),
        (ops.native_attention_inputs, (w[None], w, None, w[:, :32], *heads[3:], *tables, 0.0, False), "key must have"),
        (ops.native_attention_inputs, (w[None], *heads[:6], w[0, :4], None, *tables, 0.0, False), "weight must have"),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=said):
            kernel(*wrong)


def test_the_fake_kernels_have_the_real_ones_shapes() -> None:
    q, k, cos = random(2, 3, 4, 8).transpose(1, 2), random(2, 2, 7, 8), random(1, 3, 8)
    ops: Any = torch.ops.nabla_fast
    torch.library.opcheck(ops.native_rms_norm, (q, q[0, 0, 0], 1e-6, True))
    torch.library.opcheck(ops.native_rms_norm_backward, (q, q, q[0, 0, 0], 1e-6, True))
    torch.library.opcheck(ops.native_rotary, (q, q, cos, cos))
    torch.library.opcheck(ops.native_attention, (q, k, k[..., :5], None, 0.5))
    many = [random(2, 3, 4, 32).transpose(1, 2), random(2, 2, 7, 32), random(2, 2, 7, 16)]
    torch.library.opcheck(ops.native_attention_blocks, (*many, None, 0.5))
    out, sums = ops.native_attention_blocks(*many, None, 0.5)
    torch.library.opcheck(ops.native_attention_blocks_backward, (out, *many, None, out, sums, 0.5))
    x, w, tables = random(2, 3, 32), random(64, 32), [random(1, 3, 16)] * 2
    torch.library.opcheck(ops.native_gated_mlp, (x, w, None, w, None, w.t().contiguous(), w[0], "silu"))
    heads = (w, None, w[:32], None, w[:32], w[:32, 0], w[0, :16], None)
    torch.library.opcheck(ops.native_attention_inputs, (x, *heads, *tables, 1e-6, False))


def test_attention_is_pytorchs() -> None:
    q, k, v = random(2, 4, 3, 16), random(2, 4, 9, 16), random(2, 4, 9, 16, seed=1)
    mask = random(2, 1, 3, 9) > -1
    theirs = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(token_layers.attention(q, k, v, mask, 0.25), theirs.transpose(1, 2))
