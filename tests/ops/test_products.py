"""Products with tables of any dtype; on a GPU, the operators by "reference-gpu" run through them too."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import table_matmul
from nabla_fast.testing.operators import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_products_are_those_of_float64(
    dtype: torch.dtype, table_dtype: torch.dtype, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was in the result, and however a table in half precision is cut to be upcast."""
    monkeypatch.setattr(table_matmul, "_UPCAST", 7 * pieces)
    x, table = randn(5, 7, dtype=dtype), randn(11, 7, dtype=table_dtype, seed=1)
    out = torch.full((5, 16), torch.nan)[:, :11]
    meant = x.double() @ table.double().T
    assert table_matmul.times_table(x, table, out) is out
    torch.testing.assert_close(out.double(), meant, rtol=1e-6, atol=1e-6)
    table_matmul.times_table(x, table, out, alpha=-0.5, add=True)
    torch.testing.assert_close(out.double(), meant / 2, rtol=1e-6, atol=1e-6)
    weights = [randn(5, 11, dtype=dtype, seed=seed) for seed in (2, 3)]
    sums = torch.full((5, 7), torch.nan)
    table_matmul.times_rows(weights, table, sums, alpha=2.0)
    meant = 2 * (weights[0].double() + weights[1].double()) @ table.double()
    torch.testing.assert_close(sums.double(), meant, rtol=1e-5, atol=1e-5)


def test_tables_with_strides() -> None:
    x, table = randn(3, 8), randn(8, 20, seed=1, dtype=torch.bfloat16).T[::2]
    out = table_matmul.times_table(x, table, torch.empty(3, 10))
    torch.testing.assert_close(out.double(), x.double() @ table.double().T, rtol=1e-5, atol=1e-5)


def test_halves_keep_sixteen_bits() -> None:
    x = randn(1000, 100) * torch.logspace(-30, 30, 100)
    high, low = table_matmul.halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    lost = (high.double() + low.double() - x.double()).abs() / x.double().abs()
    assert 0 < lost.max() <= 2**-17
