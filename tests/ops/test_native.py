"""The C++ operators against `nabla_fast.ops.reference` in float64, and what happens without their library."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import lesser_instruction_sets, repeat_tests, run_python
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, RelaxedStats, Tables, TokenGradient
from nabla_fast.testing.operators import Backend

if not native.available():
    pytest.skip(f"no native library: {native.why_missing()}", allow_module_level=True)

cpp = Backend("native")

pytestmark = pytest.mark.usefixtures("two_threads")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def assert_near(actual: Tensor, meant: Tensor, tolerance: float) -> None:
    assert actual.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(actual.double(), meant.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


# relaxed_stats


def assert_stats(z: Tensor, tau: float) -> None:
    actual = cpp.relaxed_stats(z, tau, 1.0, 0.9)
    meant = reference.relaxed_stats(z.double(), tau, 1.0, 0.9)
    for ours, theirs in zip(actual[:3], meant[:3], strict=True):
        assert ours.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
        assert_near(ours, theirs, 1e-12 if z.dtype == torch.float64 else 2e-6)
    # argmax promises no order among equals, so the lowest index is looked up.
    is_max = z == z.amax(-1, keepdim=True)
    lowest = torch.where(is_max, torch.arange(z.shape[-1]), z.shape[-1]).amin(-1)
    assert torch.equal(actual.token, torch.where(meant.token < 0, -1, lowest))
    assert torch.equal(actual.mask, (actual.token >= 0) & (actual.entropy >= 1.0) & (actual.max_prob <= 0.9))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 33, 8193, 49152])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_relaxed_stats_random(rows: int, columns: int, dtype: torch.dtype) -> None:
    assert_stats(random(rows, columns, seed=rows + columns, dtype=dtype, scale=4), 0.7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_relaxed_stats_strides(dtype: torch.dtype) -> None:
    base = random(40, 3000, seed=0, dtype=dtype)
    for z in (base.T, base[:, ::3], base[::2, 5:-1], base[:1].expand(7, -1), base[:, :1].expand(-1, 9)):
        assert_stats(z, 1.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [2, 33, 20000])
def test_relaxed_stats_ties_take_the_lowest_index(columns: int, dtype: torch.dtype) -> None:
    z = torch.zeros(4, columns, dtype=dtype)
    z[1, -1] = z[1, columns // 2] = 5
    z[2, 0] = z[2, -1] = 5
    z[3, -1] = 5
    assert cpp.relaxed_stats(z).token.tolist() == [0, columns // 2, 0, columns - 1]
    assert_stats(z, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 2, 33, 20000])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_relaxed_stats_undefined_rows(value: float, at: int, columns: int, dtype: torch.dtype) -> None:
    z = random(6, columns, seed=1, dtype=dtype)
    z[1, at] = value
    z[2] = -math.inf
    z[3] = -math.inf
    z[3, at] = value
    z[4] = torch.finfo(dtype).max
    z[4, at] = value
    assert cpp.relaxed_stats(z).token[1:5].tolist() == [-1] * 4
    assert_stats(z, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_relaxed_stats_masked_entries_add_nothing(dtype: torch.dtype) -> None:
    z = torch.full((3, 20000), -math.inf, dtype=dtype)
    z[0, 19999] = -3
    z[1, [4, 17000]] = 2
    z[2, 9000:9100] = 0.5
    assert_stats(z, 0.6)
    assert_near(cpp.relaxed_stats(z, 0.6).entropy, torch.tensor([0, math.log(2), math.log(100)]), 1e-6)


def test_relaxed_stats_rising_rows() -> None:
    """The maximum moves in every block, so every partial sum is rescaled, some of them to nothing."""
    ramp = torch.linspace(-300, 300, 30000)
    assert_stats(torch.stack([ramp, ramp.flip(0), ramp.abs(), ramp / 100]), 1.0)
    assert_stats(torch.tensor([[-3e38, 3e38, 0.0]]), 1.0)
    cliff = torch.full((1, 20000), -1.7e308, dtype=torch.float64)
    cliff[0, 15000] = 1.7e308
    assert_stats(cliff, 1.0)
    dominant = random(2, 20000, seed=8, dtype=torch.float32)
    dominant[0, 19999] = dominant[1, 3] = 1e4
    assert_stats(dominant, 0.05)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.floats(0.01, 30),
    tau=st.floats(0.05, 10),
    holes=st.floats(0, 1),
    seed=SEEDS,
)
def test_relaxed_stats_property(
    rows: int, columns: int, dtype: torch.dtype, scale: float, tau: float, holes: float, seed: int
) -> None:
    z = random(rows, columns, seed=seed, dtype=dtype, scale=scale)
    z[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < holes] = -math.inf
    assert_stats(z, tau)


def test_relaxed_stats_row_does_not_depend_on_batch_or_threads() -> None:
    z = random(5, 30011, seed=2, dtype=torch.float32)
    together = cpp.relaxed_stats(z, 0.9)
    torch.set_num_threads(1)
    alone = [cpp.relaxed_stats(row[None], 0.9) for row in z]
    for index, statistic in enumerate(together):
        assert torch.equal(statistic, torch.cat([row[index] for row in alone]))


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e300])
def test_rejects_tau(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        cpp.relaxed_stats(torch.zeros(1, 3), tau)
    with pytest.raises(ValueError, match="tau must be positive"):
        cpp.linear_relaxed_stats(torch.zeros(1, 3), Head(torch.zeros(2, 3)), tau)


def test_relaxed_stats_rejects_shapes_and_dtypes() -> None:
    with pytest.raises(RuntimeError, match=r"z must have shape \(N, V\)"):
        cpp.relaxed_stats(torch.zeros(3))
    with pytest.raises(RuntimeError, match="at least one vocabulary entry"):
        cpp.relaxed_stats(torch.zeros(3, 0))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(TypeError, match="relaxed_stats: z must be of a float dtype"):
            cpp.relaxed_stats(torch.zeros(3, 3).to(dtype))


def test_only_dense_tensors_of_the_cpu_whatever_their_place() -> None:
    ids, z = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    others: list[tuple[Tensor, str]] = [
        (ids.to_sparse(), "must be a dense tensor, got layout Sparse"),
        (ids.to("meta"), "must be on the CPU, got a tensor on meta"),
    ]
    for other, reason in others:
        with pytest.raises((TypeError, RuntimeError), match=f"token_diff: new {reason}"):
            cpp.token_diff(ids, other)
        with pytest.raises((TypeError, RuntimeError), match=f"tables.1. {reason}"):
            cpp.straight_through_embedding(z, [z.T, other])


def test_a_tensor_without_its_storage_is_refused() -> None:
    z = torch.zeros(2, 3)
    z.untyped_storage().resize_(20)
    with pytest.raises(RuntimeError, match="z must have storage for all of its elements, which take 24 bytes, got 20"):
        cpp.relaxed_stats(z)


# The operators that read the head


def wide(head: Head) -> Head:
    return head._replace(weight=head.weight.double())


def tolerance(*tensors: Tensor) -> float:
    """float32 arithmetic unless float64 came in; the tests' logits are about 10 at most where nothing else is said."""
    return 1e-11 if any(tensor.dtype == torch.float64 for tensor in tensors) else 2e-5


