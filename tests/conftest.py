"""Settings and fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples in every run, so that a run says something about the code alone. `make test-fuzz` draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("fresh", print_blob=True)
settings.load_profile("fresh" if os.environ.get("NABLA_FAST_FRESH_EXAMPLES") == "1" else "same")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside other workers, threads that wait for each other take the cores from those that work. torch reads this when
    # it is loaded, and what a test starts inherits it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The files that take longest, most of all those with few tests: workers that get them last would leave the others idle.
LONGEST = (
    "test_triton_compile.py", "test_sanitizers.py", "test_gradient_memory.py", "test_evaluation_ray.py",
    "test_smollm2.py", "test_triton.py", "test_dto_step.py", "test_operators.py", "test_native.py", "test_cuda.py",
    "test_quality.py", "test_static.py", "test_device.py", "test_devices.py", "test_cli.py", "test_demo.py",
    "test_decoder.py", "test_cuda_compile.py", "test_benchmarks.py", "test_lm_eval.py", "test_server_process.py",
    "test_hub_kernels.py", "test_docs_examples.py", "test_server_answers.py", "test_examples.py",
    "test_html_browser.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers get the files in this order; a run without workers keeps the usual one.

    What is marked families runs only where ``-m`` asks for it.
    """
    if "families" not in config.option.markexpr:
        unasked = [item for item in items if item.get_closest_marker("families")]
        items[:] = [item for item in items if item not in unasked]
        config.hook.pytest_deselected(items=unasked)
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> None:
    """Where a run may be cut before it ends, NABLA_FAST_SHOW_FAILURES=1 has each failure written as it happens."""
    if report.failed and os.environ.get("NABLA_FAST_SHOW_FAILURES") == "1":
        config.get_terminal_writer().line(f"\n{report.nodeid}\n{report.longreprtext}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where other processes want the cores."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels that divide their work among threads are to do so wherever the tests run, also as one worker of many."""
    yield from _threads(2)


def _threads(count: int) -> Iterator[None]:
    import torch  # loaded after the settings above

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
