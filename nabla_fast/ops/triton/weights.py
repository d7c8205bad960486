# mypy: allow-untyped-defs, allow-incomplete-defs
"""What reaches the vocabulary's entries, tile by tile: softmax weights, or the gradient with respect to logits.

    SOFTMAX      p                                        (embedding mixture)
    LIKELIHOOD   ([v = target] - p) * slope               (gradient of log pi)
    RELAXED      p (G - <p, G>) / tau * slope             (straight-through gradient)

slope is the softcap's, 1 without one and for logits in memory. The output is a chunk of the vocabulary, or all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.triton.launch import run, strides
from nabla_fast.ops.triton.sources import NO_GRADIENT, Gradient, Logits, tile_arguments
from nabla_fast.ops.triton.tiles import cap_slope, load_tile, tile


@triton.jit
def _weights_kernel(
    Z,
    Z_n,
    Z_v,
    H,
    H_n,
    H_d,
    W,
    W_v,
    W_d,
    D,
    A,
    X1,
    T1,
    T1_v,
    T1_d,
    D1,
    X2,
    T2,
    T2_v,
    T2_d,
    D2,
    G,
    G_n,
    G_v,
    scale,
    softcap,
    alpha,
    SOFT,
    SOFT_n,
    SOFT_v,
    HELD,
    TOP,
    INVERSE,
    Q,
    TARGET,
    OUT,
    OUT_n,
    rows,
    V,
    first,
    last,
    inv_tau,
    KIND: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_A: tl.constexpr,
    MODE_1: tl.constexpr,
    MODE_2: tl.constexpr,
    CAP: tl.constexpr,
    CAP_A: tl.constexpr,
    OWN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    wanted = row < rows
    if HELD is not None:
        wanted = wanted & (tl.load(HELD + row, mask=wanted, other=1) == 0)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    clamped = tl.minimum(row, rows - 1)
    local = tl.program_id(1) * BV + tl.arange(0, BV)
    columns = first + local
    inside = wanted[:, None] & (columns < last)[None, :]
    z, g = tile(
        Z, Z_n, Z_v, H, H_n, H_d, W, W_v, W_d, D, A, X1, T1, T1_v, T1_d, D1, X2, T2, T2_v, T2_d, D2, G, G_n, G_v,
        scale, softcap, alpha, clamped, columns, inside, V,
        BN, BV, BD, EVEN, SWAP, MODE_H, MODE_A, MODE_1, MODE_2, CAP, CAP_A, OWN,
    )  # fmt: skip
    x = z
    if SOFT is not None:
        x = z + load_tile(SOFT, clamped, SOFT_n, columns, SOFT_v, inside, 0.0)
    top = tl.load(TOP + clamped)
    inverse = tl.load(INVERSE + clamped)
    weight = tl.exp((x - top[:, None]) * inv_tau) * inverse[:, None]
    if KIND == "likelihood":
        hit = tl.load(TARGET + clamped)[:, None] == columns[None, :]
        weight = tl.where(hit, 1.0, 0.0) - weight
    if KIND == "relaxed":
        q = tl.load(Q + clamped)
        # Where p is 0 an infinite G moves nothing; NaN stays.
        weight = tl.where(weight == 0, 0.0, weight * (g - q[:, None]) * inv_tau)
    if CAP and Z is None and KIND != "softmax":
        # A -inf logit has weight 0, and a slope that is not a number.
        weight = tl.where(weight == 0, 0.0, weight * cap_slope(z, softcap))
    tl.store(OUT + (row * OUT_n)[:, None] + local[None, :], weight, mask=inside)


def write_weights(
    out: Tensor,
    logits: Logits,
    inv_tau: float,
    kind: str,
    top: Tensor,
    inverse: Tensor,
    *,
    first: int = 0,
    gradient: Gradient = NO_GRADIENT,
    q: Tensor | None = None,
    target: Tensor | None = None,
    soft: Tensor | None = None,
    held: Tensor | None = None,
) -> None:
    """Writes the weights of entries first ... first + C of every row into out (N, C).

    ``top`` and ``inverse`` (N,) make p = exp((x - top) / tau) * inverse. Rows with ``held`` set are left alone.
    """
    arguments, options = tile_arguments(logits, gradient, int(soft is not None))
    last = min(first + out.shape[1], logits.vocabulary)
    grid = triton.cdiv(logits.rows, options["BN"]), triton.cdiv(last - first, options["BV"])
    run(
        _weights_kernel, grid, out.device, **arguments, **options,
        SOFT=soft, **strides("SOFT", soft, "nv"), HELD=held, TOP=top, INVERSE=inverse, Q=q,
        TARGET=target, OUT=out, OUT_n=out.stride(0), first=first, last=last, inv_tau=inv_tau, KIND=kind,
    )  # fmt: skip
