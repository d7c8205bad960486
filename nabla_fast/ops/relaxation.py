"""Operators of the softmax relaxation: its statistics, embeddings through it, and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import checks
from nabla_fast.ops.backends import implementation, resolve
from nabla_fast.ops.library import (
    HEAD,
    differentiable,
    register,
    second_refused,
    statistic_dtype,
    widened,
)
from nabla_fast.ops.operands import Head, RelaxedStats

_STATS = "(Tensor max_prob, Tensor lse, Tensor entropy, Tensor token, Tensor mask)"
_THRESHOLDS = "float? entropy_threshold, float? confidence_threshold"


def _stats_kernel(z: Tensor, tau: float, entropy: float | None, confidence: float | None, backend: str) -> Any:
    return tuple(implementation("relaxed_stats", backend)(z, tau, entropy, confidence))


def _linear_stats_kernel(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    tau: float,
    entropy: float | None,
    confidence: float | None,
    backend: str,
) -> Any:
    head = Head(weight, scale, softcap)
    return tuple(implementation("linear_relaxed_stats", backend)(widened(h, weight), head, tau, entropy, confidence))


def _stats_check(z: Tensor, tau: float, entropy: float | None, confidence: float | None, backend: str) -> None:
    checks.logits(z)
    checks.temperature(tau)
    checks.thresholds(entropy, confidence)


def _linear_stats_check(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    tau: float,
    entropy: float | None,
    confidence: float | None,
    backend: str,
) -> None:
    checks.head(h, weight, scale, softcap)
    checks.one_device(**{"h": h, "head.weight": weight})
    checks.temperature(tau)
    checks.thresholds(entropy, confidence)


def _stats_fake(x: Tensor, *others: Any) -> Any:
    weight = others[0] if isinstance(others[0], Tensor) else None
    rows, dtype = x.shape[0], statistic_dtype(x, weight)
    floats = [x.new_empty(rows, dtype=dtype) for _ in range(3)]
    return (*floats, x.new_empty(rows, dtype=torch.long), x.new_empty(rows, dtype=torch.bool))


def _straight_through_kernel(z: Tensor, first: Tensor, second: Tensor | None, tau: float, backend: str) -> Any:
    tables = [first] if second is None else [first, second]
    embeddings, lse, token = implementation("straight_through_embedding", backend)(widened(z, *tables), tables, tau)
    return (*_pair(embeddings), lse, token)


def _straight_through_check(z: Tensor, first: Tensor, second: Tensor | None, tau: float, backend: str) -> None:
    checks.logits(z)
    _check_tables(z.shape[1], first, second)
    checks.one_device(z=z, table=first, second=second)
    checks.temperature(tau)


def _straight_through_fake(z: Tensor, first: Tensor, second: Tensor | None, tau: float, backend: str) -> Any:
    return _hard_embeddings(z, first, second, statistic_dtype(z, first, second))


def _hard_embeddings(x: Tensor, first: Tensor, second: Tensor | None, dtype: torch.dtype) -> Any:
    rows = x.shape[0]
    return (
        x.new_empty(rows, first.shape[1], dtype=dtype),
        x.new_empty((0,) if second is None else (rows, second.shape[1]), dtype=dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=torch.long),
    )


def _check_tables(vocabulary: int, first: Tensor, second: Tensor | None) -> None:
    checks.table(first, vocabulary, "table")
    checks.table(second, vocabulary, "second")


def _linear_straight_through_kernel(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    first: Tensor,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> Any:
    tables = [first] if second is None else [first, second]
    kernel = implementation("linear_straight_through_embedding", backend)
    embeddings, lse, token = kernel(widened(h, weight, *tables), Head(weight, scale, softcap), tables, tau)
    return (*_pair(embeddings), lse, token)


def _linear_straight_through_check(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    first: Tensor,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> None:
    checks.head(h, weight, scale, softcap)
    _check_tables(weight.shape[0], first, second)
    checks.one_device(**{"h": h, "head.weight": weight, "table": first, "second": second})
    checks.temperature(tau)


def _linear_straight_through_fake(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    first: Tensor,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> Any:
    return _hard_embeddings(h, first, second, statistic_dtype(h, weight, first, second))


def _pair(embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    first, *rest = (x.contiguous() for x in embeddings)
    return first, rest[0] if rest else first.new_empty(0)


def _soft_kernel(z: Tensor, table: Tensor, tau: float, backend: str) -> Any:
    mixture, lse = implementation("soft_embedding", backend)(widened(z, table), table, tau)
    return mixture.contiguous(), lse


def _soft_check(z: Tensor, table: Tensor, tau: float, backend: str) -> None:
    checks.logits(z)
    checks.table(table, z.shape[1], "table")
    checks.one_device(z=z, table=table)
    checks.temperature(tau)


def _soft_fake(z: Tensor, table: Tensor, tau: float, backend: str) -> Any:
    rows, dtype = z.shape[0], statistic_dtype(z, table)
    return z.new_empty(rows, table.shape[1], dtype=dtype), z.new_empty(rows, dtype=dtype)


def _linear_soft_kernel(
    h: Tensor, weight: Tensor, scale: float, softcap: float, table: Tensor, tau: float, backend: str
) -> Any:
    head = Head(weight, scale, softcap)
    mixture, lse = implementation("linear_soft_embedding", backend)(widened(h, weight, table), head, table, tau)
    return mixture.contiguous(), lse


def _linear_soft_check(
    h: Tensor, weight: Tensor, scale: float, softcap: float, table: Tensor, tau: float, backend: str
) -> None:
    checks.head(h, weight, scale, softcap)
    checks.table(table, weight.shape[0], "table")
    checks.one_device(**{"h": h, "head.weight": weight, "table": table})
    checks.temperature(tau)


def _linear_soft_fake(
    h: Tensor, weight: Tensor, scale: float, softcap: float, table: Tensor, tau: float, backend: str
) -> Any:
    rows, dtype = h.shape[0], statistic_dtype(h, weight, table)
    return h.new_empty(rows, table.shape[1], dtype=dtype), h.new_empty(rows, dtype=dtype)


def _backward_kernel(
    z: Tensor,
    lse: Tensor,
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor | None,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> Any:
    vectors, tables = _pairs(first_grad, first, second_grad, second)
    z = widened(z, lse, *vectors, *tables)
    return implementation("relaxed_backward", backend)(z, lse, vectors, tables, tau).contiguous()


def _backward_check(
    z: Tensor,
    lse: Tensor,
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor | None,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> None:
    checks.logits(z)
    _check_gradients(z, z.shape[1], lse, first_grad, first, second_grad, second)
    checks.temperature(tau)


def _linear_backward_kernel(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    lse: Tensor,
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor | None,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> Any:
    vectors, tables = _pairs(first_grad, first, second_grad, second)
    kernel = implementation("linear_relaxed_backward", backend)
    h = widened(h, weight, lse, *vectors, *tables)
    return kernel(h, Head(weight, scale, softcap), lse, vectors, tables, tau).contiguous()


def _linear_backward_check(
    h: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    lse: Tensor,
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor | None,
    second: Tensor | None,
    tau: float,
    backend: str,
) -> None:
    checks.head(h, weight, scale, softcap)
    _check_gradients(h, weight.shape[0], lse, first_grad, first, second_grad, second)
    checks.one_device(**{"h": h, "head.weight": weight})
    checks.temperature(tau)


def _check_gradients(
    x: Tensor,
    vocabulary: int,
    lse: Tensor,
    first_grad: Tensor,
    first: Tensor,
    second_grad: Tensor | None,
    second: Tensor | None,
) -> None:
    if (second is None) is not (second_grad is None):
        raise ValueError("second and second_grad must be given together, or neither")
    _check_tables(vocabulary, first, second)
    checks.floats(lse, "lse")
    checks.shape(lse, (x.shape[0],), "lse")
    checks.rows(first_grad, x.shape[0], first.shape[1], "first_grad")
    checks.rows(second_grad, x.shape[0], 0 if second is None else second.shape[1], "second_grad")
    checks.one_device(x=x, lse=lse, first_grad=first_grad, table=first, second_grad=second_grad, second=second)


def _pairs(
    first_grad: Tensor, first: Tensor, second_grad: Tensor | None, second: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    if second is None or second_grad is None:
        return [first_grad], [first]
    return [first_grad, second_grad], [first, second]


def _like_input_fake(x: Tensor, *others: Any) -> Tensor:
    tensors = (other for other in others if isinstance(other, Tensor))
    return x.new_empty(x.shape, dtype=statistic_dtype(x, *tensors))


_relaxed_backward = register(
    "relaxed_backward(Tensor z, Tensor lse, Tensor first_grad, Tensor first, Tensor? second_grad, Tensor? second, "
    "float tau, str backend) -> Tensor",
    _backward_kernel,
    _like_input_fake,
    check=_backward_check,
    backward=second_refused("the softmax relaxation"),
)
_linear_relaxed_backward = register(
    f"linear_relaxed_backward(Tensor h, {HEAD}, Tensor lse, Tensor first_grad, Tensor first, Tensor? second_grad, "
    "Tensor? second, float tau, str backend) -> Tensor",
    _linear_backward_kernel,
    _like_input_fake,
    check=_linear_backward_check,
    backward=second_refused("the softmax relaxation"),
)


def _straight_through_setup(ctx: Any, inputs: Any, output: Any) -> None:
    z, first, second, ctx.tau, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(z, output[2], first, second)


def _straight_through_backward(ctx: Any, first_grad: Tensor, second_grad: Tensor, *_: Any) -> Any:
    z, lse, first, second = ctx.saved_tensors
    other = None if second is None else second_grad
    dz = _relaxed_backward(z, lse, first_grad, first, other, second, ctx.tau, ctx.backend)
    return dz.to(z.dtype), None, None, None, None


def _linear_straight_through_setup(ctx: Any, inputs: Any, output: Any) -> None:
    h, weight, ctx.scale, ctx.softcap, first, second, ctx.tau, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(h, weight, output[2], first, second)


def _linear_straight_through_backward(ctx: Any, first_grad: Tensor, second_grad: Tensor, *_: Any) -> Any:
    h, weight, lse, first, second = ctx.saved_tensors
    other = None if second is None else second_grad
    head = (weight, ctx.scale, ctx.softcap)
    dh = _linear_relaxed_backward(h, *head, lse, first_grad, first, other, second, ctx.tau, ctx.backend)
    return dh.to(h.dtype), None, None, None, None, None, None, None


def _soft_setup(ctx: Any, inputs: Any, output: Any) -> None:
    z, table, ctx.tau, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, output[1], table)


def _soft_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    z, lse, table = ctx.saved_tensors
    dz = _relaxed_backward(z, lse, grad, table, None, None, ctx.tau, ctx.backend)
    return dz.to(z.dtype), None, None, None


def _linear_soft_setup(ctx: Any, inputs: Any, output: Any) -> None:
    h, weight, ctx.scale, ctx.softcap, table, ctx.tau, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(h, weight, output[1], table)


def _linear_soft_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    h, weight, lse, table = ctx.saved_tensors
    head = (weight, ctx.scale, ctx.softcap)
    dh = _linear_relaxed_backward(h, *head, lse, grad, table, None, None, ctx.tau, ctx.backend)
    return dh.to(h.dtype), None, None, None, None, None, None


_relaxed_stats = register(
    f"relaxed_stats(Tensor z, float tau, {_THRESHOLDS}, str backend) -> {_STATS}",
    _stats_kernel,
    _stats_fake,
    check=_stats_check,
)
_linear_relaxed_stats = register(
    f"linear_relaxed_stats(Tensor h, {HEAD}, float tau, {_THRESHOLDS}, str backend) -> {_STATS}",
    _linear_stats_kernel,
    _stats_fake,
    check=_linear_stats_check,
)
_straight_through = register(
    "straight_through_embedding(Tensor z, Tensor first, Tensor? second, float tau, str backend) "
    "-> (Tensor first_embedding, Tensor second_embedding, Tensor lse, Tensor token)",
    _straight_through_kernel,
    _straight_through_fake,
    check=_straight_through_check,
    backward=_straight_through_backward,
    setup_context=_straight_through_setup,
)
_linear_straight_through = register(
    f"linear_straight_through_embedding(Tensor h, {HEAD}, Tensor first, Tensor? second, float tau, str backend) "
    "-> (Tensor first_embedding, Tensor second_embedding, Tensor lse, Tensor token)",
    _linear_straight_through_kernel,
    _linear_straight_through_fake,
    check=_linear_straight_through_check,
    backward=_linear_straight_through_backward,
    setup_context=_linear_straight_through_setup,
)
_soft = register(
    "soft_embedding(Tensor z, Tensor table, float tau, str backend) -> (Tensor embedding, Tensor lse)",
    _soft_kernel,
    _soft_fake,
    check=_soft_check,
    backward=_soft_backward,
    setup_context=_soft_setup,
)
_linear_soft = register(
    f"linear_soft_embedding(Tensor h, {HEAD}, Tensor table, float tau, str backend) -> (Tensor embedding, Tensor lse)",
    _linear_soft_kernel,
    _linear_soft_fake,
    check=_linear_soft_check,
    backward=_linear_soft_backward,
    setup_context=_linear_soft_setup,
)


def relaxed_stats(
    z: Tensor,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """Statistics of ``softmax(z / tau)`` per row, from one read of z; see `reference.relaxed_stats`.

    Args:
        z: (N, V) float32, float64, bfloat16 or float16, any strides.
        tau: relaxation temperature, above 0.
        entropy_threshold: nats; a row below it is masked out.
        confidence_threshold: a row whose largest probability is above it is masked out.
        backend: "auto" or a back end's name.

    Source: selection criteria of ∇-Reasoner (Alg. 3).
    """
    chosen = resolve("relaxed_stats", backend, z.device, statistic_dtype(z))
    return RelaxedStats(*_relaxed_stats(z.detach(), tau, entropy_threshold, confidence_threshold, chosen))


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
    backend: str = "auto",
) -> RelaxedStats:
    """`relaxed_stats` of the logits of hidden states h (N, d), without an (N, V) tensor."""
    chosen = resolve("linear_relaxed_stats", backend, h.device, statistic_dtype(h, head.weight))
    thresholds = (entropy_threshold, confidence_threshold)
    return RelaxedStats(*_linear_relaxed_stats(h.detach(), *head, tau, *thresholds, chosen))


def straight_through_embedding(
    z: Tensor, table: Tensor, second: Tensor | None = None, *, tau: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Embeddings of the argmax tokens whose gradient is that of the softmax relaxation (straight-through estimator).

    Args:
        z: (N, V) logits; the gradient reaches them.
        table: (V, d) embeddings, no gradient.
        second: (V, d_r) another table, such as the reward model's, or None.
        tau: relaxation temperature.
        backend: "auto" or a back end's name.

    Returns:
        (N, d) float32 (float64 for float64 z), (N, d_r) or None, and the tokens (N,) int64.

    Source: Alg. 2 of ∇-Reasoner.
    """
    differentiable("straight_through_embedding", z, table, second)
    chosen = resolve("straight_through_embedding", backend, z.device, statistic_dtype(z, table, second))
    embedding, other, _, token = _straight_through(z, table, second, tau, chosen)
    return embedding, None if second is None else other, token


