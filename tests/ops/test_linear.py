"""Products of few rows by the native kernel, against float64 and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from guard_pages import guarded
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from nabla_fast.ops import linear as native_linear
from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, Tables, TokenGradient

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative errors of the result's rounding, and the error of a sum of K products of unit normals over sqrt(K).
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM = 4e-6


def operands(rows: int, width: int, entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + width + entries)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in ((rows, width), (entries, width), (entries,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 33])
@pytest.mark.parametrize(("width", "entries"), [(32, 1), (64, 7), (576, 13), (4096, 35)])
def test_products_equal_float64(dtype: torch.dtype, rows: int, width: int, entries: int) -> None:
    """Of every number of rows and entries that registers hold at a time, behind pages nobody may touch."""
    x, weight, bias = operands(rows, width, entries, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    at_start = bool(rows % 2)
    given = [guarded(one, at_start=at_start) for one in (x, weight, bias)]
    for wanted in {dtype, torch.float32}:
        out = native_linear.linear(*given, dtype=wanted)
        assert out.dtype == wanted
        torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[wanted], atol=SUM * width**0.5)
    plain = native_linear.linear(*given[:2])
    assert plain.dtype == dtype
    torch.testing.assert_close(plain.double(), expected - bias.double(), rtol=ROUNDING[dtype], atol=SUM * width**0.5)


# Panels of every number of vectors, filled up or not; tiles of every number of blocks, and of one entry.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [17, 32, 47, 64, 65, 96, 150])
@pytest.mark.parametrize(("width", "entries"), [(32, 1), (64, 95), (576, 109), (2304, 18)])
def test_products_of_more_rows_equal_float64(dtype: torch.dtype, rows: int, width: int, entries: int) -> None:
    x, weight, bias = operands(rows, width, entries, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    given = [guarded(one, at_start=bool(rows % 2)) for one in (x, weight, bias)]
    for wanted in {dtype, torch.float32}:
        for offset in (bias, None):
            out = native_linear.linear(*given[:2], None if offset is None else given[2], dtype=wanted)
            meant = expected if offset is not None else expected - bias.double()
            assert out.dtype == wanted
            torch.testing.assert_close(out.double(), meant, rtol=ROUNDING[wanted], atol=SUM * width**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 64, 70])
@pytest.mark.parametrize(("entries", "width"), [(2, 32), (6, 1), (257, 40), (300, 161), (513, 64)])
def test_derivatives_equal_float64(dtype: torch.dtype, rows: int, entries: int, width: int) -> None:
    """Of every width, and of an odd number of entries, which pairs do not go into."""
    grad, _, _ = operands(rows, entries, 1, dtype)
    weight, _, _ = operands(entries, width, 1, dtype)
    expected = grad.double() @ weight.double()
    out = native_linear.backward(*(guarded(one, at_start=bool(rows % 2)) for one in (grad, weight)))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=SUM * entries**0.5)


def test_derivatives_of_views() -> None:
    grad, weight = torch.randn(6, 34).bfloat16(), torch.randn(34, 64).bfloat16()
    expected = native_linear.backward(grad, weight)
    assert torch.equal(native_linear.backward(grad.t().contiguous().t(), weight), expected)
    assert torch.equal(native_linear.backward(torch.cat([grad, grad], 1)[:, 34:], weight), expected)
    assert torch.equal(native_linear.backward(grad, torch.cat([weight, weight], 1)[:, 64:]), expected)
    assert torch.equal(native_linear.backward(grad.view(2, 3, 34), weight), expected.view(2, 3, 64))
    columns = native_linear.backward(grad, weight.t().contiguous().t())
    torch.testing.assert_close(columns, expected, rtol=2**-7, atol=1e-2)
    assert native_linear.backward(grad[:0], weight).shape == (0, 64)
    assert native_linear.backward(grad, weight[:, :0]).shape == (6, 0)
    assert torch.equal(native_linear.backward(grad[:, :0], weight[:0]), torch.zeros(6, 64))


def integers(width: int, entries: int) -> tuple[Tensor, Tensor]:
    """A weight of 8-bit integers, all of which occur, and scales that make its rows as large as unit normals."""
    generator = torch.Generator().manual_seed(width + entries)
    weight = torch.randint(-128, 128, (entries, width), generator=generator, dtype=torch.int8)
    return weight, (0.5 + torch.rand(entries, generator=generator)) / 74


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize(("width", "entries"), [(32, 1), (96, 7), (576, 13), (4096, 35)])
def test_products_with_integers_equal_float64(dtype: torch.dtype, rows: int, width: int, entries: int) -> None:
    x, _, bias = operands(rows, width, entries, dtype)
    weight, scale = integers(width, entries)
    expected = F.linear(x.double(), scale.double()[:, None] * weight.double(), bias.double())
    given = [guarded(one, at_start=bool(rows % 2)) for one in (x, weight, bias, scale)]
    for wanted in {dtype, torch.float32}:
        out = native_linear.linear(*given[:3], dtype=wanted, scale=given[3])
        assert out.dtype == wanted
        torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[wanted], atol=SUM * width**0.5)
    half = native_linear.linear(x, weight, dtype=torch.float32, scale=scale.bfloat16())
    meant = x.double() @ (scale.bfloat16().double()[:, None] * weight.double()).T
    torch.testing.assert_close(half.double(), meant, rtol=1e-6, atol=SUM * width**0.5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, so that drafts and batches do not change a sequence."""
    x, weight, _ = operands(16, 160, 37, torch.float32 if dtype == torch.int8 else dtype)
    scale = None
    if dtype == torch.int8:
        weight, scale = integers(160, 37)
    whole = native_linear.linear(x, weight, scale=scale)
    for count in range(1, 16):
        assert torch.equal(native_linear.linear(x[:count], weight, scale=scale), whole[:count])
        assert torch.equal(native_linear.linear(x[count:], weight, scale=scale), whole[count:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_are_the_same_in_any_company(dtype: torch.dtype) -> None:
    x, weight, bias = operands(100, 160, 37, dtype)
    whole = native_linear.linear(x, weight, bias)
    for count in (17, 33, 64, 70, 83):
        assert torch.equal(native_linear.linear(x[:count], weight, bias), whole[:count])
        assert torch.equal(native_linear.linear(x[100 - count :], weight, bias), whole[100 - count :])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(threads: int, rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, 256, 1030, dtype)
    before, expected = torch.get_num_threads(), native_linear.linear(x, weight, bias)
    halves = expected.bfloat16(), weight.bfloat16()
    back = native_linear.backward(*halves)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(native_linear.linear(x, weight, bias), expected)
        # Elsewhere it is oneDNN's product, which sums in parts of its own.
        if native_linear.backward_fits(*halves):
            assert torch.equal(native_linear.backward(*halves), back)
    finally:
        torch.set_num_threads(before)


def test_views_of_rows_and_weights() -> None:
    x, weight, bias = operands(6, 64, 10, torch.float32)
    expected = native_linear.linear(x, weight, bias)
    assert torch.equal(native_linear.linear(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(native_linear.linear(x[::2], weight, bias), expected[::2])
    wide = torch.cat([weight, weight], 1)
    assert torch.equal(native_linear.linear(x, wide[:, 64:], bias), expected)
    assert torch.equal(native_linear.linear(x, weight[1::3], bias[1::3]), expected[:, 1::3])
    assert torch.equal(native_linear.linear(x.view(2, 3, 64), weight, bias), expected.view(2, 3, 10))
    assert torch.equal(native_linear.linear(x.view(2, 3, 64).transpose(0, 1), weight, bias)[2, 1], expected[5])
    assert torch.equal(native_linear.linear(x[2], weight, bias), expected[2])
    assert native_linear.linear(x[:0], weight).shape == (0, 10)
    assert native_linear.linear(x, weight[:0]).shape == (6, 0)
    assert native_linear.linear(torch.randn(40, 64), weight[:0]).shape == (40, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_missing_numbers(dtype: torch.dtype) -> None:
    x, weight, _ = operands(3, 64, 5, dtype)
    x[0, 3], x[1, 40], weight[2, 63] = torch.nan, torch.inf, -torch.inf
    out, theirs = native_linear.linear(x, weight, dtype=torch.float32), x.double() @ weight.double().T
    assert torch.equal(out.isnan(), theirs.isnan())
    assert torch.equal(out.isinf(), theirs.isinf())
    assert torch.equal(out[out.isinf()].sign(), theirs[theirs.isinf()].sign().float())


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_most_rows", lambda _: native_linear.MOST_ROWS)
    x, weight, _ = operands(16, 64, 10, torch.float32)
    assert native_linear.fits(x, weight)
    assert native_linear.fits(x.view(2, 8, 64), weight)
    assert native_linear.fits(x.bfloat16(), weight.bfloat16())
    assert native_linear.fits(x.bfloat16(), weight.to(torch.int8))
    more = torch.randn(17, 64)
    for a, b in [
        (more, weight),
        (x[:0], weight),
        (x.double(), weight.double()),
        (x, weight.bfloat16()),
        (x, weight[0]),
        (x[:, :48], weight[:, :48].contiguous()),
        (x, weight.t().contiguous().t()),
        (x.to("meta"), weight.to("meta")),
        (x.double(), weight.to(torch.int8)),
        (x, weight.to(torch.uint8)),
    ]:
        assert not native_linear.fits(a, b)
    monkeypatch.setattr(native_linear, "_most_rows", lambda _: 256)
    assert native_linear.fits(more, weight)
    assert not native_linear.fits(torch.randn(257, 64), weight)


def test_which_derivatives_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_most_rows", lambda _: 256)
    grad, weight = torch.randn(256, 10).bfloat16(), torch.randn(10, 7).bfloat16()
    assert native_linear.backward_fits(grad, weight)
    assert native_linear.backward_fits(grad.view(2, 128, 10), weight)
    for a, b in [
        (torch.randn(257, 10).bfloat16(), weight),
        (grad[:0], weight),
        (grad.float(), weight.float()),
        (grad.float(), weight),
        (grad[:, :9], weight[:9]),
        (grad, weight.t().contiguous().t()),
        (grad.to("meta"), weight.to("meta")),
    ]:
        assert not native_linear.backward_fits(a, b)
    monkeypatch.setattr(native_linear, "_most_rows", lambda _: native_linear.MOST_ROWS)
    assert not native_linear.backward_fits(grad, weight)


@pytest.mark.parametrize(
    ("amd", "capability", "pairs", "most"),
    [
        (True, "AVX512", True, (256, 256, 16)),
        (True, "AVX512", False, (256, 16, 16)),
        (True, "AVX2", False, (16, 16, 16)),
        (False, "AVX512", True, (16, 16, 16)),
    ],
)
def test_blocks_are_for_where_they_were_measured_to_be_faster(
    amd: bool, capability: str, pairs: bool, most: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_linear, "is_amd", lambda: amd)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)
    assert tuple(native_linear._most_rows.__wrapped__(dtype) for dtype in DTYPES) == most


def test_what_the_derivative_refuses() -> None:
    grad, weight = torch.randn(3, 10), torch.randn(10, 7)
    for wrong, said in [
        ((grad, weight[0]), r"weight must have shape \(N, K\)"),
        ((grad[:, :9], weight), r"grad must have the shape \(\.\.\., 10\), got \[3, 9\]"),
        ((grad[0, 0], weight), r"grad must have the shape \(\.\.\., 10\), got \[\]"),
        ((grad.bfloat16(), weight), "grad must be torch.float32 as weight is, got torch.bfloat16"),
        ((grad.long(), weight), "grad"),
        ((grad.to_sparse(), weight), "grad"),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=said):
            native_linear.backward(*wrong)


def test_what_the_kernel_refuses() -> None:
    x, weight, bias = operands(2, 64, 10, torch.float32)
    kernel = torch.ops.nabla_fast.native_linear
    small, scale = weight.to(torch.int8), torch.ones(10)
    for wrong, said in [
        ((x[0, 0], weight, None, None, torch.float32), r"\(\.\.\., K\)"),
        ((x, weight[:, :32], None, None, torch.float32), r"\(N, 64\)"),
        ((x, weight.half(), None, None, torch.float32), "got torch.float32, torch.float16 and torch.float32"),
        ((x, weight, None, bias[:9], torch.float32), r"\(10"),
        ((x[:, :48], weight[:, :48], None, None, torch.float32), "multiple of 32"),
        ((x[:, :0], weight[:, :0], None, None, torch.float32), "multiple of 32"),
        ((x, weight.t().contiguous().t(), None, None, torch.float32), "without gaps"),
        ((x, weight.bfloat16(), None, None, torch.float32), "the same or int8"),
        ((x.double(), weight.double(), None, None, torch.float64), "float32, bfloat16 or float16"),
        ((x, weight, None, None, torch.bfloat16), "that of x or float32"),
        ((x, weight.long(), None, None, torch.float32), "weight"),
        ((x.to_sparse(), weight, None, None, torch.float32), "x"),
        ((x, weight, scale, None, torch.float32), "scale must be given with a weight of int8, and with no other"),
        ((x, small, None, None, torch.float32), "scale must be given with a weight of int8"),
        ((x, small[:, :32], scale, None, torch.float32), r"\(N, 64\)"),
        ((x, small[0], scale, None, torch.float32), r"\(N, 64\)"),
        ((x, small, scale[:9], None, torch.float32), r"\(10"),
        ((x, small, scale.long(), None, torch.float32), "scale"),
        ((x, small.t().contiguous().t(), scale, None, torch.float32), "without gaps"),
        ((x.double(), small, scale, None, torch.float64), "float32, bfloat16 or float16"),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=said):
            kernel(*wrong)


def test_the_fake_kernel_has_the_real_ones_shape() -> None:
    x, weight, _ = operands(3, 64, 10, torch.bfloat16)
    torch.library.opcheck(torch.ops.nabla_fast.native_linear, (x, weight, None, None, torch.float32))
    with FakeTensorMode() as mode:
        out = native_linear.linear(mode.from_tensor(x), mode.from_tensor(weight), dtype=torch.float32)
        back = native_linear.backward(mode.from_tensor(torch.randn(2, 3, 10)), mode.from_tensor(torch.randn(10, 64)))
    assert (out.shape, out.dtype) == ((3, 10), torch.float32)
    assert (back.shape, back.dtype) == ((2, 3, 64), torch.float32)
    torch.library.opcheck(torch.ops.nabla_fast.native_linear_backward, (torch.randn(3, 10).bfloat16(), weight))


@pytest.mark.parametrize("table", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 17])
def test_gradients_and_logits_of_few_rows_are_the_references(rows: int, dtype: torch.dtype, table: torch.dtype) -> None:
    """Float32 rows beside a bfloat16 table lose none of their bits, of however many rows."""
    hidden, weight, _ = operands(rows, 64, 45, torch.float64)
    embedding, own, _ = operands(rows, 32, 46, torch.float64)
    own, weight = own[:45].to(table), weight.to(table)
    factors = TokenGradient(hidden.to(dtype), embedding.to(dtype), (3 * embedding).to(dtype))
    tables = Tables(Head(weight, 0.5, 20.0), own, own, 0.7)
    ours, z = native_linear.token_gradient(factors, tables), native_linear.logits(factors.hidden, tables.head)
    wide = torch.promote_types(torch.promote_types(dtype, table), torch.float32)
    assert ours.dtype == z.dtype == wide
    exact = {"rtol": 2e-6, "atol": 4e-6 if wide == torch.float32 else 1e-12}
    double = TokenGradient(*(factor.double() for factor in factors))
    torch.testing.assert_close(ours.double(), reference.token_gradient(double, tables), **exact)
    torch.testing.assert_close(z.double(), reference.linear_logits(double.hidden, tables.head), **exact)
