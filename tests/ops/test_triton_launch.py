"""`launch`, which keeps compiled kernels, against Triton's own specialisation; and the order of memory in a merge.

No GPU is needed: Triton's binder and compiler run without one.
"""

from __future__ import annotations

import itertools
import os
import re
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from nabla_fast.ops.triton import _launch
from nabla_fast.ops.triton._softmax import outputs

TARGET = GPUTarget("cuda", 90, 32)


@triton.jit
def one_argument(X, Y, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), X)


@triton.jit
def merge_kernel(PARTS, COUNTER, OUT, BLOCK: tl.constexpr):
    tl.store(PARTS + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0))
    if not _launch.last_to_arrive(COUNTER, tl.num_programs(0)):
        return
    parts = tl.load(PARTS + tl.arange(0, BLOCK) * BLOCK, cache_modifier=".cg")
    tl.store(OUT, tl.sum(parts, axis=0))


def arguments():
    memory = torch.empty(64, dtype=torch.int8)
    yield from (memory[i:].view(dtype) for i in (0, 8, 16) for dtype in (torch.float32, torch.int64, torch.bfloat16))
    yield from (memory[1:], torch.empty(0, dtype=torch.bool), None, 0.0, 1.0, float("inf"))
    yield from (0, 1, 2, 16, 17, 32, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31), -(2**31) - 16)
    yield from (2**40, 2**63 - 1, 2**63, 2**63 + 16)
    x = torch.empty(6, 16)
    yield from map(_launch.matrix, (x, x[:, :15], x[:, 1:], x.T, x.bfloat16(), x[:, :1].contiguous()))
    yield from (outputs(8, x.device, *names) for names in ((), ("top",), ("top", "q"), ("token",)))


def test_what_triton_tells_apart_has_another_kind():
    binder = create_function_from_signature(one_argument.signature, one_argument.params, make_backend(TARGET))
    y = torch.empty(16)
    given = [(_launch.kind(x), binder(x, y, 8)[1][0]) for x in arguments()]
    for (ours, meant), (other, other_meant) in itertools.combinations(given, 2):
        assert ours != other or meant == other_meant
    assert len({kind for kind, _ in given}) < len(given)  # or nothing would ever be found again


def test_other_arguments_are_refused():
    for x in (True, "a", torch.float32, 1j):
        with pytest.raises(TypeError, match="kernels take tensors"):
            _launch.kind(x)


class Compiled:
    """In place of a compiled kernel: remembers what it is launched with."""

    def __init__(self) -> None:
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """In place of a kernel that Triton compiles when it is called."""

    arg_names = ("X", "N", "BLOCK")

    def __init__(self) -> None:
        self.calls = []

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.calls.append((grid, arguments, named, Compiled()))
            return self.calls[-1][-1]

        return call


def test_a_compiled_kernel_is_launched_again_for_arguments_of_the_same_kinds_only():
    kernel, device, x = Kernel(), torch.device("cpu"), torch.empty(64)

    def call(*arguments, warps=4, grid=(3, 2), block=8, **options):
        before = len(kernel.calls)
        _launch.launch(kernel, grid, device, arguments, {"BLOCK": block}, warps, **options)
        return len(kernel.calls) > before

    with patch.object(_launch, "_COMPILED", {}), patch.object(_launch, "CompiledKernel", Compiled):
        assert call(x, 5)
        assert kernel.calls[0][:2] == ((3, 2), (x, 5))
        assert kernel.calls[0][2] == {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": True, "maxnreg": 255}
        assert not call(x[4:], 7, grid=(9,))
        (grid, (first, *rest)) = kernel.calls[0][3].launched[0]
        assert (grid, rest) == ((9, 1, 1), [7, 8])
        assert first.data_ptr() == x[4:].data_ptr()
        assert call(x[1:], 5)
        assert call(x, 1)
        assert call(x, 16)
        assert call(x, 2**31)
        assert call(x.int(), 5)
        assert call(None, 5)
        assert call(x, 5, block=16)
        assert call(x, 5, warps=8)
        assert call(x, 5, num_stages=3)
        assert not call(x, 5)


def test_counters_grow_and_are_kept():
    with patch.object(_launch, "_COUNTERS", {}):
        device = torch.device("cpu")
        one = _launch.counters(3, device)
        assert one.data_ptr() == _launch.counters(1024, device).data_ptr()
        assert len(_launch.counters(5000, device)) == 5000


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_stores_come_before_the_counter_and_loads_after(architecture):
    signature = {"PARTS": "*i32", "COUNTER": "*i32", "OUT": "*i32", "BLOCK": "constexpr"}
    source = ASTSource(merge_kernel, signature, {(3,): 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
    found = [
        (name, place.start())
        for name, pattern in {
            "store": r"st\.global",
            "barrier": r"bar(rier)?(\.cta)?\.sync",
            "atomic": r"atom\.(global\.gpu\.acq_rel|acq_rel\.gpu\.global)\S*\.add",
            "load": r"ld\.global\.cg",
        }.items()
        for place in re.finditer(pattern, ptx)
    ]
    order = [name for name, _ in sorted(found, key=lambda one: one[1])]
    atomic = order.index("atomic")
    assert order.count("atomic") == 1
    assert order[:atomic].index("store") < len(order[:atomic]) - 1 - order[:atomic][::-1].index("barrier")
    assert "load" not in order[:atomic]
    # The barrier through which the other threads learn what the atomic operation has found.
    assert order[atomic:].index("barrier") < order[atomic:].index("load")
