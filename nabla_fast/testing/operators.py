"""Random inputs of the operators, and their back ends by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nabla_fast.models.pretrained import multiplies_bfloat16
from nabla_fast.ops import OPERATORS, DTOInputs, DTOOptions, DTOState, Head, Tables, TokenGradient, backends
from nabla_fast.ops.reference import hard_tokens


class Backend:
    """The operators by one back end, without autograd: ``Backend("native").relaxed_stats(z)``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, operator: str) -> Any:
        if operator not in OPERATORS:
            raise AttributeError(f"no operator {operator!r}; there are {', '.join(OPERATORS)}")
        return backends.implementation(OPERATORS[operator], self.name)


def native_rounds() -> bool:
    """Whether native kernels round softmax weights beside a bfloat16 table, since the processor multiplies bfloat16."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies_bfloat16()


def dto_arguments(
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    tokens: Tensor,
    learning_rates: Tensor,
    gradient: Tensor | TokenGradient,
    tables: Tables,
    *,
    soft_noise: Tensor | None = None,
    hard_noise: Tensor | None = None,
    group: Tensor | None = None,
    **options: Any,
) -> tuple[DTOState, DTOInputs, Tables, DTOOptions]:
    """The arguments of `dto_step` from what is in them; ``options`` are those of `DTOOptions`."""
    state = DTOState(parameters, exp_avg, exp_avg_sq, step, tokens)
    inputs = DTOInputs(learning_rates, gradient, soft_noise, hard_noise, group)
    return state, inputs, tables, DTOOptions(**options)


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers of standard deviation ``scale``, the same for the same seed, dtype and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.promote_types(dtype, torch.float32)
    return torch.randn(*shape, generator=generator, dtype=drawn, device=device).mul_(scale).to(dtype)


def head(vocabulary: int, width: int, *, scale: float = 1.0, softcap: float = 0.0, **options: Any) -> Head:
    """A random output head (V, d); ``options`` go to `randn`."""
    return Head(randn(vocabulary, width, **{"seed": 1, **options}), scale, softcap)


def tables(vocabulary: int, width: int, reward_width: int, own: Head, *, tied: bool = False, **options: Any) -> Tables:
    """Head ``own`` with random embedding tables (V, d), which is the head where ``tied``, and (V, d_r)."""
    embedding = own.weight if tied else randn(vocabulary, width, **{"seed": 2, **options})
    return Tables(own, embedding, randn(vocabulary, reward_width, **{"seed": 3, **options}), 0.1)


def factors(rows: int, width: int, reward_width: int, **options: Any) -> TokenGradient:
    """Random factors of the gradients of N rows."""
    seed = options.pop("seed", 4)
    shapes = (width, width, reward_width)
    return TokenGradient(*(randn(rows, d, seed=seed + i, **options) for i, d in enumerate(shapes)))


def step_state(parameters: Tensor, own: Head, *, latents: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``parameters`` as they are before the first step of `dto_step`: moments, step counts, and their hard tokens."""
    count = torch.zeros(len(parameters), dtype=torch.long, device=parameters.device)
    moments = torch.zeros_like(parameters), torch.zeros_like(parameters)
    return parameters, *moments, count, hard_tokens(parameters, own, latents)


def logits(seed: int, rows: int, vocabulary: int, kind: str = "random", dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (N, V) of one kind of `KINDS` of tests/ops/back_ends.py, on the default device; the same numbers on all."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    z = 3 * torch.randn(rows, vocabulary, generator=generator, device="cpu").to(device)
    if kind == "ties":
        z = z.round().clamp(-2, 2)
    elif kind == "minus infinity":
        keep = torch.rand(rows, vocabulary, generator=generator, device="cpu").to(device) < 0.3
        keep[:, vocabulary // 2] = True
        z = torch.where(keep, z, -torch.inf)
    elif kind == "dominant":
        z[:, vocabulary // 3] = 90.0
    elif kind == "huge":
        z = (1e4 * torch.rand(rows, vocabulary, generator=generator, device="cpu").to(device)).round()
    elif kind == "all equal":
        z = torch.full((rows, vocabulary), 2.5, device=device)
    return z.to(dtype)


def double(x: Any) -> Any:
    """Tensors in float64, integers as they are; through tuples, lists and named tuples."""
    return tree_map_only(Tensor, lambda own: own.double() if own.is_floating_point() else own.clone(), x)
