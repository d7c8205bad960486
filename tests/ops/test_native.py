"""What native kernels alone have: threads, instruction sets, memory, checks of pointers, a library that may lack."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from back_ends import hidden_states, near
from dto_cases import check, judged
from processes import lesser_instruction_sets, run_python
from torch import Tensor

from nabla_fast.ops import native
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import Backend, double, logits

if not native.available():
    pytest.skip(f"no native library: {native.why_missing()}", allow_module_level=True)

cpp = Backend("native")
HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("two_threads")


def test_a_row_does_not_depend_on_the_batch_or_the_threads() -> None:
    z = logits(2, 5, 30011)
    h, head = hidden_states(70, 5000, 33, (torch.float32, torch.float32))
    together, linear = cpp.relaxed_stats(z, 0.9), cpp.linear_relaxed_stats(h, head)
    torch.set_num_threads(1)
    alone = [cpp.relaxed_stats(row[None], 0.9) for row in z]
    for index, statistic in enumerate(together):
        assert torch.equal(statistic, torch.cat([row[index] for row in alone]))
    rows = [cpp.linear_relaxed_stats(row[None], head) for row in h]
    near(linear, double([torch.cat(list(column)) for column in zip(*rows, strict=True)]), 2e-6)


def test_peaked_rows_skip_without_loss() -> None:
    """Most tiles of the head weigh nothing here, so they are left out."""
    check(cpp, judged(1, 20000, 64, spread=16, seed=19, steps=3), 3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_beside_a_head_of_real_size(weight_dtype: torch.dtype) -> None:
    check(cpp, judged(1, 49152, 576, table=weight_dtype, spread=3, seed=16, steps=2), 2)


# Kernels take raw pointers, whoever calls them


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e300])
def test_rejects_tau(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        cpp.relaxed_stats(torch.zeros(1, 3), tau)
    with pytest.raises(ValueError, match="tau must be positive"):
        cpp.linear_relaxed_stats(torch.zeros(1, 3), Head(torch.zeros(2, 3)), tau)


def test_rejects_shapes_and_dtypes() -> None:
    with pytest.raises(RuntimeError, match=r"z must have shape \(N, V\)"):
        cpp.relaxed_stats(torch.zeros(3))
    with pytest.raises(RuntimeError, match="at least one vocabulary entry"):
        cpp.relaxed_stats(torch.zeros(3, 0))
    with pytest.raises(RuntimeError, match=r"weight must have shape \(V, 2\)"):
        cpp.linear_relaxed_stats(torch.zeros(2, 2), Head(torch.zeros(5, 3)))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(TypeError, match="relaxed_stats: z must be of a float dtype"):
            cpp.relaxed_stats(torch.zeros(3, 3).to(dtype))
    with pytest.raises(TypeError, match="float dtype"):
        cpp.linear_relaxed_stats(torch.zeros(2, 3).long(), Head(torch.zeros(5, 3)))


def test_only_dense_tensors_of_the_cpu_whatever_their_place() -> None:
    ids, z = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    others: list[tuple[Tensor, str]] = [
        (ids.to_sparse(), "must be a dense tensor, got layout Sparse"),
        (ids.to("meta"), "must be on the CPU, got a tensor on meta"),
    ]
    for other, reason in others:
        with pytest.raises((TypeError, RuntimeError), match=f"token_diff: new {reason}"):
            cpp.token_diff(ids, other)
        with pytest.raises((TypeError, RuntimeError), match=f"tables.1. {reason}"):
            cpp.straight_through_embedding(z, [z.T, other])


def test_a_tensor_without_its_storage_is_refused() -> None:
    z = torch.zeros(2, 3)
    z.untyped_storage().resize_(20)
    with pytest.raises(RuntimeError, match="z must have storage for all of its elements, which take 24 bytes, got 20"):
        cpp.relaxed_stats(z)


MEMORY = """
import resource, torch
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend, dto_arguments
cpp = Backend("native")
torch.manual_seed(0)
torch.set_num_threads(2)
h, weight, table, small = torch.randn(400, 32), torch.randn(40000, 32), torch.randn(40000, 16), torch.randn(400, 16)
head = Head(weight)
factors, tables = TokenGradient(h, h, small), Tables(head, weight, table, 0.1)
def linear(rows):
    cpp.linear_relaxed_stats(h[:rows], head)
    cpp.log_likelihood_gradient(h[:rows], head, torch.zeros(rows, dtype=torch.int64), True)
    cpp.gradient_norm(factors.rows(slice(0, rows)), tables)
