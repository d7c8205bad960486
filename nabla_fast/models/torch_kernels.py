"""Faster PyTorch kernels for a model's layers where PyTorch's default choice is slow.

* Layers that are exchanged: linear ones on a CPU (`nabla_fast.models.linear_layers`), norms and rotary embeddings on a
  GPU (`nabla_fast.models.fused_layers`).
* Attention on a GPU. PyTorch prefers cuDNN's, for which the host makes a plan for every new length of a sequence; here
  nearly every call has lengths of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from nabla_fast.models.fused_layers import FusedLayers


@contextmanager
def fast_kernels(device: torch.device, *fused: FusedLayers) -> Iterator[None]:
    """In this block, layers of models on ``device`` use the kernels that this module describes.

    Results differ by rounding. Layers and, on a GPU, settings of the whole process are put back when the last block
    ends.

    Args:
        fused: the layers of each model that are exchanged.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_without_cudnn_attention())
        for layers in fused:
            stack.enter_context(layers.active())
        yield


class _Blocks:
    """The number of active blocks in all threads, and the setting before the first."""

    lock = threading.Lock()
    count = 0
    before = True


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    switch = torch.backends.cuda
    with _Blocks.lock:
        if _Blocks.count == 0:
            _Blocks.before = switch.cudnn_sdp_enabled()
            switch.enable_cudnn_sdp(False)
        _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= 1
            if _Blocks.count == 0:
                switch.enable_cudnn_sdp(_Blocks.before)
