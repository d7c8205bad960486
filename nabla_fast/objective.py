"""The objective of ∇-Reasoner (Eq. 2) at hard tokens, and its factored gradient.

L(y) = -(nll_coeff * sum_t log pi(y_t | x, y_<t) + reward_coeff * r(x, y))

A gradient is evaluated once per distinct response, over the tokens ahead only: those before them are in the KV caches
of their sequence (`nabla_fast.models.kv_cache`), and what was evaluated is in the gradient cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.models.backbone import Inputs, joined
from nabla_fast.models.decoder_layers import checkpointed, require_layers
from nabla_fast.models.fused_layers import fast_kernels
from nabla_fast.models.graphed import graphed_likelihood, graphed_rewards
from nabla_fast.models.kept import clear_graphs
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.sequence_cache import SequenceCache, catch_up
from nabla_fast.models.static import StaticPass
from nabla_fast.models.temporary import frozen
from nabla_fast.reward_side import RewardSide, SideStream, scaled
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
        self._reward_side = RewardSide(reward_model, self.reward_graphs, config.reward_coeff)
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
        known = None if self.cache is None else self.cache.find_reward
        found = [known(s.cache_key(y)) if known is not None and whole else None for s, y, whole in asked]
        missing = [i for i, reward in enumerate(found) if reward is None]
        if missing:
            own = [sequences[i] for i in missing]
            with self.clock.phase("reward", [s.stats for s in own]), self._reward_block():
                rewards = self._reward_side.rewards(
                    own, [responses[i] for i in missing], keep=keep, ended=[ended[i] for i in missing]
                )
                self._require_finite([rewards], self.reward_model.name)
                scored: list[float] = rewards.tolist()
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
                    asked = zip(*((r.sequence, r.response, r.start) for r in requests), strict=True)
                    b, rewards = self._reward_side.gradient(*asked)
                h, a, log_pi = self._likelihood_gradient(requests)
            # Copied to another device any sooner, the language model would wait for it, too.
            self._side.hand_over((*b, rewards))
            b, rewards = [factor.to(self.device) for factor in b], rewards.to(self.device)
        self._require_finite([*a, log_pi], self.language_model.name)
        self._require_finite([*b, rewards], self.reward_model.name)
        each = log_pi.double().cpu().split([len(factors) for factors in a])
        return [
            Evaluation(request.start, ops.TokenGradient(*factors), likelihoods.clone(), reward)
            for request, *factors, likelihoods, reward in zip(requests, h, a, b, each, rewards.tolist(), strict=True)
        ]

    def _likelihood_gradient(self, requests: Seq[Request]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Per request h^pi (m, d) and a = dL/d(embedding weight row) (m, d); log pi at all their positions."""
        model = self.language_model
        known = [self.language_cache(r.sequence) for r in requests]
        responses, covered = [r.response for r in requests], [r.start for r in requests]
        if model.backbone.supports_prefix_cache:
            covered = catch_up(model.backbone, model.embedding, known, responses, covered)
        # The last token is predicted, but predicts nothing that is asked for.
        inputs = [model.embedding.inputs(y[n:-1]) for y, n in zip(responses, covered, strict=True)]
        ahead = [slice(r.start - n, len(r.response) - n) for r, n in zip(requests, covered, strict=True)]
        out = self._likelihood_by_graph(known, responses, covered, inputs)
        gradients: Seq[Tensor]
        if out is not None:
            assert out.gradient is not None
            gradients = out.gradient[: len(requests)].unbind()
            # Copies, since the next replay writes to the graph's memory.
            hidden = [out.states[i, part].clone() for i, part in enumerate(ahead)]
            log_pi = torch.cat([out.values[i, part] for i, part in enumerate(ahead)])
        else:
            inputs = [x.differentiable() for x in inputs]
            states = self._language_states(requests, known, covered, inputs)
            targets = torch.cat([r.response[r.start :] for r in requests]).to(self.device)
            log_pi = ops.linear_log_likelihood(torch.cat(states), model.head, targets, backend=self.config.backend)
            asked = [x.embeds for x in inputs if len(x)]
            found = iter(torch.autograd.grad(log_pi.sum(), asked) if asked else ())
            gradients = [next(found) if len(x) else x.embeds.detach() for x in inputs]
            hidden, log_pi = [h.detach() for h in states], log_pi.detach()
        scale = -self.config.nll_coeff * model.embedding.scale
        factors = []
        for gradient, part in zip(gradients, ahead, strict=True):
            rows = scaled(gradient[part.start : part.stop - 1], scale).to(self.device)
            factors.append(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))
        return hidden, factors, log_pi

    def _likelihood_by_graph(
        self, known: Seq[SequenceCache], responses: Seq[Tensor], covered: Seq[int], inputs: Seq[Inputs]
    ) -> StaticPass | None:
        """The gradient of log pi in one replay; None where the model is not captured."""
        if self.likelihood_graphs.graphs is None:
            return None
        targets = [y[n:].to(self.device) for y, n in zip(responses, covered, strict=True)]
        inside = [torch.ones_like(y, dtype=torch.bool) for y in targets]
        caches = [own.cache for own in known]
        out = self.likelihood_graphs.run(caches, inputs, [(targets, None), (inside, None)], gradient=True)
        if out is not None:
            for i, (own, response) in enumerate(zip(known, responses, strict=True)):
                own.keep(response[:-1], out.cache(i))
        return out

    def _language_states(
        self, requests: Seq[Request], known: Seq[SequenceCache], covered: Seq[int], inputs: Seq[Inputs]
    ) -> list[Tensor]:
        """The hidden states (m, d) that predict each token ahead; the last m - 1 of the inputs are the tokens ahead."""
        backbone, table = self.language_model.backbone, self.language_model.embedding
        if not backbone.supports_prefix_cache:
            each = zip(requests, known, inputs, strict=True)
            whole = [joined([own.prompt, table.inputs(r.response[: r.start]), x]) for r, own, x in each]
            outputs, _ = backbone([None] * len(whole), whole)
            return [out[-1 - len(x) :] for out, x in zip(outputs, inputs, strict=True)]
        caches = [own.cache for own in known]
        # Copies where there is no cat: the gradient cache keeps them, and a view would keep the KV cache alive.
        hidden = [cache.hidden[-1:].clone() for cache in caches if cache is not None]
        longer = [i for i, x in enumerate(inputs) if len(x)]
        if longer:
            outputs, after = backbone([caches[i] for i in longer], [inputs[i] for i in longer])
            for i, out, cache in zip(longer, outputs, after, strict=True):
                more = requests[i].start - covered[i]
                hidden[i] = out[more - 1 :].clone() if more else torch.cat([hidden[i], out])
                known[i].keep(requests[i].response[:-1], cache)
        return hidden

    def read(self, sequences: Seq[Sequence], prefixes: Seq[Tensor]) -> None:
        """Makes the reward model's caches reach to the end of their prefixes (n_b,) int64, on the CPU, where it has
        any."""
        if self.reward_model.supports_prefix_cache:
            with self.clock.phase("reward", [s.stats for s in sequences]), self._reward_block():
                self._reward_side.read(sequences, prefixes)

    @contextmanager
    def _reward_block(self) -> Iterator[None]:
        """Runs the reward model alone in this block, without autograd."""
        fast = fast_kernels(self.reward_model.device, *self._fused)
        with torch.inference_mode(False), torch.no_grad():  # noqa: SIM117
            with self._side.joined(), self._side.active(), frozen(self._parameters), fast:
                yield

    @staticmethod
    def _require_finite(tensors: Seq[Tensor], name: str) -> None:
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise FloatingPointError(f"{name} gave a value or gradient that is NaN or infinite")


def _first_equal(requests: Seq[Request]) -> list[int]:
    """For each request, the index of the first request whose evaluation serves it too."""
    first: list[int] = []
    for i, request in enumerate(requests):
        first.append(next((j for j in sorted(set(first)) if _serves(requests[j], request)), i))
    return first


def _serves(other: Request, request: Request) -> bool:
    alike = request.sequence.prompt_ids == other.sequence.prompt_ids and request.start >= other.start
    if not alike or not torch.equal(request.response, other.response):
        return False
    keys = (x.sequence.cache_key(x.response) for x in (request, other))
    return torch.equal(*keys)
