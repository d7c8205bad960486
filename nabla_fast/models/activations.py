"""Which activations a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nabla_fast.models.temporary import set_attribute, while_any
from nabla_fast.models.torch_kernels import fast_kernels


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No parameter of a model asks for a gradient, or activations would be kept for gradients nobody wants."""

    def freeze(parameter: Tensor) -> Callable[[], Any] | None:
        if not parameter.requires_grad:
            return None
        parameter.requires_grad_(False)
        return partial(parameter.requires_grad_, True)

    with while_any("frozen", parameters, freeze):
        yield


@contextmanager
def checkpointed(*models: Any) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass, which runs the layers once more.

    Not transformers' own switch, which drops the prefix and needs training mode.
    """
    layers = [layer for model in models for layer in decoder_layers(model)]
    with while_any("checkpointed", layers, _checkpoint):
        yield


def _checkpoint(layer: Any) -> Callable[[], Any]:
    # Another library (accelerate, for one) may have set a layer's forward itself.
    repeated = partial(checkpoint, partial(_run, layer.forward), use_reentrant=False, preserve_rng_state=False)
    return set_attribute(layer, "forward", repeated)


def _run(forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Entered here as well: the modes that surround a forward pass are gone when the backward pass repeats it.
    with fast_kernels(hidden.device):
        return forward(hidden, *args, **kwargs)


def require_layers(model: Any, name: str) -> None:
    """Raises ValueError where `checkpointed` would find nothing to do."""
    if not decoder_layers(model):
        raise ValueError(
            f"checkpoint_activations must be False for {name}: transformers knows no layers of it to recompute"
        )


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a model that transformers can recompute."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
