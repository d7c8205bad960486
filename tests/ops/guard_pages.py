"""Tensors in memory between two pages that nobody may touch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_PAGE = 4096
FILL = 0xA5  # between the entries of what is written to
_LIBC = ctypes.CDLL(None)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: Tensor, *, written: bool = False, at_start: bool = False) -> Tensor:
    """A copy with the same strides whose memory ends where a forbidden page begins, or begins where one ends.

    Read-only, unless it is ``written`` to.
    """
    if tensor.numel() == 0:
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = extent * tensor.element_size()
    pages = -(-count // _PAGE)
    base = _LIBC.mmap(None, (pages + 2) * _PAGE, 3, 0x22, -1, 0) + _PAGE
    assert _LIBC.mprotect(base - _PAGE, _PAGE, 0) == 0
    assert _LIBC.mprotect(base + pages * _PAGE, _PAGE, 0) == 0
    memory = (ctypes.c_ubyte * count).from_address(base if at_start else base + pages * _PAGE - count)
    ctypes.memset(memory, FILL, count)
    view = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    view[tuple(once)].copy_(tensor[tuple(once)])
    if not written:
        assert _LIBC.mprotect(base, pages * _PAGE, 1) == 0
    return view


def between(tensor: Tensor) -> Tensor:
    """The bytes of a guarded tensor's memory that belong to no entry."""
    flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    inside = torch.zeros(flat.shape, dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return flat.view(torch.uint8).reshape(len(flat), -1)[~inside]