def assert_linear_stats(h: Tensor, head: Head, tau: float = 1.0, tokens: bool = True) -> RelaxedStats:
    actual = cpp.linear_relaxed_stats(h, head, tau, 1.0, 0.9)
    meant = reference.linear_relaxed_stats(h.double(), wide(head), tau, 1.0, 0.9)
    for ours, theirs in zip(actual[:3], meant[:3], strict=True):
        assert_near(ours, theirs, tolerance(h, head.weight) / min(tau, 1))
    assert torch.equal(actual.token < 0, meant.token < 0)
    if tokens:
        logits = reference.linear_logits(h.double(), wide(head))
        chosen = logits.gather(-1, actual.token.clamp(min=0)[:, None])[:, 0]
        assert_near(*(x[actual.token >= 0] for x in (chosen, logits.amax(-1))), tolerance(h, head.weight))
    return actual


def assert_likelihood(h: Tensor, head: Head, tokens: Tensor, factor: float = 1.0) -> None:
    log_pi, gradient = cpp.log_likelihood_gradient(h, head, tokens, True)
    meant, meant_gradient = reference.log_likelihood_gradient(h.double(), wide(head), tokens, True)
    assert_near(log_pi, meant, factor * tolerance(h, head.weight))
    # Beside a bfloat16 head, softmax weights of bfloat16 states have 8 bits.
    rounds = h.dtype == head.weight.dtype == torch.bfloat16 and len(h)
    rounding = 2**-8 * head.scale * float(head.weight.abs().max()) if rounds else 0.0
    assert_near(gradient, meant_gradient, factor * tolerance(h, head.weight) + rounding)
    alone, nothing = cpp.log_likelihood_gradient(h, head, tokens, False)
    assert torch.equal(alone, log_pi) or log_pi.isnan().any()
    assert nothing.shape == (0, h.shape[1])


