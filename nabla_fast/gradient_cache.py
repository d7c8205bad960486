"""A least-recently-used cache of gradients, keyed by the token ids that they depend on.

A gradient depends on the hard tokens alone. Cached, it serves every later position of a response, its gradient norms
and the first step of DTO, for as long as no token changes.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nabla_fast.ops import TokenGradient


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
        self._max_bytes = max_bytes
        self._bytes = 0
        self._counters = dict.fromkeys(("hits", "misses", "reward_hits", "reward_misses", "evictions"), 0)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # most recently used last
        # An entry that leaves dies after the lock is given back: a tensor's last owner may have code to run.
        self._lock = threading.Lock()

    def find(self, tokens: Tensor, start: int) -> Evaluation | None:
        """The evaluation of exactly these tokens that covers response positions from ``start`` on, or None; a use.

        Raises:
            ValueError: if ``start`` is negative.
        """
        key = _key("find", tokens)
        _check_start("find", start)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.evaluation is None or entry.evaluation.start > start:
                self._counters["misses"] += 1
                return None
            self._counters["hits"] += 1
            self._entries.move_to_end(key)
            return entry.evaluation

    def find_reward(self, tokens: Tensor) -> float | None:
        """The reward of exactly these tokens, or None; a use of its entry."""
        key = _key("find_reward", tokens)
        with self._lock:
            entry = self._entries.get(key)
            self._counters["reward_misses" if entry is None else "reward_hits"] += 1
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.reward

    def insert(self, tokens: Tensor, evaluation: Evaluation) -> None:
        """Keeps an evaluation in place of an older one of the same tokens, unless that one starts earlier.

        An older one that stays counts as used.

        Raises:
            TypeError: if the factors are not strided float tensors, or the log-likelihoods not a float64 one.
            ValueError: if the start is negative, a tensor holds no data, or the shapes do not fit together or to the
                number of tokens.
        """
        key = _key("insert", tokens)
        _check_start("insert", evaluation.start)
        values = [*evaluation.factors, evaluation.log_likelihoods]
        _check_values(values, evaluation.start, len(tokens))
        entry = _Entry(evaluation.reward, evaluation, len(key) + sum(value.nbytes for value in values))
        with self._lock:
            old = self._entries.get(key)
            if old is not None and old.evaluation is not None and old.evaluation.start < evaluation.start:
                self._entries.move_to_end(key)
                return
            dropped = self._put(key, entry)
        del old, dropped

    def insert_reward(self, tokens: Tensor, reward: float) -> None:
        """Keeps a reward: of an entry that is there, next to its evaluation, else on its own; a use of the entry."""
        key = _key("insert_reward", tokens)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.reward = reward
                if entry.evaluation is not None:
                    entry.evaluation = replace(entry.evaluation, reward=reward)
                self._entries.move_to_end(key)
                return
            dropped = self._put(key, _Entry(reward, None, len(key)))
        del dropped

    def clear(self) -> None:
        """Drops every entry; the counters stay."""
        with self._lock:
            dropped, self._entries, self._bytes = self._entries, OrderedDict(), 0
        del dropped

    def stats(self) -> dict[str, int]:
        """Counters since the start: ``hits``, ``misses``, ``reward_hits``, ``reward_misses``, ``evictions`` (entries
        that made room for others); and ``entries`` and ``bytes`` held now.
        """
        with self._lock:
            return {**self._counters, "entries": len(self._entries), "bytes": self._bytes}

    def _put(self, key: bytes, entry: _Entry) -> list[_Entry]:
        """Puts an entry in place of another one of its key, if it fits into the budget at all; what left for it."""
        dropped: list[_Entry] = []
        if entry.nbytes > self._max_bytes:
            return dropped
        if key in self._entries:
            dropped.append(self._entries.pop(key))
            self._bytes -= dropped[0].nbytes
        self._entries[key] = entry
        self._bytes += entry.nbytes
        while self._bytes > self._max_bytes:
            dropped.append(self._entries.popitem(last=False)[1])
            self._bytes -= dropped[-1].nbytes
            self._counters["evictions"] += 1
        return dropped


@dataclass
class _Entry:
    reward: float
    evaluation: Evaluation | None  # None where only the reward is known
    nbytes: int


def _key(method: str, tokens: Tensor) -> bytes:
    strided = isinstance(tokens, Tensor) and tokens.layout == torch.strided
    if not strided or tokens.dtype != torch.int64 or not tokens.is_cpu or tokens.ndim != 1:
        wanted = "tokens must be an int64 tensor of shape (n,) on the CPU"
        raise TypeError(f"GradientCache.{method}: {wanted}, got {_described(tokens)}")
    return tokens.numpy().tobytes()


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
    if not (value.dtype == torch.float64 if likelihoods else value.is_floating_point()):
        return TypeError
    fits = value.ndim == 1 and value.is_cpu if likelihoods else value.ndim == 2 and not value.is_meta
    return None if fits else ValueError


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    return f"{value.dtype} of shape {tuple(value.shape)}, {value.layout}, on {value.device}"
