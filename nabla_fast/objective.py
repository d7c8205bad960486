"""The objective of ∇-Reasoner (Eq. 2) at hard tokens, and its factored gradient.

L(y) = -(nll_coeff * sum_t log pi(y_t | x, y_<t) + reward_coeff * r(x, y))

A gradient is evaluated once per distinct response, over the tokens ahead only: those before them are in the KV caches
of their sequence (`nabla_fast.models.kv_cache`), and what was evaluated is in the gradient cache.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.models.activations import checkpointed, frozen, require_layers
from nabla_fast.models.backbone import Cache, Inputs, joined
from nabla_fast.models.graphed import graphed_likelihood, graphed_rewards, pooled_states
from nabla_fast.models.kept import clear_graphs
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.models.sequence_cache import SequenceCache, catch_up, common_lengths, reach
from nabla_fast.models.side_stream import SideStream
from nabla_fast.models.static import StaticPass
from nabla_fast.models.torch_kernels import fast_kernels
from nabla_fast.sequence import Sequence
from nabla_fast.stats import Clock, summed


@dataclass(frozen=True)
class Request:
    """Asks for the gradient at ``response`` (n,) int64 with respect to its positions ``start`` < n and later.

    The response is on the CPU, where the caches look it up; each model's tokens are copied to its device.
    """

    sequence: Sequence
    response: Tensor
    start: int


@dataclass
class _Part:
    """One model's part of the evaluation of a batch, one entry per request."""

    factors: list[Tensor]
    values: Tensor
    hidden: list[Tensor] = field(default_factory=list)


