"""Products of few rows by the native kernel, against float64 and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from guard_pages import guarded
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from nabla_fast.ops import linear as few_rows
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
        out = few_rows.linear(*given, dtype=wanted)
        assert out.dtype == wanted
        torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[wanted], atol=SUM * width**0.5)
    plain = few_rows.linear(*given[:2])
    assert plain.dtype == dtype
    torch.testing.assert_close(plain.double(), expected - bias.double(), rtol=ROUNDING[dtype], atol=SUM * width**0.5)


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
        out = few_rows.linear(*given[:3], dtype=wanted, scale=given[3])
        assert out.dtype == wanted
        torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[wanted], atol=SUM * width**0.5)
    half = few_rows.linear(x, weight, dtype=torch.float32, scale=scale.bfloat16())
    meant = x.double() @ (scale.bfloat16().double()[:, None] * weight.double()).T
    torch.testing.assert_close(half.double(), meant, rtol=1e-6, atol=SUM * width**0.5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, so that drafts and batches do not change a sequence."""
    x, weight, _ = operands(16, 160, 37, torch.float32 if dtype == torch.int8 else dtype)
    scale = None
    if dtype == torch.int8:
        weight, scale = integers(160, 37)
    whole = few_rows.linear(x, weight, scale=scale)
    for count in range(1, 16):
        assert torch.equal(few_rows.linear(x[:count], weight, scale=scale), whole[:count])
        assert torch.equal(few_rows.linear(x[count:], weight, scale=scale), whole[count:])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    x, weight, bias = operands(9, 256, 1030, torch.float32)
    before, expected = torch.get_num_threads(), few_rows.linear(x, weight, bias)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(few_rows.linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(before)


def test_views_of_rows_and_weights() -> None:
    x, weight, bias = operands(6, 64, 10, torch.float32)
    expected = few_rows.linear(x, weight, bias)
    assert torch.equal(few_rows.linear(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(few_rows.linear(x[::2], weight, bias), expected[::2])
    wide = torch.cat([weight, weight], 1)
    assert torch.equal(few_rows.linear(x, wide[:, 64:], bias), expected)
    assert torch.equal(few_rows.linear(x, weight[1::3], bias[1::3]), expected[:, 1::3])
    assert torch.equal(few_rows.linear(x.view(2, 3, 64), weight, bias), expected.view(2, 3, 10))
    assert torch.equal(few_rows.linear(x.view(2, 3, 64).transpose(0, 1), weight, bias)[2, 1], expected[5])
    assert torch.equal(few_rows.linear(x[2], weight, bias), expected[2])
    assert few_rows.linear(x[:0], weight).shape == (0, 10)
    assert few_rows.linear(x, weight[:0]).shape == (6, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_missing_numbers(dtype: torch.dtype) -> None:
    x, weight, _ = operands(3, 64, 5, dtype)
    x[0, 3], x[1, 40], weight[2, 63] = torch.nan, torch.inf, -torch.inf
    out, theirs = few_rows.linear(x, weight, dtype=torch.float32), x.double() @ weight.double().T
    assert torch.equal(out.isnan(), theirs.isnan())
    assert torch.equal(out.isinf(), theirs.isinf())
    assert torch.equal(out[out.isinf()].sign(), theirs[theirs.isinf()].sign().float())


def test_what_fits() -> None:
    x, weight, _ = operands(16, 64, 10, torch.float32)
    assert few_rows.fits(x, weight)
    assert few_rows.fits(x.view(2, 8, 64), weight)
    assert few_rows.fits(x.bfloat16(), weight.bfloat16())
    assert few_rows.fits(x.bfloat16(), weight.to(torch.int8))
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
        assert not few_rows.fits(a, b)


def test_what_the_kernel_refuses() -> None:
    x, weight, bias = operands(2, 64, 10, torch.float32)
    kernel = torch.ops.nabla_fast.native_linear
    small, scale = weight.to(torch.int8), torch.ones(10)
    for wrong, said in [
        ((x[0, 0], weight, None, None, torch.float32), r"\(\.\.\., K\)"),
        ((x, weight[:, :32], None, None, torch.float32), r"\(N, 64\)"),
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
        out = few_rows.linear(mode.from_tensor(x), mode.from_tensor(weight), dtype=torch.float32)
    assert (out.shape, out.dtype) == ((3, 10), torch.float32)


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
    ours, z = few_rows.token_gradient(factors, tables), few_rows.logits(factors.hidden, tables.head)
    wide = torch.promote_types(torch.promote_types(dtype, table), torch.float32)
    assert ours.dtype == z.dtype == wide
    exact = {"rtol": 2e-6, "atol": 4e-6 if wide == torch.float32 else 1e-12}
    double = TokenGradient(*(factor.double() for factor in factors))
    torch.testing.assert_close(ours.double(), reference.token_gradient(double, tables), **exact)
    torch.testing.assert_close(z.double(), reference.linear_logits(double.hidden, tables.head), **exact)
