"""Rollouts with the transformers model itself, in a continuous batch that keeps the latents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.graphs import Counts
from nabla_fast.models.backbone import joined
from nabla_fast.models.decode_batch import DecodeBatch, DecodeSingle
from nabla_fast.models.fused_layers import fast_kernels
from nabla_fast.models.kv_cache import KVCache, ModelCache
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.sequence_cache import TOKENS_PER_PASS, common_lengths, extended
from nabla_fast.rollout import device, self_drafts
from nabla_fast.rollout.base import Rollout, RolloutStream, StopRule, no_rollout, unreadable
from nabla_fast.rollout.drafts import Drafter
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence

# Tokens of a draft below which none is made.
_LEAST_DRAFT = 2
# Columns in use per token of the longest sequence, from which on the batch is made anew without the unused ones.
_SPREAD = 1.5


@dataclass(eq=False)
class HFRollout:
    """Decodes a batch that sequences join when they are submitted and leave when they end.

    Attributes:
        language_model: draws the tokens.
        sampler: how.
        draft_tokens: most draft tokens that one forward pass verifies; 0 for none.
        graphs: replays captured steps (`nabla_fast.rollout.device`) where model, sampler and stop rule allow it. The
            tokens are the same. On a CPU it is slower, and for tests.
        counts: captures in all its streams.
    """

    language_model: LanguageModel
    sampler: Sampler = field(default_factory=Sampler)
    draft_tokens: int = 0
    graphs: bool = False
    counts: Counts = field(default_factory=Counts, init=False)

    def graph_stats(self) -> dict[str, float]:
        """Captures in all streams so far and how long they took; empty without ``graphs``."""
        return {"captures": self.counts.captures, "capture_seconds": self.counts.seconds} if self.graphs else {}

    def fast_kernels(self) -> AbstractContextManager[Any]:
        """See `nabla_fast.models.fused_layers`."""
        return fast_kernels(self.language_model.device, self.language_model.backbone.fused)

    def open(self, sampling: Sampling, stop: StopRule) -> RolloutStream:
        """See `RolloutBackend.open`."""
        model = self.language_model
        if model.backbone.cache_kind != "prefix":
            return _SequentialStream(self, sampling, stop)

        def going_on(rows: list[device.Row]) -> RolloutStream:
            joining = [_Row(r.sequence, tuple(r.response), r.drafter, r.calls, r.drafted, r.accepted) for r in rows]
            return _Stream(self, sampling, stop, joining)

        fast = None
        if self.graphs:
            settings = (self.sampler, self.draft_tokens, sampling, stop)
            fast = device.stream(model, *settings, self.counts, self.fast_kernels, going_on)
        return fast or _Stream(self, sampling, stop)


@dataclass
class _Row:
    """A sequence in the batch, its response so far, and the draft that the pass under way verifies."""

    sequence: Sequence
    response: tuple[int, ...]
    drafter: Drafter
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    draft: tuple[int, ...] = ()
    own: self_drafts.Record = field(default_factory=self_drafts.Record)
    by_model: bool = False
    ended: bool = False

    @property
    def last(self) -> int:
        """The last token, which is not in the cache yet."""
        return (self.response or self.sequence.prompt_ids)[-1]

    def room(self, most: int) -> int:
        """Tokens of a draft, where at most ``most`` tokens are fed."""
        return min(self.sequence.limit - len(self.response), most) - 1

    def responses(self) -> list[tuple[int, ...]]:
        """The response behind which each row of logits of the pass stands, if the draft is right."""
        return [(*self.response, *self.draft[:n]) for n in range(len(self.draft) + 1)]

    def take(self, drawn: Seq[int], stop: StopRule) -> int:
        """Appends the drawn tokens up to the first that differs from the draft; returns how many fed tokens stay."""
        self.calls += 1
        self.drafted += len(self.draft)
        for count, token in enumerate(drawn):
            self.response = (*self.response, token)
            self.drafter.add(token)
            right = count < len(self.draft) and self.draft[count] == token
            self.ended = stop.ended(self.sequence, self.response)
            if self.ended or not right:
                break
        self.accepted += count
        if self.by_model:
            self.own.add(count, len(self.draft))
        return count + 1

    def result(self, cache: KVCache) -> Rollout:
        tokens = torch.tensor(self.response[len(self.sequence.prefix) :], dtype=torch.long)
        kept = None
        if self.sequence.language_cache is not None:
            # Copies: a view would keep the whole batch alive.
            keys, values = (tuple(x.clone() for x in part) for part in (cache.keys, cache.values))
            kept = KVCache(keys, values, cache.hidden)
        return Rollout(tokens, cache.hidden[-len(tokens) :], kept, self.calls, self.drafted, self.accepted)


@dataclass
class _Stream:
    """See `RolloutStream`."""

    backend: HFRollout
    sampling: Sampling
    stop: StopRule
    joining: list[_Row] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    batch: DecodeBatch | None = None
    ended: list[tuple[Sequence, Rollout]] = field(default_factory=list)

    def __post_init__(self) -> None:
        backend = self.backend
        self._drafts_itself = backend.draft_tokens > 0 and self_drafts.drafts_itself(backend.language_model)

    def submit(self, sequence: Sequence) -> None:
        if self.stop.ended(sequence, sequence.prefix):
            self.ended.append((sequence, no_rollout(self.backend.language_model.head.weight)))
            return
        most = self.backend.draft_tokens
        drafter = Drafter(sequence.prompt_ids, sequence.prefix, tuple(sequence.drawn), most)
        self.joining.append(_Row(sequence, sequence.prefix, drafter))

    @torch.no_grad()
    def collect(self, passes: int | None = None) -> list[tuple[Sequence, Rollout]]:
        left = range(passes) if passes is not None else itertools.count()
        with self.backend.fast_kernels():
            for _ in left:
                if self.ended or not (self.rows or self.joining):
                    break
                if self.joining:
                    self._join()
                self._step()
        ended, self.ended = self.ended, []
        return ended

    @torch.no_grad()
    def drop(self, sequence: Sequence) -> None:
        self.joining = [row for row in self.joining if row.sequence is not sequence]
        self.ended = [(other, rollout) for other, rollout in self.ended if other is not sequence]
        kept = [i for i, row in enumerate(self.rows) if row.sequence is not sequence]
        if len(kept) < len(self.rows):
            self._rebuild(kept)

    def close(self) -> None:
        self.joining, self.rows, self.batch = [], [], None

    def _join(self) -> None:
        model = self.backend.language_model
        known = [row.sequence.language_cache or model.new_cache(row.sequence.prompt_ids) for row in self.joining]
        # The last token goes through the model with the batch's next step. Where it is the prompt's, once more.
        responses = [torch.tensor(row.response[:-1], dtype=torch.long) for row in self.joining]
        ready = extended(model.backbone, model.embedding, known, responses)
        lengths = [len(row.sequence.prompt_ids) + len(row.response) - 1 for row in self.joining]
        caches = [cache.crop(length) for cache, length in zip(ready, lengths, strict=True)]
        self._rebuild(range(len(self.rows)), self.joining, caches)
        self.joining = []

    def _rebuild(self, kept: Seq[int], joining: Seq[_Row] = (), joined: Seq[KVCache] = ()) -> None:
        """Rebuilds the batch from some of its rows and new ones, with their caches, behind them."""
        caches = [self.batch.row_cache(row) for row in kept] if self.batch is not None else []
        both = [*caches, *joined]
        self.batch = DecodeBatch(self.backend.language_model.backbone, both) if both else None
        self.rows = [*(self.rows[row] for row in kept), *joining]

    def _step(self) -> None:
        assert self.batch is not None
        model = self.backend.language_model
        # Up to this, drafts cost little. One of a single token is right too seldom to pay for that.
        most = TOKENS_PER_PASS.get(model.device.type, 1) // len(self.rows)
        most = most if most > _LEAST_DRAFT else 1
        self._draft(most)
        hidden = self.batch.step([[row.last, *row.draft] for row in self.rows])
        responses = [response for row in self.rows for response in row.responses()]
        sequences = [row.sequence for row in self.rows for _ in row.responses()]
        logits = model.logits(torch.cat(hidden))
        _require_readable(model, logits, responses)
        drawn = iter(self.backend.sampler(logits, self.sampling, sequences, responses).tolist())
        kept = [row.take([next(drawn) for _ in h], self.stop) for row, h in zip(self.rows, hidden, strict=True)]
        self.batch.keep(kept)
        running = [i for i, row in enumerate(self.rows) if not row.ended]
        if len(running) < len(self.rows):
            for i, row in enumerate(self.rows):
                if row.ended:
                    self.ended.append((row.sequence, row.result(self.batch.row_cache(i))))
            self._rebuild(running)
        elif self.batch.spread > _SPREAD or (model.backbone.windowed and self.batch.gaps):
            self._rebuild(running)

    def _draft(self, most: int) -> None:
        """Gives each row a draft, where ``most`` tokens may be fed: of earlier text, or by the model itself."""
        by_model = self._drafts_itself and most > 1
        for row in self.rows:
            row.draft, row.by_model = row.drafter.draft(row.room(most), certain=by_model), False
        if not by_model:
            return
        lengths = [0 if row.draft else row.own.length(max(0, row.room(most)), len(self.rows)) for row in self.rows]
        if not any(lengths):
            return
        sequences = [row.sequence for row in self.rows]

        def draw(logits: Tensor, drafts: Seq[tuple[int, ...]]) -> list[int]:
            responses = [(*row.response, *draft) for row, draft in zip(self.rows, drafts, strict=True)]
            return self.backend.sampler(logits, self.sampling, sequences, responses).tolist()

        assert self.batch is not None
        last = [row.last for row in self.rows]
        ends = self.stop.eos_token_ids
        drafts = self_drafts.draft(self.backend.language_model, self.batch, last, lengths, draw, ends)
        for row, draft in zip(self.rows, drafts, strict=True):
            if draft:
                row.draft, row.by_model = draft, True


@dataclass
class _SequentialStream:
    """See `RolloutStream`: each sequence from its beginning to its end, one after the other."""

    backend: HFRollout
    sampling: Sampling
    stop: StopRule
    waiting: list[Sequence] = field(default_factory=list)

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @torch.no_grad()
    def collect(self, passes: int | None = None) -> list[tuple[Sequence, Rollout]]:
        # A rollout is one piece here, so that ``passes`` cannot be kept to.
        if not self.waiting:
            return []
        sequence = self.waiting.pop(0)
        with self.backend.fast_kernels():
            return [(sequence, self._roll_out(sequence))]

    def drop(self, sequence: Sequence) -> None:
        self.waiting = [other for other in self.waiting if other is not sequence]

    def close(self) -> None:
        self.waiting.clear()

    def _roll_out(self, sequence: Sequence) -> Rollout:
        model, response = self.backend.language_model, sequence.prefix
        if self.stop.ended(sequence, response):
            return no_rollout(model.head.weight)
        cache = sequence.language_cache or model.new_cache(sequence.prompt_ids)
        prefix = torch.tensor(response, dtype=torch.long)
        (common,) = common_lengths([cache], [prefix])
        inputs = joined([cache.prompt, model.embedding.inputs(prefix)])
        known = cache.before(common)
        row = DecodeSingle(model.backbone, model.embedding, inputs, known if isinstance(known, ModelCache) else None)
        latents = [row.first()]
        while True:
            logits = model.logits(latents[-1])
            _require_readable(model, logits, [response])
            token = int(self.backend.sampler(logits, self.sampling, [sequence], [response]))
            response = (*response, token)
            if self.stop.ended(sequence, response):
                break
            latents.append(row.step(token))
        new = response[len(sequence.prefix) :]
        tokens = torch.tensor(new, dtype=torch.long)
        return Rollout(tokens, torch.cat(latents), row.start, calls=len(new))


def _require_readable(model: LanguageModel, logits: Tensor, responses: Seq[tuple[int, ...]]) -> None:
    readable = logits.amax(-1).isfinite()  # amax carries NaN; a finite maximum leaves -inf entries, which are fine
    if not bool(readable.all()):
        position = len(responses[int((~readable).nonzero()[0])])
        raise unreadable(model.name, position)
