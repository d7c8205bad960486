"""The reference operators against autograd and torch's own optimizer, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import dto_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

V, D, D_R = 67, 12, 9
HEADS = [(1.0, 0.0), (1.7, 0.0), (1.0, 3.0), (0.6, 2.0)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(scale: float = 1.0, softcap: float = 0.0) -> Head:
    # Logits of moderate size: where one token is nearly certain, its gradient is a difference of nearly equal numbers.
    return Head(0.4 * randn(V, D, seed=10), scale, softcap)


def tables(scale: float = 1.0, softcap: float = 0.0, nll_coeff: float = 0.3) -> Tables:
    return Tables(head(scale, softcap), randn(V, D, seed=11), randn(V, D_R, seed=12), nll_coeff)


def logits_by_hand(h: Tensor, weight: Tensor, scale: float, softcap: float) -> Tensor:
    z = scale * (h @ weight.T)
    return softcap * torch.tanh(z / softcap) if softcap else z


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", rows * V)
    assert len(reference.row_chunks(7, V)) == math.ceil(7 / rows)


# Logits and their statistics


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_linear_logits_apply_scale_then_softcap(scale: float, softcap: float) -> None:
    h = randn(5, D)
    ours = reference.linear_logits(h, head(scale, softcap))
    torch.testing.assert_close(ours, logits_by_hand(h, head().weight, scale, softcap), rtol=0, atol=1e-12)


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
def test_linear_logits_are_never_rounded_to_half_precision(
    hidden: torch.dtype, weight: torch.dtype, expected: torch.dtype
) -> None:
    h, w = randn(5, D).to(hidden), head().weight.to(weight)
    ours = reference.linear_logits(h, Head(w))
    assert ours.dtype == expected
    torch.testing.assert_close(ours.double(), h.double() @ w.double().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 0.7, 3.0])
def test_relaxed_stats_are_those_of_a_categorical_distribution(tau: float) -> None:
    z = 3 * randn(20, V)
    stats = reference.relaxed_stats(z, tau)
    meant = torch.distributions.Categorical(logits=z / tau)
    torch.testing.assert_close(stats.max_prob, meant.probs.amax(-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(stats.entropy, meant.entropy(), rtol=0, atol=1e-13)
    torch.testing.assert_close(stats.lse, (z / tau).exp().sum(-1).log(), rtol=0, atol=1e-13)
    assert torch.equal(stats.token, z.argmax(-1))
    assert stats.mask.all()


def test_relaxed_stats_take_the_lowest_index_of_a_tie_and_know_extreme_distributions() -> None:
    uniform, certain = torch.zeros(1, V, dtype=torch.float64), torch.zeros(1, V, dtype=torch.float64)
    certain[0, 5] = 1e4
    stats = reference.relaxed_stats(torch.cat([uniform, certain]))
    assert stats.token.tolist() == [0, 5]
    torch.testing.assert_close(stats.entropy, torch.tensor([math.log(V), 0.0], dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(stats.max_prob, torch.tensor([1 / V, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


def test_relaxed_stats_ignore_removed_tokens() -> None:
    z = randn(4, V)
    removed = z.clone()
    removed[:, 10:] = -math.inf
    ours, meant = reference.relaxed_stats(removed, 0.8), reference.relaxed_stats(z[:, :10], 0.8)
    for mine, expected in zip(ours, meant, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-14)


def test_relaxed_stats_mark_rows_that_cannot_be_read() -> None:
    z = randn(5, V)
    z[0, 3], z[1, 4], z[2], z[3, -1] = math.nan, math.inf, -math.inf, -math.inf
    stats = reference.relaxed_stats(z, 1.0, 0.0, 1.0)
    assert (stats.token == -1).tolist() == [True, True, True, False, False]
    for value in stats[:3]:
        assert value.isnan().tolist() == [True, True, True, False, False]
    assert stats.mask.tolist() == [False, False, False, True, True]


def test_mask_includes_both_thresholds_themselves() -> None:
    z = 2 * randn(30, V)
    stats = reference.relaxed_stats(z)
    entropy, confidence = float(stats.entropy[7]), float(stats.max_prob[7])
    mask = reference.relaxed_stats(z, 1.0, entropy, confidence).mask
    assert mask[7]
    assert torch.equal(mask, (stats.entropy >= entropy) & (stats.max_prob <= confidence))
    assert torch.equal(reference.relaxed_stats(z, 1.0, entropy, None).mask, stats.entropy >= entropy)
    assert torch.equal(reference.relaxed_stats(z, 1.0, None, confidence).mask, stats.max_prob <= confidence)
    assert 0 < int((stats.entropy >= entropy).sum()) < 30


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_linear_relaxed_stats_are_those_of_the_logits_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, rows: int, scale: float, softcap: float
) -> None:
    h = randn(rows, D)
    meant = reference.relaxed_stats(reference.linear_logits(h, head(scale, softcap)), 0.7, 2.0, 0.5)
    small_chunks(monkeypatch, 2)
    ours = reference.linear_relaxed_stats(h, head(scale, softcap), 0.7, 2.0, 0.5)
    for mine, expected in zip(ours, meant, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "budget"), [(7, 10, 20), (7, 10, 1), (0, 10, 20), (6, 10, 30), (1, 10, 999)]
)
def test_row_chunks_cover_every_row_once_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, budget: int
) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", budget)
    chunks = reference.row_chunks(rows, vocabulary)
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    assert all(chunk.stop - chunk.start <= max(1, budget // vocabulary) for chunk in chunks)


# Likelihood


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_linear_log_likelihood_equals_log_softmax_and_passes_gradcheck(scale: float, softcap: float) -> None:
    h, tokens = randn(6, D).requires_grad_(), torch.randint(V, (6,), generator=torch.Generator().manual_seed(1))
    own = head(scale, softcap)
    ours = reference.linear_log_likelihood(h, own, tokens)
    meant = logits_by_hand(h, own.weight, scale, softcap).log_softmax(-1)[torch.arange(6), tokens]
    torch.testing.assert_close(ours, meant, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: reference.linear_log_likelihood(x, own, tokens), (h,))
    weights = randn(6, seed=3)
    (mine,) = torch.autograd.grad(ours, h, weights, retain_graph=True)
    (expected,) = torch.autograd.grad(meant, h, weights)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


# Identity (a): the gradient over the vocabulary from three vectors


def objective_by_autograd(
    hidden: Tensor, embedding: Tensor, reward_embedding: Tensor, where: Tables
) -> tuple[Tensor, TokenGradient]:
    """A random smooth function of one-hot rows (N, V) that sees them as an objective does, and its gradient."""
    one_hot = torch.eye(V, dtype=torch.float64)[torch.arange(len(hidden)) * 5].requires_grad_()
    e = one_hot @ where.embedding
    r = one_hot @ where.reward_embedding
    log_pi = logits_by_hand(hidden, *where.head).log_softmax(-1)
    value = (
        -where.nll_coeff * (one_hot * log_pi).sum() + (e * embedding).tanh().sum() + (r * reward_embedding).sin().sum()
    )
    dense, a, b = torch.autograd.grad(value, (one_hot, e, r))
    return dense, TokenGradient(hidden, a, b)


def random_gradient(rows: int, where: Tables) -> tuple[Tensor, TokenGradient]:
    return objective_by_autograd(randn(rows, D, seed=1), randn(rows, D, seed=2), randn(rows, D_R, seed=3), where)


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_token_gradient_is_the_dense_gradient_up_to_a_constant_per_row(scale: float, softcap: float) -> None:
    where = tables(scale, softcap)
    dense, factors = random_gradient(7, where)
    difference = reference.token_gradient(factors, where) - dense
    assert float((difference - difference[:, :1]).abs().max()) < 1e-12


@pytest.mark.parametrize("nll_coeff", [0.3, 0.0, -1.0])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_gradient_norm_is_that_of_the_dense_gradient_the_constant_included(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float, nll_coeff: float
) -> None:
    where = tables(scale, softcap, nll_coeff)
    dense, factors = random_gradient(7, where)
    meant = dense.norm(dim=-1)
    torch.testing.assert_close(reference.gradient_norm(factors, where), meant, rtol=0, atol=1e-12)
    if nll_coeff:
        without = reference.token_gradient(factors, where).norm(dim=-1)
        assert float((without - meant).abs().min()) > 1e-3, "the constant made no difference"
    small_chunks(monkeypatch, 3)
    torch.testing.assert_close(reference.gradient_norm(factors, where), meant, rtol=0, atol=1e-12)


def test_gradient_norm_of_no_rows_and_of_half_precision_factors() -> None:
    where = tables()
    _, factors = random_gradient(4, where)
    assert reference.gradient_norm(factors.rows(slice(0, 0)), where).shape == (0,)
    half = TokenGradient(*(f.to(torch.bfloat16) for f in factors))
    exact = TokenGradient(*(f.double() for f in half))
    ours = reference.gradient_norm(half, where)
    torch.testing.assert_close(ours, reference.gradient_norm(exact, where), rtol=1e-12, atol=0)


def test_rows_of_a_token_gradient_are_the_rows_of_its_factors() -> None:
    _, factors = random_gradient(5, tables())
    for index in (slice(1, 4), torch.tensor([3, 0])):
        for part, whole in zip(factors.rows(index), factors, strict=True):
            assert torch.equal(part, whole[index])


# Identity (b): one DTO step


def step_by_autograd(
    parameters: Tensor, gradient: Tensor, where: Tables, latents: bool, tau: float, soft_noise: Tensor | None
) -> Tensor:
    """dL/dparameters through the straight-through relaxation whose incoming gradient is ``gradient`` (N, V)."""
    parameters = parameters.clone().requires_grad_()
    z = logits_by_hand(parameters, *where.head) if latents else parameters
    p = ((z if soft_noise is None else z + soft_noise) / tau).softmax(-1)
    hard = torch.nn.functional.one_hot(p.argmax(-1), V).double()
    (grad,) = torch.autograd.grad(hard + p - p.detach(), parameters, gradient)
    return grad


def run_steps(
    parameters: Tensor,
    gradient: Tensor | TokenGradient,
    where: Tables,
    *,
    latents: bool,
    hard_noise: Tensor | None = None,
    rates: tuple[float, ...] = (0.3, 0.2, 0.05),
    **options: Any,
) -> tuple[Tensor, ...]:
    """Steps of `dto_step` with one gradient, whatever the tokens do: parameters, moments and tokens."""
    parameters, m, v = parameters.clone(), torch.zeros_like(parameters), torch.zeros_like(parameters)
    step = torch.zeros(len(parameters), dtype=torch.long)
    for _ in rates:
        before = reference.hard_tokens(parameters, where.head, latents, hard_noise)
        tokens, changed = reference.dto_step(
            *dto_arguments(
                *(parameters, m, v, step, before, torch.tensor(rates, dtype=torch.float64), gradient, where),
                latents=latents,
                hard_noise=hard_noise,
                **options,
            )
        )
        assert torch.equal(changed, tokens != before)
    assert step.tolist() == [len(rates)] * len(parameters)
    return parameters, m, v, tokens


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
@pytest.mark.parametrize("factored", [False, True])
def test_dto_step_is_torchs_adam_on_the_straight_through_gradient(
    monkeypatch: pytest.MonkeyPatch,
    factored: bool,
    scale: float,
    softcap: float,
    latents: bool,
    tau: float,
    noisy: bool,
    weight_decay: float,
) -> None:
    where = tables(scale, softcap)
    dense, factors = random_gradient(7, where)
    soft, hard = (randn(7, V, seed=20), randn(7, V, seed=21)) if noisy else (None, None)
    start = randn(7, D if latents else V, seed=22)

    parameter = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([parameter], weight_decay=weight_decay)
    for rate in (0.3, 0.2, 0.05):
        parameter.grad = step_by_autograd(parameter.detach(), dense, where, latents, tau, soft)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    meant = parameter.detach()
    z = logits_by_hand(meant, *where.head) if latents else meant
    state = adam.state[parameter]

    options = {"latents": latents, "tau": tau, "weight_decay": weight_decay, "soft_noise": soft, "hard_noise": hard}
    for rows in (7, 2):
        small_chunks(monkeypatch, rows)
        ours = run_steps(start, factors if factored else dense, where, **options)
        for mine, expected in zip(ours, (meant, state["exp_avg"], state["exp_avg_sq"]), strict=False):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
        assert torch.equal(ours[3], (z if hard is None else z + hard).argmax(-1))


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_latents_gradient_is_the_difference_of_two_weighted_means_of_the_head(
    scale: float, softcap: float, tau: float
) -> None:
    """Identity (b) as the design writes it, against the first moment after one step."""
    where = tables(scale, softcap)
    dense, factors = random_gradient(4, where)
    h = randn(4, D, seed=22)
    z = logits_by_hand(h, *where.head)
    e = ((z - z.amax(-1, keepdim=True)) / tau).exp()
    weight = where.head.weight * scale
    slope = 1 - (z / softcap) ** 2 if softcap else torch.ones_like(z)
    s, q = e.sum(-1, keepdim=True), (e * dense).sum(-1, keepdim=True)
    a, b = (e * dense * slope) @ weight, (e * slope) @ weight
    identity = (a / s - q / s * b / s) / tau
    _, moment, _, _ = run_steps(h, factors, where, latents=True, tau=tau, rates=(0.1,))
    assert float((moment / 0.1 - identity).abs().max()) < 1e-12
    autograd = step_by_autograd(h, dense, where, True, tau, None)
    assert float((autograd - identity).abs().max()) < 1e-12


@pytest.mark.parametrize("latents", [False, True])
def test_constants_in_the_gradient_do_not_move_a_step(latents: bool) -> None:
    where = tables()
    dense, _ = random_gradient(5, where)
    start = randn(5, D if latents else V, seed=22)
    plain, shifted = (run_steps(start, g, where, latents=latents) for g in (dense, dense + 2.5))
    torch.testing.assert_close(plain[0], shifted[0], rtol=0, atol=1e-9)


def test_removed_tokens_stay_removed_and_infinite_gradients_there_do_no_harm() -> None:
    where = tables()
    dense, _ = random_gradient(4, where)
    start = randn(4, V, seed=22)
    start[:, 40:] = -math.inf
    gradient = dense.clone()
    gradient[:, 40:] = math.inf
    parameters, _, _, tokens = run_steps(start, gradient, where, latents=False)
    short = Tables(Head(where.head.weight[:40]), where.embedding[:40], where.reward_embedding[:40], where.nll_coeff)
    meant = run_steps(start[:, :40], dense[:, :40], short, latents=False)
    torch.testing.assert_close(parameters[:, :40], meant[0], rtol=0, atol=1e-12)
    assert bool((parameters[:, 40:] == -math.inf).all())
    assert torch.equal(tokens, meant[3])


def test_rows_with_nan_make_no_step_and_do_not_reach_other_rows() -> None:
    where = tables()
    dense, _ = random_gradient(3, where)
    start = randn(3, D, seed=22)
    tokens = reference.hard_tokens(start, where.head, True)
    results = []
    for bad in (False, True):
        parameters, m, v, step = start.clone(), torch.zeros(3, D), torch.zeros(3, D), torch.zeros(3, dtype=torch.long)
        if bad:
            parameters[1, 0] = math.nan
        state = (parameters, m.double(), v.double(), step)
        rates = torch.full((2,), 0.01, dtype=torch.float64)
        now, changed = reference.dto_step(
            *dto_arguments(*state, tokens, rates, dense, where, latents=True, max_steps=2)
        )
        results.append((*state, now, changed))
    meant, ours = results
    assert ours[3].tolist() == [2, 0, 2]
    assert int(ours[4][1]) == -1
    assert bool(ours[5][1])
    assert torch.equal(ours[0][1, 1:], start[1, 1:])
    for mine, expected in zip(ours, meant, strict=True):
        assert torch.equal(mine[[0, 2]], expected[[0, 2]])


STEPS = 15
RATES = torch.linspace(0.2, 0.02, STEPS, dtype=torch.float64)


def fresh_state(seed: int = 22) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, moments and step counts of seven rows."""
    start = randn(7, D, seed=seed)
    return start, torch.zeros_like(start), torch.zeros_like(start), torch.zeros(7, dtype=torch.long)


