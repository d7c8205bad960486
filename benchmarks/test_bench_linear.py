"""`linear`: products of the few rows (M, K) that a decoded token or draft is with a layer's weight (N, K), on a CPU."""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting
from shapes import QWEN25_05B, SMOLLM2_135M, Shape
from torch.nn import functional

from nabla_fast.ops import linear as few_rows
from nabla_fast.ops import native
from nabla_fast.testing.operators import randn

# An MLP's layer of either model; the least and the most rows, and those of a draft.
WEIGHTS = ((SMOLLM2_135M, 1536), (QWEN25_05B, 4864))
ROWS = (1, 4, 8, 16)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def inputs(seed: int, rows: int, entries: int, width: int, dtype: torch.dtype) -> Inputs:
    x, weight = (randn(n, width, dtype=dtype, seed=seed + i) for i, n in enumerate((rows, entries)))
    return Inputs((x,), (weight / width**0.5,))


def contest(shape: Shape, entries: int, rows: int, dtype: torch.dtype) -> Contest:
    reason = None if native.has("linear") else native.why_missing() or "the native library lacks it"
    skipped = {"torch.compile": "it calls the same product"} | ({} if reason is None else {"native": reason})
    baselines = {"eager": functional.linear}
    if dtype == torch.float32:  # elsewhere it is what eager is
        baselines["oneDNN"] = onednn
    return Contest(
        operator="linear",
        model=shape.name,
        dtype=dtype,
        shape={"M": rows, "N": entries, "K": shape.width},
        inputs=functools.partial(inputs, rows=rows, entries=entries, width=shape.width, dtype=dtype),
        meaning=functional.linear,
        ours={"native": few_rows.linear} if reason is None else {},
        baselines=baselines,
        traffic=(entries * shape.width + rows * (entries + shape.width)) * dtype.itemsize,
        flops=2 * rows * entries * shape.width,
        skipped=skipped,
    )


def cases(setting: Setting) -> list[Case]:
    if setting.device.type != "cpu":
        return []
    sizes = [(*weight, rows, dtype) for weight in WEIGHTS for dtype in setting.dtypes for rows in ROWS]
    return [contest(*size).case(setting) for size in (sizes[:2] if setting.quick else sizes)]


def test_linear(case, measured):
    measured(case)
