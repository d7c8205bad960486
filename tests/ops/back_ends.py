"""The back ends that a process can test, and how exact they are.

`by` parametrises a test over back ends, and the fixture `backend` of `conftest.py` makes them ready. Triton reads
TRITON_INTERPRET when a kernel is decorated, for the whole process, so each test by Triton runs in a process of its own,
which `test_triton.py` starts. Where there is a GPU, what can run there is tested there, too: back ends ``-gpu``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import Backend, logits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)
# What a kernel branches on: how h and the head are multiplied. Triton refuses float64.
TRITON_PAIRS = ((torch.float32, torch.float32), *((a, b) for b in HALVES for a in (b, torch.float32)))
PAIRS = TRITON_PAIRS if INTERPRETED else tuple((a, b) for a in FLOATS for b in FLOATS)
DTYPES = tuple(dtype for dtype in FLOATS if not (INTERPRETED and dtype == torch.float64))
# Of views: Triton's kernels read every dtype by the same strides.
VIEWED = (torch.bfloat16,) if INTERPRETED else DTYPES
KINDS = ("random", "ties", "minus infinity", "dominant", "huge", "all equal")


def by(*names: str) -> Any:
    """Parametrises `backend` over those of ``names`` that this process can run."""
    here = [name for name in names if (name == "triton") == INTERPRETED]
    if torch.cuda.is_available() and not INTERPRETED:
        here += [f"{name}-gpu" for name in names if name != "native"]
    return pytest.mark.parametrize("backend", here, indirect=True)


def few(examples: int, elsewhere: int | None = None) -> settings:
    """Hypothesis settings: ``examples`` where one takes long, four times as many elsewhere.

    That is in the interpreter, and on a GPU, where it may be compiled.
    """
    most = examples if INTERPRETED or torch.cuda.is_available() else elsewhere or 4 * examples
    # Examples are few choices out of short lists: to shrink one that fails takes minutes, and says no more.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=most, deadline=None, suppress_health_check=list(HealthCheck), phases=phases)


def takes(backend: Backend, *dtypes: torch.dtype) -> bool:
    """Whether a back end computes with operands of ``dtypes``; on a GPU all back ends are given the same examples."""
    return backend.name != "triton" or (torch.float64 not in dtypes and (len(dtypes) == 1 or dtypes in TRITON_PAIRS))


def _refused(backend: str, dtype: Any = None, pair: Any = None, **_: Any) -> bool:
    return not takes(Backend(backend.partition("-")[0]), *(pair or [dtype]))


in_its_dtypes = pytest.mark.leaves_out(where=_refused)
"""Of a test with a parameter ``dtype`` or ``pair``: no test where the back end refuses it."""


def integers(seed: int, end: int, *shape: int) -> Tensor:
    """Random integers from 0 to below ``end``, on the default device; the same on all."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, end, shape, generator=generator, device="cpu").to(torch.get_default_device())


def hidden_states(
    rows: int, vocabulary: int, width: int, pair: Sequence[torch.dtype], scale: float = 1.0, cap: float = 0.0, seed=0
) -> tuple[Tensor, Head]:
    """h (N, d) and a head whose logits are a few units; under a cap less, where float32 still knows differences."""
    h = logits(seed, rows, width, dtype=pair[0])
    return h, Head(logits(seed + 1, vocabulary, width, dtype=pair[1]) / (32 if cap else 4), scale, cap)


def logits_by_hand(h: Tensor, head: Head) -> Tensor:
    """Logits in float64, as the textbook has them."""
    z = head.scale * (h.double() @ head.weight.double().T)
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def lowest_argmax(z: Tensor) -> Tensor:
    """The lowest index of the largest entry, -1 for a row that holds NaN or +inf or nothing but -inf."""
    largest = z.amax(-1, keepdim=True)
    places = torch.where(z == largest, torch.arange(z.shape[-1]), z.shape[-1]).amin(-1)
    return torch.where(largest.squeeze(-1).isfinite(), places, -1)


# Views with the same values, or some of them


def strided(x: Tensor) -> Tensor:
    """The same values with gaps in both dimensions, at an odd offset."""
    rows, columns = x.shape
    wide = torch.full((rows, 3, columns + 1, 2), torch.nan).to(x.dtype)
    view = wide[:, 1, 1:, 1]
    view.copy_(x)
    assert not view.is_contiguous() or x.numel() <= 1
    return view


def transposed(x: Tensor) -> Tensor:
    """The same values, columns outermost."""
    return x.t().contiguous().t()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "transposed": transposed,
    "sliced": lambda x: x[1:, 3:],
    "one row as all": lambda x: x[:1].expand(x.shape),
}
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())


# How exact


def product_tolerance(backend: Backend, *dtypes: torch.dtype) -> float:
    """Of logits, relative to them or 1: rounding of sums in float32, unless an operand is float64.

    Triton, and the reference on a GPU, take float32 factors of a bfloat16 table as two bfloat16 numbers, good to 2^-17;
    to 2^-16 in the interpreter, which cuts where the GPU rounds.
    """
    if torch.float64 in dtypes:
        return 1e-11
    cut = backend.name == "triton" or torch.get_default_device().type == "cuda"
    return 4e-5 if cut and dtypes == (torch.float32, torch.bfloat16) else 1e-5


def weight_tolerance(backend: Backend, *dtypes: torch.dtype) -> float:
    """Of a product of softmax weights with a table, relative to its largest entry.

    Kernels round the weights to bfloat16 where both the source of the logits and the table are bfloat16; the reference
    never does.
    """
    return 1e-2 if rounds_factors(backend, *dtypes) else product_tolerance(backend, *dtypes)


def rounds_factors(backend: Backend, *dtypes: torch.dtype) -> bool:
    """Whether it may round what it multiplies with a table; native kernels do by the processor (`native_rounds`)."""
    return set(dtypes) == {torch.bfloat16} and backend.name != "reference"


def near(actual: Any, expected: Any, tolerance: float, *, unit: float | None = None) -> None:
    """Floats of ``actual`` are float32 or float64 and within ``tolerance``, everything else is equal.

    Relative to each entry or 1; with a ``unit``, to the largest entry or that. NaN where NaN.
    """
    if not isinstance(actual, Tensor):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            near(a, b, tolerance, unit=unit)
        return
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
        return
    assert actual.dtype in (torch.float32, torch.float64)
    if unit is None:
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        return
    finite = expected[expected.isfinite()]
    largest = max(unit, float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * largest, equal_nan=True)
