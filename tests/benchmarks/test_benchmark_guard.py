"""Ours must not become slower than `benchmarks/guard.json` says, in times as fast as eager on the same machine."""

from __future__ import annotations

import functools

import guard
import pytest

from nabla_fast.ops import native

pytestmark = pytest.mark.usefixtures("one_thread")
FLOORS = {name: entry["floor"] for name, entry in guard.recorded()["operators"].items()}


@functools.cache
def contests():
    return guard.guarded()


@pytest.fixture
def comparable():
    if not native.available():
        pytest.skip(f"no native library: {native.why_missing()}")
    if (reason := guard.why_not_here()) is not None:
        pytest.skip(reason)


def test_every_guarded_operator_has_a_floor_below_what_was_recorded():
    assert set(FLOORS) == set(contests())
    for name, entry in guard.recorded()["operators"].items():
        assert FLOORS[name] == guard.floor_of(entry["ratios"]) < min(entry["ratios"])


@pytest.mark.parametrize("name", FLOORS)
def test_no_operator_is_slower_than_recorded(comparable, name):
    assert guard.slower({name: guard.ratio_of(contests()[name])}, FLOORS) == []


@pytest.mark.parametrize("name", ["relaxed_stats float32"])
def test_an_operator_that_is_no_faster_than_eager_is_found(comparable, name, monkeypatch):
    monkeypatch.setattr(guard, "ATTEMPTS", 2)
    (found,) = guard.slower({name: guard.ratio_of(contests()[name], ours="eager")}, FLOORS)
    assert found.startswith(f"{name} is ")


def test_a_slow_moment_is_measured_again():
    moments = iter([0.5, 0.9, 3.0])
    assert guard.slower({"x": lambda: next(moments)}, {"x": 2.0}) == []
    assert guard.slower({"x": lambda: 1.0}, {"x": 2.0}) == [
        "x is 1.00 times as fast as eager, and was recorded to be at least 2.00"
    ]


def test_floors_lie_below_what_ten_repeats_showed():
    assert guard.floor_of([10, 11, 12]) == pytest.approx(6.6)
    assert guard.floor_of([6, 10, 900]) == 2
    with pytest.raises(ValueError, match="quiet machine"):
        guard.floor_of([1, 3, 4])
