"""`dto_step`: many steps in one call, of one row with a dense gradient and of all rows with factored ones.

The learning rate is so small that no token changes, so that everybody makes all steps; the moments, which are compared
with their meaning, do not depend on it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, capped, head_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, Tables, TokenGradient
from nabla_fast.testing.operators import factors, randn, step_state, tables

LEARNING_RATE = 1e-7


class Variant(NamedTuple):
    """``steps`` a call; ``one``: one row with a dense gradient, else all rows with factored ones."""

    operator: str
    latents: bool
    one: bool
    steps: int


VARIANTS = (
    Variant("dto_step, one latents row", True, True, 20),
    Variant("dto_step, one logits row", False, True, 20),
    Variant("dto_step, all latents rows", True, False, 4),
)


def fused(function: Any, latents: bool, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """``arguments``: parameters, moments, step counts, tokens, the gradient or its three factors, tables, rates."""
    parameters, first, second, count, tokens, *gradient, where, rates = arguments
    made = torch.zeros_like(count)
    given = gradient[0] if len(gradient) == 1 else TokenGradient(*gradient)
    state = DTOState(parameters, first, second, made, tokens)
    steps = DTOOptions(latents, max_steps=len(rates))
    return parameters, first, second, function(state, DTOInputs(rates, given), where, steps, **options).token


def step(
    latents: bool, parameters: Tensor, first: Tensor, second: Tensor, gradient: Tensor, where: Tables, rate: Tensor
) -> None:
    """One step, in place; ``rate`` () has Adam's correction of the first moment in it."""
    z, weight = logits(latents, parameters, where), where.head.weight
    p = z.softmax(-1)
    weighted = p * gradient
    dz = weighted - p * weighted.sum(-1, keepdim=True)
    if latents and where.head.softcap:
        dz = dz * (1 - (z / where.head.softcap) ** 2)
    grad = (dz.to(weight.dtype) @ weight).to(parameters.dtype) if latents else dz
    first.lerp_(grad, 0.1)
    second.mul_(0.999).addcmul_(grad, grad, value=0.001)
    parameters.sub_(rate * first / (second.sqrt() + 1e-8))


def logits(latents: bool, parameters: Tensor, where: Tables) -> Tensor:
    weight = where.head.weight
    return capped((parameters.to(weight.dtype) @ weight.T).float(), where.head.softcap) if latents else parameters


def loop(one_step: Any, latents: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """The steps one by one; nobody looks whether a token has changed, which would cost one wait per step more."""
    parameters, first, second, _, _, *gradient, where, rates = arguments
    dense = gradient[0] if len(gradient) == 1 else dense_gradient(where, *gradient)
    for i in range(len(rates)):
        rate = rates[i] * (1 - 0.999 ** (i + 1)) ** 0.5 / (1 - 0.9 ** (i + 1))
        one_step(latents, parameters, first, second, dense, where, rate)
    return parameters, first, second, logits(latents, parameters, where).argmax(-1)


def dense_gradient(where: Tables, hidden: Tensor, embedding: Tensor, reward_embedding: Tensor) -> Tensor:
    """The gradient (N, V), up to a constant per row."""
    own = where.head.weight.dtype
    gradient = embedding.to(own) @ where.embedding.T + reward_embedding.to(own) @ where.reward_embedding.T
    z = capped((hidden.to(own) @ where.head.weight.T).float(), where.head.softcap)
    return gradient.float() - where.nll_coeff * z


def inputs(seed: int, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, variant: Variant) -> Inputs:
    device = setting.device
    own = head_of(shape, dtype, seed + 100, device)
    where = tables(shape.vocabulary, shape.width, shape.reward_width, own, tied=shape.tied, dtype=dtype, device=device)
    width = shape.width if variant.latents else shape.vocabulary
    parameters = randn(rows, width, seed=seed, scale=1.0 if variant.latents else 3.0, device=device)
    state = step_state(parameters, own, latents=variant.latents)
    if variant.one:
        gradient: tuple[Tensor, ...] = (randn(rows, shape.vocabulary, seed=seed + 20, device=device),)
    else:
        # As the models' backward passes give them.
        gradient = tuple(factors(rows, shape.width, shape.reward_width, dtype=dtype, seed=seed + 20, device=device))
    rates = torch.full((variant.steps,), LEARNING_RATE, device=device)
    return Inputs((*state, *gradient), (where, rates))


def contest(setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, variant: Variant) -> Contest:
    operator, latents, one, steps = variant
    rows = 1 if one else rows
    run, skipped = backends_of("dto_step", setting.device, functools.partial(fused, ops.dto_step, latents))
    eager, not_compiled = with_compiled(step, setting, shape.name)
    head = shape.vocabulary * shape.width
    # Latents: the head once for each step and once for the last tokens. Logits stay on the chip between steps.
    traffic = head * dtype.itemsize * (steps + 1) if latents else 0
    traffic += 4 * rows * shape.vocabulary * (1 if latents else 7) if one else 0
    flops = 2 * rows * head * (2 * steps + 1) if latents else 0
    if not one:
        flops += 2 * rows * shape.vocabulary * (2 * shape.width + shape.reward_width)
    return Contest(
        operator=operator,
        model=shape.name,
        dtype=dtype,
        shape={"N": rows, "V": shape.vocabulary, "d": shape.width, "steps": steps},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows, dtype=dtype, variant=variant),
        meaning=functools.partial(fused, reference.dto_step, latents),
        ours=run,
        baselines={name: functools.partial(loop, f, latents) for name, f in eager.items()},
        traffic=traffic,
        flops=flops,
        barriers=steps,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    return [
        contest(setting, *sizes, variant).case(setting)
        for sizes in setting.grid
        for variant in VARIANTS
        # The rows of logits are float32 whatever the model's dtype is.
        if variant.latents or sizes[2] == setting.dtypes[0]
    ]


def test_dto_step(case, measured):
    measured(case)
