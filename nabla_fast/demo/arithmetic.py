"""The models that ship with the package, for the problems of `nabla_fast.evaluation.arithmetic`.

A policy, a reward model and a process reward model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_fast.config import NablaConfig

POLICY_PATH = Path(__file__).parent / "arithmetic_policy"
REWARD_PATH = Path(__file__).parent / "arithmetic_reward"
PROCESS_REWARD_PATH = Path(__file__).parent / "arithmetic_process_reward"

# Of the test split; greedy decoding goes wrong in it.
QUESTION = "Compute 64 * 4 + 505 - 34 * 7 - 15."

# Longest solution: 2 products of 9 tokens, 3 sums of 12, a box of 5 and the end. The rest is what
# `benchmarks/quality.py tune` chose on the tuning split.
CONFIG = NablaConfig(
    max_new_tokens=64,
    anchor="rollout",
    learning_rate=3.0,
    reward_coeff=10.0,
    confidence_threshold=0.7,
    gradient_threshold=None,
)

# Its gradient was not taught to point: the token is chosen by the value of the answer so far.
PROCESS_CONFIG = CONFIG.replace(proposal="guided")


def load_policy(**where: Any) -> tuple[Any, Any]:
    """The bundled language model (3.4 million parameters, d 256, 4 layers) and its tokenizer.

    Args:
        where: ``device``, ``dtype``, ``attn_implementation`` and ``quantization``, as
            `nabla_fast.models.loading.load_language_model` takes them; errors are as there.
    """
    from nabla_fast.models.loading import load_language_model

    return load_language_model(POLICY_PATH, **where)


def load_reward(**where: Any) -> tuple[Any, Any]:
    """The bundled reward model, of the policy's size and vocabulary, and its tokenizer. Arguments as `load_policy`."""
    from nabla_fast.models.loading import load_reward_model

    return load_reward_model(REWARD_PATH, **where)


def load_process_reward(**where: Any) -> tuple[Any, Any]:
    """The bundled process reward model and its tokenizer. Arguments as `load_policy`.

    It has the reward model's size and vocabulary, and is a value head over prefixes: at every token, and above all at
    the line break behind a step, it says whether all that is there is right.

    Returns:
        A `nabla_fast.ProcessReward`, whose reward is the value of the last step, which is of all before it too, and the
        tokenizer.
    """
    from nabla_fast.models.loading import load_reward_model

    process, tokenizer = load_reward_model(PROCESS_REWARD_PATH, step_separator="\n", step_aggregation="last", **where)
    return replace(process, values_prefixes=True), tokenizer
