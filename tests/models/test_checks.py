"""What is verified of a model when it is loaded: every fault is found, and nothing else is called one."""

from __future__ import annotations

import time
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, Qwen2Config, Qwen2ForTokenClassification

import nabla_fast as nf
from nabla_fast.models import numerics
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.testing.models import (
    CLOSING,
    FAMILIES,
    MESSAGES,
    WIDTH,
    prompt_ids,
    shared_language_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
ONE_ROLLOUT = nf.NablaConfig(max_rollouts=1, max_new_tokens=6)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def reward(model: Any, tokenizer: Any = None) -> RewardModel:
    return RewardModel(model, tokenizer, LanguageModel(shared_language_model("llama"), TOKENIZER), TOKENIZER)


class _Wrapped(nn.Module):
    """A layer with something else about its result."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer, x)


def without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def half_detached(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return 0.5 * out + 0.5 * out.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [tiny_language_model, tiny_reward_model])
def test_a_layer_that_passes_no_gradient_is_found_and_named(model: Any, dtype: torch.dtype) -> None:
    """As layers do that dequantise their weights under no_grad."""
    broken = model("llama", dtype=dtype)
    layer = broken.model.layers[1].mlp
    layer.down_proj = _Wrapped(layer.down_proj, without_grad)
    with pytest.raises(
        ValueError, match=r"cannot be used: .*gradient.*; its layer model\.layers\.1\.mlp\.down_proj"
    ) as caught:
        LanguageModel(broken, TOKENIZER) if model is tiny_language_model else reward(broken)
    assert str(caught.value).startswith("model (" if model is tiny_language_model else "reward_model (")


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_gradient_that_is_partly_missing_is_found(dtype: torch.dtype) -> None:
    broken = tiny_language_model("qwen2", dtype=dtype)
    layer = broken.model.layers[0].self_attn
    layer.o_proj = _Wrapped(layer.o_proj, half_detached)
    with pytest.raises(ValueError, match="its gradient is not that of its forward pass"):
        LanguageModel(broken, TOKENIZER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [3, 4])
def test_sound_models_pass_and_quickly(family: str, dtype: torch.dtype, seed: int) -> None:
    model = tiny_language_model(family, dtype=dtype, seed=seed)
    start = time.process_time()
    ours = LanguageModel(model, TOKENIZER)
    assert time.process_time() - start < 1.0
    assert (ours.backbone.cache_kind, ours.backbone.supports_prefix_cache, ours.backbone.needs_ids) == (
        "prefix",
        True,
        False,
    )
    assert reward(tiny_reward_model(family, dtype=dtype, seed=seed)).backbone is not None


def test_a_model_is_tried_once_and_again_when_it_has_changed() -> None:
    model = tiny_language_model("llama")
    passes: list[int] = []
    model.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))

    def count() -> int:
        passes.clear()
        LanguageModel(model, TOKENIZER)
        return len(passes)

    first = count()
    assert 0 < first < 20
    assert count() == 0
    model.lm_head.weight.data.mul_(1.5)  # as an optimizer's step or another checkpoint would
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    assert count() == first
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.warns(UserWarning, match="dynamic"):
        assert count() > 0


def test_weights_made_in_inference_mode_are_usable() -> None:
    with torch.inference_mode():
        language, rewards = tiny_language_model("llama"), tiny_reward_model("qwen3")
    tied = language.lm_head.weight is language.model.embed_tokens.weight
    config = nf.NablaConfig(max_new_tokens=6, max_rollouts=3, gradient_threshold=None, confidence_threshold=None)
    out = nf.generate(language, TOKENIZER, rewards, None, "what is 3", config)
    meant = nf.generate(tiny_language_model("llama"), TOKENIZER, tiny_reward_model("qwen3"), None, "what is 3", config)
    assert out.texts == meant.texts
    assert (language.lm_head.weight is language.model.embed_tokens.weight) == tied


def test_tables_that_are_off_loaded_or_quantised_are_refused() -> None:
    offloaded = tiny_language_model("llama", dtype=torch.float32)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^model .*: its output head is off-loaded"):
        LanguageModel(offloaded, TOKENIZER)
    quantised = tiny_language_model("llama", tied=False)
    quantised.lm_head.weight = nn.Parameter(quantised.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^model .*: its output head .* leave it out of the quantisation"):
        LanguageModel(quantised, TOKENIZER)


def test_layers_that_are_off_loaded_work() -> None:
    model = tiny_language_model("llama")
    cpu_offload(model.model.layers[0], execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    config = nf.NablaConfig(max_new_tokens=6, max_rollouts=2, gradient_threshold=None, confidence_threshold=None)
    rewards = tiny_reward_model("qwen3")
    out = nf.generate(model, TOKENIZER, rewards, None, "what is 3", config)
    assert out.texts == nf.generate(shared_language_model("llama"), TOKENIZER, rewards, None, "what is 3", config).texts


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_soft_prompts_are_not_dropped(task: str) -> None:
    """peft gives the model under them without them."""
    base = (tiny_language_model if task == "CAUSAL_LM" else tiny_reward_model)("llama")
    tuned = peft.get_peft_model(base, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)).double().eval()
    nn.init.normal_(tuned.prompt_encoder.default.embedding.weight)
    if task == "CAUSAL_LM":
        with pytest.raises(ValueError, match=r"and PeftModelForCausalLM around it changes its input: .*shape \(12, "):
            LanguageModel(tuned, TOKENIZER)
    else:
        with pytest.warns(UserWarning, match="is run as it is"):
            assert_own_reward(tuned)


# Heads with a bias


def biased(dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_language_model("llama", tied=False, dtype=dtype)
    head = nn.Linear(WIDTH, len(TOKENIZER), bias=True, dtype=dtype).requires_grad_(False)
    head.weight.copy_(model.lm_head.weight)
    nn.init.normal_(head.bias, std=2.0, generator=torch.Generator().manual_seed(0))
    model.lm_head = head
    return model


def test_a_bias_of_the_output_head_is_part_of_the_logits() -> None:
    model = biased()
    ours = LanguageModel(model, TOKENIZER)
    ids = torch.tensor(prompt_ids(TOKENIZER))
    own = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(ours.logits(ours.backbone.whole(ours.embedding.inputs(ids))), own, rtol=0, atol=1e-12)
    config = ONE_ROLLOUT.replace(rollout=nf.Sampling(temperature=0.0), max_new_tokens=12)
    out = nf.generate(model, TOKENIZER, tiny_reward_model("qwen3"), None, [list(MESSAGES)], config)
    with torch.no_grad():
        greedy = model.generate(ids.unsqueeze(0), do_sample=False, max_new_tokens=12)[0, len(ids) :]
    assert out.sequences[0].tolist() == greedy.tolist()
    with pytest.raises(ValueError, match=r"^model .* has a bias in its output head, which float16 has no room for"):
        LanguageModel(biased(torch.float16), TOKENIZER)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_optimization_leaves_the_bias_of_the_output_head_as_it_is(backend: str) -> None:
    model = biased(torch.float32)
    config = nf.NablaConfig(
        backend=backend, max_iters=6, nll_coeff=0.3, learning_rate=0.05, lr_schedule="constant", anchor="argmax"
    )
    start = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    chat = list(MESSAGES)
    pair = (model, TOKENIZER, tiny_reward_model("qwen3", dtype=torch.float32), None)
    result = nf.dto.optimize(*pair, chat, [7, 9], start, config)
    assert result.parameters.shape == start.shape
    logits = result.parameters[:1] @ model.lm_head.weight.T + model.lm_head.bias
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=2e-4)
    assert not torch.equal(result.parameters[0], start[0])
    # The same model with the bias taken in by a constant hidden unit that nothing optimizes.
    one_step = nf.dto.optimize(*pair, chat, [7, 9], start, config.replace(max_iters=1))
    moved = one_step.parameters[0] - start[0]
    torch.testing.assert_close(moved.abs(), torch.full((WIDTH,), 0.05), rtol=1e-2, atol=0)  # Adam's first step


# Reward models


def assert_own_reward(model: Any) -> float:
    """`nabla_fast.generate` gives the reward that the model's own forward pass gives on the conversation's ids."""
    out = nf.generate(shared_language_model("llama"), TOKENIZER, model, None, [list(MESSAGES)], ONE_ROLLOUT)
    response = out.sequences[0].tolist()
    closing = TOKENIZER(CLOSING)["input_ids"]
    closing = closing[1:] if response[-1] == TOKENIZER.eos_token_id else closing
    ids = torch.tensor([prompt_ids(TOKENIZER) + response + closing])
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    own = float(own if isinstance(own, Tensor) else own.logits)
    assert out.rewards[0] == pytest.approx(own, rel=1e-6)
    return own


def with_head(head: nn.Module) -> Any:
    model = tiny_reward_model("qwen2")
    model.score = head.double().eval().requires_grad_(False)
    return model


@pytest.mark.filterwarnings("error")
def test_the_models_own_head_scores() -> None:
    mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    for head in (mlp, nn.Linear(WIDTH, 1, bias=True)):
        model = with_head(head)
        assert reward(model).backbone is not None
        assert_own_reward(model)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("closing", [CLOSING, "<|end|>"])
def test_a_padding_token_that_ends_turns_is_not_pooled(closing: str) -> None:
    """transformers' classes pool the last token that is no padding, also where the template writes one behind it."""
    model = tiny_reward_model("llama")
    model.config.pad_token_id = TOKENIZER.eos_token_id
    template = TOKENIZER.chat_template.replace("<|end|>\n{% endfor", closing.removesuffix("\n") + "{% endfor")
    tokenizer = tiny_tokenizer(chat_template=template if closing == "<|end|>" else TOKENIZER.chat_template)
    rewards = RewardModel(model, tokenizer, LanguageModel(shared_language_model("llama"), TOKENIZER), TOKENIZER)
    assert rewards.backbone is not None
    for response in ([7, 9, 11], [7, 9, TOKENIZER.eos_token_id]):
        conversation = rewards.conversation(rewards.chat_frame(MESSAGES), torch.tensor(response))
        with torch.no_grad():
            own = float(model(input_ids=conversation.ids.unsqueeze(0)).logits)
        ours = rewards.rewards([conversation.differentiable()])[0]
        assert float(ours.detach()) == pytest.approx(own, rel=1e-9)
        # Behind a prefix that all but the end lies in, too.
        cut = len(conversation) - (1 if closing == "<|end|>" else 2)
        assert rewards.backbone is not None
        _, states = rewards.backbone.extend([None], [conversation[:cut]])
        behind = rewards.rewards([conversation[cut:].differentiable()], states)[0]
        assert behind.requires_grad
        assert float(behind.detach()) == pytest.approx(own, rel=1e-9)


class _Regression(LlamaPreTrainedModel):
    """As training frameworks for reward models define them."""

    def __init__(self, config: LlamaConfig, how: str) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.how = how
        self.post_init()
        generator = torch.Generator().manual_seed(0)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=1.0 if name.startswith("score") else 0.3, generator=generator)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **_: Any) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)[0]
        values = self.score(hidden)[..., 0]
        how = {
            "normalised": lambda: (values[:, -1] - 2.0) / 0.5,
            "mean": lambda: values.mean(1),
            "negated": lambda: -values[:, -1],
            "gated": lambda: values[:, -1] * values[:, 0].sigmoid(),
        }
        return how[self.how]()


