"""The C++ operators against their meaning in plain float64 PyTorch, and what happens without their library."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast.ops import native

if not native.available():
    pytest.skip(f"no native library: {native.why_missing()}", allow_module_level=True)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected_stats(z: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = z.double() / tau
    undefined = x.isnan().any(-1) | (x == math.inf).any(-1) | (x == -math.inf).all(-1)
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    statistics = [p.amax(-1), x.logsumexp(-1), -torch.where(p > 0, p * log_p, 0).sum(-1)]
    # argmax promises no order among equals, so the lowest index is looked up.
    is_max = z == z.amax(-1, keepdim=True)
    token = torch.where(is_max, torch.arange(z.shape[-1]), z.shape[-1]).amin(-1)
    max_prob, lse, entropy = (s.masked_fill(undefined, math.nan) for s in statistics)
    return max_prob, lse, entropy, token.masked_fill(undefined, -1)


def assert_stats(z: Tensor, tau: float) -> None:
    actual = native.relaxed_stats(z, tau)
    exact = z.dtype == torch.float64
    for ours, meant in zip(actual[:3], expected_stats(z, tau)[:3], strict=True):
        assert ours.dtype == (torch.float64 if exact else torch.float32)
        rtol, atol = (1e-12, 1e-12) if exact else (2e-6, 2e-6)
        torch.testing.assert_close(ours.double(), meant, rtol=rtol, atol=atol, equal_nan=True)
    assert torch.equal(actual[3], expected_stats(z, tau)[3])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 33, 8193, 49152])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_relaxed_stats_random(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    z = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 4
    assert_stats(z.to(dtype), 0.7)


@pytest.mark.parametrize("columns", [1, 49152])
def test_relaxed_stats_no_rows(columns: int) -> None:
    assert [tuple(out.shape) for out in native.relaxed_stats(torch.empty(0, columns), 1.0)] == [(0,)] * 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_relaxed_stats_strides(dtype: torch.dtype) -> None:
    base = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for z in (base.T, base[:, ::3], base[::2, 5:-1], base[:1].expand(7, -1), base[:, :1].expand(-1, 9)):
        assert_stats(z, 1.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [2, 33, 20000])
def test_relaxed_stats_ties_take_the_lowest_index(columns: int, dtype: torch.dtype) -> None:
    z = torch.zeros(4, columns, dtype=dtype)
    z[1, -1] = z[1, columns // 2] = 5
    z[2, 0] = z[2, -1] = 5
    z[3, -1] = 5
    assert native.relaxed_stats(z, 1.0)[3].tolist() == [0, columns // 2, 0, columns - 1]
    assert_stats(z, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 33, 20000])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_relaxed_stats_undefined_rows(value: float, at: int, columns: int, dtype: torch.dtype) -> None:
    z = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    z[1, at] = value
    z[2] = -math.inf
    z[3, :] = -math.inf
    z[3, at] = value
    assert native.relaxed_stats(z, 1.0)[3][1:4].tolist() == [-1, -1, -1]
    assert_stats(z, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_relaxed_stats_masked_entries_add_nothing(dtype: torch.dtype) -> None:
    z = torch.full((3, 20000), -math.inf, dtype=dtype)
    z[0, 19999] = -3
    z[1, [4, 17000]] = 2
    z[2, 9000:9100] = 0.5
    assert_stats(z, 0.6)
    torch.testing.assert_close(
        native.relaxed_stats(z, 0.6)[2].double(),
        torch.tensor([0, math.log(2), math.log(100)]).double(),
        rtol=0,
        atol=1e-6,
    )


def test_relaxed_stats_rising_rows() -> None:
    """The maximum moves in every block, so every partial sum is rescaled, some of them to nothing."""
    ramp = torch.linspace(-300, 300, 30000)
    assert_stats(torch.stack([ramp, ramp.flip(0), ramp.abs(), ramp / 100]), 1.0)
    assert_stats(torch.tensor([[-3e38, 3e38, 0.0]]), 1.0)
    cliff = torch.full((1, 20000), -1.7e308, dtype=torch.float64)
    cliff[0, 15000] = 1.7e308
    assert_stats(cliff, 1.0)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 3000),
    scale=st.floats(0.01, 30),
    tau=st.floats(0.05, 5),
    holes=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_relaxed_stats_property(rows: int, columns: int, scale: float, tau: float, holes: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
    z[torch.rand(rows, columns, generator=generator) < holes] = -math.inf
    assert_stats(z, tau)


def test_relaxed_stats_row_does_not_depend_on_batch_or_threads() -> None:
    z = torch.randn(5, 30011, generator=torch.Generator().manual_seed(2))
    together = native.relaxed_stats(z, 0.9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [native.relaxed_stats(row[None], 0.9) for row in z]
    finally:
        torch.set_num_threads(threads)
    for index, statistic in enumerate(together):
        assert torch.equal(statistic, torch.cat([row[index] for row in alone]))


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e300])
def test_relaxed_stats_rejects_tau(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        native.relaxed_stats(torch.zeros(1, 3), tau)


def test_relaxed_stats_rejects_shapes_and_dtypes() -> None:
    with pytest.raises(RuntimeError, match=r"z must have shape \(N, V\)"):
        native.relaxed_stats(torch.zeros(3), 1.0)
    with pytest.raises(RuntimeError, match="at least one column"):
        native.relaxed_stats(torch.zeros(3, 0), 1.0)
    with pytest.raises(NotImplementedError, match="relaxed_stats"):
        native.relaxed_stats(torch.zeros(3, 3, dtype=torch.int64), 1.0)


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 6), length=st.integers(0, 40), changes=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_token_diff(rows: int, length: int, changes: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(0, 2**40, (rows, length), generator=generator)
    changed = torch.rand(rows, length, generator=generator) < changes
    first, count = native.token_diff(old, torch.where(changed, old + 2**33, old))
    positions = torch.where(changed, torch.arange(length), length)
    meant = torch.cat([positions, torch.full((rows, 1), length)], dim=1).amin(1)
    assert torch.equal(first, meant)
    assert torch.equal(count, changed.sum(1))


def test_token_diff_strides_and_many_rows() -> None:
    base = torch.randint(0, 3, (90, 4000), generator=torch.Generator().manual_seed(3))
    old, new = base.T, base.flip(0).T
    first, count = native.token_diff(old, new)
    assert torch.equal(count, (old != new).sum(1))
    assert torch.equal(first, torch.where(old != new, torch.arange(90), 90).amin(1))


def test_token_diff_rejects() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"one shape \(B, m\)"):
        native.token_diff(ids, ids[:1])
    with pytest.raises(RuntimeError, match=r"one shape \(B, m\)"):
        native.token_diff(ids[0], ids[0])
    with pytest.raises(TypeError, match="must be int64"):
        native.token_diff(ids, ids.int())


def test_opcheck() -> None:
    ids = torch.randint(0, 3, (4, 9))
    torch.library.opcheck(torch.ops.nabla_fast.token_diff.default, (ids, ids.flip(0)))
    for z in (torch.randn(3, 50), torch.randn(50, 3, dtype=torch.float64).T, torch.randn(0, 5).bfloat16()):
        torch.library.opcheck(torch.ops.nabla_fast.relaxed_stats.default, (z, 0.7))


def test_compile_with_dynamic_rows() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    # Our operators only: Inductor compiles no C++ for them, which it cannot where the path to torch has a space.
    def function(z: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        assert native.available()
        return *native.relaxed_stats(z, 0.7), *native.token_diff(old, new)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    inductor = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (3, 4, 7):
        arguments = torch.randn(rows, 100), torch.randint(0, 3, (rows, 8)), torch.randint(0, 3, (rows, 8))
        eager = function(*arguments)
        for outputs in (compiled(*arguments), inductor(*arguments)):
            assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
    assert len(graphs) == 1


def run_with_package_at(directory: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter that looks for the library in ``directory``."""
    program = f"from pathlib import Path; from nabla_fast.ops import native; native._PACKAGE = Path({str(directory)!r})"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", f"{program}\n{code}"],
        env={**os.environ, "NABLA_FAST_REQUIRE_NATIVE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def break_library(directory: Path) -> None:
    library = native._library_path(native._PACKAGE)
    # The length stays: the system maps the file by the sizes in it, and kills whoever reads behind its end.
    (directory / library.name).write_bytes(library.read_bytes()[::-1])


def name_for_another_torch(directory: Path) -> None:
    (directory / "_native_torch_2_9_1.so").touch()


def leave_out(directory: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (break_library, "cannot load"),
        (name_for_another_torch, "built for torch 2.9.1, running"),
        (leave_out, "was not built"),
    ],
)
def test_without_a_usable_library(prepare: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    code = """
import torch
print(native.available(), native.available(), native.why_missing())
try:
    native.token_diff(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
except RuntimeError as error:
    print(error)
"""
    result = run_with_package_at(tmp_path, code)
    assert result.returncode == 0, result.stderr
    availability, error = result.stdout.splitlines()
    assert availability.startswith("False False the native library")
    assert reason in availability
    assert reason in error
    assert result.stderr.count("runs without its C++ operators") == 1

    required = run_with_package_at(tmp_path, "native.available()", NABLA_FAST_REQUIRE_NATIVE="1")
    assert required.returncode != 0
    assert "RuntimeError: NABLA_FAST_REQUIRE_NATIVE=1, but the native library" in required.stderr
    assert reason in required.stderr


def test_build_info_names_the_running_torch() -> None:
    info = native.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert set(info) == {"torch", "compiler", "cuda_architectures"}
