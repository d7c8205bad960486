"""Rewards compared but for rounding.

Rewards of different answers are often equal in exact arithmetic: a process reward is that of the least step, which two
answers may share. Rounding would tell them apart by what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Relative difference that rounding makes in float32.
_ROUNDING = 1e-6


def is_higher(reward: float, other: float) -> bool:
    """Whether a reward is above another one by more than rounding."""
    return reward > other and not math.isclose(reward, other, rel_tol=_ROUNDING)


def highest(rewards: Sequence[float]) -> int:
    """Index of the highest reward, of equals the first."""
    most = max(range(len(rewards)), key=rewards.__getitem__)
    return next((i for i in range(most) if not is_higher(rewards[most], rewards[i])), most)


def ranked(rewards: Sequence[float], most: int) -> list[int]:
    """Indices of at most ``most`` rewards, the highest first, of equals the earlier."""
    left = list(range(len(rewards)))
    found: list[int] = []
    while left and len(found) < most:
        found.append(left.pop(highest([rewards[i] for i in left])))
    return found
