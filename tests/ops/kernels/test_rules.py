"""What holds for every back end alike: nearly certain tokens, rows and settings without meaning.

All back ends of one device in one process: where there is no GPU, Triton's in the interpreter, the native one and the
reference; on a GPU, CUDA's, Triton's and the reference.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import few

from nabla_fast import ops
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend, dto_arguments, logits

BACKENDS = ("reference", "native", "triton") if INTERPRETED else ("reference", "triton", "cuda")
every_back_end = pytest.mark.parametrize("backend", BACKENDS)
on_the_host = pytest.mark.skipif(not INTERPRETED, reason="values are looked at on the CPU only")

V, D, TOKEN = 257, 8, 5


def zeros(rows, width):
    return torch.zeros(rows, width), torch.zeros(rows, width), torch.zeros(rows, dtype=torch.long)


def implementation(operator, backend):
    """The back end's own; Triton's where CUDA's has none."""
    lacks = backend == "cuda" and not hasattr(ops.backends._import("cuda"), operator)
    return getattr(Backend("triton" if lacks else backend), operator)


def one_step(parameters, tokens, gradient, tables, backend, **options):
    """dL / d(parameters) as the first moment of a step has it."""
    m, v, step = zeros(*parameters.shape)
    rates = torch.full((1,), 1e-3)
    arguments = dto_arguments(parameters.clone(), m, v, step, tokens, rates, gradient, tables, **options)
    ops.dto_step(*arguments, backend=backend)
    assert step.tolist() == [1] * len(step)
    return m.double() * 10


# Nearly certain tokens: relative to the token's own G, every digit of its gradient counts.


def certain_logits(gap):
    z = 0.1 * logits(1, 2, V)
    z[:, TOKEN] = gap + 6.0
    return z


def certain_hidden(gap, rows=2):
    """Hidden states and a head whose first column is the gap: logits are those of `certain_logits`, about."""
    weight = 0.1 * logits(4, V, D)
    weight[:, 0] = 0.0
    weight[TOKEN, 0] = gap + 6.0
    h = 0.1 * logits(3, rows, D)
    h[:, 0] = 1.0
    return h, Head(weight)


def gradient_at(z, gradient, tau=1.0):
    """p * (G - <p, G>) / tau in float64, relative to G of the token."""
    p = torch.softmax(z.double() / tau, -1)
    difference = gradient.double() - gradient[:, TOKEN : TOKEN + 1].double()
    return p * (difference - (p * difference).sum(-1, keepdim=True)) / tau


def require_digits(actual, expected, columns=slice(None)):
    """To float32's digits, each row's token or its whole vector relative to its own size."""
    actual, expected = actual.double()[:, columns], expected[:, columns]
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max().item() < 2e-5, error.tolist()


GAPS = [10.0, 18.0]
token_column = slice(TOKEN, TOKEN + 1)


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("soft", [False, True])
def test_embeddings_of_a_nearly_certain_token(soft, gap, backend):
    z, table, vector = certain_logits(gap).requires_grad_(), logits(6, V, D) + 3, logits(5, 2, D)
    embedding = (
        ops.soft_embedding(z, table, backend=backend)
        if soft
        else ops.straight_through_embedding(z, [table], backend=backend)[0][0]
    )
    (dz,) = torch.autograd.grad((embedding * vector).sum(), z)
    expected = gradient_at(z.detach(), vector.double() @ table.double().T)
    require_digits(dz, expected, token_column)
    require_digits(dz, expected)


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("soft", [False, True])
def test_linear_embeddings_of_a_nearly_certain_token(soft, gap, backend):
    h, head = certain_hidden(gap)
    table, vector = logits(6, V, D) + 3, logits(5, 2, D)
    h.requires_grad_()
    embedding = (
        ops.linear_soft_embedding(h, head, table, backend=backend)
        if soft
        else ops.linear_straight_through_embedding(h, head, [table], backend=backend)[0][0]
    )
    (dh,) = torch.autograd.grad((embedding * vector).sum(), h)
    weight = head.weight.double()
    require_digits(dh, gradient_at(h.detach().double() @ weight.T, vector.double() @ table.double().T) @ weight)


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
def test_steps_of_nearly_certain_logits(gap, backend):
    z, gradient, tokens = certain_logits(gap), logits(2, 2, V) + 3, torch.full((2,), TOKEN)
    weight = logits(4, V, D)
    tables = Tables(Head(weight), weight, weight, 0.0)
    expected = gradient_at(z, gradient)
    require_digits(one_step(z, tokens, gradient, tables, backend, latents=False), expected, token_column)


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("dense", [True, False])
def test_steps_of_latents_of_a_nearly_certain_token(dense, rows, gap, backend):
    """By one pass, by one for each of few rows, by blocks of rows."""
    h, head = certain_hidden(gap, rows)
    tables = Tables(head, logits(6, V, D) + 3, logits(7, V, D), 0.0)
    factors = TokenGradient(h, logits(8, rows, D), logits(9, rows, D))
    exact = factors.embedding.double() @ tables.embedding.double().T
    exact = exact + factors.reward_embedding.double() @ tables.reward_embedding.double().T
    gradient = exact.float() if dense else factors
    weight = head.weight.double()
    expected = gradient_at(h.double() @ weight.T, gradient if dense else exact) @ weight
    tokens = torch.full((rows,), TOKEN)
    require_digits(one_step(h, tokens, gradient, tables, backend, latents=True), expected)


