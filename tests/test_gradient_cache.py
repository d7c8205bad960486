"""The gradient cache, in C++ and in Python, against a list that forgets by the same rule."""

from __future__ import annotations

import itertools
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.gradient_cache_python import PythonGradientCache
from nabla_fast.ops import TokenGradient, native

WIDTH, REWARD_WIDTH = 4, 3
BYTES_PER_ROW = (2 * WIDTH + REWARD_WIDTH) * 4 + 8
BYTES_PER_TOKEN = 8
ROOMY = 10**6


@dataclass(frozen=True)
class Kind:
    """One way to run the cache."""

    name: str
    build: Callable[[int], Any]
    device: str = "cpu"

    def cache(self, max_bytes: int = ROOMY) -> GradientCache:
        cache = GradientCache(max_bytes)
        cache._cache = self.build(max_bytes)
        return cache

    def tokens(self, *ids: int) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def native_kind(hash_bits: int, on_device: bool, device: str = "cpu") -> Kind:
    def build(max_bytes: int) -> Any:
        return torch.classes.nabla_fast.GradientCache(max_bytes, hash_bits, on_device)

    place = device if device != "cpu" else "device path" if on_device else "host path"
    return Kind(f"native, {place}, {hash_bits} bits", build, device)


HOST, DEVICE = native_kind(64, on_device=False), native_kind(64, on_device=True)
CUDA = [native_kind(bits, on_device=False, device="cuda") for bits in (64, 0)] if torch.cuda.is_available() else []
PYTHON = Kind("python", PythonGradientCache)
COLLIDING = [native_kind(bits, on_device) for bits in (0, 3) for on_device in (False, True)]
NATIVE = [HOST, DEVICE, *COLLIDING, *CUDA] if native.available() else []
ALL = [PYTHON, *NATIVE]


def of_kinds(kinds: list[Kind]) -> Any:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


every_kind = of_kinds(ALL)
needs_native = pytest.mark.skipif(not NATIVE, reason="needs the native library")


def evaluation(rows: int = 1, start: int = 0, reward: float = 0.0) -> Evaluation:
    factors = TokenGradient(
        torch.full((rows, WIDTH), reward), torch.zeros(rows, WIDTH), torch.zeros(rows, REWARD_WIDTH)
    )
    return Evaluation(start, factors, torch.arange(rows, dtype=torch.float64), reward)


def size(tokens: int, rows: int = 0) -> int:
    return tokens * BYTES_PER_TOKEN + rows * BYTES_PER_ROW


# ----------------------------------------------------------------------------------------------------------- Evaluation


def test_rows_and_likelihoods_from_a_position_are_counted_from_the_first_covered_one() -> None:
    factors = TokenGradient(*(torch.randn(5, width) for width in (WIDTH, WIDTH, REWARD_WIDTH)))
    entry = Evaluation(10, factors, torch.tensor([1e17, 1.0, -1e17, 2.0, 4.0], dtype=torch.float64), 0.0)
    for position in range(10, 16):
        for part, whole in zip(entry.rows_from(position), factors, strict=True):
            assert torch.equal(part, whole[position - 10 :])
    assert entry.log_likelihood == 7.0
    assert [entry.log_likelihood_from(position) for position in (12, 13, 15)] == [6.0 - 1e17, 6.0, 0.0]


@pytest.mark.parametrize("position", [9, 16, -1])
def test_a_position_that_is_not_covered_is_refused(position: int) -> None:
    entry = evaluation(rows=5, start=10)
    message = f"position must be from 10 to 15, which this evaluation covers; got {position}"
    with pytest.raises(ValueError, match=message):
        entry.rows_from(position)
    with pytest.raises(ValueError, match=message):
        entry.log_likelihood_from(position)


# ----------------------------------------------------------------------------------------------------------------- find


