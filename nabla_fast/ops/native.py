"""The native back end: `nabla_fast.ops.reference` in C++, for CPU tensors, without autograd.

The schemas are defined here, so the operators exist without the library; the library adds CPU kernels to them. It is
loaded when one of them is called for the first time, or when :func:`available` asks for it.

Every function raises RuntimeError where the library is not available.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.operands import Head, RelaxedStats, Tables, TokenGradient
from nabla_fast.ops.reference import with_mask

_PACKAGE = Path(__file__).resolve().parent.parent
_STEM = "_native_torch_"

# The functions of this module take what nabla_fast.ops.reference takes; the operators below take it flat.
_SCHEMAS = (
    "native_token_diff(Tensor old, Tensor new) -> (Tensor first, Tensor count)",
    "native_relaxed_stats(Tensor z, float tau) -> (Tensor max_prob, Tensor lse, Tensor entropy, Tensor token)",
    "native_linear_relaxed_stats(Tensor h, Tensor weight, float scale, float softcap, float tau) -> (Tensor max_prob, "
    "Tensor lse, Tensor entropy, Tensor token)",
    "native_log_likelihood_gradient(Tensor h, Tensor weight, float scale, float softcap, Tensor tokens, "
    "bool need_grad) -> (Tensor log_likelihood, Tensor gradient)",
    "native_gradient_norm(Tensor hidden, Tensor embedding, Tensor reward_embedding, Tensor weight, float scale, "
    "float softcap, Tensor embedding_table, Tensor reward_table, float nll_coeff) -> Tensor",
    "native_straight_through_embedding(Tensor z, Tensor[] tables, float tau) -> (Tensor[] embeddings, Tensor lse, "
    "Tensor token)",
    "native_linear_straight_through_embedding(Tensor h, Tensor weight, float scale, float softcap, Tensor[] tables, "
    "float tau) -> (Tensor[] embeddings, Tensor lse, Tensor token)",
    "native_soft_embedding(Tensor z, Tensor table, float tau) -> (Tensor embedding, Tensor lse)",
    "native_linear_soft_embedding(Tensor h, Tensor weight, float scale, float softcap, Tensor table, float tau) -> "
    "(Tensor embedding, Tensor lse)",
    "native_relaxed_backward(Tensor z, Tensor lse, Tensor[] vectors, Tensor[] tables, float tau) -> Tensor",
    "native_linear_relaxed_backward(Tensor h, Tensor weight, float scale, float softcap, Tensor lse, Tensor[] vectors, "
    "Tensor[] tables, float tau) -> Tensor",
    "native_dto_step(Tensor(a!) parameters, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor tokens, "
    "Tensor learning_rates, Tensor? gradient, Tensor? hidden, Tensor? embedding, Tensor? reward_embedding, "
    "Tensor weight, Tensor embedding_table, Tensor reward_table, float scale, float softcap, float nll_coeff, "
    "bool latents, float tau, float weight_decay, Tensor? soft_noise, Tensor? hard_noise, Tensor? group, "
    "int max_steps) -> (Tensor token, Tensor changed)",
)
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


def token_diff(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.token_diff`: (B, m) int64 twice.

    Raises:
        RuntimeError: if the shapes differ.
        TypeError: if a dtype is not int64.
    """
    first, count = torch.ops.nabla_fast.native_token_diff(old, new)
    return first, count


def relaxed_stats(
    z: Tensor, tau: float = 1.0, entropy_threshold: float | None = None, confidence_threshold: float | None = None
) -> RelaxedStats:
    """`reference.relaxed_stats` of logits z (N, V), V >= 1, from one reading of z.

    A row's result does not depend on the other rows or on the number of threads.

    Raises:
        RuntimeError: if z is not (N, V) with V >= 1.
        ValueError: if tau is not positive.
    """
    max_prob, lse, entropy, token = torch.ops.nabla_fast.native_relaxed_stats(z, tau)
    return with_mask(max_prob, lse, entropy, token, entropy_threshold, confidence_threshold)


def linear_relaxed_stats(
    h: Tensor,
    head: Head,
    tau: float = 1.0,
    entropy_threshold: float | None = None,
    confidence_threshold: float | None = None,
) -> RelaxedStats:
    """`reference.linear_relaxed_stats` of hidden states h (N, d), from one reading of the head.

    Raises:
        RuntimeError: if the shapes do not fit.
        ValueError: if tau is not positive.
    """
    max_prob, lse, entropy, token = torch.ops.nabla_fast.native_linear_relaxed_stats(
        h, head.weight, head.scale, head.softcap, tau
    )
    return with_mask(max_prob, lse, entropy, token, entropy_threshold, confidence_threshold)


