"""Drawing tokens without the host: the same tokens as `nabla_fast.sampling` draws, from the same logits.

Nothing here has a shape that depends on numbers. So a nucleus is looked for among the likeliest tokens alone, and a row
whose nucleus is wider says so; `Sampler` draws it then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.ops import noise, warp

# SplitMix64's constants, as int64.
_ADD, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def why_not(sampling: Sampling, vocab_size: int) -> str | None:
    """Why tokens cannot be drawn so, in one clause; None if they can."""
    kept = sampling.top_k
    if sampling.temperature > 0 and kept is not None and warp.LIKELIEST < kept < vocab_size:
        return f"top_k ({kept}) is more than the {warp.LIKELIEST} tokens that are looked at"
    return None


def mixed(seed: int) -> int:
    """The first hash of a sequence's seed, as a number of an int64 tensor."""
    word = noise.mix64(seed)
    return word - (1 << 64) if word >= 1 << 63 else word


def words(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits of the noise's hash, as `nabla_fast.ops.noise.key_words` has them; int64.

    Args:
        seeds: int64, of `mixed` seeds.
        positions: int64 of the same shape, positions in the response.
    """
    x = seeds + positions + _ADD
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    x = x ^ _shifted(x, 31)
    return x & noise.MASK, _shifted(x, 32)


def draw(logits: Tensor, sampling: Sampling, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """One token (N,) per row of logits (N, V), and whether a row has to be drawn by `Sampler` instead (N,) bool.

    Args:
        low, high: (N,) int64 of `words`.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    scores, tokens, wide = _candidates(logits / sampling.temperature, sampling)
    scores = scores + noise.gumbel(low.unsqueeze(-1), high.unsqueeze(-1), tokens)
    best = scores.amax(-1, keepdim=True)
    # Of equal scores the lowest token, as argmax over the vocabulary has it. A row of NaN has none.
    others = scores != best
    return tokens.expand_as(scores).masked_fill(others, logits.shape[-1] - 1).amin(-1), wide


def _candidates(x: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, C) of the tokens (N or 1, C) that top-k and top-p may leave, -inf on those that they do not; and
    whether others might belong to them (N,)."""
    size = x.shape[-1]
    count = min(warp.LIKELIEST, size)
    top_k = sampling.top_k if sampling.top_k is not None and sampling.top_k < size else None
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if top_k is not None and top_p is None:
        best = x.topk(count, dim=-1)
        # Tokens as likely as the last one stay, too.
        inside = best.values >= best.values[..., top_k - 1 : top_k]
        return best.values.masked_fill(~inside, -torch.inf), best.indices, inside[..., -1] & (count < size)
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    everything = torch.arange(size, device=x.device).unsqueeze(0)
    nothing = torch.zeros_like(x[..., 0], dtype=torch.bool)
    if top_p is None:
        return x, everything, nothing
    if top_p > warp.NEARLY_ALL:
        return warp.without_tail(x, top_p), everything, nothing
    values, tokens, inside, cut = warp.likeliest(x, top_p)
    return values.masked_fill(~inside, -torch.inf), tokens, cut


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right of int64 as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