@every_kind
def test_hit_returns_the_entry_as_it_was_inserted_without_copying(kind: Kind) -> None:
    cache = kind.cache()
    entry = evaluation(rows=2, start=1, reward=0.3)
    cache.insert(kind.tokens(7, 8, 9), entry)
    for start in (1, 2, 50):
        found = cache.find(kind.tokens(7, 8, 9), start)
        assert found.evaluation is not None
        assert (found.evaluation.start, found.evaluation.reward, found.common_prefix) == (1, 0.3, 3)
        pairs = zip(
            (*found.evaluation.factors, found.evaluation.log_likelihoods),
            (*entry.factors, entry.log_likelihoods),
            strict=True,
        )
        assert all(ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape for ours, theirs in pairs)
        assert found.changed.shape == (0,)
        assert (found.changed.dtype, found.changed.device.type) == (torch.int64, kind.device)
    assert cache.stats() == {
        "hits": 3,
        "misses": 0,
        "partial_hits": 0,
        "reward_hits": 0,
        "reward_misses": 0,
        "evictions": 0,
        "entries": 1,
        "bytes": size(3, 2),
    }
    assert (len(cache), cache.bytes) == (1, size(3, 2))


@every_kind
def test_entry_that_starts_too_late_is_a_miss_with_everything_in_common(kind: Kind) -> None:
    cache = kind.cache()
    cache.insert(kind.tokens(1, 2, 3), evaluation(start=2))
    found = cache.find(kind.tokens(1, 2, 3), 1)
    assert (found.evaluation, found.common_prefix, found.changed.tolist()) == (None, 3, [])
    assert (cache.stats()["misses"], cache.stats()["partial_hits"]) == (1, 1)


@every_kind
def test_miss_names_the_longest_common_prefix_and_what_changed(kind: Kind) -> None:
    cache = kind.cache()

    def look(*ids: int) -> tuple[int, list[int]]:
        found = cache.find(kind.tokens(*ids), 0)
        assert found.evaluation is None
        assert (found.changed.dtype, found.changed.device.type) == (torch.int64, kind.device)
        return found.common_prefix, found.changed.tolist()

    assert look(1, 2) == (0, [])
    for ids in ((1, 2, 3, 4, 5), (1, 2, 9), (8, 8)):
        cache.insert(kind.tokens(*ids), evaluation())
    cache.insert_reward(kind.tokens(1, 2, 3, 7), 1.0)  # no factors: never near
    assert look(1, 2, 3, 7) == (3, [3])
    assert look(1, 2, 3, 7, 7, 7, 7) == (3, [3, 4])
    assert look(1, 2, 3, 7, 5) == (3, [3])
    assert look(1, 2, 9, 9) == (3, [])
    assert look(1, 2, 3) == (3, [])
    assert look(1, 2) == (2, [])
    assert look(5, 8, 5) == (0, [0])  # from (8, 8), used last
    assert look() == (0, [])
    assert cache.stats()["misses"] == 9
    assert cache.stats()["partial_hits"] == 6
    cache.insert(kind.tokens(), evaluation(rows=0))
    assert cache.find(kind.tokens(), 0).evaluation is not None
    assert look(4) == (0, [])  # from (), used last


@every_kind
def test_the_most_recently_used_of_several_is_nearest_and_a_miss_is_no_use(kind: Kind) -> None:
    cache = kind.cache()
    one, two = kind.tokens(1, 2, 3, 4), kind.tokens(1, 2, 4, 3)
    asked = kind.tokens(1, 2, 5, 4)
    cache.insert(one, evaluation())
    cache.insert(two, evaluation())
    for _ in range(2):
        assert cache.find(asked, 0).changed.tolist() == [2, 3]
    cache.find(one, 0)
    for _ in range(2):
        assert cache.find(asked, 0).changed.tolist() == [2]


