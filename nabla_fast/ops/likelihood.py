"""The log-likelihood of tokens, with its gradient from the same pass over the vocabulary."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.namespace import NAMESPACE
from nabla_fast.ops.registry import LIBRARY, operator
from nabla_fast.ops.types import Head, LogLikelihood

# Not an `operator`: it has no back ends. It takes h so that a compiled graph knows that the gradient depends on it: a
# second derivative is an error there too, where otherwise it would silently be nothing.
LIBRARY.define("log_likelihood_backward(Tensor grad, Tensor gradient, Tensor h) -> Tensor")
LIBRARY.impl(
    "log_likelihood_backward", lambda grad, gradient, h: grad.unsqueeze(-1) * gradient, "CompositeExplicitAutograd"
)
torch.library.register_fake(
    f"{NAMESPACE}::log_likelihood_backward", lambda grad, gradient, h: torch.empty_like(gradient), lib=LIBRARY
)
_backward = getattr(torch.ops, NAMESPACE).log_likelihood_backward


@operator(
    derivative=lambda h, *_, result: _backward(result.log_likelihood, result.gradient, h),
    called="linear_log_likelihood",
)
def log_likelihood_gradient(
    h: Annotated[Tensor, "float N d"],
    head: Head,
    tokens: Annotated[Tensor, "ids N"],
    need_grad: bool,
    backend: str = "auto",
) -> LogLikelihood:
    """`linear_log_likelihood`, and with ``need_grad`` its gradient, made in the same pass over the vocabulary."""
    return reference.log_likelihood_gradient(h, head, tokens, need_grad)


def linear_log_likelihood(h: Tensor, head: Head, tokens: Tensor, backend: str = "auto") -> Tensor:
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
    # Whether a gradient will be wanted is known here; below autograd it is not.
    need_grad = h.requires_grad and torch.is_grad_enabled()
    return log_likelihood_gradient(h, head, tokens, need_grad, backend).log_likelihood
