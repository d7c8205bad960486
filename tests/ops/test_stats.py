"""`relaxed_stats` and `linear_relaxed_stats` by every back end against the textbook, in float64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from back_ends import (
    DTYPES,
    INTERPRETED,
    KINDS,
    PAIRS,
    VIEWED,
    by,
    each_view,
    few,
    hidden_states,
    in_its_dtypes,
    logits_by_hand,
    lowest_argmax,
    near,
    product_tolerance,
    takes,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from nabla_fast.ops.types import Head, RelaxedStats
from nabla_fast.testing.operators import logits

every = by("reference", "native", "triton")

# One column, less than a vector, one more than a block; native kernels go by blocks of 8192.
columns = [1, 2, 33, 1000] + ([] if INTERPRETED else [8193])
shapes = st.tuples(st.sampled_from([0, 1, 3, 17]), st.sampled_from(columns))
taus = st.sampled_from([0.05, 0.7, 1.0, 10.0])
heads = st.sampled_from([(1.0, 0.0), (0.25, 0.0), (1.7, 3.0), (0.5, 30.0)])


def textbook(z, tau=1.0, entropy=None, confidence=None):
    """Of probabilities; a row that holds NaN or +inf, or nothing but -inf, has none."""
    z = z.double()
    p = torch.softmax(z / tau, -1)
    token, max_prob, h = lowest_argmax(z), p.amax(-1), torch.special.entr(p).sum(-1)
    lse = torch.where(token < 0, torch.nan, torch.logsumexp(z / tau, -1))
    mask = token >= 0
    mask = mask if entropy is None else mask & (h >= entropy)
    return RelaxedStats(max_prob, lse, h, token, mask if confidence is None else mask & (max_prob <= confidence))


def require_stats(backend, z, tau=1.0, thresholds=(0.5, 0.9)):
    stats = backend.relaxed_stats(z, tau, *thresholds)
    # The reference adds up as PyTorch does, one float32 after the other; Triton computes in powers of 2.
    exact = {"reference": 5e-5, "native": 2e-6, "triton": 1e-5}[backend.name]
    if "ATEN_CPU_CAPABILITY" in os.environ:  # shorter vectors make fewer partial sums, of more numbers each
        exact *= 2
    near(stats, textbook(z, tau, *thresholds), 1e-12 if z.dtype == torch.float64 else exact)
    return stats


def require_linear_stats(backend, h, head, tau=1.0):
    stats = backend.linear_relaxed_stats(h, head, tau, 0.5, 0.9)
    z = logits_by_hand(h, head)
    meant = textbook(z, tau, 0.5, 0.9)
    tolerance = product_tolerance(backend, h.dtype, head.weight.dtype) / min(tau, 1.0)
    near(stats[:3], meant[:3], tolerance)
    assert torch.equal(stats.token < 0, meant.token < 0)
    # Where rounding decides between two tokens or about a threshold, either will do.
    known = stats.token >= 0
    near(z.gather(-1, stats.token.clamp(min=0)[:, None])[known, 0], z.amax(-1)[known], tolerance)
    close_call = ((meant.entropy - 0.5).abs() < tolerance) | ((meant.max_prob - 0.9).abs() < tolerance)
    assert torch.equal(stats.mask | close_call, meant.mask | close_call)
    return stats


# Logits in memory


@every
@few(20, 200)
@given(shapes, st.sampled_from(KINDS), st.sampled_from(DTYPES), taus, st.integers(0, 99))
def test_stats_of_logits(backend, shape, kind, dtype, tau, seed):
    assume(takes(backend, dtype))
    require_stats(backend, logits(seed, *shape, kind, dtype), tau)


@every
@few(8, 30)
@given(
    st.sampled_from([1, 3]), st.sampled_from([49152, 50257, 151936]), st.sampled_from(KINDS), st.sampled_from(DTYPES),
    taus,
)  # fmt: skip
def test_stats_of_real_vocabularies(backend, rows, vocabulary, kind, dtype, tau):
    assume(takes(backend, dtype))
    require_stats(backend, logits(vocabulary, rows, vocabulary, kind, dtype), tau)


@every
def test_stats_of_64_rows(backend):
    require_stats(backend, logits(2, 64, 1000))


@every
@each_view
@pytest.mark.parametrize("dtype", VIEWED, ids=str)
@in_its_dtypes
def test_stats_of_views(backend, dtype, view):
    require_stats(backend, view(logits(3, 5, 1000, dtype=dtype)), 0.7)
    require_stats(backend, logits(3, 5, 1, dtype=dtype).expand(5, 9))


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("place", "vocabulary"), [(0, 1), (0, 20480), (41, 20480), (20479, 20480), (32, 33)])
def test_rows_without_meaning(backend, place, vocabulary, bad):
    """Whatever else is in the row; the others know nothing of it."""
    for dtype in DTYPES[: 1 if INTERPRETED and vocabulary > 33 else None]:
        if not takes(backend, dtype):
            continue
        z = logits(4, 6, vocabulary, dtype=dtype)
        z[2:4] = -torch.inf
        z[4] = torch.finfo(dtype).max
        z[[1, 3, 4], place] = bad
        stats = require_stats(backend, z, 1.0, (0.0, 1.0))
        assert stats.token.tolist()[1:5] == [-1] * 4
        assert stats.entropy.isnan().tolist() == (~stats.mask).tolist() == [False, True, True, True, True, False]


@every
@pytest.mark.parametrize("vocabulary", [2, 33, 20000])
def test_ties_take_the_lowest_index(backend, vocabulary):
    for dtype in DTYPES:
        if takes(backend, dtype):
            z = torch.zeros(4, vocabulary, dtype=dtype)
            z[1, -1] = z[1, vocabulary // 2] = z[2, 0] = z[2, -1] = z[3, -1] = 5
            assert require_stats(backend, z).token.tolist() == [0, vocabulary // 2, 0, vocabulary - 1]


@every
def test_masked_entries_add_nothing(backend):
    z = torch.full((3, 20000), -torch.inf)
    z[0, 19999], z[1, [4, 17000]], z[2, 9000:9100] = -3, 2, 0.5
    stats = require_stats(backend, z, 0.6)
    near(stats.entropy, torch.tensor([0.0, math.log(2), math.log(100)]).double(), 1e-6)


@every
def test_rising_rows(backend):
    """The maximum moves in every block, so every partial sum is rescaled, some of them to nothing."""
    ramp = torch.linspace(-300, 300, 30000)
    require_stats(backend, torch.stack([ramp, ramp.flip(0), ramp.abs(), ramp / 100]))
    require_stats(backend, torch.tensor([[-3e38, 3e38, 0.0]]))
    if takes(backend, torch.float64):
        cliff = torch.full((1, 20000), -1.7e308, dtype=torch.float64)
        cliff[0, 15000] = 1.7e308
        require_stats(backend, cliff)
    dominant = logits(8, 2, 20000)
    dominant[0, 19999] = dominant[1, 3] = 1e4
    require_stats(backend, dominant, 0.05)


@every
def test_the_mask_takes_both_thresholds_and_what_equals_them(backend):
    z = 2 * logits(9, 12, 67)
    stats = backend.relaxed_stats(z)
    assert stats.mask.all()
    entropy, confidence = float(stats.entropy[7]), float(stats.max_prob[7])
    for least, most in ((entropy, None), (None, confidence), (entropy, confidence)):
        mask = backend.relaxed_stats(z, 1.0, least, most).mask
        meant = torch.ones_like(mask)
        meant = meant if least is None else meant & (stats.entropy >= entropy)
        assert torch.equal(mask, meant if most is None else meant & (stats.max_prob <= confidence))
        assert mask[7]
        assert not mask.all()


# Hidden states and a head

sizes = [(0, 33, 8), (1, 1, 8), (1, 2, 33), (3, 33, 64), (3, 1000, 8), (17, 1000, 33)]
# Native kernels take rows by panels of 64 and passes of 512, and the vocabulary by tiles.
sizes = st.sampled_from(sizes + ([] if INTERPRETED else [(65, 300, 33), (64, 1, 64), (1100, 40, 8)]))


@every
@few(14, 120)
@given(sizes, st.sampled_from(PAIRS), heads, st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.integers(0, 99))
def test_stats_of_hidden_states(backend, size, pair, scale_cap, tau, seed):
    assume(takes(backend, *pair))
    h, head = hidden_states(*size, pair, *scale_cap, seed=seed)
    require_linear_stats(backend, h, head, tau)


@every
@pytest.mark.parametrize(
    ("size", "pair"),
    [
        # A vocabulary takes the interpreter seconds.
        ((2, 20011 if INTERPRETED else 151936, 8), (torch.bfloat16, torch.bfloat16)),
        ((64, 1000, 64), (torch.float32, torch.bfloat16)), ((5, 49152, 64), (torch.float32, torch.float32)),
    ],
)  # fmt: skip
def test_stats_of_hidden_states_of_real_sizes(backend, size, pair):
    require_linear_stats(backend, *hidden_states(*size, pair), 0.7)


@every
@each_view
@pytest.mark.parametrize(
    "pair", [*((torch.float32, dtype) for dtype in DTYPES), *((d, d) for d in DTYPES[1:])], ids=str
)
@in_its_dtypes
def test_stats_of_views_of_hidden_states(backend, pair, view):
    h, weight = view(logits(4, 5, 33, dtype=pair[0])), view(logits(5, 300, 33, dtype=pair[1]) / 4)
    require_linear_stats(backend, h, Head(weight))


@every
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@in_its_dtypes
def test_ties_of_hidden_states_take_the_lowest_index(backend, pair):
    """Small integers, of which products are exact, whatever the order of the sum; several tiles a part."""
    h, head = hidden_states(3, 40, 16, pair)
    h, head = h.round(), Head((4 * head.weight).round().repeat(80, 1))
    stats = backend.linear_relaxed_stats(h, head)
    assert torch.equal(stats.token, lowest_argmax(logits_by_hand(h, head)))
    assert (stats.token < 40).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_dominant_logits_and_hidden_states_without_meaning(backend, dtype):
    h, head = hidden_states(5, 1000, 33, (dtype, dtype), seed=3)
    head.weight[650] = h[1]
    h[0] *= 1e3
    h[2, 5], h[3, 5] = torch.nan, torch.inf
    stats, meant = backend.linear_relaxed_stats(h, head, 0.7), textbook(logits_by_hand(h, head), 0.7)
    torch.testing.assert_close(stats.lse.double(), meant.lse, rtol=1e-5, atol=1e-5, equal_nan=True)
    near(stats.entropy[1], meant.entropy[1], 2e-5)
    assert torch.equal(stats.token, meant.token)
    assert stats.token[2:4].tolist() == [-1, -1]
    assert stats.mask.tolist() == [True, True, False, False, True]


@every
def test_head_entries_of_minus_infinity_add_nothing(backend):
    h, head = hidden_states(4, 900, 8, (torch.float32, torch.float32))
    h = h.abs()
    masked = head.weight.clone()
    masked[200:, 0] = -torch.inf
    ours, meant = (backend.linear_relaxed_stats(h, Head(weight)) for weight in (masked, head.weight[:200]))
    near(ours, RelaxedStats(*(x.double() if x.is_floating_point() else x for x in meant)), 2e-6)
    nothing = backend.linear_relaxed_stats(h, Head(masked[200:]))
    assert nothing.token.tolist() == [-1] * 4
    assert nothing.entropy.isnan().all()


@every
def test_logits_are_not_rounded_to_bfloat16(backend):
    """Two entries whose logits differ by less than bfloat16 can say."""
    h, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(4, 64, dtype=torch.bfloat16)
    weight[2, 5] += 2**-7
    assert backend.linear_relaxed_stats(h, Head(weight)).token.item() == 2
    # The row is finer than bfloat16, the table is not: the row must not be rounded to the table's dtype.
    fine = torch.ones(1, 64) + 2**-12 * (torch.arange(64) == 3)
    assert backend.linear_relaxed_stats(fine, Head(torch.eye(64, dtype=torch.bfloat16)), 0.001).token.item() == 3
