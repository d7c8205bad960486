"""Rewards that are equal but for rounding are equal."""

from __future__ import annotations

import math

import pytest

from nabla_fast.comparison import highest, is_higher, ranked


@pytest.mark.parametrize("size", [1.0, 1e-11, -3.0, 1e6])
def test_rounding_makes_no_reward_higher(size: float) -> None:
    assert not is_higher(size * (1 + math.copysign(1e-8, size)), size)
    assert is_higher(size * (1 + math.copysign(1e-4, size)), size)
    assert not is_higher(size, size)
    assert not is_higher(size * (1 - math.copysign(1e-4, size)), size)


def test_the_first_of_equals_is_the_highest() -> None:
    assert highest([0.2, 0.7, 0.5, 0.7 + 1e-9, 0.1]) == 1
    assert highest([0.7 - 1e-4, 0.7, 0.2]) == 1
    assert highest([-5.0]) == 0
    assert highest([0.0, -0.0, 0.0]) == 0
    assert highest([-math.inf, -math.inf]) == 0
    assert highest([1.0, math.inf, math.inf]) == 1


def test_ranks_leave_equals_as_they_are() -> None:
    assert ranked([0.2, 0.7, 0.5, 0.7 + 1e-9, 0.1], 3) == [1, 3, 2]
    assert ranked([0.5 - 1e-9, 0.5, 0.5 + 1e-9], 5) == [0, 1, 2]
    assert ranked([3.0, 1.0], 0) == []
    assert ranked([], 2) == []
