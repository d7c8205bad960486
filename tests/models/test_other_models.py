"""Models that do not run in batches behind keys and values, and models that read more than embeddings.

The oracle knows nothing of ours: the whole model's own forward pass on token ids, without a cache; for gradients, the
output of its input embeddings is one-hot rows times the table.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from other_models import CONFIGS, other_language_model
from torch import Tensor
from torch.nn.functional import one_hot

import nabla_fast as nf
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import MESSAGES, shared_reward_model, tiny_tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*(one sequence|whole seq)")]

TOKENIZER = tiny_tokenizer()
PROMPTS = [list(MESSAGES), [{"role": "user", "content": "is it"}]]
MANNERS = {
    "qwen3_next": ("state", True),
    "lfm2": ("state", True),
    "mamba": ("state", False),
    "falcon_h1": ("state", True),
    "gemma3n": ("prefix", True),
    "llama4": ("state", True),
    "bart": ("state", True),
    "gpt_neo": ("prefix", True),
}
language_model = functools.cache(other_language_model)


def ids_of(chat: Any) -> list[int]:
    return list(TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def token_gradient(model: Any, ids: list[int], start: int) -> Tensor:
    """d(sum of log pi of the tokens from ``start`` on) / d(one-hot rows of those tokens), (n, V)."""
    embedding = model.get_input_embeddings()
    rows = one_hot(torch.tensor(ids), len(embedding.weight)).double().requires_grad_()
    table = embedding(torch.arange(len(embedding.weight))).detach()
    handle = embedding.register_forward_hook(lambda *_: (rows @ table).unsqueeze(0))
    log_pi = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    handle.remove()
    (gradient,) = torch.autograd.grad(log_pi[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum(), rows)
    return gradient[start:]


@pytest.mark.parametrize("name", CONFIGS)
def test_how_each_runs_is_found_out(name: str) -> None:
    backbone = LanguageModel(language_model(name), TOKENIZER).backbone
    assert (backbone.cache_kind, backbone.supports_prefix_cache) == MANNERS[name]
    assert backbone.needs_ids == (name in ("falcon_h1", "gemma3n"))
    assert backbone.windowed == (name in ("gemma3n", "gpt_neo"))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_in_a_batch_are_the_models_own(name: str) -> None:
    model = language_model(name)
    config = nf.NablaConfig(max_rollouts=1, max_new_tokens=20, rollout=nf.Sampling(temperature=0.0))
    out = nf.generate(model, TOKENIZER, shared_reward_model("llama"), None, PROMPTS, config)
    assert [y.tolist() for y in out.sequences] == [greedy(model, ids_of(chat), 20) for chat in PROMPTS]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole_model_on_one_hot_tokens(name: str) -> None:
    """At two positions of a response, one of them behind what the first evaluation has left."""
    model = language_model(name)
    ours = LanguageModel(model, TOKENIZER)
    rewards = RewardModel(shared_reward_model("llama"), None, ours, TOKENIZER)
    objective = Objective(ours, rewards, nf.NablaConfig(nll_coeff=-1.0, gradient_cache=False))
    prompt = ids_of(MESSAGES)
    response = torch.tensor([7, 21, 5, 40, 33, 12, 60, 18, 9, 50, 31, 24])
    sequence = Sequence(tuple(prompt), (), 0, 20, rewards.prompt_frame(prompt))
    for start in (1, 4, 10, 11):
        (evaluation,) = objective.evaluate([Request(sequence, response, start)])
        expected = token_gradient(model, [*prompt, *response.tolist()], len(prompt) + start)
        dense = evaluation.factors.embedding.double() @ ours.embedding.weight.double().T
        torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_decodes_give_the_same_alone_and_with_the_cache_off(name: str) -> None:
    config = nf.NablaConfig(
        max_rollouts=3, max_new_tokens=10, confidence_threshold=None, gradient_threshold=None, max_iters=3, seed=1
    )
    models = (language_model(name), TOKENIZER, shared_reward_model("llama"), None)
    both = nf.generate(*models, PROMPTS, config)
    for i, chat in enumerate(PROMPTS):
        alone = nf.generate(*models, [chat], config.replace(gradient_cache=False))
        assert alone.sequences[0].tolist() == both.sequences[i].tolist()
    assert all(record.gradient_evaluations > 0 for record in both.stats.sequences)


def test_a_state_is_reused_and_never_changed() -> None:
    """A prompt's recurrent state is computed once for all rollouts that begin behind it; none of them changes it."""
    model = language_model("lfm2")
    read: list[int] = []

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        read.append(tokens.shape[1])

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    config = nf.NablaConfig(
        max_rollouts=4,
        max_new_tokens=10,
        confidence_threshold=None,
        gradient_threshold=None,
        rejection_sampling=False,
        resample=nf.Sampling(temperature=3.0, top_p=None),
        seed=3,
    )
    out = nf.generate(model, TOKENIZER, shared_reward_model("llama"), None, "what is 3 times 4", config)
    handle.remove()
    prompt = len(ids_of([{"role": "user", "content": "what is 3 times 4"}]))
    assert out.stats.sequences[0].rollouts > 1
    assert sum(size >= prompt for size in read) == 1
