"""The gradient cache, in C++ and in Python, against a dict that forgets by the same rule."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast import gradient_cache
from nabla_fast.gradient_cache import Evaluation, GradientCache
from nabla_fast.ops import TokenGradient, native

WIDTH, REWARD_WIDTH = 4, 3
ROOMY = 10**6
Make = Callable[..., GradientCache]


@pytest.fixture(params=["native", "python"], scope="module")
def make(request: pytest.FixtureRequest) -> Make:
    """Makes caches of one of the two implementations."""
    if request.param == "native" and not native.available():
        pytest.skip("needs the native library")

    def cache(max_bytes: int = ROOMY) -> GradientCache:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "available", lambda: request.param == "native")
            return GradientCache(max_bytes)

    return cache


def key(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def evaluation(rows: int = 1, start: int = 0, reward: float = 0.0) -> Evaluation:
    factors = TokenGradient(
        torch.full((rows, WIDTH), reward), torch.zeros(rows, WIDTH), torch.zeros(rows, REWARD_WIDTH)
    )
    return Evaluation(start, factors, torch.arange(rows, dtype=torch.float64), reward)


def size(tokens: int, rows: int = 0) -> int:
    return tokens * 8 + rows * ((2 * WIDTH + REWARD_WIDTH) * 4 + 8)


def test_rows_and_likelihoods_from_a_position_are_counted_from_the_first_covered_one() -> None:
    factors = TokenGradient(*(torch.randn(5, width) for width in (WIDTH, WIDTH, REWARD_WIDTH)))
    entry = Evaluation(10, factors, torch.tensor([1e17, 1.0, -1e17, 2.0, 4.0], dtype=torch.float64), 0.0)
    for position in range(10, 16):
        for part, whole in zip(entry.rows_from(position), factors, strict=True):
            assert torch.equal(part, whole[position - 10 :])
    assert entry.log_likelihood == 7.0
    assert [entry.log_likelihood_from(position) for position in (12, 13, 15)] == [6.0 - 1e17, 6.0, 0.0]
    for position in (9, 16, -1):
        for method in (entry.rows_from, entry.log_likelihood_from):
            with pytest.raises(ValueError, match=f"from 10 to 15, which this evaluation covers; got {position}"):
                method(position)


def test_python_is_used_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(GradientCache(0)._cache, gradient_cache._PythonCache) is not native.available()
    monkeypatch.setattr(native, "available", lambda: False)
    assert isinstance(GradientCache(0)._cache, gradient_cache._PythonCache)


def test_a_hit_is_the_entry_as_it_was_inserted_and_nothing_is_copied(make: Make) -> None:
    cache, entry = make(), evaluation(rows=2, start=1, reward=0.3)
    assert cache.find(key(7, 8, 9), 5) is None
    cache.insert(key(7, 8, 9), entry)
    for start in (1, 2, 50):
        found = cache.find(key(7, 8, 9), start)
        assert found is not None
        assert (found.start, found.reward) == (1, 0.3)
        assert [x.data_ptr() for x in (*found.factors, found.log_likelihoods)] == [
            x.data_ptr() for x in (*entry.factors, entry.log_likelihoods)
        ]
    for ids, start in (((7, 8, 9), 0), ((7, 8), 1), ((7, 8, 9, 9), 1), ((), 1)):
        assert cache.find(key(*ids), start) is None
    counters = {"hits": 3, "misses": 5, "reward_hits": 0, "reward_misses": 0, "evictions": 0}
    assert cache.stats() == {**counters, "entries": 1, "bytes": size(3, 2)}
    assert (len(cache), cache.bytes) == (1, size(3, 2))


def test_the_tokens_are_copied_and_their_strides_do_not_matter(make: Make) -> None:
    cache, tokens = make(), key(1, 9, 2, 9, 3, 9)
    cache.insert(tokens[::2], evaluation(reward=1.0))
    cache.insert(key(7).expand(3), evaluation(reward=2.0))
    assert cache.bytes == 2 * size(3, 1)
    assert cache.find_reward(tokens[::2]) == 1.0
    tokens.zero_()
    assert [cache.find_reward(key(*ids)) for ids in ((1, 2, 3), (7, 7, 7), (0, 0, 0))] == [1.0, 2.0, None]


def test_the_least_recently_used_goes_first_and_whatever_touches_an_entry_is_a_use(make: Make) -> None:
    uses: list[Callable[[GradientCache], Any]] = [
        lambda cache: cache.find(key(1), 0),
        lambda cache: cache.find_reward(key(1)),
        lambda cache: cache.insert_reward(key(1), 1.0),
        lambda cache: cache.insert(key(1), evaluation()),
        lambda cache: cache.insert(key(1), evaluation(0, 1)),  # covers less, so it is not kept
    ]
    for use in uses:
        cache = make(3 * size(1, 1))
        for i in (1, 2, 3):
            cache.insert(key(i), evaluation())
        use(cache)
        cache.find(key(2), 0)
        cache.find(key(9), 0)  # a miss is no use
        cache.insert(key(4), evaluation())
        assert [cache.find_reward(key(i)) is None for i in (1, 2, 3, 4)] == [False, False, True, False]
        assert cache.stats()["evictions"] == 1


def test_bytes_are_those_of_the_tokens_and_tensors(make: Make) -> None:
    cache = make()
    half = TokenGradient(*(factor.to(torch.bfloat16) for factor in evaluation(3).factors))
    cache.insert(key(1, 2, 3, 4), Evaluation(0, half, torch.zeros(3, dtype=torch.float64), 0.0))
    assert cache.bytes == 4 * 8 + 3 * (2 * WIDTH + REWARD_WIDTH) * 2 + 3 * 8


def test_tensors_are_freed_when_they_leave_also_where_that_runs_code_that_uses_the_cache(make: Make) -> None:
    cache = make(2 * size(1, 1))
    gone: list[int] = []

    def insert(name: int) -> None:
        entry = evaluation()
        weakref.finalize(entry.factors.hidden, lambda: gone.append(name) if cache.bytes >= 0 else None)
        cache.insert(key(name % 10), entry)

    insert(1)
    insert(2)
    assert gone == []
    insert(11)  # takes the place of 1
    assert gone == [1]
    insert(3)  # 2 makes room
    assert gone == [1, 2]
    before = cache.stats()
    cache.clear()
    assert sorted(gone) == [1, 2, 3, 11]
    assert cache.stats() == {**before, "entries": 0, "bytes": 0}
    assert cache.find(key(3), 0) is None


WRONG_TOKENS: list[tuple[Any, str]] = [
    ([1, 2], "list"),
    ((1, 2), "tuple"),
    (torch.zeros(2, dtype=torch.int32), "torch.int32 of shape (2,), torch.strided, on cpu"),
    (torch.tensor(2), "torch.int64 of shape (), torch.strided, on cpu"),
    (torch.zeros(1, 2).long(), "torch.int64 of shape (1, 2), torch.strided, on cpu"),
    (torch.zeros(2, dtype=torch.int64, device="meta"), "torch.int64 of shape (2,), torch.strided, on meta"),
    (torch.zeros(2).long().to_sparse(), "torch.int64 of shape (2,), torch.sparse_coo, on cpu"),
]


@pytest.mark.parametrize("method", ["find", "find_reward", "insert", "insert_reward"])
@pytest.mark.parametrize(("tokens", "got"), WRONG_TOKENS)
def test_wrong_tokens_are_refused(make: Make, method: str, tokens: Any, got: str) -> None:
    cache = make()
    argument = {"find": (0,), "find_reward": (), "insert": (evaluation(),), "insert_reward": (0.0,)}[method]
    with pytest.raises(TypeError) as raised:
        getattr(cache, method)(tokens, *argument)
    wanted = "tokens must be an int64 tensor of shape (n,) on the CPU"
    assert str(raised.value) == f"GradientCache.{method}: {wanted}, got {got}"
    assert not any(cache.stats().values())


@pytest.mark.parametrize(
    ("part", "wrong", "error", "message"),
    [
        ("hidden", [0.0], TypeError, "a strided float tensor of shape (m, d) that holds data, got list"),
        ("hidden", torch.zeros(2, 4).long(), TypeError, "got torch.int64 of shape (2, 4), torch.strided, on cpu"),
        ("embedding", torch.zeros(2, 4).to_sparse(), TypeError, "torch.sparse_coo, on cpu"),
        ("hidden", torch.nested.nested_tensor([torch.zeros(4)], layout=torch.jagged), TypeError, "got a nested tensor"),
        ("hidden", torch.zeros(2), ValueError, "got torch.float32 of shape (2,), torch.strided, on cpu"),
        ("embedding", torch.zeros(2, 4, device="meta"), ValueError, "torch.strided, on meta"),
        ("embedding", torch.zeros(3, 4), ValueError, "embedding must have 2 rows as hidden does, got 3"),
        ("reward_embedding", torch.zeros(2, 3, 1), ValueError, "a strided float tensor of shape (m, d_r)"),
        (
            "log_likelihoods",
            torch.zeros(2),
            TypeError,
            "a strided float64 tensor of shape (m,) on the CPU, got torch.fl",
        ),
        ("log_likelihoods", torch.zeros(1, 2).double(), ValueError, "got torch.float64 of shape (1, 2)"),
        ("log_likelihoods", torch.zeros(2, device="meta").double(), ValueError, "torch.strided, on meta"),
        ("log_likelihoods", torch.zeros(1).double(), ValueError, "must have 2 rows as hidden does, got 1"),
        ("start", -1, ValueError, "start must be 0 or more, got -1"),
        ("start", 2, ValueError, "hidden must have at most 1 rows, for positions 2 to 3, got 2"),
        ("factors", (torch.zeros(2, 4),), TypeError, "factors must be a TokenGradient, got 1 tensors"),
    ],
)
def test_wrong_evaluations_are_refused(make: Make, part: str, wrong: Any, error: type[Exception], message: str) -> None:
    right = evaluation(2)
    given = {"start": 0, "log_likelihoods": right.log_likelihoods, **right.factors._asdict(), part: wrong}
    factors = wrong if part == "factors" else TokenGradient(*(given[name] for name in TokenGradient._fields))
    cache = make()
    with pytest.raises(error) as raised:
        cache.insert(key(1, 2, 3), Evaluation(given["start"], factors, given["log_likelihoods"], 0.0))
    said = str(raised.value)
    assert said.startswith(f"GradientCache.insert: {'hidden' if part == 'start' and wrong > 0 else part} must")
    assert message in said
    assert not any(cache.stats().values())


def test_negative_numbers_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^GradientCache.find: start must be 0 or more, got -3$"):
        make().find(key(1), -3)
    with pytest.raises(ValueError, match=r"^GradientCache: max_bytes must be 0 or more, got -1$"):
        make(-1)


operations = st.tuples(
    st.sampled_from(["find", "find_reward", "insert", "insert", "insert_reward", "clear"]),
    st.sampled_from([(), (-1,), (-2,), (-1, 0), (0, 0), (0, 2**63 - 1), (0, 0, 0)]),
    st.integers(0, 3),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([0, size(2, 1), size(3, 3), 3 * size(2, 2)]), st.lists(operations, min_size=20, max_size=60))
def test_any_operations_give_what_a_dict_gives(make: Make, max_bytes: int, steps: list[Any]) -> None:
    cache = make(max_bytes)
    held: dict[tuple[int, ...], tuple[int | None, float]] = {}  # (start, reward), the least recently used first
    counts = dict.fromkeys(("hits", "misses", "reward_hits", "reward_misses", "evictions"), 0)

    def nbytes(ids: tuple[int, ...], start: int | None) -> int:
        return size(len(ids), 0 if start is None else len(ids) - start)

    for step, (name, ids, number) in enumerate(steps):
        start, reward = min(number, len(ids)), float(step)
        old_start, old_reward = old = held.get(ids, (None, None))
        used: Any = None
        if name == "find":
            found = cache.find(key(*ids), start)
            used = old if old_start is not None and old_start <= start else None
            assert (None if found is None else (found.start, found.reward)) == used
            counts["misses" if used is None else "hits"] += 1
        elif name == "find_reward":
            assert cache.find_reward(key(*ids)) == old_reward
            used = held.get(ids)
            counts["reward_misses" if used is None else "reward_hits"] += 1
        elif name == "insert":
            cache.insert(key(*ids), evaluation(len(ids) - start, start, reward))
            used = old if old_start is not None and old_start < start else (start, reward)
        elif name == "insert_reward":
            cache.insert_reward(key(*ids), reward)
            used = (old_start, reward)
        elif number == 0:
            cache.clear()
            held.clear()
        if used is not None and nbytes(ids, used[0]) <= max_bytes:
            held.pop(ids, None)
            held[ids] = used
        while sum(nbytes(ids, start) for ids, (start, _) in held.items()) > max_bytes:
            held.pop(next(iter(held)))
            counts["evictions"] += 1
        total = sum(nbytes(ids, start) for ids, (start, _) in held.items())
        assert cache.stats() == {**counts, "entries": len(held), "bytes": total}


def test_threads_share_a_cache(make: Make) -> None:
    """Whatever the order, what is found belongs to the tokens, and the books balance in the end."""
    budget = 12 * size(3, 3)
    cache = make(budget)
    done: list[dict[str, int]] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        counts = {"find": 0, "find_reward": 0}
        for _ in range(1500):
            number, start = draw.randrange(40), draw.randrange(4)
            tokens = key(number % 7, number // 7, 5)
            match draw.randrange(8):
                case 0 | 1:
                    cache.insert(tokens, evaluation(3 - start, start, float(number)))
                case 2:
                    cache.insert_reward(tokens, float(number))
                case 3:
                    counts["find_reward"] += 1
                    assert cache.find_reward(tokens) in (None, number)
                case 4 if draw.random() < 0.05:
                    cache.clear()
                case _:
                    counts["find"] += 1
                    found = cache.find(tokens, start)
                    assert found is None or (found.reward == number and len(found.log_likelihoods) == 3 - found.start)
                    assert cache.bytes <= budget
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
    assert min(stats["hits"], stats["reward_hits"], stats["evictions"]) > 0
