"""Decoder layers that are recomputed in the backward pass, or compiled by `torch.compile`.

One layer is compiled, and all layers of its kind run what came out. That is for passes of constant shapes
(`nabla_fast.models.static`) alone. A layer's number is nothing that its computation depends on but for where its keys
and values are; so each layer gets a cache that holds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nabla_fast.models.fused_layers import fast_kernels
from nabla_fast.models.temporary import set_attribute, while_any


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


class _OneLayer:
    """The cache of one layer: its prefix, which is read, and what the pass adds."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _layer(
    layer: Any, argument: str, hidden: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, and the keys and values that it adds. This is what is compiled."""
    cache = _OneLayer(keys, values)
    out = type(layer).forward(layer, hidden, **kwargs, **{argument: cache})
    assert cache.new is not None
    return (out[0] if isinstance(out, tuple) else out), *cache.new


class CompiledLayers:
    """The decoder layers of a model, compiled.

    Attributes:
        used: whether a layer has run compiled.

    Raises:
        ValueError: for a model whose decoder layers are not known to transformers.
    """

    def __init__(self, model: Any, name: str, backend: str = "inductor") -> None:
        # What has a forward of its own is another library's.
        self.layers = [layer for layer in decoder_layers(model) if "forward" not in vars(layer)]
        if not self.layers:
            raise ValueError(f"compile must be False for {name}: transformers knows no decoder layers of it")
        # The second length of a suffix makes it one graph for all lengths.
        self._compiled: Callable[..., Any] = torch.compile(_layer, fullgraph=True, backend=backend)
        self.used = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """In this block, layers that are called with a cache of `nabla_fast.models.static` run compiled."""

        def exchange(layer: Any) -> Callable[[], Any]:
            own = layer.forward
            return set_attribute(layer, "forward", lambda *args, **kwargs: self._run(layer, own, *args, **kwargs))

        # PyTorch counts what it has compiled of one function, which here serves every model of the process.
        limit: Any = torch._dynamo.config.patch(recompile_limit=256)
        with while_any("compiled", self.layers, exchange), limit:
            yield

    def _run(self, layer: Any, own: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        argument = next((name for name in ("past_key_values", "cache", "layer_past") if name in kwargs), None)
        cache: Any = kwargs.get(argument or "")
        index = getattr(next((m for m in layer.modules() if hasattr(m, "layer_idx")), None), "layer_idx", None)
        if argument is None or args or index is None or not hasattr(cache, "of_layer"):
            return own(hidden, *args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != argument}
        keys, values = cache.of_layer(index)
        self.used = True
        out, *new = self._compiled(layer, argument, hidden, keys, values, rest)
        cache.add(*new)
        return out


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process."""
    counters: Any = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])