@every_kind
def test_tokens_that_collide_are_told_apart(kind: Kind) -> None:
    # CPython gives -1 and -2 the same hash.
    keys = [(-1, 5), (-2, 5), (), (5,), (5, -1), (0,), (0, 0), (2**63 - 1,), (-(2**63),)]
    cache = kind.cache()
    for i, key in enumerate(keys):
        cache.insert(kind.tokens(*key), evaluation(rows=0, reward=float(i)))
    for i, key in enumerate(keys):
        found = cache.find(kind.tokens(*key), 0)
        assert found.evaluation is not None
        assert found.evaluation.reward == i
        assert cache.find_reward(kind.tokens(*key)) == i
    for key in ((-1,), (5, -2), (0, 0, 0), (2**63 - 1, 0)):
        assert cache.find(kind.tokens(*key), 0).evaluation is None
        assert cache.find_reward(kind.tokens(*key)) is None


@every_kind
def test_strides_of_the_tokens_do_not_matter(kind: Kind) -> None:
    cache = kind.cache()
    wide = kind.tokens(1, 9, 2, 9, 3, 9)
    cache.insert(wide[::2], evaluation(reward=1.0))
    cache.insert(kind.tokens(7).expand(3), evaluation(reward=2.0))
    for tokens, reward in ((kind.tokens(1, 2, 3), 1.0), (wide[::2], 1.0), (kind.tokens(7, 7, 7), 2.0)):
        assert cache.find_reward(tokens) == reward
    assert cache.find(wide[1::2], 0).evaluation is None
    assert cache.bytes == 2 * size(3, 1)


@every_kind
def test_writing_to_the_tokens_afterwards_changes_nothing(kind: Kind) -> None:
    cache = kind.cache()
    tokens = kind.tokens(1, 2, 3)
    cache.insert(tokens, evaluation(reward=1.0))
    tokens[0] = 9
    cache.insert_reward(tokens, 2.0)
    tokens.zero_()
    assert cache.find_reward(kind.tokens(1, 2, 3)) == 1.0
    assert cache.find_reward(kind.tokens(9, 2, 3)) == 2.0
    assert cache.find_reward(tokens) is None
    assert cache.find(kind.tokens(1, 2, 4), 0).changed.tolist() == [2]


# --------------------------------------------------------------------------------------------------------------- insert


@every_kind
def test_an_entry_replaces_one_that_covers_no_more(kind: Kind) -> None:
    cache = kind.cache()
    tokens = kind.tokens(1, 2, 3)
    for start, rows, reward in ((2, 1, 1.0), (2, 1, 2.0), (0, 3, 3.0)):
        cache.insert(tokens, evaluation(rows, start, reward))
        found = cache.find(tokens, 2).evaluation
        assert found is not None
        assert (found.start, found.reward) == (start, reward)
        assert (len(cache), cache.bytes) == (1, size(3, rows))
    assert cache.stats()["evictions"] == 0


@every_kind
def test_an_entry_that_covers_more_stays_and_counts_as_used(kind: Kind) -> None:
    cache = kind.cache(2 * size(1, 1))
    entry = evaluation(1, 0, 1.0)
    cache.insert(kind.tokens(1), entry)
    cache.insert(kind.tokens(2), evaluation())
    cache.insert(kind.tokens(1), evaluation(0, 1, 2.0))
    found = cache.find(kind.tokens(1), 0).evaluation
    assert found is not None
    assert found.factors.hidden.data_ptr() == entry.factors.hidden.data_ptr()
    assert (found.start, found.reward, cache.bytes) == (0, 1.0, 2 * size(1, 1))
    # Again, as the least recently used one: a look-up was a use as well.
    cache.find(kind.tokens(2), 0)
    cache.insert(kind.tokens(1), evaluation(0, 1, 2.0))
    cache.insert(kind.tokens(3), evaluation())
    assert [cache.find_reward(kind.tokens(i)) for i in (1, 2, 3)] == [1.0, None, 0.0]


