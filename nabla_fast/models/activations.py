"""Which activations a forward pass keeps for the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nabla_fast.models.torch_kernels import fast_kernels

_lock = threading.Lock()
# What some block has changed for now: how many blocks want it so, in all threads, and how it is put back.
_changed: dict[tuple[str, int], tuple[int, Callable[[], Any]]] = {}


@contextmanager
def _while_any(kind: str, items: Iterable[Any], change: Callable[[Any], Callable[[], Any] | None]) -> Iterator[None]:
    """Changes objects for this block: the first block makes a change, the last puts it back, also among threads.

    Args:
        change: makes the change and returns what puts it back, or None where there is nothing to change.
    """
    held = []
    try:
        with _lock:
            for item in items:
                key = kind, id(item)
                blocks, back = _changed[key] if key in _changed else (0, change(item))
                if back is not None:
                    _changed[key] = blocks + 1, back
                    held.append((key, item))  # while it is alive, nothing else has its id
        yield
    finally:
        with _lock:
            for key, _ in held:
                blocks, back = _changed.pop(key)
                if blocks > 1:
                    _changed[key] = blocks - 1, back
                else:
                    back()


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No parameter of a model asks for a gradient, or activations would be kept for gradients nobody wants."""

    def freeze(parameter: Tensor) -> Callable[[], Any] | None:
        if not parameter.requires_grad:
            return None
        parameter.requires_grad_(False)
        return partial(parameter.requires_grad_, True)

    with _while_any("frozen", parameters, freeze):
        yield


@contextmanager
def checkpointed(*models: Any) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass, which runs the layers once more.

    Not transformers' own switch, which drops the prefix and needs training mode.
    """
    layers = [layer for model in models for layer in _layers(model)]
    with _while_any("checkpointed", layers, _checkpoint):
        yield


def _checkpoint(layer: Any) -> Callable[[], Any]:
    # Another library (accelerate, for one) may have set a layer's forward itself.
    own = vars(layer).get("forward")
    layer.forward = partial(checkpoint, partial(_run, layer.forward), use_reentrant=False, preserve_rng_state=False)
    return partial(delattr, layer, "forward") if own is None else partial(setattr, layer, "forward", own)


def _run(forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Entered here as well: the modes that surround a forward pass are gone when the backward pass repeats it.
    with fast_kernels(hidden.device):
        return forward(hidden, *args, **kwargs)


def require_layers(model: Any, name: str) -> None:
    """Raises ValueError where `checkpointed` would find nothing to do."""
    if not _layers(model):
        raise ValueError(
            f"checkpoint_activations must be False for {name}: transformers knows no layers of it to recompute"
        )


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
