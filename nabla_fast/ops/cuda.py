"""The CUDA back end: `nabla_fast.ops.reference` where Triton cannot say it well, on NVIDIA GPUs, without autograd.

* `token_diff`: one launch.
* `dto_step` of few rows with a dense gradient: up to ``max_steps`` steps of Adam in one launch. A row stops on the
  device at the first change of its token; the host waits for nothing. Everything else goes to the Triton back end.

The kernels are part of the native library, as C functions that take raw pointers and a stream (csrc/cuda/launchers.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops import native
from nabla_fast.ops.operands import Head, Tables, TokenGradient

# A row of latents passes over the whole head by itself, so more of them are better multiplied together. A row of
# logits has a team of thread blocks of its own.
_MOST_ROWS = {True: 4, False: 16}
_MOST_ENTRIES = 2**30  # indices are 32-bit
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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

    _fields_ = [(name, _INT) for name in ("team", "cluster", "chip_gradient", "scratch_bytes")]


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


def token_diff(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.token_diff`: (B, m) int64 twice, any strides.

    Raises:
        RuntimeError: if the shapes differ, or the launch fails.
        TypeError: if a dtype is not int64.
    """
    if old.dtype != torch.int64 or new.dtype != torch.int64:
        raise TypeError(f"token_diff takes int64 tokens, got {old.dtype} and {new.dtype}")
    if old.ndim != 2 or old.shape != new.shape or old.device != new.device:
        raise RuntimeError(
            f"token_diff takes two (B, m) tensors of one device, got {tuple(old.shape)} on {old.device} and "
            f"{tuple(new.shape)} on {new.device}"
        )
    first, count = old.new_empty(old.shape[0]), old.new_empty(old.shape[0])
    with _device(old.device) as device:
        _call(
            "token_diff", old.data_ptr(), *old.stride(), new.data_ptr(), *new.stride(), first.data_ptr(),
            count.data_ptr(), *old.shape, *device,
        )  # fmt: skip
    return first, count


