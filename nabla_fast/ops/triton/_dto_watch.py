"""Which rows of a `dto_step` call still move, as far as the host knows without stopping the GPU.

A host that waits for the step it launched last leaves the GPU without work until the next one is launched, which takes
it about as long as a small step takes the GPU. So it looks at an older step: while it launches one, another is still
queued. With a lag of one step there would be only the rest of the step that is running; more than two steps hide
nothing more, and every step of lag is one that rows multiply for nothing after all of them have stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Steps between a row's stop and the host's knowledge of it.
LAG = 2


class Watch:
    """The flags of rows that are held, (N,) int32, on their way to the host.

    While a CUDA graph is being captured there is nothing to look at, and every step is launched.
    """

    def __init__(self, held: Tensor) -> None:
        self._held = held
        blind = held.is_meta or (held.is_cuda and torch.cuda.is_current_stream_capturing())
        self._copies: list[Tensor] | None = None
        if not blind:
            pinned = held.is_cuda
            self._copies = [
                torch.empty(held.shape, dtype=held.dtype, device="cpu", pin_memory=pinned) for _ in range(LAG)
            ]
        self._events = [torch.cuda.Event() for _ in range(LAG)] if held.is_cuda and not blind else None

    def note(self, made: int) -> None:
        """Sends the flags as they are after step number ``made``."""
        if self._copies is None:
            return
        self._copies[made % LAG].copy_(self._held, non_blocking=True)
        if self._events is not None:  # pragma: no cover - needs a GPU
            self._events[made % LAG].record(torch.cuda.current_stream(self._held.device))

    def moving(self, made: int, rows: slice = slice(None)) -> bool:
        """Whether one of ``rows`` may still move in step number ``made``: whether it did `LAG` steps before."""
        if self._copies is None or made < LAG:
            return True
        if self._events is not None:  # pragma: no cover - needs a GPU
            self._events[made % LAG].synchronize()
        return bool((self._copies[made % LAG][rows] == 0).any())
