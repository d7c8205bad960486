"""Where logits and the gradient over the vocabulary come from, as kernel arguments.

`Logits` are rows in memory or hidden states and a head. `Gradient` is dense, or factors brought into the form

    G(v) = <a, W_v> + <x1, T1_v> + <x2, T2_v>      (or alpha * logits(a)(v) in place of the first term, under a softcap)

so that a table that is the head itself (tied embeddings) is read once: its vector is folded into ``a``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.operands import Head, Tables, TokenGradient
from nabla_fast.ops.triton.launch import INTERPRET, architecture, dot_mode, same_table, strides


@dataclass(frozen=True)
class Logits:
    """Rows of logits: ``z`` (N, V) in memory, or hidden states ``h`` (N, d) with ``head``."""

    head: Head | None = None
    z: Tensor | None = None
    h: Tensor | None = None

    @property
    def rows(self) -> int:
        source = self.h if self.z is None else self.z
        assert source is not None
        return source.shape[0]

    @property
    def vocabulary(self) -> int:
        if self.z is not None:
            return self.z.shape[1]
        assert self.head is not None
        return self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        source = self.h if self.z is None else self.z
        assert source is not None
        return source.device


@dataclass(frozen=True)
class Gradient:
    """G over the vocabulary. ``own`` adds alpha times the logits themselves."""

    dense: Tensor | None = None
    a: Tensor | None = None
    capped: bool = False
    own: bool = False
    alpha: float = 0.0
    terms: tuple[tuple[Tensor, Tensor], ...] = ()


NO_GRADIENT = Gradient()


def from_vectors(head: Head | None, vectors: list[tuple[Tensor, Tensor]]) -> Gradient:
    """G(v) = sum of <vector, table_v>; a vector of the head's own table becomes ``a``."""
    if len(vectors) > 2:
        raise ValueError(f"backend 'triton' takes one or two tables, got {len(vectors)}")
    if head is None or not vectors or not same_table(vectors[0][1], head.weight):
        return Gradient(terms=tuple(vectors))
    return Gradient(a=vectors[0][0].contiguous(), terms=tuple(vectors[1:]))


def from_factors(gradient: Tensor | TokenGradient, tables: Tables, own: bool = False) -> Gradient:
    """G of `TokenGradient` factors, or a dense one.

    Args:
        gradient: dense (N, V), or factors.
        tables: head and embedding tables.
        own: the logits at hand are those of ``gradient.hidden``, so the likelihood's term is a multiple of them.
    """
    if isinstance(gradient, Tensor):
        return Gradient(dense=gradient)
    head, nll = tables.head, tables.nll_coeff
    reward = (gradient.reward_embedding, tables.reward_embedding)
    tied = same_table(tables.embedding, head.weight)
    if own:
        return replace(from_vectors(head, [(gradient.embedding, tables.embedding), reward]), own=True, alpha=-nll)
    if head.softcap:
        rest = ((gradient.embedding, tables.embedding), reward)
        return Gradient(a=gradient.hidden.contiguous(), capped=True, alpha=-nll, terms=rest)
    a = gradient.hidden.float() * (-nll * head.scale)
    if tied:
        return Gradient(a=(a + gradient.embedding.float()).contiguous(), terms=(reward,))
    return Gradient(a=a.contiguous(), terms=((gradient.embedding, tables.embedding), reward))


def at_tokens(gradient: Gradient, head: Head, tokens: Tensor) -> Tensor:
    """G of each row's token: (N,) float32; 0 where it is not finite."""
    tokens = tokens.clamp(0, head.weight.shape[0] - 1)
    if gradient.dense is not None:
        value = gradient.dense.gather(1, tokens.unsqueeze(1)).squeeze(1).float()
    else:
        value = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        if gradient.a is not None:
            value = (gradient.a.float() * head.weight[tokens].float()).sum(-1)
        if gradient.capped:
            value = gradient.alpha * head.softcap * torch.tanh(head.scale * value / head.softcap)
        for vector, table in gradient.terms:
            value = value + (vector.float() * table[tokens].float()).sum(-1)
    return value.nan_to_num(0.0, 0.0, 0.0)