def dto_step(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Tensor | TokenGradient,
    tables: Tables,
    *,
    latents: bool,
    tau: float = 1.0,
    weight_decay: float = 0.0,
    soft_noise: Tensor | None = None,
    hard_noise: Tensor | None = None,
    group: Tensor | None = None,
    max_steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """`reference.dto_step` on float32 parameters; a row without a hard token has token -1 and stops.

    Few rows that stop one by one, with a dense gradient, are optimised in one launch; the rest is Triton's.

    Raises:
        RuntimeError: if the launch fails.
        TypeError: if a dtype is wrong.
        ValueError: if a shape, layout or device does not fit the others, tau is not positive and finite, or max_steps
            is negative.
    """
    if isinstance(gradient, Tensor) and (group is None or len(parameters) == 1):
        state = _State(parameters, exp_avg, exp_avg_sq, step)
        constants = _Constants(tokens, learning_rates, gradient, soft_noise, hard_noise)
        _check(state, constants, tables.head.weight, latents, tau, max_steps)
        plan = _plan_for(state, constants, tables.head, latents)
        if plan is not None:
            return _run(state, constants, tables.head, latents, plan, tau, weight_decay, max_steps)
    from nabla_fast.ops import triton

    return triton.dto_step(
        parameters, exp_avg, exp_avg_sq, step, tokens, learning_rates, gradient, tables, latents=latents, tau=tau,
        weight_decay=weight_decay, soft_noise=soft_noise, hard_noise=hard_noise, group=group, max_steps=max_steps,
    )  # fmt: skip


class _State(NamedTuple):
    """What `dto_step` updates in place."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class _Constants(NamedTuple):
    """What `dto_step` reads, per row or per step."""

    tokens: Tensor
    learning_rates: Tensor
    gradient: Tensor
    soft_noise: Tensor | None
    hard_noise: Tensor | None

    def prepared(self) -> _Constants:
        """With the types and strides that the kernels read. Copies what has others."""
        rates = self.learning_rates if self.learning_rates.dtype == torch.float64 else self.learning_rates.float()
        gradient, soft, hard = (
            None if x is None else x.float() if x.stride(-1) == 1 else x.float().contiguous()
            for x in (self.gradient, self.soft_noise, self.hard_noise)
        )
        assert gradient is not None
        return _Constants(self.tokens.long().contiguous(), rates.contiguous(), gradient, soft, hard)


def _check(state: _State, constants: _Constants, weight: Tensor, latents: bool, tau: float, max_steps: int) -> None:
    """Raw pointers know no bounds, no dtypes and no devices."""
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if max_steps < 0:
        raise ValueError(f"max_steps must not be negative, got {max_steps}")
    named = [*state._asdict().items(), *constants._asdict().items(), ("weight", weight)]
    for name, x in named:
        if x is None:
            continue
        integers = name in ("step", "tokens")
        if x.layout != torch.strided or x.device != state.parameters.device:
            raise ValueError(
                f"{name} must be a dense tensor on {state.parameters.device}, as parameters are, got layout {x.layout} "
                f"on {x.device}"
            )
        if (x.dtype != torch.int64) if integers else (x.dtype not in _FLOATS):
            raise TypeError(f"{name} must be {'torch.int64' if integers else 'of a float dtype'}, got {x.dtype}")
    if weight.ndim != 2 or state.parameters.ndim != 2 or constants.learning_rates.ndim != 1:
        raise ValueError(
            f"weight must be (V, d), parameters (N, d) or (N, V), and learning_rates (S,), got {tuple(weight.shape)}, "
            f"{tuple(state.parameters.shape)} and {tuple(constants.learning_rates.shape)}"
        )
    _check_shapes(state, constants, weight, latents)


def _check_shapes(state: _State, constants: _Constants, weight: Tensor, latents: bool) -> None:
    rows, (vocabulary, hidden) = len(state.parameters), weight.shape
    row, entries = (rows, hidden if latents else vocabulary), (rows, vocabulary)
    shapes = (*zip(_State._fields, state, (row, row, row, (rows,)), strict=True),)
    shapes += (("tokens", constants.tokens, (rows,)), ("gradient", constants.gradient, entries))
    noises = (("soft_noise", constants.soft_noise, entries), ("hard_noise", constants.hard_noise, entries))
    shapes += tuple((name, x, shape) for name, x, shape in noises if x is not None)
    for name, x, shape in shapes:
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {shape} beside a head of {tuple(weight.shape)}, got {tuple(x.shape)}")


def _plan_for(state: _State, constants: _Constants, head: Head, latents: bool) -> _Plan | None:
    """How the kernels run these rows; None if they cannot."""
    parameters, weight = state.parameters, head.weight
    rows, width = parameters.shape
    vocabulary = weight.shape[0]
    used = [*state, *(x for x in constants if x is not None), *([weight] if latents else [])]
    if (
        not 1 <= rows <= _MOST_ROWS[latents]
        or not 1 <= vocabulary < _MOST_ENTRIES
        or any(x.device != parameters.device for x in used)
        or any(x.dtype != torch.float32 or x.stride(1) != 1 for x in state[:3])
        or state.step.dtype != torch.int64
        or not state.step.is_contiguous()
    ):
        return None
    if not latents:
        plan = _plan_logits(rows, vocabulary, parameters.device)
    elif weight.dtype in _WEIGHT_TYPES and _reads_in_16_bytes(weight):
        plan = _plan_latents(rows, vocabulary, _WEIGHT_TYPES[weight.dtype], width, parameters.device)
    else:
        return None
    return plan if plan.team else None


def _reads_in_16_bytes(weight: Tensor) -> bool:
    sizes = (weight.data_ptr(), weight.stride(0) * weight.element_size(), weight.shape[1] * weight.element_size())
    return weight.stride(1) == 1 and all(size % 16 == 0 for size in sizes)


@functools.cache
def _plan_latents(rows: int, vocabulary: int, weight_type: int, hidden: int, device: torch.device) -> _Plan:
    plan = _Plan()
    with _device(device) as (index, _):
        _call("plan_latents", rows, vocabulary, weight_type, hidden, index, ctypes.byref(plan))
    return plan


@functools.cache
def _plan_logits(rows: int, vocabulary: int, device: torch.device) -> _Plan:
    plan = _Plan()
    with _device(device) as (index, _):
        _call("plan_logits", rows, vocabulary, index, ctypes.byref(plan))
    return plan


def _run(
    state: _State,
    constants: _Constants,
    head: Head,
    latents: bool,
    plan: _Plan,
    tau: float,
    weight_decay: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    with _device(state.parameters.device) as device:
        ready = constants.prepared()
        token = torch.empty_like(ready.tokens)
        changed = torch.empty_like(ready.tokens, dtype=torch.bool)
        scratch = torch.empty(max(16, plan.scratch_bytes), dtype=torch.uint8, device=token.device)
        noise = (ready.soft_noise, ready.hard_noise)
        rows = _Rows(
            *(x.data_ptr() for x in (*state, ready.tokens, ready.learning_rates, ready.gradient)),
            *(None if x is None else x.data_ptr() for x in noise),
            *(x.data_ptr() for x in (token, changed, scratch)),
            *(x.stride(0) for x in (*state[:3], ready.gradient)),
            *(0 if x is None else x.stride(0) for x in noise),
            len(state.parameters), head.weight.shape[0], len(ready.learning_rates),
            ready.learning_rates.dtype == torch.float64, min(max_steps, _MOST_ENTRIES), tau, weight_decay,
        )  # fmt: skip
        if latents:
            weight = head.weight
            c_head = _Head(
                weight.data_ptr(), _WEIGHT_TYPES[weight.dtype], weight.stride(0), weight.shape[1], head.scale,
                head.softcap,
            )  # fmt: skip
            _call("dto_latents", ctypes.byref(rows), ctypes.byref(c_head), ctypes.byref(plan), *device)
        else:
            _call("dto_logits", ctypes.byref(rows), ctypes.byref(plan), *device)
    return token, changed


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
