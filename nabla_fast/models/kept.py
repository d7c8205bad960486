"""Captured graphs that outlast a decode: they are kept for the next one with the same model and the same settings.

They hold no reference to the model, and are kept by a weak one, so that they are gone when it is. A set of
graphs serves one decode at a time, which takes it and leaves it again; whoever finds none makes new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from nabla_fast.models.fingerprint import fingerprint, plain_values

T = TypeVar("T")

# Sets of graphs that are kept for one model, at the most: of other settings, and of decodes that ran at once.
_MOST = 4


class _Shelf:
    """What is kept for one model in one state."""

    def __init__(self, state: int) -> None:
        self.state = state
        self.idle: list[tuple[Hashable, Any]] = []
        self.refused: dict[Hashable, str] = {}


_SHELVES: WeakKeyDictionary[Any, _Shelf] = WeakKeyDictionary()
# Garbage that is collected in between may leave graphs itself.
_lock = threading.RLock()


class Place:
    """Where the graphs of one model and the same settings lie between decodes.

    Args:
        model: a transformers model. Where it has changed since graphs were captured, those are given up.
        settings: all that captures depend on besides the model. They are kept as well.
    """

    def __init__(self, model: Any, *settings: Hashable) -> None:
        self._key = (*settings, _surroundings(model))
        state = _state(model)
        with _lock:
            shelf = _SHELVES.get(model)
            if shelf is None or shelf.state != state:
                shelf = _SHELVES[model] = _Shelf(state)
        # Of the model as it is now: what is left there when it has changed again is found by nobody.
        self._shelf = shelf

    def take(self, make: Callable[[], T]) -> T:
        """What was left last, for this user alone; where there is nothing, it is made."""
        with _lock:
            for i, (key, _) in reversed([*enumerate(self._shelf.idle)]):
                if key == self._key:
                    found: T = self._shelf.idle.pop(i)[1]
                    return found
        return make()

    def leave(self, graphs: Any) -> None:
        """Leaves graphs, which must hold no reference to the model, for the next user."""
        with _lock:
            self._shelf.idle.append((self._key, graphs))
            del self._shelf.idle[:-_MOST]

    @property
    def refused(self) -> str | None:
        """Why nothing can be captured here, as far as was found out."""
        return self._shelf.refused.get(self._key)

    def refuse(self, reason: str) -> None:
        """Nothing can be captured here."""
        self._shelf.refused[self._key] = reason


def clear_graphs() -> None:
    """Frees the graphs that earlier calls have captured, and their memory on the GPU.

    They are kept for later calls with the same models, and freed with these at the latest. Those of a call under way
    are freed when it ends.
    """
    with _lock:
        _SHELVES.clear()
    if torch.cuda.is_initialized():  # pragma: no cover - needs a GPU
        torch.cuda.empty_cache()


def _state(model: Any) -> int:
    """What captures hold of a model: `fingerprint`, and the configurations and forward passes of its modules."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    plain = [pair for config in configs.values() for pair in plain_values(config)]
    forwards = [id(getattr(type(module), "forward", None)) for module in modules]
    return hash((fingerprint(model), *plain, *forwards))


def _surroundings(model: Any) -> Hashable:
    """Settings of PyTorch that choose the kernels of a capture."""
    device, switches = model.get_input_embeddings().weight.device.type, torch.backends.cuda
    return (
        device,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        switches.flash_sdp_enabled(),
        switches.mem_efficient_sdp_enabled(),
        switches.math_sdp_enabled(),
    )
