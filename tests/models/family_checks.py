"""What is checked of a family of models, against an oracle that knows nothing of nabla_fast.

The oracle is the whole model's own forward pass on token ids, without a cache. For gradients, the output of its input
embeddings is replaced by one-hot rows times the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import nabla_fast as nf
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import MESSAGES, shared_reward_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHATS = [list(MESSAGES), [{"role": "user", "content": "is it"}]]
RESPONSE = (7, 21, 5, 40, 33, 12, 60, 18, 9, 50, 31, 24)
NEW_TOKENS = 16
PARTS = ("loads", "gradients", "greedy", "decode", "reward")


class NoOracle(Exception):  # noqa: N818
    """The model's own forward pass says nothing that could be compared."""


def check(model: Any, reward_model: Any | None) -> dict[str, str]:
    """What came out of each of `PARTS`: "right", "refused: why", "wrong: how", "crashed: why" or "none".

    Args:
        model: a causal language model for `TOKENIZER`, in ``eval()``, float64.
        reward_model: a sequence classifier of the same family, or None.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = {"loads": _outcome(lambda: _load(model))}
        if outcome["loads"].startswith(("refused", "crashed")):
            outcome |= dict.fromkeys(("gradients", "greedy", "decode"), outcome["loads"])
        else:
            outcome["gradients"] = _outcome(lambda: _gradients(model))
            outcome["greedy"] = _outcome(lambda: _greedy(model))
            outcome["decode"] = _outcome(lambda: _decode(model))
        outcome["reward"] = "none" if reward_model is None else _outcome(lambda: _reward(reward_model))
    return outcome


def ids_of(chat: Any) -> list[int]:
    """A chat with its generation prompt."""
    return list(TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def own_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the model's own forward pass over the whole sequence."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, : len(TOKENIZER)]
        if not bool(logits.isfinite().all()):
            raise NoOracle("the model's own forward pass gives logits that are not finite")
        ids.append(int(logits.argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def own_gradient(model: Any, ids: list[int], start: int) -> Tensor:
    """d(sum of log pi of the tokens from ``start`` on) / d(one-hot rows of those tokens), (n, V)."""
    embedding = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    rows = one_hot(torch.tensor(ids), size).to(embedding.weight.dtype).requires_grad_()
    table = embedding(torch.arange(size)).detach()
    shape = (1, len(ids), table.shape[-1])

    def replace(_module: Any, _arguments: Any, output: Tensor) -> Tensor | None:
        return (rows @ table).unsqueeze(0) if output.shape == shape else None

    handle = embedding.register_forward_hook(replace)
    with torch.enable_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, : len(TOKENIZER)]
    handle.remove()
    if not logits.requires_grad:
        raise NoOracle("the model's own forward pass looks up other rows than those of its token ids")
    picked = logits.log_softmax(-1)[start - 1 : -1].gather(1, torch.tensor(ids[start:]).unsqueeze(1))
    (gradient,) = torch.autograd.grad(picked.sum(), rows)
    if not bool(gradient.isfinite().all()) or not bool(gradient[start:-1].any()):
        raise NoOracle("the model's own forward pass gives no finite gradient other than 0")
    return gradient[start:]


def _outcome(part: Callable[[], str]) -> str:
    try:
        return part()
    except NoOracle as error:
        return f"not checked: {error}"
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        # Our own refusals begin with what they refuse.
        ours = text.startswith(("model (", "reward_model ("))
        return f"refused: {text}" if ours else f"crashed: {type(error).__name__}: {text[:200]}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load(model: Any) -> str:
    backbone = LanguageModel(model, TOKENIZER).backbone
    return {
        ("prefix", True): "batches behind prefixes",
        ("state", True): "one at a time, behind its own cache",
        ("state", False): "one at a time, gradients over whole sequences",
        ("whole", False): "whole sequences",
    }[backbone.cache_kind, backbone.supports_prefix_cache]


def _gradients(model: Any) -> str:
    ours = LanguageModel(model, TOKENIZER)
    rewards = RewardModel(shared_reward_model("llama"), None, ours, TOKENIZER)
    objective = Objective(ours, rewards, nf.NablaConfig(nll_coeff=-1.0, gradient_cache=False))
    prompt, response = ids_of(MESSAGES), torch.tensor(RESPONSE)
    sequence = Sequence(tuple(prompt), (), 0, len(RESPONSE), rewards.prompt_frame(prompt))
    worst = 0.0
    for start in (1, 6, 10):
        (found,) = objective.evaluate([Request(sequence, response, start)])
        expected = own_gradient(model, [*prompt, *RESPONSE], len(prompt) + start)[:, : ours.vocab_size]
        dense = found.factors.embedding.double() @ ours.embedding.weight.double().T
        # The last token's input has no part in the likelihood, so all of its gradient is 0.
        error = (dense - expected).norm() / expected.norm().clamp(min=1e-12)
        worst = max(worst, float(error.nan_to_num(torch.inf)))
    return "right" if worst < 1e-3 else f"wrong: {worst:.2g} of the gradient's norm"


def _greedy(model: Any) -> str:
    config = nf.NablaConfig(max_rollouts=1, max_new_tokens=NEW_TOKENS, rollout=nf.Sampling(temperature=0.0))
    out = nf.generate(model, TOKENIZER, shared_reward_model("llama"), None, CHATS, config)
    for chat, tokens in zip(CHATS, out.sequences, strict=True):
        expected = own_greedy(model, ids_of(chat), NEW_TOKENS)
        if tokens.tolist() != expected:
            same = next(i for i, (a, b) in enumerate(zip([*tokens, -1], [*expected, -2], strict=False)) if a != b)
            return f"wrong: other tokens from {same} on"
    return "right"


def _decode(model: Any) -> str:
    config = nf.NablaConfig(
        max_rollouts=3, max_new_tokens=8, confidence_threshold=None, gradient_threshold=None, max_iters=3, seed=1
    )
    models = (model, TOKENIZER, shared_reward_model("llama"), None)
    both = nf.generate(*models, CHATS, config)
    alone = [nf.generate(*models, [chat], config).sequences[0].tolist() for chat in CHATS]
    return "right" if alone == [y.tolist() for y in both.sequences] else "wrong: another answer in a batch than alone"


def _reward(model: Any) -> str:
    from nabla_fast.testing.models import shared_language_model

    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)
    ours = RewardModel(model, None, language_model, TOKENIZER)
    frames = [ours.chat_frame(chat) for chat in CHATS]
    talks = [ours.conversation(f, torch.tensor(y)) for f, y in zip(frames, (RESPONSE, RESPONSE[:5]), strict=True)]
    with torch.no_grad():
        rewards, _ = ours.rewards(talks)
        own = [model(input_ids=x.ids.unsqueeze(0)).logits.reshape(()) for x in talks]
    errors = [(a - b).abs() / b.abs().clamp(min=1e-3) for a, b in zip(rewards, own, strict=True)]
    worst = max(float(error.nan_to_num(torch.inf)) for error in errors)
    how = "" if ours.backbone is not None else " (its own forward pass)"
    return f"right{how}" if worst < 1e-3 else f"wrong: {worst:.2g} relatively"
