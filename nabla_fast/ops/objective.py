"""Operators of the objective: likelihood, gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.backends import implementation, resolve
from nabla_fast.ops.library import HEAD, register, statistic_dtype
from nabla_fast.ops.operands import Head, Tables, TokenGradient


def _likelihood_kernel(
    h: Tensor, weight: Tensor, scale: float, softcap: float, tokens: Tensor, need_grad: bool, backend: str
) -> Any:
    kernel = implementation("log_likelihood_gradient", backend)
    return tuple(kernel(h, Head(weight, scale, softcap), tokens, need_grad))


def _likelihood_fake(
    h: Tensor, weight: Tensor, scale: float, softcap: float, tokens: Tensor, need_grad: bool, backend: str
) -> Any:
    dtype = statistic_dtype(h)
    rows = h.shape[0] if need_grad else 0
    return h.new_empty(h.shape[0], dtype=dtype), h.new_empty(rows, h.shape[1], dtype=dtype)


def _likelihood_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _likelihood_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    (dh,) = ctx.saved_tensors
    return (grad.unsqueeze(-1) * dh).to(ctx.dtype), None, None, None, None, None, None


_linear_log_likelihood = register(
    f"linear_log_likelihood(Tensor h, {HEAD}, Tensor tokens, bool need_grad, str backend) "
    "-> (Tensor log_likelihood, Tensor gradient)",
    _likelihood_kernel,
    _likelihood_fake,
    backward=_likelihood_backward,
    setup_context=_likelihood_setup,
)


def _norm_kernel(
    hidden: Tensor,
    embedding_grad: Tensor,
    reward_grad: Tensor,
    weight: Tensor,
    scale: float,
    softcap: float,
    embedding: Tensor,
    reward_embedding: Tensor,
    nll_coeff: float,
    backend: str,
) -> Any:
    factors = TokenGradient(hidden, embedding_grad, reward_grad)
    tables = Tables(Head(weight, scale, softcap), embedding, reward_embedding, nll_coeff)
    return implementation("gradient_norm", backend)(factors, tables)


_gradient_norm = register(
    f"gradient_norm(Tensor hidden, Tensor embedding_grad, Tensor reward_grad, {HEAD}, Tensor embedding, "
    "Tensor reward_embedding, float nll_coeff, str backend) -> Tensor",
    _norm_kernel,
    lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=statistic_dtype(hidden)),
)


def linear_log_likelihood(h: Tensor, head: Head, tokens: Tensor, *, backend: str = "auto") -> Tensor:
    """log softmax(logits(h))[token] per row, without an (N, V) tensor, forward or backward.

    Args:
        h: (N, d) hidden states; the gradient reaches them. It is made in the forward pass, so there is no second one.
        head: output head, no gradient.
        tokens: (N,) int64.
        backend: "auto" or a back end's name.

    Returns:
        (N,) float32, float64 for float64 h.
    """
    chosen = resolve("log_likelihood_gradient", backend, h.device.type, h.dtype)
    # Whether a gradient will be wanted is known here; below autograd it is not.
    need_grad = h.requires_grad and torch.is_grad_enabled()
    log_likelihood: Tensor = _linear_log_likelihood(h, *head, tokens, need_grad, chosen)[0]
    return log_likelihood


def gradient_norm(factors: TokenGradient, tables: Tables, *, backend: str = "auto") -> Tensor:
    """L2 norm (N,) of the token gradient over the vocabulary, from its factors; see `reference.gradient_norm`.

    Source: the gradient criterion of ∇-Reasoner (Alg. 3).
    """
    chosen = resolve("gradient_norm", backend, factors.hidden.device.type, factors.hidden.dtype)
    head, embedding, reward_embedding, nll_coeff = tables
    norm: Tensor = _gradient_norm(
        *(factor.detach() for factor in factors), *head, embedding, reward_embedding, nll_coeff, chosen
    )
    return norm
