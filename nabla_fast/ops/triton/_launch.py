"""What every launch needs: input checks, how the vocabulary is split, strides."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# With TRITON_INTERPRET=1, kernels run on CPU tensors; Triton decides it when a kernel is decorated.
INTERPRET = bool(triton.knobs.runtime.interpret)


def check(*tensors: Tensor) -> None:
    """Raises where the kernels cannot run: float64 would silently lose precision, CPU memory is out of reach."""
    for x in tensors:
        if x.dtype == torch.float64:
            raise ValueError("backend 'triton' computes in float32, got a float64 tensor; use 'reference'")
        if x.device.type == "cpu" and not INTERPRET:
            raise ValueError("backend 'triton' takes CUDA tensors, got a CPU tensor (TRITON_INTERPRET=1 allows it)")


def run(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Launches a kernel on the tensors' own GPU, whatever the current one is.

    Fused multiply-adds are asked for by name, because Triton's default for them changes between versions;
    ``enable_fp_fusion=False`` among the arguments asks for none.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        # Left to itself, ptxas now and then spills a few bytes to stay at 128 registers; let it have what there is.
        most = min(255, 65536 // (32 * arguments["num_warps"]))
        kernel[grid](**{"enable_fp_fusion": True, **arguments}, maxnreg=most)


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


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """``{name_axis: stride}``; 0 where there is no tensor."""
    return {f"{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}


def same_table(a: Tensor, b: Tensor) -> bool:
    """Whether two tables are one and the same memory (tied embeddings)."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.device == b.device
    return alike and a.device.type != "meta" and a.data_ptr() == b.data_ptr()
