"""Gumbel-max sampling whose noise depends on (sequence seed, position) alone.

Sampling from softmax(x) is argmax(x + g) with Gumbel noise g. Here g is a hash of (seed, position, token), so
a batch, a draft, a replay or another device changes nothing, and there is no generator whose state could drift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.config import Sampling
from nabla_fast.ops import noise
from nabla_fast.ops.noise import NoiseKey
from nabla_fast.ops.warp import warp as warped_logits
from nabla_fast.sequence import Sequence

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Maps (input_ids (B, T), scores (B, V)) to scores, as transformers' logits processors do."""

_LIFT = 1e-4


class Processors(NamedTuple):
    """Logits processors around temperature, top-k and top-p.

    Attributes:
        before: applied first.
        warpers: applied after temperature, top-k and top-p; greedy decoding does without them.
        after: applied last.
    """

    before: list[LogitsProcessor]
    warpers: list[LogitsProcessor]
    after: list[LogitsProcessor]


class Sampler:
    """Draws the next token of a batch of sequences, without logits processors."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the logits processors."""
        return ()

    @property
    def repetition_penalty(self) -> float | None:
        """The repetition penalty if it is the only logits processor, 1 without any, else None."""
        return 1.0

    @property
    def width(self) -> int:
        """Entries of the scores that processors see, where that is more than those of the logits."""
        return 0

    def processors(self, sequence: Sequence) -> Processors:
        """The logits processors of one sequence."""
        return Processors([], [], [])

    def __call__(
        self, logits: Tensor, sampling: Sampling, sequences: Seq[Sequence], responses: Seq[tuple[int, ...]]
    ) -> Tensor:
        """One token (B,) per row of logits (B, V): the one that follows each response of its sequence."""
        scores, left = self.processed(logits, sampling, sequences, responses)
        keys = [(s.seed, len(response)) for s, response in zip(sequences, responses, strict=True)]
        return draw(scores, left, keys)

    def processed(
        self, logits: Tensor, sampling: Sampling, sequences: Seq[Sequence], responses: Seq[tuple[int, ...]]
    ) -> tuple[Tensor, Sampling]:
        """The logits (B, V) behind the logits processors, -inf where a token is forbidden; and what of ``sampling`` is
        still to be done with them. At temperature 0 processors that sampling alone has are left out."""
        processors = [self.processors(sequence) for sequence in sequences]
        scores = _process([p.before for p in processors], logits, sequences, responses, self.width)
        last = [(*(p.warpers if sampling.temperature else ()), *p.after) for p in processors]
        if any(last):
            # At temperature 0 the argmax comes last: a row with one token left cannot be changed any more.
            if sampling.temperature:
                scores, sampling = warp(scores, sampling), Sampling()
            scores = _process(last, scores, sequences, responses, self.width)
        return scores, sampling


def sequence_seeds(seed: int, prompts: Seq[Seq[int]]) -> list[int]:
    """The seeds (64 bits) of the sequences of a call made with ``seed``.

    A sequence's seed depends on its prompt and on how often the same prompt came before it in the call. So a
    prompt gets the same noise alone and in any batch, and repeated prompts get different noise.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        key = tuple(prompt)
        word = noise.mix64(seed)
        for token in (*key, seen[key]):
            word = noise.mix64(word ^ token)
        seen[key] += 1
        seeds.append(word)
    return seeds


def gumbel(keys: Seq[NoiseKey], vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise (N, V), float32: row n is a pure function of keys[n] and the token index.

    Args:
        keys: N pairs (sequence seed, position).
        vocab_size: V. A smaller V gives a prefix of the same noise.
    """
    low, high = noise.key_words(keys, device)
    return noise.gumbel(low.unsqueeze(1), high.unsqueeze(1), torch.arange(vocab_size, device=device).unsqueeze(0))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Applies temperature, then top-k, then top-p to logits (N, V); removed tokens become -inf.

    Equal to transformers' warpers. At temperature 0 every token but the argmax is removed.
    """
    if sampling.temperature == 0:
        only = torch.full_like(logits, -torch.inf)
        best = logits.argmax(-1, keepdim=True)
        return only.scatter(-1, best, logits.gather(-1, best))
    return warped_logits(ops.upcast(logits), sampling.temperature, sampling.top_k, sampling.top_p)


def draw(logits: Tensor, sampling: Sampling, keys: Seq[NoiseKey]) -> Tensor:
    """One token (N,) per row of ``warp(logits, sampling)``, by Gumbel-max with the noise of ``keys``, in one operator.

    Raises:
        FloatingPointError: if a row of logits (N, V) holds NaN or +inf, or no token is left in it.
    """
    words = noise.key_words(keys, logits.device)
    tokens = ops.draw_token(logits.detach(), *words, sampling.temperature, sampling.top_k, sampling.top_p)
    if len(keys) and int(tokens.amin()) < 0:
        row = int((tokens < 0).nonzero()[0])
        raise FloatingPointError(
            f"no token can be drawn from row {row} of the logits: it holds NaN or infinity, or every token was "
            "forbidden, by a logits processor perhaps"
        )
    return tokens


def anchor_noise(logits: Tensor, sampling: Sampling, keys: Seq[NoiseKey], tokens: Tensor | None = None) -> Tensor:
    """Noise n (N, V) such that argmax(logits + n) is what ``sampling`` drew from ``logits`` with ``keys``.

    That is temperature * gumbel, and -inf on tokens that the warpers removed.

    Args:
        logits: (N, V) that the rollout was drawn from.
        tokens: (N,) what was drawn, where it is known; rounding, or a logits processor of the caller's, can have
            made another choice than the recomputed logits do, and these tokens win.
    """
    warped = warp(logits, sampling)
    words = noise.key_words(keys, logits.device)
    anchor = noise.with_noise(torch.zeros_like(warped), warped, *words, sampling.temperature).to(logits.dtype)
    if tokens is None:
        return anchor
    drawn = tokens.unsqueeze(-1)
    perturbed = logits + anchor
    best, winner = perturbed.max(-1, keepdim=True)
    own = logits.gather(-1, drawn)
    # The margin is well above what float32 kernels that sum in another order make of the same logits.
    lifted = best - own + _LIFT * (1 + best.abs() + own.abs())
    return torch.where(winner == drawn, anchor, anchor.scatter(-1, drawn, lifted))


def _process(
    processors: Seq[Seq[LogitsProcessor]],
    scores: Tensor,
    sequences: Seq[Sequence],
    responses: Seq[tuple[int, ...]],
    width: int,
) -> Tensor:
    """Applies each row's own processors to scores (B, V), widened by -inf to ``width`` columns meanwhile."""
    if not any(processors):
        return scores
    size = scores.shape[-1]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide = torch.nn.functional.pad(wide, (0, max(0, width - size)), value=-torch.inf)
    processed = []
    # Row by row, without padding: a processor that counts tokens must not see pad tokens.
    for row, (own, sequence, response) in enumerate(zip(processors, sequences, responses, strict=True)):
        ids = torch.tensor([(*sequence.prompt_ids, *response)], device=scores.device)
        # A copy, because many processors write into what they are given.
        row_scores = wide[row : row + 1].clone()
        for processor in own:
            row_scores = processor(ids, row_scores)
        processed.append(row_scores[:, :size])
    return torch.cat(processed)
