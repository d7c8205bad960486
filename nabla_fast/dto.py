"""Differentiable Textual Optimization (Alg. 2 and 4): Adam on the logits or latents of the tokens ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import NablaConfig
from nabla_fast.gradient_cache import Evaluation
from nabla_fast.models.chat import generation_prompt_ids, is_chat
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import reward_model_of
from nabla_fast.objective import Objective, Request
from nabla_fast.ops import linear as native_linear
from nabla_fast.sampling import anchor_noise, gumbel, sequence_seeds
from nabla_fast.sequence import Sequence, Trajectory


class TraceStep(NamedTuple):
    """One DTO step.

    Attributes:
        learning_rate: of this step.
        evaluated: whether the gradient was taken anew (from the models or the cache), because a token had changed.
        changed: how many tokens this step changed.
        log_likelihood: sum of log pi over the tokens ahead, before this step.
        reward: before this step.
    """

    learning_rate: float
    evaluated: bool
    changed: int
    log_likelihood: float
    reward: float


@dataclass(frozen=True)
class DTOResult:
    """The result of DTO over the tokens ahead.

    Attributes:
        parameters: (m, d) latents or (m, V) logits after the last step.
        logits: (m, V) with ``update_postfix``, else the first row alone (1, V).
        tokens: (m,) int64 hard tokens after the last step.
        gradient_evaluations: forward and backward passes over both models (cache hits are not counted).
        iterations: steps taken.
        trace: one entry per step.
    """

    parameters: Tensor
    logits: Tensor
    tokens: Tensor
    gradient_evaluations: int
    iterations: int
    trace: tuple[TraceStep, ...]


def learning_rates(config: NablaConfig) -> list[float]:
    """The learning rate of each of the ``max_iters`` steps, as shares of ``config.learning_rate``.

    Step t of the w = ``warmup_iters`` warm-up steps takes t / w, so the first of them moves nothing. Step t of the T
    steps after them takes max(min_lr_ratio, (1 + cos(pi t / T)) / 2) ("cosine"), max(min_lr_ratio, 1 - t / T)
    ("linear") or 1 ("constant").

    Source: the published code's schedulers, which clip the decay at ``min_lr_ratio`` and do not rescale it.
    """
    low, rest = config.min_lr_ratio, config.max_iters - config.warmup_iters
    factors = [step / config.warmup_iters for step in range(config.warmup_iters)]
    for step in range(rest):
        if config.lr_schedule == "cosine":
            factors.append(max(low, (1 + math.cos(math.pi * step / rest)) / 2))
        elif config.lr_schedule == "linear":
            factors.append(max(low, 1 - step / rest))
        else:
            factors.append(1.0)
    return [config.learning_rate * factor for factor in factors]


def optimize(
    model: Any,
    tokenizer: Any,
    reward_model: Any,
    reward_tokenizer: Any,
    messages: Seq[dict[str, Any]],
    prefix_ids: Seq[int] | Tensor,
    start: Tensor,
    config: NablaConfig | None = None,
) -> DTOResult:
    """Optimizes the tokens ahead of one response.

    Args:
        model: a transformers causal language model in ``eval()``.
        tokenizer: its tokenizer, with a chat template.
        reward_model: a sequence classifier with one label, or another one (see `nabla_fast.generate`).
        reward_tokenizer: its tokenizer; None takes ``tokenizer``.
        messages: the chat so far, without the response.
        prefix_ids: (n,) committed response ids, may be empty.
        start: (m, d) latents or (m, V) logits of the m >= 1 tokens ahead, as ``config.parameterization`` says.
        config: settings; None takes the defaults.

    Raises:
        ValueError, TypeError: if ``messages``, ``prefix_ids`` or ``start`` have another type, shape, range or length
            than these models need.
        FloatingPointError: if ``start`` or a model's output is not finite.
    """
    config = config or NablaConfig()
    language_model = LanguageModel(model, tokenizer)
    ops.resolve("dto_step", config.backend, language_model.device.type)
    eos_token_ids = language_model.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    rewards = reward_model_of(reward_model, reward_tokenizer, language_model, tokenizer, eos_token_ids)
    prefix = _check_prefix(prefix_ids, language_model)
    _check_start(start, language_model, config)
    if not is_chat(messages):
        raise TypeError(f"messages must be a non-empty list of messages, got {messages!r}")
    prompt = tuple(generation_prompt_ids(tokenizer, messages, config.chat_template_kwargs))
    _check_length(len(prompt) + len(prefix) + len(start), language_model)
    frame = rewards.chat_frame(messages, config.chat_template_kwargs)
    (seed,) = sequence_seeds(config.seed, [prompt])
    sequence = Sequence(prompt, (), seed, len(prefix) + len(start), frame, position=len(prefix))
    start = start.to(language_model.device)
    latents = config.parameterization == "latents"
    rows = language_model.widened(start) if latents else start
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    with torch.no_grad():
        ahead = start_tokens(rows, latents, seed, len(prefix), language_model.head, config).cpu()
        tokens = torch.cat([prefix, ahead])
        uncertain = torch.ones(len(tokens), dtype=torch.bool)
        sequence.trajectory = Trajectory(tokens, rows, tokens, uncertain, reward=math.nan)
        with Objective(language_model, rewards, config) as objective:
            (result,) = optimize_batch([sequence], [rows], objective)
    return replace(result, parameters=result.parameters[:, : language_model.width]) if latents else result


def optimize_batch(sequences: Seq[Sequence], starts: Seq[Tensor], objective: Objective) -> list[DTOResult]:
    """Optimizes the tokens ahead of several sequences together: one gradient call for all whose tokens have changed,
    then steps until the tokens of each change again or its ``max_iters`` steps are made.

    Args:
        sequences: each at the position from which on it is optimized.
        starts: of each, latents or logits of the tokens ahead (m, ·); the rows that move suffice.
    """
    rows = _Rows(sequences, starts, objective)
    evaluated_before = [sequence.stats.gradient_evaluations for sequence in sequences]
    while moving := rows.unfinished():
        evaluations = objective.evaluate([rows.request(i) for i in moving])
        rows.set_gradient(moving, evaluations)
        rows.advance(dict(zip(moving, evaluations, strict=True)))
    return [rows.result(i, evaluated_before[i]) for i in range(len(sequences))]


class _Rows:
    """The moving rows of a batch of sequences, flattened, with their Adam state and gradients.

    Attributes:
        tokens: (B, m) int64 on the CPU, the hard tokens ahead of each sequence, padded.
        moving: (N,) int64 on the models' device, those of the N rows that move.
    """

    def __init__(self, sequences: Seq[Sequence], starts: Seq[Tensor], objective: Objective) -> None:
        config = objective.config
        self.sequences, self.starts, self.objective, self.config = sequences, starts, objective, config
        self.latents = config.parameterization == "latents"
        moving = [s.ahead if config.update_postfix else 1 for s in sequences]
        bounds = [0, *torch.tensor(moving).cumsum(0).tolist()]
        self.spans = [slice(bounds[i], bounds[i + 1]) for i in range(len(sequences))]
        self.keys = [(s.seed, s.position + j) for s, n in zip(sequences, moving, strict=True) for j in range(n)]
        dtype = torch.promote_types(starts[0].dtype, torch.float32)
        # torch.cat copies, so a caller's tensors and the trajectory's latents stay as they are.
        self.parameters = torch.cat([x[:n].to(dtype) for x, n in zip(starts, moving, strict=True)])
        self.exp_avg = torch.zeros_like(self.parameters)
        self.exp_avg_sq = torch.zeros_like(self.parameters)
        self.soft_noise = self._soft_noise()
        self.hard_noise = self._hard_noise()
        ahead = [s.current.hard[s.position :] for s in sequences]
        self.tokens = torch.nn.utils.rnn.pad_sequence(ahead, batch_first=True)
        moved = [self.tokens[i, : span.stop - span.start] for i, span in enumerate(self.spans)]
        self.moving = torch.cat(moved).to(self.parameters.device)
        self.gradients: list[Tensor] = []  # factors, or dense rows alone
        rates = learning_rates(config)
        self.learning_rates = torch.tensor(rates, dtype=dtype, device=self.parameters.device)
        self.step = torch.zeros(len(self.keys), dtype=torch.long, device=self.parameters.device)
        self.steps_made = [0] * len(sequences)
        self.traces: list[list[TraceStep]] = [[] for _ in sequences]
        # The rows of one sequence share their gradient, so they go stale together.
        which = [i for i, n in enumerate(moving) for _ in range(n)]
        self.group = torch.tensor(which, device=self.parameters.device) if config.update_postfix else None

    def unfinished(self) -> list[int]:
        """The sequences that have steps left; after `advance` the gradient of each is stale."""
        return [i for i, made in enumerate(self.steps_made) if made < len(self.learning_rates)]

    def request(self, i: int) -> Request:
        """Asks for the gradient at sequence i's hard tokens."""
        sequence = self.sequences[i]
        response = torch.cat([sequence.current.tokens[: sequence.position], self.tokens[i, : sequence.ahead]])
        return Request(sequence, response, sequence.position)

    def set_gradient(self, which: Seq[int], evaluations: Seq[Evaluation]) -> None:
        """Replaces the gradients of some sequences: as factors where all rows move, else the one dense row of each."""
        for i, evaluation in zip(which, evaluations, strict=True):
            span = self.spans[i]
            factors = evaluation.rows_from(self.sequences[i].position).rows(slice(0, span.stop - span.start))
            moves_all = self.config.update_postfix
            parts = factors if moves_all else (ops.token_gradient(factors, self.objective.tables),)
            self.gradients = self.gradients or [part.new_zeros(len(self.keys), part.shape[1]) for part in parts]
            for buffer, part in zip(self.gradients, parts, strict=True):
                buffer[span] = part

    def advance(self, evaluations: Mapping[int, Evaluation]) -> None:
        """Steps every sequence until its tokens change or its steps are made: one launch, one read by the host.

        Raises:
            FloatingPointError: if the steps left a row without a token.
        """
        config = self.config
        gradient = ops.TokenGradient(*self.gradients) if config.update_postfix else self.gradients[0]
        moved, _ = ops.dto_step(
            ops.DTOState(self.parameters, self.exp_avg, self.exp_avg_sq, self.step, self.moving),
            ops.DTOInputs(self.learning_rates, gradient, self.soft_noise, self.hard_noise, self.group),
            self.objective.tables,
            ops.DTOOptions(self.latents, config.tau, config.weight_decay, max_steps=len(self.learning_rates)),
            config.backend,
        )
        read = torch.cat([self.step[[span.start for span in self.spans]], moved]).cpu()
        made, own = read.split([len(self.spans), len(moved)])
        tokens = self.tokens.clone()
        for i, span in enumerate(self.spans):
            tokens[i, : span.stop - span.start] = own[span]
        changed, lost = (tokens != self.tokens).sum(1), (tokens < 0).any(1)
        self.tokens, self.moving = tokens, moved
        for i, (steps, changes, without_token) in enumerate(torch.stack([made, changed, lost], dim=1).tolist()):
            if without_token:
                raise FloatingPointError(
                    f"learning_rate {self.config.learning_rate} made logits NaN or infinite at iteration {steps} of "
                    f"{len(self.learning_rates)}; use a smaller one"
                )
            if i in evaluations:
                self._record(i, steps, changes, evaluations[i])

    def _record(self, i: int, steps: int, changes: int, evaluation: Evaluation) -> None:
        """Records the steps that sequence i made with one gradient; only the last of them can have changed a token."""
        sequence, first = self.sequences[i], self.steps_made[i]
        log_likelihood = evaluation.log_likelihood_from(sequence.position)
        for step in range(first, steps):
            last = step == steps - 1
            rate = float(self.learning_rates[step])
            self.traces[i].append(
                TraceStep(rate, step == first, changes if last else 0, log_likelihood, evaluation.reward)
            )
        sequence.stats.dto_iterations += steps - first
        self.steps_made[i] = steps

    def result(self, i: int, evaluated_before: int) -> DTOResult:
        sequence, span = self.sequences[i], self.spans[i]
        moved = self.parameters[span]
        unmoved = self.starts[i][span.stop - span.start :].to(moved.dtype)
        return DTOResult(
            parameters=torch.cat([moved, unmoved]),
            logits=native_linear.logits(moved, self.objective.tables.head) if self.latents else moved.clone(),
            tokens=self.tokens[i, : sequence.ahead].to(moved.device, copy=True),
            gradient_evaluations=sequence.stats.gradient_evaluations - evaluated_before,
            iterations=len(self.traces[i]),
            trace=tuple(self.traces[i]),
        )

    def _soft_noise(self) -> Tensor | None:
        if self.config.gumbel_noise == 0:
            return None
        vocabulary = self.objective.tables.head.weight.shape[0]
        return self.config.gumbel_noise * gumbel(self.keys, vocabulary, self.parameters.device)

    def _hard_noise(self) -> Tensor | None:
        if self.config.anchor == "argmax":
            return self.soft_noise
        ahead = [s.current.tokens[s.position :] for s in self.sequences]
        drawn = torch.cat([y[: span.stop - span.start] for y, span in zip(ahead, self.spans, strict=True)])
        z = native_linear.logits(self.parameters, self.objective.tables.head) if self.latents else self.parameters
        return anchor_noise(z, self.config.rollout, self.keys, drawn.to(z.device))