@every_kind
def test_an_entry_larger_than_the_budget_changes_nothing(kind: Kind) -> None:
    cache = kind.cache(size(2, 2))
    cache.insert(kind.tokens(1, 1), evaluation(rows=1, start=1, reward=1.0))
    too_large = evaluation(rows=2)
    too_large = Evaluation(0, TokenGradient(*(f.double() for f in too_large.factors)), too_large.log_likelihoods, 2.0)
    for ids in ((1, 1), (2, 2)):
        cache.insert(kind.tokens(*ids), too_large)
    cache.insert_reward(kind.tokens(*range(100)), 1.0)
    assert [cache.find_reward(kind.tokens(*ids)) for ids in ((1, 1), (2, 2), range(100))] == [1.0, None, None]
    assert (cache.stats()["evictions"], cache.bytes) == (0, size(2, 1))
    exactly = kind.cache(size(2, 2))
    exactly.insert(kind.tokens(1, 1), evaluation(rows=2))
    assert exactly.bytes == size(2, 2)
    nothing = kind.cache(0)
    nothing.insert(kind.tokens(1), evaluation())
    nothing.insert_reward(kind.tokens(1), 1.0)
    assert (len(nothing), nothing.bytes, nothing.stats()["evictions"]) == (0, 0, 0)


@every_kind
def test_the_least_recently_used_goes_first_and_finding_is_a_use(kind: Kind) -> None:
    cache = kind.cache(3 * size(1, 1))

    def held() -> list[int]:
        """Without a use: the prefixes of misses."""
        return [i for i in range(9) if cache.find(kind.tokens(i, 0), 0).common_prefix == 1]

    for i in (1, 2, 3):
        cache.insert(kind.tokens(i), evaluation())
    cache.find(kind.tokens(1), 0)
    cache.insert(kind.tokens(4), evaluation())
    assert held() == [1, 3, 4]
    cache.find_reward(kind.tokens(3))
    cache.insert(kind.tokens(5), evaluation())
    assert held() == [3, 4, 5]
    cache.insert_reward(kind.tokens(4), 1.0)
    cache.insert(kind.tokens(6), evaluation())
    assert held() == [4, 5, 6]
    cache.insert(kind.tokens(5, 5), evaluation(rows=2))
    assert cache.stats()["evictions"] == 5
    assert held() == [5, 6]
    assert cache.bytes == size(2, 2) + size(1, 1)


@every_kind
def test_replacing_an_entry_by_a_larger_one_makes_room_for_it(kind: Kind) -> None:
    cache = kind.cache(2 * size(2, 1) + 8)
    cache.insert(kind.tokens(1, 1), evaluation(1, 1))
    cache.insert(kind.tokens(2, 2), evaluation(1, 1))
    cache.insert(kind.tokens(1, 1), evaluation(2, 0))
    assert (len(cache), cache.bytes, cache.stats()["evictions"]) == (1, size(2, 2), 1)
    assert cache.find(kind.tokens(1, 1), 0).evaluation is not None


@every_kind
def test_bytes_are_those_of_the_tokens_and_tensors(kind: Kind) -> None:
    cache = kind.cache()
    half = TokenGradient(*(factor.to(torch.bfloat16) for factor in evaluation(3).factors))
    cache.insert(kind.tokens(1, 2, 3, 4), Evaluation(0, half, torch.zeros(3, dtype=torch.float64), 0.0))
    assert cache.bytes == 4 * 8 + 3 * (2 * WIDTH + REWARD_WIDTH) * 2 + 3 * 8


# -------------------------------------------------------------------------------------------------------------- rewards


@every_kind
def test_rewards_live_alone_or_beside_factors(kind: Kind) -> None:
    cache = kind.cache()
    tokens = kind.tokens(1, 2)
    assert cache.find_reward(tokens) is None
    cache.insert_reward(tokens, 1)
    assert cache.bytes == size(2)
    cache.insert_reward(tokens, 2.5)
    assert cache.find_reward(tokens) == 2.5
    assert cache.find(tokens, 5).evaluation is None
    cache.insert(tokens, evaluation(1, 1, 3.0))
    assert (len(cache), cache.bytes) == (1, size(2, 1))
    assert cache.find_reward(tokens) == 3.0
    cache.insert_reward(tokens, 4.0)
    found = cache.find(tokens, 1).evaluation
    assert found is not None
    assert (found.reward, cache.find_reward(tokens), cache.bytes) == (4.0, 4.0, size(2, 1))
    cache.insert_reward(tokens, math.nan)
    assert math.isnan(cache.find_reward(tokens) or 0.0)
    counted = {"hits": 1, "misses": 1, "partial_hits": 0, "reward_hits": 4, "reward_misses": 1}
    assert counted.items() <= cache.stats().items()