class Objective:
    """Evaluates the objective of a pair of models.

    As a context manager, it leaves its graphs at the end to the next objective of these models.

    Attributes:
        clock: where its time is charged.
        tables: what turns factors into gradients over the vocabulary, on the language head's device.
        cache: of evaluations and rewards; None with ``gradient_cache=False``.
        likelihood_graphs, reward_graphs: what computes both where it can be captured.
        watch: hears of what every call of `evaluate` was asked, and what it returns; None for nobody.

    Raises:
        ValueError: if ``config.checkpoint_activations`` is set for a model without layers to recompute.
    """

    def __init__(self, language_model: LanguageModel, reward_model: RewardModel, config: NablaConfig) -> None:
        self.language_model = language_model
        self.reward_model = reward_model
        self.config = config
        self.clock = Clock()
        self.device = language_model.device
        # DTO reads these in every step: embeddings that are elsewhere are copied, once.
        embedding, reward = (x.weight.to(self.device) for x in (language_model.embedding, reward_model.table))
        self.tables = ops.Tables(language_model.head, embedding, reward, config.nll_coeff)
        self.cache = GradientCache(config.gradient_cache_bytes) if config.gradient_cache else None
        backbones = (language_model.backbone, reward_model.backbone)
        self._models = [backbone.model for backbone in backbones if backbone is not None]
        self._fused = [backbone.fused for backbone in backbones if backbone is not None]
        # Walking through a large model takes milliseconds.
        self._parameters = [parameter for model in self._models for parameter in model.parameters()]
        if config.checkpoint_activations:
            for model, name in zip(self._models, (language_model.name, reward_model.name), strict=False):
                require_layers(model, name)
        # What keeps each layer's input alone does so for memory, of which graphs take more.
        graphs = config.graphs and not config.checkpoint_activations
        self.likelihood_graphs = graphed_likelihood(language_model, config.backend, graphs, config.compile)
        self.reward_graphs = graphed_rewards(reward_model, graphs, config.compile)
        self._side = SideStream(reward_model.device)
        self.watch: Callable[[Seq[Request], Seq[Evaluation]], None] | None = None

    def __enter__(self) -> Objective:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves the graphs to the next objective of the same models; what ran out of memory gives all of them up."""
        out_of_memory = kind is not None and issubclass(kind, torch.OutOfMemoryError)
        for graphed in (self.likelihood_graphs, self.reward_graphs):
            graphed.close(keep=not out_of_memory)
        if out_of_memory:
            clear_graphs()

    def rewards(
        self,
        sequences: Seq[Sequence],
        responses: Seq[Tensor],
        *,
        keep: bool = False,
        ended: Seq[bool] | None = None,
    ) -> list[float]:
        """Rewards of responses (n_b,) int64 on the CPU: from the cache, and one batched call for the rest.

        Args:
            keep: whether the reward model's cache of a sequence is that of its response afterwards; otherwise only a
                first one is kept.
            ended: whether each is complete, None for all. One that goes on is read at its last token: its turn is not
                closed, unless by that token.

        Raises:
            FloatingPointError: if a reward is NaN or infinite.
        """
        ended = [True] * len(responses) if ended is None else ended
        # The cache has the rewards of complete responses alone.
        asked = list(zip(sequences, responses, ended, strict=True))
        found = [self._known_reward(s, y) if whole else None for s, y, whole in asked]
        missing = [i for i, reward in enumerate(found) if reward is None]
        if missing:
            own = [sequences[i] for i in missing]
            with self.clock.phase("reward", [s.stats for s in own]), torch.inference_mode(False), torch.no_grad():
                scored = self._score(own, [responses[i] for i in missing], keep=keep, ended=[ended[i] for i in missing])
            for i, reward in zip(missing, scored, strict=True):
                found[i] = reward
                sequences[i].stats.reward_calls += 1
                sequences[i].stats.prefix_rewards += not ended[i]
                if self.cache is not None and ended[i]:
                    self.cache.insert_reward(sequences[i].cache_key(responses[i]), reward)
        return [reward for reward in found if reward is not None]

    def prefix_rewards(
        self, sequences: Seq[Sequence], prefixes: Seq[Tensor], candidates: Seq[Seq[int]]
    ) -> list[list[float]]:
        """Rewards of each response so far with each of its candidates behind it, read at that token.

        The reward model reads what is new of a prefix (n_b,) once, and of every candidate one token; all in one batch.
        A response goes on behind them, so that its turn is not closed, but where a candidate itself does so.

        Args:
            prefixes: int64 response tokens, on the CPU.
            candidates: token ids of each sequence.

        Raises:
            FloatingPointError: if a reward is NaN or infinite.
        """
        self.read(sequences, prefixes)
        asked = [i for i, own in enumerate(candidates) for _ in own]
        ends = [torch.tensor([token]) for own in candidates for token in own]
        responses = [torch.cat([prefixes[i], end]) for i, end in zip(asked, ends, strict=True)]
        rewards = iter(self.rewards([sequences[i] for i in asked], responses, ended=[False] * len(asked)))
        return [[next(rewards) for _ in own] for own in candidates]

    def evaluate(self, requests: Seq[Request]) -> list[Evaluation]:
        """Objective and token gradients of some responses: from the cache, and one batched call for the rest.

        Raises:
            FloatingPointError: if a model gives a value or gradient that is not finite; it names the model.
        """
        found = [self._find(request) for request in requests]
        missing = [i for i, evaluation in enumerate(found) if evaluation is None]
        first = _first_equal([requests[i] for i in missing]) if self.cache is not None else list(range(len(missing)))
        asked = [requests[missing[i]] for i in sorted(set(first))]
        if asked:
            with self.clock.phase("gradient", [r.sequence.stats for r in asked]):
                computed = dict(zip(sorted(set(first)), self._compute(asked), strict=True))
            for request, evaluation in zip(asked, computed.values(), strict=True):
                request.sequence.stats.gradient_evaluations += 1
                if self.cache is not None:
                    self.cache.insert(request.sequence.cache_key(request.response), evaluation)
            for i, source in zip(missing, first, strict=True):
                found[i] = computed[source]
        evaluations = [evaluation for evaluation in found if evaluation is not None]
        if self.watch is not None:
            self.watch(requests, evaluations)
        return evaluations

    def graph_stats(self) -> dict[str, float]:
        """Captures of both models, and the seconds that they and compilation took; empty where there are none."""
        return summed([graphed.stats() for graphed in (self.likelihood_graphs, self.reward_graphs)])

    def language_cache(self, sequence: Sequence) -> SequenceCache:
        """The language model's cache of a sequence, made where there is none."""
        if sequence.language_cache is None:
            sequence.language_cache = self.language_model.new_cache(sequence.prompt_ids)
        return sequence.language_cache

    def _find(self, request: Request) -> Evaluation | None:
        if self.cache is None:
            return None
        stats = request.sequence.stats
        entry = self.cache.find(request.sequence.cache_key(request.response), request.start)
        if entry is None:
            stats.cache_misses += 1
        else:
            stats.cache_hits += 1
        return entry

    def _known_reward(self, sequence: Sequence, response: Tensor) -> float | None:
        return None if self.cache is None else self.cache.find_reward(sequence.cache_key(response))

    def _compute(self, requests: Seq[Request]) -> list[Evaluation]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen(self._parameters))
            for device in {d.type: d for d in (self.device, self.reward_model.device)}.values():
                stack.enter_context(fast_kernels(device, *self._fused))
            if self.config.checkpoint_activations:
                stack.enter_context(checkpointed(*self._models))
            # The reward model first: on a GPU, the language model is launched while it runs, and on two both run.
            with self._side.joined():
                with self._side.active():
                    reward = self._reward_gradient(requests)
                language = self._likelihood_gradient(requests)
            # Copied to another device any sooner, the language model would wait for it, too.
            self._side.hand_over((*reward.factors, reward.values))
            reward = _Part([factor.to(self.device) for factor in reward.factors], reward.values.to(self.device))
        self._require_finite([*language.factors, language.values], self.language_model.name)
        self._require_finite([*reward.factors, reward.values], self.reward_model.name)
        log_pi = language.values.double().cpu().split([len(factors) for factors in language.factors])
        return [
            Evaluation(request.start, ops.TokenGradient(h, a, b), likelihoods.clone(), value)
            for request, h, a, b, likelihoods, value in zip(
                requests,
                language.hidden,
                language.factors,
                reward.factors,
                log_pi,
                reward.values.tolist(),
                strict=True,
            )
        ]

    def _likelihood_gradient(self, requests: Seq[Request]) -> _Part:
        """Per request h^pi (m, d) and a = dL/d(embedding weight row) (m, d); log pi at all their positions."""
        model = self.language_model
        part = self._likelihood_by_graph(requests)
        if part is not None:
            return part
        hidden, inputs = self._language_states(requests)
        targets = torch.cat([r.response[r.start :] for r in requests]).to(self.device)
        log_pi = ops.linear_log_likelihood(torch.cat(hidden), model.head, targets, backend=self.config.backend)
        asked = [x.embeds for x in inputs if len(x)]
        grads = iter(torch.autograd.grad(log_pi.sum(), asked) if asked else ())
        scale = -self.config.nll_coeff * model.embedding.scale
        factors = []
        for request, x in zip(requests, inputs, strict=True):
            ahead = len(request.response) - 1 - request.start
            rows = _factor((next(grads) if len(x) else x.embeds.detach())[len(x) - ahead :], scale).to(self.device)
            factors.append(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))
        return _Part(factors, log_pi.detach(), [h.detach() for h in hidden])

    def _likelihood_by_graph(self, requests: Seq[Request]) -> _Part | None:
        """The same in one replay; None where the model is not captured."""
        model = self.language_model
        if self.likelihood_graphs.graphs is None:
            return None
        known = [self.language_cache(r.sequence) for r in requests]
        responses, starts = [r.response for r in requests], [r.start for r in requests]
        covered = catch_up(model.backbone, model.embedding, known, responses, starts)
        inputs = [model.embedding.inputs(y[n:-1]) for y, n in zip(responses, covered, strict=True)]
        targets = [y[n:].to(self.device) for y, n in zip(responses, covered, strict=True)]
        inside = [torch.ones_like(y, dtype=torch.bool) for y in targets]
        out = self.likelihood_graphs.run(
            [own.cache for own in known], inputs, [(targets, None), (inside, None)], gradient=True
        )
        if out is None:
            return None
        assert out.gradient is not None
        scale = -self.config.nll_coeff * model.embedding.scale
        factors, hidden, log_pi = [], [], []
        for i, (response, start) in enumerate(zip(responses, starts, strict=True)):
            # Copies, since the next replay writes to the graph's memory.
            ahead = slice(start - covered[i], len(response) - covered[i])
            rows = _factor(out.gradient[i, ahead.start : ahead.stop - 1], scale)
            factors.append(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))
            hidden.append(out.states[i, ahead].clone())
            log_pi.append(out.values[i, ahead])
            known[i].keep(response[:-1], out.cache(i))
        return _Part(factors, torch.cat(log_pi), hidden)

    def _language_states(self, requests: Seq[Request]) -> tuple[list[Tensor], list[Inputs]]:
        """The hidden states (m, d) that predict each token ahead, and inputs they depend on: the last m - 1 of them
        are the tokens ahead."""
        model = self.language_model
        backbone, table = model.backbone, model.embedding
        known = [self.language_cache(r.sequence) for r in requests]
        responses, starts = [r.response for r in requests], [r.start for r in requests]
        # The last token is predicted, but predicts nothing that is asked for.
        if not backbone.supports_prefix_cache:
            inputs = [table.inputs(y[n:-1]).differentiable() for y, n in zip(responses, starts, strict=True)]
            whole = [
                joined([cache.prompt, table.inputs(y[:n]), x])
                for cache, y, n, x in zip(known, responses, starts, inputs, strict=True)
            ]
            outputs, _ = backbone([None] * len(whole), whole)
            return [out[-1 - len(x) :] for out, x in zip(outputs, inputs, strict=True)], inputs
        covered = catch_up(backbone, table, known, responses, starts)
        inputs = [table.inputs(y[n:-1]).differentiable() for y, n in zip(responses, covered, strict=True)]
        caches = [own.cache for own in known]
        # Copies where there is no cat: the gradient cache keeps them, and a view would keep the KV cache alive.
        hidden = [cache.hidden[-1:].clone() for cache in caches if cache is not None]
        longer = [i for i, x in enumerate(inputs) if len(x)]
        if longer:
            outputs, after = backbone([caches[i] for i in longer], [inputs[i] for i in longer])
            for i, out, cache in zip(longer, outputs, after, strict=True):
                more = starts[i] - covered[i]
                hidden[i] = out[more - 1 :].clone() if more else torch.cat([hidden[i], out])
                known[i].keep(responses[i][:-1], cache)
        return hidden, inputs

    def _reward_gradient(self, requests: Seq[Request]) -> _Part:
        """Per request b = dL/d(reward embedding weight row) (m, d_r); the rewards."""
        model = self.reward_model
        known = [self._reward_cache(r.sequence) for r in requests]
        frames = [_frame(r.sequence) for r in requests]
        readings = [model.reading(r.response, frame) for r, frame in zip(requests, frames, strict=True)]
        factors: list[Tensor] = []
        if model.supports_prefix_cache:
            assert model.backbone is not None
            starts = [reading.first(r.start) for reading, r in zip(readings, requests, strict=True)]
            skipped = catch_up(model.backbone, model.reading_table, known, [r.tokens for r in readings], starts)
            inputs = [model.conversation(f, y, n) for f, y, n in zip(frames, readings, skipped, strict=True)]
        else:
            skipped = [-len(frame.opening) for frame in frames]
            inputs = [model.conversation(f, y) for f, y in zip(frames, readings, strict=True)]
        scale = -self.config.reward_coeff * model.table.scale
        caches = [own.cache for own in known] if model.supports_prefix_cache else [None] * len(known)
        out = self._rewards_by_graph(caches, inputs, gradient=True)
        if out is not None:
            assert out.gradient is not None
            for i, (request, own, reading) in enumerate(zip(requests, known, readings, strict=True)):
                own.keep(reading.tokens, out.cache(i))
                rows = model.response_rows(reading, inputs[i], out.gradient[i], request.start, skipped[i])
                factors.append(_factor(rows, scale))
            return _Part(factors, out.values[: len(requests)].clone())
        inputs = [x.differentiable() for x in inputs]
        rewards, after = model.rewards(inputs, caches)
        if not rewards.requires_grad:
            raise ValueError(
                f"{model.name} returned rewards without a gradient; it must be differentiable with respect to "
                "inputs_embeds"
            )
        grads = torch.autograd.grad(rewards.sum(), [x.embeds for x in inputs])
        each = zip(requests, known, readings, after, inputs, grads, skipped, strict=True)
        for request, own, reading, cache, x, grad, skip in each:
            own.keep(reading.tokens, cache)
            factors.append(_factor(model.response_rows(reading, x, grad, request.start, skip), scale))
        return _Part(factors, rewards.detach())

    def read(self, sequences: Seq[Sequence], prefixes: Seq[Tensor]) -> None:
        """Makes the reward model's caches reach to the end of their prefixes (n_b,) int64, on the CPU, where it has
        any."""
        model = self.reward_model
        if not model.supports_prefix_cache:
            return
        assert model.backbone is not None
        known = [self._reward_cache(sequence) for sequence in sequences]
        tokens = [model.reading(y, _frame(s)).tokens for y, s in zip(prefixes, sequences, strict=True)]
        fast = fast_kernels(model.device, *self._fused)
        with self.clock.phase("reward", [s.stats for s in sequences]), torch.inference_mode(False), torch.no_grad():  # noqa: SIM117
            with self._side.joined(), self._side.active(), frozen(self._parameters), fast:
                reach(model.backbone, model.reading_table, known, tokens)

    def _score(self, sequences: Seq[Sequence], responses: Seq[Tensor], *, keep: bool, ended: Seq[bool]) -> list[float]:
        model = self.reward_model
        fast = fast_kernels(model.device, *self._fused)
        with self._side.joined(), self._side.active(), frozen(self._parameters), fast:
            known = [self._reward_cache(s) for s in sequences]
            readings = [model.reading(y, _frame(s)) for y, s in zip(responses, sequences, strict=True)]
            caches, inputs = [], []
            tokens = [reading.tokens for reading in readings]
            common = common_lengths(known, tokens) if model.supports_prefix_cache else [0] * len(known)
            each = zip(sequences, known, readings, common, ended, strict=True)
            for sequence, own, reading, shared, whole in each:
                start = min(shared, len(reading.tokens) - 1)
                cache = own.before(start) if start >= 0 else None
                caches.append(cache)
                behind = None if cache is None else start
                inputs.append(model.conversation(_frame(sequence), reading, behind, ended=whole))
            # A proposal is mostly rejected, and what it shares with the trajectory stays; so only the first is kept.
            out = self._rewards_by_graph(caches, inputs, gradient=False)
            rewards, after = model.rewards(inputs, caches) if out is None else (out.values[: len(known)], [])
            for i, (own, read) in enumerate(zip(known, tokens, strict=True)):
                if keep or own.cache is None:
                    own.keep(read, after[i] if out is None else out.cache(i))
            self._require_finite([rewards], model.name)
            scored: list[float] = rewards.tolist()
        return scored

    def _rewards_by_graph(
        self, caches: Seq[Cache | None], conversations: Seq[Inputs], *, gradient: bool
    ) -> StaticPass | None:
        """Rewards of conversations in one replay; None where the model is not captured."""
        if self.reward_graphs.graphs is None:
            return None
        self.reward_model.lengths(conversations, caches)
        at = pooled_states(self.reward_model, conversations)
        return self.reward_graphs.run(caches, conversations, [(at, 1)], gradient=gradient)

    def _reward_cache(self, sequence: Sequence) -> SequenceCache:
        if sequence.reward_cache is None:
            opening = _frame(sequence).opening
            # A copy where the caller is in inference mode, whose tensors autograd cannot use.
            sequence.reward_cache = SequenceCache(Inputs(opening.ids.clone(), opening.embeds.clone()))
        return sequence.reward_cache

    @staticmethod
    def _require_finite(tensors: Seq[Tensor], name: str) -> None:
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise FloatingPointError(f"{name} gave a value or gradient that is NaN or infinite")


def _frame(sequence: Sequence) -> RewardFrame:
    assert sequence.frame is not None, "a sequence without a frame is not scored"
    return sequence.frame


def _factor(gradient: Tensor, scale: float) -> Tensor:
    """``scale`` times a gradient (m, d) of a model, in bfloat16 where the model is.

    A backward pass in bfloat16 has no more bits than that, and float32 beside a bfloat16 table costs twice as much.
    Whether float16 can hold it depends on ``scale``, so that becomes float32.
    """
    return (gradient if gradient.dtype == torch.bfloat16 else ops.upcast(gradient)) * scale


def _first_equal(requests: Seq[Request]) -> list[int]:
    """For each request, the index of the first request whose evaluation serves it too."""
    first: list[int] = []
    for i, request in enumerate(requests):
        key = None
        for j in sorted(set(first)):
            other = requests[j]
            alike = request.sequence.prompt_ids == other.sequence.prompt_ids
            if not alike or request.start < other.start or len(request.response) != len(other.response):
                continue
            key = request.sequence.cache_key(request.response) if key is None else key
            if torch.equal(key, other.sequence.cache_key(other.response)):
                first.append(j)
                break
        else:
            first.append(i)
    return first
