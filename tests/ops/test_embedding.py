"""Embeddings of relaxed tokens and the gradients through them, by every back end, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from back_ends import (
    DTYPES,
    HALVES,
    INTERPRETED,
    KINDS,
    PAIRS,
    VIEWED,
    by,
    each_view,
    few,
    hidden_states,
    in_its_dtypes,
    integers,
    logits_by_hand,
    lowest_argmax,
    near,
    product_tolerance,
    rounds_factors,
    strided,
    takes,
    weight_tolerance,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from nabla_fast import ops
from nabla_fast.ops import reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import logits

every = by("reference", "native", "triton")
shapes = [(0, 33, 8), (1, 1, 8), (3, 2, 33), (1, 1000, 64), (17, 1000, 33), (3, 33, 64)]
# Native kernels take rows by panels of 64 and passes of 512, the vocabulary by tiles of 256 where they are narrow.
shapes += [] if INTERPRETED else [(150, 77, 5), (64, 256, 12), (65, 513, 64), (530, 31, 6)]
shapes = st.sampled_from(shapes)
heads = st.sampled_from([(1.0, 0.0), (0.25, 0.0), (1.7, 3.0), (0.5, 30.0)])
TINY = 1e-30


def textbook(x, tables, vectors, tau=1.0, head=None):
    """The mixture with the first table, and what reaches x from all mixtures: softmax and autograd."""
    x = x.double().requires_grad_()
    p = torch.softmax((logits_by_hand(x, head) if head else x) / tau, -1)
    mixtures = [p @ table.double() for table in tables]
    value = sum((m * v.double()).sum() for m, v in zip(mixtures, vectors, strict=True))
    return mixtures[0].detach(), torch.autograd.grad(value, x)[0]


def gradient_unit(vectors, tables, tau):
    """The size of G / tau, whose rounding stays where p (G - <p, G>) / tau cancels."""
    gradient = sum(v.double().abs() @ t.double().abs().T for v, t in zip(vectors, tables, strict=True))
    return max(1.0, gradient.max().item() / tau) if gradient.numel() else 1.0


def unit_of(backend, dtypes, vectors, tables, tau, kind="random"):
    """What rounding is relative to: a gradient's largest entry; the size of G by Triton, where p is nearly 0, and where
    vectors are rounded before they are multiplied with a table. ``dtypes``: of what p is made from, and of the tables.

    Far below that size, `textbook` has no digits left either.
    """
    size = gradient_unit(vectors, tables, tau)
    if backend.name == "triton" or kind != "random" or rounds_factors(backend, *dtypes):
        return size
    return (1e-4 if torch.float64 in dtypes else 1e-9) * size


def near_logits_gradient(backend, ours, meant, z, tolerance, unit):
    """In the dtype of z, to which the operator rounds what a kernel has not; the interpreter cuts."""
    assert ours.dtype == z.dtype or (backend.name == "native" and ours.dtype == torch.float32)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-22}.get(z.dtype, 0.0)
    near(ours if z.dtype == torch.float64 else ours.float(), meant, tolerance + rounding, unit=unit)


def require_hard(embeddings, token, tables):
    assert len(embeddings) == len(tables)
    for ours, table in zip(embeddings, tables, strict=True):
        assert torch.equal(ours.double(), table[token].double())


# Logits in memory


@every
@few(12, 64)
@given(
    shapes, st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.integers(1, 2),
)  # fmt: skip
def test_embeddings_of_logits(backend, shape, kind, dtype, tau, count):
    assume(takes(backend, dtype))
    rows, vocabulary, width = shape
    z = logits(5, rows, vocabulary, kind, dtype)
    tables = [logits(6, vocabulary, width, dtype=dtype), logits(7, vocabulary, 3, dtype=dtype)][:count]
    vectors = [logits(8, rows, width), logits(9, rows, 3)][:count]
    embeddings, token = backend.straight_through_embedding(z, tables, tau)
    assert torch.equal(token, lowest_argmax(z))
    require_hard(embeddings, token, tables)
    mixture, gradient = textbook(z, tables, vectors, tau)
    exact = weight_tolerance(backend, dtype, dtype)
    # Weights of a softmax of logits of 1e4 / tau are as exact as those.
    large = 3.0 if kind == "huge" else 1.0
    near(backend.soft_embedding(z, tables[0], tau), mixture, large * exact, unit=TINY)
    ours = backend.relaxed_backward(z, vectors, tables, tau)
    rounded = rounds_factors(backend, dtype, dtype)
    exact = exact / 4 if backend.name == "triton" or rounded else 3 * product_tolerance(backend, dtype, dtype)
    unit = unit_of(backend, (dtype, dtype), vectors, tables, tau, kind)
    near_logits_gradient(backend, ours, gradient, z, large * exact, unit)


@every
@each_view
@pytest.mark.parametrize("dtype", VIEWED, ids=str)
@in_its_dtypes
def test_views(backend, dtype, view):
    # A back end computes as the logits are; the operator has them in float64 beside a float64 table.
    z = view(logits(15, 5, 300, dtype=dtype if dtype == torch.float64 else torch.float32))
    table, vector = view(logits(16, 301, 40, dtype=dtype))[: z.shape[1]], view(logits(17, 5, 40))
    (hard,), token = backend.straight_through_embedding(z, [table], 0.7)
    assert torch.equal(token, lowest_argmax(z))
    require_hard([hard], token, [table])
    mixture, gradient = textbook(z, [table], [vector], 0.7)
    exact = product_tolerance(backend, z.dtype, dtype)
    near(backend.soft_embedding(z, table, 0.7), mixture, exact, unit=1.0)
    ours = backend.relaxed_backward(z, [vector], [table], 0.7)
    near_logits_gradient(backend, ours, gradient, z, exact, gradient_unit([vector], [table], 0.7))


@every
def test_masked_entries_take_no_part(backend):
    z = torch.full((2, 3000), -torch.inf)
    z[0, [7, 2900]], z[1, 2999] = 2.0, -50.0
    table, vector = logits(1, 3000, 4), logits(2, 2, 4)
    (hard,), token = backend.straight_through_embedding(z, [table], 0.5)
    assert token.tolist() == [7, 2999]
    require_hard([hard], token, [table])
    soft = backend.soft_embedding(z, table, 0.5)
    torch.testing.assert_close(soft, torch.stack([(table[7] + table[2900]) / 2, table[2999]]))
    back = backend.relaxed_backward(z, [vector], [table], 0.5)
    assert (back[z == -torch.inf] == 0).all()
    assert back.isfinite().all()


@every
@pytest.mark.parametrize("bad", ["nan", "+inf", "all -inf"])
@pytest.mark.parametrize("place", [0, 700])
def test_rows_without_meaning(backend, place, bad):
    z, table, vector = logits(3, 4, 900), logits(4, 900, 6), logits(5, 4, 6)
    z[1, place if bad != "all -inf" else slice(None)] = {"nan": math.nan, "+inf": math.inf, "all -inf": -math.inf}[bad]
    (hard, other), token = backend.straight_through_embedding(z, [table, table[:, :2]])
    soft, back = backend.soft_embedding(z, table), backend.relaxed_backward(z, [vector], [table])
    assert (token < 0).tolist() == [False, True, False, False]
    assert token[1] == -1
    for result in (hard, other, soft, back):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


# Hidden states and a head


@every
@few(10, 56)
@given(
    shapes, st.sampled_from(PAIRS), heads, st.sampled_from([0.3, 1.0, 10.0]), st.booleans(), st.integers(1, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_embeddings_of_hidden_states(backend, shape, pair, scale_cap, tau, tied, count, seed):
    assume(takes(backend, *pair))
    rows, vocabulary, _ = shape
    h, head = hidden_states(*shape, pair, *scale_cap, seed=seed)
    own = head.weight if tied else logits(seed + 2, vocabulary, 40, dtype=pair[1])
    tables = [own, logits(seed + 3, vocabulary, 7, dtype=pair[1])][:count]
    vectors = [logits(seed + 4, rows, table.shape[1], dtype=pair[0]) for table in tables]
    embeddings, token = backend.linear_straight_through_embedding(h, head, tables, tau)
    z, exact = logits_by_hand(h, head), product_tolerance(backend, *pair)
    # Where rounding decides between two tokens, either will do.
    near(z.gather(-1, token[:, None])[:, 0], z.amax(-1), 2 * exact)
    require_hard(embeddings, token, tables)
    mixture, gradient = textbook(h, tables, vectors, tau, head)
    weighted = weight_tolerance(backend, *pair)
    near(backend.linear_soft_embedding(h, head, tables[0], tau), mixture, weighted / min(tau, 1.0), unit=TINY)
    ours = backend.linear_relaxed_backward(h, head, vectors, tables, tau)
    # Cancellation is judged by the size of what cancels.
    exact = weighted / 4 if backend.name == "triton" else weighted * (1 if weighted > 1e-3 else 5)
    near(ours, gradient, exact, unit=unit_of(backend, pair, vectors, tables, tau))


@every
@each_view
@pytest.mark.parametrize("pair", [(torch.float32, dtype) for dtype in VIEWED], ids=str)
@in_its_dtypes
def test_views_of_hidden_states(backend, pair, view):
    h, vector = view(logits(4, 5, 33, dtype=pair[0])), view(logits(7, 5, 33))
    head, table = Head(view(logits(5, 300, 33, dtype=pair[1])), 0.25), view(logits(6, 300, 33, dtype=pair[1]))
    (hard,), token = backend.linear_straight_through_embedding(h, head, [table])
    require_hard([hard], token, [table])
    z = logits_by_hand(h, head)
    near(z.gather(-1, token[:, None])[:, 0], z.amax(-1), 1e-4)
    mixture, gradient = textbook(h, [table], [vector], 1.0, head)
    exact = product_tolerance(backend, *pair)
    near(backend.linear_soft_embedding(h, head, table), mixture, exact, unit=1.0)
    ours = backend.linear_relaxed_backward(h, head, [vector], [table])
    near(ours, gradient, exact, unit=gradient_unit([vector], [table], 1.0))


@every
def test_hidden_states_without_meaning(backend):
    h, head = hidden_states(4, 900, 5, (torch.float32, torch.float32))
    h[1, 2], h[2, 2] = math.nan, math.inf
    table, vector = logits(4, 900, 6), logits(5, 4, 6)
    (hard,), token = backend.linear_straight_through_embedding(h, head, [table])
    assert (token == -1).tolist() == [False, True, True, False]
    soft, back = (
        backend.linear_soft_embedding(h, head, table),
        backend.linear_relaxed_backward(h, head, [vector], [table]),
    )
    for result in (hard, soft, back):
        assert result[1:3].isnan().all()
        assert result[[0, 3]].isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_row_as_a_whole_table(backend, dtype):
    """Its entries lie on one another in memory, all tokens are equal, and no gradient is left."""
    h, vector, row = logits(1, 5, 8, dtype=dtype), logits(2, 5, 8, dtype=dtype), logits(3, 1, 8, dtype=dtype)
    table = row.expand(40, 8)
    mixture = backend.linear_soft_embedding(h, Head(table), table)
    # Native weights are 1 before they are divided by their sum; Triton's are rounded thereafter.
    near(mixture, row.double().expand(5, 8), 8e-3 if backend.name == "triton" else 1e-5)
    assert backend.linear_relaxed_backward(h, Head(table), [vector], [table]).abs().max() < 1e-4


@by("native")
@pytest.mark.parametrize("shape", [(0, 33, 8), (1, 1, 8), (17, 1000, 33), (65, 513, 64), (530, 31, 6)])
def test_weights_that_bfloat16_holds_are_not_rounded(backend, shape):
    """Whole logits to the base 2: nothing is lost, so that nothing else hides behind the tolerance for rounding.

    Of native kernels, which round exp(z - max); Triton's round the probabilities.
    """
    (rows, vocabulary, width), tau = shape, 1 / math.log(2)
    h, vector = ((integers(seed, 3, rows, d) - 1).bfloat16() for seed, d in ((1, width), (2, 12)))
    weight, table = (integers(3, 3, vocabulary, width) - 1).bfloat16(), (integers(4, 5, vocabulary, 12) - 2).bfloat16()
    mixture, gradient = textbook(h, [table], [vector], tau, Head(weight))
    near(backend.linear_soft_embedding(h, Head(weight), table, tau), mixture, 1e-5, unit=TINY)
    z = logits_by_hand(h, Head(weight)).bfloat16()
    near(backend.soft_embedding(z, table, tau), mixture, 1e-5, unit=TINY)
    near(backend.linear_relaxed_backward(h, Head(weight), [vector], [table], tau), gradient, 2e-5, unit=TINY)


@by("native")
@pytest.mark.parametrize("width", [1, 2, 15, 16, 18, 32, 33, 48, 50, 64, 66, 80, 127, 130])
def test_blocks_of_every_size(backend, width):
    """Products of bfloat16 go by blocks of rows and columns, and what is left over of both has blocks of its own.

    Exact, as above. ``width`` are the columns of sums, and the rows of vectors times table are its entries.
    """
    tau = 1 / math.log(2)
    for rows, vocabulary in [*zip(range(1, 14), range(14, 27), strict=True), (70, 19), (35, 40)]:
        h, vector = ((integers(seed, 3, rows, d) - 1).bfloat16() for seed, d in ((1, 6), (2, width)))
        weight, table = (integers(seed, 3, vocabulary, d) - 1 for seed, d in ((3, 6), (4, width)))
        weight, table = weight.bfloat16(), table.bfloat16()
        z = logits_by_hand(h, Head(weight)).bfloat16()
        mixture, gradient = textbook(h, [table], [vector], tau, Head(weight))
        near(backend.soft_embedding(z, table, tau), mixture, 1e-5, unit=TINY)
        near(backend.linear_soft_embedding(h, Head(weight), table, tau), mixture, 1e-5, unit=TINY)
        near(backend.linear_relaxed_backward(h, Head(weight), [vector], [table], tau), gradient, 2e-5, unit=TINY)


# What rounding must not take: relative to its own size, every digit of a gradient counts


def require_digits(actual, expected, tolerance=2e-5):
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max().item() < tolerance, error.tolist()


@every
@pytest.mark.parametrize("gap", [10.0, 18.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_a_nearly_certain_token(backend, soft, dtype, tolerance, gap):
    """As small as the other tokens' weights, and as exact as any: Adam follows them however small they are.

    Through the dispatcher; the token's own entry and the whole row, from logits and from hidden states. Half precision
    is rounded relative to itself.
    """
    name = {"backend": backend.name}
    table, vector = (logits(6, 257, 8) + 3).to(dtype), logits(5, 2, 8).to(dtype).float()
    z, h, weight = 0.1 * logits(1, 2, 257), 0.1 * logits(3, 2, 8), 0.1 * logits(4, 257, 8)
    z[:, 5], h[:, 0], weight[:, 0], weight[5, 0] = gap + 6, 1.0, 0.0, gap + 6
    z, h, head = z.to(dtype).requires_grad_(), h.to(dtype).requires_grad_(), Head(weight.to(dtype))
    if soft:
        embeddings = ops.soft_embedding(z, table, **name), ops.linear_soft_embedding(h, head, table, **name)
    else:
        embeddings = (
            ops.straight_through_embedding(z, [table], **name)[0][0],
            ops.linear_straight_through_embedding(h, head, [table], **name)[0][0],
        )
    dz, dh = (torch.autograd.grad((e * vector).sum(), x)[0] for e, x in zip(embeddings, (z, h), strict=True))
    meant = textbook(z.detach(), [table], [vector])[1]
    require_digits(dz, meant, tolerance)
    require_digits(dz[:, 5:6], meant[:, 5:6], tolerance)
    require_digits(dh, textbook(h.detach(), [table], [vector], 1.0, head)[1], tolerance)


@every
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t not in HALVES], ids=str)
@pytest.mark.parametrize("gap", [10.0, 14.0, 18.0])
@in_its_dtypes
def test_gradients_of_strided_logits_that_are_nearly_certain(backend, gap, dtype):
    z = 0.1 * logits(1, 2, 257, dtype=dtype)
    z[:, 5] = gap
    table, vector = logits(2, 257, 8, dtype=dtype), logits(3, 2, 8, dtype=dtype)
    ours = backend.relaxed_backward(z.T.contiguous().T, [vector], [table])
    require_digits(ours[:, 5:6], textbook(z, [table], [vector])[1][:, 5:6], 1e-5)


@every
@pytest.mark.parametrize(("largest", "tau"), [(50.0, 0.05), (1e3, 0.7), (1e4, 0.05), (1e4, 1.0), (1e4, 1e-3)])
def test_large_logits_are_normalised_by_their_own_sum(backend, largest, tau):
    """A float32 log-sum-exp of such logits is off by more than a gradient may be."""
    z = (logits(1, 9, 1000) / 3 * tau) + largest
    table, vector = logits(2, 1000, 16), logits(3, 9, 16)
    ours = backend.relaxed_backward(z, [vector], [table], tau)
    require_digits(ours, textbook(z, [table], [vector], tau)[1], 2e-6 if backend.name == "native" else 1e-5)


# Through autograd


@every
@few(10, 40)
@given(
    shapes, st.sampled_from(KINDS), st.sampled_from(PAIRS), st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.booleans(),
)  # fmt: skip
def test_mixtures_of_logits_and_what_reaches_them(backend, shape, kind, pair, tau, stretched):
    """Where a back end records the softmax, no other call takes what it has recorded."""
    assume(takes(backend, *pair))
    rows, vocabulary, width = shape
    z, table = logits(5, rows, vocabulary, kind, pair[0]), logits(6, vocabulary, width, dtype=pair[1])
    vector = logits(8, 1 if stretched else rows, width).expand(rows, width)
    leaf = z.clone().requires_grad_()
    ours = ops.soft_embedding(leaf, table, tau, backend=backend.name)
    recorded = "recorded" in type(ours.grad_fn).__name__
    assert recorded == (backend.name != "reference")
    mixture, gradient = textbook(z, [table], [vector], tau)
    large = 3.0 if kind == "huge" else 1.0
    near(ours.detach(), mixture, large * weight_tolerance(backend, *pair), unit=TINY)
    (got,) = torch.autograd.grad(ours, leaf, vector.to(ours.dtype))
    rounded = rounds_factors(backend, *pair)
    weighted = weight_tolerance(backend, *pair) / 2
    exact = weighted if backend.name == "triton" or rounded else 3 * product_tolerance(backend, *pair)
    unit = unit_of(backend, pair, [vector], [table], tau, kind)
    near_logits_gradient(backend, got, gradient, z, large * exact, unit)


@every
@few(10, 40)
@given(
    shapes, st.sampled_from(PAIRS), heads, st.sampled_from([0.3, 1.0, 10.0]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_mixtures_of_hidden_states_and_what_reaches_them(backend, shape, pair, scale_cap, tau, tied, seed):
    assume(takes(backend, *pair))
    rows, vocabulary, _ = shape
    h, head = hidden_states(*shape, pair, *scale_cap, seed=seed)
    table = head.weight if tied else logits(seed + 2, vocabulary, 40, dtype=pair[1])
    vector = logits(seed + 4, rows, table.shape[1])
    leaf = h.clone().requires_grad_()
    ours = ops.linear_soft_embedding(leaf, head, table, tau, backend=backend.name)
    assert ("recorded" in type(ours.grad_fn).__name__) == (backend.name != "reference")
    mixture, gradient = textbook(h, [table], [vector], tau, head)
    weighted = weight_tolerance(backend, *pair)
    near(ours.detach(), mixture, weighted / min(tau, 1.0), unit=TINY)
    (got,) = torch.autograd.grad(ours, leaf, vector.to(ours.dtype))
    assert got.dtype == h.dtype
    # Rounded to the dtype of h once more; the interpreter cuts.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-22}.get(h.dtype, 0.0)
    exact = weighted / 2 if backend.name == "triton" else weighted * (1 if weighted > 1e-3 else 5)
    unit = unit_of(backend, pair, [vector], [table], tau)
    near(got.double(), gradient, exact + rounding, unit=unit)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_reaches_logits_without_meaning(backend, dtype, bad):
    z, table, vector = logits(3, 4, 900, dtype=dtype), logits(4, 900, 6, dtype=dtype), logits(5, 4, 6)
    z[1, slice(None) if bad == -math.inf else 700] = bad
    mixture = ops.soft_embedding(z.requires_grad_(), table, backend=backend.name)
    (got,) = torch.autograd.grad(mixture, z, vector)
    for result in (mixture, got):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


def test_recorded_mixtures_and_their_gradient_mean_what_the_others_do():
    z, table, vector = (logits(*size, dtype=torch.float64) for size in ((1, 5, 37), (2, 37, 6), (3, 5, 6)))
    z[0, 4], z[1] = 40.0, torch.nan
    recorded = reference.soft_embedding_recorded(z, table, 0.7)
    torch.testing.assert_close(recorded.mixture, reference.soft_embedding(z, table, 0.7), equal_nan=True)
    likeliest = table[recorded.token.clamp(min=0)]
    known = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close((likeliest + recorded.offset)[known], recorded.mixture[known])
    ours = reference.soft_embedding_backward(z, vector, table, *recorded[1:], 0.7)
    meant = reference.relaxed_backward(z, [vector], [table], 0.7)
    torch.testing.assert_close(ours, meant, rtol=1e-9, atol=0, equal_nan=True)


def records_of(backend, z, table, vector, head, tau):
    """What a back end records of logits, or hidden states and a head, and what reaches them by it."""
    x = (z,) if head is None else (z, head)
    name = "soft_embedding" if head is None else "linear_soft_embedding"
    recorded = getattr(ops.embedding, f"{name}_recorded")(*x, table, tau, backend)
    back = getattr(ops.embedding, f"{name}_backward")(*x, vector, table, *recorded[1:], tau, backend)
    return [*recorded, back]


@by("native")
@pytest.mark.parametrize("kind", ["random", "ties", "minus infinity", "dominant"])
@pytest.mark.parametrize("shape", [(0, 33, 8), (1, 1, 8), (5, 700, 33), (65, 513, 64), (530, 31, 6)])
@pytest.mark.parametrize("linear", [False, True])
def test_native_records_are_the_references(backend, linear, shape, kind):
    """Where the likeliest entry is found late, in another part of the vocabulary, or twice."""
    rows, vocabulary, width = shape
    z, table = logits(1, rows, vocabulary, kind, torch.float64), logits(2, vocabulary, width, dtype=torch.float64)
    vector, head = logits(3, rows, width, dtype=torch.float64), None
    if linear:
        z, head = hidden_states(*shape, (torch.float64, torch.float64), 0.7, 5.0 if kind == "ties" else 0.0)
    elif rows > 2 and vocabulary > 1:
        z[0], z[1, -1], z[2, 0] = torch.linspace(-3, 3, vocabulary, dtype=torch.float64), math.nan, 90.0
        z = strided(z)
    meant = records_of("reference", z, table, vector, head, 0.6)
    for ours, one in zip(records_of("native", z, table, vector, head, 0.6), meant, strict=True):
        known = ~one.isnan() if one.is_floating_point() else slice(None)  # of a row without meaning, nothing is read
        torch.testing.assert_close(ours[known], one[known], rtol=1e-9, atol=1e-12)


@by("native")
def test_records_that_are_none_are_refused(backend):
    z, table, vector = logits(1, 3, 40), logits(2, 40, 6), logits(3, 3, 6)
    recorded = ops.embedding.soft_embedding_recorded(z, table, 1.0, "native")
    for i, wrong, what in ((2, recorded.top[:2], "top"), (4, recorded.token + 40, "token"), (1, table, "offset")):
        rest = [*recorded[:i], wrong, *recorded[i + 1 :]][1:]
        with pytest.raises((ValueError, RuntimeError), match=what):
            torch.ops.nabla_fast.native_soft_embedding_backward(z, vector, table, *rest, 1.0)


def test_recorded_mixtures_of_hidden_states_and_their_gradient_mean_what_the_others_do():
    (h, head), vector = hidden_states(5, 37, 8, (torch.float64, torch.float64), 0.8, 3.0), logits(3, 5, 6).double()
    table = logits(2, 37, 6, dtype=torch.float64)
    recorded = reference.linear_soft_embedding_recorded(h, head, table, 0.7)
    torch.testing.assert_close(recorded.mixture, reference.linear_soft_embedding(h, head, table, 0.7))
    ours = reference.linear_soft_embedding_backward(h, head, vector, table, *recorded[1:], 0.7)
    torch.testing.assert_close(ours, reference.linear_relaxed_backward(h, head, [vector], [table], 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_recorded_mixtures(dtype):
    z, table, vector = logits(1, 3, 37, dtype=dtype), logits(2, 37, 6, dtype=dtype), logits(3, 3, 6)
    recorded = torch.ops.nabla_fast.soft_embedding_recorded.default
    torch.library.opcheck(recorded, (z.clone().requires_grad_(), table, 0.7, "reference"))
    rest = recorded(z, table, 0.7, "reference")[1:]
    backward = torch.ops.nabla_fast.soft_embedding_backward.default
    torch.library.opcheck(backward, (z, vector, table, *rest, 0.7, "reference"))
    assert backward(z, vector, table, *rest, 0.7, "reference").dtype == dtype
    h, own = hidden_states(3, 37, 8, (dtype, dtype))
    recorded = torch.ops.nabla_fast.linear_soft_embedding_recorded.default
    torch.library.opcheck(recorded, (h.clone().requires_grad_(), *own, table, 0.7, "reference"))
    backward = torch.ops.nabla_fast.linear_soft_embedding_backward.default
    torch.library.opcheck(backward, (h, *own, vector, table, *rest, 0.7, "reference"))


@by("reference", "native")
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (1.7, 0.0), (0.8, 3.0)])
def test_gradcheck_of_mixtures(backend, scale, softcap):
    """In float64, which Triton refuses."""
    h, head = hidden_states(3, 37, 8, (torch.float64, torch.float64), scale, softcap)
    z, table, name = logits(1, 3, 37, dtype=torch.float64), logits(2, 37, 6, dtype=torch.float64), backend.name
    assert torch.autograd.gradcheck(
        lambda x: ops.soft_embedding(x, table, tau=0.7, backend=name), (z.requires_grad_(),)
    )
    assert torch.autograd.gradcheck(
        lambda x: ops.linear_soft_embedding(x, head, table, tau=0.7, backend=name), (h.requires_grad_(),)
    )


@every
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.8, 3.0)])
@pytest.mark.parametrize("count", [1, 2])
def test_straight_through_takes_hard_tokens_forward_and_the_relaxation_backward(backend, scale, softcap, count):
    dtype = torch.float64 if takes(backend, torch.float64) else torch.float32
    h, head = hidden_states(4, 37, 8, (dtype, dtype), scale, softcap)
    z, options = logits(1, 4, 37, dtype=dtype), {"tau": 0.7, "backend": backend.name}
    tables = [logits(2, 37, 8, dtype=dtype), logits(3, 37, 6, dtype=dtype)][:count]
    vectors = [logits(4, 4, 8, dtype=dtype), logits(5, 4, 6, dtype=dtype)][:count]
    for x, own in ((z, None), (h, head)):
        x.requires_grad_()
        function = ops.linear_straight_through_embedding if own else ops.straight_through_embedding
        embeddings, token = function(*((x, own) if own else (x,)), tables, **options)
        assert torch.equal(token, lowest_argmax(logits_by_hand(x, own) if own else x))
        require_hard(embeddings, token, tables)
        (got,) = torch.autograd.grad(sum((e * v).sum() for e, v in zip(embeddings, vectors, strict=True)), x)
        meant = textbook(x.detach(), tables, vectors, 0.7, own)[1]
        near(got, meant, 1e-11 if dtype == torch.float64 else 2e-5, unit=gradient_unit(vectors, tables, 0.7))


@by("native")
def test_wrong_arguments(backend):
    """Of the kernels themselves, whose pointers know no bounds."""
    z, table = torch.randn(2, 9), torch.randn(9, 3)
    with pytest.raises(RuntimeError, match=r"table must have shape \(9, d_k\)"):
        backend.soft_embedding(z, table[1:], 1.0)
    with pytest.raises(ValueError, match="tau must be positive"):
        backend.soft_embedding(z, table, 0.0)
    with pytest.raises(RuntimeError, match=r"tables.0. must have shape \(9, d_k\)"):
        backend.straight_through_embedding(z, [table[1:]], 1.0)
    with pytest.raises(RuntimeError, match=r"vectors.0. must have shape \(2, 3\)"):
        backend.relaxed_backward(z, [torch.zeros(2, 4)], [table], 1.0)
