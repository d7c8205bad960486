"""Logits processors of generation configs and of calls, the same in every entry point."""

from __future__ import annotations

import pytest
import torch
from transformers import WatermarkingConfig

import nabla_fast as nf
from nabla_fast.baselines import best_of_n, greedy
from nabla_fast.testing.models import (
    DEVICE,
    MESSAGES,
    prompt_ids,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = nf.NablaConfig(max_new_tokens=10, max_rollouts=1, rollout=nf.Sampling(temperature=0.0))
REWARD_MODEL = tiny_reward_model("qwen3")
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def prompt():
    ids = torch.tensor([prompt_ids(TOKENIZER)], device=DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drop_in(model, config=GREEDY, **call):
    refine = nf.custom_generate(TOKENIZER, REWARD_MODEL, None, config)
    return new_tokens(model.generate(**prompt(), custom_generate=refine, **call))


def new_tokens(rows):
    return rows[0, len(prompt_ids(TOKENIZER)) :].tolist()


def generated(model, config=GREEDY, function=nf.generate, **arguments):
    out = function(model, TOKENIZER, REWARD_MODEL, None, [list(MESSAGES)], config=config, **arguments)
    return out.sequences[0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [18, 25, 52]},
        {"begin_suppress_tokens": [25]},
        {"bad_words_ids": [[25], [18, 18]]},
        {"sequence_bias": {(25,): -9.0, (52,): 9.0}},
        {"forced_eos_token_id": END},
        {"encoder_repetition_penalty": 3.0},
        {"exponential_decay_length_penalty": (2, 3.0)},
        {"watermarking_config": WatermarkingConfig(bias=9.0)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_generation_config_means_what_it_means_to_transformers_in_every_entry_point(settings):
    model = tiny_language_model("llama")
    call = {"do_sample": False, "max_new_tokens": GREEDY.max_new_tokens}
    free = new_tokens(model.generate(**prompt(), **call))
    expected = new_tokens(model.generate(**prompt(), **call, **settings))
    assert drop_in(model, **call, **settings) == expected
    assert generated(model) == free
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert expected != free, "the setting changes nothing, so nothing is tested"
    assert drop_in(model) == expected
    assert generated(model) == expected
    assert generated(model, function=greedy) == expected
    assert generated(model, function=best_of_n, n=2) == expected


def test_a_least_length_counts_the_tokens_of_each_prompt_and_forbids_the_end_tokens_in_effect():
    model, tokenizer = tiny_language_model("llama"), tiny_tokenizer()
    tokenizer.padding_side = "left"
    first = generated(model)[0]
    config = GREEDY.replace(eos_token_ids=(first,))
    assert generated(model, config) == [first]
    model.generation_config.min_new_tokens = 4
    assert first not in generated(model, config)[:4]
    chats = [list(MESSAGES), [{"role": "user", "content": "is"}]]
    both = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(DEVICE)
    refine = nf.custom_generate(tokenizer, REWARD_MODEL, None, config)
    rows = model.generate(**both, custom_generate=refine)[:, both["input_ids"].shape[1] :]
    alone = nf.generate(model, tokenizer, REWARD_MODEL, None, chats, config).sequences
    assert [row[: len(a)].tolist() for row, a in zip(rows, alone, strict=True)] == [a.tolist() for a in alone]


def test_a_penalty_counts_the_tokens_of_each_row_of_a_padded_batch():
    model, tokenizer = tiny_language_model("llama"), tiny_tokenizer()
    tokenizer.padding_side = "left"
    chats = [list(MESSAGES), [{"role": "user", "content": "is"}]]
    both = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(DEVICE)
    call = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.5}
    refine = nf.custom_generate(tokenizer, REWARD_MODEL, None, GREEDY)
    got = model.generate(**both, custom_generate=refine, **call)
    assert torch.equal(got, model.generate(**both, **call))


def test_processors_see_scores_as_wide_as_the_head_and_may_write_into_them():
    model = tiny_language_model("llama", vocab_rows=128)
    widths = set()

    def forbid(ids, scores):
        widths.add(scores.shape[-1])
        scores[:, [18, 25, 100]] = -torch.inf
        return scores

    got = drop_in(model, logits_processor=[forbid], do_sample=False)
    assert widths == {128}
    assert got == drop_in(model, suppress_tokens=[18, 25], do_sample=False)


def test_a_calls_own_processor_takes_the_place_of_the_configs_of_its_class():
    from transformers import RepetitionPenaltyLogitsProcessor

    model = tiny_language_model("llama")
    model.generation_config.repetition_penalty = 1.01
    own = RepetitionPenaltyLogitsProcessor(2.0)
    call = {"do_sample": False, "max_new_tokens": 10, "logits_processor": [own]}
    assert drop_in(model, **call) == new_tokens(model.generate(**prompt(), **call))
    assert drop_in(model, **call) != drop_in(model)


def counting():
    calls = []

    def processor(ids, scores):
        calls.append(None)
        return scores + len(calls) * torch.arange(scores.shape[-1], device=scores.device)

    return processor


def following():
    seen = []

    def processor(ids, scores):
        known = ids.shape[1] in seen
        seen.append(ids.shape[1])
        return scores.flip(-1) if known else scores

    return processor


def fragile():
    seen = [0]

    def processor(ids, scores):
        if ids.shape[1] <= seen[-1]:
            raise RuntimeError("not the next token")
        seen.append(ids.shape[1])
        return scores

    return processor


@pytest.mark.parametrize("make", [counting, following, fragile])
def test_a_processor_with_a_state_is_refused(make):
    with pytest.raises(ValueError, match="logits_processor processor must be a function of"):
        drop_in(tiny_language_model("llama"), logits_processor=[make()])


def test_processors_of_transformers_with_a_state_are_refused_by_their_argument():
    from transformers import SynthIDTextWatermarkingConfig

    model = tiny_language_model("llama")
    with pytest.raises(ValueError, match=r"guidance_scale \(1.5\) cannot be used"):
        drop_in(model, guidance_scale=1.5)
    watermark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor cannot be used"):
        drop_in(model, watermarking_config=watermark)
    model.generation_config.guidance_scale = 1.5
    with pytest.raises(ValueError, match=r"guidance_scale \(1.5\) cannot be used"):
        generated(model)


def test_warpers_hold_where_tokens_are_sampled():
    model = tiny_language_model("llama")
    hot = GREEDY.replace(rollout=nf.Sampling(temperature=5.0))
    best = drop_in(model)
    assert drop_in(model, hot) != best
    assert drop_in(model, hot, min_p=1.0) == best
    model.generation_config.min_p = 1.0
    assert generated(model, hot) == best