@every_back_end
@pytest.mark.parametrize("gap", [*GAPS, 30.0])
@pytest.mark.parametrize("token", [0, TOKEN, V - 1])
def test_likelihood_of_a_nearly_certain_token(token, gap, backend):
    h, head = certain_hidden(gap)
    head = Head(head.weight.roll(token - TOKEN, 0))
    h.requires_grad_()
    log_pi = ops.linear_log_likelihood(h, head, torch.full((2,), token), backend=backend)
    (dh,) = torch.autograd.grad(log_pi.sum(), h)
    weight = head.weight.double()
    p = torch.softmax(h.detach().double() @ weight.T, -1)
    require_digits(dh, p @ (weight[token] - weight))


# bfloat16 operands: what is rounded is rounded relative to itself, and the token's own weight takes part in nothing.


def require_half_digits(actual, expected):
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max().item() < 8e-3, error.tolist()


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
def test_gradients_of_a_nearly_certain_token_in_bfloat16(gap, backend):
    half = torch.bfloat16
    h, head = certain_hidden(gap)
    h, head, table = h.to(half).requires_grad_(), Head(head.weight.to(half)), (logits(6, V, D) + 3).to(half)
    vector = logits(5, 2, D).to(half).float()
    weight = head.weight.double()
    z = h.detach().double() @ weight.T
    meant = gradient_at(z, vector.double() @ table.double().T) @ weight
    for embedding in (
        ops.linear_soft_embedding(h, head, table, backend=backend),
        ops.linear_straight_through_embedding(h, head, [table], backend=backend)[0][0],
    ):
        (dh,) = torch.autograd.grad((embedding * vector).sum(), h)
        require_half_digits(dh, meant)
    log_pi = ops.linear_log_likelihood(h, head, torch.full((2,), TOKEN), backend=backend)
    (dh,) = torch.autograd.grad(log_pi.sum(), h)
    require_half_digits(dh, torch.softmax(z, -1) @ (weight[TOKEN] - weight))
    x = certain_logits(gap).to(half).requires_grad_()
    meant = gradient_at(x.detach(), vector.double() @ table.double().T)
    embedding = ops.straight_through_embedding(x, [table], backend=backend)[0][0]
    (dx,) = torch.autograd.grad((embedding * vector).sum(), x)
    require_half_digits(dx, meant)
    require_half_digits(dx[:, token_column], meant[:, token_column])


