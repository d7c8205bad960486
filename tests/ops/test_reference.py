"""What the reference is made of: logits, chunks of rows, and the gradient over the vocabulary from three vectors."""

from __future__ import annotations

import math

import pytest
import torch
from back_ends import hidden_states, integers, logits_by_hand, near

from nabla_fast.ops import reference
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import dto_arguments, randn, step_state

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = torch.float64
V, D = 67, 12
HEADS = [(1.0, 0.0), (1.7, 0.0), (1.0, 3.0), (0.6, 2.0)]


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_logits_apply_scale_then_softcap(scale, softcap):
    h, head = hidden_states(5, V, D, (WIDE, WIDE), scale, softcap)
    near(reference.linear_logits(h, head), logits_by_hand(h, head), 1e-12)


@pytest.mark.parametrize(
    ("hidden", "weight", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_logits_are_never_rounded_to_half_precision(hidden, weight, expected):
    h, head = hidden_states(5, V, D, (hidden, weight))
    ours = reference.linear_logits(h, head)
    assert ours.dtype == expected
    near(ours, logits_by_hand(h, head), 1e-5)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "budget"), [(7, 10, 20), (7, 10, 1), (0, 10, 20), (6, 10, 30), (1, 10, 999)]
)
def test_row_chunks_cover_every_row_once_within_the_budget(monkeypatch, rows, vocabulary, budget):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", budget)
    chunks = reference.row_chunks(rows, vocabulary)
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    assert all(chunk.stop - chunk.start <= max(1, budget // vocabulary) for chunk in chunks)


def build(rows, scale=1.0, softcap=0.0, nll_coeff=0.3):
    h, head = hidden_states(rows, V, D, (WIDE, WIDE), scale, softcap)
    tables = Tables(head, randn(V, D, dtype=WIDE, seed=11), randn(V, 9, dtype=WIDE, seed=12), nll_coeff)
    return TokenGradient(h, randn(rows, D, dtype=WIDE, seed=2), randn(rows, 9, dtype=WIDE, seed=3)), tables


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("latents", [False, True])
def test_chunks_of_rows_change_nothing(monkeypatch, rows, latents):
    factors, tables = build(rows, 0.6, 2.0)

    def results():
        parameters = factors.hidden.clone() if latents else randn(rows, V, dtype=WIDE, seed=4)
        state = step_state(parameters, tables.head, latents=latents)
        rates, noise = torch.tensor([0.3, 0.2]), randn(rows, V, dtype=WIDE, seed=5)
        step = reference.dto_step(
            *dto_arguments(*state, rates, factors, tables, soft_noise=noise, latents=latents, max_steps=2)
        )
        norm = reference.gradient_norm(factors, tables)
        return *reference.linear_relaxed_stats(factors.hidden, tables.head, 0.7, 2.0, 0.5), norm, *step, *state

    meant = results()
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * V)
    assert len(reference.row_chunks(7, V)) == 4
    near(results(), meant, 1e-13)


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_token_gradient_is_the_dense_gradient_up_to_a_constant_per_row(scale, softcap):
    """Identity (a), on a random smooth function of one-hot rows that sees them as an objective does."""
    factors, tables = build(7, scale, softcap)
    one_hot = torch.eye(V, dtype=WIDE)[torch.arange(7) * 5].requires_grad_()
    e, r = one_hot @ tables.embedding, one_hot @ tables.reward_embedding
    log_pi = logits_by_hand(factors.hidden, tables.head).log_softmax(-1)
    value = -tables.nll_coeff * (one_hot * log_pi).sum()
    value = value + (e * factors.embedding).tanh().sum() + (r * factors.reward_embedding).sin().sum()
    dense, a, b = torch.autograd.grad(value, (one_hot, e, r))
    difference = reference.token_gradient(TokenGradient(factors.hidden, a, b), tables) - dense
    assert float((difference - difference[:, :1]).abs().max()) < 1e-12


def test_rows_of_a_token_gradient_are_the_rows_of_its_factors():
    factors, _ = build(5)
    for index in (slice(1, 4), slice(0, 0), torch.tensor([3, 0])):
        for part, whole in zip(factors.rows(index), factors, strict=True):
            assert torch.equal(part, whole[index])


def test_hard_tokens_follow_the_noise_where_it_is_given():
    h, head = hidden_states(6, V, D, (WIDE, WIDE))
    noise, z = torch.zeros(6, V, dtype=WIDE), randn(6, V, dtype=WIDE)
    noise[:, 13] = 1e6
    assert torch.equal(reference.hard_tokens(h, head, True), (h @ head.weight.T).argmax(-1))
    assert torch.equal(reference.hard_tokens(z, head, False), z.argmax(-1))
    for x, latents in ((h, True), (z, False)):
        assert reference.hard_tokens(x, head, latents, noise).tolist() == [13] * 6
    soft = noise.index_fill(0, torch.tensor([2]), math.nan)
    assert reference.hard_tokens(h, head, True, noise, soft).tolist() == [13, 13, -1, 13, 13, 13]
    assert len(reference.hard_tokens(z[integers(1, 6, 0)], Head(head.weight), False)) == 0
