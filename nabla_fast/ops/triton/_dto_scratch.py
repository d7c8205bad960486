"""Scratch memory of a `dto_step` call of many rows, as large as the GPU lets it be.

More rows in a block fill a matrix product better and read the head less often, up to a thousand or so.
"""

from __future__ import annotations

import torch

from nabla_fast.ops.triton import _matmul

# Entries of one scratch: 256 MiB to 1 GiB of float32.
LEAST, MOST = 2**26, 2**28
# Shares of a GPU: of its memory that one scratch takes, and of what is free that all of them take together.
_OF_ALL, _OF_FREE = 64, 4
# Of an entry in all scratches: a logit, its weight, and G where it is made again for every step.
_BYTES = 12


def entries_within(memory: int, free: int) -> int:
    """Entries of one scratch on a GPU with so many bytes: a power of two, so that it seldom depends on what is free.

    Another size of the blocks is another order of a product's sums.
    """
    wanted = min(MOST, max(LEAST, 2 ** (memory // (4 * _OF_ALL)).bit_length() // 2))
    while wanted > LEAST and wanted * _BYTES * _OF_FREE > free:
        wanted //= 2
    return wanted


def _entries(device: torch.device) -> int:
    if device.type != "cuda":
        return _matmul.ENTRIES
    if torch.cuda.is_current_stream_capturing():  # pragma: no cover - needs a GPU
        return LEAST  # a capture is no place to ask the driver
    free, memory = torch.cuda.mem_get_info(device)  # pragma: no cover - needs a GPU
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # pragma: no cover
    return entries_within(memory, free + kept_by_torch)  # pragma: no cover - needs a GPU


class BlockScratch(_matmul.Scratch):
    """Buffers that the blocks of one call share.

    Attributes:
        blocks: of its rows, in whole tiles of a matrix product where they are long enough.
        entries: most entries of a block.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        super().__init__(0, vocabulary, device)
        self.entries = _entries(device)
        most = max(1, self.entries // vocabulary)
        size = most // 128 * 128 or most
        self.blocks = [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
        self.rows = min(rows, size)