def assert_norm(factors: TokenGradient, tables: Tables, factor: float = 1.0) -> None:
    wide_tables = Tables(
        wide(tables.head), tables.embedding.double(), tables.reward_embedding.double(), tables.nll_coeff
    )
    meant = reference.gradient_norm(TokenGradient(*(x.double() for x in factors)), wide_tables)
    everything = (*factors, tables.head.weight, tables.embedding, tables.reward_embedding)
    error = (cpp.gradient_norm(factors, tables).double() - meant).abs()
    assert bool((error <= factor * tolerance(*everything) * (meant + 1)).all())


def assert_all_linear(
    rows: int, vocabulary: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int, **head: float
) -> None:
    h = random(rows, width, seed=seed, dtype=dtypes[0])
    made = Head(random(vocabulary, width, seed=seed + 1, dtype=dtypes[1], scale=2 / width**0.5), **head)
    assert_linear_stats(h, made)
    tokens = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    assert_likelihood(h, made, tokens)
    a, b = random(rows, width, seed=seed + 2, dtype=dtypes[0]), random(rows, 12, seed=seed + 3, dtype=dtypes[0])
    reward = random(vocabulary, 12, seed=seed + 4, dtype=dtypes[1])
    for nll_coeff in (0.7, 0.0):
        assert_norm(TokenGradient(h, a, b), Tables(made, made.weight, reward, nll_coeff))


@pytest.mark.parametrize("table", FLOATS)
@pytest.mark.parametrize("row", FLOATS)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"), [(3, 33, 8), (65, 300, 33), (64, 1, 64), (0, 5, 8), (1, 2, 8)]
)
def test_linear_operators(rows: int, vocabulary: int, width: int, row: torch.dtype, table: torch.dtype) -> None:
    assert_all_linear(rows, vocabulary, width, (row, table), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [49152, 50257])
def test_linear_operators_with_a_whole_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    assert_all_linear(5, vocabulary, 64, (dtype, dtype), 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_operators_with_scale_and_softcap(dtype: torch.dtype) -> None:
    assert_all_linear(5, 333, 16, (dtype, dtype), 5, scale=1.7, softcap=3.0)
    assert_all_linear(5, 333, 16, (dtype, dtype), 6, scale=0.3)


def test_linear_operators_with_more_rows_than_one_pass_takes() -> None:
    assert_all_linear(1100, 40, 8, (torch.float32, torch.float32), 7)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    vocabulary=st.integers(1, 700),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=SEEDS,
)
def test_linear_operators_property(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, softcap: float, seed: int
) -> None:
    assert_all_linear(rows, vocabulary, width, (dtype, dtype), seed, softcap=softcap)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 8), (17, 1001, 64), (70, 513, 33), (600, 31, 6)])