def embeddings(rows):
    cpp.linear_straight_through_embedding(h[:rows], head, [table], 1.0)
    cpp.linear_soft_embedding(h[:rows], head, table, 1.0)
    cpp.linear_relaxed_backward(h[:rows], head, [small[:rows]], [table], 1.0)
def steps(rows):
    state, none = [h[:rows].clone() for _ in range(3)], torch.zeros(rows).long()
    few = factors.rows(slice(0, rows))
    rates = torch.full((5,), 1e-3)
    cpp.dto_step(*dto_arguments(*state, none, none.clone(), rates, few, tables, latents=True, max_steps=2))
for run in (linear, embeddings, steps):
    run(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(400)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_hidden_states_make_no_temporary_over_the_vocabulary() -> None:
    """In a fresh process: one (N, V) float32 tensor would be 61 MiB."""
    assert max(map(float, run_python("-c", MEMORY).split())) < 20


@lesser_instruction_sets
def test_on_lesser_instruction_sets(capability: str) -> None:
    """Where torch, and so the library, leaves instruction sets above ``capability`` alone."""
    if torch.backends.cpu.get_cpu_capability() == capability.upper():
        pytest.skip("the other tests ran on it")
    files = ("stats", "likelihood", "gradient_norm", "embedding", "dto_step", "dto_step_rows")
    some = "native and not (real or nearly or wrong or refused or straight or gradcheck or property)"
    run_python(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some),
        *(str(HERE / f"test_{name}.py") for name in files),
        ATEN_CPU_CAPABILITY=capability,
    )


@lesser_instruction_sets
def test_layers_on_lesser_instruction_sets(capability: str) -> None:
    if torch.backends.cpu.get_cpu_capability() == capability.upper():
        pytest.skip("the other tests ran on it")
    files = (str(HERE / f"test_{name}.py") for name in ("linear", "token_kernels", "decoder_layers"))
    run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, ATEN_CPU_CAPABILITY=capability)


# A library that is not there


def run_with_package_at(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter that looks for the library in ``directory``."""
    program = f"from pathlib import Path; from nabla_fast.ops import native; native._PACKAGE = Path({str(directory)!r})"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", f"{program}\n{code}"],
        env={**os.environ, "NABLA_FAST_REQUIRE_NATIVE": "0"},
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
import os, torch
print(native.available(), native.available(), native.why_missing())
try:
    torch.ops.nabla_fast.native_token_diff(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
except RuntimeError as error:
    print(error)
os.environ["NABLA_FAST_REQUIRE_NATIVE"] = "1"
native.available()
"""
    result = run_with_package_at(tmp_path, code)
    assert result.returncode != 0
    availability, error = result.stdout.splitlines()
    assert availability.startswith("False False the native library")
    assert reason in availability
    assert reason in error
    assert result.stderr.count("runs without its C++ operators") == 1
    required = result.stderr.splitlines()[-1]
    assert required.startswith("RuntimeError: NABLA_FAST_REQUIRE_NATIVE=1, but the native library")
    assert reason in required


def test_a_library_of_other_arguments_is_told_and_ends_no_process() -> None:
    code = """
import torch
own = torch.library.Library.define
def define(self, schema, *rest, **more):
    return own(self, schema.replace("native_token_diff(", "native_token_diff(Tensor more, "), *rest, **more)
torch.library.Library.define = define
from nabla_fast import ops
from nabla_fast.ops import native
print(native.why_missing())
tokens = torch.zeros(1, 2, dtype=torch.int64)
print(ops.token_diff(tokens, tokens).first.tolist())
"""
    environment = {**os.environ, "NABLA_FAST_REQUIRE_NATIVE": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said, first = result.stdout.splitlines()
    assert said.startswith("the native library is of another version of nabla_fast; install it again")
    assert first == "[2]"


def test_a_library_without_a_kernel_is_of_an_earlier_version() -> None:
    operator = native.define("native_of_a_later_version(Tensor x) -> Tensor")
    assert not native.has("of_a_later_version")
    with pytest.raises(RuntimeError, match=r"native_of_a_later_version .* earlier version of nabla_fast; install it"):
        operator(torch.zeros(1))


def test_build_info_names_the_running_torch() -> None:
    info = native.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert set(info) == {"torch", "compiler", "cuda_architectures"}
