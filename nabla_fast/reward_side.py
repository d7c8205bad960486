"""The reward model's side of the objective: its caches, its graphs, and on a GPU its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.graphs import separate_stream
from nabla_fast.models.backbone import Cache, Inputs
from nabla_fast.models.graphed import Graphed, pooled_states
from nabla_fast.models.reward_model import RewardFrame, RewardModel
from nabla_fast.models.sequence_cache import SequenceCache, catch_up, common_lengths, reach
from nabla_fast.models.static import StaticPass
from nabla_fast.sequence import Sequence


class RewardSide:
    """Rewards and their gradients, behind what the reward model has cached of each sequence.

    Args:
        graphs: of the model, where it is captured.
        coefficient: of rewards in the objective.
    """

    def __init__(self, model: RewardModel, graphs: Graphed, coefficient: float) -> None:
        self.model, self.graphs, self.coefficient = model, graphs, coefficient

    def gradient(
        self, sequences: Seq[Sequence], responses: Seq[Tensor], starts: Seq[int]
    ) -> tuple[list[Tensor], Tensor]:
        """Per response b = dL/d(reward embedding weight row) (m, d_r) from its start on; the rewards."""
        model, cached = self.model, self.model.supports_prefix_cache
        known = [_cache(s) for s in sequences]
        frames = [_frame(s) for s in sequences]
        readings = [model.reading(y, frame) for y, frame in zip(responses, frames, strict=True)]
        skipped = [-len(frame.opening) for frame in frames]
        if cached:
            assert model.backbone is not None
            firsts = [reading.first(start) for reading, start in zip(readings, starts, strict=True)]
            skipped = catch_up(model.backbone, model.reading_table, known, [r.tokens for r in readings], firsts)
        each = zip(frames, readings, skipped, strict=True)
        inputs = [model.conversation(f, y, n if cached else None) for f, y, n in each]
        caches = [own.cache if cached else None for own in known]
        gradients: Seq[Tensor]
        after: Seq[Cache | None]
        out = self._by_graph(caches, inputs, gradient=True)
        if out is not None:
            assert out.gradient is not None
            gradients = out.gradient[: len(inputs)].unbind()
            rewards, after = out.values[: len(inputs)].clone(), [out.cache(i) for i in range(len(inputs))]
        else:
            inputs = [x.differentiable() for x in inputs]
            rewards, after = model.rewards(inputs, caches)
            if not rewards.requires_grad:
                raise ValueError(
                    f"{model.name} returned rewards without a gradient; it must be differentiable with respect to "
                    "inputs_embeds"
                )
            gradients = torch.autograd.grad(rewards.sum(), [x.embeds for x in inputs])
        factors = []
        for i, (own, reading) in enumerate(zip(known, readings, strict=True)):
            own.keep(reading.tokens, after[i])
            rows = model.response_rows(reading, inputs[i], gradients[i], starts[i], skipped[i])
            factors.append(scaled(rows, -self.coefficient * model.table.scale))
        return factors, rewards.detach()

    def rewards(self, sequences: Seq[Sequence], responses: Seq[Tensor], *, keep: bool, ended: Seq[bool]) -> Tensor:
        """Rewards (B,), as of `nabla_fast.objective.Objective.rewards`."""
        model = self.model
        known = [_cache(s) for s in sequences]
        readings = [model.reading(y, _frame(s)) for y, s in zip(responses, sequences, strict=True)]
        caches, inputs = [], []
        tokens = [reading.tokens for reading in readings]
        common = common_lengths(known, tokens) if model.supports_prefix_cache else [0] * len(known)
        for sequence, own, reading, shared, whole in zip(sequences, known, readings, common, ended, strict=True):
            start = min(shared, len(reading.tokens) - 1)
            caches.append(own.before(start) if start >= 0 else None)
            behind = None if caches[-1] is None else start
            inputs.append(model.conversation(_frame(sequence), reading, behind, ended=whole))
        # A proposal is mostly rejected, and what it shares with the trajectory stays; so only the first is kept.
        out = self._by_graph(caches, inputs, gradient=False)
        rewards, after = model.rewards(inputs, caches) if out is None else (out.values[: len(known)], [])
        for i, (own, read) in enumerate(zip(known, tokens, strict=True)):
            if keep or own.cache is None:
                own.keep(read, after[i] if out is None else out.cache(i))
        return rewards

    def read(self, sequences: Seq[Sequence], prefixes: Seq[Tensor]) -> None:
        """Makes the caches reach to the end of their prefixes (n_b,) int64, on the CPU."""
        model = self.model
        assert model.backbone is not None
        tokens = [model.reading(y, _frame(s)).tokens for y, s in zip(prefixes, sequences, strict=True)]
        reach(model.backbone, model.reading_table, [_cache(s) for s in sequences], tokens)

    def _by_graph(self, caches: Seq[Cache | None], conversations: Seq[Inputs], *, gradient: bool) -> StaticPass | None:
        """Rewards of conversations in one replay; None where the model is not captured."""
        if self.graphs.graphs is None:
            return None
        self.model.lengths(conversations, caches)
        at = pooled_states(self.model, conversations)
        return self.graphs.run(caches, conversations, [(at, 1)], gradient=gradient)


def _cache(sequence: Sequence) -> SequenceCache:
    if sequence.reward_cache is None:
        opening = _frame(sequence).opening
        # A copy where the caller is in inference mode, whose tensors autograd cannot use.
        sequence.reward_cache = SequenceCache(Inputs(opening.ids.clone(), opening.embeds.clone()))
    return sequence.reward_cache


def _frame(sequence: Sequence) -> RewardFrame:
    assert sequence.frame is not None, "a sequence without a frame is not scored"
    return sequence.frame


def scaled(gradient: Tensor, scale: float) -> Tensor:
    """``scale`` times a gradient (m, d) of a model, in bfloat16 where the model is.

    A backward pass in bfloat16 has no more bits than that, and float32 beside a bfloat16 table costs twice as much.
    Whether float16 can hold it depends on ``scale``, so that becomes float32.
    """
    return (gradient if gradient.dtype == torch.bfloat16 else ops.upcast(gradient)) * scale


class SideStream:
    """A stream beside the current one of a device; on a CPU, none.

    Whatever is computed on it is allocated on it, so memory is not reused while it is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = separate_stream(device) if device.type == "cuda" else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Runs the block on the stream, after what the device was given before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Afterwards, also after an error, the device's current stream waits for what the stream computes.

        Otherwise what that reads could be freed and written to meanwhile.
        """
        try:
            yield
        finally:
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Keeps the memory of tensors that the stream has allocated until the device's current stream has read them."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
