"""Log-likelihoods and rewards, and their gradients, as one captured graph each.

The operators of a gradient are thousands of launches, which take the host longer than a GPU the rest. Captured, they
are one. `nabla_fast.objective` asks here first, and computes as before where the answer is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.graphs import CaptureError, Graphs, usable
from nabla_fast.models import static
from nabla_fast.models.backbone import Backbone, Cache, Inputs
from nabla_fast.models.checks import warn_once
from nabla_fast.models.compiled_layers import CompiledLayers
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.static import StaticBackbone, StaticPass


class Graphed:
    """Passes of one model by captured graphs, for as long as they can be captured.

    Args:
        backbone: of the model; None for a reward function, which is never captured.
        value: of the last hidden states and more tensors, see `StaticBackbone`.
        wanted: whether graphs are asked for.
        compiled: whether its layers are to be compiled, on a CPU too, where nothing is captured then.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        value: Callable[..., tuple[Tensor, Tensor]],
        wanted: bool,
        compiled: bool = False,
    ) -> None:
        self._value = value
        self._static: StaticBackbone | None = None
        self._backbone = backbone
        if backbone is None:
            return
        device = backbone.embedding.weight.device
        wanted = wanted and usable(device)
        if not wanted and not compiled:
            return
        reason = static.why_not(backbone)
        if reason is not None:
            self._tell(reason)
            return
        layers = CompiledLayers(backbone.model, backbone.name) if compiled else None
        capture = wanted and not (compiled and device.type == "cpu")
        self._static = StaticBackbone(backbone, Graphs(device, capture=capture), layers)

    @property
    def graphs(self) -> Graphs | None:
        """The graphs made so far; None where nothing is captured."""
        return None if self._static is None else self._static.graphs

    def stats(self) -> dict[str, float]:
        """Captures and the seconds that they and compilation took."""
        if self._static is None:
            return {}
        own = self._static
        return {
            "captures": own.graphs.captures,
            "capture_seconds": own.graphs.seconds,
            "compile_seconds": own.compile_seconds,
        }

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
            out = self._static("value", caches, inputs, self._value, arguments, gradient=gradient)  # type: ignore[arg-type]
            self._require_compiled()
            return out
        except (CaptureError, torch.OutOfMemoryError) as error:
            # Gives the memory back before the same is computed without graphs.
            self._static = None
            self._tell(str(error).partition("\n")[0])
        return None

    def _require_compiled(self) -> None:
        """Warns, once, where layers ran as they are although they were to be compiled."""
        assert self._static is not None
        assert self._backbone is not None
        if self._static.compiled is not None and not self._static.compiled.used:
            name = self._backbone.name
            warn_once(self._backbone.model, f"compile has no effect on {name}: its layers are called in another way")

    def _tell(self, reason: str) -> None:
        assert self._backbone is not None
        warn_once(self._backbone.model, f"{self._backbone.name} runs without graphs, slower: {reason}")


def graphed_likelihood(model: LanguageModel, backend: str, wanted: bool, compiled: bool = False) -> Graphed:
    """Log-likelihoods (B, S + 1) of tokens.

    Its arguments: the tokens that each state predicts (B, S + 1) int64, and which of them count (B, S + 1) bool.
    """

    def value(states: Tensor, targets: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        flat = ops.linear_log_likelihood(states.flatten(0, 1), model.head, targets.flatten(), backend=backend)
        log_pi = flat.view(targets.shape)
        return torch.where(inside, log_pi, 0).sum(), log_pi

    return Graphed(model.backbone, value, wanted, compiled)


def graphed_rewards(model: RewardModel, wanted: bool, compiled: bool = False) -> Graphed:
    """Rewards (B,). Its argument: the index (B, 1) of the state that is scored, see `pooled_states`."""

    def value(states: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        assert model.head is not None
        pooled = states.gather(1, at.unsqueeze(-1).expand(-1, 1, states.shape[-1])).squeeze(1)
        rewards = model.head.score(pooled).squeeze(-1)
        return rewards.sum(), rewards.to(torch.promote_types(rewards.dtype, torch.float32))

    return Graphed(model.backbone, value, wanted, compiled)


def pooled_states(model: RewardModel, conversations: Sequence[Inputs]) -> list[Any]:
    """For each conversation (1,): the index among its prefix's last state and its own that is scored."""
    assert model.head is not None
    skips = model.head.skips
    if skips is None:
        return [x.ids.new_tensor([len(x)]) for x in conversations]
    places = [torch.where(x.ids != skips, torch.arange(1, len(x) + 1, device=x.device), 0) for x in conversations]
    return [place.amax(0, keepdim=True) for place in places]