def test_likelihood_weights_that_bfloat16_holds_are_not_rounded(rows: int, vocabulary: int, width: int) -> None:
    """Whole logits to the base 2."""
    generator = torch.Generator().manual_seed(8)
    h, weight = (
        torch.randint(-1, 2, (count, width), generator=generator).to(torch.bfloat16) for count in (rows, vocabulary)
    )
    head = Head(weight, scale=math.log(2))
    tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
    gradient = cpp.log_likelihood_gradient(h, head, tokens, True)[1]
    meant = reference.log_likelihood_gradient(h.double(), wide(head), tokens, True)[1]
    assert_near(gradient, meant, tolerance(h))


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_operators_strides(dtype: torch.dtype) -> None:
    base = random(40, 24, seed=9, dtype=dtype)
    table = random(60, 100, seed=10, dtype=dtype, scale=0.3)
    for h in (base[:, 4:12], base[::2, ::3], base[:8].T, base[:1, :8].expand(5, -1)):
        for weight in (table[:, 7 : 7 + h.shape[1]], table[::2, : 2 * h.shape[1] : 2], table[: h.shape[1]].T):
            head = Head(weight)
            assert_linear_stats(h, head)
            tokens = torch.arange(2 * len(h))[::2] % len(weight)
            assert_likelihood(h, head, tokens)
            assert_norm(TokenGradient(h, h.flip(0), h), Tables(head, weight.flip(0), weight, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.05, 10.0])
def test_linear_stats_over_temperatures(tau: float, dtype: torch.dtype) -> None:
    h, weight = random(5, 16, seed=11, dtype=dtype), random(3000, 16, seed=12, dtype=dtype, scale=0.5)
    assert_linear_stats(h, Head(weight), tau)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_ties_take_the_lowest_index(dtype: torch.dtype) -> None:
    weight = random(3000, 16, seed=13, dtype=dtype)
    h = random(40, 16, seed=14, dtype=dtype)
    token = cpp.linear_relaxed_stats(h, Head(weight)).token
    repeated = cpp.linear_relaxed_stats(h, Head(torch.cat([weight] * 3))).token
    assert torch.equal(token, repeated)


def test_linear_rows_without_a_distribution() -> None:
    h, weight = random(4, 8, seed=15, dtype=torch.float32), random(900, 8, seed=16, dtype=torch.float32)
    h[1, 3] = math.nan
    h[2, 3] = math.inf
    actual = assert_linear_stats(h, Head(weight))
    assert actual.token[1:3].tolist() == [-1, -1]
    log_pi, gradient = cpp.log_likelihood_gradient(h, Head(weight), torch.tensor([1, 2, 3, 4]), True)
    norm = cpp.gradient_norm(TokenGradient(h, h, h), Tables(Head(weight), weight, weight, 0.1))
    for result in (log_pi, gradient, norm):
        assert result[1:3].isnan().all()
        assert result[[0, 3]].isfinite().all()


def test_linear_entries_of_minus_infinity_add_nothing() -> None:
    h = random(4, 8, seed=17, dtype=torch.float32).abs()
    weight = random(900, 8, seed=18, dtype=torch.float32)
    masked = weight.clone()
    masked[200:, 0] = -math.inf
    actual, meant = (cpp.linear_relaxed_stats(h, Head(w)) for w in (masked, weight[:200]))
    for ours, theirs in zip(actual[:4], meant[:4], strict=True):
        assert_near(ours.float(), theirs.float(), 2e-6)
    tokens = torch.arange(4)
    log_pi = cpp.log_likelihood_gradient(h, Head(masked), tokens, False)[0]
    assert_near(log_pi, cpp.log_likelihood_gradient(h, Head(weight[:200]), tokens, False)[0], 2e-6)
    nothing = cpp.linear_relaxed_stats(h, Head(masked[200:]))
    assert nothing.token.tolist() == [-1] * 4
    assert nothing.entropy.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_dominant_and_large_logits(dtype: torch.dtype) -> None:
    h, weight = random(6, 16, seed=19, dtype=dtype), random(700, 16, seed=20, dtype=dtype)
    dominant = weight.clone()
    dominant[650] = h[0] * 4
    assert_linear_stats(h, Head(dominant))
    assert_likelihood(h, Head(dominant), torch.full((6,), 650), 5)
    # Logits to 1e4, where rounding alone is 1e-3.
    large = Head(weight, scale=1000.0)
    actual = cpp.linear_relaxed_stats(h, large)
    meant = reference.linear_relaxed_stats(h.double(), wide(large))
    torch.testing.assert_close(actual.lse.double(), meant.lse, rtol=1e-6, atol=0)
    assert torch.equal(actual.token, meant.token)