@every_kind
def test_clear_drops_entries_and_keeps_counters(kind: Kind) -> None:
    cache = kind.cache(2 * size(1, 1))
    for i in range(3):
        cache.insert(kind.tokens(i), evaluation())
    cache.find(kind.tokens(2), 0)
    before = cache.stats()
    cache.clear()
    assert cache.stats() == {**before, "entries": 0, "bytes": 0}
    assert cache.find_reward(kind.tokens(2)) is None
    assert cache.find(kind.tokens(2), 0).common_prefix == 0
    cache.insert(kind.tokens(2), evaluation())
    assert cache.bytes == size(1, 1)


@every_kind
def test_entries_leave_memory_when_they_leave_the_cache(kind: Kind) -> None:
    """Also where a tensor's last owner runs code that uses the cache."""
    cache = kind.cache(2 * size(1, 1))
    gone: list[int] = []

    def insert(name: int) -> None:
        entry = evaluation()
        weakref.finalize(entry.factors.hidden, lambda: gone.append(name) if cache.bytes >= 0 else None)
        cache.insert(kind.tokens(name % 10), entry)

    insert(1)
    insert(2)
    assert gone == []
    insert(11)
    assert gone == [1]
    insert(3)
    assert gone == [1, 2]
    cache.clear()
    assert sorted(gone) == [1, 2, 3, 11]


# --------------------------------------------------------------------------------------------------------------- errors

FACTORS = TokenGradient(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))
LIKELIHOODS = torch.zeros(2, dtype=torch.float64)


@every_kind
@pytest.mark.parametrize("method", ["find", "find_reward", "insert", "insert_reward"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2], TypeError, "GradientCache: tokens must be an int64 tensor of shape (n,), got list"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "GradientCache.{}: tokens must be torch.int64, got torch.int32"),
        (torch.zeros(2), TypeError, "GradientCache.{}: tokens must be torch.int64, got torch.float32"),
        (torch.tensor(2), ValueError, "GradientCache.{}: tokens must have shape (n,), got []"),
        (torch.zeros(1, 2).long(), ValueError, "GradientCache.{}: tokens must have shape (n,), got [1, 2]"),
    ],
)
def test_wrong_tokens_are_refused(kind: Kind, method: str, tokens: Any, error: type[Exception], message: str) -> None:
    cache = kind.cache()
    argument = {"find": (0,), "find_reward": (), "insert": (evaluation(),), "insert_reward": (0.0,)}[method]
    with pytest.raises(error) as raised:
        getattr(cache, method)(tokens, *argument)
    assert str(raised.value) == message.format(method)
    assert not any(cache.stats().values())


