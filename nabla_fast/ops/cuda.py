"""The CUDA back end, for operators that need what Triton does not offer; without autograd or checks of its own.

* `token_diff`: one launch.
* `dto_step` of few rows with a dense gradient: up to ``max_steps`` steps of Adam in one launch. A row stops on the
  device at the first change of its token; the host waits for nothing. Everything else goes to the Triton back end.

The kernels are part of the native library, as C functions that take raw pointers and a stream (csrc/cuda/launchers.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import native
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, DTOStep, Head, Tables, TokenDiff

# A row of latents passes over the whole head by itself, so more of them are better multiplied together. A row of
# logits has a team of thread blocks of its own.
_MOST_ROWS = {True: 4, False: 16}
_MOST_ENTRIES = 2**30  # indices are 32-bit
_WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_INT, _POINTER, _DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class _Rows(ctypes.Structure):
    """`DtoRows` of csrc/cuda/arguments.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("parameters", "exp_avg", "exp_avg_sq", "step", "tokens", "learning_rates")),
        *((name, _POINTER) for name in ("gradient", "soft_noise", "hard_noise", "token", "changed", "scratch")),
        *((f"{name}_stride", _INT) for name in ("parameters", "exp_avg", "exp_avg_sq")),
        *((f"{name}_stride", _INT) for name in ("gradient", "soft_noise", "hard_noise")),
        *((name, _INT) for name in ("rows", "vocabulary", "rates", "rates_are_double", "max_steps")),
        ("tau", _DOUBLE),
        ("weight_decay", _DOUBLE),
    ]


class _Head(ctypes.Structure):
    """`DtoHead` of csrc/cuda/arguments.h."""

    _fields_ = [
        ("weight", _POINTER),
        *((name, _INT) for name in ("type", "stride", "hidden")),
        ("scale", _DOUBLE),
        ("softcap", _DOUBLE),
    ]


class _Plan(ctypes.Structure):
    """`DtoPlan` of csrc/cuda/arguments.h."""

    _fields_ = [(name, _INT) for name in ("team", "kept", "threads", "stages", "scratch_bytes")]


_rows, _head, _plan = (ctypes.POINTER(kind) for kind in (_Rows, _Head, _Plan))
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "check": (ctypes.c_int,),
    "error": (ctypes.c_int,),
    "plan_latents": (_INT, _INT, _INT, _INT, ctypes.c_int, _plan),
    "plan_logits": (_INT, _INT, ctypes.c_int, _plan),
    "token_diff": (_POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, ctypes.c_int, _POINTER),
    "dto_latents": (_rows, _head, _plan, ctypes.c_int, _POINTER),
    "dto_logits": (_rows, _plan, ctypes.c_int, _POINTER),
}


def why_missing(device: torch.device | str = "cuda") -> str | None:
    """Why these operators cannot run on that GPU, in one clause; None if they can. "cuda" is the current one."""
    reason = _why_not_built()
    if reason is not None:
        return reason
    index = torch.device(device).index
    return _why_not_on(torch.cuda.current_device() if index is None else index)


# As in nabla_fast.ops.native: a constant for torch.compile.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_built() -> str | None:
    reason = native.why_missing()
    if reason is not None:
        return reason
    if not native.build_info()["cuda_architectures"]:
        return "the native library was built without CUDA kernels; install nabla_fast again with nvcc on the PATH"
    return None if torch.cuda.is_available() else "torch sees no GPU"


@functools.cache
def _why_not_on(index: int) -> str | None:
    error = _library().nabla_fast_cuda_check(index)
    if not error:
        return None
    architectures = native.build_info()["cuda_architectures"]
    return (
        f"the CUDA kernels, built for compute capability {architectures}, do not run on "
        f"{torch.cuda.get_device_name(index)}: {_message(error)}"
    )


def token_diff(old: Tensor, new: Tensor) -> TokenDiff:
    """`reference.token_diff`: (B, m) int64 twice, any strides."""
    first, count = old.new_empty(old.shape[0]), old.new_empty(old.shape[0])
    with _device(old.device) as device:
        _call(
            "token_diff", old.data_ptr(), *old.stride(), new.data_ptr(), *new.stride(), first.data_ptr(),
            count.data_ptr(), *old.shape, *device,
        )  # fmt: skip
    return TokenDiff(first, count)


def dto_step(state: DTOState, inputs: DTOInputs, tables: Tables, options: DTOOptions) -> DTOStep:
    """`reference.dto_step` on float32 parameters; a row without a hard token has token -1 and stops.

    Few rows that stop one by one, with a dense gradient, are optimized in one launch; the rest is Triton's.

    Raises:
        RuntimeError: if the launch fails.
    """
    if isinstance(inputs.gradient, Tensor) and (inputs.group is None or len(state.parameters) == 1):
        plan = _plan_for(state, tables.head, options.latents)
        if plan is not None:
            return _run(state, inputs, tables.head, options, plan)
    from nabla_fast.ops import triton

    return triton.dto_step(state, inputs, tables, options)


