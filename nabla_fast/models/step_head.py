"""The head of a process reward model, found by comparing with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nabla_fast.models import checks, numerics, quantised_layers
from nabla_fast.models.backbone import Backbone, Cache, Inputs, embeddings_replaced
from nabla_fast.ops import upcast

_HEADS = ("score", "classifier", "v_head")
# What a label that means a right step is called.
_RIGHT = {"+", "1", "correct", "good", "positive", "right", "true", "yes"}


@dataclass(frozen=True)
class StepHead:
    """Logits for every token of a conversation, as the model's own forward pass gives them.

    Attributes:
        model: as given, adapters included.
        name: what errors call it.
        backbone: gives the hidden states; None runs the model as it is, on whole conversations, one at a time.
        score: maps hidden states (n, d) to logits (n, labels), behind ``backbone``.
        embedding: the model's input embeddings.
        stand_in: id shown for a token that the model's vocabulary does not have, where it runs as it is.
        labels: how many logits a token has.
    """

    model: Any
    name: str
    backbone: Backbone | None
    score: Callable[[Tensor], Tensor] | None
    embedding: Any
    stand_in: int
    labels: int

    def __call__(
        self, caches: Sequence[Cache | None], conversations: Sequence[Inputs], reads: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[Cache | None]]:
        """Logits (k_b, labels) at the positions ``reads`` (k_b) of each conversation, its cached prefix included; and
        the caches of the whole."""
        if self.backbone is None or self.score is None:
            rows = [self._alone(x)[list(at)] for x, at in zip(conversations, reads, strict=True)]
            return rows, [None] * len(rows)
        hidden, after = self.backbone(caches, conversations)
        whole = [h if c is None else torch.cat([c.hidden, h]) for c, h in zip(caches, hidden, strict=True)]
        # All reads of a conversation may be in its prefix, where a gradient of zero is asked for all the same.
        states = torch.cat([h[list(at)] + 0 * h[-1] for h, at in zip(whole, reads, strict=True)])
        return list(self.score(states).split([len(at) for at in reads])), after

    def _alone(self, inputs: Inputs) -> Tensor:
        ids = torch.where(inputs.ids < 0, self.stand_in, inputs.ids).unsqueeze(0)
        with (
            quantised_layers.exact(self.model),
            embeddings_replaced(self.embedding, ids, inputs.embeds.unsqueeze(0), self.name),
        ):
            return own_logits(self.model, ids, self.name)


def log_scores(logits: Tensor, label: int) -> Tensor:
    """Logarithms (k,), float32 or float64, of the scores that logits (k, labels) give."""
    wide = upcast(logits)
    return logsigmoid(wide[:, 0]) if wide.shape[1] == 1 else wide.log_softmax(-1)[:, label]


def own_logits(model: Any, ids: Tensor, name: str) -> Tensor:
    """The logits (T, labels) that the forward pass of ``model`` gives token ids (1, T).

    Raises:
        ValueError: if they are not one row for every token.
    """
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
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
        ValueError: in training mode; if the model gives something else than logits for every token; for weights that
            are quantised or off-loaded where they are read; and if the gradient is not that of the forward pass.

    Warns:
        UserWarning: once per model that is run as it is.
    """
    if model.training:
        raise ValueError(f"{name} is in training mode; call .eval() on it first")
    embedding = model.get_input_embeddings()
    checks.leave_inference_mode(model)
    checks.dense_weight(model, embedding, name, "input embedding")
    checks.require_sound_layers(model, name)
    ids = checks.probe_ids(model, tokenizer)
    found = checks.remembered(own, name, "steps", lambda: _examine(model, own, name, ids))
    if found.reason is not None:
        checks.warn_once(own, f"{name} is run as it is, on whole conversations, slower: {found.reason}")
    return _head(model, own, name, ids, found)


@dataclass(frozen=True)
class _Found:
    """The attribute that is the head, or why none is; and how many labels there are."""

    head: str | None
    reason: str | None
    labels: int


def _head(model: Any, own: Any, name: str, ids: Tensor, found: _Found) -> StepHead:
    backbone = None if found.head is None else Backbone(model, name, ids)
    score = None if found.head is None else getattr(model, found.head)
    return StepHead(own, name, backbone, score, model.get_input_embeddings(), int(ids[0]), found.labels)


def _examine(model: Any, own: Any, name: str, ids: Tensor) -> _Found:
    embedding = model.get_input_embeddings()
    probes = [ids, ids.flip(0), ids[3:]]
    with torch.no_grad():
        expected = [own_logits(own, probe.unsqueeze(0), name) for probe in probes]
    inputs = [Inputs(probe, embedding(probe.unsqueeze(0))[0].detach()) for probe in probes]
    labels = expected[0].shape[-1]
    reason = f"its logits are not those of a module called {', '.join(_HEADS[:-1])} or {_HEADS[-1]}"
    found = _Found(None, reason, labels)
    for attribute in _HEADS:
        if callable(getattr(model, attribute, None)):
            candidate = _Found(attribute, None, labels)
            apart = _apart(_head(model, own, name, ids, candidate), inputs, expected)
            if apart is None:
                found = candidate
                break
            found = _Found(None, f"its own forward pass differs by {apart} from its `{attribute}`", labels)
    head = _head(model, own, name, ids, found)
    if found.head is None and _apart(head, inputs, expected) is not None:
        raise ValueError(f"{name} makes something else of its input embeddings than of its token ids; {found.reason}")
    # Every logit of every token counts, each with a weight of its own, since a difference may hide in any of them.
    weights = torch.linspace(1, 2, len(ids) * labels, device=embedding.weight.device).view(len(ids), labels)

    def value(embeds: Tensor) -> Tensor:
        (logits,), _ = head([None], [Inputs(ids, embeds)], [range(len(ids))])
        return (upcast(logits) * weights).sum()

    fault = numerics.gradient_fault(value, inputs[0].embeds, model)
    if fault is not None:
        raise ValueError(f"{name} cannot be used: {fault}")
    return found


def _apart(head: StepHead, inputs: Sequence[Inputs], expected: Sequence[Tensor]) -> str | None:
    """How far the logits of ``head`` are from those that the model gives token ids; None if no farther than rounding.

    Conversations are run one at a time, as the model's own pass was.
    """
    scale = max(float(e.abs().max()) for e in expected)
    tolerance = (0.05 if numerics.bits_of(expected[0]) == 16 else 1e-3) * scale
    worst = 0.0
    for x, theirs in zip(inputs, expected, strict=True):
        with torch.no_grad():
            try:
                (ours,), _ = head([None], [x], [range(len(x))])
            except (TypeError, RuntimeError) as error:  # of a head that takes something else than hidden states
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return f"a {type(error).__name__}"
        if ours.shape != theirs.shape:
            return f"shape {tuple(ours.shape)}"
        # NaN is found when a reward is asked for, and named there.
        worst = max(worst, float((ours.double().cpu() - theirs.double().cpu()).abs().nan_to_num(0).max()))
    return f"{worst:.3g}" if worst > tolerance else None


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
