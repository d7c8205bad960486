"""Layers of a model as one kernel each, where transformers writes them as several operators; on a CPU, linear layers.

What takes their place is in `nabla_fast.models.gpu_layers`, and on a CPU in `nabla_fast.models.token_layers`,
`nabla_fast.models.token_modules` for few tokens, and `nabla_fast.models.linear_layers`. The model stays as it
is: layers are exchanged for the length of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nabla_fast.models import (
    checks,
    gpu_layers,
    layer_trials,
    linear_layers,
    quantised_layers,
    token_layers,
    token_modules,
)
from nabla_fast.models.temporary import set_attribute, while_any
from nabla_fast.ops import token_layers as token_kernels


@dataclass(frozen=True)
class FusedLayers:
    """What can be exchanged in one model.

    Attributes:
        norms: modules, and the forward passes that take the place of theirs.
        rotary: Python modules whose attention layers call ``apply_rotary_pos_emb`` by that name, and what takes its
            place.
        modules: attention and feed-forward modules, and the forward passes that take the place of theirs.
        attention: whether `nabla_fast.models.token_layers` takes the place of transformers' attention.
        linear: layers whose forward passes `nabla_fast.models.linear_layers` has.
        quantised: layers that `nabla_fast.models.quantised_layers` makes exact.
    """

    norms: tuple[tuple[torch.nn.Module, Callable[..., Any]], ...] = ()
    rotary: tuple[tuple[ModuleType, Callable[..., Any]], ...] = ()
    modules: tuple[tuple[torch.nn.Module, Callable[..., Any]], ...] = ()
    attention: bool = False
    linear: tuple[torch.nn.Linear, ...] = ()
    quantised: tuple[Any, ...] = ()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchanges them in this block, for all threads."""
        norms, functions, modules = dict(self.norms), dict(self.rotary), dict(self.modules)
        tables = [ALL_ATTENTION_FUNCTIONS] if self.attention else []
        with (
            while_any("norm", norms, lambda module: set_attribute(module, "forward", norms[module])),
            while_any("rotary", functions, lambda page: set_attribute(page, layer_trials.ROTARY, functions[page])),
            while_any("module", modules, lambda module: set_attribute(module, "forward", modules[module])),
            while_any("attention", tables, token_layers.exchange_attention),
            while_any("linear", self.linear, linear_layers.exchange),
            while_any("quantised", self.quantised, quantised_layers.exchange),
        ):
            yield


@contextmanager
def fast_kernels(device: torch.device, *fused: FusedLayers) -> Iterator[None]:
    """In this block, layers of models on ``device`` use the kernels that this module describes.

    Attention on a GPU is not cuDNN's, which PyTorch prefers: for that, the host makes a plan for every new length of a
    sequence, and here nearly every call has lengths of its own.

    Results differ by rounding. Layers and, on a GPU, settings of the whole process are put back when the last block
    ends.

    Args:
        fused: the layers of each model that are exchanged.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(while_any("cudnn", [torch.backends.cuda], _without_cudnn_attention))
        for layers in fused:
            stack.enter_context(layers.active())
        yield


def _without_cudnn_attention(switch: Any) -> Callable[[], Any]:
    back = partial(switch.enable_cudnn_sdp, switch.cudnn_sdp_enabled())
    switch.enable_cudnn_sdp(False)
    return back


def fused_layers(model: Any, name: str) -> FusedLayers:
    """What can be exchanged in ``model``; layers are tried once per model."""
    device = model.get_input_embeddings().weight.device.type
    search = {"cpu": find_on_cpu, "cuda": find}.get(device)
    found = FusedLayers() if search is None else checks.remembered(model, name, "fused layers", lambda: search(model))
    linear = linear_layers.find(model) if device == "cpu" else ()
    return replace(found, linear=linear, quantised=quantised_layers.find_inexact(model))


def find(model: Any) -> FusedLayers:
    """The layers of a model that a GPU's kernels take the place of, with their gradients."""
    like = layer_trials.numbers_like(model)
    if like is None:
        return FusedLayers()
    norms = layer_trials.norms(model, like, gpu_layers.Norm)
    return FusedLayers(norms, layer_trials.rotary_functions(model, like, gpu_layers.rotated))


def find_on_cpu(model: Any) -> FusedLayers:
    """The layers of a model that the native kernels take the place of: some with their gradients, some without one."""
    like = layer_trials.numbers_like(model)
    if like is None or not token_kernels.available():
        return FusedLayers()
    norms = layer_trials.norms(model, like, token_layers.Norm)
    rotary = layer_trials.rotary_functions(model, like, token_layers.rotated)
    return FusedLayers(norms, rotary, token_modules.find(model, dict(norms)), attention=True)
