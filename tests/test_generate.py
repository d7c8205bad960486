"""`nabla_fast.generate`: kinds of prompts, and every bad input by name."""

from __future__ import annotations

import pytest
import torch

import nabla_fast as nf
from nabla_fast.testing.models import CONTEXT, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = nf.NablaConfig(max_new_tokens=6, max_rollouts=3, max_iters=3, learning_rate=0.2, gradient_threshold=None)


@pytest.fixture
def models():
    tokenizer = tiny_tokenizer()
    return tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer


def ids(output):
    return [sequence.tolist() for sequence in output.sequences]


def test_strings_and_chats_are_the_same_prompts(models):
    text, chat = "is it on", [{"role": "user", "content": "is it on"}]
    expected = ids(nf.generate(*models, text, CONFIG))
    assert ids(nf.generate(*models, [text], CONFIG)) == expected
    assert ids(nf.generate(*models, chat, CONFIG)) == expected
    both = ids(nf.generate(*models, [chat, "the user"], CONFIG))
    assert both[0] == expected[0]
    assert len(both) == 2


def test_output_holds_text_tokens_reward_and_stats_per_prompt(models):
    tokenizer = models[1]
    out = nf.generate(*models, ["is it on", "the user"], CONFIG)
    assert len(out.texts) == len(out.sequences) == len(out.rewards) == len(out.stats.sequences) == 2
    for text, sequence in zip(out.texts, out.sequences, strict=True):
        assert sequence.dtype == torch.long
        assert text == tokenizer.decode(sequence, skip_special_tokens=True)
    assert set(out.stats.to_dict()) == {"sequences", "totals", "cache", "graphs"}
    assert all(seconds >= 0 for seconds in out.stats.totals.seconds.values())


def test_a_callable_reward_steers_the_answer(models):
    model, tokenizer, *_ = models
    target = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("z")]

    def likes_z(inputs_embeds, attention_mask):
        return (inputs_embeds @ target * attention_mask).sum(-1)

    config = CONFIG.replace(max_rollouts=6, max_iters=20, learning_rate=0.5, confidence_threshold=None)
    plain = nf.generate(model, tokenizer, likes_z, None, "is it on", config.replace(max_rollouts=1))
    steered = nf.generate(model, tokenizer, likes_z, None, "is it on", config)
    assert steered.rewards[0] > plain.rewards[0]


def test_a_gradient_without_the_reward_ignores_it(models):
    model, tokenizer, reward_model, _ = models
    config = CONFIG.replace(reward_coeff=0.0, rejection_sampling=False, nll_coeff=1.0)
    other = tiny_reward_model("qwen3", seed=9)
    first = nf.generate(model, tokenizer, reward_model, tokenizer, "is it on", config)
    second = nf.generate(model, tokenizer, other, tokenizer, "is it on", config)
    assert ids(first) == ids(second)
    assert first.rewards != second.rewards


def test_padded_head_rows_are_never_produced(models):
    _, tokenizer, *rest = models
    padded = tiny_language_model("llama", vocab_rows=len(tokenizer) + 40)
    out = nf.generate(padded, tokenizer, *rest, ["is", "on", "the user"], CONFIG.replace(rollout=nf.Sampling(9.0)))
    assert max(max(sequence) for sequence in ids(out)) < len(tokenizer)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("", ValueError, r"prompts\[0\] is empty"),
        ("   ", ValueError, r"prompts\[0\] is empty"),
        ([], ValueError, "prompts is empty"),
        (["fine", ""], ValueError, r"prompts\[1\] is empty"),
        ([[]], TypeError, r"prompts\[0\] is an empty chat"),
        (7, TypeError, "prompts must be"),
        (["fine", 7], TypeError, r"prompts\[1\] must be"),
        ([{"role": "user"}], ValueError, r"prompts\[0\] has a message without"),
    ],
)
def test_a_bad_prompt_is_refused_by_index(models, prompts, error, message):
    with pytest.raises(error, match=message):
        nf.generate(*models, prompts, CONFIG)


def test_a_prompt_longer_than_a_context_is_refused_with_both_numbers(models):
    with pytest.raises(ValueError, match=rf"prompts\[1\] has \d+ tokens, and model .* at most {CONTEXT}"):
        nf.generate(*models, ["is", "k" * CONTEXT], CONFIG)