def log_likelihood_gradient(h: Tensor, head: Head, tokens: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """`reference.log_likelihood_gradient` of hidden states h (N, d) and tokens (N,), from one reading of the head.

    Raises:
        RuntimeError: if the shapes do not fit.
        IndexError: if a token is not in the vocabulary.
    """
    log_likelihood, gradient = torch.ops.nabla_fast.native_log_likelihood_gradient(
        h, head.weight, head.scale, head.softcap, tokens, need_grad
    )
    return log_likelihood, gradient


def gradient_norm(factors: TokenGradient, tables: Tables) -> Tensor:
    """`reference.gradient_norm`: (N,), from one reading of each table; without ``nll_coeff`` the head is not read.

    Raises:
        RuntimeError: if the shapes do not fit.
    """
    norm: Tensor = torch.ops.nabla_fast.native_gradient_norm(
        *factors,
        tables.head.weight,
        tables.head.scale,
        tables.head.softcap,
        tables.embedding,
        tables.reward_embedding,
        tables.nll_coeff,
    )
    return norm


def straight_through_embedding(
    z: Tensor, tables: Sequence[Tensor], tau: float = 1.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`reference.straight_through_embedding`. A row without an argmax has token -1, and its embedding is NaN."""
    embeddings, lse, token = torch.ops.nabla_fast.native_straight_through_embedding(z, list(tables), tau)
    return embeddings, lse, token


def linear_straight_through_embedding(
    h: Tensor, head: Head, tables: Sequence[Tensor], tau: float = 1.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`reference.linear_straight_through_embedding`, without an (N, V) tensor."""
    embeddings, lse, token = torch.ops.nabla_fast.native_linear_straight_through_embedding(h, *head, list(tables), tau)
    return embeddings, lse, token


def soft_embedding(z: Tensor, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.soft_embedding`; NaN where a row holds NaN or +inf or is all -inf."""
    embedding, lse = torch.ops.nabla_fast.native_soft_embedding(z, table, tau)
    return embedding, lse


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """`reference.linear_soft_embedding`, without an (N, V) tensor."""
    embedding, lse = torch.ops.nabla_fast.native_linear_soft_embedding(h, *head, table, tau)
    return embedding, lse


def relaxed_backward(
    z: Tensor, lse: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`reference.relaxed_backward`; the result is the only (N, V) tensor."""
    gradient: Tensor = torch.ops.nabla_fast.native_relaxed_backward(z, lse, list(vectors), list(tables), tau)
    return gradient


def linear_relaxed_backward(
    h: Tensor, head: Head, lse: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], tau: float = 1.0
) -> Tensor:
    """`reference.linear_relaxed_backward`, by one pass over the vocabulary without an (N, V) tensor."""
    gradient: Tensor = torch.ops.nabla_fast.native_linear_relaxed_backward(
        h, *head, lse, list(vectors), list(tables), tau
    )
    return gradient


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
    """`reference.dto_step`. Each step of latents reads the head once, and one more reading takes the last tokens.

    A row whose logits have no argmax (NaN, +inf, all -inf) has token -1 and makes no step.

    Raises:
        RuntimeError: if a shape is wrong.
        TypeError: if a dtype is wrong.
        ValueError: if tau is not positive or group does not ascend.
    """
    head, embedding, reward_embedding, nll_coeff = tables
    dense, factors = (None, gradient) if isinstance(gradient, TokenGradient) else (gradient, (None, None, None))
    token, changed = torch.ops.nabla_fast.native_dto_step(
        parameters,
        exp_avg,
        exp_avg_sq,
        step,
        tokens,
        learning_rates,
        dense,
        *factors,
        head.weight,
        embedding,
        reward_embedding,
        head.scale,
        head.softcap,
        nll_coeff,
        latents,
        tau,
        weight_decay,
        soft_noise,
        hard_noise,
        group,
        max_steps,
    )
    return token, changed


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
        return getattr(torch.ops.nabla_fast, name).default.redispatch(_CPU, *arguments)

    return kernel


for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
    _name = _schema.partition("(")[0]
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
            "`pip install --no-build-isolation`"
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