@pytest.mark.parametrize("group", [None, [0, 0, 1, 2, 2, 2, 3]])
def test_many_steps_in_one_call_stop_before_the_first_stale_gradient(group: list[int] | None) -> None:
    """As one step after the other does, where a row goes on only while no token of its group has changed."""
    where = tables()
    _, factors = random_gradient(7, where)
    together = torch.arange(7) if group is None else torch.tensor(group)
    parameters, m, v, step = fresh_state()
    tokens = reference.hard_tokens(parameters, where.head, True)
    one_by_one = fresh_state()
    moves = torch.ones(7, dtype=torch.bool)
    for _ in range(STEPS):
        for row in moves.nonzero().flatten().tolist():
            alone = [state[row : row + 1] for state in one_by_one]
            gradient = factors.rows(slice(row, row + 1))
            reference.dto_step(*dto_arguments(*alone, tokens[row : row + 1], RATES, gradient, where, latents=True))
        changed = reference.hard_tokens(one_by_one[0], where.head, True) != tokens
        moves = ~torch.isin(together, together[changed])
    now, stale = reference.dto_step(
        *dto_arguments(
            *(parameters, m, v, step, tokens, RATES, factors, where),
            latents=True,
            group=None if group is None else together,
            max_steps=99,
        )
    )
    for mine, expected in zip((parameters, m, v, step), one_by_one, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)
    assert torch.equal(now, reference.hard_tokens(parameters, where.head, True))
    assert torch.equal(stale, now != tokens)
    assert 0 < int(stale.sum()) < 7
    assert group is not None or int(step.max()) == STEPS
    assert len(set(step.tolist())) > 2


