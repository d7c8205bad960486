"""Arguments of the CUDA `dto_step`, and the device to run it on: a GPU, or the one of tests/ops/cuda_emulation."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import cuda, reference
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, Head, Tables
from nabla_fast.testing.operators import dto_arguments

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"


@functools.cache
def emulation() -> ctypes.CDLL:
    """The kernels compiled for the emulated device, as a library like nabla_fast's own."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulated device needs g++ on Linux")
    source, folder = ROOT / "tests" / "ops" / "cuda_emulation", Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Kernels report what they read and write; device.cpp brings the functions that the sanitizer's code calls.
    flags = dict.fromkeys(("launchers", "mistakes"), "-O1 -fsanitize=thread") | {"device": "-O2 -U_FORTIFY_SOURCE"}
    common = "-std=c++17 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-missing-field-initializers"
    for name in flags:
        command = [compiler, *common.split(), *flags[name].split(), "-I", KERNELS, "-c", source / f"{name}.cpp"]
        subprocess.run([*command, "-o", folder / f"{name}.o"], check=True)
    library = folder / "emulation.so"
    objects = [folder / f"{name}.o" for name in flags]
    subprocess.run([compiler, "-shared", "-Wl,-z,defs", *objects, "-o", library], check=True)
    return cuda.declared(library)


@dataclass
class Place:
    """Where a test runs. The emulated device takes the shape of a row's team from here; a GPU has its own."""

    device: torch.device
    blocks: int = 3
    kept: bool = True

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"

    def team(self, blocks: int, kept: bool = False) -> None:
        self.blocks, self.kept = blocks, kept
        cuda._planned.cache_clear()


def emulate(monkeypatch: pytest.MonkeyPatch) -> Place:
    """Has `nabla_fast.ops.cuda` run on the emulated device, on CPU tensors."""
    library, place = emulation(), Place(torch.device("cpu"))

    @contextlib.contextmanager
    def device(_: torch.device) -> Iterator[tuple[int, None]]:
        yield 2 * place.blocks + place.kept, None

    monkeypatch.setattr(cuda, "_library", lambda: library)
    monkeypatch.setattr(cuda, "_device", device)
    # A case that the kernels do not take must fail here, not run elsewhere.
    monkeypatch.setitem(sys.modules, "nabla_fast.ops.triton", types.ModuleType("triton"))
    monkeypatch.setattr("nabla_fast.ops.triton", sys.modules["nabla_fast.ops.triton"], raising=False)
    place.team(3, True)
    return place


@dataclass
class Case:
    """Arguments of `dto_step`, and what the reference makes of them in float64."""

    state: list[Tensor]  # parameters, exp_avg, exp_avg_sq, step
    tokens: Tensor
    rates: Tensor
    gradient: Tensor
    tables: Tables
    options: dict[str, Any]

    def run(self, place: Place, rtol: float = 2e-5, atol: float = 2e-6) -> tuple[Tensor, Tensor]:
        """Runs both, compares, returns tokens and flags. ``state`` is updated in place."""
        expected = [_double(x.clone()) for x in self.state]
        tables = self.tables._replace(head=self.tables.head._replace(weight=_double(self.tables.head.weight)))
        options = {key: _double(value) if isinstance(value, Tensor) else value for key, value in self.options.items()}
        tokens, changed = reference.dto_step(
            *dto_arguments(*expected, self.tokens, _double(self.rates), _double(self.gradient), tables, **options)
        )
        ours = self.call(place)
        assert torch.equal(ours[0], tokens)
        assert torch.equal(ours[1], changed)
        for actual, meant in zip(self.state, expected, strict=True):
            torch.testing.assert_close(actual, meant.to(actual.dtype), rtol=rtol, atol=atol)
        return ours

    @property
    def arguments(self) -> tuple[DTOState, DTOInputs, Tables, DTOOptions]:
        return dto_arguments(*self.state, self.tokens, self.rates, self.gradient, self.tables, **self.options)

    def call(self, place: Place) -> tuple[Tensor, Tensor]:
        """`cuda.dto_step`, which may not wait for the GPU."""
        if place.emulated:
            return cuda.dto_step(*self.arguments)
        # Plans and modules are made by the first call.
        state, *others = self.arguments
        cuda.dto_step(DTOState(*(x.clone() for x in state)), *others)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return cuda.dto_step(*self.arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def make_case(
    place: Place,
    latents: bool,
    vocabulary: int,
    *,
    hidden: int = 16,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    softcap: float = 0.0,
    noise: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = (2 * normal(vocabulary, hidden) / hidden**0.5).to(dtype).to(place.device)
    parameters = normal(rows, hidden if latents else vocabulary)
    state = [parameters, 0.1 * normal(*parameters.shape), 0.1 * normal(*parameters.shape) ** 2]
    state.append(torch.randint(0, 3, (rows,), generator=generator))
    state = [x.to(place.device) for x in state]
    gradient = normal(rows, vocabulary).to(place.device)
    options |= {"latents": latents}
    options = {"tau": 0.7, "max_steps": 3, **options}
    if noise:
        options["soft_noise"], options["hard_noise"] = (normal(rows, vocabulary).to(place.device) for _ in range(2))
    head = Head(weight, scale, softcap)
    tokens = reference.hard_tokens(state[0], head, latents, options.get("hard_noise"))
    rates = 0.02 * torch.rand(20, generator=generator).to(place.device)
    return Case(state, tokens, rates, gradient, Tables(head, weight, weight, 0.0), options)
