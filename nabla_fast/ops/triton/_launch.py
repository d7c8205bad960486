# mypy: allow-untyped-defs, allow-incomplete-defs
"""What every launch needs: input checks, how the vocabulary is split, strides; a launch that costs the host little."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

# With TRITON_INTERPRET=1, kernels run on CPU tensors; Triton decides it when a kernel is decorated.
INTERPRET = bool(triton.knobs.runtime.interpret)


def check(*tensors: Tensor) -> None:
    """Raises where the kernels cannot run: float64 would silently lose precision, CPU memory is out of reach."""
    for x in tensors:
        if x.dtype == torch.float64:
            raise ValueError("backend 'triton' computes in float32, got a float64 tensor; use 'reference'")
        if x.device.type == "cpu" and not INTERPRET:
            raise ValueError("backend 'triton' takes CUDA tensors, got a CPU tensor (TRITON_INTERPRET=1 allows it)")


class Matrix(NamedTuple):
    """A matrix among a kernel's arguments: inside, where its first entry is, and what a row and a column are apart."""

    data: Tensor
    row_stride: int
    column_stride: int


def matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, *x.stride())


_COMPILED: dict[tuple[Any, ...], CompiledKernel] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
    **options: Any,
) -> None:
    """Launches a kernel on the tensors' own GPU; from the second call on, what Triton compiled is launched at once.

    Triton binds arguments by name and finds out at every call how each is specialised, which takes longer than many a
    kernel. Here that is a look-up by `kind`, which tells apart whatever Triton does. Fused multiply-adds are asked for
    by name, because Triton's default for them changes between versions.

    Args:
        arguments: tensors, None, integers, floats, and named tuples of them, in the order of the kernel's parameters.
        constants: its constexpr parameters, which come last, in order.
        options: num_stages; ``enable_fp_fusion=False`` for no fused multiply-adds.
    """
    key = (id(kernel), device, num_warps, *options.values(), *constants.values(), *map(kind, arguments))
    compiled = _COMPILED.get(key)
    guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
            return
        # Constants are given by name here, but by place later.
        assert [*kernel.arg_names[len(arguments) :]] == [*constants], kernel.arg_names
        # Left to itself, ptxas now and then spills a few bytes to stay at 128 registers; let it have what there is.
        most = min(255, 65536 // (32 * num_warps))
        given = {**constants, "num_warps": num_warps, "enable_fp_fusion": True, **options, "maxnreg": most}
        compiled = kernel[grid](*arguments, **given)
    if isinstance(compiled, CompiledKernel):  # neither of the interpreter nor one that is still being compiled
        _COMPILED[key] = compiled


def kind(argument: Any) -> Any:
    """What a compiled kernel depends on in an argument: at least all that Triton specialises it on.

    Of a tensor its dtype and whether its address is a multiple of 16; of an integer whether it is 1, a multiple of 16,
    and how many bits it takes.
    """
    if isinstance(argument, Tensor):
        # A tensor without memory stands for one at an aligned address.
        address = 0 if argument.device.type == "meta" else argument.data_ptr()
        return argument.dtype, address % 16
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31, argument < 2**63
    if argument is None or type(argument) is float:
        return type(argument)
    raise TypeError(f"kernels take tensors, None, int and float, got {type(argument).__name__}")


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """``count`` int32 zeros for `last_to_arrive`, which leaves them zeros.

    Of one stream, whose launches do not run at the same time. What a CUDA graph holds may be replayed beside it, and so
    has its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _COUNTERS.get((device, stream))
    if found is None or len(found) < count:
        found = _COUNTERS[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return found


@triton.jit
def last_to_arrive(COUNTER, programs):
    """Whether ``programs`` - 1 others have been here before, all of whose stores can then be read.

    The barrier puts the stores of all threads before the atomic operation of one, which releases them to the GPU, and
    acquires the others'. Whoever is last sets the counter back, so that the next launch, or the replay of a graph,
    begins at 0.
    """
    tl.debug_barrier()
    last = tl.atomic_add(COUNTER, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(COUNTER, 0)
    return last


@cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU. The interpreter gets a few, so that splits are taken there too; no device counts as an H100."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 3 if device.type == "cpu" else 132


@cache
def architecture(device: torch.device) -> int:
    """The GPU's compute capability, 90 for an H100, which no device counts as."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def split(length: int, unit: int, programs: int, device: torch.device, waves: int = 2) -> tuple[int, int]:
    """Splits ``length`` into parts of whole units, until ``programs`` times the parts fill the GPU.

    Returns:
        The length of a part, a multiple of ``unit``, and the number of parts, none of which is empty.
    """
    units = triton.cdiv(length, unit)
    parts = max(1, min(units, 256, waves * multiprocessors(device) // max(1, programs)))
    size = triton.cdiv(units, parts) * unit
    return size, triton.cdiv(length, size)


def same_table(a: Tensor, b: Tensor) -> bool:
    """Whether two tables are one and the same memory (tied embeddings)."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.device == b.device
    return alike and a.device.type != "meta" and a.data_ptr() == b.data_ptr()
