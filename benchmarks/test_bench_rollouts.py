"""Rollouts: eight prompts together against one after the other, and a decode's rollouts with and without drafts.

On a CPU with SmolLM2 and its reward model in float32; both sides of a case give the same tokens. On a GPU the models
have random weights, whose rollouts follow no draft; there captured steps are held against steps operator by operator,
and against transformers' own ``generate``, which draws other tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from cases import Case, Record, Setting
from pairs import Loaded, numbered_chat
from sides import Outcome, compare, side_record
from tables import ALONE, NO_DRAFTS, NO_GRAPHS, OURS
from test_bench_dto import load
from transformers import GenerationConfig

import nabla_fast as nf
from nabla_fast.decoder import Decoder
from nabla_fast.generate import stop_rule
from nabla_fast.graphs import usable
from nabla_fast.objective import Objective
from nabla_fast.rollout import HFRollout, Rollout, RolloutStream, rollout
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

TRANSFORMERS = "transformers generate"
# Sequences in a batch on a GPU.
BATCHES = (1, 8, 32)
# Arithmetic with its steps, and open questions.
QUESTIONS = (
    "What is 47 times 6? Write the steps.",
    "What is the greatest common divisor of 84 and 36? Explain how you found it.",
    "A box holds 12 eggs. How many eggs are in 7 boxes, if 5 are broken?",
    "How many times does the letter r appear in strawberry? Spell the word.",
    "Why is the sky blue?",
    "Give me three tips for better sleep.",
    "Explain what a hash table is.",
    "Write a short story about a fox.",
)


def begun(loaded: Loaded, chats: list[Any], config: nf.NablaConfig) -> list[Sequence]:
    return loaded.pair.sequences(*loaded.pair.prompts(chats, config), config)


def together(loaded: Loaded, chats: list[Any], config: nf.NablaConfig, at_once: int) -> Outcome:
    """First rollouts of all prompts, ``at_once`` of them in a batch."""
    sequences = begun(loaded, chats, config)
    model, stop = loaded.pair.language_model, stop_rule(loaded.pair, config)
    backend = HFRollout(model, graphs=config.graphs and usable(model.device))
    drawn = [
        one
        for first in range(0, len(sequences), at_once)
        for one in rollout(backend, sequences[first : first + at_once], config.rollout, stop)
    ]
    return {"tokens": sum(len(one.tokens) for one in drawn), "result": torch.cat([one.tokens for one in drawn]).cpu()}


def transformers_generate(loaded: Loaded, chats: list[Any], config: nf.NablaConfig) -> Outcome:
    """The same number of tokens by the model's own ``generate``, with its dynamic cache."""
    pair = loaded.pair
    prompts, _ = pair.prompts(chats, config)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device, sampling = loaded.models.device, config.rollout
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=0,
    )
    out = loaded.models.language_model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    drawn = out[:, width:].cpu()
    return {"tokens": drawn.numel(), "result": drawn.flatten()}


class Proposals:
    """A back end that counts what its rollouts but the first of each sequence took; its own stream."""

    def __init__(self, backend: HFRollout) -> None:
        self.backend = backend
        self.counted: dict[str, int] = dict.fromkeys(("tokens", "calls", "drafted", "accepted"), 0)
        self.proposals: set[Sequence] = set()

    def open(self, sampling: nf.Sampling, stop: Any) -> Proposals:
        self.stream: RolloutStream = self.backend.open(sampling, stop)
        return self

    def submit(self, sequence: Sequence) -> None:
        if sequence.prefix:
            self.proposals.add(sequence)
        self.stream.submit(sequence)

    def collect(self) -> list[tuple[Sequence, Rollout]]:
        ended = self.stream.collect()
        for sequence, drawn in ended:
            if sequence in self.proposals:
                self.counted["tokens"] += len(drawn.tokens)
                for name in ("calls", "drafted", "accepted"):
                    self.counted[name] += getattr(drawn, name)
        return ended

    def close(self) -> None:
        self.stream.close()


