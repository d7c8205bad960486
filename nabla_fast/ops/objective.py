"""Operators of the objective: likelihood, gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import checks
from nabla_fast.ops.backends import implementation, resolve
from nabla_fast.ops.library import HEAD, differentiable, register, second_refused, statistic_dtype, widened
from nabla_fast.ops.operands import Head, Tables, TokenGradient


def _likelihood_kernel(
    h: Tensor, weight: Tensor, scale: float, softcap: float, tokens: Tensor, need_grad: bool, backend: str
) -> Any:
    checks.ids("tokens", tokens, weight.shape[0])
    kernel = implementation("log_likelihood_gradient", backend)
    log_likelihood, gradient = kernel(widened(h, weight), Head(weight, scale, softcap), tokens, need_grad)
    return log_likelihood, gradient.contiguous()


def _likelihood_check(
    h: Tensor, weight: Tensor, scale: float, softcap: float, tokens: Tensor, need_grad: bool, backend: str
) -> None:
    checks.head(h, weight, scale, softcap)
    checks.integers(tokens, h.shape[0], "tokens")
    checks.one_device(**{"h": h, "head.weight": weight, "tokens": tokens})


def _likelihood_fake(
    h: Tensor, weight: Tensor, scale: float, softcap: float, tokens: Tensor, need_grad: bool, backend: str
) -> Any:
    dtype = statistic_dtype(h, weight)
    rows = h.shape[0] if need_grad else 0
    return h.new_empty(h.shape[0], dtype=dtype), h.new_empty(rows, h.shape[1], dtype=dtype)


def _likelihood_backward_check(grad: Tensor, gradient: Tensor, h: Tensor) -> None:
    for name, x in (("grad", grad), ("gradient", gradient), ("h", h)):
        checks.floats(x, name)
    checks.shape(gradient, tuple(h.shape), "gradient (of the forward pass, with need_grad)")
    checks.shape(grad, (h.shape[0],), "grad")
    checks.one_device(grad=grad, gradient=gradient, h=h)


def _likelihood_gradient_kernel(grad: Tensor, gradient: Tensor, h: Tensor) -> Tensor:
    dtype = statistic_dtype(grad, gradient, h)
    return (grad.to(dtype).unsqueeze(-1) * gradient.to(dtype)).to(h.dtype)


# An operator for the sake of its derivative, which is an error: without h, the gradient would look like a constant.
_likelihood_gradient = register(
    "log_likelihood_backward(Tensor grad, Tensor gradient, Tensor h) -> Tensor",
    _likelihood_gradient_kernel,
    lambda grad, gradient, h: h.new_empty(h.shape),
    check=_likelihood_backward_check,
    backward=second_refused("linear_log_likelihood"),
)


def _likelihood_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _likelihood_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return _likelihood_gradient(grad, *ctx.saved_tensors), None, None, None, None, None, None


_linear_log_likelihood = register(
    f"linear_log_likelihood(Tensor h, {HEAD}, Tensor tokens, bool need_grad, str backend) "
    "-> (Tensor log_likelihood, Tensor gradient)",
    _likelihood_kernel,
    _likelihood_fake,
    check=_likelihood_check,
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
    wide = statistic_dtype(*factors, weight, embedding, reward_embedding)
    factors = TokenGradient(*(x.to(wide) for x in factors)) if wide == torch.float64 else factors
    norm = implementation("gradient_norm", backend)(factors, tables)
    # Without the likelihood a back end need not read the head, and a row is still its hidden state.
    return norm if nll_coeff else torch.where(hidden.isfinite().all(-1), norm, torch.nan)


def _norm_check(
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
) -> None:
    checks.head(hidden, weight, scale, softcap, "factors.hidden")
    checks.table(embedding, weight.shape[0], "tables.embedding")
    checks.table(reward_embedding, weight.shape[0], "tables.reward_embedding")
    checks.rows(embedding_grad, hidden.shape[0], embedding.shape[1], "factors.embedding")
    checks.rows(reward_grad, hidden.shape[0], reward_embedding.shape[1], "factors.reward_embedding")
    checks.number("nll_coeff", nll_coeff)
    checks.one_device(
        **{"factors.hidden": hidden, "factors.embedding": embedding_grad, "factors.reward_embedding": reward_grad},
        **{"head.weight": weight, "tables.embedding": embedding, "tables.reward_embedding": reward_embedding},
    )


def _norm_fake(hidden: Tensor, *others: Any) -> Tensor:
    tensors = (other for other in others if isinstance(other, Tensor))
    return hidden.new_empty(hidden.shape[0], dtype=statistic_dtype(hidden, *tensors))


_gradient_norm = register(
    f"gradient_norm(Tensor hidden, Tensor embedding_grad, Tensor reward_grad, {HEAD}, Tensor embedding, "
    "Tensor reward_embedding, float nll_coeff, str backend) -> Tensor",
    _norm_kernel,
    _norm_fake,
    check=_norm_check,
)


def linear_log_likelihood(h: Tensor, head: Head, tokens: Tensor, *, backend: str = "auto") -> Tensor:
    """log softmax(logits(h))[token] per row, without an (N, V) tensor, forward or backward.

    Args:
        h: (N, d) hidden states; the gradient reaches them. It is made in the forward pass, so there is no second one.
        head: output head, no gradient.
        tokens: (N,) int64.
        backend: "auto" or a back end's name.

    Returns:
        (N,) float32, float64 where h or the head is. NaN for a row that holds NaN or infinite values.

    Raises:
        IndexError: for a token that is not in the vocabulary, on the CPU; on a GPU its row is NaN.
    """
    differentiable("linear_log_likelihood", h, head.weight)
    chosen = resolve("log_likelihood_gradient", backend, h.device, statistic_dtype(h, head.weight))
    # Whether a gradient will be wanted is known here; below autograd it is not.
    need_grad = h.requires_grad and torch.is_grad_enabled()
    log_likelihood: Tensor = _linear_log_likelihood(h, *head, tokens, need_grad, chosen)[0]
    return log_likelihood


def gradient_norm(factors: TokenGradient, tables: Tables, *, backend: str = "auto") -> Tensor:
    """L2 norm (N,) of the token gradient over the vocabulary, from its factors; see `reference.gradient_norm`.

    float32, float64 where a factor or table is. NaN for a row that holds NaN or infinite values.

    Source: the gradient criterion of ∇-Reasoner (Alg. 3).
    """
    head, embedding, reward_embedding, nll_coeff = tables
    dtype = statistic_dtype(*factors, head.weight, embedding, reward_embedding)
    chosen = resolve("gradient_norm", backend, factors.hidden.device, dtype)
    norm: Tensor = _gradient_norm(
        *(factor.detach() for factor in factors), *head, embedding, reward_embedding, nll_coeff, chosen
    )
    return norm
