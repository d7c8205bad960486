"""A least-recently-used cache of gradients, keyed by the token ids that they depend on.

A gradient depends on the hard tokens alone. Cached, it serves every later position of a response, its gradient norms
and the first step of DTO, for as long as no token changes.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import TokenGradient, native


@dataclass(frozen=True)
class Evaluation:
    """The objective and its token gradient at one response.

    Attributes:
        start: first response position that the factors cover.
        factors: token gradient of positions start, start + 1, ... (m rows).
        log_likelihoods: (m,) float64 on the CPU, log pi at each of those positions.
        reward: of the whole response.
    """

    start: int
    factors: TokenGradient
    log_likelihoods: Tensor
    reward: float

    def rows_from(self, position: int) -> TokenGradient:
        """The factors of response positions ``position`` and later; views.

        Raises:
            ValueError: if ``position`` is below ``start`` or above ``start + m``.
        """
        return self.factors.rows(slice(self._row(position), None))

    @property
    def log_likelihood(self) -> float:
        """Sum of log pi over all of those positions, in nats."""
        return self.log_likelihood_from(self.start)

    def log_likelihood_from(self, position: int) -> float:
        """Sum of log pi over response positions ``position`` and later, correctly rounded.

        Raises:
            ValueError: as `rows_from`.
        """
        return math.fsum(self.log_likelihoods[self._row(position) :].tolist())

    def _row(self, position: int) -> int:
        end = self.start + len(self.log_likelihoods)
        if not self.start <= position <= end:
            raise ValueError(
                f"position must be from {self.start} to {end}, which this evaluation covers; got {position}"
            )
        return position - self.start


class GradientCache:
    """Maps token ids to evaluations and rewards under a byte budget. Safe to share between threads.

    ``tokens`` is (n,) int64 on the CPU, everything that the gradient depends on: prompt and response. Only exactly the
    same tokens are found, and no look-up waits for a device.

    The tokens are copied, an evaluation's tensors are kept and returned as they are: nobody may write to them, and a
    view would keep alive what it is a view of. An entry counts the bytes of its tokens and of these tensors.

    Every method raises TypeError where ``tokens`` are anything else.

    Args:
        max_bytes: budget; the least recently used entries go first. An entry larger than it is not kept, and leaves
            everything as it was.

    Raises:
        ValueError: if ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"GradientCache: max_bytes must be 0 or more, got {max_bytes}")
        self._cache: Any = (
            torch.classes.nabla_fast.GradientCache(max_bytes) if native.available() else _PythonCache(max_bytes)
        )

    def find(self, tokens: Tensor, start: int) -> Evaluation | None:
        """The evaluation of exactly these tokens that covers response positions from ``start`` on, or None; a use.

        Raises:
            ValueError: if ``start`` is negative.
        """
        _check_tokens("find", tokens)
        _check_start("find", start)
        found = self._cache.find(tokens, start)
        if found is None:
            return None
        entry_start, (*factors, log_likelihoods), reward = found
        return Evaluation(entry_start, TokenGradient(*factors), log_likelihoods, reward)

    def find_reward(self, tokens: Tensor) -> float | None:
        """The reward of exactly these tokens, or None; a use of its entry."""
        _check_tokens("find_reward", tokens)
        reward: float | None = self._cache.find_reward(tokens)
        return reward

    def insert(self, tokens: Tensor, evaluation: Evaluation) -> None:
        """Keeps an evaluation in place of an older one of the same tokens, unless that one starts earlier.

        An older one that stays counts as used.

        Raises:
            TypeError: if the factors are not strided float tensors, or the log-likelihoods not a float64 one.
            ValueError: if the start is negative, a tensor holds no data, or the shapes do not fit together or to the
                number of tokens.
        """
        _check_tokens("insert", tokens)
        _check_start("insert", evaluation.start)
        values = [*evaluation.factors, evaluation.log_likelihoods]
        _check_values(values, evaluation.start, len(tokens))
        self._cache.insert(tokens, evaluation.start, values, float(evaluation.reward))

    def insert_reward(self, tokens: Tensor, reward: float) -> None:
        """Keeps a reward: of an entry that is there, next to its evaluation, else on its own; a use of the entry."""
        _check_tokens("insert_reward", tokens)
        self._cache.insert_reward(tokens, float(reward))

    def clear(self) -> None:
        """Drops every entry; the counters stay."""
        self._cache.clear()

    def stats(self) -> dict[str, int]:
        """Counters since the start: ``hits``, ``misses``, ``reward_hits``, ``reward_misses``, ``evictions`` (entries
        that made room for others); and ``entries`` and ``bytes`` held now.
        """
        return dict(self._cache.stats())

    def __len__(self) -> int:
        return self.stats()["entries"]

    @property
    def bytes(self) -> int:
        """Held now, never above ``max_bytes``."""
        return self.stats()["bytes"]


