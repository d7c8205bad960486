"""∇-Reasoner on the published schedule, in plain PyTorch: the baseline of the suites dto and generate.

The models are run as transformers ships them, over whole sequences (prompt, committed tokens, tokens ahead), for every
gradient; one-hot rows (m, V) go through the embedding tables by matmul, the log-likelihood through a dense
log_softmax, and torch's Adam moves the parameters. A gradient is kept within one optimization, while no token of it
changes, and never from one position to the next. As in the published code, the gradient criterion takes one gradient
for all positions ahead; it is taken again within a selection only where the response to be judged is another one, which
the decode loop of `nabla_fast` asks for (a sampled token that is not the argmax has been committed in between).

Three things are cheaper here than in the published code, none dearer: text is not decoded at each step, Adam's state is
kept for the rows that move alone, and the reward of the present answer is not computed again for each proposal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nabla_fast.config import NablaConfig
from nabla_fast.models.chat import Chat, conversation_frame, generation_prompt_ids
from nabla_fast.rollout import RolloutBackend, StopRule, rollout
from nabla_fast.sampling import Sampler, anchor_noise, gumbel, sequence_seeds
from nabla_fast.sequence import Sequence
from nabla_fast.stats import Clock, Revision, SequenceStats


@dataclass(frozen=True)
class Models:
    """A language model and a reward model with one vocabulary and plain embeddings and heads, in ``eval()``."""

    language_model: Any
    tokenizer: Any
    reward_model: Any
    reward_tokenizer: Any

    def __post_init__(self) -> None:
        if self.tokenizer.get_vocab() != self.reward_tokenizer.get_vocab():
            raise ValueError("reward_tokenizer has another vocabulary than tokenizer; this baseline aligns none")
        config = self.language_model.config
        if config.vocab_size != len(self.tokenizer):
            raise ValueError(f"tokenizer has {len(self.tokenizer)} tokens, the language model {config.vocab_size}")
        if config.model_type.startswith("gemma"):
            raise ValueError("Gemma scales its embeddings, which this baseline does not")

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def project(self, latents: Tensor) -> Tensor:
        """Logits (m, V) of latents (m, d)."""
        logits: Tensor = self.language_model.get_output_embeddings()(latents)
        return logits


@dataclass
class Trajectory:
    """A complete response: tokens (n,), the latents (n, d) that predict each, and its reward."""

    tokens: Tensor
    latents: Tensor
    reward: float


@dataclass
class State:
    """One response in the making.

    Attributes:
        prompt: language-model ids before the response.
        opening, closing: reward-model ids before and after it.
        seed: of its noise.
        limit: longest response, in tokens.
        position: number of committed tokens.
    """

    prompt: tuple[int, ...]
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    seed: int
    limit: int
    position: int = 0
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(torch.empty(0), torch.empty(0), 0.0))
    stats: SequenceStats = field(default_factory=SequenceStats)

    @property
    def ahead(self) -> int:
        """m, the number of tokens ahead."""
        return len(self.trajectory.tokens) - self.position

    @property
    def committed(self) -> Tensor:
        """(position,) int64."""
        return self.trajectory.tokens[: self.position]

    def sequence(self, prefix: Tensor) -> Sequence:
        """As rollouts and samplers take it: with a prefix to continue, without anything computed of it."""
        return Sequence(self.prompt, tuple(prefix.tolist()), self.seed, self.limit)


@dataclass
class Rows:
    """What one optimization relaxes: the rows that move, and those ahead that rest.

    Attributes:
        moving: (n, d) or (n, V) parameter.
        resting: (r, d) or (r, V) rows that are relaxed as well, though they do not move.
        tokens: (m - n,) hard tokens of the rows that rest.
        soft: (n + r, V) noise inside the softmax, or 0.
        hard: (n, V) noise where the hard token is taken, or 0.
    """

    models: Models
    latents: bool
    moving: Tensor
    resting: Tensor
    tokens: Tensor
    soft: Tensor | float
    hard: Tensor | float

    def logits(self) -> Tensor:
        """(n + r, V)."""
        rows = torch.cat([self.moving, self.resting])
        return self.models.project(rows) if self.latents else rows

    def hard_tokens(self, z: Tensor) -> Tensor:
        """(m,) at logits z (n + r, V)."""
        return torch.cat([(z[: len(self.moving)] + self.hard).argmax(-1), self.tokens])


class PublishedSchedule:
    """Decodes one prompt at a time (Alg. 1 to 4).

    Args:
        models: the pair.
        rollouts: where trajectories come from.
        config: settings.
        stop: when a response has ended.
    """

    def __init__(self, models: Models, rollouts: RolloutBackend, config: NablaConfig, stop: StopRule) -> None:
        self.models, self.rollouts, self.config, self.stop = models, rollouts, config, stop
        self.sampler = Sampler()
        self.clock = Clock()

    @torch.no_grad()
    def decode(self, chat: Chat) -> State:
        """Answers ``chat``; the answer is the state's trajectory."""
        state = self.start(chat)
        state.trajectory = self.roll_out(state, torch.empty(0, dtype=torch.long, device=self.models.device))
        while state.ahead and state.stats.rollouts < self.config.max_rollouts:
            self.select(state)
            if not state.ahead:
                break
            logits = self.optimize(state)
            self.propose(state, self.resample(state, logits))
        state.position = len(state.trajectory.tokens)
        return state

    def start(self, chat: Chat) -> State:
        """A response to ``chat`` before its first token."""
        prompt = tuple(generation_prompt_ids(self.models.tokenizer, chat))
        frame = conversation_frame(self.models.reward_tokenizer, chat)
        (seed,) = sequence_seeds(self.config.seed, [prompt])
        return State(prompt, frame.opening, frame.closing, seed, self.config.max_new_tokens)

    # 1
    def roll_out(self, state: State, prefix: Tensor) -> Trajectory:
        """Continues the response ids ``prefix`` to a complete, scored trajectory."""
        with self.clock.phase("rollout", [state.stats]):
            (new,) = rollout(self.rollouts, [state.sequence(prefix)], self.config.rollout, self.stop)
        state.stats.rollouts += 1
        state.stats.generated_tokens += len(new.tokens)
        tokens = torch.cat([prefix, new.tokens.to(prefix.device)])
        latents = torch.cat([state.trajectory.latents[: len(prefix)], new.latents]) if len(prefix) else new.latents
        with self.clock.phase("reward", [state.stats]):
            ids = torch.tensor([*state.opening, *tokens.tolist(), *self._closing(state, tokens)], device=tokens.device)
            # Embeddings, not ids: given ids, a classifier passes over a last token that is also its padding token.
            embeds = self.models.reward_model.get_input_embeddings()(ids)[None]
            reward = float(self.models.reward_model(inputs_embeds=embeds, use_cache=False).logits[0, 0])
        state.stats.reward_calls += 1
        return Trajectory(tokens, latents, reward)

    # 2
    def select(self, state: State) -> None:
        """Commits everything before the next token worth optimizing."""
        with self.clock.phase("selection", [state.stats]):
            chosen = self._first_passing(state)
        state.stats.skipped_positions += chosen
        state.position += chosen

    def _first_passing(self, state: State) -> int:
        z = self.models.project(state.trajectory.latents[state.position :])
        passing = torch.ones(len(z), dtype=torch.bool, device=z.device)
        p = z.softmax(-1)
        if self.config.entropy_threshold is not None:
            passing &= torch.special.entr(p).sum(-1) >= self.config.entropy_threshold
        if self.config.confidence_threshold is not None:
            passing &= p.amax(-1) <= self.config.confidence_threshold
        candidates: list[int] = passing.nonzero().flatten().tolist()
        if self.config.gradient_threshold is None or not candidates:
            return candidates[0] if candidates else len(z)
        ahead = state.trajectory.tokens[state.position :]
        hard = self._start_tokens(state, z)
        norms, taken_at = z.new_empty(0), 0
        for t in candidates:
            if not len(norms) or not torch.equal(ahead[taken_at:t], hard[taken_at:t]):
                norms, taken_at = self.gradient(state, ahead[:t], hard[t:]).norm(dim=-1), t
            if norms[t - taken_at] >= self.config.gradient_threshold:
                return t
        return len(z)

    def gradient(self, state: State, before: Tensor, hard: Tensor) -> Tensor:
        """dL/dy (m, V) at the tokens ``hard`` (m,) that follow the committed ones and ``before``."""
        with torch.enable_grad():
            y = F.one_hot(hard, self.models.vocab_size).to(state.trajectory.latents.dtype).requires_grad_()
            with self.clock.phase("gradient", [state.stats]):
                self.loss(state, torch.cat([state.committed, before]), y, hard[:0]).backward()
        assert y.grad is not None
        return y.grad

    # 3
    def optimize(self, state: State) -> Tensor:
        """The optimized logits (V,) of the next token."""
        with self.clock.phase("dto", [state.stats]), torch.enable_grad():
            logits = self._optimized(state)
        state.stats.dto_iterations += self.config.max_iters
        state.stats.optimised_positions += 1
        return logits

    def _optimized(self, state: State) -> Tensor:
        config, rows = self.config, self._rows(state)
        optimizer = torch.optim.Adam([rows.moving], config.learning_rate, weight_decay=config.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, config))
        cached: Tensor | None = None
        z = rows.logits()
        tokens = rows.hard_tokens(z)
        for _ in range(config.max_iters):
            optimizer.zero_grad()
            p = ((z + rows.soft) / config.tau).softmax(-1)
            if cached is None:
                cached = self._fresh_gradient(state, p, tokens)
            else:
                (cached * p).sum().backward()
            optimizer.step()
            scheduler.step()
            z = rows.logits()
            moved = rows.hard_tokens(z)
            if not torch.equal(moved, tokens):
                cached, tokens = None, moved
        return z[0].detach()

    def _fresh_gradient(self, state: State, p: Tensor, tokens: Tensor) -> Tensor:
        """Runs both models forward and backward, down to the parameters; dL/dy (n + r, V)."""
        one_hot = F.one_hot(tokens[: len(p)], p.shape[-1]).to(p.dtype)
        y = one_hot + p - p.detach()
        y.retain_grad()
        with self.clock.phase("gradient", [state.stats]):
            self.loss(state, state.committed, y, tokens[len(p) :]).backward()
        assert y.grad is not None
        return y.grad

    def _rows(self, state: State) -> Rows:
        config, trajectory, position = self.config, state.trajectory, state.position
        z = self.models.project(trajectory.latents[position:])
        latents = config.parameterization == "latents"
        start = trajectory.latents[position:] if latents else z
        n = state.ahead if config.update_postfix else 1
        keys = [(state.seed, position + row) for row in range(state.ahead)]
        soft = self._soft_noise(keys, z)
        hard = soft[:n] if isinstance(soft, Tensor) else soft
        if config.anchor == "rollout":
            hard = anchor_noise(z[:n], config.rollout, keys[:n], trajectory.tokens[position : position + n])
        tokens = self._start_tokens(state, z)[n:]
        moving = start[:n].detach().clone().requires_grad_()
        return Rows(self.models, latents, moving, start[n:].detach(), tokens, soft, hard)

    def loss(self, state: State, before: Tensor, y: Tensor, after: Tensor) -> Tensor:
        """Eq. 2 where the response is ``before`` (ids), one-hot rows ``y`` (n, V), ``after`` (ids)."""
        models, known = self.models, torch.tensor(state.prompt, device=y.device)
        n, ahead = len(y), len(y) + len(after)
        embed = models.language_model.get_input_embeddings()
        embeds = torch.cat([embed(torch.cat([known, before])), y @ embed.weight, embed(after)])
        out = models.language_model(inputs_embeds=embeds[None], use_cache=False, logits_to_keep=ahead + 1)
        log_pi = out.logits[0, :-1].log_softmax(-1)
        log_likelihood = (y * log_pi[:n]).sum() + log_pi[n:].gather(-1, after[:, None]).sum()

        embed = models.reward_model.get_input_embeddings()
        last = torch.cat([y.detach().argmax(-1), after])[-1:]
        opening, closing = (
            torch.tensor(ids, dtype=torch.long, device=y.device) for ids in (state.opening, self._closing(state, last))
        )
        parts = [embed(torch.cat([opening, before])), y @ embed.weight, embed(torch.cat([after, closing]))]
        reward = models.reward_model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, 0]
        state.stats.gradient_evaluations += 1
        return -self.config.nll_coeff * log_likelihood - self.config.reward_coeff * reward

    # 4
    def resample(self, state: State, logits: Tensor) -> int:
        """Draws the next token anew, from the optimized logits (V,)."""
        with self.clock.phase("resample", [state.stats]):
            sequence = state.sequence(state.committed)
            return int(self.sampler(logits[None], self.config.resample, [sequence], [sequence.prefix]))

    # 5
    def propose(self, state: State, token: int) -> None:
        """Commits a token that stayed the same; rolls out from one that did not, and keeps the better trajectory."""
        old, position = state.trajectory, state.position
        if token != int(old.tokens[position]):
            new = self.roll_out(state, torch.cat([state.committed, old.tokens.new_tensor([token])]))
            accepted = not self.config.rejection_sampling or new.reward > old.reward
            state.stats.rejections += not accepted
            state.stats.revisions.append(
                Revision(position, int(old.tokens[position]), token, old.reward, new.reward, accepted)
            )
            state.trajectory = new if accepted else old
        state.position += 1

    def _start_tokens(self, state: State, z: Tensor) -> Tensor:
        """(m,) what an optimization that starts here takes the tokens ahead to be; z (m, V) are their logits."""
        if self.config.anchor == "rollout":
            return state.trajectory.tokens[state.position :]
        keys = [(state.seed, state.position + row) for row in range(len(z))]
        return (z + self._soft_noise(keys, z)).argmax(-1)

    def _soft_noise(self, keys: Seq[tuple[int, int]], z: Tensor) -> Tensor | float:
        if not self.config.gumbel_noise:
            return 0.0
        return self.config.gumbel_noise * gumbel(keys, z.shape[-1], z.device)

    @staticmethod
    def _closing(state: State, response: Tensor) -> tuple[int, ...]:
        """What the template writes after a response, without the end token that the response itself has."""
        ends_turn = len(response) > 0 and state.closing[:1] == (int(response[-1]),)
        return state.closing[1:] if ends_turn else state.closing


def _rate(config: NablaConfig, step: int) -> float:
    """The share of the learning rate that ``step`` takes."""
    if step < config.warmup_iters:
        return step / config.warmup_iters
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    decay = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.lr_schedule]
    return max(config.min_lr_ratio, decay)
