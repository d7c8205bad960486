"""The gradient cache against a dictionary that forgets by the same rule."""

from __future__ import annotations

import random

import pytest
import torch

from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.ops import TokenGradient

WIDTH = 4
BYTES_PER_ROW = (2 * WIDTH + 3) * 4


def evaluation(rows: int = 1, start: int = 0, value: float = 0.0) -> Evaluation:
    factors = TokenGradient(torch.full((rows, WIDTH), value), torch.zeros(rows, WIDTH), torch.zeros(rows, 3))
    return Evaluation(start, factors, -1.0, value)


def test_bytes_of_an_evaluation_are_those_of_its_factors() -> None:
    assert evaluation(3).nbytes == 3 * BYTES_PER_ROW
    half = TokenGradient(*(f.to(torch.bfloat16) for f in evaluation(3).factors))
    assert Evaluation(0, half, 0.0, 0.0).nbytes == 3 * BYTES_PER_ROW // 2


def test_rows_from_a_position_are_counted_from_the_first_covered_one() -> None:
    factors = TokenGradient(*(torch.randn(5, width) for width in (WIDTH, WIDTH, 3)))
    entry = Evaluation(10, factors, 0.0, 0.0)
    for part, whole in zip(entry.rows_from(12), factors, strict=True):
        assert torch.equal(part, whole[2:])
    for part, whole in zip(entry.rows_from(10), factors, strict=True):
        assert torch.equal(part, whole)


def test_finds_exactly_the_same_tokens_only() -> None:
    cache = GradientCache(10**6)
    cache.insert((1, 2, 3), evaluation())
    assert cache.find((1, 2, 3), 0) is not None
    for other in ((1, 2), (1, 2, 3, 4), (1, 3, 2), (-1, 1, 2, 3), ()):
        assert cache.find(other, 0) is None


def test_hash_collisions_are_told_apart() -> None:
    # CPython gives -1 and -2 the same hash.
    assert hash((-1, 5)) == hash((-2, 5))
    cache = GradientCache(10**6)
    cache.insert((-1, 5), evaluation(value=1.0))
    cache.insert((-2, 5), evaluation(value=2.0))
    assert [cache.find(key, 0).reward for key in ((-1, 5), (-2, 5))] == [1.0, 2.0]  # type: ignore[union-attr]


def test_entry_that_starts_too_late_is_no_hit_and_is_replaced() -> None:
    cache = GradientCache(10**6)
    cache.insert((1, 2, 3), evaluation(rows=1, start=2, value=1.0))
    assert cache.find((1, 2, 3), 1) is None
    assert cache.find((1, 2, 3), 2) is not None
    cache.insert((1, 2, 3), evaluation(rows=3, start=0, value=2.0))
    assert len(cache) == 1
    assert cache.bytes == 3 * BYTES_PER_ROW
    found = cache.find((1, 2, 3), 1)
    assert found is not None
    assert (found.start, found.reward) == (0, 2.0)


def test_least_recently_used_goes_first_and_a_look_up_is_a_use() -> None:
    cache = GradientCache(3 * BYTES_PER_ROW)
    for key in (1, 2, 3):
        cache.insert((key,), evaluation())
    cache.find((1,), 0)
    cache.insert((4,), evaluation())
    assert [key for key in (1, 2, 3, 4) if cache.find((key,), 0)] == [1, 3, 4]
    assert (cache.evictions, cache.bytes, len(cache)) == (1, 3 * BYTES_PER_ROW, 3)
    cache.insert((5,), evaluation(rows=2))
    assert [key for key in (1, 3, 4, 5) if cache.find((key,), 0)] == [4, 5]
    assert cache.evictions == 3


def test_entry_larger_than_the_budget_is_not_kept_and_evicts_nobody() -> None:
    cache = GradientCache(2 * BYTES_PER_ROW)
    cache.insert((1,), evaluation())
    cache.insert((2,), evaluation(rows=3))
    assert cache.find((1,), 0) is not None
    assert cache.find((2,), 0) is None
    assert (cache.evictions, cache.bytes) == (0, BYTES_PER_ROW)
    nothing = GradientCache(0)
    nothing.insert((1,), evaluation())
    assert (len(nothing), nothing.bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget_rows", [0, 1, 5, 12, 1000])
def test_random_operations_equal_a_dictionary_that_forgets_the_least_recently_used(seed: int, budget_rows: int) -> None:
    draw = random.Random(seed)
    cache = GradientCache(budget_rows * BYTES_PER_ROW)
    oracle: dict[tuple[int, ...], Evaluation] = {}
    evictions = 0
    for step in range(400):
        key = tuple(draw.randrange(3) for _ in range(draw.randrange(3)))
        start = draw.randrange(4)
        if draw.random() < 0.5:
            found = cache.find(key, start)
            expected = oracle.get(key)
            if expected is None or expected.start > start:
                assert found is None
            else:
                assert found is expected
                oracle[key] = oracle.pop(key)
        else:
            entry = evaluation(draw.randrange(1, 5), start, float(step))
            cache.insert(key, entry)
            oracle.pop(key, None)
            if entry.nbytes <= cache.max_bytes:
                oracle[key] = entry
            while sum(e.nbytes for e in oracle.values()) > cache.max_bytes:
                del oracle[next(iter(oracle))]
                evictions += 1
        assert len(cache) == len(oracle)
        assert cache.bytes == sum(e.nbytes for e in oracle.values()) <= cache.max_bytes
        assert cache.evictions == evictions
    assert all(cache.find(key, 99) is entry for key, entry in oracle.items())
