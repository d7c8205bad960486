"""Whole decodes with process reward models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from process_kinds import CONFIG, MARK, MARKED, TOKENIZER, Kind, ids, new_sequence, objective_of, qwen, trl

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models.backbone import Backbone
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.testing.models import (
    CONTEXT,
    MESSAGES,
    prompt_ids,
    shared_language_model,
    tiny_language_model,
    tiny_process_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DECODE = nf.NablaConfig(
    max_new_tokens=10,
    max_rollouts=4,
    confidence_threshold=0.99,
    gradient_threshold=None,
    max_iters=3,
    learning_rate=0.2,
    reward_coeff=10.0,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
)
PROMPTS = ["what is 3 times 4", "the user", "is it on"]


@pytest.mark.parametrize("proposal", ["dto", "prefix_reward", "guided", "first_order"])
def test_a_decode_behind_cached_prefixes_is_that_of_whole_conversations(proposal: str) -> None:
    kind = trl("mean", "qwen3", separator="s")
    config = DECODE.replace(proposal=proposal)
    arguments = (tiny_language_model("llama"), TOKENIZER, kind.process, kind.tokenizer, PROMPTS)
    cached = nf.generate(*arguments, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Backbone, "supports_prefix_cache", property(lambda self: False, lambda self, value: None), raising=False
        )
        whole = nf.generate(*arguments, config.replace(gradient_cache=False))
    assert [y.tolist() for y in cached.sequences] == [y.tolist() for y in whole.sequences]
    assert cached.rewards == pytest.approx(whole.rewards, abs=1e-9)
    assert any(sum(kind.ends(y.tolist())) > 1 for y in cached.sequences), "no answer had two steps"
    for tokens, reward, prompt in zip(cached.sequences, cached.rewards, PROMPTS, strict=True):
        opening = prompt_ids(TOKENIZER, [{"role": "user", "content": prompt}])
        expected = kind.reward(opening, tokens.tolist(), kind.table[tokens])
        assert reward == pytest.approx(float(expected), abs=1e-9)


def test_a_decode_with_an_inserted_separator_accepts_what_raises_the_reward() -> None:
    kind = qwen("product", after="s")
    model = tiny_language_model("llama")
    out = nf.generate(model, TOKENIZER, kind.process, MARKED, PROMPTS, DECODE)
    assert MARK not in "".join(out.texts)
    assert any(sum(kind.ends(y.tolist())) > 1 for y in out.sequences), "no answer had two steps"
    for tokens, reward, prompt in zip(out.sequences, out.rewards, PROMPTS, strict=True):
        opening = prompt_ids(MARKED, [{"role": "user", "content": prompt}])
        assert reward == pytest.approx(float(kind.reward(opening, tokens.tolist(), kind.table[tokens])), abs=1e-9)
    assert any(revision.accepted for revision in out.stats.totals.revisions)


def test_inserted_separators_have_room_in_the_context() -> None:
    """Even if every token ends a step, the reward model's context holds the conversation."""
    kind = qwen("last", after="s")
    pair = make_pair(shared_language_model("llama"), TOKENIZER, kind.process, MARKED, DECODE)
    prompts, frames = pair.prompts([MESSAGES], DECODE)
    with pytest.warns(UserWarning, match="has room for .* response tokens, fewer than"):
        (sequence,) = pair.sequences(prompts, frames, DECODE.replace(max_new_tokens=CONTEXT))
    model = pair.reward_model
    response = torch.tensor([*ids("s")] * sequence.limit)
    (reward,), _ = model.rewards([model.conversation(sequence.frame, response)])
    assert 0 <= float(reward) <= 1


def test_every_prompt_gets_in_a_batch_what_it_gets_alone() -> None:
    for kind, tokenizer in ((trl("mean", separator="s"), TOKENIZER), (qwen("min", after="s"), MARKED)):
        arguments = (tiny_language_model("llama"), TOKENIZER, kind.process, tokenizer)
        together = nf.generate(*arguments, PROMPTS, DECODE)
        for i, prompt in enumerate(PROMPTS):
            alone = nf.generate(*arguments, prompt, DECODE)
            assert alone.sequences[0].tolist() == together.sequences[i].tolist()
            assert alone.rewards[0] == pytest.approx(together.rewards[i], abs=1e-9)


def test_the_drop_in_shows_the_models_own_prompt() -> None:
    kind = qwen("last", after="s")
    model = tiny_language_model("llama")
    prompt = prompt_ids(TOKENIZER)
    drop_in = nf.custom_generate(TOKENIZER, kind.process, MARKED, DECODE)
    out = model.generate(
        torch.tensor([prompt]), custom_generate=drop_in, max_new_tokens=8, do_sample=True, return_dict_in_generate=True
    )
    response = out.sequences[0, len(prompt) :].tolist()
    opening = kind.tokenizer.convert_tokens_to_ids(TOKENIZER.convert_ids_to_tokens(prompt))
    expected = float(kind.reward(opening, response, kind.table[response]))
    assert float(out.rewards[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_those_of_float64_but_for_rounding(dtype: torch.dtype) -> None:
    response = torch.tensor(ids("at 12\n24\n36 it"))

    def evaluated(precision: torch.dtype) -> Any:
        process = nf.ProcessReward(tiny_process_model("qwen3", dtype=precision), "\n", "mean")
        language_model = LanguageModel(tiny_language_model("llama", dtype=precision), TOKENIZER)
        objective = Objective(language_model, ProcessRewardModel(process, None, language_model, TOKENIZER), CONFIG)
        return objective.evaluate([Request(new_sequence(objective), response, 2)])[0]

    exact, rounded = evaluated(torch.float64), evaluated(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert rounded.reward == pytest.approx(exact.reward, abs=tolerance)
    apart = (rounded.factors[2].double() - exact.factors[2]).norm() / exact.factors[2].norm()
    assert apart < (1e-4 if dtype == torch.float32 else 0.2)


def test_an_ordinary_token_can_be_inserted() -> None:
    kind = Kind(nf.ProcessReward(tiny_process_model(), "+", "mean", "."), TOKENIZER, ".", True)
    objective = objective_of(kind)
    response = ids("at 12. it is 24")
    conversation = objective.reward_model.conversation(new_sequence(objective).frame, torch.tensor(response))
    assert TOKENIZER.decode(conversation.ids).endswith("at 12.+ it is 24+")
    (reward,) = objective.rewards([new_sequence(objective)], [torch.tensor(response)])
    expected = kind.reward(prompt_ids(TOKENIZER), response, kind.table[response])
    assert reward == pytest.approx(float(expected), abs=1e-12)


def test_an_adapter_around_a_token_classifier_is_read_with_its_changes() -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="TOKEN_CLS", init_lora_weights=False)
    model = get_peft_model(tiny_process_model("qwen3"), settings).double().eval()
    kind = Kind(nf.ProcessReward(model, "\n", "mean"), TOKENIZER, "\n", False)
    objective = objective_of(kind)
    response = ids("at 12\n24\nit")
    (reward,) = objective.rewards([new_sequence(objective)], [torch.tensor(response)])
    with torch.no_grad():
        expected = float(kind.reward(prompt_ids(TOKENIZER), response, kind.table[response]))
        with model.disable_adapter():
            without = float(kind.reward(prompt_ids(TOKENIZER), response, kind.table[response]))
    assert reward == pytest.approx(expected, abs=1e-9)
    assert abs(expected - without) > 1e-3
