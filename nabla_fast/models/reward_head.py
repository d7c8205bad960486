"""The head of a reward model, and any head, found by comparing with the model's own forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast.models import checks, numerics, quantised_layers
from nabla_fast.models.backbone import Backbone, Cache, Inputs, embedded, embeddings_replaced
from nabla_fast.ops import upcast

_IDS_NAMES = ("input_ids", "ids", "token_ids", "tokens", "text", "texts", "prompt", "prompts", "responses")
_OUTPUTS = ("logits", "scores", "score", "rewards", "reward", "end_scores")


@dataclass(frozen=True)
class OwnForward:
    """A model's own forward pass over whole conversations, one at a time.

    Attributes:
        model: as given, adapters included.
        stand_in: id shown for a token that the model's vocabulary does not have.
        result: takes what the model returns for token ids (1, T), these and its name, and gives the result.
    """

    model: Any
    embedding: Any
    name: str
    stand_in: int
    result: Callable[[Any, Tensor, str], Tensor]

    def __call__(self, inputs: Inputs) -> Tensor:
        """The result for a conversation, differentiable with respect to its embeddings."""
        ids = torch.where(inputs.ids < 0, self.stand_in, inputs.ids)
        with (
            quantised_layers.exact(self.model),
            embeddings_replaced(self.embedding, ids.unsqueeze(0), inputs.embeds.unsqueeze(0), self.name),
        ):
            return self.of_ids(ids)

    def of_ids(self, ids: Tensor) -> Tensor:
        """The result for token ids (T,)."""
        ids = ids.unsqueeze(0)
        return self.result(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)), ids, self.name)


@dataclass(frozen=True)
class RewardHead:
    """One reward of a conversation: by the model's own ``score`` module on the hidden state of one token, or as it is.

    Attributes:
        backbone: gives the hidden states; None runs the model as it is, on whole conversations, one at a time.
        score: maps hidden states (B, d) to (B, 1), behind ``backbone``.
        skips: the token that the pooled one is not: the last token with another id is pooled, as transformers' classes
            do with the padding token, whatever else it is. None pools the last token.
    """

    own: OwnForward
    backbone: Backbone | None = None
    score: Callable[[Tensor], Tensor] | None = None
    skips: int | None = None

    def __call__(
        self, caches: Sequence[Cache | None], conversations: Sequence[Inputs]
    ) -> tuple[Tensor, list[Cache | None]]:
        """Rewards (B,) of conversations, each behind its prefix, and the caches of the whole."""
        if self.backbone is None or self.score is None:
            return torch.cat([self.own(x) for x in conversations]), [None] * len(conversations)
        hidden, after = self.backbone(caches, conversations)
        pooled = [_pooled(self.skips, h, x, s) for h, s, x in zip(hidden, caches, conversations, strict=True)]
        return self.score(torch.stack(pooled)).squeeze(-1), after


def _pooled(skips: int | None, rows: Tensor, inputs: Inputs, cache: Cache | None = None) -> Tensor:
    """The row that is scored, of those (S, ...) of the inputs or the hidden state before them."""
    if skips is None:
        return rows[-1]
    kept = (inputs.ids != skips).nonzero()
    if len(kept):
        return rows[int(kept[-1])]
    # The prefix ends with a token of the prompt or of the response, which has not ended there.
    return rows[-1] if cache is None else cache.hidden[-1] + 0 * rows[-1]


def own_score(out: Any, ids: Tensor, name: str) -> Tensor:
    """The score (1,) in what a model returned for token ids (1, T).

    Raises:
        TypeError: if it returned no scores.
        ValueError: if there are several of them.
    """
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
    if out.ndim < 2 or out.shape[1] != ids.shape[1]:
        raise ValueError(f"{name} has {out.shape[-1]} labels; a reward model has one")
    raise ValueError(
        f"{name} gives a score for every token of a conversation (shape {tuple(out.shape)} for {ids.shape[1]} tokens), "
        "as a token classifier, a process reward model or a language model does; give a model with one score per "
        "conversation, a callable that makes one of them, or nabla_fast.ProcessReward(model, separator), which reads "
        "them at the end of each step"
    )


def _entry(out: Any, key: str) -> Any:
    return out.get(key) if hasattr(out, "get") else getattr(out, key, None)


def reward_head(model: Any, own: Any, name: str, tokenizer: Any) -> RewardHead:
    """A head that continues cached prefixes if its rewards are those of the forward pass of ``own``, else that pass.

    ``own`` is the transformers model, or an adapter around it. Errors and warnings are those of `find_head`.
    """
    ids = checks.probe_ids(model, tokenizer)
    forward = OwnForward(own, model.get_input_embeddings(), name, int(ids[0]), own_score)
    pad = model.config.get_text_config().pad_token_id
    # Of several lengths and beginnings, as a score may depend on either.
    probes = [ids, ids.flip(0), ids[3:]]
    if pad is not None:
        # Where the padding token also ends a turn, it counts, and what is pooled shows.
        probes.append(torch.cat([ids.roll(2), ids.new_tensor([pad])]))
    score: Any = getattr(model, "score", None)
    rules = [] if score is None else [None] if pad is None else [None, pad]
    candidates = [Candidate(skips, "`score` of the last token", score, partial(_pooled, skips)) for skips in rules]
    reason = "its score is none of a module called `score` on the last token"
    found = find_head("reward", model, forward, probes, candidates, reason)
    if found.reason is not None:
        return RewardHead(forward)
    return RewardHead(forward, Backbone(model, name, ids), score, found.key)


class Candidate(NamedTuple):
    """What may be a model's head: a module from hidden states (T, d) to rows (T, k), and what of these, by the inputs,
    is the result. ``key`` names it in `Found`, ``what`` in messages."""

    key: Any
    what: str
    score: Callable[[Tensor], Tensor]
    pick: Callable[[Tensor, Inputs], Tensor]


class Found(NamedTuple):
    """The key of the head, or the reason why none is; and the numbers in a row of the model's results."""

    key: Any
    reason: str | None
    width: int


