"""DTO as the paper writes it, by autograd: dense one-hot rows, whole sequences, no cache. The oracle of test_dto.py.

Nothing here comes from nabla_fast.ops, nabla_fast.objective or nabla_fast.dto.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.sampling import gumbel, sequence_seeds


@dataclass
class DensePair:
    """A language model, a reward model, and the conversation around the response.

    Attributes:
        language_model, reward_model: transformers models.
        vocab_size: V, ids that may be produced.
        prompt: language-model ids before the response.
        opening, closing: reward-model ids before and after the response.
        partner: the reward model's ids of each of the V tokens, several where the token is cut into pieces.
    """

    language_model: Any
    reward_model: Any
    vocab_size: int
    prompt: list[int]
    opening: list[int]
    closing: list[int]
    partner: list[list[int]]

    def __post_init__(self) -> None:
        self.embedding = self.language_model.get_input_embeddings()(torch.arange(self.vocab_size))
        own = self.reward_model.get_input_embeddings()
        self.reward_embedding = torch.stack([own(torch.tensor(pieces)).mean(0) for pieces in self.partner])
        self.reward_opening = own(torch.tensor(self.opening, dtype=torch.long))
        self.reward_closing = own(torch.tensor(self.closing, dtype=torch.long))

    def logits(self, hidden: Tensor) -> Tensor:
        """By the model's own head."""
        z = self.language_model.get_output_embeddings()(hidden)[..., : self.vocab_size]
        cap = getattr(self.language_model.config, "final_logit_softcapping", None)
        return z if cap is None else cap * torch.tanh(z / cap)

    def log_likelihood(self, prefix: Sequence[int], ahead: Tensor) -> Tensor:
        """Sum of log pi over one-hot rows ``ahead`` (m, V) after the prompt and ``prefix``."""
        known = self.embedding[torch.tensor([*self.prompt, *prefix])]
        embeds = torch.cat([known, ahead @ self.embedding]).unsqueeze(0)
        logits = self.language_model(inputs_embeds=embeds, use_cache=False).logits[0, len(known) - 1 : -1]
        return (ahead * logits[:, : self.vocab_size].log_softmax(-1)).sum()

    def reward(self, prefix: Sequence[int], ahead: Tensor, *, ended: bool = True) -> Tensor:
        """The reward model's score of the conversation with the response ``prefix`` and one-hot rows ``ahead``; where
        it has not ended, of its last token."""
        response = torch.cat([torch.eye(self.vocab_size, dtype=ahead.dtype)[list(prefix)], ahead])
        ends_turn = self.closing and self.partner[int(response[-1].argmax())] == self.closing[:1]
        closing = self.reward_closing[1:] if ends_turn else self.reward_closing if ended else self.reward_closing[:0]
        embeds = torch.cat([self.reward_opening, response @ self.reward_embedding, closing]).unsqueeze(0)
        return self.reward_model(inputs_embeds=embeds, use_cache=False).logits[0, 0]


@dataclass
class DenseResult:
    """What `dense_dto` found: the last state, and what held before each step."""

    parameters: Tensor
    logits: Tensor
    tokens: list[int]
    history: list[tuple[int, ...]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    log_likelihoods: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def partners(tokenizer: Any, reward_tokenizer: Any) -> list[list[int]]:
    """Every token's id in another vocabulary, or the ids of its pieces there."""
    theirs = reward_tokenizer.get_vocab()
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    assert [i for i, _ in pairs] == list(range(len(pairs)))
    cut = reward_tokenizer.backend_tokenizer
    return [
        [theirs[token]] if token in theirs else cut.encode(token, add_special_tokens=False).ids for _, token in pairs
    ]


def dense_dto(pair: DensePair, prefix: Sequence[int], start: Tensor, config: NablaConfig) -> DenseResult:
    """``config.max_iters`` steps of torch's Adam on the first row, or all rows, of ``start`` (m, d) or (m, V)."""
    moving = start[: len(start) if config.update_postfix else 1].clone().requires_grad_()
    resting = start[len(moving) :]
    soft, hard = _noise(pair, prefix, start, config)
    optimizer = torch.optim.Adam([moving], config.learning_rate, (0.9, 0.999), 1e-8, config.weight_decay)
    scheduler = published_schedule(optimizer, config)
    result = DenseResult(moving, moving, [])

    def relaxed() -> Tensor:
        rows = torch.cat([moving, resting])
        z = rows if config.parameterization == "logits" else pair.logits(rows)
        p = ((z + soft) / config.tau).softmax(-1)
        one_hot = torch.nn.functional.one_hot((z + hard).argmax(-1), pair.vocab_size).to(p.dtype)
        return one_hot + p - p.detach()

    for _ in range(config.max_iters):
        ahead = relaxed()
        if not config.update_postfix:
            ahead = torch.cat([ahead[:1], ahead[1:].detach()])
        log_likelihood, reward = pair.log_likelihood(prefix, ahead), pair.reward(prefix, ahead)
        optimizer.zero_grad()
        (-config.nll_coeff * log_likelihood - config.reward_coeff * reward).backward()
        result.history.append(tuple(ahead.argmax(-1).tolist()))
        result.rates.append(optimizer.param_groups[0]["lr"])
        result.log_likelihoods.append(log_likelihood.item())
        result.rewards.append(reward.item())
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        result.tokens = relaxed().argmax(-1).tolist()
        result.parameters = torch.cat([moving, resting]).detach()
        result.logits = (moving if config.parameterization == "logits" else pair.logits(moving)).detach().clone()
    return result


def published_schedule(optimizer: torch.optim.Optimizer, config: NablaConfig) -> LambdaLR:
    """The learning rate as the published code sets it: a factor of the number of steps made, for torch's LambdaLR."""
    warmup, total = config.warmup_iters, config.max_iters

    def factor(made: int) -> float:
        if made < warmup:
            return float(made) / float(warmup)
        left = float(total - made) / float(max(1, total - warmup))
        if config.lr_schedule == "linear":
            return max(config.min_lr_ratio, left)
        if config.lr_schedule == "cosine":
            return max(config.min_lr_ratio, 0.5 - 0.5 * math.cos(math.pi * left))
        return 1.0

    return LambdaLR(optimizer, factor)


def _noise(pair: DensePair, prefix: Sequence[int], start: Tensor, config: NablaConfig) -> tuple[Tensor, Tensor]:
    """What is added to the logits inside the softmax, and where the hard token is taken: (m, V) each."""
    (seed,) = sequence_seeds(config.seed, [pair.prompt])
    keys = [(seed, len(prefix) + row) for row in range(len(start))]
    drawn = gumbel(keys, pair.vocab_size, torch.device("cpu"))
    soft = (config.gumbel_noise * drawn).to(start.dtype)
    if config.anchor == "argmax":
        return soft, soft
    z = start if config.parameterization == "logits" else pair.logits(start)
    kept = warped_by_transformers(z, config.rollout).isfinite()
    return soft, (config.rollout.temperature * drawn).to(start.dtype).masked_fill(~kept, -torch.inf)


def warped_by_transformers(z: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k and top-p as generate() applies them; temperature above 0."""
    z = TemperatureLogitsWarper(sampling.temperature)(None, z)
    if sampling.top_k is not None:
        z = TopKLogitsWarper(sampling.top_k)(None, z)
    if sampling.top_p is not None:
        z = TopPLogitsWarper(sampling.top_p)(None, z)
    return z
