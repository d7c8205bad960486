"""Drawing tokens from logits."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from nabla_fast.ops import checks, reference
from nabla_fast.ops.registry import operator


@operator()
def draw_token(
    z: Annotated[Tensor, "float N V"],
    low: Annotated[Tensor, "int64 N"],
    high: Annotated[Tensor, "int64 N"],
    temperature: Annotated[float, checks.sampling_temperature] = 1.0,
    top_k: Annotated[int, checks.rank] | None = None,
    top_p: Annotated[float, checks.share] | None = None,
    backend: str = "auto",
) -> Annotated[Tensor, "int64 N"]:
    """One token (N,) int64 per row of logits, by Gumbel-max over what temperature, then top-k, then top-p keep.

    The noise is a hash of the key words and the token, see `nabla_fast.ops.noise`; the kernel evaluates it for tokens
    that may win alone. Two back ends give the same token, but for rounding: where a token's cumulative probability
    equals ``top_p``, or two scores are equal, to about 1e-6.

    Args:
        z: (N, V) logits, any float dtype, any strides.
        low, high: (N,) int64, the low and high 32 bits of the noise's key, as `nabla_fast.ops.noise.key_words` has
            them.
        temperature: divides the logits; 0 takes the argmax.
        top_k: keeps this many likeliest tokens, and those as likely as the last; None keeps all.
        top_p: keeps the smallest set of likeliest tokens whose probability reaches it, of equals those of the lowest
            index; None or 1 keeps all.

    Returns:
        The tokens, of equal scores the lowest; -1 for a row that holds NaN or +inf or nothing but -inf.
    """
    return reference.draw_token(z, low, high, temperature, top_k, top_p)
