"""Rollouts with the transformers model itself, batched, latents kept as they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.models.body import joined
from nabla_fast.models.decoding import DecodeAlone, DecodeBatch
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.layers import fast_layers
from nabla_fast.models.prefix import OwnState, PrefixState
from nabla_fast.models.tracks import TOKENS_PER_PASS, common_lengths, resume
from nabla_fast.rollout.base import Rollout, RolloutStream, Start, StopRule
from nabla_fast.rollout.drafts import Drafter
from nabla_fast.sampling import Context, Sampler

# Columns in use per token of the longest sequence, from which on the batch is made anew without the unused ones.
_SPREAD = 1.5


class HFRollout:
    """Decodes a batch that sequences join when they are submitted and leave when they end.

    Args:
        language_model: draws the tokens.
        sampler: how.
        draft_tokens: most draft tokens that one forward pass verifies; 0 for none.
    """

    def __init__(self, language_model: LanguageModel, sampler: Sampler | None = None, draft_tokens: int = 0) -> None:
        self.language_model = language_model
        self.sampler = sampler or Sampler()
        self.draft_tokens = draft_tokens

    def open(self, sampling: Sampling, stop: StopRule) -> RolloutStream:
        """See `RolloutBackend.open`."""
        together = self.language_model.body.way == "prefix"
        return _Stream(self, sampling, stop) if together else _AloneStream(self, sampling, stop)


@dataclass
class _Row:
    """A sequence in the batch.

    Attributes:
        context: with the response so far.
        drafter: guesses what follows.
        draft: the tokens that the pass under way verifies.
        ended: whether the response is complete.
    """

    key: int
    start: Start
    drafter: Drafter
    context: Context
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    draft: tuple[int, ...] = ()
    ended: bool = False

    def feed(self, most: int) -> list[int]:
        """At most ``most`` tokens for the next pass: the last one, which is in no state yet, and a draft behind it."""
        left = self.context.limit - len(self.context.response)
        self.draft = self.drafter.draft(min(left, most) - 1)
        last = (self.context.response or self.context.prompt_ids)[-1]
        return [last, *self.draft]

    def contexts(self) -> list[Context]:
        """What each token of the pass is followed in, were the draft right."""
        response = self.context.response
        return [replace(self.context, response=(*response, *self.draft[:n])) for n in range(len(self.draft) + 1)]

    def take(self, drawn: Sequence[int], stop: StopRule) -> int:
        """Appends what was drawn, up to the first token that the draft did not foresee; how many tokens fed stand."""
        self.calls += 1
        self.drafted += len(self.draft)
        for count, token in enumerate(drawn):
            self.context = replace(self.context, response=(*self.context.response, token))
            self.drafter.add(token)
            right = count < len(self.draft) and self.draft[count] == token
            self.ended = stop.ended(self.context)
            if self.ended or not right:
                break
        self.accepted += count
        return count + 1

    def result(self, state: PrefixState) -> Rollout:
        before, after = self.start.context.response, self.context.response
        tokens = torch.tensor(after[len(before) :], dtype=torch.long)
        kept = None
        if self.start.track is not None:
            # Copies: a view would keep the whole batch alive.
            keys, values = (tuple(x.clone() for x in part) for part in (state.keys, state.values))
            kept = PrefixState(keys, values, state.hidden)
        return Rollout(tokens, state.hidden[-len(tokens) :], kept, self.calls, self.drafted, self.accepted)


@dataclass
class _Stream:
    """See `RolloutStream`."""

    backend: HFRollout
    sampling: Sampling
    stop: StopRule
    joining: list[_Row] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    batch: DecodeBatch | None = None
    ended: list[tuple[int, Rollout]] = field(default_factory=list)

    def submit(self, key: int, start: Start) -> None:
        if self.stop.ended(start.context):
            self.ended.append((key, _nothing(self.backend.language_model)))
            return
        context = start.context
        drafter = Drafter(context.prompt_ids, context.response, start.earlier, self.backend.draft_tokens)
        self.joining.append(_Row(key, start, drafter, context))

    @torch.no_grad()
    def collect(self) -> list[tuple[int, Rollout]]:
        with fast_layers(self.backend.language_model.device):
            while not self.ended and (self.rows or self.joining):
                if self.joining:
                    self._join()
                self._step()
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        self.joining, self.rows, self.batch = [], [], None

    def _join(self) -> None:
        model = self.backend.language_model
        tracks = [row.start.track or model.track(row.context.prompt_ids) for row in self.joining]
        # The last token goes through the model with the batch's next step. Where it is the prompt's, once more.
        known = [torch.tensor(row.context.response[:-1], dtype=torch.long, device=model.device) for row in self.joining]
        lengths = [len(row.context.prompt_ids) + len(row.context.response) - 1 for row in self.joining]
        states = [
            state.crop(length)
            for state, length in zip(resume(model.body, model.embedding, tracks, known), lengths, strict=True)
        ]
        self.rows, self.joining = [*self.rows, *self.joining], []
        self._rebuild(range(len(self.rows) - len(states)), states)

    def _rebuild(self, kept: Sequence[int], joined: Sequence[PrefixState] = ()) -> None:
        """A batch of some of the rows and more behind them."""
        states = [self.batch.state(row) for row in kept] if self.batch is not None else []
        both = [*states, *joined]
        self.batch = DecodeBatch(self.backend.language_model.body, both) if both else None

    def _step(self) -> None:
        assert self.batch is not None
        model = self.backend.language_model
        # Up to this, drafts cost little.
        most = max(1, TOKENS_PER_PASS.get(model.device.type, 1) // len(self.rows))
        hidden = self.batch.step([row.feed(most) for row in self.rows])
        contexts = [context for row in self.rows for context in row.contexts()]
        logits = model.logits(torch.cat(hidden))
        _require_readable(model, logits, contexts)
        drawn = iter(self.backend.sampler(logits, self.sampling, contexts).tolist())
        self.batch.keep(
            [row.take([next(drawn) for _ in h], self.stop) for row, h in zip(self.rows, hidden, strict=True)]
        )
        running = [i for i, row in enumerate(self.rows) if not row.ended]
        if len(running) < len(self.rows):
            self.ended += [
                (row.key, row.result(self.batch.state(i))) for i, row in enumerate(self.rows) if i not in running
            ]
            self._rebuild(running)
            self.rows = [self.rows[i] for i in running]
        elif self.batch.spread > _SPREAD or (model.body.windowed and self.batch.gaps):
            self._rebuild(running)


@dataclass
class _AloneStream:
    """See `RolloutStream`: each sequence from its beginning to its end, one after the other."""

    backend: HFRollout
    sampling: Sampling
    stop: StopRule
    waiting: deque[tuple[int, Start]] = field(default_factory=deque)

    def submit(self, key: int, start: Start) -> None:
        self.waiting.append((key, start))

    @torch.no_grad()
    def collect(self) -> list[tuple[int, Rollout]]:
        if not self.waiting:
            return []
        key, start = self.waiting.popleft()
        with fast_layers(self.backend.language_model.device):
            return [(key, self._roll_out(start))]

    def close(self) -> None:
        self.waiting.clear()

    def _roll_out(self, start: Start) -> Rollout:
        model, context = self.backend.language_model, start.context
        if self.stop.ended(context):
            return _nothing(model)
        track = start.track or model.track(context.prompt_ids)
        response = torch.tensor(context.response, dtype=torch.long, device=model.device)
        (common,) = common_lengths([track], [response])
        inputs = joined([track.opening, model.embedding.inputs(response)])
        known = track.before(common)
        row = DecodeAlone(model.body, model.embedding, inputs, known if isinstance(known, OwnState) else None)
        latents = [row.first()]
        while True:
            logits = model.logits(latents[-1])
            _require_readable(model, logits, [context])
            token = int(self.backend.sampler(logits, self.sampling, [context]))
            context = replace(context, response=(*context.response, token))
            if self.stop.ended(context):
                break
            latents.append(row.step(token))
        new = context.response[len(start.context.response) :]
        tokens = torch.tensor(new, dtype=torch.long)
        return Rollout(tokens, torch.cat(latents), row.start, calls=len(new))


def _nothing(model: LanguageModel) -> Rollout:
    """The rollout of a sequence that had ended."""
    weight = model.head.weight
    return Rollout(torch.empty(0, dtype=torch.long), weight.new_zeros(0, weight.shape[1]))


def _require_readable(model: LanguageModel, logits: Tensor, contexts: Sequence[Context]) -> None:
    readable = logits.amax(-1).isfinite()  # amax carries NaN; a finite maximum leaves -inf entries, which are fine
    if not bool(readable.all()):
        position = len(contexts[int((~readable).nonzero()[0])].response)
        raise FloatingPointError(
            f"{model.name} returned NaN or infinite logits at response position {position}; "
            "nothing of this rollout was committed"
        )
