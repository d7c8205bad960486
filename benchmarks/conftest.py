"""pytest-benchmark around the cases: ``pytest benchmarks`` lists, stores and compares what `measure.in_turn` measured.

The samples are those of our fastest back end, handed over through the clock that pytest-benchmark reads, so its figures
are over the same clean repeats; the whole record is in ``extra_info``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Setting
from measure import steady_allocator
from run import choose_device
from tables import best_of_ours


class ReplayedClock:
    """Tells the times between which samples lie, one after the other, instead of the time."""

    def __init__(self) -> None:
        self.readings: deque[float] = deque()

    def load(self, seconds: list[float]) -> None:
        now = 0.0
        for sample in seconds:
            self.readings.extend((now, now + sample))
            now += sample

    def __call__(self) -> float:
        return self.readings.popleft()


CLOCK = ReplayedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nabla_fast")
    group.addoption("--quick", action="store_true", help="small sizes, few repeats, no compilation")
    group.addoption("--bench-device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption("--threads", type=int, help="CPU threads")


@pytest.fixture(scope="session", autouse=True)
def steady(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads") or before)
    steady_allocator()
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        setting = Setting(choose_device(config.getoption("--bench-device")), config.getoption("--quick"))
        metafunc.parametrize("case", metafunc.module.cases(setting), ids=lambda case: case.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def measured(benchmark: Callable[..., object]) -> Callable[[Case], None]:
    """Runs a case and hands its samples to pytest-benchmark."""

    def run(case: Case) -> None:
        record = case.run()
        samples = [sample / 1e3 for sample in best_of_ours(record)[1]["samples_ms"]]
        for contender in record["contenders"].values():
            del contender["samples_ms"]
        benchmark.extra_info.update(record)
        CLOCK.load(samples)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return run
