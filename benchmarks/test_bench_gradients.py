"""A gradient of both models, over tokens behind a cached prompt: as one graph, operator by operator, and as published.

Several gradients in a row, each after another token has changed, as a decode asks for them; the time is that of one.
The published schedule computes the whole sequence and a gradient over the vocabulary. Graphs are of GPUs alone.
"""

from __future__ import annotations

import functools
from typing import Any

import published_schedule
import torch
from cases import Case, Record, Setting
from pairs import Loaded, numbered_chat
from published_schedule import PublishedSchedule
from sides import Outcome, compare, side_record
from tables import COMPILED, NO_GRAPHS, OURS
from test_bench_dto import load, start
from torch import Tensor

import nabla_fast as nf
from nabla_fast.generate import stop_rule
from nabla_fast.objective import Objective, Request
from nabla_fast.rollout import HFRollout

AHEAD = (256, 512, 1024)
BATCHES = (1, 16)
# In a row.
GRADIENTS = {"cpu": 2, "cuda": 8}
# The token that changes; those before it are committed.
_CHANGED = 10


class Ours:
    """Keeps one objective, and with it its graphs, from one call to the next, as a decode does."""

    def __init__(self, loaded: Loaded, config: nf.NablaConfig, batch: int, tokens: Tensor) -> None:
        pair = loaded.pair
        self.objective = Objective(pair.language_model, pair.reward_model, config)
        chats = [numbered_chat(i) for i in range(batch)]
        self.sequences = pair.sequences(*pair.prompts(chats, config), config)
        self.tokens, self.gradients = tokens.cpu(), GRADIENTS[loaded.models.device.type]

    @torch.no_grad()
    def __call__(self) -> Outcome:
        for token in range(self.gradients):
            response = self.tokens.clone()
            response[_CHANGED + 1] = token + 5
            found = self.objective.evaluate([Request(s, response, _CHANGED) for s in self.sequences])
        return {"gradient_evaluations": self.gradients, "result": found[0].log_likelihoods}


def published(loaded: Loaded, config: nf.NablaConfig, batch: int, tokens: Tensor, latents: Tensor) -> Outcome:
    """One sequence after the other."""
    schedule = PublishedSchedule(
        loaded.models, HFRollout(loaded.pair.language_model), config, stop_rule(loaded.pair, config)
    )
    for i in range(batch):
        state = schedule.start(numbered_chat(i))
        state.trajectory = published_schedule.Trajectory(tokens, latents, 0.0)
        state.position = _CHANGED
        for token in range(GRADIENTS[loaded.models.device.type]):
            hard = tokens[_CHANGED:].clone()
            hard[1] = token + 5
            gradient = schedule.gradient(state, tokens[:0], hard)
    return {
        "gradient_evaluations": GRADIENTS[loaded.models.device.type] * batch,
        "result": gradient.float().norm(dim=-1),
    }


def measure_gradients(setting: Setting, ahead: int, batch: int) -> Record:
    loaded, chat = load(setting.device)
    tokens, latents = start(loaded, chat, ahead)
    config = nf.NablaConfig(max_new_tokens=ahead, eos_token_ids=(), gradient_cache=False)
    settings = {OURS: config}
    if setting.device.type == "cuda":
        settings[NO_GRAPHS] = config.replace(graphs=False)
        if ahead == AHEAD[1] and batch == 1:  # it takes a minute to compile
            settings[COMPILED] = config.replace(compile=True)
    sides: dict[str, Any] = {name: Ours(loaded, own, batch, tokens) for name, own in settings.items()}
    sides["published"] = functools.partial(published, loaded, config, batch, tokens, latents)
    for side in sides.values():  # prompts, captures, and the choice of kernels
        side()
    figures = compare(sides, setting.device, repeats=1 if setting.quick else 3, again=not setting.quick)
    for name, figure in figures.items():
        figure["median_ms"] /= GRADIENTS[setting.device.type]
        if name in settings:
            figure |= sides[name].objective.graph_stats()
    dtype = loaded.models.language_model.dtype
    return side_record("gradients", "gradient", loaded.name, dtype, {"ahead": ahead, "prompts": batch}, figures)


def cases(setting: Setting) -> list[Case]:
    on_cpu = setting.device.type == "cpu"
    sizes = [(64, 1)] if setting.quick else [(ahead, 1) for ahead in (AHEAD[:1] if on_cpu else AHEAD)]
    if not on_cpu and not setting.quick:
        sizes += [(AHEAD[0], batch) for batch in BATCHES[1:]]
    return [
        Case(f"gradient-{ahead}-batch-{batch}", functools.partial(measure_gradients, setting, ahead, batch))
        for ahead, batch in sizes
    ]


def test_gradients(case, measured):
    measured(case)
