"""Rollouts with the transformers model itself, batched, latents kept as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.models.language_model import DecodeState, LanguageModel
from nabla_fast.rollout.base import Rollout, StopRule
from nabla_fast.sampling import Context, Sampler


class HFRollout:
    """Decodes a batch token by token; a sequence that ends leaves the batch."""

    def __init__(self, language_model: LanguageModel, sampler: Sampler | None = None) -> None:
        self.language_model = language_model
        self.sampler = sampler or Sampler()

    @torch.no_grad()
    def rollout(self, contexts: Sequence[Context], sampling: Sampling, stop: StopRule) -> list[Rollout]:
        """See `RolloutBackend.rollout`.

        Raises:
            FloatingPointError: if the model gives NaN or infinite logits; it names the model and the position.
        """
        model = self.language_model
        now = list(contexts)
        latents: list[list[Tensor]] = [[] for _ in contexts]
        active = [i for i, context in enumerate(contexts) if not stop.ended(context)]
        state = model.prefill([[*now[i].prompt_ids, *now[i].response] for i in active]) if active else None
        while state is not None:
            logits = model.logits(state.hidden)
            self._require_readable(logits, [now[i] for i in active])
            tokens = self.sampler(logits, sampling, [now[i] for i in active])
            for row, (i, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                latents[i].append(state.hidden[row])
                now[i] = replace(now[i], response=(*now[i].response, token))
            running = [row for row, i in enumerate(active) if not stop.ended(now[i])]
            state = self._advance(state, tokens, running)
            active = [active[row] for row in running]
        return [self._result(*parts) for parts in zip(contexts, now, latents, strict=True)]

    def _advance(self, state: DecodeState, tokens: Tensor, running: list[int]) -> DecodeState | None:
        if not running:
            return None
        if len(running) < len(tokens):
            rows = torch.tensor(running, device=tokens.device)
            state, tokens = self.language_model.select(state, rows), tokens[rows]
        return self.language_model.step(state, tokens)

    def _require_readable(self, logits: Tensor, contexts: list[Context]) -> None:
        readable = logits.amax(-1).isfinite()  # amax carries NaN; a finite maximum leaves -inf entries, which are fine
        if not bool(readable.all()):
            position = len(contexts[int((~readable).nonzero()[0])].response)
            raise FloatingPointError(
                f"{self.language_model.name} returned NaN or infinite logits at response position {position}; "
                "nothing of this rollout was committed"
            )

    def _result(self, before: Context, after: Context, latents: list[Tensor]) -> Rollout:
        weight = self.language_model.head.weight
        tokens = torch.tensor(after.response[len(before.response) :], dtype=torch.long, device=weight.device)
        return Rollout(tokens, torch.stack(latents) if latents else weight.new_zeros(0, weight.shape[1]))