@every_kind
@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (Evaluation(-1, FACTORS, LIKELIHOODS, 0.0), ValueError, "start must be 0 or more, got -1"),
        (
            Evaluation(0, FACTORS[:2], LIKELIHOODS, 0.0),  # type: ignore[arg-type]
            ValueError,
            "values must be hidden, embedding, reward_embedding and log_likelihoods, got 3 tensors",
        ),
        (
            Evaluation(0, FACTORS._replace(hidden=torch.zeros(2)), LIKELIHOODS, 0.0),
            ValueError,
            "hidden must have shape (m, d), got [2]",
        ),
        (
            Evaluation(0, FACTORS._replace(reward_embedding=torch.zeros(2, 3, 1)), LIKELIHOODS, 0.0),
            ValueError,
            "reward_embedding must have shape (m, d_r), got [2, 3, 1]",
        ),
        (
            Evaluation(0, FACTORS, LIKELIHOODS[None], 0.0),
            ValueError,
            "log_likelihoods must have shape (m,), got [1, 2]",
        ),
        (
            Evaluation(0, FACTORS._replace(embedding=torch.zeros(3, 4)), LIKELIHOODS, 0.0),
            ValueError,
            "embedding must have 2 rows as hidden does, got 3",
        ),
        (
            Evaluation(0, FACTORS, LIKELIHOODS[:1], 0.0),
            ValueError,
            "log_likelihoods must have 2 rows as hidden does, got 1",
        ),
        (
            Evaluation(0, FACTORS, LIKELIHOODS.float(), 0.0),
            TypeError,
            "log_likelihoods must be torch.float64, got torch.float32",
        ),
        (
            Evaluation(0, FACTORS, LIKELIHOODS.to("meta"), 0.0),
            ValueError,
            "log_likelihoods must be on cpu, got meta",
        ),
        (
            Evaluation(2, FACTORS, LIKELIHOODS, 0.0),
            ValueError,
            "hidden must have at most 1 rows, for positions 2 to 3, got 2",
        ),
        (
            Evaluation(5, FACTORS, LIKELIHOODS, 0.0),
            ValueError,
            "hidden must have at most 0 rows, for positions 5 to 3, got 2",
        ),
    ],
)
def test_wrong_evaluations_are_refused(kind: Kind, entry: Evaluation, error: type[Exception], message: str) -> None:
    cache = kind.cache()
    with pytest.raises(error) as raised:
        cache.insert(kind.tokens(1, 2, 3), entry)
    assert str(raised.value) == f"GradientCache.insert: {message}"
    assert not any(cache.stats().values())


@every_kind
def test_wrong_numbers_are_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"^GradientCache.find: start must be 0 or more, got -3$"):
        kind.cache().find(kind.tokens(1), -3)
    with pytest.raises(ValueError, match=r"^GradientCache: max_bytes must be 0 or more, got -1$"):
        kind.build(-1)


@needs_native
@pytest.mark.parametrize("bits", [-1, 65])
def test_wrong_hash_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^GradientCache: hash_bits must be from 0 to 64, got {bits}$"):
        torch.classes.nabla_fast.GradientCache(0, bits)


# -------------------------------------------------------------------------------------------- which implementation runs


@needs_native
def test_the_native_library_is_used_where_there_is_one() -> None:
    assert type(GradientCache(0)._cache).__name__ == "ScriptObject"


def test_python_is_used_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert isinstance(GradientCache(0)._cache, PythonGradientCache)


class Recorder(TorchDispatchMode):
    """Counts the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@of_kinds(NATIVE)
def test_no_python_runs_under_the_lock(kind: Kind) -> None:
    """A dispatch mode could let another thread wait for the lock with the interpreter's lock in its hand."""
    cache = kind.cache(2 * size(2, 1))
    keys = [kind.tokens(*ids) for ids in itertools.product((1, 2), repeat=2)]
    entry = evaluation()
    with Recorder() as mode:
        for key in (*keys, *keys):
            cache.insert(key, entry)
            cache.insert_reward(key, 1.0)
            cache.find(key, 0)
            cache.find(keys[0], 0)
            cache.find_reward(key)
        cache.clear()
    assert mode.seen == []


@every_kind
def test_inference_mode_does_not_matter(kind: Kind) -> None:
    cache = kind.cache()
    with torch.inference_mode():
        cache.insert(kind.tokens(1, 2), evaluation())
        assert cache.find(kind.tokens(1, 3), 0).changed.tolist() == [1]
    assert cache.find(kind.tokens(1, 2), 0).evaluation is not None
    changed = cache.find(kind.tokens(1, 3), 0).changed
    changed += 1
    assert changed.tolist() == [2]
    cache.insert(kind.tokens(1, 3), evaluation())
    with torch.inference_mode():
        assert cache.find(kind.tokens(1, 3), 0).evaluation is not None


