"""The C++ operators: their schemas, fake kernels, and the library that holds their kernels.

The schemas are defined here, so the operators exist without the library; the library adds CPU kernels to them. It is
loaded when one of them is called for the first time, or when :func:`available` asks for it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent.parent
_STEM = "_native_torch_"

_LIBRARY = torch.library.Library("nabla_fast", "FRAGMENT")
_LIBRARY.define("token_diff(Tensor old, Tensor new) -> (Tensor first, Tensor count)")
_LIBRARY.define("relaxed_stats(Tensor z, float tau) -> (Tensor max_prob, Tensor lse, Tensor entropy, Tensor token)")


def available() -> bool:
    """Whether the native library is loaded, after trying to.

    Without it, warns once and returns False.

    Raises:
        RuntimeError: without it, if ``NABLA_FAST_REQUIRE_NATIVE=1``.
    """
    reason = why_missing()
    if reason is None:
        return True
    if os.environ.get("NABLA_FAST_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"NABLA_FAST_REQUIRE_NATIVE=1, but {reason}")
    _warn_once(reason)
    return False


def why_missing() -> str | None:
    """Why the native library cannot be used, in one clause; None if it is loaded."""
    return _load(_PACKAGE)


# torch.compile calls both while it traces and keeps their answers as constants. This is all that
# torch.compiler.assume_constant_result does, but that one imports the compiler, more than a second, for everybody.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, str]:
    """What the native library was built for: ``torch``, ``compiler``, ``cuda_architectures`` ("" without CUDA).

    Raises:
        RuntimeError: if the library is not available.
    """
    reason = why_missing()
    if reason is not None:
        raise RuntimeError(reason)
    function = ctypes.CDLL(str(_library_path(_PACKAGE))).nabla_fast_build_info
    function.restype = ctypes.c_char_p
    info: dict[str, str] = json.loads(function())
    return info


def token_diff(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where two batches of token ids differ.

    Args:
        old: (B, m) int64.
        new: (B, m) int64.

    Returns:
        The first changed position of each row, m if there is none, and the number of changed positions, both (B,)
        int64.

    Raises:
        RuntimeError: if the native library is not available or the shapes differ.
        TypeError: if a dtype is not int64.
    """
    first, count = torch.ops.nabla_fast.token_diff(old, new)
    return first, count


def relaxed_stats(z: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``softmax(z / tau)`` for each row, from one reading of z.

    Rows that hold NaN or +inf, or nothing but -inf, have no such distribution: their statistics are NaN, their token
    is -1. Sums are accumulated in float32 or wider. A row's result does not depend on the other rows or on the number
    of threads. There is no gradient.

    Args:
        z: (N, V) float16, bfloat16, float32 or float64, V >= 1, of any strides.
        tau: relaxation temperature, positive.

    Returns:
        (N,) each: maximum probability, logsumexp of ``z / tau`` and entropy in nats, float64 for a float64 input and
        float32 otherwise; the token of the maximum, int64, the lowest where several are equal.

    Raises:
        RuntimeError: if the native library is not available or z is not (N, V).
        ValueError: if tau is not positive.
    """
    max_prob, lse, entropy, token = torch.ops.nabla_fast.relaxed_stats(z, tau)
    return max_prob, lse, entropy, token


@torch.library.register_fake("nabla_fast::token_diff", lib=_LIBRARY)
def _token_diff_fake(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(old.dim() == 2 and old.shape == new.shape)
    return old.new_empty(old.shape[0]), old.new_empty(old.shape[0])


@torch.library.register_fake("nabla_fast::relaxed_stats", lib=_LIBRARY)
def _relaxed_stats_fake(z: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(z.dim() == 2)
    rows = z.shape[0]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    statistics = [z.new_empty(rows, dtype=dtype) for _ in range(3)]
    return statistics[0], statistics[1], statistics[2], z.new_empty(rows, dtype=torch.int64)


def _load_and_call(name: str) -> Callable[..., Any]:
    """A kernel that loads the library and calls the operator again.

    The dispatcher prefers the library's own kernels from then on, so loading costs later calls nothing, and a compiled
    graph may hold the operator before the library is loaded.
    """

    def kernel(tensor: Tensor, *arguments: Any) -> Any:
        if tensor.device.type != "cpu":
            raise RuntimeError(f"{name} of the native back end takes CPU tensors, got {tensor.device}")
        reason = why_missing()
        if reason is not None:
            raise RuntimeError(f"{name} of the native back end cannot run: {reason}")
        return getattr(torch.ops.nabla_fast, name)(tensor, *arguments)

    return kernel


for _name in ("token_diff", "relaxed_stats"):
    _LIBRARY.impl(_name, _load_and_call(_name), "CompositeExplicitAutograd")


def _library_path(directory: Path) -> Path:
    return directory / f"{_STEM}{_torch_version().replace('.', '_')}.so"


def _torch_version() -> str:
    return torch.__version__.split("+")[0]


@functools.cache
def _load(directory: Path) -> str | None:
    """Loads the library from ``directory``; the reason if that is not possible."""
    path = _library_path(directory)
    if not path.exists():
        others = [file.stem.removeprefix(_STEM).replace("_", ".") for file in directory.glob(f"{_STEM}*.so")]
        if others:
            # Not tried: torch's C++ interface changes between versions, and a wrong call could crash the process.
            return (
                f"the native library was built for torch {' and '.join(sorted(others))}, running {torch.__version__}; "
                "install nabla_fast again with `pip install --no-build-isolation`"
            )
        return (
            "the native library was not built when nabla_fast was installed; install it again with "
            "`NABLA_FAST_REQUIRE_NATIVE=1 pip install --no-build-isolation` to see why"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return (
            f"the native library, built for torch {_torch_version()}, running {torch.__version__}, cannot load: {error}"
        )
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"nabla_fast runs without its C++ operators, slower: {reason}", RuntimeWarning, stacklevel=3)