def tile_arguments(logits: Logits, gradient: Gradient, noises: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `tiles.tile` but for the tile itself, and the tile's shape and launch options.

    ``noises`` says how many (N, V) tensors the kernel reads besides those of the logits and the gradient.
    """
    weight = None if logits.head is None else logits.head.weight
    padded = (*gradient.terms, (None, None), (None, None))
    (x1, t1), (x2, t2) = padded[0], padded[1]
    x1, x2 = (None if x is None else x.contiguous() for x in (x1, x2))
    modes = {
        "MODE_H": dot_mode(logits.h, weight),
        "MODE_A": dot_mode(gradient.a, weight),
        "MODE_1": dot_mode(x1, t1),
        "MODE_2": dot_mode(x2, t2),
    }
    head = logits.head or Head(torch.empty(0))
    loads = noises + (logits.z is not None) + (gradient.dense is not None)
    options = tile_shape(logits.rows, modes, loads, logits.device)
    # A loop over the depth that the caller does not run needs no mask either.
    depths = [t.shape[1] for t in (weight, t1, t2) if t is not None]
    arguments = {
        "Z": logits.z, **strides("Z", logits.z, "nv"), "H": logits.h, **strides("H", logits.h, "nd"),
        "W": weight, **strides("W", weight, "vd"), "D": 0 if weight is None else weight.shape[1],
        "A": gradient.a,
        "X1": x1, "T1": t1, **strides("T1", t1, "vd"), "D1": 0 if t1 is None else t1.shape[1],
        "X2": x2, "T2": t2, **strides("T2", t2, "vd"), "D2": 0 if t2 is None else t2.shape[1],
        "G": gradient.dense, **strides("G", gradient.dense, "nv"),
        "scale": float(head.scale), "softcap": float(head.softcap), "alpha": float(gradient.alpha),
        "rows": logits.rows, "V": logits.vocabulary,
        "EVEN": all(depth % options["BD"] == 0 for depth in depths),
        "CAP": head.softcap != 0, "CAP_A": gradient.capped, "OWN": gradient.own, **modes,
    }  # fmt: skip
    return arguments, options


def tile_shape(rows: int, modes: dict[str, str], loads: int, device: torch.device) -> dict[str, Any]:
    """Tile shape (BN, BV, BD) and launch options that spill nowhere (`tests/test_triton_compile.py` holds them to it).

    Few rows take a 16-row tile with the operands swapped, so that the table fills the wide side of the matrix unit.
    Registers decide the rest: each further sum beside the logits', or tile of (N, V) values from memory (``loads``,
    whose addresses are 64-bit), takes from the tile; products of float32 rows take half the depth. Blackwell hands a
    finished product to the registers at once, which is too much for the widest tiles.
    """
    used = [mode for mode in modes.values() if mode != "none"]
    crowd = len(used) + loads
    precise = "tf32x3" in used
    if INTERPRET:
        shape, swap, options = (16, 256, 32), rows <= 8, (4, 1)
    elif rows <= 16:
        width = 128 if used == ["native"] and crowd == 1 else 64
        shape, swap, options = (16, width, 32 if precise else 64), True, (4, 3 if precise else 4)
    elif crowd > 1 or precise:
        shape, swap, options = (64 if crowd <= 2 else 32, 64, 32 if precise or "split" in used else 64), False, (8, 3)
    elif rows <= 64 or "split" in used or architecture(device) >= 100:
        shape, swap, options = (64, 128, 32 if "split" in used else 64), False, (8, 3)
    elif rows <= 128:
        shape, swap, options = (64, 256, 64), False, (8, 3)
    else:
        shape, swap, options = (128, 128, 64), False, (8, 4)
    return dict(zip(("BN", "BV", "BD", "SWAP", "num_warps", "num_stages"), (*shape, swap, *options), strict=True))
