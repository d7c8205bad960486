"""`draw_token`: one token per row of logits (N, V), at settings that keep a few tokens, or all of them.

Logits are those of `test_bench_sampling.py`, as peaked as a real model's. Everybody draws with the same noise.
"""

from __future__ import annotations

import functools

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, with_compiled
from shapes import Shape
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import noise, reference
from nabla_fast.testing.operators import randn

ROWS = (1, 8, 32)
PEAKED = 7.0
NAMES = ("temperature", "top_k", "top_p")
SETTINGS = {"top-p": (0.6, None, 0.95), "top-k": (1.0, 50, None), "all tokens": (1.0, None, None)}


def drawn(z: Tensor, low: Tensor, high: Tensor, settings: tuple[float, int | None, float | None], backend: str):
    return ops.draw_token(z, low, high, *settings, backend=backend)


def textbook(z: Tensor, low: Tensor, high: Tensor, settings: tuple[float, int | None, float | None]) -> Tensor:
    """As it is mostly written: a sort for top-p, and noise for every token."""
    temperature, top_k, top_p = settings
    x = z / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = x.softmax(-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        x = x.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return (x + noise.gumbel(low[:, None], high[:, None], torch.arange(z.shape[1], device=z.device)[None])).argmax(-1)


def inputs(seed: int, setting: Setting, shape: Shape, rows: int) -> Inputs:
    z = randn(rows, shape.vocabulary, seed=seed, scale=PEAKED, device=setting.device)
    generator = torch.Generator(setting.device).manual_seed(seed)
    low, high = torch.randint(0, 2**32, (2, rows), generator=generator, device=setting.device)
    return Inputs((z, low, high), ())


def contest(setting: Setting, shape: Shape, rows: int, kind: str) -> Contest:
    settings = SETTINGS[kind]
    ours, skipped = backends_of("draw_token", setting.device, functools.partial(drawn, settings=settings))
    baselines, not_compiled = with_compiled(functools.partial(textbook, settings=settings), setting, shape.name)
    return Contest(
        operator=f"draw_token, {kind}",
        model=shape.name,
        dtype=torch.float32,
        shape={"N": rows, "V": shape.vocabulary},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows),
        meaning=functools.partial(reference.draw_token, **dict(zip(NAMES, settings, strict=True))),
        ours=ours,
        baselines=baselines,
        traffic=4 * rows * shape.vocabulary,
        flops=0,
        skipped=skipped | not_compiled,
    )


def cases(setting: Setting) -> list[Case]:
    # Of a model it is the vocabulary alone that matters; a GPU is lent for minutes.
    models = setting.models[: 1 if setting.device.type == "cuda" else None]
    sizes = [(shape, rows, kind) for shape, _ in models for rows in ROWS for kind in SETTINGS]
    return [contest(setting, *size).case(setting) for size in sizes]


def test_draw_token(case, measured):
    measured(case)
