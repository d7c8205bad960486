"""The loss of a reward model that is to judge answers, to read prefixes and to point at better tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.ops import upcast

SMOOTHING = 0.02
AT_ONCE = 4


@dataclass(frozen=True)
class Pointer:
    """Where a row's gradient is to point: at ``better`` tokens rather than ``worse`` ones, in place ``position``."""

    position: int
    better: tuple[int, ...]
    worse: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A conversation.

    Attributes:
        ids: its token ids.
        right: whether its response is.
        prefix: position at which the score of the conversation so far is taught the same label; None for none.
        pointers: for the gradient of the score at the end.
    """

    ids: tuple[int, ...]
    right: bool
    prefix: int | None = None
    pointers: tuple[Pointer, ...] = ()


@dataclass(frozen=True)
class Loss:
    """The loss of some rows, and what it is made of.

    Attributes:
        total: scalar, with a gradient.
        judge: mean cross-entropy of the score at the end of a row.
        prefix: that of the scores of prefixes; None where no row has one.
        point: cross-entropy of the first-order gains at the pointers; None where there are none.
    """

    total: Tensor
    judge: Tensor
    prefix: Tensor | None
    point: Tensor | None


def reward_loss(
    classifier: Any,
    rows: Sequence[Row],
    *,
    sharpness: Tensor,
    prefix: float,
    point: float,
    batch: Sequence[Row] | None = None,
) -> Loss:
    """The loss of a batch, or the share that some of its rows have in it.

    The score s of a row's last token is a logit of "right". Where it is to point, the gradient g of s by the embedding
    of one token gives every other token v the first-order gain g . e_v; over the better and the worse tokens, the
    softmax of ``exp(sharpness)`` times the gains is to be all on the better ones. Its derivative by the parameters is a
    second one, so that the model's attention must be one that has it ("eager").

    Args:
        classifier: an ``AutoModelForSequenceClassification`` with one label, or what peft makes of it.
        sharpness: scalar parameter: how large a gradient is decides nothing.
        prefix, point: weights of the two losses.
        batch: that ``rows`` are a part of: the means are over all of it, so that the parts' losses add up. ``rows``
            by default.
    """
    batch = rows if batch is None else batch
    own = classifier.get_base_model() if hasattr(classifier, "get_base_model") else classifier
    table = own.get_input_embeddings()
    device = table.weight.device
    ids, mask, ends = _padded(rows, device)
    embeds = table(ids)
    pointing = point > 0 and any(row.pointers for row in rows)
    if pointing:
        embeds = embeds.detach().requires_grad_()
    hidden = own.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    scores = upcast(own.score(hidden)[..., 0])
    at_end = scores[torch.arange(len(rows), device=device), ends]
    labels = at_end.new_tensor([float(row.right) for row in rows])
    judge = _cross_entropy(at_end, labels) / len(batch)
    total = judge
    prefix_loss = point_loss = None
    asked = [(i, row.prefix) for i, row in enumerate(rows) if row.prefix is not None]
    if prefix > 0 and asked:
        index = torch.tensor(asked, device=device).T
        prefixes = sum(row.prefix is not None for row in batch)
        prefix_loss = _cross_entropy(scores[index[0], index[1]], labels[index[0]]) / prefixes
        total = total + prefix * prefix_loss
    if pointing:
        (gradient,) = torch.autograd.grad(at_end.sum(), embeds, create_graph=True)
        each = [
            _points(gradient[i, pointer.position], pointer, table.weight, sharpness)
            for i, row in enumerate(rows)
            for pointer in row.pointers
        ]
        point_loss = torch.stack(each).sum() / sum(len(row.pointers) for row in batch)
        total = total + point * point_loss
    return Loss(total, judge, prefix_loss, point_loss)


def accumulate(
    classifier: Any, rows: Sequence[Row], *, sharpness: Tensor, prefix: float, point: float, at_once: int = AT_ONCE
) -> Loss:
    """Adds the gradient of `reward_loss` to the parameters' ``grad``, ``at_once`` rows at a time.

    Rows that point are among themselves: the graph of a second derivative takes several times the memory of a first
    one's, and the other rows need none.

    Returns:
        The loss of all rows, without a graph.
    """
    pointing = [row for row in rows if row.pointers]
    others = [row for row in rows if not row.pointers]
    losses = []
    for own in (some[first : first + at_once] for some in (pointing, others) for first in range(0, len(some), at_once)):
        loss = reward_loss(classifier, own, sharpness=sharpness, prefix=prefix, point=point, batch=rows)
        loss.total.backward()
        losses.append((loss.total, loss.judge, loss.prefix, loss.point))
    total, judge, prefix_loss, point_loss = (_sum(of_parts) for of_parts in zip(*losses, strict=True))
    assert total is not None
    assert judge is not None
    return Loss(total, judge, prefix_loss, point_loss)


def _points(gradient: Tensor, pointer: Pointer, table: Tensor, sharpness: Tensor) -> Tensor:
    tokens = torch.tensor([*pointer.better, *pointer.worse], device=table.device)
    gains = (upcast(table[tokens]) @ upcast(gradient)) * sharpness.exp()
    return gains.logsumexp(0) - gains[: len(pointer.better)].logsumexp(0)


def _sum(losses: Sequence[Tensor | None]) -> Tensor | None:
    found = [loss.detach() for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, labels.clamp(SMOOTHING, 1 - SMOOTHING), reduction="sum")


def _padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T) and mask (B, T), padded on the right, and the index (B,) of each row's last token."""
    ids = pad_sequence([torch.tensor(row.ids, device=device) for row in rows], batch_first=True)
    ends = torch.tensor([len(row.ids) - 1 for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) <= ends.unsqueeze(1)
    return ids, mask.long(), ends
