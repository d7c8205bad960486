"""The whole thing on a real model: SmolLM2-135M-Instruct and its reward model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.demo import example, load_smollm2, load_smollm2_reward

pytestmark = pytest.mark.slow

CONFIG = nf.NablaConfig(max_new_tokens=16, max_rollouts=3, max_iters=10, gradient_threshold=0.1)
PROMPTS = [example.QUESTION, "How many letters r are in the word strawberry?"]


@pytest.fixture(scope="module")
def models():
    # What is the same but for rounding is the same tokens.
    return (*load_smollm2(dtype="float32"), *load_smollm2_reward(dtype="float32"))


def test_a_batch_gives_what_each_prompt_gets_alone_and_no_lower_reward_than_sampling(models):
    together = nf.generate(*models, PROMPTS, CONFIG)
    sampled = nf.generate(*models, PROMPTS, CONFIG.replace(max_rollouts=1))
    for i, prompt in enumerate(PROMPTS):
        assert nf.generate(*models, prompt, CONFIG).sequences[0].tolist() == together.sequences[i].tolist()
        assert together.rewards[i] >= sampled.rewards[i] - 1e-4
    totals = together.stats.totals
    assert totals.optimised_positions > 0
    assert totals.gradient_evaluations < totals.dto_iterations


def test_the_drop_in_is_the_function(models):
    model, tokenizer, *rest = models
    messages = [{"role": "user", "content": PROMPTS[0]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    drop_in = nf.custom_generate(tokenizer, *rest, CONFIG, messages=messages)
    rows = model.generate(**inputs, custom_generate=drop_in, max_new_tokens=CONFIG.max_new_tokens)
    expected = nf.generate(*models, PROMPTS[0], CONFIG).sequences[0]
    assert rows[0, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_greedy_is_transformers_greedy(models):
    model, tokenizer, *_ = models
    messages = [{"role": "user", "content": PROMPTS[1]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert baselines.greedy(*models, PROMPTS[1], CONFIG).sequences[0].tolist() == theirs.tolist()


def test_the_demo_command_answers_and_tells_both_rewards():
    command = [sys.executable, "-m", "nabla_fast", "generate", "--pair=smollm2", "--json", "--max-rollouts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["answers"]
    assert answer["prompt"] == example.QUESTION
    assert answer["text"].strip()
    assert answer["greedy"]["text"].strip()
    assert isinstance(answer["reward"], float)
    assert isinstance(answer["greedy"]["reward"], float)
