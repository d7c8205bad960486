"""Rollouts from vLLM in this process, run by a Python that has it.

Arguments: the model's folder, a file with prompts (lists of token ids) as JSON, and the file for the results: greedy
tokens, how far their latents are from the full forward, and whether another model was refused.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.loading import load_language_model
from nabla_fast.rollout import RolloutError, StopRule, VLLMRollout, rollout
from nabla_fast.rollout.vllm_engine import VLLMEngine
from nabla_fast.sequence import Sequence


def main() -> None:
    folder, given, results = sys.argv[1:]
    with closing(VLLMEngine(folder, dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True)) as engine:
        outcome = ask(engine, folder, json.loads(Path(given).read_text()))
    Path(results).write_text(json.dumps(outcome))


@torch.no_grad()
def ask(engine: VLLMEngine, folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    model = LanguageModel(*load_language_model(folder, dtype="float32"))
    backend = VLLMRollout(model, engine)
    sequences = [Sequence(tuple(prompt), (), 0, 16) for prompt in prompts]
    drawn = rollout(backend, sequences, Sampling(temperature=0.0), StopRule(frozenset()))
    furthest = 0.0
    for prompt, result in zip(prompts, drawn, strict=True):
        ids = torch.tensor([[*prompt, *result.tokens.tolist()]])
        hidden = model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        furthest = max(furthest, float((result.latents - hidden[len(prompt) - 1 : -1]).abs().max()))
    weight = model.model.get_input_embeddings().weight
    weight.copy_(weight.roll(1, 0))
    try:
        VLLMRollout(model, engine)
        refused = False
    except RolloutError:
        refused = True
    return {"tokens": [r.tokens.tolist() for r in drawn], "latents": furthest, "refused": refused}


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    main()
    # Now and then, a thread that vLLM's build for CPUs does not join aborts an interpreter that ends.
    os._exit(0)
