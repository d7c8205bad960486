"""`log_likelihood_gradient` and `linear_log_likelihood` by every back end against autograd in float64."""

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
    integers,
    logits_by_hand,
    near,
    product_tolerance,
    takes,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from nabla_fast import ops
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import logits

every = by("reference", "native", "triton")
sizes = [(0, 33, 8), (1, 1, 8), (1, 2, 33), (3, 33, 64), (3, 1000, 8), (17, 1000, 33)]
# Native kernels take rows by panels of 64 and passes of 512, and the vocabulary by tiles.
sizes += [] if INTERPRETED else [(65, 300, 33), (64, 1, 64), (600, 31, 6), (1100, 40, 8)]
heads = st.sampled_from([(1.0, 0.0), (0.25, 0.0), (1.7, 3.0), (0.5, 30.0)])


def textbook(h, head, tokens):
    """log pi (N,) and its gradient (N, d)."""
    h = h.double().requires_grad_()
    log_pi = torch.log_softmax(logits_by_hand(h, head), -1).gather(-1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(log_pi.sum(), h)
    return log_pi.detach(), gradient


def require(backend, h, head, tokens, factor=1.0):
    log_pi, gradient = backend.log_likelihood_gradient(h, head, tokens, True)
    meant = textbook(h, head, tokens)
    tolerance = factor * product_tolerance(backend, h.dtype, head.weight.dtype)
    near(log_pi, meant[0], tolerance)
    # Kernels round softmax weights of bfloat16 states beside a bfloat16 head to 8 bits.
    rounds = h.dtype == head.weight.dtype == torch.bfloat16 and len(h) and backend.name != "reference"
    rounding = 2**-8 * head.scale * float(head.weight.abs().max()) if rounds else 0.0
    near(gradient, meant[1], tolerance + rounding)
    assert (log_pi <= 0).all()
    alone, nothing = backend.log_likelihood_gradient(h, head, tokens, False)
    if backend.name == "triton":  # which does not write logits that it needs once, and adds up in another order
        near(alone, meant[0], tolerance)
        assert (alone <= 0).all()
    else:
        assert torch.equal(alone, log_pi)
    assert nothing.shape == (0, h.shape[1])


@every
@few(10, 48)
@given(st.sampled_from(sizes), st.sampled_from(PAIRS), heads, st.integers(0, 99))
def test_likelihood_and_its_gradient(backend, size, pair, scale_cap, seed):
    assume(takes(backend, *pair))
    h, head = hidden_states(*size, pair, *scale_cap, seed=seed)
    require(backend, h, head, integers(seed, size[1], size[0]))


@every
@pytest.mark.parametrize(
    ("size", "pair"),
    [
        ((1, 50257, 8), (torch.float32, torch.float16)),
        ((5, 4915 if INTERPRETED else 49152, 64), (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_real_vocabularies(backend, size, pair):
    h, head = hidden_states(*size, pair)
    require(backend, h, head, torch.arange(len(h)) * -1 + size[1] - 1)


@every
@each_view
@pytest.mark.parametrize("dtype", VIEWED, ids=str)
@in_its_dtypes
def test_views(backend, dtype, view):
    pair = (dtype, dtype) if dtype != torch.bfloat16 else (torch.float32, dtype)  # one whose weights are not rounded
    h, weight = view(logits(4, 5, 33, dtype=pair[0])), view(logits(5, 300, 33, dtype=pair[1]) / 4)
    require(backend, h, Head(weight), (2 * torch.arange(10))[::2][: len(h)] % len(weight))


@by("native")
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 8), (17, 1001, 64), (70, 513, 33), (600, 31, 6)])
def test_weights_that_bfloat16_holds_are_not_rounded(backend, rows, vocabulary, width):
    """Whole logits to the base 2: nothing is lost, so that nothing else hides behind the tolerance for rounding.

    Of native kernels, which round exp(z - max); Triton's round the probabilities.
    """
    h, weight = ((integers(seed, 3, count, width) - 1).bfloat16() for seed, count in ((8, rows), (9, vocabulary)))
    head, tokens = Head(weight, scale=math.log(2)), integers(10, vocabulary, rows)
    near(backend.log_likelihood_gradient(h, head, tokens, True)[1], textbook(h, head, tokens)[1], 2e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dominant_logit(backend, dtype):
    h, head = hidden_states(6, 700, 16, (dtype, dtype), seed=19)
    head = Head(4 * head.weight)
    head.weight[650] = h[0] * 4
    require(backend, h, head, torch.full((6,), 650), 5)


@every
@pytest.mark.parametrize("gap", [10.0, 18.0, 30.0])
@pytest.mark.parametrize("token", [0, 5, 256])
def test_the_gradient_of_a_nearly_certain_token(backend, token, gap):
    """Relative to its own size every digit counts: 1 - p keeps none, the sum of the other tokens' p does."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 8e-3)):
        h, weight = 0.1 * logits(3, 2, 8), 0.1 * logits(4, 257, 8)
        h[:, 0], weight[:, 0], weight[token, 0] = 1.0, 0.0, gap + 6
        h, weight = h.to(dtype), weight.to(dtype)
        h.requires_grad_()
        log_pi = ops.linear_log_likelihood(h, Head(weight), torch.full((2,), token), backend=backend.name)
        (gradient,) = torch.autograd.grad(log_pi.sum(), h)
        wide = weight.double()
        meant = torch.softmax(h.detach().double() @ wide.T, -1) @ (wide[token] - wide)
        assert ((gradient.double() - meant).norm(dim=-1) / meant.norm(dim=-1)).max() < tolerance


@every
def test_head_entries_of_minus_infinity_add_nothing(backend):
    h, head = hidden_states(4, 900, 8, (torch.float32, torch.float32))
    h = h.abs()
    masked = head.weight.clone()
    masked[200:, 0] = -torch.inf
    ours, meant = (
        backend.log_likelihood_gradient(h, Head(weight), torch.arange(4), False)[0]
        for weight in (masked, head.weight[:200])
    )
    near(ours, meant.double(), 2e-6)


@every
@few(6)
@given(st.lists(st.sampled_from(["good", "nan", "+inf"]), max_size=6), st.sampled_from([4, 33, 900]))
def test_hidden_states_without_meaning(backend, kinds, vocabulary):
    h, head = hidden_states(len(kinds), vocabulary, 8, (torch.float32, torch.float32))
    for row, kind in zip(h, kinds, strict=True):
        row[3] = {"good": 0.0, "nan": math.nan, "+inf": math.inf}[kind]
    bad = torch.tensor([kind != "good" for kind in kinds], dtype=torch.bool)
    log_pi, gradient = backend.log_likelihood_gradient(h, head, torch.arange(len(h)) % vocabulary, True)
    assert torch.equal(log_pi.isnan(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad)
    assert gradient[~bad].isfinite().all()


@by("reference", "triton")
def test_an_id_outside_the_vocabulary_is_never_an_index(backend):
    """Below the check that only the CPU can afford, and that native kernels make themselves: as a GPU would meet it."""
    h, head = hidden_states(3, 257, 8, (torch.float32, torch.float32))
    for x in backend.log_likelihood_gradient(h, head, torch.tensor([1, -1, 257]), True):
        nan = x.isnan() if x.ndim == 1 else x.isnan().all(-1)
        assert nan.tolist() == [False, True, True]


@by("reference", "native")
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (1.7, 0.0), (0.8, 3.0)])
def test_gradcheck(backend, scale, softcap):
    """Through the dispatcher; in float64, which Triton refuses."""
    h, head = hidden_states(3, 37, 8, (torch.float64, torch.float64), scale, softcap)
    tokens = torch.tensor([0, 5, 36])
    options = {"backend": backend.name}
    assert torch.autograd.gradcheck(
        lambda x: ops.linear_log_likelihood(x, head, tokens, **options), (h.requires_grad_(),)
    )


@by("native")
def test_wrong_arguments(backend):
    """Of the kernel itself, whose pointers know no bounds."""
    h, head, tokens = torch.zeros(2, 3), Head(torch.zeros(5, 3)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"tokens must have shape \(2,\)"):
        backend.log_likelihood_gradient(h, head, tokens[:1], True)
    with pytest.raises(TypeError, match="tokens must be int64"):
        backend.log_likelihood_gradient(h, head, tokens.int(), True)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=r"tokens must be in \[0, 5\)"):
            backend.log_likelihood_gradient(h, head, tokens + bad, True)
