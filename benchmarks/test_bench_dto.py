"""A whole optimization of 20 steps against the published schedule, with one row that moves and with all of them.

Settings are the published ones for MATH-500, but with latents. All start from the same latents, those of random tokens,
with nothing in a cache: what a decode does at its first position. nabla_fast runs with ``checkpoint_activations`` as
well, which takes less memory and more time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import published_schedule
import torch
from cases import Case, Record, Setting
from pairs import Loaded, numbered_chat, random_pair, smollm2
from published_schedule import PublishedSchedule
from sides import Outcome, compare, side_record
from tables import CHECKPOINTED, OURS
from torch import Tensor

import nabla_fast as nf
from nabla_fast import dto
from nabla_fast.generate import stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.objective import Objective
from nabla_fast.rollout import HFRollout
from nabla_fast.sampling import sequence_seeds
from nabla_fast.sequence import Sequence, Trajectory

STEPS = 20
AHEAD = (64, 256, 1024)
QUESTION = [{"role": "user", "content": "Explain how a water wheel works, and what limits its power."}]


@functools.cache
def load(device: torch.device) -> tuple[Loaded, Any]:
    """The pair of a device, and a question for it."""
    return (smollm2(), QUESTION) if device.type == "cpu" else (random_pair(device), numbered_chat(0))


@torch.no_grad()
def start(loaded: Loaded, chat: Any, ahead: int) -> tuple[Tensor, Tensor]:
    """Random tokens (m,) as a response to ``chat``, and the latents (m, d) that predict each."""
    prompt = generation_prompt_ids(loaded.pair.tokenizer, chat)
    generator = torch.Generator().manual_seed(ahead)
    tokens = torch.randint(0, loaded.models.vocab_size, (ahead,), generator=generator).to(loaded.models.device)
    ids = torch.cat([torch.tensor(prompt, device=tokens.device), tokens[:-1]])
    hidden = loaded.models.language_model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return tokens, hidden[len(prompt) - 1 :]


def ours(loaded: Loaded, chat: Any, config: nf.NablaConfig, tokens: Tensor, latents: Tensor) -> Outcome:
    pair = loaded.pair
    prompt = tuple(generation_prompt_ids(pair.tokenizer, chat))
    (seed,) = sequence_seeds(config.seed, [prompt])
    objective = Objective(pair.language_model, pair.reward_model, config)
    sequence = Sequence(prompt, (), seed, len(tokens), pair.reward_model.chat_frame(chat))
    head = pair.language_model.head
    with torch.no_grad():
        hard = tokens if config.anchor == "rollout" else dto.start_tokens(latents, True, seed, 0, head, config)
        uncertain = torch.ones(len(tokens), dtype=torch.bool)
        sequence.trajectory = Trajectory(tokens.cpu(), latents, hard.cpu(), uncertain, math.nan)
        (done,) = dto.optimize_batch([sequence], [latents], objective)
    return {"gradient_evaluations": done.gradient_evaluations, "result": done.logits[0].float()}


def published(loaded: Loaded, chat: Any, config: nf.NablaConfig, tokens: Tensor, latents: Tensor) -> Outcome:
    rollouts = HFRollout(loaded.pair.language_model)  # none is drawn
    schedule = PublishedSchedule(loaded.models, rollouts, config, stop_rule(loaded.pair, config))
    state = schedule.start(chat)
    state.trajectory = published_schedule.Trajectory(tokens, latents, 0.0)
    with torch.no_grad():
        logits = schedule.optimize(state)
    return {"gradient_evaluations": state.stats.gradient_evaluations, "result": logits.float()}


def measure_dto(setting: Setting, ahead: int, rows: str, steps: int = STEPS) -> Record:
    loaded, chat = load(setting.device)
    config = nf.NablaConfig.published(
        "math500",
        parameterization="latents",
        max_iters=steps,
        max_new_tokens=ahead,
        update_postfix=rows == "all",
        eos_token_ids=(),
        gradient_threshold=None,
    )
    tokens, latents = start(loaded, chat, ahead)
    settings = {OURS: config, CHECKPOINTED: config.replace(checkpoint_activations=True), "published": config}
    sides = {
        name: functools.partial(published if name == "published" else ours, loaded, chat, own, tokens, latents)
        for name, own in settings.items()
    }
    # First calls load code and choose kernels: on a GPU, of this size's own.
    first = slice(None) if setting.device.type == "cuda" else slice(8)
    for side in (ours, published):
        side(loaded, chat, config.replace(max_iters=1), tokens[first], latents[first])
    # Minutes on a CPU; on a GPU, which is lent for minutes, what takes longest.
    long = ahead > AHEAD[0] if setting.device.type == "cpu" else rows == "all"
    again = not setting.quick and not (long and setting.device.type == "cuda")
    figures = compare(sides, setting.device, repeats=1 if long or setting.quick else 3, again=again)
    dtype = loaded.models.language_model.dtype
    shape = {"m": ahead} | ({} if steps == STEPS else {"steps": steps})
    return side_record("dto", f"DTO, {rows} row{'s' * (rows == 'all')}", loaded.name, dtype, shape, figures)


def cases(setting: Setting) -> list[Case]:
    # With all rows nearly every step takes a new gradient.
    steps = {"one": STEPS, "all": 6 if setting.quick else STEPS}
    return [
        Case(f"dto-{rows}-{ahead}", functools.partial(measure_dto, setting, ahead, rows, steps[rows]))
        for ahead in (AHEAD[:1] if setting.quick else AHEAD)
        for rows in ("one", "all")
    ]


def test_dto(case, measured):
    measured(case)
