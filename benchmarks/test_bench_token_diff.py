"""`token_diff`: the first changed position and the number of changes of token sequences (B, m)."""

from __future__ import annotations

import torch
from cases import Case, Contest, Inputs, Setting, backends_of, with_compiled
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import reference

SEQUENCES, LENGTH, VOCABULARY = 16, 1024, 151936


def compared(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    changed = old != new
    count = changed.sum(-1)
    return torch.where(count > 0, changed.int().argmax(-1), old.shape[-1]), count


def cases(setting: Setting) -> list[Case]:
    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        options = {"generator": generator, "device": setting.device}
        old = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), **options)
        changed = torch.rand(SEQUENCES, LENGTH, **options) < 2 / LENGTH  # few tokens change, in some sequences none
        return Inputs((old, torch.where(changed, old + 1, old)), ())

    ours, skipped = backends_of("token_diff", setting.device, ops.token_diff)
    baselines, not_compiled = with_compiled(compared, setting, setting.models[0][0].name)
    contest = Contest(
        operator="token_diff",
        model="any",
        dtype=torch.int64,
        shape={"B": SEQUENCES, "m": LENGTH},
        inputs=inputs,
        meaning=reference.token_diff,
        ours=ours,
        baselines=baselines,
        traffic=2 * SEQUENCES * (LENGTH + 1) * 8,
        flops=0,
        skipped=skipped | not_compiled,
    )
    return [contest.case(setting)]


def test_token_diff(case, measured):
    measured(case)
