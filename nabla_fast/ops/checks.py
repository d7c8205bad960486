"""What every operator refuses, whichever back end would run it: one rule each, one sentence each.

Types, shapes, devices and numbers are checked wherever an operator is called or traced. Values inside tensors are
checked on the CPU only: to ask a GPU for them would hold up the host. There a row with such a value gives NaN, or
makes no step, and nothing is indexed with it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Between these, 1 / tau is a normal float32 number, as kernels need it.
_TAUS = (2.0**-126, 2.0**126)
_Number = TypeVar("_Number", int, float)


def floats(x: Tensor | None, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises TypeError for a tensor of another dtype, or one that is not dense."""
    dense(x, name)
    if x is not None and x.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be a tensor of dtype {wanted}, got {x.dtype}")


def dense(x: Tensor | None, name: str) -> None:
    """Raises TypeError for a tensor without strides, as sparse ones are."""
    if x is not None and x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def one_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where tensors are not all on the device of the first."""
    first: tuple[str, torch.device] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(f"{name} must be on the device of {first[0]}, {first[1]}, got {x.device}")


def shape(x: Tensor | None, wanted: tuple[int | str, ...], name: str) -> None:
    """Raises ValueError where a size differs from the one wanted; a letter stands for any size."""
    if x is None:
        return
    fits = x.ndim == len(wanted)
    if not fits or any(not isinstance(n, str) and size != n for size, n in zip(x.shape, wanted, strict=True)):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, wanted))}), got {tuple(x.shape)}")


def logits(z: Tensor) -> None:
    """Checks logits z (N, V)."""
    floats(z, "z")
    shape(z, ("N", "V"), "z")
    _entries(z.shape[1], "z", z)


def head(h: Tensor, weight: Tensor, scale: float, softcap: float, name: str = "h") -> None:
    """Checks hidden states h (N, d) and the output head that they meet."""
    floats(h, name)
    floats(weight, "head.weight")
    shape(h, ("N", "d"), name)
    shape(weight, ("V", h.shape[1]), "head.weight")
    _entries(weight.shape[0], "head.weight", weight)
    number("head.scale", scale)
    number("head.softcap", softcap, least=0.0)


def table(x: Tensor | None, vocabulary: int, name: str) -> None:
    """Checks an embedding table (V, d_k)."""
    floats(x, name)
    shape(x, (vocabulary, "d"), name)


def rows(x: Tensor | None, count: int, width: int, name: str) -> None:
    """Checks a float tensor (N, d_k) that meets a table or stands beside logits."""
    floats(x, name)
    shape(x, (count, width), name)


def integers(x: Tensor | None, count: int, name: str) -> None:
    """Checks an int64 tensor (N,)."""
    dense(x, name)
    if x is not None and x.dtype != torch.int64:
        raise TypeError(f"{name} must be a tensor of dtype int64, got {x.dtype}")
    shape(x, (count,), name)


def separate(name: str, x: Tensor) -> None:
    """Raises ValueError where entries share memory, for a tensor that is written to."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is written to, so its entries must not share memory, got strides {x.stride()}")


def temperature(tau: float) -> None:
    """Raises ValueError unless tau is a positive number that float32 can divide by."""
    if not _TAUS[0] <= tau <= _TAUS[1]:
        raise ValueError(f"tau must be a finite number above 0 (from {_TAUS[0]:.1e} to {_TAUS[1]:.1e}), got {tau}")


def thresholds(entropy_threshold: float | None, confidence_threshold: float | None) -> None:
    """Raises ValueError for a threshold that is NaN: nothing would pass it."""
    for name, value in (("entropy_threshold", entropy_threshold), ("confidence_threshold", confidence_threshold)):
        if value is not None and math.isnan(value):
            raise ValueError(f"{name} must be a number or None, got {value}")


def number(name: str, value: _Number, least: _Number | None = None) -> None:
    """Raises ValueError for a number that is not finite, or below ``least``."""
    if not math.isfinite(value) or (least is not None and value < least):
        raise ValueError(
            f"{name} must be a finite number{'' if least is None else f' of at least {least}'}, got {value}"
        )


def ids(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Raises IndexError for a token id outside the vocabulary, on the CPU; -1 is none that counts from the end."""
    for token in _extremes(tokens):
        if not 0 <= token < vocabulary:
            raise IndexError(f"{name} must hold token ids from 0 to {vocabulary - 1}, got {int(token)}")


def numbers(name: str, x: Tensor) -> None:
    """Raises ValueError for an entry that is negative, NaN or infinite, on the CPU."""
    for value in _extremes(x):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must hold finite numbers of at least 0, got {value}")


def ascending(name: str, x: Tensor | None) -> None:
    """Raises ValueError where an entry is less than the one before it, on the CPU."""
    if x is not None and x.device.type == "cpu" and bool((x[1:] < x[:-1]).any()):
        raise ValueError(f"{name} must be in ascending order, got {x.tolist()}")


def _entries(vocabulary: int, name: str, x: Tensor) -> None:
    if vocabulary == 0:
        raise ValueError(f"{name} must have at least one vocabulary entry, got shape {tuple(x.shape)}")


def _extremes(x: Tensor) -> tuple[float, ...]:
    """The least and the greatest entry; NaN is either."""
    if x.device.type != "cpu" or x.numel() == 0:
        return ()
    return tuple(value.item() for value in x.aminmax())