@pytest.mark.parametrize("how", ["normalised", "mean", "negated", "gated"])
def test_a_forward_pass_that_does_more_is_run_as_it_is(how: str) -> None:
    model = _Regression(tiny_reward_model("llama").config, how).double().eval()
    with pytest.warns(UserWarning, match=r"reward_model .* is run as it is, on whole conversations.*differs by"):
        ours = reward(model)
    assert ours.backbone is None
    assert_own_reward(model)
    # Its gradient, too, is that of the whole forward pass.
    conversation = ours.conversation(ours.chat_frame(MESSAGES), torch.tensor([7, 9, 11])).differentiable()
    (gradient,) = torch.autograd.grad(ours.rewards([conversation])[0], conversation.embeds)
    embeds = conversation.embeds.detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=embeds.unsqueeze(0)), embeds)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_scores_are_told_apart_as_large_ones_are(dtype: torch.dtype) -> None:
    """A difference counts beside the scores of other tokens, not beside one."""
    model = _Regression(tiny_reward_model("llama").config, "negated").to(dtype).eval()
    with torch.no_grad():
        model.score.weight.mul_(1e-3)
    language_model = LanguageModel(tiny_language_model("llama", dtype=dtype), TOKENIZER)
    with pytest.warns(UserWarning, match="is run as it is"):
        RewardModel(model, None, language_model, TOKENIZER)