def find_head(
    what: str, model: Any, own: OwnForward, probes: Sequence[Tensor], candidates: Sequence[Candidate], reason: str
) -> Found:
    """The first candidate whose results, behind a `Backbone`, are those of the model's own forward pass.

    Args:
        what: names this search among all that is found out about a model.
        probes: token ids (T,) each to try it with.
        reason: why there is none, where there are no candidates.

    Raises:
        ValueError: in training mode; for weights that are quantised or off-loaded where they are read; and if the
            gradient is not that of the forward pass.

    Warns:
        UserWarning: once per model that is run as it is.
    """
    checks.require_eval(model, own.name)
    checks.leave_inference_mode(model)
    checks.dense_weight(model, own.embedding, own.name, "input embedding")
    checks.require_sound_layers(model, own.name)
    found = checks.remembered(own.model, own.name, what, lambda: _examine(model, own, probes, candidates, reason))
    if found.reason is not None:
        checks.warn_once(own.model, f"{own.name} is run as it is, on whole conversations, slower: {found.reason}")
    return found


def _examine(
    model: Any, own: OwnForward, probes: Sequence[Tensor], candidates: Sequence[Candidate], reason: str
) -> Found:
    function: Callable[[Inputs], Tensor] = own
    with torch.no_grad():
        inputs = [embedded(own.embedding, probe) for probe in probes]
        expected = [own.of_ids(probe) for probe in probes]
        found = Found(None, reason, expected[0].shape[-1])
        if candidates:
            backbone = Backbone(model, own.name, probes[0])
            hidden = [backbone.whole(x) for x in inputs]
        for candidate in candidates:
            try:
                rows = [candidate.score(h) for h in hidden]
                ours = [candidate.pick(row, x) for row, x in zip(rows, inputs, strict=True)]
                # Beside the rows of all tokens a difference is large or small.
                apart = _apart(ours, expected, rows)
            except torch.OutOfMemoryError:
                raise
            except (TypeError, RuntimeError) as error:  # of a head that takes something else than hidden states
                apart = f"a {type(error).__name__}"
            if apart is None:
                found, function = found._replace(key=candidate.key, reason=None), partial(_behind, backbone, candidate)
                break
            found = found._replace(reason=f"its own forward pass differs by {apart} from its {candidate.what}")
        else:
            if _apart([own(x) for x in inputs], expected, expected) is not None:
                raise ValueError(
                    f"{own.name} makes something else of its input embeddings than of its token ids; {found.reason}"
                )

    def weighed(embeds: Tensor) -> Tensor:
        # A difference may hide in any of the numbers.
        numbers = upcast(function(Inputs(probes[0], embeds))).flatten()
        return (numbers * torch.linspace(1, 2, len(numbers), device=numbers.device)).sum()

    fault = numerics.gradient_fault(weighed, inputs[0].embeds, model)
    if fault is not None:
        raise ValueError(f"{own.name} cannot be used: {fault}")
    return found


def _behind(backbone: Backbone, head: Candidate, inputs: Inputs) -> Tensor:
    return head.pick(head.score(backbone.whole(inputs)), inputs)


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor], beside: Sequence[Tensor]) -> str | None:
    """How far results are apart; None if no farther than rounding, as a share of the largest number in ``beside``."""
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)}"
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, theirs, strict=True)]
    # NaN is found when a reward is asked for, and named there.
    worst = max(float((a - b).abs().nan_to_num(0).max()) for a, b in pairs)
    scale = max(float(rows.abs().max()) for rows in beside)
    tolerance = 0.05 if numerics.bits_of(theirs[0]) == 16 else 1e-3
    return f"{worst:.3g}" if worst > tolerance * scale else None


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
