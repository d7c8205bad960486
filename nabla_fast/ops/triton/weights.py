# mypy: allow-untyped-defs, allow-incomplete-defs
"""What reaches the vocabulary's entries, from logits in memory: softmax weights, or the gradient with respect to them.

    SOFTMAX      p                                        (embedding mixture)
    LIKELIHOOD   ([v = target] - p) * slope               (gradient of log pi)
    RELAXED      p (D - <p, D>) / tau * slope             (straight-through gradient), D = G - G(likeliest token)

For a nearly certain target 1 - p keeps no digits, so it is given as the sum of the other entries' p. slope is the
softcap's, 1 without one. The weights come in float32, or in half precision for a product with a table: as one tensor
where what they are made from was in half precision too, else as two whose sum keeps 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import run, strides
from nabla_fast.ops.triton.rows import load_row
from nabla_fast.ops.triton.tiles import cap_slope


@triton.jit
def _weights_kernel(
    Z,
    Z_n,
    Z_v,
    G,
    G_n,
    G_v,
    ORIGIN,
    SOFT,
    SOFT_n,
    SOFT_v,
    HELD,
    TOP,
    INVERSE,
    Q,
    TARGET,
    HIGH,
    HIGH_n,
    LOW,
    LOW_n,
    V,
    softcap,
    inv_tau,
    KIND: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HELD is not None:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
        if tl.load(HELD + row) != 0:
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = load_row(Z, row * Z_n, columns, Z_v, inside, float("-inf"))
    x = z
    if SOFT is not None:
        x = z + load_row(SOFT, row * SOFT_n, columns, SOFT_v, inside, 0.0)
    weight = tl.exp((x - tl.load(TOP + row)) * inv_tau) * tl.load(INVERSE + row)
    if KIND == "likelihood":
        weight = tl.where(columns == tl.load(TARGET + row), tl.load(Q + row), -weight)
    if KIND == "relaxed":
        g = load_row(G, row * G_n, columns, G_v, inside, 0.0) - tl.load(ORIGIN + row)
        # Where p is 0 an infinite G moves nothing; NaN stays.
        weight = tl.where(weight == 0, 0.0, weight * (g - tl.load(Q + row)) * inv_tau)
    if CAP:
        # A -inf logit has weight 0, and a slope that is not a number.
        weight = tl.where(weight == 0, 0.0, weight * cap_slope(z, softcap))
    high = weight.to(HIGH.dtype.element_ty)
    tl.store(HIGH + row * HIGH_n + columns, high, mask=inside)
    if LOW is not None:
        tl.store(LOW + row * LOW_n + columns, (weight - high.to(tl.float32)).to(LOW.dtype.element_ty), mask=inside)


def write_weights(
    out: tuple[Tensor, ...],
    z: Tensor,
    inv_tau: float,
    kind: str,
    top: Tensor,
    inverse: Tensor,
    *,
    gradient: Tensor | None = None,
    origin: Tensor | None = None,
    q: Tensor | None = None,
    target: Tensor | None = None,
    soft: Tensor | None = None,
    held: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Writes the weights of rows z (R, V) into ``out``, one or two (R, V) tensors, and returns it.

    ``top`` and ``inverse`` (R,) make p = exp((x - top) / tau) * inverse; ``q`` (R,) is <p, D>, or of a likelihood 1 - p
    of the target. Rows with ``held`` set are left alone.
    """
    rows, vocabulary = z.shape
    block = 2048
    high, low = out[0], out[1] if len(out) > 1 else None
    if rows:
        run(
            _weights_kernel, (rows, triton.cdiv(vocabulary, block)), z.device,
            Z=z, **strides("Z", z, "nv"), G=gradient, **strides("G", gradient, "nv"), ORIGIN=origin,
            SOFT=soft, **strides("SOFT", soft, "nv"), HELD=held, TOP=top, INVERSE=inverse, Q=q, TARGET=target,
            HIGH=high, HIGH_n=high.stride(0), LOW=low, LOW_n=0 if low is None else low.stride(0), V=vocabulary,
            softcap=float(softcap), inv_tau=inv_tau, KIND=kind, CAP=softcap != 0 and kind != "softmax",
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def weight_dtypes(source: torch.dtype, table: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the weights of a product with a table, made from logits or hidden states of dtype ``source``."""
    if table != torch.bfloat16:  # float16's range does not hold every weight
        return (torch.float32,)
    return (torch.bfloat16,) * (2 if source == torch.float32 else 1)
