"""Inputs and comparisons for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "ties", "minus infinity", "dominant", "huge", "all equal")


def few(examples: int) -> settings:
    """Hypothesis settings where an example takes long: in the interpreter, and on a GPU, where it may be compiled."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )  # fmt: skip


def integers(seed: int, end: int, *shape: int) -> Tensor:
    """Random integers from 0 to below ``end``, on the default device; the same on all."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, end, shape, generator=generator, device="cpu").to(torch.get_default_device())


def product_tolerance(source: torch.dtype, table: torch.dtype) -> float:
    """Of logits: float32 factors of a bfloat16 table are taken as two bfloat16 numbers, good to 2^-17.

    To 2^-16 in the interpreter, which cuts where the GPU rounds.
    """
    return 4e-5 if source == torch.float32 and table == torch.bfloat16 else 1e-5


def weight_tolerance(source: torch.dtype, table: torch.dtype) -> float:
    """Of a product of weights with a table: they are one bfloat16 number where ``source`` was one, too."""
    return 8e-3 if source == table == torch.bfloat16 else product_tolerance(source, table)


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