def test_rows_without_steps_left_or_with_a_stale_gradient_stay_as_they_are() -> None:
    where = tables()
    _, factors = random_gradient(7, where)
    parameters, m, v, step = fresh_state()
    step[2] = STEPS
    tokens = reference.hard_tokens(parameters, where.head, True)
    tokens[4] = (tokens[4] + 1) % V
    _, stale = reference.dto_step(*dto_arguments(parameters, m, v, step, tokens, RATES, factors, where, latents=True))
    moved = (parameters != fresh_state()[0]).any(1)
    assert moved.tolist() == [True, True, False, True, False, True, True]
    assert step.tolist() == [1, 1, STEPS, 1, 0, 1, 1]
    assert bool(stale[4])


def test_hard_tokens_follow_the_noise_where_it_is_given() -> None:
    h, noise = randn(6, D), torch.zeros(6, V, dtype=torch.float64)
    noise[:, 13] = 1e6
    assert torch.equal(reference.hard_tokens(h, head(), True), (h @ head().weight.T).argmax(-1))
    assert reference.hard_tokens(h, head(), True, noise).tolist() == [13] * 6
    z = randn(6, V)
    assert torch.equal(reference.hard_tokens(z, head(), False), z.argmax(-1))
    assert reference.hard_tokens(z, head(), False, noise).tolist() == [13] * 6


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (3, 0), (0, 5)])
def test_token_diff_finds_the_first_change_and_counts_all(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        old, new = (torch.randint(2, shape, generator=generator) for _ in range(2))
        first, count = reference.token_diff(old, new)
        differ = [
            [i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b] for x, y in zip(old, new, strict=True)
        ]
        assert first.tolist() == [d[0] if d else shape[1] for d in differ]
        assert count.tolist() == [len(d) for d in differ]
        assert first.dtype == count.dtype == torch.int64
