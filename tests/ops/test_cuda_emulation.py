"""The emulated device finds what would go wrong on a GPU, now and then or always, in whatever order it runs things."""

from __future__ import annotations

import ctypes
import re

import pytest
from cuda_cases import emulation

MISTAKES = {
    "no barrier before a read": "no barrier between them|nobody wrote",
    "no barrier before a write": "no barrier between them",
    "a shuffle for a barrier": "no barrier between them",
    "one block too few": "no barrier between them|nobody wrote",
    "one block too many": "wait for others that will not come",
    "a copy not waited for": "that a copy may be changing",
    "a copy over what is read": "no barrier between them",
    "a thread misses the barrier": "wait for others that will not come",
    "memory that nobody wrote": "that nobody wrote",
    "memory past the end": "outside the block's own",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_finds_mistakes(mistake: str) -> None:
    run = emulation().nabla_fast_test_mistake
    run.argtypes, run.restype = (ctypes.c_char_p, ctypes.c_bool), ctypes.c_char_p
    for _ in range(5):  # the order of the threads is another one each time
        assert run(mistake.encode(), False) == b""
        assert re.search(MISTAKES[mistake], run(mistake.encode(), True).decode())