@of_kinds([kind for kind in NATIVE if "device path" in kind.name])
def test_long_tokens_grow_the_powers_of_the_hash(kind: Kind) -> None:
    """Both paths hash alike, so what they find does not depend on the order of lengths."""
    cache = kind.cache(10**7)
    lengths = [3, 5000, 1, 1024, 1025, 20_000]
    keys = [torch.arange(length) * 7 - length for length in lengths]
    for i, key in enumerate(keys):
        cache.insert_reward(key, float(i))
    assert [cache.find_reward(key) for key in keys] == list(range(len(lengths)))
    key = keys[1].clone()
    key[4321] += 1
    assert cache.find_reward(key) is None


# --------------------------------------------------------------------------------------------------------------- oracle


@dataclass
class Oracle:
    """The same rules on a list, the least recently used entry first: (ids, start or None, rows, reward)."""

    max_bytes: int
    entries: list[tuple[tuple[int, ...], int | None, int, float]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("hits", "misses", "partial_hits", "reward_hits", "reward_misses", "evictions"), 0
        )
    )

    def stats(self) -> dict[str, int]:
        return {**self.counts, "entries": len(self.entries), "bytes": self.bytes()}

    def bytes(self) -> int:
        return sum(size(len(ids), rows) for ids, _, rows, _ in self.entries)

    def take(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], int | None, int, float] | None:
        """The entry of these tokens, removed."""
        for i, entry in enumerate(self.entries):
            if entry[0] == ids:
                return self.entries.pop(i)
        return None

    def find(self, ids: tuple[int, ...], start: int) -> tuple[int, float] | tuple[None, int, list[int]]:
        for entry in self.entries:
            if entry[0] == ids and entry[1] is not None and entry[1] <= start:
                self.entries.remove(entry)
                self.entries.append(entry)
                self.counts["hits"] += 1
                return entry[1], entry[3]
        best, nearest = -1, ids
        for entry in self.entries:
            prefix = len(list(itertools.takewhile(lambda ab: ab[0] == ab[1], zip(ids, entry[0], strict=False))))
            if entry[1] is not None and prefix >= best:
                best, nearest = prefix, entry[0]
        self.counts["misses"] += 1
        self.counts["partial_hits"] += best > 0
        return None, max(best, 0), [i for i in range(min(len(ids), len(nearest))) if ids[i] != nearest[i]]

    def find_reward(self, ids: tuple[int, ...]) -> float | None:
        entry = self.take(ids)
        self.counts["reward_hits" if entry else "reward_misses"] += 1
        if entry is None:
            return None
        self.entries.append(entry)
        return entry[3]

    def insert(self, ids: tuple[int, ...], start: int, rows: int, reward: float) -> None:
        before = list(self.entries)
        old = self.take(ids)
        if old is not None and old[1] is not None and old[1] < start:
            self.entries.append(old)
        elif size(len(ids), rows) <= self.max_bytes:
            self.entries.append((ids, start, rows, reward))
            self.forget()
        else:
            self.entries = before

    def insert_reward(self, ids: tuple[int, ...], reward: float) -> None:
        old = self.take(ids)
        if old is not None:
            self.entries.append((*old[:3], reward))
        elif size(len(ids)) <= self.max_bytes:
            self.entries.append((ids, None, 0, reward))
            self.forget()

    def forget(self) -> None:
        while self.bytes() > self.max_bytes:
            self.entries.pop(0)
            self.counts["evictions"] += 1


