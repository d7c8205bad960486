"""`linear_log_likelihood`, forward and backward: hidden states (N, d) and tokens (N,) to log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, libraries_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import randn


def differentiated(forward: Callable[..., Tensor], h: Tensor, tokens: Tensor, head: Head, **options: str):
    """log pi (N,) and its gradient (N, d)."""
    leaf = h.detach().requires_grad_()
    log_pi = forward(leaf, head, tokens, **options)
    (gradient,) = torch.autograd.grad(log_pi.sum(), leaf)
    return (log_pi.detach() if log_pi.ndim else None), gradient


def dense(h: Tensor, head: Head, tokens: Tensor) -> Tensor:
    z = capped((h @ head.weight.T).float(), head.softcap)
    return F.log_softmax(z, dim=-1).gather(-1, tokens[:, None])[:, 0]


def liger(h: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """The sum over rows, all that it gives a gradient for."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap or None)
    return -loss(head.weight, h, tokens)


def cut_cross_entropy(h: Tensor, head: Head, tokens: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, head.weight, tokens, softcap=head.softcap or None, reduction="none")


def quack(h: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """The sum over rows, all that it gives a gradient for; it has no softcap."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if head.softcap:
        raise ValueError("quack has no softcap")
    return -chunked_linear_cross_entropy(h, head.weight, tokens, reduction="sum")


LIBRARIES = {
    "Liger-Kernel": ("liger_kernel", liger),
    "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy),
    "quack": ("quack", quack),
}


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(setting.device).manual_seed(seed)
    tokens = torch.randint(0, shape.vocabulary, (rows,), generator=generator, device=setting.device)
    h = randn(rows, shape.width, dtype=dtype, seed=seed, device=setting.device)
    return Inputs((h, tokens), (head_of(shape, dtype, seed + 100, setting.device),))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype) -> Contest:
    fused, skipped = backends_of("log_likelihood_gradient", setting.device, ops.linear_log_likelihood)
    baselines, not_compiled = with_compiled(dense, setting, shape.name)
    libraries, not_installed = libraries_of(LIBRARIES, setting.device)
    return Contest(
        operator="linear_log_likelihood",
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype),
        meaning=lambda h, tokens, head: reference.log_likelihood_gradient(h, head, tokens, True),
        ours={name: functools.partial(differentiated, f) for name, f in fused.items()},
        baselines={name: functools.partial(differentiated, f) for name, f in baselines.items()},
        libraries={name: functools.partial(differentiated, f) for name, f in libraries.items()},
        traffic=(shape.vocabulary + 2 * rows) * shape.width * dtype.itemsize,
        flops=4 * rows * shape.vocabulary * shape.width,
        skipped=skipped | not_compiled | not_installed,
    )


def cases(setting: Setting) -> list[Case]:
    return [contest(setting, *sizes).case(setting) for sizes in setting.grid]


def test_linear_log_likelihood(case, measured):
    measured(case)
