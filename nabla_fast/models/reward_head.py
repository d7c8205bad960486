"""The head of a reward model, found by comparing with the model's own forward pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models import checks, numerics, quantised_layers
from nabla_fast.models.backbone import Backbone, Cache, Inputs, embeddings_replaced

_IDS_NAMES = ("input_ids", "ids", "token_ids", "tokens", "text", "texts", "prompt", "prompts", "responses")
_OUTPUTS = ("logits", "scores", "score", "rewards", "reward", "end_scores")


@dataclass(frozen=True)
class RewardHead:
    """The model's own ``score`` module on the hidden state of one token of the conversation.

    Attributes:
        backbone: gives the hidden states.
        score: maps hidden states (B, d) to (B, 1).
        skips: the token that the pooled one is not: the last token with another id is pooled, as transformers' classes
            do with the padding token, whatever else it is. None pools the last token.
    """

    backbone: Backbone
    score: Callable[[Tensor], Tensor]
    skips: int | None

    def __call__(
        self, caches: Sequence[Cache | None], conversations: Sequence[Inputs]
    ) -> tuple[Tensor, list[Cache | None]]:
        """Rewards (B,) of conversations, each behind its prefix, and the caches of the whole."""
        hidden, after = self.backbone(caches, conversations)
        pooled = [self.pooled(h, s, x) for h, s, x in zip(hidden, caches, conversations, strict=True)]
        return self.score(torch.stack(pooled)).squeeze(-1), after

    def alone(self, conversation: Inputs) -> Tensor:
        """The reward (1,) of one conversation."""
        return self([None], [conversation])[0]

    def pooled(self, hidden: Tensor, cache: Cache | None, inputs: Inputs) -> Tensor:
        """The hidden state (d,) that is scored, of those (S, d) of the inputs or the one before them."""
        if self.skips is None:
            return hidden[-1]
        kept = (inputs.ids != self.skips).nonzero()
        if len(kept):
            return hidden[int(kept[-1])]
        # The prefix ends with a token of the prompt or of the response, which has not ended there.
        return hidden[-1] if cache is None else cache.hidden[-1] + 0 * hidden[-1]


@dataclass(frozen=True)
class OwnForward:
    """The model's own forward pass over whole conversations, one at a time.

    Attributes:
        model: as given, adapters included.
        embedding: its input embeddings.
        name: what errors call it.
        stand_in: id shown for a token that the model's vocabulary does not have.
    """

    model: Any
    embedding: Any
    name: str
    stand_in: int

    def __call__(self, inputs: Inputs) -> Tensor:
        """The reward (1,) of a conversation, differentiable with respect to its embeddings."""
        ids = torch.where(inputs.ids < 0, self.stand_in, inputs.ids).unsqueeze(0)
        with (
            quantised_layers.exact(self.model),
            embeddings_replaced(self.embedding, ids, inputs.embeds.unsqueeze(0), self.name),
        ):
            return own_score(self.model, ids, self.name)


def own_score(model: Any, ids: Tensor, name: str) -> Tensor:
    """The score (1,) that the forward pass of ``model`` gives token ids (1, T).

    Raises:
        TypeError: if it returns no scores.
        ValueError: if there are several of them.
    """
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        found = [value for key in _OUTPUTS if isinstance(value := _entry(out, key), Tensor)]
        if not found:
            raise TypeError(
                f"{name} returns no scores (no {', '.join(_OUTPUTS)} in its {type(out).__name__}); give an "
                "AutoModelForSequenceClassification with one label, or a callable"
            )
        out = found[0]
    if out.numel() == 1 and ids.shape[1] > 1 and out.ndim <= 2:
        return out.reshape(1)
    labels = f"{out.shape[-1]} labels; a reward model has one"
    per_token = out.ndim > 1 and out.shape[1] == ids.shape[1]
    raise ValueError(
        f"{name} gives a score for every token of a conversation (shape {tuple(out.shape)} for {ids.shape[1]} tokens), "
        "as a token classifier, a process reward model or a language model does; give a model with one score per "
        "conversation, a callable that makes one of them, or nabla_fast.ProcessReward(model, separator), which reads "
        "them at the end of each step"
        if per_token
        else f"{name} has {labels}"
    )


def reward_head(model: Any, own: Any, name: str, tokenizer: Any) -> tuple[RewardHead | None, OwnForward | None]:
    """A head that continues cached prefixes if its rewards are those of the forward pass of ``own``, else that pass.

    Args:
        model: a transformers model.
        own: the same, or an adapter around it.

    Raises:
        TypeError, ValueError: as `own_score` does; ValueError also in training mode, for weights that are quantised or
            off-loaded where they are read, and if the gradient is not that of the forward pass.

    Warns:
        UserWarning: once per model that is run as it is.
    """
    if model.training:
        raise ValueError(f"{name} is in training mode; call .eval() on it first")
    checks.leave_inference_mode(model)
    checks.dense_weight(model, model.get_input_embeddings(), name, "input embedding")
    checks.require_sound_layers(model, name)
    ids = checks.probe_ids(model, tokenizer)
    pad = model.config.get_text_config().pad_token_id
    rule = checks.remembered(own, name, "reward", lambda: _examine(model, own, name, ids, pad))
    if rule.reason is None:
        return RewardHead(Backbone(model, name, ids), model.score, pad if rule.skips_padding else None), None
    checks.warn_once(own, f"{name} is run as it is, on whole conversations, slower: {rule.reason}")
    return None, OwnForward(own, model.get_input_embeddings(), name, int(ids[0]))


@dataclass(frozen=True)
class _Rule:
    """Which token is pooled; or why not even the best guess gives what the model says."""

    skips_padding: bool
    reason: str | None


def _examine(model: Any, own: Any, name: str, ids: Tensor, pad: int | None) -> _Rule:
    # Of several lengths and beginnings, as a score may depend on either.
    probes = [ids, ids.flip(0), ids[3:]]
    if pad is not None:
        # Where the padding token also ends a turn, it counts, and what is pooled shows.
        probes.append(torch.cat([ids.roll(2), ids.new_tensor([pad])]))
    with torch.no_grad():
        expected = [own_score(own, probe.unsqueeze(0), name) for probe in probes]
    rule = _Rule(False, "its score is none of a module called `score` on the last token")
    score = getattr(model, "score", None)
    function: Callable[[Inputs], Tensor] = OwnForward(own, model.get_input_embeddings(), name, int(ids[0]))
    if score is not None:
        backbone = Backbone(model, name, ids)
        inputs = [_read(model, probe) for probe in probes]
        with torch.no_grad():
            hidden = [backbone.whole(x) for x in inputs]
            # Of every token: what a difference is large or small beside.
            scale = max(float(score(h).abs().max()) for h in hidden)
            for skips in (False, True) if pad is not None else (False,):
                head = RewardHead(backbone, score, pad if skips else None)
                ours = [score(head.pooled(h, None, x)[None])[0] for h, x in zip(hidden, inputs, strict=True)]
                if all(o.shape == e.shape for o, e in zip(ours, expected, strict=True)):
                    apart = _apart(ours, expected)
                    rule = _Rule(
                        skips, f"its own forward pass differs by {apart:.3g} from its `score` of the last token"
                    )
                    if apart <= _tolerance(expected[0]) * scale or not math.isfinite(scale):
                        rule = _Rule(skips, None)
                        function = head.alone
                        break
    if rule.reason is not None:
        with torch.no_grad():
            ours = [function(_read(model, probe)) for probe in probes]
        scale = max(float(e.abs().max()) for e in expected)
        if _apart(ours, expected) > _tolerance(expected[0]) * scale:
            raise ValueError(
                f"{name} makes something else of its input embeddings than of its token ids; {rule.reason}"
            )
    fault = numerics.gradient_fault(lambda x: function(Inputs(ids, x))[0], _read(model, ids).embeds, model)
    if fault is not None:
        raise ValueError(f"{name} cannot be used: {fault}")
    return rule


def _read(model: Any, ids: Tensor) -> Inputs:
    return Inputs(ids, model.get_input_embeddings()(ids.unsqueeze(0))[0].detach())


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    # NaN is found when a reward is asked for, and named there.
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().nan_to_num(0).max()) for a, b in pairs)


def _tolerance(like: Tensor) -> float:
    """What rounding may make of a score, as a share of the largest one."""
    return 0.05 if numerics.bits_of(like) == 16 else 1e-3


def _entry(out: Any, key: str) -> Any:
    return out.get(key) if hasattr(out, "get") else getattr(out, key, None)


def require_embeddings_argument(function: Any, name: str) -> None:
    """Refuses a callable that cannot take (inputs_embeds, attention_mask).

    Raises:
        TypeError: if it cannot, or its first argument is called as token ids or texts are.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    wanted = (
        f"{name} must take (inputs_embeds, attention_mask): embeddings, because a gradient with respect to them is "
        f"needed; its arguments are {signature}"
    )
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(wanted) from None
    first = next(iter(signature.parameters), "")
    if first in _IDS_NAMES:
        raise TypeError(wanted)
