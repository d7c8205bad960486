"""Prefill, thoughts and template arguments: what either model sees of a chat that a response continues."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast.cli import options
from nabla_fast.generate import make_pair
from nabla_fast.models.chat import ChatTemplateError, conversation_frame, generation_prompt_ids
from nabla_fast.testing.models import (
    CHAT_TEMPLATE,
    MESSAGES,
    prompt_ids,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = nf.NablaConfig(max_new_tokens=6, max_rollouts=2, max_iters=2, gradient_threshold=None)
USER = {"role": "user", "content": "what is 3"}
PREFILL = {"role": "assistant", "content": "the answer is "}

# Thoughts of an assistant's turn in a block of their own, an empty one where there is none, as hybrid models have it.
_TURN = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set t = '' %}{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<think>\n{{ t }}\n</think>\n\n{% endif %}"
    "{{ c }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
)
HYBRID = _TURN + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
# The generation prompt opens the thought itself.
OPENED = _TURN + "<think>\n{% endif %}"
# Thoughts of finished turns are left out.
FORGETS = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
THOUGHT = "<think>\nhm\n</think>\n\n3"


def thinking(template):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def seen(reward_tokenizer, chat, response, language_tokenizer=None, **kwargs):
    frame = conversation_frame(reward_tokenizer, chat, kwargs, language_tokenizer)
    return reward_tokenizer.decode(frame.opening) + response + reward_tokenizer.decode(frame.closing)


def rendered(tokenizer, *messages):
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("language", "reward", "kwargs", "response", "message"),
    [
        (HYBRID, HYBRID, {}, THOUGHT, THOUGHT),
        (HYBRID, HYBRID, {"enable_thinking": False}, "3", "3"),
        (OPENED, OPENED, {}, "hm\n</think>\n\n3", THOUGHT),
        (CHAT_TEMPLATE, HYBRID, {}, "3", "3"),
        (HYBRID, CHAT_TEMPLATE, {}, THOUGHT, THOUGHT),
        (OPENED, HYBRID, {}, "hm\n</think>\n\n3", THOUGHT),
        (OPENED, CHAT_TEMPLATE, {}, "hm\n</think>\n\n3", THOUGHT),
    ],
    ids=["own thought", "no thought", "opened", "plain model", "plain reward", "opened, other", "opened, plain reward"],
)
def test_the_reward_model_sees_what_its_template_writes_of_the_whole_message(
    language, reward, kwargs, response, message
):
    tokenizer = thinking(reward)
    got = seen(tokenizer, [USER], response, thinking(language), **kwargs)
    assert got == rendered(tokenizer, USER, assistant(message))
    assert got.count("<think>") <= 1


def test_a_users_word_about_thoughts_opens_none():
    tokenizer = thinking(CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "write <think> first"}]
    assert seen(tokenizer, chat, "3") == rendered(tokenizer, *chat, assistant("3"))


def test_a_template_that_leaves_thoughts_out_is_warned_of():
    tokenizer = thinking(FORGETS)
    with pytest.warns(UserWarning, match="leaves the thoughts"):
        got = seen(tokenizer, [USER], THOUGHT, thinking(HYBRID))
    assert got == rendered(thinking(CHAT_TEMPLATE), USER, assistant(THOUGHT))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HYBRID], ids=["plain", "hybrid"])
def test_a_prefill_is_continued_as_transformers_continues_it(template):
    tokenizer = thinking(template)
    chat = [USER, PREFILL]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert tokenizer.decode(generation_prompt_ids(tokenizer, chat)) == expected
    assert seen(tokenizer, chat, "3") == rendered(tokenizer, USER, assistant("the answer is 3"))
    assert chat == [USER, {"role": "assistant", "content": "the answer is "}]


def test_a_prefill_that_begins_a_thought_has_one_thought():
    tokenizer = thinking(HYBRID)
    chat = [USER, assistant("<think>\nso")]
    prompt = tokenizer.decode(generation_prompt_ids(tokenizer, chat))
    assert prompt.endswith("<|start|>assistant\n<think>\nso")
    whole = rendered(tokenizer, USER, assistant("<think>\nso on\n</think>\n\n3"))
    assert seen(tokenizer, chat, " on\n</think>\n\n3") == whole


def test_an_answer_to_a_prefill_holds_what_follows_and_its_reward_is_that_of_both():
    tokenizer, model, rewards = tiny_tokenizer(), tiny_language_model("llama"), tiny_reward_model("qwen3")
    chat = [USER, PREFILL]
    out = nf.generate(model, tokenizer, rewards, None, [chat], CONFIG)
    response = out.sequences[0].tolist()
    prompt = tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    ids = [*prompt, *response]
    if response[-1] == tokenizer.eos_token_id:
        ids.pop()
    ids += tokenizer("<|end|>\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = rewards.model(input_ids=torch.tensor([ids])).last_hidden_state
        expected = float(rewards.score(hidden[:, -1]))
    assert out.rewards[0] == pytest.approx(expected, abs=1e-9)
    assert out.texts[0] == tokenizer.decode(response, skip_special_tokens=True)


def test_template_arguments_reach_the_templates_of_both_models():
    told = CHAT_TEMPLATE.replace("<|start|>assistant\n{% endif", "<|start|>assistant\n{{ hint }}{% endif")
    tokenizer, model, rewards = (
        tiny_tokenizer(chat_template=told),
        tiny_language_model("llama"),
        tiny_reward_model("qwen3"),
    )
    config = CONFIG.replace(chat_template_kwargs={"hint": "it is "})
    assert generation_prompt_ids(tokenizer, MESSAGES, {"hint": "it is "}) == [
        *prompt_ids(tokenizer),
        *tokenizer("it is ", add_special_tokens=False)["input_ids"],
    ]
    pair = make_pair(model, tokenizer, rewards, None, config)
    (ids,), _ = pair.prompts([list(MESSAGES)], config)
    assert list(ids) == generation_prompt_ids(tokenizer, MESSAGES, {"hint": "it is "})
    assert hash(config) == hash(CONFIG)
    with pytest.raises(ValueError, match="chat_template_kwargs cannot hold tokenize"):
        CONFIG.replace(chat_template_kwargs={"tokenize": True})
    with pytest.raises(TypeError, match="chat_template_kwargs must be a mapping"):
        CONFIG.replace(chat_template_kwargs=["enable_thinking"])


def test_template_arguments_are_a_json_object_on_the_command_line():
    def command(**settings):
        got.append(options.configured(None, settings).chat_template_kwargs)

    got = []
    app = typer.Typer()
    app.command()(options.with_shared_options(command))
    run = CliRunner().invoke
    assert run(app, ["--chat-template-kwargs", '{"enable_thinking": false}']).exit_code == 0
    assert run(app, []).exit_code == 0
    assert got == [{"enable_thinking": False}, None]
    for bad in ("[1]", "enable_thinking=false", ""):
        refused = run(app, ["--chat-template-kwargs", bad], env={"COLUMNS": "300"})
        assert refused.exit_code == 2
        assert "must be a JSON object such as" in refused.output


def test_a_templates_refusal_names_the_prompt_and_the_reason():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = tiny_tokenizer(chat_template=strict)
    prompts = ["is", [{"role": "system", "content": "on"}, USER]]
    with pytest.raises(ChatTemplateError, match=r"prompts\[1\] cannot be formatted: tokenizer's .* \(no system\)"):
        nf.generate(tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), None, prompts, CONFIG)


def test_parts_of_a_message_other_than_text_are_refused():
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": [{"type": "text", "text": "is"}]}, {"role": "user", "content": "on"}]
    with pytest.raises(ValueError, match=r"prompts\[0\] has a message whose content is a list; it must be text"):
        nf.generate(tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), None, [chat], CONFIG)