def _plan_for(state: DTOState, head: Head, latents: bool) -> _Plan | None:
    """The launch plan of these rows; None if the kernels cannot run them."""
    parameters, weight = state.parameters, head.weight
    rows, width = parameters.shape
    vocabulary = weight.shape[0]
    if (
        not 1 <= rows <= _MOST_ROWS[latents]
        or not 1 <= vocabulary < _MOST_ENTRIES
        or any(x.dtype != torch.float32 or x.stride(1) != 1 for x in state[:3])
        or not state.step.is_contiguous()
    ):
        return None
    if not latents:
        plan = _planned("logits", parameters.device, rows, vocabulary)
    elif weight.dtype in _WEIGHT_TYPES and _reads_in_16_bytes(weight):
        plan = _planned("latents", parameters.device, rows, vocabulary, _WEIGHT_TYPES[weight.dtype], width)
    else:
        return None
    return plan if plan.team else None


def _reads_in_16_bytes(weight: Tensor) -> bool:
    sizes = (weight.data_ptr(), weight.stride(0) * weight.element_size(), weight.shape[1] * weight.element_size())
    return weight.stride(1) == 1 and all(size % 16 == 0 for size in sizes)


@functools.cache
def _planned(name: str, device: torch.device, *sizes: int) -> _Plan:
    plan = _Plan()
    with _device(device) as (index, _):
        _call(f"plan_{name}", *sizes, index, ctypes.byref(plan))
    return plan


def _run(state: DTOState, inputs: DTOInputs, head: Head, options: DTOOptions, plan: _Plan) -> DTOStep:
    with _device(state.parameters.device) as device:
        # With the types and strides that the kernels read. Copies what has others.
        tokens, rates = state.tokens.contiguous(), inputs.learning_rates.contiguous()
        rates = rates if rates.dtype == torch.float64 else rates.float()
        assert isinstance(inputs.gradient, Tensor)
        gradient = _float_rows(inputs.gradient)
        noises = [None if x is None else _float_rows(x) for x in (inputs.soft_noise, inputs.hard_noise)]
        token, changed = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.bool)
        scratch = torch.empty(max(16, plan.scratch_bytes), dtype=torch.uint8, device=token.device)
        rows = _Rows(
            *(x.data_ptr() for x in (*state[:4], tokens, rates, gradient)),
            *(None if x is None else x.data_ptr() for x in noises),
            *(x.data_ptr() for x in (token, changed, scratch)),
            *(x.stride(0) for x in (*state[:3], gradient)),
            *(0 if x is None else x.stride(0) for x in noises),
            len(tokens), head.weight.shape[0], len(rates), rates.dtype == torch.float64,
            min(options.max_steps, _MOST_ENTRIES), options.tau, options.weight_decay,
        )  # fmt: skip
        if options.latents:
            weight = head.weight
            c_head = _Head(
                weight.data_ptr(), _WEIGHT_TYPES[weight.dtype], weight.stride(0), weight.shape[1], head.scale,
                head.softcap,
            )  # fmt: skip
            _call("dto_latents", ctypes.byref(rows), ctypes.byref(c_head), ctypes.byref(plan), *device)
        else:
            _call("dto_logits", ctypes.byref(rows), ctypes.byref(plan), *device)
    return DTOStep(token, changed)


def _float_rows(x: Tensor) -> Tensor:
    return x.float() if x.stride(-1) == 1 else x.float().contiguous()


@contextlib.contextmanager
def _device(device: torch.device) -> Iterator[tuple[int | None, int]]:
    """Makes a GPU the current one; its number, and the stream in use there."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


def _call(name: str, *arguments: Any) -> None:
    error = getattr(_library(), f"nabla_fast_cuda_{name}")(*arguments)
    if error:
        raise RuntimeError(f"{name} of the CUDA back end failed: {_message(error)}")


def _message(error: int) -> str:
    message: bytes = _library().nabla_fast_cuda_error(error)
    return message.decode()


@functools.cache
def _library() -> ctypes.CDLL:
    return declared(native._library_path(native._PACKAGE))


def declared(path: Path) -> ctypes.CDLL:
    """A library with the functions of csrc/cuda/launchers.h, their arguments declared."""
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        getattr(library, f"nabla_fast_cuda_{name}").argtypes = arguments
    library.nabla_fast_cuda_error.restype = ctypes.c_char_p
    return library