def test_statistics_that_change_are_seen() -> None:
    model = _Regression(tiny_reward_model("llama").config, "normalised").double().eval()
    model.how = "shifted"
    model.register_buffer("mean", torch.zeros((), dtype=torch.float64))
    own = LlamaModel.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Tensor:
        return model.score(own(model.model, input_ids=input_ids)[0])[:, -1, 0] - model.mean

    model.forward = forward
    assert reward(model).backbone is not None
    model.mean.fill_(3.0)
    with pytest.warns(UserWarning, match="is run as it is"):
        assert reward(model).backbone is None


@pytest.mark.parametrize("labels", [1, 2])
def test_scores_for_every_token_are_no_reward(labels: int) -> None:
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=labels,
    )
    with pytest.raises(ValueError, match="gives a score for every token of a conversation"):
        reward(Qwen2ForTokenClassification(config).double().eval())


@pytest.mark.parametrize(
    ("wrap", "kind"), [(lambda r: (r,), "tuple"), (lambda r: {"reward": r}, "dict"), (lambda r: r.tolist(), "list")]
)
def test_a_callable_that_returns_no_tensor_is_refused_in_one_sentence(wrap: Any, kind: str) -> None:
    def judge(inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return wrap((inputs_embeds.sum(-1) * attention_mask).sum(1))

    with pytest.raises(TypeError, match=rf"^reward_model \(judge\) must return a tensor .* got a {kind}$"):
        nf.generate(shared_language_model("llama"), TOKENIZER, judge, None, "what is 3", ONE_ROLLOUT)


@pytest.mark.parametrize("judge", [lambda input_ids, attention_mask: 0, lambda texts: 0, lambda prompts, responses: 0])
def test_a_callable_that_takes_ids_or_texts_is_refused_in_one_sentence(judge: Any) -> None:
    with pytest.raises(TypeError, match=r"must take \(inputs_embeds, attention_mask\): embeddings, because a gradient"):
        reward(judge)


def test_a_finite_difference_finds_wrong_gradients_and_accepts_right_ones() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for dtype in DTYPES:
        y = x.to(dtype)
        assert numerics.gradient_fault(lambda e: e.sin().sum(), y) is None
        assert numerics.gradient_fault(lambda e: (e * 0).sum() + 7, y) is None
        assert "no gradient" in str(numerics.gradient_fault(lambda e: e.detach().sum(), y))
    for dtype in DTYPES[:2]:
        y = x.to(dtype)
        # Right along its own direction, but blind for a part of the input.
        assert numerics.gradient_fault(lambda e: e[:3].sin().sum() + e[3:].detach().sin().sum(), y) is not None
        assert numerics.gradient_fault(lambda e: (e + e.detach()).square().sum(), y) is not None


def test_a_model_that_sees_later_tokens_is_no_language_model() -> None:
    model = tiny_language_model("llama")
    object.__setattr__(model.config, "use_bidirectional_attention", True)
    own = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    model.model.forward = forward
    with (
        pytest.warns(UserWarning, match="bidirectional"),
        pytest.raises(ValueError, match=r"^model .* is no causal language model: hidden states of 4 tokens are"),
    ):
        LanguageModel(model, TOKENIZER)
