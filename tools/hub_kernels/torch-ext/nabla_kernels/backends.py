"""The choice of what runs an operator: its Triton kernel, or its meaning in PyTorch (`reference`)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .registry import Operator

OPERATORS: dict[str, Operator] = {}
"""Every operator by its name, as `registry` declares them."""
BACKENDS = ("auto", "reference", "triton")


def resolve(
    operator: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    case: str | None = None,
) -> str:
    """What runs ``operator``, "reference" or "triton".

    "auto" is Triton on a GPU, but for float64, in which its kernels do not compute, and PyTorch elsewhere.

    Raises:
        ValueError: if ``backend`` is unknown or cannot run there.
    """
    on_gpu = torch.device(device).type == "cuda"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if on_gpu and dtype != torch.float64 else "reference"
    if backend == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' of {operator} runs on CUDA, or on the CPU with TRITON_INTERPRET=1, got tensors on "
            f"{device}; use 'auto' or 'reference'"
        )
    return backend


def implementation(operator: Operator, backend: str) -> Callable[..., Any]:
    """The function of an operator in what `resolve` has chosen.

    Raises:
        ValueError: for any other name; "auto" is for the functions, which choose.
    """
    if backend == "reference":
        return operator.body
    if backend != "triton":
        raise ValueError(f"backend must be reference or triton for an operator of torch.ops, got {backend!r}")
    return getattr(_kernels(), operator.name)


def has(operator: str, backend: str) -> bool:
    """Whether a back end that `resolve` has chosen has an internal operator of its own."""
    return backend == "triton" and hasattr(_kernels(), operator)


# torch.compile calls both while it traces, and keeps the answers as constants.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
has._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kernels() -> Any:
    # Imported when it is needed: on a CPU there need be no Triton.
    return importlib.import_module(".triton", __package__)
