"""`dto_step` by every back end where a row, its noise or its token has no meaning: it makes no step, and says so."""

from __future__ import annotations

import math

import pytest
import torch
from back_ends import by
from dto_cases import build, check, that_kernels_take

from nabla_fast.testing.operators import logits

every = by("reference", "native", "triton", "cuda")
each_parameterization = pytest.mark.parametrize("latents", [False, True])


def require_untouched(problem, before, rows):
    """Parameters, moments and step counts of ``rows`` are what they were."""
    for x, was in zip(problem.state, before, strict=True):
        assert torch.equal(x[rows].nan_to_num(7.0), was[rows].nan_to_num(7.0))


@every
@each_parameterization
@pytest.mark.parametrize(
    ("rows", "bad"),
    [(1, "nan"), (1, "+inf"), (1, "all -inf"), (1, "inf in the head"), (3, "+inf"), (3, "all -inf"), (9, "nan")],
)
@that_kernels_take
@pytest.mark.leaves_out(where=lambda bad, latents, **_: bad == "inf in the head" and not latents)
def test_a_row_without_meaning(backend, rows, bad, latents):
    """Whatever its token is said to be; the other rows know nothing of it."""
    problem, clean = (build(rows, 40, 8, latents=latents, hard=True, warm=True, seed=15, max_steps=2) for _ in range(2))
    if bad == "inf in the head":
        problem.tables.head.weight[17, 3] = math.inf * problem.state[0][0, 3].sign()
    elif bad == "all -inf":
        problem.options["hard_noise"][0] = -math.inf
    else:
        problem.state[0][0, 3] = math.nan if bad == "nan" else math.inf
    expected = clean.copy()
    token, _ = expected.run(backend)
    # The native kernel raises where a token is outside the vocabulary.
    for claimed in [int(problem.tokens[0])] + [-1] * (backend.name != "native"):
        ours = problem.copy()
        ours.tokens = torch.cat([torch.tensor([claimed]), problem.tokens[1:]])
        now, changed = ours.run(backend)
        assert now.tolist() == [-1, *token.tolist()[1:]]
        assert changed[0]
        require_untouched(ours, problem.state, slice(0, 1))
        for x, y in zip(ours.state, expected.state, strict=True):
            torch.testing.assert_close(x[1:], y[1:], rtol=1e-5, atol=1e-7)


@every
@each_parameterization
@pytest.mark.parametrize("rows", [1, 4])
def test_removed_tokens_stay_removed_and_infinite_gradients_there_do_no_harm(backend, rows, latents):
    """By noise of -inf for either, and logits of -inf; entries that can never be the token move nothing."""
    vocabulary = {"cuda": 130, "triton": 300}.get(backend.name, 600)  # slow on what is no GPU
    problem = build(rows, vocabulary, 16, latents=latents, soft=True, hard=True, warm=True, seed=13)
    banned = logits(0, 1, vocabulary)[0] < 0.75
    for name in ("soft_noise", "hard_noise"):
        problem.options[name][:, banned] = -math.inf
    problem = problem.with_tokens()
    check(backend, problem, 3)
    problem.gradient[:, banned] = math.inf
    check(backend, problem, 3)
    if not latents:
        problem = build(rows, 100, 8, latents=False, warm=True, seed=14)
        problem.state[0][:, ::3] = -math.inf
        problem = problem.with_tokens()
        problem.gradient[:, ::3] = math.inf
        ours, *_ = check(backend, problem, 3)
        assert (ours.state[0][:, ::3] == -math.inf).all()
        assert ours.state[0][:, 1::3].isfinite().all()


@every
@each_parameterization
def test_a_gradient_of_nan_ends_in_token_minus_one(backend, latents):
    problem = build(2, 30, 8, latents=latents, seed=3)
    problem.gradient[0, 5] = math.nan
    token, changed = problem.run(backend)
    assert (token == -1).tolist() == [True, False]
    assert changed[0]


BAD_NOISES = {
    "nan": lambda noise: noise.index_fill(0, torch.tensor([60]), math.nan),
    "+inf": lambda noise: noise.index_fill(0, torch.tensor([0]), math.inf),
    "all -inf": lambda noise: torch.full_like(noise, -math.inf),
}


