"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nabla_fast.models.layers import fast_layers


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No parameter of a model asks for a gradient, or activations would be kept for gradients nobody wants."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(*models: Any) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass, which runs the layers once more.

    Not transformers' own switch, which drops the prefix and needs training mode.
    """
    layers = [layer for model in models for layer in _layers(model)]
    # Another library (accelerate, for one) may have set a layer's forward itself.
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, partial(_run, layer.forward), use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _run(forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Entered here as well: the modes that surround a forward pass are gone when the backward pass repeats it.
    with fast_layers(hidden.device):
        return forward(hidden, *args, **kwargs)


def require_layers(model: Any, name: str) -> None:
    """Raises ValueError where `checkpointed` would find nothing to do."""
    if not _layers(model):
        raise ValueError(
            f"checkpoint_activations must be False for {name}: transformers knows no layers of it to recompute"
        )


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
