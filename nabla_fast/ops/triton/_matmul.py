# mypy: allow-untyped-defs, allow-incomplete-defs
"""Logits: a tile of them inside a kernel, and blocks of rows whose logits lie in memory for a while.

A tile is BN rows by BV entries, z = softcap tanh(scale <h, W_v> / softcap), accumulated in float32.

Whatever needs a logit twice (for its row's softmax, and then for its weight) has it computed once, by the matrix
library, for so many rows as fit into a scratch of fixed size; the library also multiplies the weights with the tables.
Kernels between the products read the scratch, or write it, a few times in all. A kernel of our own that kept nothing
would compute each logit a second time, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.ops.table_matmul import times_table
from nabla_fast.ops.triton._launch import INTERPRET, architecture
from nabla_fast.ops.types import Head, Tables, TokenGradient

# Entries of one scratch: 256 MiB of float32, and up to 1 GiB where a call multiplies by the head again and again.
ENTRIES, MOST_ENTRIES = 2**26, 2**28
# Then, shares of a GPU: of its memory that one scratch takes, and of what is free that all of them take together.
_OF_ALL, _OF_FREE = 64, 4
# Of an entry in all scratches of `dto_step`: a logit, its weight, and G where it is made again for every step.
_BYTES = 12


@triton.jit
def _load_depth(X, row, depth, D, EVEN: tl.constexpr):
    at = X.data + (row * X.row_stride)[:, None] + (depth.to(tl.int64) * X.column_stride)[None, :]
    if EVEN:  # noqa: SIM108
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(depth < D)[None, :], other=0.0)
    return values


@triton.jit
def products(
    H,
    W,
    D,
    row,
    entry,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<H_n, W_v> (BN, BV) for rows ``row`` and entries ``entry``, of one half-precision dtype.

    SWAP: the operands change places, so that the table fills the wide side of the matrix unit. UPCAST: for the
    interpreter, which multiplies float32 only.
    """
    if SWAP:  # noqa: SIM108
        acc = tl.zeros([BV, BN], tl.float32)
    else:
        acc = tl.zeros([BN, BV], tl.float32)
    for start in range(0, D, BD):
        depth = start + tl.arange(0, BD)
        h = _load_depth(H, row, depth, D, EVEN)
        w = _load_depth(W, entry.to(tl.int64), depth, D, EVEN)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        if SWAP:  # noqa: SIM108
            acc = tl.dot(w, tl.trans(h), acc)
        else:
            acc = tl.dot(h, tl.trans(w), acc)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def tanh(x):
    """tanh to float32 rounding, small x too."""
    small = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * ((1.0 - small) / (1.0 + small))
    xx = x * x
    series = x * (1.0 + xx * (-1.0 / 3 + xx * (2.0 / 15 + xx * (-17.0 / 315 + xx * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, large)


@triton.jit
def capped(product, scale, softcap, CAP: tl.constexpr):
    """Logits from products with the head."""
    z = product * scale
    if CAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def cap_slope(z, softcap):
    """d(capped logits) / d(uncapped ones)."""
    ratio = z / softcap
    return 1.0 - ratio * ratio


def fused(x: Tensor, table: Tensor) -> bool:
    """Whether a product comes from our own tiles: the matrix unit takes both operands as they are."""
    return x.dtype == table.dtype and x.dtype in (torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """A tile of `products`, and how a kernel with it is launched."""

    BN: int
    BV: int
    BD: int
    swap: bool
    num_warps: int
    num_stages: int

    def constants(self, depth: int) -> dict[str, Any]:
        """The constexpr parameters of `products` for operands that are ``depth`` wide."""
        even = depth % self.BD == 0
        return {"BN": self.BN, "BV": self.BV, "BD": self.BD, "EVEN": even, "SWAP": self.swap, "UPCAST": INTERPRET}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_shape(rows: int, device: torch.device, full: bool = False) -> Tiles:
    """The tiles for so many rows, which spill nowhere (`tests/ops/test_triton_compile.py`).

    Few rows take a 16-row tile with the operands swapped. Blackwell hands a finished product to the registers at
    once, which is too much for the widest tiles, and of its smaller GPUs a block has 99 KiB of shared memory. A kernel
    that keeps much beside its product (``full``) takes the next smaller tiles.
    """
    if full:
        rows = min(rows, 128 if architecture(device) >= 90 else 64)
    if INTERPRET:
        return Tiles(16, 256, 32, rows <= 8, 4, 1)
    if rows <= 16:
        return Tiles(16, 128, 64, True, 8 if full and architecture(device) >= 100 else 4, 4)
    if rows <= 64 or architecture(device) >= 100:
        return Tiles(64, 128, 64, False, 8, 3)
    if rows <= 128:
        return Tiles(64, 256, 64, False, 8, 3)
    return Tiles(128, 128, 64, False, 8, 4)


class Bases(NamedTuple):
    """What tiles of weights are relative to: (V / width, N) maxima of what had been seen of a row, and the width."""

    values: Tensor
    width: int


class Scratch:
    """Buffers that the blocks of one call share: rows (R, V) whose lengths in memory are multiples of 16 bytes.

    Attributes:
        blocks: of the call's rows, each of at most ``entries`` logits, in whole tiles of a product where that is long.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device, entries: int | None = None) -> None:
        self.entries = ENTRIES if entries is None else entries
        most = max(1, self.entries // vocabulary)
        size = most // 128 * 128 or most
        self.blocks = [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
        self.vocabulary, self.device = vocabulary, device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of this name, ``rows`` of it, with whatever it holds."""
        if name not in self.buffers:
            padded = -(-self.vocabulary // 8) * 8
            self.buffers[name] = torch.empty(self.blocks[0].stop, padded, dtype=dtype, device=self.device)
        return self.buffers[name][:rows, : self.vocabulary]

    def weights(self, rows: int, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
        """A buffer for each of ``dtypes``."""
        return tuple(self.take(f"weights {i}", rows, dtype) for i, dtype in enumerate(dtypes))


def entries_within(memory: int, free: int) -> int:
    """Entries of one scratch on a GPU with so many bytes: a power of two, so that it seldom depends on what is free.

    Another size of the blocks is another order of a product's sums.
    """
    wanted = min(MOST_ENTRIES, max(ENTRIES, 2 ** (memory // (4 * _OF_ALL)).bit_length() // 2))
    while wanted > ENTRIES and wanted * _BYTES * _OF_FREE > free:
        wanted //= 2
    return wanted


def many_entries(device: torch.device) -> int:
    """Entries of a scratch as large as the device lets it be.

    More rows in a block fill a matrix product better and read the head less often, up to a thousand or so.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return ENTRIES  # a capture is no place to ask the driver
    free, memory = torch.cuda.mem_get_info(device)  # pragma: no cover - needs a GPU
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # pragma: no cover
    return entries_within(memory, free + kept_by_torch)  # pragma: no cover - needs a GPU


def half_blocks(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and for each (R, V) of half precision in one buffer of as many bytes as one of `Scratch`."""
    scratch = Scratch(rows, vocabulary, device, 2 * ENTRIES)
    for block in scratch.blocks:
        yield block, scratch.take("half", block.stop - block.start, dtype)


def write_logits(out: Tensor, h: Tensor, head: Head, factor: float = 1.0) -> Tensor:
    """Writes ``factor`` times the logits (R, V) of hidden states h (R, d) into ``out``, float32."""
    if not head.softcap:
        return times_table(h, head.weight, out, alpha=factor * head.scale)
    return times_table(h, head.weight, out, alpha=head.scale / head.softcap).tanh_().mul_(factor * head.softcap)


def rounded(vectors: Sequence[Tensor], tables: Sequence[Tensor], source: torch.dtype) -> list[Tensor]:
    """``vectors`` as they meet their tables where the logits come from ``source``.

    Beside a bfloat16 table and logits that were bfloat16 already, more than 8 bits of a gradient are noise that
    costs a second product.
    """
    half = torch.bfloat16
    return [v.to(half) if source == table.dtype == half else v for v, table in zip(vectors, tables, strict=True)]


def write_terms(out: Tensor, vectors: Sequence[Tensor], tables: Sequence[Tensor], *, add: bool = False) -> Tensor:
    """Writes sum_k <vector_k, table_k(v)> into ``out`` (R, V) float32, or adds it."""
    for vector, table in zip(vectors, tables, strict=True):
        times_table(vector, table, out, add=add)
        add = True
    return out if add else out.zero_()


def write_gradient(out: Tensor, factors: TokenGradient, tables: Tables) -> Tensor:
    """G (R, V) of `TokenGradient` factors, up to a constant per row."""
    if tables.nll_coeff:
        write_logits(out, factors.hidden, tables.head, -tables.nll_coeff)
    vectors = (factors.embedding, factors.reward_embedding)
    return write_terms(out, vectors, (tables.embedding, tables.reward_embedding), add=tables.nll_coeff != 0)


def logits_in_blocks(h: Tensor, head: Head, scratch: Scratch) -> Iterator[tuple[slice, Tensor]]:
    """Some rows and their logits, a block at a time in one buffer."""
    for rows in scratch.blocks:
        part = h[rows]
        yield rows, write_logits(scratch.take("logits", len(part)), part, head)