@every_back_end
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("rows", [1, 9])
def test_steps_beside_a_bfloat16_head_of_a_nearly_certain_token(rows, gap, backend):
    h, head = certain_hidden(gap, rows)
    head = Head(head.weight.bfloat16())
    gradient, weight = logits(8, rows, V), head.weight.double()
    tables = Tables(head, head.weight, head.weight, 0.0)
    expected = gradient_at(h.double() @ weight.T, gradient) @ weight
    step = one_step(h, torch.full((rows,), TOKEN), gradient, tables, backend, latents=True)
    error = (step - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max().item() < 1e-4, error.tolist()


@every_back_end
@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_gradients_of_large_logits_are_normalised_by_their_own_sum(tau, backend):
    """Their log-sum-exp is rounded too far for that."""
    z, table, vector = logits(1, 3, V) * tau + 1e4, logits(6, V, D), logits(5, 3, D)
    meant = ops.reference.relaxed_backward(z.double(), [vector.double()], [table.double()], tau)
    ours = implementation("relaxed_backward", backend)(z, [vector], [table], tau)
    assert ((ours.double() - meant).norm(dim=-1) / meant.norm(dim=-1)).max() < 1e-5


# Rows without meaning

BAD = {"nan": (3, math.nan), "+inf": (3, math.inf), "all -inf": (slice(None), -math.inf)}
bad_rows = st.lists(st.sampled_from(["good", *BAD]), min_size=0, max_size=6)
sizes = st.sampled_from([4, 33, 300])


def degenerate(kinds, width, seed):
    x = logits(seed, len(kinds), width)
    for row, kind in enumerate(kinds):
        if kind != "good":
            columns, value = BAD[kind]
            x[row, columns] = value
    return x, torch.tensor([kind != "good" for kind in kinds], dtype=torch.bool)


def require_nan(bad, *floats):
    for x in floats:
        nan = x.isnan() if x.ndim == 1 else x.isnan().all(-1)
        assert torch.equal(nan, bad)
        assert x[~bad].isfinite().all()


@few(15)
@given(bad_rows, sizes, st.integers(0, 9), st.sampled_from([0.3, 1.0]))
def test_logits_without_meaning(kinds, vocabulary, seed, tau):
    z, bad = degenerate(kinds, vocabulary, seed)
    table, vector = logits(seed + 1, vocabulary, D), logits(seed + 2, len(kinds), D)
    tokens = None
    for backend in BACKENDS:
        stats = ops.relaxed_stats(z, tau, 0.0, 1.0, backend=backend)
        require_nan(bad, *stats[:3])
        assert torch.equal(stats.mask, ~bad)
        x = z.clone().requires_grad_()
        (hard,), token = ops.straight_through_embedding(x, [table], tau=tau, backend=backend)
        soft = ops.soft_embedding(x, table, tau=tau, backend=backend)
        require_nan(bad, hard.detach(), soft.detach())
        for embedding in (hard, soft):
            (dz,) = torch.autograd.grad((embedding * vector).sum(), x)
            require_nan(bad, dz)
        tokens = token if tokens is None else tokens
        assert torch.equal(token, tokens)
        assert torch.equal(stats.token, tokens)
        assert torch.equal(tokens < 0, bad)
        assert (tokens[bad] == -1).all()


@few(8)
@given(st.lists(st.sampled_from(["good", "nan", "+inf"]), max_size=6), sizes, st.integers(0, 9))
def test_hidden_states_without_meaning(kinds, vocabulary, seed):
    h, bad = degenerate(kinds, D, seed)
    head, table = Head(logits(seed + 1, vocabulary, D)), logits(seed + 2, vocabulary, D)
    targets, vector = torch.arange(len(kinds)) % vocabulary, logits(seed + 3, len(kinds), D)
    factors = TokenGradient(h, vector, vector)
    for backend in BACKENDS:
        stats = ops.linear_relaxed_stats(h, head, 1.0, 0.0, 1.0, backend=backend)
        require_nan(bad, *stats[:3])
        assert torch.equal(stats.mask, ~bad)
        assert torch.equal(stats.token == -1, bad)
        x = h.clone().requires_grad_()
        (hard,), token = ops.linear_straight_through_embedding(x, head, [table], backend=backend)
        assert torch.equal(token, stats.token)
        soft = ops.linear_soft_embedding(x, head, table, backend=backend)
        likelihood = ops.linear_log_likelihood(x, head, targets, backend=backend)
        require_nan(bad, hard.detach(), soft.detach(), likelihood.detach())
        for out in ((hard * vector).sum(), (soft * vector).sum(), likelihood.sum()):
            (dh,) = torch.autograd.grad(out, x)
            require_nan(bad, dh)
        for nll_coeff in (0.0, 0.3):
            require_nan(bad, ops.gradient_norm(factors, Tables(head, table, table, nll_coeff), backend=backend))


@few(12)
@given(st.lists(st.sampled_from(["good", "nan", "+inf"]), min_size=1, max_size=6), st.booleans(), st.integers(0, 9))
def test_a_row_without_meaning_makes_no_step(kinds, latents, seed):
    vocabulary = 33
    start, bad = degenerate(kinds, D if latents else vocabulary, seed)
    weight = logits(seed + 1, vocabulary, D)
    tables, gradient = Tables(Head(weight), weight, weight, 0.1), logits(seed + 2, len(kinds), vocabulary)
    tokens = ops.relaxed_stats(ops.linear_logits(start, tables.head) if latents else start).token.clamp(min=0)
    for backend in BACKENDS:
        parameters, (m, v, step) = start.clone(), zeros(*start.shape)
        state = (parameters, m, v, step)
        rates = torch.full((1,), 1e-3)
        token, changed = ops.dto_step(
            *dto_arguments(*state, tokens, rates, gradient, tables, latents=latents), backend=backend
        )
        assert torch.equal(step == 0, bad)
        assert torch.equal(token == -1, bad)
        assert changed[bad].all()
        assert torch.equal(parameters[bad].nan_to_num(7.0), start[bad].nan_to_num(7.0))
        assert parameters[~bad].isfinite().all()


BAD_NOISES = {
    "nan": lambda noise: noise.index_fill(0, torch.tensor([7]), math.nan),
    "+inf": lambda noise: noise.index_fill(0, torch.tensor([V - 1]), math.inf),
    "-inf": lambda noise: torch.full_like(noise, -math.inf),
}


@every_back_end
@pytest.mark.parametrize("name", ["soft_noise", "hard_noise"])
@pytest.mark.parametrize(
    ("rows", "latents", "dense", "kind"),
    [
        (1, True, True, "nan"), (9, True, True, "nan"), (9, True, True, "+inf"), (2, True, False, "+inf"),
        (3, False, True, "nan"), (3, False, True, "-inf"), (2, False, False, "+inf"),
    ],
)  # fmt: skip
def test_a_row_with_noise_without_meaning_makes_no_step(rows, latents, dense, name, kind, backend):
    """As with parameters without meaning: token -1 and no step, for its group too, however many steps are left."""
    start, weight = logits(1, rows, D if latents else V), logits(2, V, D)
    tables, factors = (
        Tables(Head(weight), weight, weight, 0.1),
        TokenGradient(*(0.1 * logits(seed, rows, D) for seed in (7, 8, 9))),
    )
    gradient = 0.1 * logits(4, rows, V) if dense else factors
    noises = {"soft_noise": logits(5, rows, V), "hard_noise": 0.1 * logits(6, rows, V)}
    z = ops.linear_logits(start, tables.head) if latents else start
    tokens = ops.relaxed_stats(z + noises["hard_noise"]).token
    bad = noises[name].clone()
    bad[0] = BAD_NOISES[kind](bad[0])
    group = torch.arange(rows) // 2 if rows > 2 else None
    for made, max_steps in ((0, 0), (0, 2), (2, 2)):
        results = []
        for noise in (noises, noises | {name: bad}):
            state = (start.clone(), *zeros(*start.shape))
            state[3].fill_(made)
            options = {"latents": latents, "max_steps": max_steps, "group": group, **noise}
            arguments = dto_arguments(*state, tokens, torch.full((2,), 1e-4), gradient, tables, **options)
            out = ops.dto_step(*arguments, backend=backend)
            results.append((*out, *state))
        (meant, *_, moved), (token, changed, *now, step) = results
        assert moved.tolist() == [2 if max_steps else made] * rows
        resting = 1 if group is None else 2
        assert token.tolist() == [-1, *meant[1:].tolist()]
        assert changed.tolist() == [True] + [False] * (rows - 1)
        assert step.tolist() == [made] * resting + moved.tolist()[resting:]
        assert torch.equal(now[0][:resting], start[:resting])
        assert not now[1][:resting].any()
        for x, y in zip(now, results[0][2:5], strict=True):
            torch.testing.assert_close(x[resting:], y[resting:], rtol=1e-5, atol=1e-7)


# Arguments without meaning


@every_back_end
@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e39])
def test_tau_is_a_positive_number(tau, backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    m, v, step = zeros(2, V)
    tables, tokens, rates = Tables(head, table, table, 0.1), z.argmax(-1), torch.full((1,), 1e-3)
    calls = (
        lambda: ops.relaxed_stats(z, tau, backend=backend),
        lambda: ops.linear_relaxed_stats(h, head, tau, backend=backend),
        lambda: ops.straight_through_embedding(z, [table], tau=tau, backend=backend),
        lambda: ops.linear_straight_through_embedding(h, head, [table], tau=tau, backend=backend),
        lambda: ops.soft_embedding(z, table, tau=tau, backend=backend),
        lambda: ops.linear_soft_embedding(h, head, table, tau=tau, backend=backend),
        lambda: ops.dto_step(
            *dto_arguments(z.clone(), m, v, step, tokens, rates, z, tables, latents=False, tau=tau), backend=backend
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="tau must be a finite number above 0"):
            call()


@on_the_host
@every_back_end
@pytest.mark.parametrize("bad", [-1, V, -(2**40)])
def test_an_id_outside_the_vocabulary_is_an_index_error(bad, backend):
    h, head = logits(1, 3, D), Head(logits(2, V, D))
    tokens = torch.tensor([1, bad, 2])
    with pytest.raises(IndexError, match=rf"tokens must hold token ids from 0 to {V - 1}, got {bad}"):
        ops.linear_log_likelihood(h, head, tokens, backend=backend)
    m, v, step = zeros(3, D)
    tables = Tables(head, head.weight, head.weight, 0.1)
    with pytest.raises(IndexError, match=rf"tokens must hold token ids from 0 to {V - 1}, got {bad}"):
        ops.dto_step(
            *dto_arguments(h, m, v, step, tokens, torch.full((1,), 1e-3), logits(3, 3, V), tables, latents=True),
            backend=backend,
        )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
def test_an_id_outside_the_vocabulary_is_never_an_index(backend):
    """Below the check that only the CPU can afford: as a GPU would meet it."""
    h, head, tokens = logits(1, 3, D), Head(logits(2, V, D)), torch.tensor([1, -1, V])
    kernel = implementation("log_likelihood_gradient", backend)
    require_nan(torch.tensor([False, True, True]), *kernel(h, head, tokens, True))
    state = (h.clone(), *zeros(3, D))
    state[3][0] = -2
    tables = Tables(head, head.weight, head.weight, 0.1)
    expected = ops.linear_relaxed_stats(h, head).token
    tokens = torch.tensor([int(expected[0]), -1, V])
    arguments = (tokens, torch.full((1,), 1e-3), logits(3, 3, V), tables)
    token, changed = implementation("dto_step", backend)(*dto_arguments(*state, *arguments, latents=True))
    assert token.tolist() == [-1, *expected[1:].tolist()]
    assert changed.all()
    assert torch.equal(state[0], h)
    assert state[3].tolist() == [-2, 0, 0]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_row_at_a_token_outside_the_vocabulary_makes_no_step(rows, latents, dense, backend):
    """Below the check that only the CPU can afford. It is not one that has not changed, not even without a token."""
    outside = torch.tensor([-1, V, 2**40, -(2**62), 2**32 + TOKEN, -V, V + 1, 2**63 - 1, -(2**63)])[:rows]
    start = logits(1, rows, D if latents else V)
    start[0] = math.nan
    head = Head(logits(2, V, D))
    tables, factors = (
        Tables(head, logits(3, V, D), logits(4, V, D), 0.1),
        TokenGradient(*(logits(seed, rows, D) for seed in (5, 6, 7))),
    )
    state = (start.clone(), *zeros(*start.shape))
    token, changed = implementation("dto_step", backend)(*dto_arguments(
        *state, outside, torch.full((2,), 1e-3), logits(6, rows, V) if dense else factors, tables, latents=latents,
        max_steps=2,
    ))  # fmt: skip
    expected = ops.relaxed_stats(ops.linear_logits(start, head) if latents else start).token
    assert torch.equal(token, expected)
    assert int(token[0]) == -1
    assert changed.all()
    assert torch.equal(state[0].nan_to_num(7.0), start.nan_to_num(7.0))
    assert not any(x.any() for x in state[1:])


@on_the_host
@every_back_end
def test_steps_and_rates_are_looked_at(backend):
    head = Head(logits(2, V, D))
    tables = Tables(head, head.weight, head.weight, 0.1)
    h, gradient = logits(1, 2, D), logits(3, 2, V)
    tokens = ops.linear_relaxed_stats(h, head).token

    def step(**changes):
        m, v, made = zeros(2, D)
        arguments = {"step": made, "learning_rates": torch.full((2,), 1e-3), "tokens": tokens} | changes
        options = {"latents": True} | {
            name: arguments.pop(name) for name in ("weight_decay", "max_steps", "group") if name in arguments
        }
        arguments = dto_arguments(h.clone(), m, v, gradient=gradient, tables=tables, **arguments, **options)
        return ops.dto_step(*arguments, backend=backend)

    step()
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning_rates must hold finite numbers of at least 0"):
            step(learning_rates=torch.tensor([0.1, bad]))
        with pytest.raises(ValueError, match=r"weight_decay must be a finite number of at least 0"):
            step(weight_decay=bad)
    with pytest.raises(ValueError, match="step must hold finite numbers of at least 0, got -1"):
        step(step=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"max_steps must be a finite number of at least 0, got -1"):
        step(max_steps=-1)
    with pytest.raises(ValueError, match=r"group must be in ascending order, got \[1, 0\]"):
        step(group=torch.tensor([1, 0]))
    with pytest.raises(TypeError, match=r"tokens must be a tensor of dtype int64, got torch.int32"):
        step(tokens=tokens.int())


@every_back_end
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_other_dtypes_are_refused_by_name(dtype, backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    other, options = Head(head.weight.to(dtype)), {"backend": backend}
    factors, tokens = TokenGradient(h, h, h), torch.zeros(2, dtype=torch.long)
    calls = {
        "z": [lambda x: ops.relaxed_stats(x, **options), lambda x: ops.soft_embedding(x, table, **options)],
        "h": [
            lambda x: ops.linear_relaxed_stats(x, head, **options),
            lambda x: ops.linear_soft_embedding(x, head, table, **options),
            lambda x: ops.linear_log_likelihood(x, head, tokens, **options),
        ],
        "head.weight": [lambda x: ops.linear_relaxed_stats(h, other, **options)],
        "table": [
            lambda x: ops.soft_embedding(z, x, **options),
            lambda x: ops.linear_soft_embedding(h, head, x, **options),
        ],
        "tables[0]": [lambda x: ops.straight_through_embedding(z, [x], **options)],
        "tables[1]": [lambda x: ops.linear_straight_through_embedding(h, head, [table, x], **options)],
        "factors.embedding": [
            lambda x: ops.gradient_norm(factors._replace(embedding=x), Tables(head, table, table, 0.1), **options)
        ],
    }
    inputs = {"z": z, "h": h, "head.weight": h, "table": table, "tables[0]": table, "tables[1]": table}
    inputs["factors.embedding"] = h
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(
                TypeError, match=rf"^{re.escape(name)} must be a tensor of dtype float32, .* got {dtype}"
            ):
                function(inputs[name].to(dtype))


@every_back_end
def test_shapes_that_do_not_fit_and_no_vocabulary_are_refused_by_name(backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    options = {"backend": backend}
    nothing = Head(torch.zeros(0, D))
    calls = {
        r"z must have shape \(N, V\), got \(257,\)": lambda: ops.relaxed_stats(z[0], **options),
        "z must have at least one vocabulary entry": lambda: ops.relaxed_stats(z[:, :0], **options),
        "head.weight must have at least one vocabulary": lambda: ops.linear_relaxed_stats(h, nothing, **options),
        r"head.weight must have shape \(V, 7\), got \(257, 8\)": lambda: ops.linear_soft_embedding(
            h[:, :7], head, table, **options
        ),
        r"table must have shape \(257, e\), got \(256, 8\)": lambda: ops.soft_embedding(z, table[1:], **options),
        r"tokens must have shape \(2\), got \(3,\)": lambda: ops.linear_log_likelihood(
            h, head, torch.zeros(3, dtype=torch.long), **options
        ),
        r"entropy_threshold must be a number or None": lambda: ops.relaxed_stats(z, 1.0, math.nan, **options),
        r"head.softcap must be a finite number of at least 0": lambda: ops.linear_relaxed_stats(
            h, head._replace(softcap=-1.0), **options
        ),
        r"new must have shape \(1, 2\), got \(2, 1\)": lambda: ops.token_diff(
            torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), **options
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


@every_back_end
def test_no_rows_give_empty_results(backend):
    z, h, head, table = logits(1, 0, V), logits(2, 0, D), Head(logits(3, V, D)), logits(4, V, D)
    options = {"backend": backend}
    none, rates, tables = torch.zeros(0, dtype=torch.long), torch.full((1,), 1e-3), Tables(head, table, table, 0.1)
    step = dto_arguments(h, h.clone(), h.clone(), none, none, rates, z, tables, latents=True)
    results = [
        *ops.relaxed_stats(z, **options), *ops.linear_relaxed_stats(h, head, **options),
        ops.soft_embedding(z, table, **options), ops.linear_soft_embedding(h, head, table, **options),
        *ops.straight_through_embedding(z, [table, table], **options)[0],
        *ops.linear_straight_through_embedding(h, head, [table, table], **options)[0],
        ops.linear_log_likelihood(h, head, none, **options),
        ops.gradient_norm(TokenGradient(h, h, h), Tables(head, table, table, 0.1), **options),
        *ops.dto_step(*step, **options),
    ]  # fmt: skip
    assert [len(x) for x in results] == [0] * len(results)