@every
@pytest.mark.parametrize("name", ["soft_noise", "hard_noise"])
@pytest.mark.parametrize(
    ("rows", "latents", "dense", "kind"),
    [
        (1, True, True, "nan"), (3, True, True, "+inf"), (3, True, True, "all -inf"), (9, True, True, "nan"),
        (9, True, True, "+inf"), (2, True, False, "+inf"), (3, False, True, "nan"), (3, False, True, "all -inf"),
        (2, False, False, "+inf"),
    ],
)  # fmt: skip
@that_kernels_take
def test_a_row_with_noise_without_meaning(backend, rows, latents, dense, kind, name):
    """As with parameters without meaning, for its group too, however many steps are left and asked for."""
    group = [i // 2 for i in range(rows)] if rows > 2 and backend.name != "cuda" else None
    problem = build(rows, 61, 8, latents=latents, dense=dense, soft=True, hard=True, group=group, seed=5)
    problem.rates = problem.rates[:2] * 1e-2
    bad = problem.options[name].clone()
    bad[0] = BAD_NOISES[kind](bad[0])
    resting = 2 if group else 1
    for made, max_steps in ((0, 0), (0, 2), (2, 2)):
        clean, spoilt = problem.copy(), problem.copy()
        spoilt.options = problem.options | {name: bad}
        for one in (clean, spoilt):
            one.state[3].fill_(made)
        expected, _ = clean.run(backend, max_steps=max_steps)
        token, changed = spoilt.run(backend, max_steps=max_steps)
        assert token.tolist() == [-1, *expected[1:].tolist()]
        assert changed.tolist() == [True] + [False] * (rows - 1)
        assert clean.state[3].tolist() == [2 if max_steps else made] * rows
        assert spoilt.state[3].tolist() == [made] * resting + clean.state[3].tolist()[resting:]
        require_untouched(spoilt, [*problem.state[:3], torch.full((rows,), made)], slice(0, resting))
        for x, y in zip(spoilt.state, clean.state, strict=True):
            torch.testing.assert_close(x[resting:], y[resting:], rtol=1e-5, atol=1e-7)


@by("reference", "triton", "cuda")
@pytest.mark.parametrize("dense", [True, False])
@each_parameterization
@pytest.mark.parametrize("rows", [4, 9])
@that_kernels_take
def test_a_row_at_a_token_outside_the_vocabulary(backend, rows, latents, dense):
    """As a GPU meets it, where nobody looks before; the native kernel raises. It has changed, even without a token."""
    for outside in (
        [-1, 40, 2**40, -(2**62), 2**32 + 5, -40, 41, 2**63 - 1, -(2**63)],
        [-1, 2**63 - 1, -(2**63), 2**32 + 3] * 3,
    ):
        problem = build(rows, 40, 8, latents=latents, dense=dense, seed=1, max_steps=2)
        problem.tokens = torch.tensor(outside[:rows])
        problem.state[0][0] = math.nan
        before = problem.copy()
        token, changed = problem.run(backend)
        assert token[0] == -1
        assert torch.equal(token, before.with_tokens().tokens)
        assert changed.all()
        require_untouched(problem, before.state, slice(None))


@by("reference", "triton", "cuda")
@each_parameterization
def test_a_negative_step_count_looks_nothing_up(backend, latents):
    """As a GPU meets it, where nobody looks before; the native kernel raises."""
    for count in (-2, -(2**40)):
        problem = build(3, 30, 8, latents=latents, warm=True, seed=2, max_steps=2)
        problem.state[3][0] = count
        before = problem.copy()
        token, changed = problem.run(backend)
        # Kernels in CUDA take the row for one that has no steps left.
        meant = int(before.tokens[0]) if backend.name == "cuda" else -1
        assert (int(token[0]), bool(changed[0])) == (meant, meant == -1)
        assert (token[1:] >= 0).all()
        require_untouched(problem, before.state, slice(0, 1))
        assert (problem.state[3] > before.state[3]).tolist() == [False, True, True]


@by("reference", "native", "triton")
@each_parameterization
def test_no_rows(backend, latents):
    token, changed = build(0, 33, 8, latents=latents).run(backend)
    assert (token.shape, changed.shape) == ((0,), (0,))


@by("native")
def test_wrong_arguments(backend):
    """Of the kernel itself, whose pointers know no bounds; the functions of `nabla_fast.ops` check before it does."""
    problem = build(2, 10, 4)
    parameters, m, v, step = problem.state

    def run(gradient=problem.gradient, tokens=problem.tokens, state=(), **options):
        ours = problem.copy()
        ours.state = list(state) or ours.state
        ours.gradient, ours.tokens = gradient, tokens
        return ours.run(backend, **options)

    for error, message, arguments in (
        (RuntimeError, "parameters must have shape", {"state": (torch.zeros(2, 5), m, v, step)}),
        (RuntimeError, "gradient must have shape", {"gradient": torch.zeros(2, 9)}),
        (RuntimeError, "tokens must have shape", {"tokens": torch.zeros(3, dtype=torch.int64)}),
        (TypeError, "float32 or float64", {"state": (parameters.bfloat16(), m, v, step)}),
        (TypeError, "step must be int64", {"state": (parameters, m, v, step.int())}),
        (ValueError, "tau must be positive", {"tau": 0.0}),
        (ValueError, "step must not be negative", {"state": (parameters, m, v, step - 1)}),
        (RuntimeError, "exp_avg_sq must not share memory with exp_avg", {"state": (parameters, m, m, step)}),
        (RuntimeError, "step must not be expanded", {"state": (parameters, m, v, step[:1].expand(2))}),
        (ValueError, "group must ascend", {"group": torch.tensor([1, 0])}),
    ):
        with pytest.raises(error, match=message):
            run(**arguments)
    for token in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=rf"tokens must be in \[0, 10\), got {token} at 1"):
            run(tokens=torch.tensor([0, token]))
