"""Checks of arguments that are the same for every operator and back end.

Types, shapes, devices and numbers are checked wherever an operator is called or traced. Values inside tensors are
checked on the CPU only: to ask a GPU for them would hold up the host. There a row with such a value gives NaN, or
makes no step, and nothing is indexed with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASTERS = (torch.float32, torch.float64)
# Between these, 1 / tau is a normal float32 number, as kernels need it.
_TAUS = (2.0**-126, 2.0**126)


def dtype(name: str, x: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError for a tensor of another dtype, or without strides, as sparse ones are."""
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dtype not in wanted:
        names = ", ".join(str(one).removeprefix("torch.") for one in wanted)
        raise TypeError(f"{name} must be a tensor of dtype {names}, got {x.dtype}")


def shape(name: str, x: Tensor, wanted: Sequence[int | str]) -> None:
    """Raises ValueError where a size differs from the one wanted; a letter stands for any size."""
    fits = x.ndim == len(wanted)
    if not fits or any(not isinstance(n, str) and size != n for size, n in zip(x.shape, wanted, strict=True)):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, wanted))}), got {tuple(x.shape)}")


def vocabulary(name: str, x: Tensor, size: int) -> None:
    """Raises ValueError for a vocabulary without entries."""
    if size == 0:
        raise ValueError(f"{name} must have at least one vocabulary entry, got shape {tuple(x.shape)}")


def device(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """Raises ValueError for a tensor that is not where the first is."""
    if x.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {x.device}")


def separate(name: str, x: Tensor) -> None:
    """Raises ValueError where entries share memory, for a tensor that is written to."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is written to, so its entries must not share memory, got strides {x.stride()}")


def temperature(name: str, tau: float) -> None:
    """Raises ValueError unless tau is a positive number that float32 can divide by."""
    if not _TAUS[0] <= tau <= _TAUS[1]:
        raise ValueError(f"{name} must be a finite number above 0 (from {_TAUS[0]:.1e} to {_TAUS[1]:.1e}), got {tau}")


def sampling_temperature(name: str, value: float) -> None:
    """Raises ValueError unless a temperature is 0 or as `temperature` asks for."""
    if value != 0:
        temperature(name, value)


def rank(name: str, value: int | None) -> None:
    """Raises ValueError for a number of tokens below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1 or None, got {value}")


def share(name: str, value: float | None) -> None:
    """Raises ValueError for a share that is not above 0 and at most 1."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, or None, got {value}")


def threshold(name: str, value: float | None) -> None:
    """Raises ValueError for a threshold that is NaN: nothing would pass it."""
    if value is not None and math.isnan(value):
        raise ValueError(f"{name} must be a number or None, got {value}")


def finite(name: str, value: float) -> None:
    """Raises ValueError for a number that is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")


def at_least_zero(name: str, value: float) -> None:
    """Raises ValueError for a number that is negative or not finite."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def ids(name: str, tokens: Tensor, size: int) -> None:
    """Raises IndexError for a token id outside a vocabulary of ``size``; -1 is none that counts from the end."""
    for token in _extremes(tokens):
        if not 0 <= token < size:
            raise IndexError(f"{name} must hold token ids from 0 to {size - 1}, got {int(token)}")


def numbers(name: str, x: Tensor, _: int) -> None:
    """Raises ValueError for an entry that is negative, NaN or infinite."""
    for value in _extremes(x):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must hold finite numbers of at least 0, got {value}")


def ascending(name: str, x: Tensor, _: int) -> None:
    """Raises ValueError where an entry is less than the one before it."""
    if bool((x[1:] < x[:-1]).any()):
        raise ValueError(f"{name} must be in ascending order, got {x.tolist()}")


def _extremes(x: Tensor) -> tuple[float, ...]:
    """The least and the greatest entry; NaN is either."""
    return () if x.numel() == 0 else tuple(value.item() for value in x.aminmax())
