"""Gumbel-max sampling whose noise depends on (sequence seed, position) alone.

Sampling from softmax(x) is argmax(x + g) with Gumbel noise g. Here g is a hash of (seed, position, token), so
a batch, a draft, a replay or another device changes nothing, and there is no generator whose state could drift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.sequence import Sequence

NoiseKey = tuple[int, int]
"""(sequence seed, position in the response)."""

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Maps (input_ids (B, T), scores (B, V)) to scores, as transformers' logits processors do."""

_MASK = 0xFFFFFFFF
_LIFT = 1e-4
# Tokens among which a nucleus is looked for before all are sorted, which takes thirty times as long.
_LIKELIEST = 256
# Above it, what float32 makes of the sum over the likeliest tokens no longer tells which of the others belong to them.
_NEARLY_ALL = 1 - 1e-4


@dataclass(frozen=True)
class Processors:
    """Logits processors around temperature, top-k and top-p.

    Attributes:
        before: applied first.
        warpers: applied after temperature, top-k and top-p; greedy decoding does without them.
        after: applied last.
    """

    before: tuple[LogitsProcessor, ...] = ()
    warpers: tuple[LogitsProcessor, ...] = ()
    after: tuple[LogitsProcessor, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Draws the next token of a batch of sequences.

    Attributes:
        before, after: logits processors, see `Processors`.
    """

    before: tuple[LogitsProcessor, ...] = ()
    after: tuple[LogitsProcessor, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the logits processors."""
        return tuple(getattr(p, "__name__", type(p).__name__) for p in (*self.before, *self.after))

    @property
    def repetition_penalty(self) -> float | None:
        """The repetition penalty if it is the only logits processor, 1 without any, else None."""
        return None if self.names else 1.0

    @property
    def width(self) -> int:
        """Entries of the scores that processors see, where that is more than those of the logits."""
        return 0

    def processors(self, sequence: Sequence) -> Processors:
        """The logits processors of one sequence."""
        return Processors(self.before, (), self.after)

    def __call__(
        self, logits: Tensor, sampling: Sampling, sequences: Seq[Sequence], responses: Seq[tuple[int, ...]]
    ) -> Tensor:
        """One token (B,) per row of logits (B, V): the one that follows each response of its sequence."""
        processors = [self.processors(sequence) for sequence in sequences]
        texts = [(*s.prompt_ids, *response) for s, response in zip(sequences, responses, strict=True)]
        scores = _process([p.before for p in processors], logits, texts, self.width)
        if sampling.temperature == 0:
            # The argmax last: what is left of a row with one token cannot be changed any more.
            scores = warp(_process([p.after for p in processors], scores, texts, self.width), sampling)
        else:
            both = [(*p.warpers, *p.after) for p in processors]
            scores = _process(both, warp(scores, sampling), texts, self.width)
        return sample(scores, [(s.seed, len(response)) for s, response in zip(sequences, responses, strict=True)])


def sequence_seeds(seed: int, prompts: Seq[Seq[int]]) -> list[int]:
    """The seeds (64 bits) of the sequences of a call made with ``seed``.

    A sequence's seed depends on its prompt and on how often the same prompt came before it in the call. So a
    prompt gets the same noise alone and in any batch, and repeated prompts get different noise.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        key = tuple(prompt)
        word = _mix64(seed)
        for token in (*key, seen[key]):
            word = _mix64(word ^ token)
        seen[key] += 1
        seeds.append(word)
    return seeds


def gumbel(keys: Seq[NoiseKey], vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise (N, V), float32: row n is a pure function of keys[n] and the token index.

    Args:
        keys: N pairs (sequence seed, position).
        vocab_size: V. A smaller V gives a prefix of the same noise.
    """
    low, high = _words(keys, device)
    return _gumbel(low.unsqueeze(1), high.unsqueeze(1), torch.arange(vocab_size, device=device).unsqueeze(0))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Applies temperature, then top-k, then top-p to logits (N, V); removed tokens become -inf.

    Equal to transformers' warpers. At temperature 0 every token but the argmax is removed.
    """
    if sampling.temperature == 0:
        only = torch.full_like(logits, -torch.inf)
        best = logits.argmax(-1, keepdim=True)
        return only.scatter(-1, best, logits.gather(-1, best))
    x = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < x.shape[-1]:
        kth = x.topk(sampling.top_k, dim=-1).values[:, -1:]
        x = x.masked_fill(x < kth, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        x = _nucleus(x, sampling.top_p)
    return x


def sample(warped: Tensor, keys: Seq[NoiseKey]) -> Tensor:
    """One token (N,) per row of warped logits (N, V), by Gumbel-max with the noise of ``keys``."""
    return _with_noise(warped, warped, keys, 1.0).argmax(-1)


def anchor_noise(logits: Tensor, sampling: Sampling, keys: Seq[NoiseKey], tokens: Tensor | None = None) -> Tensor:
    """Noise n (N, V) such that argmax(logits + n) is what ``sampling`` drew from ``logits`` with ``keys``.

    That is temperature * gumbel, and -inf on tokens that the warpers removed.

    Args:
        logits: (N, V) that the rollout was drawn from.
        tokens: (N,) what was drawn, where it is known; rounding, or a logits processor of the caller's, can have
            made another choice than the recomputed logits do, and these tokens win.
    """
    warped = warp(logits, sampling)
    noise = _with_noise(torch.zeros_like(warped), warped, keys, sampling.temperature).to(logits.dtype)
    if tokens is None:
        return noise
    drawn = tokens.unsqueeze(-1)
    perturbed = logits + noise
    best, winner = perturbed.max(-1, keepdim=True)
    own = logits.gather(-1, drawn)
    # The margin is well above what float32 kernels that sum in another order make of the same logits.
    lifted = best - own + _LIFT * (1 + best.abs() + own.abs())
    return torch.where(winner == drawn, noise, noise.scatter(-1, drawn, lifted))


def _nucleus(x: Tensor, top_p: float) -> Tensor:
    """Removes what lies outside the smallest set of tokens whose probability reaches ``top_p``."""
    if top_p > _NEARLY_ALL:
        return _without_tail(x, top_p)
    probabilities = x.softmax(-1)
    likeliest = probabilities.topk(min(_LIKELIEST, x.shape[-1]), dim=-1)
    inside = likeliest.values.cumsum(-1) - likeliest.values < top_p
    kept = torch.full_like(x, -torch.inf)
    kept = kept.scatter(-1, likeliest.indices, x.gather(-1, likeliest.indices).masked_fill(~inside, -torch.inf))
    # A row's own matter, so that no other row of the batch changes it.
    wide = inside[:, -1].nonzero()[:, 0]
    if len(wide) and likeliest.indices.shape[-1] < x.shape[-1]:
        kept[wide] = _without_tail(x[wide], top_p)
    return kept


def _without_tail(x: Tensor, top_p: float) -> Tensor:
    """`_nucleus` by a sum from the least likely token up, which is exact however little the tail makes."""
    ordered, index = x.softmax(-1).sort(dim=-1)
    outside = ordered.cumsum(-1) <= 1 - top_p
    outside[:, -1] = False
    return x.masked_fill(outside.scatter(-1, index, outside), -torch.inf)


def _with_noise(values: Tensor, warped: Tensor, keys: Seq[NoiseKey], scale: float) -> Tensor:
    """``values`` (N, V) plus ``scale`` times Gumbel noise; -inf on the tokens that ``warped`` (N, V) has removed."""
    rows, tokens = (warped != -torch.inf).nonzero(as_tuple=True)
    low, high = _words(keys, warped.device)
    # Warped rows mostly keep a handful of tokens; noise for the others would cost more than the model's own step.
    noise = scale * _gumbel(low[rows], high[rows], tokens)
    result = torch.full_like(values, -torch.inf, dtype=torch.promote_types(values.dtype, torch.float32))
    result[rows, tokens] = values[rows, tokens] + noise
    return result


def _words(keys: Seq[NoiseKey], device: torch.device) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits (N,), as int64, of a hash of each key."""
    words = [_mix64(_mix64(seed) + position) for seed, position in keys]
    halves = [[word & _MASK for word in words], [word >> 32 for word in words]]
    low, high = torch.tensor(halves, dtype=torch.long, device=device)
    return low, high


def _gumbel(low: Tensor, high: Tensor, token: Tensor) -> Tensor:
    """The noise, float32, of broadcastable key words and token indices."""
    bits = _hash32(_hash32(token ^ low) ^ high)
    # Exponential noise keeps its relative precision where it matters, near 0, because u is small there.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2**-24)))


def _process(processors: Seq[Seq[LogitsProcessor]], scores: Tensor, texts: Seq[tuple[int, ...]], width: int) -> Tensor:
    """Applies each row's own processors to scores (B, V), widened by -inf to ``width`` columns meanwhile.

    Args:
        texts: the token ids, prompt and response, that each row's token follows.
    """
    if not any(processors):
        return scores
    size = scores.shape[-1]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide = torch.nn.functional.pad(wide, (0, max(0, width - size)), value=-torch.inf)
    rows = []
    # Row by row, without padding: a processor that counts tokens must not see pad tokens.
    for row, (own, text) in enumerate(zip(processors, texts, strict=True)):
        ids = torch.tensor([text], device=scores.device)
        # A copy, because many processors write into what they are given.
        row_scores = wide[row : row + 1].clone()
        for processor in own:
            row_scores = processor(ids, row_scores)
        rows.append(row_scores[:, :size])
    return torch.cat(rows)


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (two multiply-xorshift rounds) of int64 values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _mix64(x: int) -> int:
    """SplitMix64's output function, so that neighbouring seeds and positions give unrelated noise."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
