"""The gradient cache of csrc/gradient_cache.cpp in Python, for where the native library is missing.

Same methods, results, counters and messages; slower, and it copies the tokens of every call to the host.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_Key = tuple[torch.device, tuple[int, ...]]
_SHAPES = {"hidden": "(m, d)", "embedding": "(m, d)", "reward_embedding": "(m, d_r)", "log_likelihoods": "(m,)"}


@dataclass
class _Entry:
    start: int
    values: list[Tensor]  # empty where only the reward is known
    reward: float
    nbytes: int


class PythonGradientCache:
    """What ``torch.classes.nabla_fast.GradientCache`` is, in Python; `nabla_fast.gradient_cache` is the face of both.

    Args:
        max_bytes: budget in bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        _require(max_bytes >= 0, "GradientCache: max_bytes must be 0 or more", max_bytes)
        self._max_bytes = max_bytes
        self._bytes = 0
        self._counters = dict.fromkeys(
            ("hits", "misses", "partial_hits", "reward_hits", "reward_misses", "evictions"), 0
        )
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # most recently used last
        self._lock = threading.Lock()

    def find(self, tokens: Tensor, start: int) -> tuple[int, list[Tensor], float, int, Tensor]:
        _check_tokens("find", tokens)
        _check_start("find", start)
        key = _key(tokens)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.values and entry.start <= start:
                self._entries.move_to_end(key)
                self._counters["hits"] += 1
                return entry.start, list(entry.values), entry.reward, len(key[1]), tokens.new_empty(0)
            prefix, changed = self._nearest(key)
            self._counters["misses"] += 1
            self._counters["partial_hits"] += prefix > 0
        return -1, [], math.nan, prefix, tokens.new_tensor(changed)

    def find_reward(self, tokens: Tensor) -> float | None:
        _check_tokens("find_reward", tokens)
        key = _key(tokens)
        with self._lock:
            entry = self._entries.get(key)
            self._counters["reward_misses" if entry is None else "reward_hits"] += 1
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.reward

    def insert(self, tokens: Tensor, start: int, values: Sequence[Tensor], reward: float) -> None:
        _check_tokens("insert", tokens)
        _check_start("insert", start)
        _check_values(values, start, len(tokens))
        key = _key(tokens)
        entry = _Entry(start, list(values), reward, sum(tensor.nbytes for tensor in (tokens, *values)))
        dropped: list[_Entry] = []  # dies after the lock is given back: a tensor's last owner may have code to run
        with self._lock:
            old = self._entries.get(key)
            if old is not None and old.values and old.start < start:
                self._entries.move_to_end(key)
            elif entry.nbytes <= self._max_bytes:
                if old is not None:
                    dropped.append(old)
                    self._bytes -= old.nbytes
                self._add(key, entry, dropped)

    def insert_reward(self, tokens: Tensor, reward: float) -> None:
        _check_tokens("insert_reward", tokens)
        key = _key(tokens)
        dropped: list[_Entry] = []
        with self._lock:
            old = self._entries.get(key)
            if old is not None:
                old.reward = reward
                self._entries.move_to_end(key)
            elif tokens.nbytes <= self._max_bytes:
                self._add(key, _Entry(0, [], reward, tokens.nbytes), dropped)

    def clear(self) -> None:
        with self._lock:
            dropped = self._entries  # see insert
            self._entries = OrderedDict()
            self._bytes = 0
        del dropped

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {**self._counters, "entries": len(self._entries), "bytes": self._bytes}

    def _nearest(self, key: _Key) -> tuple[int, list[int]]:
        """Length of the longest common prefix with an entry that has factors, and the positions changed from it."""
        device, tokens = key
        best, nearest = -1, tokens
        for (other_device, other), entry in reversed(self._entries.items()):
            # It must go on being right where the best one so far ends.
            if not entry.values or other_device != device or other[: best + 1] != tokens[: best + 1]:
                continue
            limit = min(len(tokens), len(other))
            if best >= limit:
                continue
            best, nearest = max(best, 0), other
            while best < limit and tokens[best] == other[best]:
                best += 1
        return max(best, 0), [i for i, (a, b) in enumerate(zip(tokens, nearest, strict=False)) if a != b]

    def _add(self, key: _Key, entry: _Entry, dropped: list[_Entry]) -> None:
        """Puts an entry that fits into the budget in place, and makes room for it."""
        self._entries[key] = entry
        self._entries.move_to_end(key)
        self._bytes += entry.nbytes
        while self._bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            dropped.append(evicted)
            self._bytes -= evicted.nbytes
            self._counters["evictions"] += 1


def _key(tokens: Tensor) -> _Key:
    return tokens.device, tuple(tokens.tolist())


def _require(condition: bool, message: str, got: object, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{message}, got {got}")


def _check_tokens(method: str, tokens: Tensor) -> None:
    name = f"GradientCache.{method}: tokens"
    _require(tokens.dtype == torch.int64, f"{name} must be torch.int64", tokens.dtype, TypeError)
    _require(tokens.ndim == 1, f"{name} must have shape (n,)", list(tokens.shape))


def _check_start(method: str, start: int) -> None:
    _require(start >= 0, f"GradientCache.{method}: start must be 0 or more", start)


def _check_values(values: Sequence[Tensor], start: int, length: int) -> None:
    method = "GradientCache.insert:"
    _require(
        len(values) == len(_SHAPES),
        f"{method} values must be {', '.join(list(_SHAPES)[:-1])} and log_likelihoods",
        f"{len(values)} tensors",
    )
    hidden, log_likelihoods = values[0], values[-1]
    for (name, shape), value in zip(_SHAPES.items(), values, strict=True):
        is_right = value.ndim == (1 if name == "log_likelihoods" else 2)
        _require(is_right, f"{method} {name} must have shape {shape}", list(value.shape))
        _require(len(value) == len(hidden), f"{method} {name} must have {len(hidden)} rows as hidden does", len(value))
    dtype, device = log_likelihoods.dtype, log_likelihoods.device
    _require(dtype == torch.float64, f"{method} log_likelihoods must be torch.float64", dtype, TypeError)
    _require(device.type == "cpu", f"{method} log_likelihoods must be on cpu", device)
    most = max(0, length - start)
    message = f"{method} hidden must have at most {most} rows, for positions {start} to {length}"
    _require(len(hidden) <= most, message, len(hidden))
