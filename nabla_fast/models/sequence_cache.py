"""The cache of one sequence in one model, and how it is brought up to date with the tokens of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nabla_fast import ops
from nabla_fast.models.backbone import Backbone, Cache, Inputs, joined

# Tokens up to which a forward pass takes about as long as of one: reading the weights, and on a GPU launching kernels,
# is what takes the time. On a CPU that ends soon (`benchmarks/test_bench_rollouts.py`).
TOKENS_PER_PASS = {"cpu": 8, "cuda": 256}


class SequenceCache:
    """What one model has computed of one sequence: of its prompt, and of the first tokens of its response.

    Args:
        prompt: the P >= 1 tokens before the response.

    Attributes:
        tokens: (k,) int64 response tokens that ``cache`` covers, on the CPU.
        cache: of P + k tokens; None before the first pass.
    """

    def __init__(self, prompt: Inputs) -> None:
        self.prompt = prompt
        self.tokens = torch.empty(0, dtype=torch.long)
        self.cache: Cache | None = None

    def keep(self, tokens: Tensor, cache: Cache | None) -> None:
        """Keeps ``cache``, cropped to the prompt and ``tokens`` (k,), on the CPU, of the response, unless it cannot be
        cropped so."""
        kept = None if cache is None else cache.crop(len(self.prompt) + len(tokens))
        if kept is not None:
            self.tokens, self.cache = tokens[: len(kept) - len(self.prompt)], kept

    def before(self, length: int) -> Cache | None:
        """The cache of the prompt and the first ``length`` response tokens; None where it does not reach so far or
        cannot be cropped."""
        reaches = self.cache is not None and length <= len(self.tokens)
        return self.cache.crop(len(self.prompt) + length) if reaches and self.cache is not None else None


def extended(backbone: Backbone, table: Any, caches: Sequence[SequenceCache], responses: Sequence[Tensor]) -> list[Any]:
    """The cache of each whole prompt and response, without autograd; ``caches`` stay as they are.

    The tokens that a cache has in common with its response are reused, the others run in one batch, or alone where the
    model runs sequences alone.

    Args:
        table: the input embeddings; ``table.inputs`` maps token ids (n,) to `Inputs`.
        responses: (n_b,) int64 each, on the CPU.
    """
    results: list[Cache | None] = []
    missing = []
    for cache, common, response in zip(caches, common_lengths(caches, responses), responses, strict=True):
        known = cache.before(common)
        rest = table.inputs(response if known is None else response[common:])
        results.append(known)
        missing.append(joined([cache.prompt, rest]) if known is None else rest)
    behind = [i for i, rest in enumerate(missing) if len(rest)]
    if behind:
        _, after = backbone.extend([results[i] for i in behind], [missing[i] for i in behind])
        for i, longer in zip(behind, after, strict=True):
            results[i] = longer
    return [result for result in results if result is not None]


def reach(backbone: Backbone, table: Any, caches: Sequence[SequenceCache], responses: Sequence[Tensor]) -> None:
    """Makes each cache cover its whole response; one that does already stays as it is. See `extended`."""
    common = common_lengths(caches, responses)
    behind = [i for i, y in enumerate(responses) if common[i] < len(y) or caches[i].before(len(y)) is None]
    own, new = [caches[i] for i in behind], [responses[i] for i in behind]
    for cache, response, longer in zip(own, new, extended(backbone, table, own, new) if own else [], strict=True):
        cache.keep(response, longer)


def catch_up(
    backbone: Backbone,
    table: Any,
    caches: Sequence[SequenceCache],
    responses: Sequence[Tensor],
    starts: Sequence[int],
) -> list[int]:
    """Makes each cache cover the first ``starts[b]`` tokens of its response, or almost; see `extended`.

    Returns:
        How many tokens of its response each cache covers: ``starts[b]``, or fewer where the rest costs less as a part
        of the pass that follows than as a pass of its own.
    """
    known = [response[:start] for response, start in zip(responses, starts, strict=True)]
    covered = common_lengths(caches, known)
    most = TOKENS_PER_PASS.get(backbone.device.type, 0)
    far = []
    for i, (cache, response) in enumerate(zip(caches, known, strict=True)):
        before = cache.before(covered[i])
        if before is None or len(response) - covered[i] > most:
            far.append(i)
        else:
            cache.keep(response[: covered[i]], before)
    if far:
        results = extended(backbone, table, [caches[i] for i in far], [known[i] for i in far])
        for i, result in zip(far, results, strict=True):
            caches[i].keep(known[i], result)
            covered[i] = len(known[i])
    return covered


def common_lengths(caches: Sequence[SequenceCache], responses: Sequence[Tensor]) -> list[int]:
    """How many leading tokens each cache shares with its response, on the CPU."""
    width = min(max(len(c.tokens) for c in caches), max(len(r) for r in responses))
    if width == 0:
        return [0] * len(caches)
    old, new = (
        torch.stack([pad(x[:width], (0, width - min(len(x), width)), value=filler) for x in rows])
        for rows, filler in (([c.tokens for c in caches], -1), (responses, -2))
    )
    first: list[int] = ops.token_diff(old, new).first.tolist()
    return first
