"""A whole decode against the published schedule: everything but rollouts, which both sides replay; and with them.

Settings are the published ones for MATH-500, but with latents. On a CPU SmolLM2 and its reward model answer a question
in float32, where both sides give the same tokens; nabla_fast runs without its gradient cache as well. The published
code knows the anchor "argmax" alone; under "rollout" its schedule is run with our anchor. On a GPU models of real sizes
have random weights, and rollouts are random too; the published schedule decodes one sequence after the other.

With rollouts, on a CPU, each side draws its own: nabla_fast as ``generate`` does, the published schedule token by token
with the model as it is. There bfloat16 is measured as well, where the processor multiplies it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from cases import Case, Record, Setting
from pairs import Loaded, PlainRollouts, RandomRollouts, Replay, numbered_chat, smollm2
from published_schedule import PublishedSchedule
from sides import Outcome, compare, side_record
from tables import CHECKPOINTED, NO_CACHE, OURS
from test_bench_dto import load

import nabla_fast as nf
from nabla_fast import decoder
from nabla_fast.generate import stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.models.pretrained import multiplies_bfloat16
from nabla_fast.objective import Objective
from nabla_fast.rollout import HFRollout
from nabla_fast.sampling import Sampler

# To either of these SmolLM2 writes an answer of 256 tokens and more.
QUESTIONS = (
    "A train leaves at 9:40 and travels 210 km at 60 km/h. It then waits 25 minutes and travels another 90 km at "
    "45 km/h. When does it arrive? Explain every step.",
    "Three friends share a bill of 96 dollars. Maria pays twice as much as Ben, and Ben pays twice as much as Carl. "
    "How much does each pay? Explain every step in detail.",
)
ANCHORS = ("argmax", "rollout")
BATCHES = (1, 4, 16)
# Tokens of an answer of each. Graphs keep the activations of both models, by computation 10 MB a token, and the first
# call of another size takes nearly as much again: 16 answers of 1,024 tokens would not fit into 140 GB.
LONGEST = (1024, 1024, 256)
_COUNTED = ("gradient_evaluations", "dto_iterations", "optimised_positions", "rollouts", "rejections", "reward_calls")


def ours(loaded: Loaded, chats: list[Any], config: nf.NablaConfig, rollouts: Any) -> Outcome:
    """All prompts together."""
    pair = loaded.pair
    prompts = [tuple(generation_prompt_ids(pair.tokenizer, chat)) for chat in chats]
    frames = [pair.reward_model.chat_frame(chat) for chat in chats]
    sequences = pair.sequences(prompts, frames, config)
    with torch.no_grad():
        objective = Objective(pair.language_model, pair.reward_model, config)
        decoder.Decoder(objective, rollouts, Sampler(), stop_rule(pair, config)).decode(sequences)
    outcome = _outcome([s.stats for s in sequences], [s.current.tokens for s in sequences])
    return outcome | objective.graph_stats()


def published(loaded: Loaded, chats: list[Any], config: nf.NablaConfig, rollouts: Any) -> Outcome:
    """One prompt after the other."""
    schedule = PublishedSchedule(loaded.models, rollouts, config, stop_rule(loaded.pair, config))
    states = [schedule.decode(chat) for chat in chats]
    return _outcome([s.stats for s in states], [s.trajectory.tokens for s in states])


def _outcome(stats: list[Any], tokens: list[torch.Tensor]) -> Outcome:
    totals = nf.stats.Stats(stats).totals
    counters = totals.counters()
    return {
        **{name: counters[name] for name in _COUNTED},
        "seconds": {phase: seconds for phase, seconds in totals.seconds.items() if phase != "rollout"},
        "uncharged_seconds": totals.seconds["rollout"],
        "result": torch.cat(tokens).cpu(),
    }


def measure_whole(setting: Setting, dtype: str, chat: Any, config: nf.NablaConfig, which: dict[str, Any]) -> Record:
    """Rollouts are drawn by each side on its own, and charged."""
    loaded = smollm2(dtype)
    model = loaded.pair.language_model

    def charged(side: Any, rollouts: Any, own: nf.NablaConfig) -> Outcome:
        outcome = side(loaded, [chat], own, rollouts)
        outcome["seconds"]["rollout"] = outcome.pop("uncharged_seconds")
        return outcome

    def sides(own: nf.NablaConfig) -> dict[str, Any]:
        return {
            OURS: functools.partial(charged, ours, HFRollout(model, draft_tokens=own.draft_tokens), own),
            "published": functools.partial(charged, published, PlainRollouts(loaded.models.language_model), own),
        }

    for side in sides(config.replace(max_new_tokens=8, max_rollouts=2, gradient_threshold=0.0)).values():
        side()
    figures = compare(sides(config), setting.device, repeats=1, again=False)
    shape = {**which, "tokens": config.max_new_tokens, "rollouts": config.max_rollouts}
    name = "decode with its rollouts"
    return side_record("generate", name, loaded.name, loaded.models.language_model.dtype, shape, figures)


def measure_generate(setting: Setting, chats: list[Any], config: nf.NablaConfig, which: dict[str, Any]) -> Record:
    """``which`` tells the case from others of the same settings."""
    loaded, _ = load(setting.device)
    on_cpu = setting.device.type == "cpu"
    rollouts = Replay(HFRollout(loaded.pair.language_model)) if on_cpu else RandomRollouts(loaded.pair)
    settings = {OURS: config, NO_CACHE: config.replace(gradient_cache=False), "published": config}
    if not on_cpu:  # a GPU is lent for minutes
        del settings[NO_CACHE]
        if len(chats) == BATCHES[-1]:
            settings[CHECKPOINTED] = config.replace(checkpoint_activations=True)
    sides = {
        name: functools.partial(published if name == "published" else ours, loaded, chats, own, rollouts)
        for name, own in settings.items()
    }
    short = config.replace(max_new_tokens=8, max_rollouts=2, gradient_threshold=0.0)  # taken, and always passed
    for side in (ours, published):  # first calls load code and choose kernels
        side(loaded, chats[:1], short, rollouts)
    figures = compare(sides, setting.device, repeats=1, again=False)
    shape = {**which, "tokens": config.max_new_tokens, "rollouts": config.max_rollouts}
    name = f"decode, anchor {config.anchor}"
    return side_record("generate", name, loaded.name, loaded.models.language_model.dtype, shape, figures)


def cases(setting: Setting) -> list[Case]:
    def case(name: str, *arguments: Any) -> Case:
        return Case(f"generate-{name}", functools.partial(measure_generate, setting, *arguments))

    if setting.device.type == "cpu":
        tokens, rollouts = (24, 2) if setting.quick else (256, 8)
        config = nf.NablaConfig.published(
            "math500", parameterization="latents", max_new_tokens=tokens, max_rollouts=rollouts
        )
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        both = [
            case(f"question-{i + 1}-{anchor}", [chat], config.replace(anchor=anchor), {"question": i + 1})
            for i, chat in enumerate(chats)
            for anchor in ANCHORS
        ]
        # The published schedule takes minutes for these.
        shorter = config.replace(max_new_tokens=min(tokens, 96), max_rollouts=min(rollouts, 4))
        whole = [
            Case(
                f"generate-whole-{i + 1}-{dtype}",
                functools.partial(measure_whole, setting, dtype, chat, shorter, {"question": i + 1}),
            )
            for dtype in ("float32", *(("bfloat16",) if multiplies_bfloat16() else ()))
            for i, chat in enumerate(chats)
        ]
        return [both[0], whole[0]] if setting.quick else [*both, *whole]
    # The gradient criterion is taken and always passes, so that the work does not depend on what the weights say.
    config = nf.NablaConfig.published(
        "math500",
        parameterization="latents",
        confidence_threshold=None,
        gradient_threshold=0.0,
        eos_token_ids=(),
    )
    return [
        case(
            f"batch-{batch}",
            [numbered_chat(i) for i in range(batch)],
            config.replace(max_new_tokens=128 if setting.quick else tokens),
            {"prompts": batch},
        )
        for batch, tokens in zip(BATCHES, LONGEST, strict=True)
    ]


def test_generate(case, measured):
    measured(case)
