"""What a model has computed of each sequence under way, and how it is brought up to date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nabla_fast import ops
from nabla_fast.models.body import Body, Inputs, State, joined

# Tokens up to which a forward pass takes about as long as of one: reading the weights, and on a GPU launching kernels,
# is what takes the time. On a CPU that ends soon (`benchmarks/test_bench_rollouts.py`).
TOKENS_PER_PASS = {"cpu": 8, "cuda": 256}


class Track:
    """What one model has made of one sequence: everything before the response, and the response up to a token.

    Args:
        opening: the P >= 1 tokens before the response.

    Attributes:
        tokens: (k,) int64 response tokens that ``state`` covers.
        state: of P + k tokens; None before the first pass.
    """

    def __init__(self, opening: Inputs) -> None:
        self.opening = opening
        self.tokens = torch.empty(0, dtype=torch.long, device=opening.device)
        self.state: State | None = None

    def keep(self, tokens: Tensor, state: State | None) -> None:
        """Remembers ``state`` up to what the opening and ``tokens`` (k,) cover, where it can be cut there.

        The tokens may be on any device.
        """
        kept = None if state is None else state.crop(len(self.opening) + len(tokens))
        if kept is not None:
            self.tokens, self.state = tokens[: len(kept) - len(self.opening)].to(self.tokens.device), kept

    def before(self, length: int) -> State | None:
        """The state of the opening and the first ``length`` response tokens, where this one reaches so far and can be
        cut there."""
        reaches = self.state is not None and length <= len(self.tokens)
        return self.state.crop(len(self.opening) + length) if reaches and self.state is not None else None


def resume(body: Body, table: Any, tracks: Sequence[Track], responses: Sequence[Tensor]) -> list[Any]:
    """The state of each track's opening and response, without autograd; the tracks stay as they are.

    What a track has in common with its response is taken from it; what is missing then is run in one batch, or alone
    where the model runs sequences alone.

    Args:
        table: the input embeddings; ``table.inputs`` maps token ids (n,) to `Inputs`.
        responses: (n_b,) int64 each.
    """
    states: list[State | None] = []
    missing = []
    for track, common, response in zip(tracks, common_lengths(tracks, responses), responses, strict=True):
        state = track.before(common)
        rest = table.inputs(response if state is None else response[common:])
        states.append(state)
        missing.append(joined([track.opening, rest]) if state is None else rest)
    behind = [i for i, rest in enumerate(missing) if len(rest)]
    if behind:
        _, after = body.extend([states[i] for i in behind], [missing[i] for i in behind])
        for i, extended in zip(behind, after, strict=True):
            states[i] = extended
    return [state for state in states if state is not None]


def catch_up(
    body: Body, table: Any, tracks: Sequence[Track], responses: Sequence[Tensor], starts: Sequence[int]
) -> list[int]:
    """Brings each track to the first ``starts[b]`` tokens of its response, or almost; see `resume`.

    Returns:
        How many tokens of its response each track covers: ``starts[b]``, or fewer where the rest costs less as a part
        of the pass that follows than as a pass of its own.
    """
    known = [response[:start] for response, start in zip(responses, starts, strict=True)]
    covered = common_lengths(tracks, known)
    most = TOKENS_PER_PASS.get(known[0].device.type, 0)
    far = []
    for i, (track, response) in enumerate(zip(tracks, known, strict=True)):
        state = track.before(covered[i])
        if state is None or len(response) - covered[i] > most:
            far.append(i)
        else:
            track.keep(response[: covered[i]], state)
    if far:
        states = resume(body, table, [tracks[i] for i in far], [known[i] for i in far])
        for i, state in zip(far, states, strict=True):
            tracks[i].keep(known[i], state)
            covered[i] = len(known[i])
    return covered


def common_lengths(tracks: Sequence[Track], responses: Sequence[Tensor]) -> list[int]:
    """How many leading tokens each track shares with its response; one read by the host."""
    width = min(max(len(t.tokens) for t in tracks), max(len(r) for r in responses))
    if width == 0:
        return [0] * len(tracks)
    old, new = (
        torch.stack([pad(x[:width], (0, width - min(len(x), width)), value=filler) for x in rows])
        for rows, filler in (([t.tokens for t in tracks], -1), (responses, -2))
    )
    first: list[int] = ops.token_diff(old, new)[0].tolist()
    return first