def linear_straight_through_embedding(
    h: Tensor, head: Head, table: Tensor, second: Tensor | None = None, *, tau: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`straight_through_embedding` of the logits of hidden states h (N, d); the gradient reaches h by identity (b)."""
    differentiable("linear_straight_through_embedding", h, head.weight, table, second)
    dtype = statistic_dtype(h, head.weight, table, second)
    chosen = resolve("linear_straight_through_embedding", backend, h.device, dtype)
    embedding, other, _, token = _linear_straight_through(h, *head, table, second, tau, chosen)
    return embedding, None if second is None else other, token


def soft_embedding(z: Tensor, table: Tensor, *, tau: float = 1.0, backend: str = "auto") -> Tensor:
    """The embedding mixture ``softmax(z / tau) @ table``: (N, d_k), float32 or float64.

    Args:
        z: (N, V) logits; the gradient reaches them.
        table: (V, d_k) embeddings, no gradient.
        tau: relaxation temperature.
        backend: "auto" or a back end's name.
    """
    differentiable("soft_embedding", z, table)
    chosen = resolve("soft_embedding", backend, z.device, statistic_dtype(z, table))
    embedding: Tensor = _soft(z, table, tau, chosen)[0]
    return embedding


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, *, tau: float = 1.0, backend: str = "auto") -> Tensor:
    """`soft_embedding` of the logits of hidden states h (N, d): attention over the vocabulary."""
    differentiable("linear_soft_embedding", h, head.weight, table)
    chosen = resolve("linear_soft_embedding", backend, h.device, statistic_dtype(h, head.weight, table))
    embedding: Tensor = _linear_soft(h, *head, table, tau, chosen)[0]
    return embedding
