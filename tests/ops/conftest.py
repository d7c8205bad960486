"""The fixture `backend`: a back end made ready, as the tests' decorator `by` names it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from back_ends import INTERPRETED
from cuda_cases import emulate

from nabla_fast.ops import cuda, native
from nabla_fast.testing.operators import Backend

# Files of Triton's alone, for the processes of test_triton.py. On a GPU, test_gpu.py has the decodes.
collect_ignore = [] if INTERPRETED else ["test_triton_decode.py"]
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore += ["test_triton_kernels.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        for mark in item.iter_markers("leaves_out")
        if mark.kwargs["where"](**item.callspec.params)
    ]
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Operators by one back end, without autograd: ``backend.relaxed_stats(z)``."""
    name, _, on_gpu = request.param.partition("-")
    if name == "native" and not native.available():
        pytest.skip(f"no native library: {native.why_missing()}")
    if name == "cuda" and on_gpu and cuda.why_missing() is not None:
        pytest.skip(f"no kernels in CUDA: {cuda.why_missing()}")
    if name == "cuda" and not on_gpu:
        emulate(monkeypatch)
    threads = torch.get_num_threads()
    # Kernels that divide their work among threads are to do so; tiny tensors of PyTorch gain nothing from threads.
    torch.set_num_threads(2 if name == "native" else 1)
    torch.set_default_device("cuda" if on_gpu else None)
    yield Backend(name)
    torch.set_default_device(None)
    torch.set_num_threads(threads)