def test_a_context_that_ends_early_shortens_the_response_with_a_warning(models):
    tokenizer = models[1]
    used = len(
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    )
    prompt = "k" * (CONTEXT - used - 4)
    with pytest.warns(UserWarning, match=r"room for .* fewer than max_new_tokens"):
        out = nf.generate(*models, prompt, CONFIG.replace(eos_token_ids=()))
    assert len(out.sequences[0]) <= 4


def test_a_tokenizer_without_chat_template_is_refused(models):
    model, tokenizer, reward_model, _ = models
    bare = tiny_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"^tokenizer .* has no chat template"):
        nf.generate(model, bare, reward_model, tokenizer, "is", CONFIG)
    with pytest.raises(ValueError, match=r"^reward_tokenizer .* has no chat template"):
        nf.generate(model, tokenizer, reward_model, bare, "is", CONFIG)


def test_a_reward_model_with_several_labels_is_refused(models):
    model, tokenizer, *_ = models
    with pytest.raises(ValueError, match=r"reward_model .* has 3 labels"):
        nf.generate(model, tokenizer, tiny_reward_model("qwen3", labels=3), tokenizer, "is", CONFIG)


def test_models_of_the_wrong_kind_are_refused(models):
    model, tokenizer, reward_model, _ = models
    with pytest.raises(TypeError, match=r"model .* has no output head"):
        nf.generate(reward_model, tokenizer, reward_model, tokenizer, "is", CONFIG)
    with pytest.raises(ValueError, match=r"reward_model .* gives a score for every token"):
        nf.generate(model, tokenizer, model, tokenizer, "is", CONFIG)
    with pytest.raises(TypeError, match="reward_model must be"):
        nf.generate(model, tokenizer, "a path", tokenizer, "is", CONFIG)
    with pytest.raises(ValueError, match=r"model .* is in training mode; call .eval\(\)"):
        nf.generate(tiny_language_model("llama").train(), tokenizer, reward_model, tokenizer, "is", CONFIG)


@pytest.mark.parametrize("which", ["model", "reward_model"])
def test_nan_from_a_model_names_it_and_commits_nothing(models, which):
    model, tokenizer, reward_model, _ = models
    broken = model if which == "model" else reward_model
    heard = []

    class Listener:
        def on_phase(self, phase, sequences):
            pass

        def on_commit(self, index, new, length):
            heard.append(new)

    def poison(module, args, output):
        return (output[0] * torch.nan, *output[1:]) if isinstance(output, tuple) else output * torch.nan

    handle = broken.base_model.layers[-1].register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=rf"^{which} \(.*(NaN|not finite)"):
        nf.generate(model, tokenizer, reward_model, tokenizer, "is", CONFIG, observer=Listener())
    handle.remove()
    assert heard == []


def test_an_end_token_outside_the_vocabulary_is_refused(models):
    with pytest.raises(ValueError, match="eos_token_ids must be below"):
        nf.generate(*models, "is", CONFIG.replace(eos_token_ids=(10_000,)))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_back_end_that_is_not_there_is_refused(models, backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot be used on cpu: .* use one of auto, reference"):
        nf.generate(*models, "is", CONFIG.replace(backend=backend))


def test_reference_and_native_back_ends_give_the_same_tokens(models):
    prompts = ["is it on", "the user"]
    reference = nf.generate(*models, prompts, CONFIG.replace(backend="reference"))
    native = nf.generate(*models, prompts, CONFIG.replace(backend="native"))
    assert ids(reference) == ids(native)


@pytest.mark.parametrize("parameterization", ["latents", "logits"])
def test_a_learning_rate_that_leaves_no_token_is_an_error_that_names_it(models, parameterization):
    model, tokenizer, reward_model, reward_tokenizer = models
    config = CONFIG.replace(max_iters=20, learning_rate=1e38, confidence_threshold=None)
    config = config.replace(parameterization=parameterization)
    with pytest.raises(FloatingPointError, match=r"learning_rate 1e\+38 made logits NaN or infinite at iteration \d+"):
        nf.generate(model.float(), tokenizer, reward_model.float(), reward_tokenizer, "is it on", config)
