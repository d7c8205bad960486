"""Which models cannot be run in passes of constant shapes (`nabla_fast.models.static` and `slots`), and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone
from nabla_fast.models.kv_cache import KVCache


def examined(backbone: Backbone, what: str, difference: Callable[[Backbone], str | None]) -> str | None:
    """Why a model cannot be run with masks and positions of our own, in one clause; None if it can.

    Args:
        what: how it is to be run, a word or two.
        difference: tries it, on tokens that show a window of three, and says how it differs from a usual pass.
    """
    if backbone.cache_kind != "prefix":
        return "it does not run in batches behind prefixes"
    if "cache_position" in inspect.signature(backbone.module.forward).parameters:
        # It reads positions from columns, which a buffer or slots of constant size do not give.
        return "its forward pass takes one cache position for the whole batch"
    if len({weight.device for weight in backbone.model.parameters()}) > 1:
        return "its weights are on several devices, or off-loaded"
    config = backbone.model.config.get_text_config()
    if backbone.windowed and not checks.window_is_known(config):
        return "its layers have windows of a kind that is not known"
    with _small_window(config) if backbone.windowed else nullcontext():
        try:
            return difference(backbone)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with a mask of four dimensions
            return f"a pass {what} raises {type(error).__name__}"


def sizes_differ(cache: KVCache) -> bool:
    """Whether layers have keys and values of several sizes, which one tensor has no room for."""
    return len({x.shape for x in (*cache.keys, *cache.values)}) > 1


@contextmanager
def _small_window(config: Any) -> Iterator[None]:
    """In this block, a model's sliding windows are so short that the tokens of a check show them."""
    before = config.sliding_window
    config.sliding_window = 3
    try:
        yield
    finally:
        config.sliding_window = before
