"""Drawing the next token of some sequences at the published settings, as `Sampler` does and as transformers does.

Logits are random, and scaled until they are as peaked as a real model's: on its own answers the nucleus of SmolLM2-135M
holds two tokens at the median and three on average, and so it does here (four and five with the vocabulary of Qwen2.5).
A row whose nucleus is wider than 256 tokens, as at a high temperature, is sorted as a whole and takes longer. The two
sides draw with different noise, so either is held to draw from the nucleus.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

import torch
from cases import Case, Contest, Inputs, Setting, libraries_of, with_compiled
from shapes import Shape
from tables import OURS
from torch import Tensor

import nabla_fast as nf
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence
from nabla_fast.testing.operators import randn

ROWS = (1, 8, 32)
PUBLISHED = nf.Sampling(temperature=0.6, top_p=0.95)
PEAKED = 7.0
"""Standard deviation of the logits."""


def ours(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    rows = sequences[: len(logits)]
    return Sampler()(logits, PUBLISHED, rows, [sequence.prefix for sequence in rows])


def eager(logits: Tensor, _: Seq[Sequence]) -> Tensor:
    """What `generate` of transformers does, by its own warpers."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    for warper in (TemperatureLogitsWarper(PUBLISHED.temperature), TopPLogitsWarper(PUBLISHED.top_p)):
        logits = warper(ids, logits)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def flashinfer(logits: Tensor, _: Seq[Sequence]) -> Tensor:
    """Its kernels for probabilities and for top-p, which rejects instead of sorting."""
    from flashinfer import sampling

    return sampling.top_p_sampling_from_probs(sampling.softmax(logits, PUBLISHED.temperature), PUBLISHED.top_p)


def nucleus(logits: Tensor, _: Seq[Sequence]) -> Tensor:
    """Whether each token (N, V) is one of the fewest whose probability reaches top-p."""
    ordered, index = (logits / PUBLISHED.temperature).softmax(-1).sort(dim=-1, descending=True)
    inside = ordered.cumsum(-1) - ordered < PUBLISHED.top_p
    return inside.scatter(-1, index, inside)


def check_drawn(contest: Contest, name: str, inputs: Inputs, meant: Seq[Tensor]) -> dict[str, float]:
    """AssertionError if a contender's first tokens are not in the nucleus."""
    function = {**contest.ours, **contest.baselines, **contest.libraries}[name]
    (inside,) = meant
    drawn = function(*inputs.rows, *inputs.shared)[: len(inside)].long()
    outside = int((~inside.gather(1, drawn[:, None])).sum())
    if outside:
        raise AssertionError(f"sampling {contest.model}: {name} is wrong: {outside} tokens are not in the nucleus")
    return {"error": 0.0, "rows_with_other_integers": 0.0, "nucleus": float(inside.sum(-1).double().mean())}


def inputs(seed: int, setting: Setting, shape: Shape, rows: int) -> Inputs:
    logits = randn(rows, shape.vocabulary, seed=seed, scale=PEAKED, device=setting.device)
    sequences = [Sequence((1,), tuple(range(row)), 1000 * seed + row, 10**6) for row in range(rows)]
    return Inputs((logits,), (sequences,))


def contest(setting: Setting, shape: Shape, rows: int) -> Contest:
    baselines, not_compiled = with_compiled(eager, setting, shape.name)
    libraries, not_installed = libraries_of({"flashinfer": ("flashinfer", flashinfer)}, setting.device)
    return Contest(
        operator="sampling",
        model=shape.name,
        dtype=torch.float32,  # what both sides sample from, whatever the model's dtype is
        shape={"N": rows, "V": shape.vocabulary},
        inputs=functools.partial(inputs, setting=setting, shape=shape, rows=rows),
        meaning=nucleus,
        ours={OURS: ours},
        baselines=baselines,
        traffic=4 * rows * shape.vocabulary,
        flops=0,
        skipped=not_compiled | not_installed,
        libraries=libraries,
        checked=check_drawn,
    )


def cases(setting: Setting) -> list[Case]:
    # Of a model it is the vocabulary alone that matters; a GPU is lent for minutes.
    models = setting.models[: 1 if setting.device.type == "cuda" else None]
    return [contest(setting, shape, rows).case(setting) for shape, _ in models for rows in ROWS]


def test_sampling(case, measured):
    measured(case)