def decode(loaded: Loaded, chats: list[Any], config: nf.NablaConfig) -> Outcome:
    """A whole decode; its rollouts alone are charged."""
    pair = loaded.pair
    sequences = begun(loaded, chats, config)
    rollouts = Proposals(HFRollout(pair.language_model, draft_tokens=config.draft_tokens))
    with torch.no_grad():
        objective = Objective(pair.language_model, pair.reward_model, config)
        Decoder(objective, rollouts, Sampler(), stop_rule(pair, config)).decode(sequences)
    totals = nf.stats.Stats([s.stats for s in sequences]).totals
    return {
        **rollouts.counted,
        "rollouts": totals.rollouts,
        "uncharged_seconds": sum(seconds for phase, seconds in totals.seconds.items() if phase != "rollout"),
        "result": torch.cat([s.current.tokens for s in sequences]),
    }


def measure_rollouts(
    setting: Setting,
    name: str,
    chats: list[Any],
    sides: dict[str, Any],
    shape: Any,
    repeats: int,
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> Record:
    """``sides`` are functions of a pair and chats; ``skipped``: side → why it is not run."""
    loaded, _ = load(setting.device)
    for side in sides.values():  # first calls choose kernels
        side(loaded, chats[:1])
    made = {who: functools.partial(side, loaded, chats) for who, side in sides.items()}
    figures = compare(made, setting.device, repeats=1 if setting.quick else repeats, again=False)
    dtype = loaded.models.language_model.dtype
    return side_record("rollouts", name, loaded.name, dtype, {"prompts": len(chats), **shape}, figures, skipped)


def cases(setting: Setting) -> list[Case]:
    def case(name: str, *arguments: Any) -> Case:
        return Case(f"rollouts-{name}", functools.partial(measure_rollouts, setting, *arguments))

    on_cpu = setting.device.type == "cpu"
    tokens = 8 if setting.quick else 64
    config = nf.NablaConfig(max_new_tokens=tokens)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    if not on_cpu:
        config = gpu_config(setting)
        return [
            case(f"batch-{batch}-{other.split()[-1]}", "first rollouts", *_on_a_gpu(config, batch, other))
            for batch in ((2,) if setting.quick else BATCHES)
            for other in (NO_GRAPHS, TRANSFORMERS)
        ]
    chats = asked[:2] if setting.quick else asked
    sides = {
        OURS: functools.partial(together, config=config, at_once=len(chats)),
        ALONE: functools.partial(together, config=config, at_once=1),
    }
    both = [case("together", "first rollouts together", chats, sides, {"tokens": tokens}, 3)]
    # Settings under which most rollouts are proposals, from positions all over the answer.
    tokens, rollouts = (12, 3) if setting.quick else (96, 6)
    config = nf.NablaConfig(
        max_new_tokens=tokens,
        max_rollouts=rollouts,
        anchor="rollout",
        learning_rate=0.1,
        reward_coeff=5.0,
        gradient_threshold=None,
    )
    some = asked[:1] if setting.quick else asked[::2]
    # More at once leave no room for drafts on a CPU.
    for at_once in (1, 4):
        own = config.replace(max_batch_size=at_once)
        sides = {
            OURS: functools.partial(decode, config=own),
            NO_DRAFTS: functools.partial(decode, config=own.replace(draft_tokens=0)),
        }
        shape = {"at once": at_once, "tokens": tokens, "rollouts": rollouts}
        both.append(case(f"drafts-{at_once}", "a decode's rollouts", some, sides, shape, 1))
    return both


def gpu_config(setting: Setting) -> nf.NablaConfig:
    """Settings for models of random weights.

    Their logits are so close that at the usual temperature a nucleus is half of the vocabulary; at this one it is a few
    tokens, as with trained models.
    """
    return nf.NablaConfig(
        max_new_tokens=8 if setting.quick else 64,
        eos_token_ids=(),
        rollout=nf.Sampling(temperature=0.1, top_p=0.95),
    )


def _on_a_gpu(config: nf.NablaConfig, batch: int, other: str) -> tuple[Any, ...]:
    """Chats, sides, shape and repeats of a case: captured steps against others."""
    theirs = {
        NO_GRAPHS: functools.partial(together, config=config.replace(graphs=False), at_once=batch),
        TRANSFORMERS: functools.partial(transformers_generate, config=config),
    }
    sides = {OURS: functools.partial(together, config=config, at_once=batch), other: theirs[other]}
    return [numbered_chat(i) for i in range(batch)], sides, {"tokens": config.max_new_tokens}, 3


def test_rollouts(case, measured):
    measured(case)
