"""`gradient_norm` by every back end against the dense gradient of an objective, by autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from back_ends import (
    INTERPRETED,
    PAIRS,
    VIEWED,
    by,
    each_view,
    few,
    hidden_states,
    in_its_dtypes,
    logits_by_hand,
    product_tolerance,
    takes,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import logits

every = by("reference", "native", "triton")
sizes = [(0, 33, 8), (1, 1, 8), (1, 2, 33), (3, 33, 64), (3, 1000, 8), (17, 1000, 33)]
sizes += [] if INTERPRETED else [(65, 300, 33), (64, 1, 64), (1100, 40, 8), (5, 49152, 64), (2, 50257, 64)]
heads = st.sampled_from([(1.0, 0.0), (0.25, 0.0), (1.7, 3.0), (0.5, 30.0)])


def textbook(factors, tables):
    """Norms of the gradient with respect to one-hot rows that take part as they do in the objective: identity (a)."""
    rows, vocabulary = len(factors.hidden), len(tables.head.weight)
    one_hot = torch.zeros(rows, vocabulary, dtype=torch.float64).requires_grad_()
    log_pi = logits_by_hand(factors.hidden, tables.head).log_softmax(-1)
    value = -tables.nll_coeff * (one_hot * log_pi).sum()
    for factor, table in ((factors.embedding, tables.embedding), (factors.reward_embedding, tables.reward_embedding)):
        value = value + ((one_hot @ table.double()) * factor.double()).sum()
    return torch.autograd.grad(value, one_hot)[0].norm(dim=-1)


def require(backend, factors, tables):
    operands = (factors.hidden.dtype, tables.head.weight.dtype)
    error = (backend.gradient_norm(factors, tables).double() - textbook(factors, tables)).abs()
    assert (error <= product_tolerance(backend, *operands) * (textbook(factors, tables) + 1)).all()


def build(rows, vocabulary, width, pair, scale_cap=(1.0, 0.0), tied=False, nll_coeff=0.3, seed=0):
    h, head = hidden_states(rows, vocabulary, width, pair, *scale_cap, seed=seed)
    embedding = head.weight if tied else logits(seed + 2, vocabulary, width, dtype=pair[1])
    tables = Tables(head, embedding, logits(seed + 3, vocabulary, 12, dtype=pair[1]), nll_coeff)
    factors = (h, logits(seed + 4, rows, width, dtype=pair[0]), logits(seed + 5, rows, 12, dtype=pair[0]))
    return TokenGradient(*factors), tables


@every
@few(10, 56)
@given(
    st.sampled_from(sizes), st.sampled_from(PAIRS), heads, st.booleans(), st.sampled_from([0.0, 0.3, -1.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_norms(backend, size, pair, scale_cap, tied, nll_coeff, seed):
    assume(takes(backend, *pair))
    require(backend, *build(*size, pair, scale_cap, tied, nll_coeff, seed))


@every
def test_the_constant_of_the_likelihood_is_part_of_the_gradient(backend):
    """The log-sum-exp, which is the same for all tokens, and which DTO does not see."""
    factors, tables = build(4, 67, 12, (torch.float32, torch.float32))
    nothing = torch.zeros(67, 12)
    alone = Tables(tables.head, nothing, nothing, 0.3)
    z = logits_by_hand(factors.hidden, tables.head)
    with_it, without = 0.3 * z.log_softmax(-1).norm(dim=-1), 0.3 * z.norm(dim=-1)
    norm = backend.gradient_norm(factors, alone).double()
    torch.testing.assert_close(norm, with_it, rtol=2e-5, atol=0)
    assert ((norm - without).abs() > 0.1).all()


@every
@each_view
@pytest.mark.parametrize("dtype", VIEWED, ids=str)
@in_its_dtypes
def test_views(backend, dtype, view):
    factors, tables = build(5, 300, 33, (dtype, dtype))
    views = Tables(Head(view(tables.head.weight)), view(tables.embedding), view(tables.reward_embedding), 0.3)
    require(backend, TokenGradient(*map(view, factors)), views)


@every
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e5, 1e6])
def test_logits_that_share_an_offset(backend, offset):
    """The sum of squares is a small difference of large numbers, unless one takes care."""
    weight, h, zero = 0.01 * logits(14, 2000, 16), 0.1 * logits(15, 2, 16), torch.zeros(2, 16)
    weight[:, 0], h[:, 0] = 1, offset
    embedding = 1e-2 * logits(16, 2, 16)
    embedding[:, 0] = 0
    wide = [x.double() for x in (h, embedding, zero)], weight.double()
    if takes(backend, torch.float64):
        factors, tables = TokenGradient(*wide[0]), Tables(Head(wide[1]), wide[1], wide[1], 1.0)
        torch.testing.assert_close(backend.gradient_norm(factors, tables), textbook(factors, tables), rtol=1e-9, atol=0)
    if abs(offset) < 1e4:  # beyond, rounding the logits to float32 leaves no five digits
        factors, tables = TokenGradient(h, embedding, zero), Tables(Head(weight), weight, weight, 1.0)
        # The reference adds up as PyTorch does, one float32 after the other.
        exact = 1e-3 if backend.name == "reference" else 1e-5
        norm = backend.gradient_norm(factors, tables).double()
        torch.testing.assert_close(norm, textbook(factors, tables), rtol=exact, atol=0)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("nll_coeff", [0.0, 0.3])
def test_a_row_without_meaning_has_no_norm(backend, nll_coeff, value):
    """Whichever factor it is in; hidden states count without a likelihood, too. An infinite norm may be so."""
    for place in range(3):
        factors, tables = build(3, 257, 8, (torch.float32, torch.float32), nll_coeff=nll_coeff)
        factors[place][1, 3] = value
        norm = backend.gradient_norm(factors, tables)
        assert norm.isfinite().tolist() == [True, False, True]
        assert norm[1].isnan() or (place > 0 and math.isinf(value))


@by("reference")
def test_half_precision_is_upcast_before_it_is_used(backend):
    factors, tables = build(4, 67, 12, (torch.bfloat16, torch.float64))
    wide = TokenGradient(*(x.double() for x in factors))
    torch.testing.assert_close(backend.gradient_norm(factors, tables), textbook(wide, tables), rtol=1e-12, atol=0)


@by("native")
def test_wrong_arguments(backend):
    """Of the kernel itself, whose pointers know no bounds."""
    h, head = torch.zeros(2, 3), Head(torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match=r"reward_table must have shape \(5, d_r\)"):
        backend.gradient_norm(TokenGradient(h, h, h), Tables(head, head.weight, head.weight[1:], 0.1))
