"""Log-likelihoods and rewards, and their gradients, as one captured graph each.

The operators of a gradient are thousands of launches, which take the host longer than a GPU the rest. Captured, they
are one. `nabla_fast.objective` asks here first, and computes as before where the answer is None.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.graphs import CaptureError, Graphs, usable
from nabla_fast.models import static
from nabla_fast.models.backbone import Backbone, Cache, Inputs
from nabla_fast.models.checks import warn_once
from nabla_fast.models.decoder_layers import CompiledLayers
from nabla_fast.models.kept import Place, clear_graphs
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.static import StaticBackbone, StaticPass
from nabla_fast.ops.backends import setting


class Graphed:
    """Passes of one model by captured graphs, for as long as they can be captured.

    The graphs are those that an earlier one has left, if there are any, and `close` leaves them to the next.

    Args:
        backbone: of the model; None for a reward function, which is never captured.
        value: of the last hidden states and more tensors, see `StaticBackbone`.
        settings: all that ``value`` depends on besides the model.
        wanted: whether graphs are asked for.
        compiled: whether its layers are to be compiled, on a CPU too, where nothing is captured then.
        watched: tensors that ``value`` reads and the model does not have.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        value: Callable[..., tuple[Tensor, Tensor]],
        settings: Sequence[Hashable],
        wanted: bool,
        compiled: bool = False,
        watched: tuple[Tensor, ...] = (),
    ) -> None:
        self._static: StaticBackbone | None = None
        self._stats: dict[str, float] = {}
        if backbone is None:
            return
        self._backbone = backbone
        device = backbone.embedding.weight.device
        wanted = wanted and usable(device)
        if not wanted and not compiled:
            return
        reason = static.why_not(backbone)
        capture = wanted and not (compiled and device.type == "cpu")
        # With the fused layers, whose tensors captures hold, too.
        self._place = Place(backbone.model, "gradients", *settings, backbone.fused, compiled, capture)
        reason = reason or self._place.refused
        if reason is not None:
            self._tell(reason)
            return
        layers = CompiledLayers(backbone.model, backbone.name) if compiled else None
        graphs = self._place.take(lambda: Graphs(device, capture=capture))
        self._static = StaticBackbone(backbone, value, graphs, layers, watched)

    @property
    def graphs(self) -> Graphs | None:
        """The graphs made so far; None where nothing is captured."""
        return None if self._static is None else self._static.graphs

    def stats(self) -> dict[str, float]:
        """Captures and the seconds that they and compilation took; empty where neither was to be done."""
        own = self._static
        if own is not None:
            self._stats = {
                "captures": own.counts.captures,
                "capture_seconds": own.counts.seconds,
                "compile_seconds": own.compile_seconds,
            }
        return self._stats

    def close(self, *, keep: bool = True) -> None:
        """Leaves the graphs to the next user, or gives them up. From here on the model runs without."""
        self.stats()
        own, self._static = self._static, None
        if own is not None and keep:
            own.graphs.end()
            self._place.leave(own.graphs)

    def run(
        self,
        caches: Sequence[Cache | None],
        inputs: Sequence[Inputs],
        arguments: Sequence[tuple[Sequence[Tensor], int | None]],
        *,
        gradient: bool,
    ) -> StaticPass | None:
        """The pass, or None where the model runs without graphs."""
        if self._static is None or not any(len(x) for x in inputs):
            return None
        try:
            out = self._static(caches, inputs, arguments, gradient=gradient)  # type: ignore[arg-type]
        except (CaptureError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
            # Gives the memory back before the same is computed without graphs.
            self.close(keep=False)
            if isinstance(error, CaptureError):
                self._place.refuse(reason)
            else:
                clear_graphs()
            self._tell(reason)
            return None
        if self._static.compiled is not None and not self._static.compiled.used:
            name = self._backbone.name
            warn_once(self._backbone.model, f"compile has no effect on {name}: its layers are called in another way")
        return out

    def _tell(self, reason: str) -> None:
        warn_once(self._backbone.model, f"{self._backbone.name} runs without graphs, slower: {reason}")


def graphed_likelihood(model: LanguageModel, backend: str, wanted: bool, compiled: bool = False) -> Graphed:
    """Log-likelihoods (B, S + 1) of tokens.

    Its arguments: the tokens that each state predicts (B, S + 1) int64, and which of them count (B, S + 1) bool.
    """

    def value(states: Tensor, targets: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        flat = ops.linear_log_likelihood(states.flatten(0, 1), model.head, targets.flatten(), backend=backend)
        log_pi = flat.view(targets.shape)
        return torch.where(inside, log_pi, 0).sum(), log_pi

    settings = ("likelihood", setting(backend), *head_settings(model))
    # A head with a bias is a copy.
    return Graphed(model.backbone, value, settings, wanted, compiled, watched=(model.head.weight,))


def head_settings(model: LanguageModel) -> tuple[Hashable, ...]:
    """What captures hold of the output head besides its weights; the tokenizer says how many rows it has."""
    weight, *others = model.head
    return weight.shape, *others


def graphed_rewards(model: RewardModel, wanted: bool, compiled: bool = False) -> Graphed:
    """Rewards (B,). Its argument: the index (B, 1) of the state that is scored, see `pooled_states`.

    A process reward model, which is read at several states, some of them in its prefix, runs without.
    """

    def value(states: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        assert model.head is not None
        assert model.head.score is not None
        pooled = states.gather(1, at.unsqueeze(-1).expand(-1, 1, states.shape[-1])).squeeze(1)
        rewards = model.head.score(pooled).squeeze(-1)
        return rewards.sum(), rewards.to(torch.promote_types(rewards.dtype, torch.float32))

    backbone = None if model.head is None else model.head.backbone
    return Graphed(backbone, value, ("rewards",), wanted, compiled)


def pooled_states(model: RewardModel, conversations: Sequence[Inputs]) -> list[Any]:
    """For each conversation (1,): the index among its prefix's last state and its own that is scored."""
    assert model.head is not None
    skips = model.head.skips
    if skips is None:
        return [x.ids.new_tensor([len(x)]) for x in conversations]
    places = [torch.where(x.ids != skips, torch.arange(1, len(x) + 1, device=x.device), 0) for x in conversations]
    return [place.amax(0, keepdim=True) for place in places]