def test_linear_logits_are_not_rounded_to_bfloat16() -> None:
    """Two entries whose logits differ by less than bfloat16 can say."""
    h = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = torch.ones(4, 64, dtype=torch.bfloat16)
    weight[2, 5] += 2**-7
    assert cpp.linear_relaxed_stats(h, Head(weight)).token.item() == 2
    # The row is finer than bfloat16, the table is not: the row must not be rounded to the table's dtype.
    fine = torch.ones(1, 64) + 2**-12 * (torch.arange(64) == 3)
    weight = torch.eye(64, dtype=torch.bfloat16)
    assert cpp.linear_relaxed_stats(fine, Head(weight), 0.001).token.item() == 3


def test_gradient_norm_survives_a_common_offset() -> None:
    """Logits that share an offset: the sum of squares is a small difference of large numbers, unless one takes care."""
    weight = random(2000, 16, seed=21, scale=0.01)
    weight[:, 0] = 1
    h = random(4, 16, seed=22)
    h[:, 0] = torch.tensor([1e3, -1e3, 1e5, 1e6])
    zero = torch.zeros(4, 16, dtype=torch.float64)
    factors, tables = TokenGradient(h, zero, zero), Tables(Head(weight), weight, weight, 1.0)
    torch.testing.assert_close(
        cpp.gradient_norm(factors, tables), reference.gradient_norm(factors, tables), rtol=1e-9, atol=0
    )
    exact = reference.gradient_norm(factors, tables)[:2]
    narrow = cpp.gradient_norm(
        TokenGradient(*(x.float() for x in factors)), Tables(Head(weight.float()), weight.float(), weight.float(), 1.0)
    )[:2]
    # What rounding logits of 1e3 to float32 leaves.
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=0)


def test_linear_rows_do_not_depend_on_the_batch() -> None:
    h, weight = random(70, 33, seed=23, dtype=torch.float32), random(5000, 33, seed=24, dtype=torch.float32)
    together = cpp.linear_relaxed_stats(h, Head(weight))
    torch.set_num_threads(1)
    alone = [cpp.linear_relaxed_stats(row[None], Head(weight)) for row in h]
    for index in range(3):
        torch.testing.assert_close(together[index], torch.cat([row[index] for row in alone]), rtol=2e-6, atol=2e-6)
    assert torch.equal(together.token, torch.cat([row.token for row in alone]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("nll_coeff", [0.0, 0.1])
def test_gradient_norm_of_a_row_that_holds_nan(nll_coeff: float, value: float) -> None:
    for factor in range(3):
        factors = TokenGradient(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4))
        factors[factor][0, 1] = value
        weight = torch.randn(9, 3)
        norm = cpp.gradient_norm(factors, Tables(Head(weight), weight, torch.randn(9, 4), nll_coeff))
        assert norm.isfinite().tolist() == [False, True]
        assert math.isinf(value) or norm[0].isnan()


def test_linear_operators_reject() -> None:
    h, head = torch.zeros(2, 3), Head(torch.zeros(5, 3))
    tokens = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(V, 2\)"):
        cpp.linear_relaxed_stats(h[:, :2], head)
    with pytest.raises(RuntimeError, match=r"tokens must have shape \(2,\)"):
        cpp.log_likelihood_gradient(h, head, tokens[:1], True)
    with pytest.raises(TypeError, match="tokens must be int64"):
        cpp.log_likelihood_gradient(h, head, tokens.int(), True)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=r"tokens must be in \[0, 5\)"):
            cpp.log_likelihood_gradient(h, head, tokens + bad, True)
    with pytest.raises(RuntimeError, match=r"reward_table must have shape \(5, d_r\)"):
        cpp.gradient_norm(TokenGradient(h, h, h), Tables(head, head.weight, head.weight[1:], 0.1))
    with pytest.raises(TypeError, match="float dtype"):
        cpp.linear_relaxed_stats(h.long(), head)


