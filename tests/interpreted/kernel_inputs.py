"""Inputs and comparisons for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "ties", "minus infinity", "dominant", "huge", "all equal")


def few(examples: int) -> settings:
    """Hypothesis settings for a slow interpreter."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )  # fmt: skip


def double(x: Any) -> Any:
    """Tensors in float64, integers as they are; through tuples, lists and named tuples."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x.clone()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(double, x))
    return type(x)(map(double, x)) if isinstance(x, (tuple, list)) else x


def logits(seed: int, rows: int, vocabulary: int, kind: str = "random", dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (N, V) of one kind."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, vocabulary, generator=generator)
    if kind == "ties":
        z = z.round().clamp(-2, 2)
    elif kind == "minus infinity":
        keep = torch.rand(rows, vocabulary, generator=generator) < 0.3
        keep[:, vocabulary // 2] = True
        z = torch.where(keep, z, -torch.inf)
    elif kind == "dominant":
        z[:, vocabulary // 3] = 90.0
    elif kind == "huge":
        z = (1e4 * torch.rand(rows, vocabulary, generator=generator)).round()
    elif kind == "all equal":
        z = torch.full((rows, vocabulary), 2.5)
    return z.to(dtype)


def gradient_unit(vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float) -> float:
    """The size of G / tau, whose rounding stays where p (G - <p, G>) / tau cancels."""
    gradient = sum(v.double().abs() @ t.double().abs().T for v, t in zip(vectors, tables, strict=True))
    assert isinstance(gradient, Tensor)
    return max(1.0, gradient.max().item() / tau) if gradient.numel() else 1.0


def strided(x: Tensor) -> Tensor:
    """The same values with gaps in both dimensions, at an odd offset."""
    rows, columns = x.shape
    wide = torch.full((rows, 3, columns + 1, 2), torch.nan).to(x.dtype)
    view = wide[:, 1, 1:, 1]
    view.copy_(x)
    assert not view.is_contiguous() or x.numel() <= 1
    return view


def transposed(x: Tensor) -> Tensor:
    """The same values, columns outermost."""
    return x.t().contiguous().t()


def close(
    actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], tolerance: float = 1e-5, unit: float = 1.0
) -> None:
    """Floats agree to ``tolerance`` of the largest value or ``unit`` (NaN where NaN), everything else exactly."""
    if not isinstance(actual, Tensor):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            close(a, b, tolerance, unit)
        return
    assert isinstance(expected, Tensor)
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
        return
    assert actual.dtype == torch.float32
    finite = expected[expected.isfinite()]
    scale = max(unit, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale, equal_nan=True)
