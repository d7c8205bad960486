"""`linear`: products of rows (M, K) with a layer's weight (N, K), and their derivative, on a CPU: the few rows of a
decoded token or draft, and the tens of a gradient, where those are native on this processor.

With weights of 8-bit integers, eager is what torchao does with them, and "float32" the layer that was not quantised.
"""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting
from shapes import QWEN25_05B, SMOLLM2_135M, Shape
from torch.nn import functional

from nabla_fast.ops import linear as native_linear
from nabla_fast.ops import native
from nabla_fast.testing.operators import randn

# An MLP's layer of either model; the least and the most rows, and those of a draft.
WEIGHTS = ((SMOLLM2_135M, 1536), (QWEN25_05B, 4864))
ROWS = (1, 4, 8, 16)
MORE_ROWS = (64, 96, 256)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def inputs(seed: int, rows: int, entries: int, width: int, dtype: torch.dtype) -> Inputs:
    x, weight = (randn(n, width, dtype=dtype, seed=seed + i) for i, n in enumerate((rows, entries)))
    return Inputs((x,), (weight / width**0.5,))


def quantised(seed: int, rows: int, entries: int, width: int) -> Inputs:
    """Rows, and a weight as integers, scales and float32 numbers."""
    x, weight = (randn(n, width, seed=seed + i) for i, n in enumerate((rows, entries)))
    scale = weight.abs().amax(1) / 127 / width**0.5
    integers = (weight / width**0.5 / scale[:, None]).round().to(torch.int8)
    return Inputs((x,), (integers, scale, scale[:, None] * integers))


def int8_contest(shape: Shape, entries: int, rows: int) -> Contest:
    reason = why_not_native()
    return Contest(
        operator="linear, int8 weight",
        model=shape.name,
        dtype=torch.float32,
        shape={"M": rows, "N": entries, "K": shape.width},
        inputs=functools.partial(quantised, rows=rows, entries=entries, width=shape.width),
        meaning=lambda x, _, __, numbers: functional.linear(x, numbers),
        ours={"native": lambda x, w, scale, _: native_linear.linear(x, w, scale=scale)} if reason is None else {},
        baselines={
            "eager": lambda x, w, scale, _: functional.linear(x, w.to(x.dtype)) * scale,
            "float32": lambda x, _, __, numbers: functional.linear(x, numbers),
        },
        traffic=entries * shape.width + 4 * rows * (entries + shape.width),
        flops=2 * rows * entries * shape.width,
        skipped=skipped(reason),
    )


def skipped(why_not: str | None) -> dict[str, str]:
    return {"torch.compile": "it calls the same product"} | ({} if why_not is None else {"native": why_not})


def why_not_native() -> str | None:
    return None if native.has("linear") else native.why_missing() or "the native library lacks it"


def contest(shape: Shape, entries: int, rows: int, dtype: torch.dtype) -> Contest:
    reason = why_not_native()
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
        ours={"native": native_linear.linear} if reason is None else {},
        baselines=baselines,
        traffic=(entries * shape.width + rows * (entries + shape.width)) * dtype.itemsize,
        flops=2 * rows * entries * shape.width,
        skipped=skipped(reason),
    )


def backward_contest(shape: Shape, entries: int, rows: int) -> Contest:
    """Of bfloat16, as the native kernel has it."""
    reason = why_not_native()
    return Contest(
        operator="linear_backward",
        model=shape.name,
        dtype=torch.bfloat16,
        shape={"M": rows, "N": entries, "K": shape.width},
        inputs=functools.partial(sent, rows=rows, entries=entries, width=shape.width),
        meaning=torch.matmul,
        ours={"native": native_linear.backward} if reason is None else {},
        baselines={"eager": torch.matmul},
        traffic=(entries * shape.width + rows * (entries + shape.width)) * 2,
        flops=2 * rows * entries * shape.width,
        skipped=skipped(reason),
    )


def sent(seed: int, rows: int, entries: int, width: int) -> Inputs:
    grad = randn(rows, entries, dtype=torch.bfloat16, seed=seed)
    return Inputs((grad,), (randn(entries, width, dtype=torch.bfloat16, seed=seed + 1) / width**0.5,))


def is_taken(shape: Shape, entries: int, rows: int, dtype: torch.dtype, *, backward: bool = False) -> bool:
    """Whether a model's layer would be multiplied by the native kernel; it is shown without one, too."""
    weight = torch.empty(entries, shape.width, dtype=dtype)
    if backward:
        return native_linear.backward_fits(torch.empty(rows, entries, dtype=dtype), weight)
    return rows in ROWS or native_linear.fits(torch.empty(rows, shape.width, dtype=dtype), weight)


def cases(setting: Setting) -> list[Case]:
    if setting.device.type != "cpu":
        return []
    sizes = [(*weight, rows, dtype) for weight in WEIGHTS for dtype in setting.dtypes for rows in (*ROWS, *MORE_ROWS)]
    made = [contest(*size) for size in (sizes[:2] if setting.quick else sizes) if is_taken(*size)]
    made += [
        backward_contest(*weight, rows)
        for weight in WEIGHTS[: 1 if setting.quick else None]
        for rows in MORE_ROWS
        if is_taken(*weight, rows, torch.bfloat16, backward=True)
    ]
    made += [int8_contest(*weight, rows) for weight in WEIGHTS[: 1 if setting.quick else None] for rows in ROWS]
    return [one.case(setting) for one in made]


def test_linear(case, measured):
    measured(case)