def start_tokens(start: Tensor, latents: bool, seed: int, position: int, head: ops.Head, config: NablaConfig) -> Tensor:
    """The hard tokens that DTO starts from: argmax of the logits with the anchor's noise.

    Args:
        start: (m, d) latents or (m, V) logits of response positions ``position`` and later.
        latents: which of the two.

    Returns:
        (m,) int64.
    """
    tokens = []
    for rows in ops.row_chunks(len(start), head.weight.shape[0]):
        z = native_linear.logits(start[rows], head) if latents else start[rows]
        keys = [(seed, position + rows.start + j) for j in range(len(z))]
        if config.anchor == "rollout":
            z = z + anchor_noise(z, config.rollout, keys)
        elif config.gumbel_noise:
            z = z + config.gumbel_noise * gumbel(keys, z.shape[-1], z.device)
        tokens.append(z.argmax(-1))
    return torch.cat(tokens)


def _check_start(start: Tensor, model: LanguageModel, config: NablaConfig) -> None:
    width = model.width if config.parameterization == "latents" else model.vocab_size
    wanted = f"start must be a float tensor (m, {width}) of {config.parameterization} with m >= 1"
    if not isinstance(start, Tensor):
        raise TypeError(f"{wanted}, got {type(start).__name__}")
    if start.ndim != 2 or start.shape[0] < 1 or start.shape[1] != width or not start.is_floating_point():
        raise ValueError(f"{wanted}, got {tuple(start.shape)} {start.dtype}")
    if not bool(start.isfinite().all()):
        raise FloatingPointError("start holds NaN or infinite values")


def _check_prefix(prefix_ids: Seq[int] | Tensor, model: LanguageModel) -> Tensor:
    ids = torch.as_tensor(prefix_ids)
    if ids.ndim != 1 or (len(ids) > 0 and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"prefix_ids must be (n,) integer token ids, got {tuple(ids.shape)} {ids.dtype}")
    if bool(((ids < 0) | (ids >= model.vocab_size)).any()):
        raise ValueError(f"prefix_ids must hold token ids from 0 to {model.vocab_size - 1}, got {ids.tolist()}")
    return ids.to("cpu", torch.long)


def _check_length(tokens: int, model: LanguageModel) -> None:
    if model.context_length is not None and tokens > model.context_length:
        raise ValueError(
            f"start is too long: {model.name} takes at most {model.context_length} tokens, got {tokens} with the "
            "prompt and prefix_ids"
        )
