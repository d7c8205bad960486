"""The Triton operators on logits in memory, and token_diff, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import DTYPES, KINDS, few, gradient_unit, integers, strided, transposed, weight_tolerance

from nabla_fast.ops import reference
from nabla_fast.ops import triton as kernels
from nabla_fast.testing.operators import close, double, logits

shapes = st.tuples(st.sampled_from([0, 1, 3, 17]), st.sampled_from([1, 2, 33, 1000]))
taus = st.sampled_from([0.05, 0.7, 1.0, 10.0])


@few(40)
@given(shapes, st.sampled_from(KINDS), st.sampled_from(DTYPES), taus, st.integers(0, 99))
def test_relaxed_stats(shape, kind, dtype, tau, seed):
    z = logits(seed, *shape, kind, dtype)
    close(kernels.relaxed_stats(z, tau, 0.5, 0.9), reference.relaxed_stats(z.double(), tau, 0.5, 0.9))


@few(30)
@given(
    st.sampled_from([1, 3]),
    st.sampled_from([49152, 50257, 151936]),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    taus,
    st.integers(0, 99),
)
def test_relaxed_stats_of_real_vocabularies(rows, vocabulary, kind, dtype, tau, seed):
    z = logits(seed, rows, vocabulary, kind, dtype)
    close(kernels.relaxed_stats(z, tau, 0.5, 0.9), reference.relaxed_stats(z.double(), tau, 0.5, 0.9))


def test_relaxed_stats_of_64_rows():
    z = logits(2, 64, 1000)
    close(kernels.relaxed_stats(z), reference.relaxed_stats(z.double()))


@pytest.mark.parametrize("view", [strided, transposed, lambda z: z[1:, 7:], lambda z: z[:1].expand(4, -1)])
def test_relaxed_stats_of_views(view):
    z = view(logits(3, 5, 1000, dtype=torch.bfloat16))
    close(kernels.relaxed_stats(z, 0.7), reference.relaxed_stats(z.double(), 0.7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 41, 20479])
def test_a_row_without_meaning_is_reported(bad, place):
    z = logits(4, 3, 20480)
    z[1, place] = bad
    z[2] = -torch.inf
    stats = kernels.relaxed_stats(z, 0.7, 0.0, 1.0)
    close(stats, reference.relaxed_stats(z.double(), 0.7, 0.0, 1.0))
    assert stats.token.tolist()[1:] == [-1, -1]
    assert stats.entropy[1:].isnan().all()
    assert not stats.mask[1:].any()
    (embedding,), token = kernels.straight_through_embedding(z, [torch.ones(20480, 8)])
    assert token.tolist()[1:] == [-1, -1]
    assert embedding[1:].isnan().all()
    assert embedding[0].eq(1).all()


def test_the_mask_takes_both_thresholds():
    z = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 4.0], [0.0, 0.0, 50.0]])
    for entropy, confidence in ((None, None), (0.5, None), (None, 0.9), (0.5, 0.9), (0.5, 0.3)):
        expected = reference.relaxed_stats(z.double(), 1.0, entropy, confidence).mask
        assert torch.equal(kernels.relaxed_stats(z, 1.0, entropy, confidence).mask, expected)


@few(15)
@given(shapes, st.sampled_from(KINDS), st.sampled_from(DTYPES), taus, st.sampled_from([8, 33, 64]))
def test_embeddings(shape, kind, dtype, tau, width):
    z = logits(5, *shape, kind, dtype)
    tables = [logits(6, shape[1], width, dtype=dtype), logits(7, shape[1], 8, dtype=dtype)]
    embeddings, token = kernels.straight_through_embedding(z, tables, tau)
    meant = z.double().argmax(-1)
    close([*embeddings, token], [*(table[meant].double() for table in tables), meant])
    expected = reference.soft_embedding(z.double(), tables[0].double(), tau)
    close(kernels.soft_embedding(z, tables[0], tau), expected, weight_tolerance(dtype, dtype))


def test_soft_embedding_of_views():
    z, table = strided(logits(8, 3, 1000)), transposed(logits(9, 1000, 33, dtype=torch.bfloat16))
    expected = reference.soft_embedding(z.double(), table.double())
    close(kernels.soft_embedding(z, table), expected, weight_tolerance(z.dtype, table.dtype))


@few(20)
@given(shapes, st.sampled_from(KINDS), st.sampled_from(DTYPES), taus, st.sampled_from([1, 2]))
def test_relaxed_backward(shape, kind, dtype, tau, count):
    rows, vocabulary = shape
    z = logits(10, rows, vocabulary, kind, dtype)
    tables = [logits(11, vocabulary, 33, dtype=dtype), logits(12, vocabulary, 8, dtype=dtype)][:count]
    vectors = [logits(13, rows, 33), logits(14, rows, 8)][:count]
    expected = reference.relaxed_backward(z.double(), double(vectors), double(tables), tau)
    actual = kernels.relaxed_backward(z, vectors, tables, tau)
    # The unit is the size of G, not of what is left of p (G - <p, G>).
    close(actual, expected, weight_tolerance(dtype, dtype) / 4, unit=gradient_unit(vectors, tables, tau))


def test_relaxed_backward_of_views():
    z, table = strided(logits(15, 3, 300)), strided(logits(16, 300, 8))
    vector = transposed(logits(17, 3, 8))
    expected = reference.relaxed_backward(z.double(), [vector.double()], [table.double()])
    close(kernels.relaxed_backward(z, [vector], [table]), expected)


@few(20)
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 5, 600, 1100]), st.integers(0, 3), st.integers(0, 99))
def test_token_diff(rows, length, changes, seed):
    old = integers(seed, 2**40, rows, length)
    new = old.clone()
    if rows and length:
        for place in integers(seed, length, changes).tolist():
            new[seed % rows, place] += 2**33
    close(kernels.token_diff(old, new), reference.token_diff(old, new))
    close(kernels.token_diff(transposed(old), new), reference.token_diff(old, new))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="computes in float32"):
        kernels.relaxed_stats(torch.randn(2, 5, dtype=torch.float64))