@every_kind
@pytest.mark.parametrize("max_bytes", [size(3, 2), 8 * size(4, 2), 20 * size(4, 2)])
def test_ten_thousand_random_operations_equal_the_oracle(kind: Kind, max_bytes: int, one_thread: None) -> None:
    draw = random.Random(max_bytes)
    cache, oracle = kind.cache(max_bytes), Oracle(max_bytes)
    for step in range(10_000):
        ids = tuple(draw.randrange(3) for _ in range(draw.randrange(6)))
        start = draw.randrange(len(ids) + 1)
        match draw.random():
            case x if x < 0.4:
                found, expected = cache.find(kind.tokens(*ids), start), oracle.find(ids, start)
                if found.evaluation is not None:
                    assert (found.evaluation.start, found.evaluation.reward) == expected
                    assert found.evaluation.factors.hidden.shape[0] == found.evaluation.log_likelihoods.shape[0]
                    assert (found.common_prefix, found.changed.tolist()) == (len(ids), [])
                else:
                    assert (None, found.common_prefix, found.changed.tolist()) == expected
            case x if x < 0.7:
                rows = len(ids) - start
                cache.insert(kind.tokens(*ids), evaluation(rows, start, float(step)))
                oracle.insert(ids, start, rows, float(step))
            case x if x < 0.85:
                cache.insert_reward(kind.tokens(*ids), float(step))
                oracle.insert_reward(ids, float(step))
            case x if x < 0.998:
                assert cache.find_reward(kind.tokens(*ids)) == oracle.find_reward(ids)
            case _:
                cache.clear()
                oracle.entries.clear()
        assert cache.stats() == oracle.stats()
    assert all(count > 100 for count in oracle.counts.values())


@every_kind
def test_long_sequences_find_the_nearest_as_the_oracle_does(kind: Kind, one_thread: None) -> None:
    """Answers that branched off each other: long prefixes in common, some shorter than others."""
    draw = random.Random(5)
    cache, oracle = kind.cache(10**8), Oracle(10**8)
    answers = [tuple(draw.randrange(9) for _ in range(300))]
    for step in range(60):
        base = draw.choice(answers)
        cut = draw.randrange(len(base) + 1)
        answer = (*base[:cut], *(draw.randrange(9) for _ in range(draw.randrange(200))))
        found, expected = cache.find(kind.tokens(*answer), 0), oracle.find(answer, 0)
        if found.evaluation is None:
            assert (None, found.common_prefix, found.changed.tolist()) == expected
        cache.insert(kind.tokens(*answer), evaluation(0, 0, float(step)))
        oracle.insert(answer, 0, 0, float(step))
        answers.append(answer)
    assert cache.stats() == oracle.stats()


# -------------------------------------------------------------------------------------------------------------- threads


def all_ids() -> Iterator[tuple[int, ...]]:
    for length in range(4):
        yield from itertools.product(range(3), repeat=length)


@every_kind
def test_threads_share_a_cache(kind: Kind) -> None:
    """Whatever the order, what is found belongs to the tokens, and the books balance in the end."""
    cache = kind.cache(12 * size(3, 3))
    keys = list(all_ids())
    done: list[dict[str, int]] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        counts = {"find": 0, "find_reward": 0}
        for _ in range(1500):
            number = draw.randrange(len(keys))
            ids, tokens = keys[number], kind.tokens(*keys[number])
            match draw.randrange(8):
                case 0 | 1:
                    start = draw.randrange(len(ids) + 1)
                    cache.insert(tokens, evaluation(len(ids) - start, start, float(number)))
                case 2:
                    cache.insert_reward(tokens, float(number))
                case 3:
                    counts["find_reward"] += 1
                    assert cache.find_reward(tokens) in (None, number)
                case 4 if draw.random() < 0.05:
                    cache.clear()
                case _:
                    counts["find"] += 1
                    found = cache.find(tokens, len(ids))
                    if found.evaluation is not None:
                        assert found.evaluation.reward == number
                        assert len(found.evaluation.factors.hidden) == len(ids) - found.evaluation.start
                    assert cache.bytes <= 12 * size(3, 3)
        done.append(counts)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(done) == 2
    stats = cache.stats()
    assert stats["hits"] + stats["misses"] == sum(counts["find"] for counts in done)
    assert stats["reward_hits"] + stats["reward_misses"] == sum(counts["find_reward"] for counts in done)
    assert stats["partial_hits"] <= stats["misses"]
    entries = held = 0
    for ids in keys:
        if cache.find_reward(kind.tokens(*ids)) is None:
            continue
        found = cache.find(kind.tokens(*ids), len(ids)).evaluation
        entries += 1
        held += size(len(ids), 0 if found is None else len(found.factors.hidden))
    assert (stats["entries"], stats["bytes"]) == (entries, held)
