"""A second stream of a GPU, so that kernels of two models overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nabla_fast.graphs import separate_stream


class SideStream:
    """A stream beside the current one of a device; on a CPU, none.

    Whatever is computed on it is allocated on it, so memory is not reused while it is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = separate_stream(device) if device.type == "cuda" else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Runs the block on the stream, after what the device was given before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Afterwards, also after an error, the device's current stream waits for what the stream computes.

        Otherwise what that reads could be freed and written to meanwhile.
        """
        try:
            yield
        finally:
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Keeps the memory of tensors that the stream has allocated until the device's current stream has read them."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