def test_linear_operators_keep_no_rows_by_vocabulary_tensor() -> None:
    """In a fresh process: 256 x 100,000 float32 would be 98 MiB."""
    code = """
import resource, torch
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend
cpp = Backend("native")
torch.manual_seed(0)
torch.set_num_threads(2)
h, weight = torch.randn(256, 16), torch.randn(100_000, 16)
factors, tables = TokenGradient(h, h, h), Tables(Head(weight), weight, weight, 0.1)
def run(rows):
    few = TokenGradient(*(factor[:rows] for factor in factors))
    cpp.linear_relaxed_stats(h[:rows], tables.head)
    cpp.log_likelihood_gradient(h[:rows], tables.head, torch.zeros(rows, dtype=torch.int64), True)
    cpp.gradient_norm(few, tables)
run(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(256)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run_python("-c", code)) < 20


@lesser_instruction_sets
def test_on_lesser_instruction_sets(capability: str) -> None:
    some = "(relaxed_stats_random and 8193) or rising or linear_operators_strides or softcap or linear_rows"
    repeat_tests(__file__, some, capability)


# token_diff


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 6), length=st.integers(0, 40), changes=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_token_diff(rows: int, length: int, changes: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(0, 2**40, (rows, length), generator=generator)
    changed = torch.rand(rows, length, generator=generator) < changes
    first, count = cpp.token_diff(old, torch.where(changed, old + 2**33, old))
    positions = torch.where(changed, torch.arange(length), length)
    meant = torch.cat([positions, torch.full((rows, 1), length)], dim=1).amin(1)
    assert torch.equal(first, meant)
    assert torch.equal(count, changed.sum(1))


def test_token_diff_strides_and_many_rows() -> None:
    base = torch.randint(0, 3, (90, 4000), generator=torch.Generator().manual_seed(3))
    old, new = base.T, base.flip(0).T
    first, count = cpp.token_diff(old, new)
    assert torch.equal(count, (old != new).sum(1))
    assert torch.equal(first, torch.where(old != new, torch.arange(90), 90).amin(1))


def test_token_diff_rejects() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"new must have shape \(2, 3\)"):
        cpp.token_diff(ids, ids[:1])
    with pytest.raises(RuntimeError, match=r"old must have shape \(B, m\)"):
        cpp.token_diff(ids[0], ids[0])
    with pytest.raises(TypeError, match="must be int64"):
        cpp.token_diff(ids, ids.int())


def run_with_package_at(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter that looks for the library in ``directory``."""
    program = f"from pathlib import Path; from nabla_fast.ops import native; native._PACKAGE = Path({str(directory)!r})"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", f"{program}\n{code}"],
        env={**os.environ, "NABLA_FAST_REQUIRE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def break_library(directory: Path) -> None:
    library = native._library_path(native._PACKAGE)
    # The length stays: the system maps the file by the sizes in it, and kills whoever reads behind its end.
    (directory / library.name).write_bytes(library.read_bytes()[::-1])


def name_for_another_torch(directory: Path) -> None:
    (directory / "_native_torch_2_9_1.so").touch()


def leave_out(directory: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (break_library, "cannot load"),
        (name_for_another_torch, "built for torch 2.9.1, running"),
        (leave_out, "was not built"),
    ],
)
def test_without_a_usable_library(prepare: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    code = """
import os, torch
print(native.available(), native.available(), native.why_missing())
try:
    torch.ops.nabla_fast.native_token_diff(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
except RuntimeError as error:
    print(error)
os.environ["NABLA_FAST_REQUIRE_NATIVE"] = "1"
native.available()
"""
    result = run_with_package_at(tmp_path, code)
    assert result.returncode != 0
    availability, error = result.stdout.splitlines()
    assert availability.startswith("False False the native library")
    assert reason in availability
    assert reason in error
    assert result.stderr.count("runs without its C++ operators") == 1
    required = result.stderr.splitlines()[-1]
    assert required.startswith("RuntimeError: NABLA_FAST_REQUIRE_NATIVE=1, but the native library")
    assert reason in required


def test_build_info_names_the_running_torch() -> None:
    info = native.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert set(info) == {"torch", "compiler", "cuda_architectures"}
