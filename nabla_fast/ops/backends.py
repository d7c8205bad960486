"""The choice of the back end that runs an operator.

Back end "reference" is the meaning of an operator, "native" its kernel in C++; the others are modules with functions of
the same names and arguments. One that lacks an operator, or is not for a device, is passed over; the reference has them
all.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from nabla_fast.ops import measured, native

if TYPE_CHECKING:
    from nabla_fast.ops.registry import Operator

OPERATORS: dict[str, Operator] = {}
"""Every operator by its name, as `nabla_fast.ops.registry` declares them."""
_MODULES = {"triton": "nabla_fast.ops.triton", "cuda": "nabla_fast.ops.cuda"}
BACKENDS = ("reference", "native", *_MODULES)
# What a setting tries, in order. "cuda" has what Triton cannot say well, and Triton the rest; where both have an
# operator, "auto" begins with the one that was measured to be the faster (`nabla_fast.ops.measured`), if any was.
_PREFERENCES = {
    ("auto", "cpu"): ("native", "reference"),
    ("auto", "cuda"): ("cuda", "triton", "reference"),
    ("reference", "cpu"): ("reference",),
    ("reference", "cuda"): ("reference",),
    ("native", "cpu"): ("native",),
    ("triton", "cpu"): ("triton",),
    ("triton", "cuda"): ("triton",),
    ("cuda", "cuda"): ("cuda", "triton"),
}
_LACKS = "it has no"  # what is meant to be so, and no reason for a warning


def setting(backend: str) -> str:
    """``backend``, or what the environment variable NABLA_FAST_BACKEND says where that is "auto"."""
    return os.environ.get("NABLA_FAST_BACKEND") or "auto" if backend == "auto" else backend


def resolve(
    operator: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    case: str | None = None,
) -> str:
    """The back end that runs ``operator``: one of "reference", "native", "triton", "cuda".

    Kernels for a GPU compute in float32, so there "auto" leaves it to the reference to compute in float64 (``dtype``).

    Args:
        device: where the tensors are, or a type of device; "cuda" is the current GPU.
        case: what the operator is measured as, where that is not its name alone.

    Raises:
        ValueError: if ``backend`` (or NABLA_FAST_BACKEND) is unknown, or names one that cannot run here; it says why.
    """
    wanted, device_type = setting(backend), torch.device(device).type
    candidates = _PREFERENCES.get((wanted, device_type))
    if candidates is None and wanted == "auto":
        candidates = ("reference",)
    if candidates is None:
        raise ValueError(_refusal(wanted, device_type, f"it does not run on {device_type}"))
    if wanted == "auto" and device_type == "cuda" and dtype == torch.float64:
        candidates = ("reference",)
    elif wanted == "auto" and device_type == "cuda":
        best = measured.fastest(case or operator, device)
        candidates = (*(name for name in candidates if name == best), *(name for name in candidates if name != best))
    for name in candidates:
        reason = why_not(operator, name, device)
        if reason is None:
            return name
        if name == "native":
            native.available()  # warns once if the library is missing, or raises where it is required
        elif wanted == "auto" and not reason.startswith(_LACKS):
            _warn(name, reason)
    raise ValueError(_refusal(wanted, device_type, why_not(operator, candidates[0], device) or ""))


# torch.compile calls it while it traces and keeps the answer as a constant; see the same in native.py.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(operator: Operator, backend: str) -> Callable[..., Any]:
    """The function of an operator in a back end that `resolve` has chosen.

    Raises:
        ValueError: for any other name; "auto" is for the functions of `nabla_fast.ops`, which choose.
    """
    if backend == "reference":
        return operator.body
    if backend == "native":
        return operator.native
    if backend not in _MODULES:
        raise ValueError(
            f"backend must be one of {', '.join(BACKENDS)} for torch.ops.nabla_fast.{operator.name}, got {backend!r}"
        )
    return getattr(importlib.import_module(_MODULES[backend]), operator.name)


def why_not(operator: str, backend: str, device: torch.device | str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on such a device, in one clause; None if it can."""
    device_type = torch.device(device).type
    if backend == "native" and device_type != "cpu":
        return "it runs on the CPU only"
    if backend == "cuda" and device_type != "cuda":
        return "it runs on CUDA only"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CUDA, or on the CPU with TRITON_INTERPRET=1"
    if backend == "reference":
        return None
    if backend == "native":
        return native.why_missing() or (None if native.has(operator) else f"{_LACKS} {operator}")
    module = _import(backend)
    if isinstance(module, str):
        return module
    reason = module.why_missing(device) if backend == "cuda" else None
    if reason is not None:
        return str(reason)
    return None if hasattr(module, operator) else f"{_LACKS} {operator}"


def has(operator: str, backend: str) -> bool:
    """Whether a back end that `resolve` has chosen has an internal operator of its own."""
    if backend == "native":
        return native.has(operator)
    return backend in _MODULES and hasattr(importlib.import_module(_MODULES[backend]), operator)


has._dynamo_marked_constant = True  # type: ignore[attr-defined]


def availability() -> dict[str, dict[str, str | None]]:
    """For every operator: back end → why it cannot run here, None if it can (on the GPU if there is one)."""
    device_types = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    table: dict[str, dict[str, str | None]] = {}
    for operator in OPERATORS:
        table[operator] = {}
        for backend in BACKENDS:
            reasons = [why_not(operator, backend, device_type) for device_type in device_types]
            table[operator][backend] = None if None in reasons else reasons[0]
    return table


@functools.cache
def _warn(backend: str, reason: str) -> None:
    """Once a process: results are the same without, but slower."""
    warnings.warn(f"nabla_fast goes without its {backend} back end, and is slower: {reason}", stacklevel=4)


_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(wanted: str, device_type: str, reason: str) -> str:
    usable = [name for name, device in _PREFERENCES if device == device_type and name != wanted]
    if (wanted, device_type) not in _PREFERENCES and wanted not in BACKENDS:
        return f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {wanted!r}"
    return f"backend {wanted!r} cannot be used on {device_type}: {reason}; use one of {', '.join(usable)}"


@functools.cache
def _import(backend: str) -> ModuleType | str:
    """The module of a back end, or why it cannot be imported."""
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return f"it cannot be imported: {error}"
