"""The objective of ∇-Reasoner (Eq. 2) at hard tokens, and its factored gradient.

L(y) = -(nll_coeff * sum_t log pi(y_t | x, y_<t) + reward_coeff * r(x, y))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.stats import Clock, SequenceStats

_SEPARATOR = -1  # never a token id


@dataclass
class Conversation:
    """One prompt, as both models see it.

    Attributes:
        prompt_ids: the language model's prompt tokens, not empty.
        frame: what the reward model sees around the response.
        limit: longest response that both models and the settings allow, in tokens.
        stats: this sequence's counters.
    """

    prompt_ids: tuple[int, ...]
    frame: RewardFrame
    limit: int
    stats: SequenceStats = field(default_factory=SequenceStats)

    def cache_key(self, response: Sequence[int]) -> tuple[int, ...]:
        """Every token that the gradient of ``response`` depends on."""
        return (*self.frame.key, _SEPARATOR, *self.prompt_ids, _SEPARATOR, *response)


@dataclass(frozen=True)
class Request:
    """Asks for the gradient at ``response`` with respect to its positions ``start`` and later."""

    conversation: Conversation
    response: tuple[int, ...]
    start: int


class Objective:
    """Evaluates the objective of a pair of models.

    Attributes:
        tables: what turns factors into gradients over the vocabulary.
        clock: where its time is charged.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        config: NablaConfig,
        clock: Clock | None = None,
    ) -> None:
        self.language_model = language_model
        self.reward_model = reward_model
        self.config = config
        self.clock = clock or Clock()
        self.tables = ops.Tables(
            language_model.head, language_model.embedding.weight, reward_model.table.weight, config.nll_coeff
        )
        self.cache = GradientCache(config.gradient_cache_bytes) if config.gradient_cache else None

    def rewards(self, conversations: Sequence[Conversation], responses: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of complete responses, one batched call."""
        records = [conversation.stats for conversation in conversations]
        with self.clock.phase("reward", records), torch.no_grad():
            model = self.reward_model
            embedded = [model.conversation(c.frame, y) for c, y in zip(conversations, responses, strict=True)]
            rewards: list[float] = model.rewards(embedded).tolist()
        for record in records:
            record.reward_calls += 1
        return rewards

    def evaluate(self, requests: Sequence[Request]) -> list[Evaluation]:
        """Objective and token gradients of some responses: from the cache, and one batched call for the rest.

        Raises:
            FloatingPointError: if a model gives a value or gradient that is not finite; it names the model.
        """
        found = [self._find(request) for request in requests]
        missing = [i for i, evaluation in enumerate(found) if evaluation is None]
        if missing:
            asked = [requests[i] for i in missing]
            with self.clock.phase("gradient", [r.conversation.stats for r in asked]):
                computed = self._compute(asked)
            for i, request, evaluation in zip(missing, asked, computed, strict=True):
                request.conversation.stats.gradient_evaluations += 1
                found[i] = evaluation
                if self.cache is not None:
                    self.cache.insert(request.conversation.cache_key(request.response), evaluation)
        return [evaluation for evaluation in found if evaluation is not None]

    def _find(self, request: Request) -> Evaluation | None:
        if self.cache is None:
            return None
        stats = request.conversation.stats
        entry = self.cache.find(request.conversation.cache_key(request.response), request.start)
        if entry is None:
            stats.cache_misses += 1
        else:
            stats.cache_hits += 1
        return entry

    def _compute(self, requests: Sequence[Request]) -> list[Evaluation]:
        with torch.inference_mode(False), torch.enable_grad():
            hidden, embedding, likelihoods = self._likelihood_gradient(requests)
            reward_embedding, rewards = self._reward_gradient(requests)
        return [
            Evaluation(request.start, ops.TokenGradient(h, a, b), likelihood, reward)
            for request, h, a, b, likelihood, reward in zip(
                requests, hidden, embedding, reward_embedding, likelihoods, rewards, strict=True
            )
        ]

    def _likelihood_gradient(
        self, requests: Sequence[Request]
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[float, ...]]]:
        """Per request: h^pi (m, d), a = dL/d(embedding weight row) (m, d), log pi at each of the m positions."""
        model = self.language_model
        ids = [torch.tensor([*r.conversation.prompt_ids, *r.response], device=model.device) for r in requests]
        lengths = torch.tensor([len(i) for i in ids], device=model.device)
        mask = (torch.arange(int(lengths.max()), device=model.device) < lengths.unsqueeze(1)).long()
        embeds = model.embedding(pad_sequence(ids, batch_first=True)).requires_grad_()
        states = model.hidden_states(embeds, mask)
        spans = [slice(len(r.conversation.prompt_ids) + r.start, len(i)) for r, i in zip(requests, ids, strict=True)]
        hidden = [states[row, span.start - 1 : span.stop - 1] for row, span in enumerate(spans)]
        targets = torch.cat([i[span] for i, span in zip(ids, spans, strict=True)])
        log_pi = ops.linear_log_likelihood(torch.cat(hidden), model.head, targets, backend=self.config.backend)
        (grad,) = torch.autograd.grad(log_pi.sum(), embeds)
        scale = -self.config.nll_coeff * model.embedding.scale
        factors = [ops.upcast(grad[row, span]) * scale for row, span in enumerate(spans)]
        self._require_finite([*factors, log_pi], model.name)
        values = [tuple(part.tolist()) for part in log_pi.detach().split([span.stop - span.start for span in spans])]
        # Copies: a view would keep the whole batch's states alive in the cache.
        return [h.detach().clone() for h in hidden], factors, values

    def _reward_gradient(self, requests: Sequence[Request]) -> tuple[list[Tensor], list[float]]:
        """Per request: b = dL/d(reward embedding weight row) (m, d_r), and the reward."""
        model = self.reward_model
        conversations = [
            model.conversation(r.conversation.frame, r.response).detach().requires_grad_() for r in requests
        ]
        rewards = model.rewards(conversations)
        if not rewards.requires_grad:
            raise ValueError(
                f"{model.name} returned rewards without a gradient; it must be differentiable with respect to "
                "inputs_embeds"
            )
        grads = torch.autograd.grad(rewards.sum(), conversations)
        scale = -self.config.reward_coeff * model.table.scale
        factors = []
        for request, grad in zip(requests, grads, strict=True):
            opening = len(request.conversation.frame.opening)
            span = slice(opening + request.start, opening + len(request.response))
            factors.append(ops.upcast(grad[span]) * scale)
        self._require_finite(factors, model.name)
        return factors, rewards.tolist()

    @staticmethod
    def _require_finite(tensors: Sequence[Tensor], name: str) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise FloatingPointError(f"{name} gave a value or gradient that is NaN or infinite")
