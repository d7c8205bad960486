"""The Triton operators on hidden states and a head, against the reference in float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import DTYPES, few, gradient_unit, integers, product_tolerance, strided, transposed, weight_tolerance

from nabla_fast.ops import reference
from nabla_fast.ops import triton as kernels
from nabla_fast.ops.triton import _matmul as blocks
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import close, double, logits

shapes = st.tuples(st.sampled_from([0, 1, 3, 17]), st.sampled_from([1, 2, 33, 1000]), st.sampled_from([8, 33, 64]))
dtypes = st.sampled_from([(torch.float32, torch.float32), *((a, b) for b in DTYPES[1:] for a in (b, torch.float32))])
heads = st.sampled_from([(1.0, 0.0), (0.25, 0.0), (1.0, 5.0), (0.5, 30.0)])
taus = st.sampled_from([0.3, 1.0, 10.0])


def make(shape, dtype, scale_cap=(1.0, 0.0), seed=0):
    rows, vocabulary, depth = shape
    h = logits(seed, rows, depth, dtype=dtype[0])
    # Small logits under a cap: at the cap itself float32 knows no differences.
    return h, Head(logits(seed + 1, vocabulary, depth, dtype=dtype[1]) / (32 if scale_cap[1] else 4), *scale_cap)


def close_likelihood(actual, h, head, tokens, need_grad=True):
    """log pi, and its gradient where there is one."""
    expected = reference.log_likelihood_gradient(double(h), double(head), tokens, need_grad)
    close(actual[0], expected[0], product_tolerance(h.dtype, head.weight.dtype))
    gradient = expected[1] if need_grad else expected[1].reshape(0, h.shape[1])
    close(actual[1], gradient, weight_tolerance(h.dtype, head.weight.dtype))


def close_stats(actual, h, head, *options):
    tolerance = product_tolerance(h.dtype, head.weight.dtype)
    close(actual, reference.linear_relaxed_stats(h.double(), double(head), *options), tolerance)


@few(20)
@given(shapes, dtypes, heads, taus)
def test_linear_relaxed_stats(shape, dtype, scale_cap, tau):
    h, head = make(shape, dtype, scale_cap)
    close_stats(kernels.linear_relaxed_stats(h, head, tau, 0.5, 0.9), h, head, tau, 0.5, 0.9)


def test_linear_operators_of_real_vocabularies():
    """One each: a vocabulary takes the interpreter seconds."""
    h, head = make((2, 151936, 8), (torch.bfloat16, torch.bfloat16))
    close_stats(kernels.linear_relaxed_stats(h, head, 0.7), h, head, 0.7)
    h, head = make((1, 50257, 8), (torch.float32, torch.float16))
    tokens = torch.tensor([50256])
    close_likelihood(kernels.log_likelihood_gradient(h, head, tokens, True), h, head, tokens)


def test_linear_relaxed_stats_of_64_rows():
    h, head = make((64, 1000, 64), (torch.float32, torch.bfloat16))
    close_stats(kernels.linear_relaxed_stats(h, head), h, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_take_the_lowest_index(dtype):
    h, head = make((3, 40, 16), (dtype, torch.bfloat16))
    # Small integers: products are exact, whatever the order of the sum.
    h, head = h.round(), Head((4 * head.weight).round().repeat(80, 1))  # several tiles a part
    stats = kernels.linear_relaxed_stats(h, head)
    assert torch.equal(stats.token, reference.linear_relaxed_stats(h.double(), double(head)).token)
    assert (stats.token < 40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_and_rows_without_meaning(dtype):
    h, head = make((4, 1000, 33), (dtype, dtype), seed=3)
    h[0] *= 1e3
    h[2, 5] = torch.nan
    h[3, 5] = torch.inf
    stats = kernels.linear_relaxed_stats(h, head, 0.7)
    expected = reference.linear_relaxed_stats(h.double(), double(head), 0.7)
    close(stats.lse, expected.lse)
    assert torch.equal(stats.token, expected.token)
    assert stats.token.tolist()[2:] == [-1, -1]
    assert not stats.mask[2:].any()
    embeddings, token = kernels.linear_straight_through_embedding(h, head, [head.weight], 0.7)
    assert torch.equal(token, expected.token)
    assert embeddings[0][2:].isnan().all()
    soft = kernels.linear_soft_embedding(h, head, head.weight)
    assert soft[2:].isnan().all()
    assert soft[:2].isfinite().all()


@pytest.mark.parametrize("view", [strided, transposed, lambda x: x[:, 3:]])
def test_views(view):
    h, head = view(logits(4, 3, 33)), Head(view(logits(5, 300, 33, dtype=torch.bfloat16)))
    close_stats(kernels.linear_relaxed_stats(h, head), h, head)
    tokens = torch.tensor([5, 299, 0])
    close_likelihood(kernels.log_likelihood_gradient(h, head, tokens, True), h, head, tokens)


@few(8)
@given(shapes, dtypes, heads, taus)
def test_embeddings(shape, dtype, scale_cap, tau):
    h, head = make(shape, dtype, scale_cap)
    table = logits(6, shape[1], 40, dtype=dtype[1])
    embeddings, token = kernels.linear_straight_through_embedding(h, head, [table, head.weight], tau)
    expected = reference.linear_straight_through_embedding(double(h), double(head), double([table, head.weight]), tau)
    close([*embeddings, token], [*expected.embeddings, expected.token], product_tolerance(*dtype))
    soft = kernels.linear_soft_embedding(h, head, table, tau)
    expected = reference.linear_soft_embedding(double(h), double(head), double(table), tau)
    close(soft, expected, weight_tolerance(*dtype))


@few(12)
@given(shapes, dtypes, heads, taus, st.sampled_from(["tied", "tied and reward", "own", "own and reward"]))
def test_linear_relaxed_backward(shape, dtype, scale_cap, tau, which):
    h, head = make(shape, dtype, scale_cap)
    rows, vocabulary, depth = shape
    own = logits(7, vocabulary, depth, dtype=dtype[1])
    tables = [head.weight if "tied" in which else own, logits(8, vocabulary, 24, dtype=dtype[1])]
    tables = tables if "reward" in which else tables[:1]
    vectors = [logits(9, rows, table.shape[1]) for table in tables]
    actual = kernels.linear_relaxed_backward(h, head, vectors, tables, tau)
    expected = reference.linear_relaxed_backward(double(h), double(head), double(vectors), double(tables), tau)
    # The unit is the size of G, not of what is left when p (G - <p, G>) is summed.
    close(actual, expected, weight_tolerance(*dtype) / 4, unit=gradient_unit(vectors, tables, tau))


@few(12)
@given(shapes, dtypes, heads, st.booleans())
def test_log_likelihood_gradient(shape, dtype, scale_cap, need_grad):
    h, head = make(shape, dtype, scale_cap)
    tokens = integers(1, shape[1], shape[0])
    actual = kernels.log_likelihood_gradient(h, head, tokens, need_grad)
    assert (actual[0] <= 0).all()
    close_likelihood(actual, h, head, tokens, need_grad)


@pytest.mark.parametrize("entries", [1, 1000, 2500])
def test_blocks_of_rows(entries):
    h, head = make((5, 1000, 33), (torch.float32, torch.bfloat16), (1.0, 5.0))
    tokens, vectors, tables = integers(1, 1000, 5), [logits(9, 5, 33)], [logits(8, 1000, 33)]
    factors = TokenGradient(h, logits(12, 5, 33), logits(13, 5, 24))
    where = Tables(head, head.weight, logits(11, 1000, 24), 0.3)
    with patch.object(blocks, "ENTRIES", entries):
        likelihood = kernels.log_likelihood_gradient(h, head, tokens, True)
        mixture = kernels.linear_soft_embedding(h, head, tables[0])
        backward = kernels.linear_relaxed_backward(h, head, vectors, tables)
        norm = kernels.gradient_norm(factors, where)
        stats = kernels.linear_relaxed_stats(h, head)
    close_likelihood(likelihood, h, head, tokens)
    close(mixture, reference.linear_soft_embedding(double(h), double(head), double(tables[0])), 4e-5)
    expected = reference.linear_relaxed_backward(double(h), double(head), double(vectors), double(tables))
    close(backward, expected, unit=gradient_unit(vectors, tables, 1.0))
    close(norm, reference.gradient_norm(double(factors), double(where)), 4e-5)
    close_stats(stats, h, head)


@few(16)
@given(shapes, dtypes, heads, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_gradient_norm(shape, dtype, scale_cap, tied, nll):
    h, head = make(shape, dtype, scale_cap)
    rows, vocabulary, depth = shape
    embedding = head.weight if tied else logits(10, vocabulary, depth, dtype=dtype[1])
    tables = Tables(head, embedding, logits(11, vocabulary, 24, dtype=dtype[1]), nll)
    factors = TokenGradient(h, logits(12, rows, depth), logits(13, rows, 24))
    expected = reference.gradient_norm(double(factors), double(tables))
    close(kernels.gradient_norm(factors, tables), expected, 4e-5)  # factors are float32, whatever the tables are


def test_gradient_norm_far_from_zero_mean():
    """sum G^2 - (sum G)^2 / V in float32 would lose everything here."""
    depth = 16
    weight = torch.cat([torch.ones(1000, 1), 1e-3 * logits(14, 1000, depth - 1)], dim=1)
    hidden = torch.zeros(2, depth)
    hidden[:, 0] = 1e3
    embedding = logits(15, 2, depth) * 1e-2
    embedding[:, 0] = 0
    tables = Tables(Head(weight), weight, torch.zeros(1000, 8), 1.0)
    factors = TokenGradient(hidden, embedding, torch.zeros(2, 8))
    actual, expected = kernels.gradient_norm(factors, tables), reference.gradient_norm(double(factors), double(tables))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_scratch_is_bounded():
    """No tensor is larger than a block of rows may be."""
    h, head = make((3, 16411, 8), (torch.float32, torch.bfloat16))
    tokens = torch.arange(3)
    sizes: list[int] = []
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.numel())
        return out

    with patch.object(torch, "empty", empty), patch.object(blocks, "ENTRIES", 20000):
        actual = kernels.log_likelihood_gradient(h, head, tokens, True)
    assert 16411 <= max(sizes) <= 20000
    close_likelihood(actual, h, head, tokens)
