"""The head of a process reward model, found by comparing with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone, Cache, Inputs
from nabla_fast.models.reward_head import Candidate, OwnForward, find_head
from nabla_fast.ops import upcast

_HEADS = ("score", "classifier", "v_head")
# What a label that means a right step is called.
_RIGHT = {"+", "1", "correct", "good", "positive", "right", "true", "yes"}


@dataclass(frozen=True)
class StepHead:
    """Logits for every token of a conversation, as the model's own forward pass gives them.

    Attributes:
        own: that pass.
        backbone: gives the hidden states; None runs the model as it is, on whole conversations, one at a time.
        score: maps hidden states (n, d) to logits (n, labels), behind ``backbone``.
        labels: how many logits a token has.
    """

    own: OwnForward
    backbone: Backbone | None
    score: Callable[[Tensor], Tensor] | None
    labels: int

    def __call__(
        self, caches: Sequence[Cache | None], conversations: Sequence[Inputs], reads: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[Cache | None]]:
        """Logits (k_b, labels) at the positions ``reads`` (k_b) of each conversation, its cached prefix included; and
        the caches of the whole."""
        if self.backbone is None or self.score is None:
            rows = [self.own(x)[list(at)] for x, at in zip(conversations, reads, strict=True)]
            return rows, [None] * len(rows)
        hidden, after = self.backbone(caches, conversations)
        whole = [h if c is None else torch.cat([c.hidden, h]) for c, h in zip(caches, hidden, strict=True)]
        # All reads of a conversation may be in its prefix, where a gradient of zero is asked for all the same.
        states = torch.cat([h[list(at)] + 0 * h[-1] for h, at in zip(whole, reads, strict=True)])
        return list(self.score(states).split([len(at) for at in reads])), after


def log_scores(logits: Tensor, label: int) -> Tensor:
    """Logarithms (k,), float32 or float64, of the scores that logits (k, labels) give."""
    wide = upcast(logits)
    return logsigmoid(wide[:, 0]) if wide.shape[1] == 1 else wide.log_softmax(-1)[:, label]


def own_logits(out: Any, ids: Tensor, name: str) -> Tensor:
    """The logits (T, labels) in what a model returned for token ids (1, T).

    Raises:
        ValueError: if they are not one row for every token.
    """
    logits = out[0] if isinstance(out, (tuple, list)) and out else getattr(out, "logits", out)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{name} gives {shape} for {ids.shape[1]} tokens; a process reward model gives logits of shape "
            f"(1, {ids.shape[1]}, labels), and a model with one score per conversation is given without ProcessReward"
        )
    return logits[0]


def step_head(model: Any, own: Any, name: str, tokenizer: Any) -> StepHead:
    """A head behind a backbone if its logits are those of the forward pass of ``own``, else that pass.

    Args:
        model: a transformers model.
        own: the same, or an adapter around it.

    Raises:
        ValueError: as `own_logits` and `find_head` do.

    Warns:
        UserWarning: once per model that is run as it is.
    """
    ids = checks.probe_ids(model, tokenizer)
    forward = OwnForward(own, model.get_input_embeddings(), name, int(ids[0]), own_logits)
    modules = {key: module for key in _HEADS if callable(module := getattr(model, key, None))}
    candidates = [Candidate(key, f"`{key}`", module, lambda rows, _: rows) for key, module in modules.items()]
    reason = f"its logits are not those of a module called {', '.join(_HEADS[:-1])} or {_HEADS[-1]}"
    found = find_head("steps", model, forward, [ids, ids.flip(0), ids[3:]], candidates, reason)
    if found.reason is not None:
        return StepHead(forward, None, None, found.width)
    return StepHead(forward, Backbone(model, name, ids), modules[found.key], found.width)


def right_label(model: Any, labels: int, asked: int | None, name: str) -> int:
    """The label that means a right step.

    Raises:
        ValueError: if it is out of range, or there are several and neither ``asked`` nor the labels' names say it.
    """
    if asked is not None:
        if not 0 <= asked < labels:
            raise ValueError(f"label is {asked}, and {name} has {labels} labels; give 0 to {labels - 1}")
        return asked
    if labels == 1:
        return 0
    names = getattr(model.config, "id2label", None) or {}
    names = {int(i): str(text) for i, text in names.items() if int(i) < labels}
    right = [i for i, text in names.items() if text.strip().lower() in _RIGHT]
    if len(right) == 1:
        return right[0]
    # transformers' own names say nothing, and are what trl and Qwen leave: the second of two is a right step.
    if labels == 2 and not right and all(text == f"LABEL_{i}" for i, text in names.items()):
        return 1
    shown = ", ".join(repr(names.get(i, i)) for i in range(min(labels, 5)))
    raise ValueError(
        f"{name} has {labels} labels ({shown}{', …' if labels > 5 else ''}), and which of them means a right step is "
        "not known; give ProcessReward(model, ..., label=INDEX), or name the label 'correct' in its config's id2label"
    )
