"""Embeddings through the softmax relaxation, and the gradient that they pass on to logits and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from nabla_fast.ops import checks, reference
from nabla_fast.ops.registry import operator
from nabla_fast.ops.types import HardEmbeddings, Head, RecordedMixture


def _check_pairs(*arguments: Any) -> None:
    """Raises ValueError where there is not one vector for each table."""
    *_, vectors, tables, _ = arguments
    if len(vectors) != len(tables):
        raise ValueError(f"vectors and tables must be as many, got {len(vectors)} and {len(tables)}")


@operator(check=_check_pairs)
def relaxed_backward(
    z: Annotated[Tensor, "float N V"],
    vectors: Annotated[Sequence[Tensor], "float N d_k", 2],
    tables: Annotated[Sequence[Tensor], "float V d_k", 2],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "first N V"]:
    """The gradient (N, V), in the dtype of z, that reaches logits z through the relaxation p = softmax(z / tau).

        dL/dz = p * (D - <p, D>) / tau      with D = G - G(argmax p), G(v) = sum_k <vectors_k, tables_k[v]>

    Args:
        z: (N, V) logits.
        vectors: one or two (N, d_k), the gradients with respect to the embeddings.
        tables: as many embedding tables (V, d_k).
        tau: relaxation temperature, above 0.
        backend: "auto" or a back end's name.
    """
    return reference.relaxed_backward(z, vectors, tables, tau)


@operator(check=_check_pairs)
def linear_relaxed_backward(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    vectors: Annotated[Sequence[Tensor], "float N d_k", 2],
    tables: Annotated[Sequence[Tensor], "float V d_k", 2],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "sum N d"]:
    """`relaxed_backward` carried on to hidden states: dL/dh (N, d), by one pass over the vocabulary (identity (b))."""
    return reference.linear_relaxed_backward(h, head, vectors, tables, tau)


@operator(
    derivative=lambda z, tables, tau, backend, result: relaxed_backward(z, result.embeddings, tables, tau, backend)
)
def straight_through_embedding(
    z: Annotated[Tensor, "float N V"],
    tables: Annotated[Sequence[Tensor], "float V d_k", 2],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> HardEmbeddings:
    """Embeddings of the argmax tokens whose gradient is that of the softmax relaxation (straight-through estimator).

    Args:
        z: (N, V) logits; the gradient reaches them.
        tables: one or two embedding tables (V, d_k), such as the language model's and the reward model's; no gradient.
        tau: relaxation temperature, above 0.
        backend: "auto" or a back end's name.

    Source: Alg. 2 of ∇-Reasoner.
    """
    return reference.straight_through_embedding(z, tables, tau)


@operator(
    derivative=lambda h, head, tables, tau, backend, result: linear_relaxed_backward(
        h, head, result.embeddings, tables, tau, backend
    )
)
def linear_straight_through_embedding(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    tables: Annotated[Sequence[Tensor], "float V d_k", 2],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> HardEmbeddings:
    """`straight_through_embedding` of the logits of hidden states h (N, d); the gradient reaches h by identity (b)."""
    return reference.linear_straight_through_embedding(h, head, tables, tau)


@operator(internal=True)
def soft_embedding_backward(
    z: Annotated[Tensor, "float N V"],
    vector: Annotated[Tensor, "float N e"],
    table: Annotated[Tensor, "float V e"],
    offset: Annotated[Tensor, "float N e"],
    top: Annotated[Tensor, "float N"],
    max_prob: Annotated[Tensor, "float N"],
    token: Annotated[Tensor, "int64 N"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "first N V"]:
    """`relaxed_backward` of one table without another pass over z for its softmax: `RecordedMixture` has it."""
    return reference.soft_embedding_backward(z, vector, table, offset, top, max_prob, token, tau)


def _recorded_derivative(z: Tensor, table: Tensor, tau: float, backend: str, result: RecordedMixture) -> Tensor:
    return soft_embedding_backward(z, result.mixture, table, *result[1:], tau, backend)


@operator(derivative=_recorded_derivative, called="soft_embedding", internal=True)
def soft_embedding_recorded(
    z: Annotated[Tensor, "float N V"],
    table: Annotated[Tensor, "float V e"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> RecordedMixture:
    """`soft_embedding`, with what its gradient is made from."""
    return reference.soft_embedding_recorded(z, table, tau)


@operator(
    derivative=lambda z, table, tau, backend, result: relaxed_backward(z, [result], [table], tau, backend),
    recorded=soft_embedding_recorded,
)
def soft_embedding(
    z: Annotated[Tensor, "float N V"],
    table: Annotated[Tensor, "float V e"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "sum N e"]:
    """The embedding mixture ``softmax(z / tau) @ table``: (N, e), float32 or float64.

    Args:
        z: (N, V) logits; the gradient reaches them.
        table: (V, e) embeddings, no gradient.
        tau: relaxation temperature, above 0.
        backend: "auto" or a back end's name.
    """
    return reference.soft_embedding(z, table, tau)


@operator(internal=True)
def linear_soft_embedding_backward(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    vector: Annotated[Tensor, "float N e"],
    table: Annotated[Tensor, "float V e"],
    offset: Annotated[Tensor, "float N e"],
    top: Annotated[Tensor, "float N"],
    max_prob: Annotated[Tensor, "float N"],
    token: Annotated[Tensor, "int64 N"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "sum N d"]:
    """`soft_embedding_backward` carried on to hidden states."""
    return reference.linear_soft_embedding_backward(h, head, vector, table, offset, top, max_prob, token, tau)


def _linear_recorded_derivative(
    h: Tensor, head: Head, table: Tensor, tau: float, backend: str, result: RecordedMixture
) -> Tensor:
    return linear_soft_embedding_backward(h, head, result.mixture, table, *result[1:], tau, backend)


@operator(derivative=_linear_recorded_derivative, called="linear_soft_embedding", internal=True)
def linear_soft_embedding_recorded(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    table: Annotated[Tensor, "float V e"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> RecordedMixture:
    """`linear_soft_embedding`, with what its gradient is made from."""
    return reference.linear_soft_embedding_recorded(h, head, table, tau)


@operator(
    # <p, G> is <mixture, grad>, but as a sum rounded at the size of G it would cost a nearly certain token its digits.
    derivative=lambda h, head, table, tau, backend, result: linear_relaxed_backward(
        h, head, [result], [table], tau, backend
    ),
    recorded=linear_soft_embedding_recorded,
)
def linear_soft_embedding(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    table: Annotated[Tensor, "float V e"],
    tau: Annotated[float, checks.temperature] = 1.0,
    backend: str = "auto",
) -> Annotated[Tensor, "sum N e"]:
    """`soft_embedding` of the logits of hidden states h (N, d): attention over the vocabulary."""
    return reference.linear_soft_embedding(h, head, table, tau)