def _check_tokens(method: str, tokens: Tensor) -> None:
    strided = isinstance(tokens, Tensor) and tokens.layout == torch.strided
    if not strided or tokens.dtype != torch.int64 or not tokens.is_cpu or tokens.ndim != 1:
        wanted = "tokens must be an int64 tensor of shape (n,) on the CPU"
        raise TypeError(f"GradientCache.{method}: {wanted}, got {_described(tokens)}")


def _check_start(method: str, start: int) -> None:
    if start < 0:
        raise ValueError(f"GradientCache.{method}: start must be 0 or more, got {start}")


_PARTS = {
    "hidden": "a strided float tensor of shape (m, d) that holds data",
    "embedding": "a strided float tensor of shape (m, d) that holds data",
    "reward_embedding": "a strided float tensor of shape (m, d_r) that holds data",
    "log_likelihoods": "a strided float64 tensor of shape (m,) on the CPU",
}


def _check_values(values: list[Tensor], start: int, length: int) -> None:
    if len(values) != len(_PARTS):
        raise TypeError(f"GradientCache.insert: factors must be a TokenGradient, got {len(values) - 1} tensors")
    most = max(0, length - start)
    for (name, wanted), value in zip(_PARTS.items(), values, strict=True):
        fault = _fault(value, name == "log_likelihoods")
        if fault is not None:
            raise fault(f"GradientCache.insert: {name} must be {wanted}, got {_described(value)}")
        rows, wanted_rows = value.shape[0], values[0].shape[0]
        if rows != wanted_rows:
            raise ValueError(f"GradientCache.insert: {name} must have {wanted_rows} rows as hidden does, got {rows}")
        if rows > most:
            raise ValueError(
                f"GradientCache.insert: {name} must have at most {most} rows, for positions {start} to {length}, got "
                f"{rows}"
            )


def _fault(value: Tensor, likelihoods: bool) -> type[Exception] | None:
    """The error class for a tensor that the cache cannot hold; None for one that it can."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return TypeError
    if likelihoods:
        if value.dtype != torch.float64:
            return TypeError
        return None if value.ndim == 1 and value.is_cpu else ValueError
    if not value.is_floating_point():
        return TypeError
    return None if value.ndim == 2 and not value.is_meta else ValueError


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    return f"{value.dtype} of shape {tuple(value.shape)}, {value.layout}, on {value.device}"


@dataclass
class _Entry:
    start: int
    values: list[Tensor]  # empty where only the reward is known
    reward: float
    nbytes: int


class _PythonCache:
    """``torch.classes.nabla_fast.GradientCache`` in Python, for where the native library is missing; slower."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._counters = dict.fromkeys(("hits", "misses", "reward_hits", "reward_misses", "evictions"), 0)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # most recently used last
        self._lock = threading.Lock()

    def find(self, tokens: Tensor, start: int) -> tuple[int, list[Tensor], float] | None:
        with self._lock:
            entry = self._entries.get(key := _key(tokens))
            if entry is None or not entry.values or entry.start > start:
                self._counters["misses"] += 1
                return None
            self._counters["hits"] += 1
            self._entries.move_to_end(key)
            return entry.start, list(entry.values), entry.reward

    def find_reward(self, tokens: Tensor) -> float | None:
        with self._lock:
            entry = self._entries.get(key := _key(tokens))
            self._counters["reward_misses" if entry is None else "reward_hits"] += 1
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.reward

    def insert(self, tokens: Tensor, start: int, values: list[Tensor], reward: float) -> None:
        key = _key(tokens)
        entry = _Entry(start, values, reward, len(key) + sum(value.nbytes for value in values))
        dropped: list[_Entry] = []  # dies after the lock is given back: a tensor's last owner may have code to run
        with self._lock:
            old = self._entries.get(key)
            if old is not None and old.values and old.start < start:
                self._entries.move_to_end(key)
            else:
                self._add(key, entry, dropped)

    def insert_reward(self, tokens: Tensor, reward: float) -> None:
        key = _key(tokens)
        dropped: list[_Entry] = []
        with self._lock:
            old = self._entries.get(key)
            if old is not None:
                old.reward = reward
                self._entries.move_to_end(key)
            else:
                self._add(key, _Entry(0, [], reward, len(key)), dropped)

    def clear(self) -> None:
        with self._lock:
            dropped, self._entries, self._bytes = self._entries, OrderedDict(), 0  # see insert
        del dropped

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {**self._counters, "entries": len(self._entries), "bytes": self._bytes}

    def _add(self, key: bytes, entry: _Entry, dropped: list[_Entry]) -> None:
        """Puts an entry in place of another one of its key and makes room for it, if it fits into the budget at all."""
        if entry.nbytes > self._max_bytes:
            return
        if key in self._entries:
            dropped.append(self._entries.pop(key))
        self._entries[key] = entry
        self._bytes += entry.nbytes - sum(old.nbytes for old in dropped)
        while self._bytes > self._max_bytes:
            dropped.append(self._entries.popitem(last=False)[1])
            self._bytes -= dropped[-1].nbytes
            self._counters["evictions"] += 1


def _key(tokens: Tensor) -> bytes:
    return tokens.numpy().tobytes()
