"""The native library: the operators in C++ for CPU tensors, without autograd, and the CUDA kernels.

`nabla_fast.ops.registry` defines an operator ``native_<name>`` for each that it declares, so that it exists without the
library; the library adds CPU kernels. It is loaded when one of them is called for the first time, which is an error
where there is none, or when :func:`available` asks for it.
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

_PACKAGE = Path(__file__).resolve().parent.parent
_STEM = "_native_torch_"
_AGAIN = "install it again with `pip install --no-build-isolation`"

_LIBRARY = torch.library.Library("nabla_fast", "FRAGMENT")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


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


def define(schema: str) -> Any:
    """Defines an operator that the library has a kernel for on the CPU, and returns it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _load_and_call(name), "CompositeExplicitAutograd")
    return getattr(torch.ops.nabla_fast, name).default


def has(operator: str) -> bool:
    """Whether the library has a kernel of ``operator``."""
    return why_missing() is None and _has_kernel(f"nabla_fast::native_{operator}")


# It is asked in every call, and takes longer than many a kernel.
@functools.cache
def _has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def _load_and_call(name: str) -> Callable[..., Any]:
    """A kernel that loads the library and calls the operator's CPU kernel in it.

    The dispatcher prefers the library's own kernels from then on, so loading costs later calls nothing, and a compiled
    graph may hold the operator before the library is loaded. What comes here later holds an argument that is no dense
    CPU tensor: the library's kernel says which one.
    """

    def kernel(*arguments: Any) -> Any:
        reason = why_missing()
        if reason is not None:
            raise RuntimeError(f"{name} of the native back end cannot run: {reason}")
        if not _has_kernel(f"nabla_fast::{name}"):  # or it would come here again
            raise RuntimeError(
                f"{name} of the native back end cannot run: the native library is of an earlier version of nabla_fast; "
                f"{_AGAIN}"
            )
        return getattr(torch.ops.nabla_fast, name).default.redispatch(_CPU, *arguments)

    return kernel


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
            built = " and ".join(sorted(others))
            return f"the native library was built for torch {built}, running {torch.__version__}; {_AGAIN}"
        return f"the native library was not built when nabla_fast was installed; {_AGAIN}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return (
            f"the native library, built for torch {_torch_version()}, running {torch.__version__}, cannot load: {error}"
        )
    if not _fits(path):
        return f"the native library is of another version of nabla_fast; {_AGAIN}"
    return None


def _fits(path: Path) -> bool:
    """Whether the kernels of a loaded library take the arguments that are declared in Python."""
    function = getattr(ctypes.CDLL(str(path)), "nabla_fast_misfit", None)
    if function is None:
        return False
    function.restype = ctypes.c_char_p
    return function() == b""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"nabla_fast runs without its C++ operators, slower: {reason}", RuntimeWarning, stacklevel=3)
