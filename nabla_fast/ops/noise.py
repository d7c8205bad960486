"""Gumbel noise that is a hash of (sequence seed, position, token): integers, which every device computes alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NoiseKey = tuple[int, int]
"""(sequence seed, position in the response)."""

MASK = 0xFFFFFFFF


def mix64(x: int) -> int:
    """SplitMix64's output function, so that neighbouring seeds and positions give unrelated noise."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def key_words(keys: Sequence[NoiseKey], device: torch.device) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits (N,), as int64, of a hash of each key."""
    words = [mix64(mix64(seed) + position) for seed, position in keys]
    halves = [[word & MASK for word in words], [word >> 32 for word in words]]
    low, high = torch.tensor(halves, dtype=torch.long, device=device)
    return low, high


def gumbel(low: Tensor, high: Tensor, token: Tensor) -> Tensor:
    """The noise, float32, of broadcastable key words and token indices."""
    bits = _hash32(_hash32(token ^ low) ^ high)
    # Exponential noise keeps its relative precision where it matters, near 0, because u is small there.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2**-24)))


def with_noise(values: Tensor, kept: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
    """``values`` (N, V) plus ``scale`` times the noise of key words (N,); -inf where ``kept`` (N, V) is -inf."""
    rows, tokens = (kept != -torch.inf).nonzero(as_tuple=True)
    # Mostly a handful of tokens is kept; noise for the others would cost more than the model's own step.
    noise = scale * gumbel(low[rows], high[rows], tokens)
    result = torch.full_like(values, -torch.inf, dtype=torch.promote_types(values.dtype, torch.float32))
    result[rows, tokens] = values[rows, tokens] + noise
    return result


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (two multiply-xorshift rounds) of int64 values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
