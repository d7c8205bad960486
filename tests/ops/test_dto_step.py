"""`dto_step` by every back end: the reference against torch's Adam and autograd, all others against the reference.

Everything in float64. What only one back end has, such as teams of blocks, is in test_cuda.py, test_triton_kernels.py
and test_native.py; rows and arguments without meaning are in test_dto_step_rows.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from back_ends import HALVES, INTERPRETED, by, few, logits_by_hand, strided, transposed
from dto_cases import RATE, Problem, build, check, clear, judged, meant, near_rows, that_kernels_take
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.types import Head, TokenGradient

every = by("reference", "native", "triton", "cuda")
each_parameterization = pytest.mark.parametrize("latents", [False, True])
WIDE = torch.float64

# The meaning: one step


def straight_through(parameters: Tensor, gradient: Tensor, problem: Problem, tau: float) -> Tensor:
    """dL / d(parameters) through the straight-through relaxation whose incoming gradient is ``gradient`` (N, V)."""
    parameters, noise = parameters.clone().requires_grad_(), problem.options["soft_noise"]
    z = logits_by_hand(parameters, problem.tables.head) if problem.options["latents"] else parameters
    p = ((z if noise is None else z + noise) / tau).softmax(-1)
    hard = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double()
    return torch.autograd.grad(hard + p - p.detach(), parameters, gradient)[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("noisy", "weight_decay"), [(False, 0.0), (True, 0.4)])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@each_parameterization
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (1.7, 0.0), (1.0, 3.0), (0.6, 2.0)])
@pytest.mark.parametrize("dense", [False, True])
def test_the_reference_is_torchs_adam_on_the_straight_through_gradient(
    dense, scale, softcap, latents, tau, noisy, weight_decay
):
    """Three steps with one gradient, whatever the tokens do."""
    options = {"latents": latents, "dense": dense, "scale": scale, "softcap": softcap, "soft": noisy, "hard": noisy}
    problem = build(7, 67, 12, dtype=WIDE, table=WIDE, spread=0.6, tau=tau, weight_decay=weight_decay, **options)
    gradient = problem.gradient
    if isinstance(gradient, TokenGradient):  # a constant per row makes no difference to the relaxation
        z = logits_by_hand(gradient.hidden, problem.tables.head)
        gradient = -problem.tables.nll_coeff * z + gradient.embedding @ problem.tables.embedding.T
        gradient = gradient + problem.gradient.reward_embedding @ problem.tables.reward_embedding.T
    parameter = torch.nn.Parameter(problem.state[0].clone())
    adam = torch.optim.Adam([parameter], weight_decay=weight_decay)
    for rate in problem.rates.tolist()[:3]:
        parameter.grad = straight_through(parameter.detach(), gradient, problem, tau)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    for _ in range(3):
        now = problem.with_tokens()
        token, changed = now.run(reference)
        assert torch.equal(changed, token != now.tokens)
    moments = adam.state[parameter]
    for ours, theirs in zip(problem.state, (parameter, moments["exp_avg"], moments["exp_avg_sq"]), strict=False):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-12)
    assert problem.state[3].tolist() == [3] * 7
    assert torch.equal(token, problem.with_tokens().tokens)


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_gradient_of_latents_is_the_difference_of_two_weighted_means_of_the_head(softcap, tau):
    """Identity (b) as the design writes it, against the first moment after one step."""
    problem = build(4, 67, 12, dtype=WIDE, table=WIDE, scale=1.7, softcap=softcap, spread=0.6, tau=tau)
    z, weight = logits_by_hand(problem.state[0], problem.tables.head), problem.tables.head.weight * 1.7
    e = ((z - z.amax(-1, keepdim=True)) / tau).exp()
    slope = 1 - (z / softcap) ** 2 if softcap else torch.ones_like(z)
    s, q = e.sum(-1, keepdim=True), (e * problem.gradient).sum(-1, keepdim=True)
    a, b = (e * problem.gradient * slope) @ weight, (e * slope) @ weight
    problem.run(reference)
    torch.testing.assert_close(10 * problem.state[1], (a / s - q / s * b / s) / tau, rtol=0, atol=1e-12)


# Every back end

DRAWN = {
    "rows": st.sampled_from([0, 1, 3, 7] if INTERPRETED else [0, 1, 2, 3, 6, 17]),
    "vocabulary": st.sampled_from([1, 2, 33, 300, 1000] if INTERPRETED else [1, 2, 7, 33, 130, 300, 513, 1000]),
    "width": st.sampled_from([8, 33, 64] if INTERPRETED else [1, 8, 33, 40, 64, 72]),
    "latents": st.booleans(),
    "dense": st.booleans(),
    "warm": st.booleans(),
    "exact": st.just(False) if INTERPRETED else st.booleans(),
    "table": st.sampled_from([torch.float32, *HALVES, *([] if INTERPRETED else [torch.float64])]),
    "tied": st.booleans(),
    "scale_cap": st.sampled_from([(1.0, 0.0), (0.5, 0.0), (1.0, 4.0), (1.7, 2.0)]),
    "soft": st.booleans(),
    "hard": st.booleans(),
    "tau": st.sampled_from([0.05, 0.3, 1.0, 10.0]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "split": st.integers(1, 4),
    "steps": st.sampled_from([0, 1, 2, 6]),
    "seed": st.integers(0, 99),
}


def require(backend, rows, vocabulary, width, exact, scale_cap, split, steps, **options):
    group = [i // split for i in range(rows)] if split > 1 else None
    assume(backend.name != "triton" or not (exact or options["table"] == WIDE))
    scale, softcap = scale_cap
    problem = build(
        *(rows, vocabulary, width), dtype=WIDE if exact else torch.float32, scale=scale, softcap=softcap, group=group,
        **options,
    )  # fmt: skip
    assume(clear(problem, steps))
    # Of few columns, the largest may be what is left when larger numbers cancel.
    check(backend, problem, steps, slack=10.0 if width < 4 else 1.0)


@by("reference", "native", "triton")
@few(24, 250)
@given(**DRAWN)
def test_steps(backend, **case):
    require(backend, **case)


@by("cuda")
@few(30, 30)
@given(**DRAWN)
def test_steps_that_the_cuda_kernels_take(backend, **case):
    """Few rows that stop one by one, with a dense gradient and a head that is read in pieces of 16 bytes."""
    case |= {"rows": 1 + case["rows"] % 4, "width": 8 * (1 + case["width"] // 8), "dense": True, "split": 1}
    # The emulated device takes a second for what a GPU does in microseconds.
    case |= {"vocabulary": min(case["vocabulary"], 130), "steps": min(case["steps"], 2), "exact": False}
    case["table"] = torch.float32 if case["table"] == WIDE else case["table"]
    require(backend, **case)


@by("native", "triton")
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dense", [True, False])
def test_real_sizes(backend, dense, rows):
    """One row goes by one pass, few by one pass each, many by blocks."""
    table, width = (torch.bfloat16, 64) if dense else (torch.float32, 96)
    vocabulary, width = (2000, 40) if INTERPRETED else (49152, width)
    check(backend, judged(rows, vocabulary, width, dense=dense, table=table, spread=3, seed=16, steps=2), 2)
    if rows == 1:
        check(backend, judged(2, vocabulary, width, dense=dense, latents=False, seed=17, steps=3), 3)


@by("native")
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "table", "softcap", "soft"),
    [
        (16, 33, WIDE, WIDE, 0.0, True), (70, 613, torch.float32, torch.bfloat16, 0.0, True),
        (90, 300, torch.float32, torch.float32, 3.0, False), (67, 1000, WIDE, torch.float32, 2.0, True),
    ],
)  # fmt: skip
def test_rows_whose_logits_are_kept(backend, rows, vocabulary, dtype, table, softcap, soft, dense):
    """From 16 rows on by two passes over the vocabulary: panels and tiles that are not full, groups that rest."""
    problem = judged(
        *(rows, vocabulary, 40), dense=dense, dtype=dtype, table=table, softcap=softcap, soft=soft, hard=soft,
        warm=True, group=[i // 3 for i in range(rows)], steps=4, seed=21,
    )  # fmt: skip
    held = torch.arange(rows) // 3 % 4 == 1
    problem.tokens[held] = (problem.tokens[held] + 1) % vocabulary
    check(backend, problem, 4)


@by("native")
@pytest.mark.parametrize("dense", [True, False])
def test_more_rows_than_go_into_one_pass(backend, dense):
    """Whole groups of them stop on the way, one that is in two passes too."""
    group = [i // 40 for i in range(530)]
    together = build(530, 61, 8, dense=dense, warm=True, soft=True, hard=True, group=group, seed=22)
    together.rates = together.rates * 4
    apart = together.copy()
    token, changed = together.run(backend, max_steps=4)
    for _ in range(4):
        one_by_one = apart.run(backend, max_steps=1)
    assert torch.equal(token, one_by_one[0])
    assert torch.equal(changed, one_by_one[1])
    assert torch.equal(together.state[3], apart.state[3])
    assert len(set(together.state[3].tolist())) > 3
    for x, y in zip(together.state[:3], apart.state[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=RATE * 1e-2)


@every
@each_parameterization
@pytest.mark.parametrize("group", [None, [0, 0, 0, 0], [0, 0, 1, 5], [3, 4, 7, 7]], ids=str)
@that_kernels_take
def test_many_steps_in_one_call_stop_before_the_first_stale_gradient(backend, latents, group):
    """As one step after the other does, where a row goes on only while no token of its group has changed."""
    problem = build(4, 200, 16, latents=latents, warm=True, seed=3)
    problem.options["group"] = None if group is None else torch.tensor(group)
    problem.rates = problem.rates * 4
    # Row 0 falls behind another token on the way, row 1 has few steps left, row 2 is not at its token.
    problem.gradient[0, problem.tokens[0]] = 40.0
    problem.gradient[3] *= 0.01
    problem.tokens[2] = (problem.tokens[2] + 1) % 200
    problem.state[3].copy_(torch.tensor([0, 17, 0, 1]))
    together = torch.arange(4) if group is None else torch.tensor(group)
    alone = problem.exact()
    for _ in range(8):
        fresh = alone.with_tokens().tokens
        held = (fresh != problem.tokens) | (alone.state[3] >= 20)
        for row in (~torch.isin(together, together[held])).nonzero().flatten().tolist():
            one = [slice(row, row + 1)]
            single = replace(
                alone, state=[x[one[0]] for x in alone.state], tokens=alone.tokens[one[0]],
                gradient=alone.gradient[one[0]], options=alone.options | {"group": None},
            )  # fmt: skip
            single.run(reference)
    made = alone.state[3] - problem.state[3]
    assert len(set(made.tolist())) > 2 or group is not None
    token, changed = problem.run(backend, max_steps=8)
    assert torch.equal(problem.state[3], alone.state[3])
    for ours, theirs in zip(problem.state[:3], alone.state[:3], strict=True):
        near_rows(ours, theirs, 1e-3)
    assert torch.equal(token, problem.with_tokens().tokens)
    assert torch.equal(changed, token != problem.tokens)
    assert changed[2]


@every
@each_parameterization
def test_one_call_of_many_steps_is_many_calls_of_one(backend, latents):
    """A row that was held goes on in the next call only if its token is the expected one."""
    together = build(4, 150, 32, latents=latents, warm=True, seed=9)
    together.rates = together.rates * 4
    apart = together.copy()
    first = together.run(backend, max_steps=4)
    for _ in range(4):
        second = apart.run(backend)
    assert all(map(torch.equal, first, second))
    assert torch.equal(together.state[3], apart.state[3])
    for x, y in zip(together.state[:3], apart.state[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=RATE * 1e-2)


@every
@each_parameterization
def test_no_step_past_the_learning_rates(backend, latents):
    problem = build(4, 50, 8, latents=latents, seed=4)
    for rates in (torch.tensor([1e-4, 1e-5]), torch.tensor([1e-4, 1e-5], dtype=WIDE)):
        ours = replace(problem.copy(), rates=rates)
        ours.state[3][:] = torch.tensor([0, 1, 2, 5])
        ours, _, changed = check(backend, ours, 50)
        assert ours.state[3].tolist() == [2, 2, 2, 5]
        assert not changed.any()
        for x, was in zip(ours.state, problem.state, strict=True):
            assert x is ours.state[3] or torch.equal(x[2:], was[2:])
        assert not torch.equal(ours.state[0][1], problem.state[0][1])


@every
@each_parameterization
@pytest.mark.parametrize("rows", [1, 4])
def test_strides(backend, rows, latents):
    """With state that has gaps; what lies in them stays. Kernels in CUDA leave gaps between the entries to Triton."""
    dense = build(rows, 136, 24, latents=latents, soft=True, hard=True, warm=True, seed=2)
    spread_out = strided
    if backend.name == "cuda":

        def spread_out(x):
            return torch.full((x.shape[0], x.shape[1] + 8), torch.nan)[:, 4:-4].copy_(x)

    ours, weight = dense.copy(), dense.tables.head.weight
    ours.state[:3] = [spread_out(x) for x in dense.state[:3]]
    ours.gradient, ours.options["soft_noise"] = strided(dense.gradient), strided(dense.options["soft_noise"])
    ours.options["hard_noise"] = transposed(dense.options["hard_noise"])
    if backend.name != "cuda":
        ours.state[3] = torch.zeros(2 * rows, dtype=torch.long)[::2].copy_(dense.state[3])
        ours.state[1] = transposed(dense.state[1])
        ours.tables = dense.tables._replace(head=Head(transposed(weight)))
    exact, token, changed, _ = meant(dense, 3)
    result = ours.run(backend, max_steps=3)
    assert torch.equal(result[0], token)
    assert torch.equal(result[1], changed)
    assert torch.equal(ours.state[3], exact.state[3])
    for x, y in zip(ours.state[:3], exact.state[:3], strict=True):
        near_rows(x, y, 1e-4)
    base = ours.state[0]._base
    assert int(base.isfinite().sum()) == ours.state[0].numel()


@every
@each_parameterization
def test_rows_of_one_call_know_nothing_of_each_other(backend, latents):
    together = judged(4, 100, 16, latents=latents, warm=True, seed=5, steps=4)
    apart = [replace(together.copy(), options=dict(together.options)) for _ in range(4)]
    token, _ = together.run(backend, max_steps=4)
    for row, one in enumerate(apart):
        at = slice(row, row + 1)
        one = replace(one, state=[x[at] for x in one.state], tokens=one.tokens[at], gradient=one.gradient[at])
        assert torch.equal(one.run(backend, max_steps=4)[0], token[at])
        for x, y in zip(one.state, together.state, strict=True):
            torch.testing.assert_close(x, y[at], rtol=1e-4, atol=1e-5)


# What rounding must not take


@every
@each_parameterization
@pytest.mark.parametrize("gap", [10.0, 18.0])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "dense"), [(1, True), (3, True), (9, True), (3, False), (9, False)])
@that_kernels_take
@pytest.mark.leaves_out(where=lambda table, dense, latents, **_: table == torch.bfloat16 and not (dense and latents))
def test_the_gradient_of_a_nearly_certain_token(backend, table, rows, dense, gap, latents):
    """As exact, relative to its own size, as any: Adam follows it however small it is.

    By one pass, by one for each of few rows, by blocks of rows. A constant of G, which DTO does not see, may be large.
    """
    problem = build(rows, 300, 16, latents=latents, dense=dense, table=table, spread=0.4, max_steps=1, seed=7)
    parameters, weight = problem.state[0], problem.tables.head.weight
    parameters *= 0.1
    if latents:
        parameters[:, 0], weight[:, 0], weight[277, 0] = 1.0, 0.0, gap + 6
    else:
        parameters[:, 277] = gap + 6
    problem.tokens.fill_(277)
    # G of all other tokens is larger: what is added up shall not cancel by chance.
    if dense:
        problem.gradient = problem.gradient + 3
        problem.gradient[:, 277] -= 6
    else:
        problem.gradient = problem.gradient._replace(reward_embedding=problem.gradient.reward_embedding.abs() + 0.1)
        problem.tables.reward_embedding.abs_().add_(1.0)[277] = 0.0
    exact = problem.exact()
    gradient = exact.gradient if dense else reference.token_gradient(exact.gradient, exact.tables)
    z = logits_by_hand(parameters, problem.tables.head) if latents else parameters.double()
    p, difference = torch.softmax(z, -1), gradient - gradient[:, 277:278]
    expected = p * (difference - (p * difference).sum(-1, keepdim=True))
    problem.run(backend)
    ours = 10 * problem.state[1].double()
    # Beside a bfloat16 head, Triton takes float32 rows as two bfloat16 numbers each, and rounds the weights of many.
    halves = backend.name == "triton" and table == torch.bfloat16
    tolerance = 2e-5 if not halves else 1e-4 if rows <= 4 else 1e-2
    if latents:
        expected = expected @ weight.double()
    else:
        assert float((ours[:, 277] / expected[:, 277] - 1).abs().max()) < tolerance
    assert float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < tolerance


@every
@each_parameterization
def test_a_constant_on_the_gradient_changes_nothing(backend, latents):
    wide = backend.name in ("reference", "native")
    problem = build(2, 300, 16, latents=latents, dtype=WIDE if wide else torch.float32, warm=True, seed=7)
    shifted = problem.copy()
    shifted.gradient = shifted.gradient + 1024
    for one in (problem, shifted):
        one.run(backend, max_steps=3)
    tolerance = 1e-8 if wide else 1e-4  # of G + 1024 in float32
    for x, y in zip(problem.state, shifted.state, strict=True):
        torch.testing.assert_close(x, y, rtol=10 * tolerance, atol=tolerance)


@every
@each_parameterization
def test_large_logits_lose_nothing_beside_a_small_tau(backend, latents):
    """1e4 / 0.05 is rounded to more than a hundredth; what the softmax needs of it is a difference."""
    problem = build(1, 200, 16, latents=latents, max_steps=1, tau=0.05, seed=8)
    parameters, weight = problem.state[0], problem.tables.head.weight
    if latents:
        for x in (weight.mul_(0.2), parameters):
            x.mul_(32).round_().div_(32)
        parameters[:, 0], weight[:, 0] = 1.0, 8192.0
    else:
        parameters.mul_(0.05).add_(1e4)
    problem = problem.with_tokens()
    problem.gradient = problem.gradient * 0.01
    exact, *_ = meant(problem, 1)
    problem.run(backend)
    # The first entry of h is a difference of sums of 8192.
    ours, theirs = (x[:, int(latents) :] for x in (problem.state[1], exact.state[1]))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@every
@pytest.mark.parametrize("rows", [1, 3])
def test_far_moves_of_logits(backend, rows):
    """Learning rates so large that every maximum jumps by hundreds of tau."""
    problem = build(rows, 200, 8, latents=False, seed=12, tau=0.05)
    problem.rates = torch.full((20,), 30.0)
    problem.gradient = torch.zeros(rows, 200).scatter_(1, problem.tokens[:, None], -1.0)
    exact, token, _, closest = meant(problem, 5)
    assert closest > 1e-4
    ours, _ = problem.run(backend, max_steps=5)
    assert torch.equal(ours, token)
    assert torch.equal(problem.state[3], exact.state[3])
    near_rows(problem.state[0], exact.state[0], 1e-3)


@every
@pytest.mark.parametrize("vocabulary", [9, 1400])
@pytest.mark.parametrize("rows", [1, 3])
def test_ties_take_the_lowest_index(backend, rows, vocabulary):
    problem = build(rows, vocabulary, 8, latents=False, max_steps=0)
    problem.state[0][:] = 0
    problem.state[0][0, [3, vocabulary // 2, vocabulary - 1]] = 1
    assert problem.run(backend)[0].tolist() == [3] + [0] * (rows - 1)
    head = build(rows, vocabulary, 16, max_steps=0, seed=3)
    half = vocabulary // 2
    head.tables.head.weight[half : 2 * half] = head.tables.head.weight[:half]
    head.tables.head.weight[-1] = head.tables.head.weight[0]
    assert (head.run(backend)[0] < half).all()
