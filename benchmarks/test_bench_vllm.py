"""First rollouts of a batch on a GPU: captured steps against vLLM, each with tokens of its own.

vLLM runs as a user has it who draws rollouts there, in a process of its own beside both models. Its weights are random,
too, and it gives tokens alone: the latents that DTO needs take a forward pass over them more. These are cases of their
own, since vLLM takes minutes to start.
"""

from __future__ import annotations

import copy
import functools
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cases import Case, Record, Setting, why_not_installed
from pairs import Loaded, numbered_chat
from sides import Outcome
from tables import OURS, VLLM
from test_bench_dto import load
from test_bench_rollouts import BATCHES, begun, gpu_config, measure_rollouts, together

import nabla_fast as nf
from nabla_fast.generate import stop_rule
from nabla_fast.rollout.engine import Engine, TokenRequest
from nabla_fast.rollout.vllm_engine import VLLMEngine

# Tokens of a prompt and its answer.
_LONGEST = 1024


@functools.cache
def started(device: torch.device) -> tuple[Engine, TemporaryDirectory[str]]:
    """A vLLM with a model of the language model's configuration, and the folder that describes it."""
    loaded, _ = load(device)
    model, folder = loaded.models.language_model, TemporaryDirectory()
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder.name)
    loaded.models.tokenizer.save_pretrained(folder.name)
    dtype = str(model.dtype).removeprefix("torch.")
    # Each prompt is computed anew in every run, as here.
    options = {"load_format": "dummy", "enable_prefix_caching": False, "max_model_len": _LONGEST}
    return VLLMEngine(folder.name, dtype=dtype, **options), folder


def by_vllm(loaded: Loaded, chats: list[Any], config: nf.NablaConfig) -> Outcome:
    engine, _ = started(loaded.models.device)
    requests, stop = engine.open(), stop_rule(loaded.pair, config)
    sequences = begun(loaded, chats, config)
    for i, sequence in enumerate(sequences):
        requests.send(i, TokenRequest.of(sequence, (), config.rollout, stop))
    answers: dict[int, Any] = {}
    while len(answers) < len(sequences):
        answers.update(requests.wait())
    requests.close()
    drawn = [token for i in range(len(sequences)) for token in answers[i].tokens]
    return {"tokens": len(drawn), "result": torch.tensor(drawn)}


def measure_vllm(setting: Setting, chats: list[Any], config: nf.NablaConfig) -> Record:
    sides: dict[str, Any] = {OURS: functools.partial(together, config=config, at_once=len(chats))}
    reason = why_not_installed("vllm", VLLM, setting.device)
    if reason is None:
        sides[VLLM] = functools.partial(by_vllm, config=config)
    skipped = {} if reason is None else {VLLM: reason}
    shape = {"tokens": config.max_new_tokens}
    return measure_rollouts(setting, "first rollouts", chats, sides, shape, 3, skipped)


def cases(setting: Setting) -> list[Case]:
    if setting.device.type == "cpu":
        return []
    config = gpu_config(setting)
    return [
        Case(
            f"vllm-batch-{batch}",
            functools.partial(measure_vllm, setting, [numbered_chat(i) for i in range(batch)], config),
        )
        for batch in ((2,) if setting.quick else BATCHES)
    ]


def test_vllm(case, measured):
    measured(case)
