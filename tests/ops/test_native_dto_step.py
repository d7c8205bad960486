"""The native DTO step against `reference.dto_step` in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processes import lesser_instruction_sets, repeat_tests, run_python
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend, dto_arguments

if not native.available():
    pytest.skip(f"no native library: {native.why_missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("two_threads")

cpp = Backend("native")
LEARNING_RATE = 0.05


@dataclass
class Problem:
    """Arguments of dto_step."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    tokens: Tensor
    rates: Tensor
    gradient: Tensor | TokenGradient
    tables: Tables
    options: dict[str, Any]

    def run(self, back_end: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return back_end.dto_step(
            *dto_arguments(
                self.parameters,
                self.exp_avg,
                self.exp_avg_sq,
                self.step,
                self.tokens,
                self.rates,
                self.gradient,
                self.tables,
                **{**self.options, **options},
            )
        )

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """With state of its own; all float tensors in ``dtype``, if that is given."""

        def to(x: Any) -> Any:
            return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

        tables = self.tables
        if dtype is not None:
            head = tables.head._replace(weight=to(tables.head.weight))
            tables = Tables(head, to(tables.embedding), to(tables.reward_embedding), tables.nll_coeff)
        gradient = self.gradient
        gradient = TokenGradient(*map(to, gradient)) if isinstance(gradient, TokenGradient) else to(gradient)
        state = {name: to(getattr(self, name)).clone() for name in ("parameters", "exp_avg", "exp_avg_sq", "step")}
        options = {name: to(value) for name, value in self.options.items()}
        return replace(self, **state, gradient=gradient, tables=tables, options=options)


def make(
    rows: int,
    vocabulary: int,
    width: int,
    *,
    latents: bool = True,
    dense: bool = True,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    tied: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    nll_coeff: float = 0.1,
    seed: int = 0,
    soft: bool = False,
    hard: bool = False,
    group: list[int] | None = None,
    spread: float = 2.0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = (randn(vocabulary, width) * spread / math.sqrt(width)).to(weight_dtype)
    embedding = weight if tied else randn(vocabulary, width).to(weight_dtype)
    tables = Tables(Head(weight, scale, softcap), embedding, randn(vocabulary, 5).to(weight_dtype), nll_coeff)
    parameters = (randn(rows, width) if latents else spread * randn(rows, vocabulary)).to(dtype)
    gradient: Tensor | TokenGradient = TokenGradient(
        *(x.to(dtype) for x in (randn(rows, width), randn(rows, width) * 0.3, randn(rows, 5)))
    )
    if dense:
        gradient = randn(rows, vocabulary).to(dtype)
    noise = {
        "soft_noise": randn(rows, vocabulary).to(dtype) if soft else None,
        "hard_noise": 0.3 * randn(rows, vocabulary).to(dtype) if hard else None,
        "group": None if group is None else torch.tensor(group, dtype=torch.int64),
    }
    exact = Head(weight.double(), scale, softcap)
    hard_noise = noise["hard_noise"]
    tokens = reference.hard_tokens(
        parameters.double(), exact, latents, None if hard_noise is None else hard_noise.double()
    )
    return Problem(
        parameters,
        torch.zeros_like(parameters),
        torch.zeros_like(parameters),
        torch.zeros(rows, dtype=torch.int64),
        tokens,
        torch.linspace(LEARNING_RATE, LEARNING_RATE / 10, 20, dtype=dtype),
        gradient,
        tables,
        {"latents": latents, **noise, **options},
    )


def margin(problem: Problem) -> float:
    """How far the closest row is from another token."""
    z = problem.parameters
    if problem.options["latents"]:
        z = reference.linear_logits(z, problem.tables.head)
    noise = problem.options["hard_noise"]
    z = z if noise is None else z + noise
    if z.numel() == 0 or z.shape[1] == 1:
        return math.inf
    top = z.topk(2, dim=-1).values
    return float((top[:, 0] - top[:, 1]).min())


def meant(problem: Problem, steps: int) -> tuple[Problem, Tensor, Tensor, float]:
    """The state after the steps in float64, tokens, changed, and the smallest margin on the way."""
    exact = problem.copy(torch.float64)
    closest = margin(exact)
    token, changed = exact.run(reference, max_steps=0)
    for _ in range(steps):
        token, changed = exact.run(reference, max_steps=1)
        closest = min(closest, margin(exact))
    return exact, token, changed, closest


def assert_close_rows(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the row's largest entry."""
    assert ours.shape == exact.shape
    if exact.numel() == 0:
        return
    bound = tolerance * exact.abs().amax(-1, keepdim=True) + 1e-12
    excess = ((ours.double() - exact).abs() - bound).max()
    assert excess <= 0, f"off by {float(((ours.double() - exact).abs() / bound).max()):.3g} times the tolerance"


def judged(*shape: int, steps: int, seed: int = 0, **options: Any) -> Problem:
    """The first problem from ``seed`` on of which no rounding decides a token."""
    for attempt in range(100):
        problem = make(*shape, seed=seed + 1000 * attempt, **options)
        if meant(problem, steps)[3] > 1e-4:
            return problem
    raise AssertionError("no such problem")


def check(problem: Problem, steps: int, slack: float = 1.0) -> None:
    exact, token, changed, closest = meant(problem, steps)
    float64 = problem.parameters.dtype == torch.float64
    assert closest > (1e-9 if float64 else 1e-4), "rounding decides between two tokens"
    ours = problem.copy()
    our_token, our_changed = ours.run(cpp, max_steps=steps)
    assert our_token.dtype == torch.int64
    assert our_changed.dtype == torch.bool
    assert torch.equal(our_token, token)
    assert torch.equal(our_changed, changed)
    assert torch.equal(ours.step, exact.step)
    # Rounded logits, divided by tau, are the rounding of the weights.
    tolerance = slack * (1e-9 if float64 else max(2e-5, 5e-6 / problem.options.get("tau", 1.0)))
    assert_close_rows(ours.exp_avg, exact.exp_avg, tolerance)
    assert_close_rows(ours.exp_avg_sq, exact.exp_avg_sq, 2 * tolerance)
    # Adam divides a gradient by its own size, so where that is rounding, the step is anything up to the learning rate.
    moved = LEARNING_RATE * max(steps, 1)
    difference = (ours.parameters.double() - exact.parameters).abs()
    if difference.numel():
        finite = difference[exact.parameters.isfinite()]
        assert float(finite.max()) <= (1e-6 if float64 else 2.2) * moved
        assert float((finite > (1e-6 if float64 else 2e-3) * moved).double().mean()) <= 0.02


SHAPES = [(0, 33, 8), (1, 1, 8), (1, 2, 33), (1, 1000, 64), (3, 33, 33), (3, 1000, 8), (17, 1000, 64), (17, 33, 8)]


@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_match(dtype: torch.dtype, latents: bool, dense: bool, shape: tuple[int, int, int], steps: int) -> None:
    check(judged(*shape, latents=latents, dense=dense, dtype=dtype, seed=11, steps=steps), steps)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_weight_dtypes(dense: bool, tied: bool, rows: int, weight_dtype: torch.dtype) -> None:
    check(judged(rows, 700, 72, dense=dense, tied=tied, weight_dtype=weight_dtype, seed=3, steps=5), 5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("case", [{"scale": 0.5}, {"softcap": 3.0}, {"scale": 1.7, "softcap": 2.0}])
@pytest.mark.parametrize("tied", [True, False])
def test_scale_and_softcap(case: dict[str, float], tied: bool, dense: bool, latents: bool, rows: int) -> None:
    check(judged(rows, 333, 40, latents=latents, dense=dense, tied=tied, seed=5, **case, steps=4), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize(("soft", "hard"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_noise_and_weight_decay(weight_decay: float, soft: bool, hard: bool, latents: bool, rows: int) -> None:
    check(judged(rows, 333, 40, latents=latents, soft=soft, hard=hard, weight_decay=weight_decay, seed=6, steps=5), 5)


@pytest.mark.parametrize("tau", [0.05, 0.3, 10.0])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_temperature(rows: int, latents: bool, tau: float) -> None:
    check(judged(rows, 500, 24, latents=latents, tau=tau, seed=8, steps=4), 4)


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("group", [None, [0] * 6, [0, 0, 1, 5, 5, 5], [3, 4, 5, 6, 7, 7]])
def test_rows_stop_at_their_own_step_and_groups_together(group: list[int] | None, dense: bool, latents: bool) -> None:
    problem = make(6, 200, 16, latents=latents, dense=dense, group=group, seed=1)
    problem.rates = problem.rates * 4
    problem.tokens[4] = (problem.tokens[4] + 1) % 200
    problem.step[:] = torch.tensor([0, 3, 0, 18, 0, 1])
    problem.exp_avg_sq += 0.01
    exact, _, changed, closest = meant(problem, 12)
    assert closest > 1e-4
    assert changed.any()
    made = exact.step - problem.step
    assert len(set(made.tolist())) > 1 or group == [0] * 6
    ours = problem.copy()
    token, our_changed = ours.run(cpp, max_steps=12)
    assert torch.equal(ours.step, exact.step)
    assert torch.equal(our_changed, changed)
    assert torch.equal(token != problem.tokens, changed)


@pytest.mark.parametrize("latents", [True, False])
def test_no_step_past_the_learning_rates(latents: bool) -> None:
    problem = make(3, 50, 8, latents=latents, seed=4)
    problem.rates = torch.tensor([1e-4, 1e-5])
    problem.step[:] = torch.tensor([0, 1, 2])
    before = problem.parameters.clone()
    _, changed = problem.run(cpp, max_steps=50)
    assert problem.step.tolist() == [2, 2, 2]
    assert not changed.any()
    assert torch.equal(problem.parameters[2], before[2])
    assert not torch.equal(problem.parameters[1], before[1])


@pytest.mark.parametrize("latents", [True, False])
def test_one_call_of_many_steps_is_many_calls_of_one(latents: bool) -> None:
    together = make(3, 400, 32, latents=latents, seed=9)
    apart = together.copy()
    together.run(cpp, max_steps=7)
    for _ in range(7):
        apart.run(cpp)
    assert torch.equal(together.step, apart.step)
    torch.testing.assert_close(together.parameters, apart.parameters, rtol=0, atol=LEARNING_RATE * 1e-2)


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_strides(rows: int, latents: bool) -> None:
    dense = make(rows, 130, 24, latents=latents, soft=True, hard=True, seed=2)
    strided = dense.copy()

    def spread_out(x: Tensor) -> Tensor:
        out = torch.full((2 * x.shape[0], 3 * x.shape[1]), 7.0, dtype=x.dtype)[::2, 1::3]
        return out.copy_(x)

    strided.parameters = spread_out(dense.parameters)
    strided.exp_avg = dense.exp_avg.T.clone().T
    strided.exp_avg_sq = spread_out(dense.exp_avg_sq)
    strided.gradient = spread_out(dense.gradient)  # type: ignore[arg-type]
    strided.step = torch.zeros(2 * rows, dtype=torch.int64)[::2]
    weight = dense.tables.head.weight.T.clone(memory_format=torch.contiguous_format).T
    strided.tables = dense.tables._replace(head=Head(weight))
    strided.options["soft_noise"] = spread_out(dense.options["soft_noise"])
    strided.options["hard_noise"] = dense.options["hard_noise"].T.clone().T
    expected = dense.run(cpp, max_steps=3)
    actual = strided.run(cpp, max_steps=3)
    assert torch.equal(expected[0], actual[0])
    for name in ("parameters", "exp_avg", "exp_avg_sq", "step"):
        torch.testing.assert_close(getattr(strided, name), getattr(dense, name), rtol=0, atol=2e-4)
    base = strided.parameters._base
    assert base is not None
    assert bool((base[1::2] == 7).all())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_dominant_logit_still_gets_its_gradient(offset: float, latents: bool, rows: int) -> None:
    """The others share 1e-6 of the weight: a gradient that is all cancellation, unless differences are taken first."""
    problem = make(rows, 300, 16, latents=latents, seed=7, spread=0.5)
    if latents:
        problem.parameters[:, 0] = 4
        problem.tables.head.weight[:, 0] = 0
        problem.tables.head.weight[5, 0] = 5
    else:
        problem.parameters[:, 5] = 20
    problem.tokens[:] = 5
    # DTO sees no constant of G.
    problem.gradient = problem.gradient + offset  # type: ignore[operator]
    exact, _, _, _ = meant(problem, 3)
    problem.run(cpp, max_steps=3)
    assert_close_rows(problem.exp_avg, exact.exp_avg, 2e-5 + 1e-5 * offset)
    assert problem.step.tolist() == [3] * rows


@pytest.mark.parametrize("latents", [True, False])
def test_offsets_of_g_do_not_matter(latents: bool) -> None:
    problem = make(2, 300, 16, latents=latents, dtype=torch.float64, seed=7)
    shifted = problem.copy()
    shifted.gradient = shifted.gradient + 1e3  # type: ignore[operator]
    problem.run(cpp, max_steps=3)
    shifted.run(cpp, max_steps=3)
    torch.testing.assert_close(problem.parameters, shifted.parameters, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 3])
def test_far_moves_of_logits(rows: int) -> None:
    """Learning rates so large that every maximum jumps by hundreds of tau."""
    problem = make(rows, 200, 8, latents=False, seed=12, tau=0.05)
    problem.rates = torch.full((20,), 30.0)
    tokens = problem.tokens
    problem.gradient = torch.zeros(rows, 200).scatter_(1, tokens[:, None], -1.0)
    exact, token, _, closest = meant(problem, 5)
    assert closest > 1e-4
    ours_token, _ = problem.run(cpp, max_steps=5)
    assert torch.equal(ours_token, token)
    assert torch.equal(problem.step, exact.step)
    assert_close_rows(problem.parameters, exact.parameters, 1e-3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("latents", [True, False])
def test_banned_tokens(latents: bool, rows: int) -> None:
    problem = make(rows, 600, 16, latents=latents, soft=True, hard=True, seed=13)
    banned = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.6
    for name in ("soft_noise", "hard_noise"):
        problem.options[name][:, banned] = -math.inf
    exact = problem.copy(torch.float64)
    problem.tokens = reference.hard_tokens(exact.parameters, exact.tables.head, latents, exact.options["hard_noise"])
    check(problem, 4)
    problem.gradient[:, banned] = math.inf  # type: ignore[index]
    check(problem, 4)


def test_minus_infinite_logits_stay() -> None:
    problem = make(3, 100, 8, latents=False, seed=14)
    problem.parameters[:, ::3] = -math.inf
    problem.tokens = problem.parameters.argmax(-1)
    problem.run(cpp, max_steps=3)
    assert bool((problem.parameters[:, ::3] == -math.inf).all())
    assert bool(problem.parameters[:, 1::3].isfinite().all())
    assert problem.step.tolist() == [3] * 3


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_without_argmax_is_reported_and_rests(rows: int, value: float, latents: bool) -> None:
    problem = make(rows, 100, 8, latents=latents, seed=15)
    problem.parameters[0, 3] = value
    others = problem.parameters[1:].clone()
    token, changed = problem.run(cpp, max_steps=2)
    assert token[0] == -1
    assert bool(changed[0])
    assert problem.step[0] == 0
    assert bool((token[1:] >= 0).all())
    assert rows == 1 or not torch.equal(problem.parameters[1:], others)


def test_all_minus_infinity_has_no_token() -> None:
    problem = make(2, 40, 8, latents=False)
    problem.parameters[1] = -math.inf
    token, _ = problem.run(cpp, max_steps=1)
    assert token[1] == -1
    assert problem.step.tolist()[1] == 0


@pytest.mark.parametrize("vocabulary", [9, 1000])
def test_ties_take_the_lowest_index(vocabulary: int) -> None:
    problem = make(2, vocabulary, 8, latents=False)
    problem.parameters[:] = 0
    problem.parameters[1, [3, vocabulary - 2]] = 1
    token, _ = problem.run(cpp, max_steps=0)
    assert token.tolist() == [0, 3]


def test_repeated_head_rows_tie() -> None:
    problem = make(3, 1024, 16, seed=3)
    problem.tables.head.weight[512:] = problem.tables.head.weight[:512]
    token, _ = problem.run(cpp, max_steps=0)
    assert bool((token < 512).all())
    one = make(1, 1024, 16, seed=3)
    one.tables.head.weight[512:] = one.tables.head.weight[:512]
    assert int(one.run(cpp, max_steps=0)[0]) < 512


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "dense"), [(1, 576, True), (3, 96, False)])
def test_large_latents(rows: int, width: int, dense: bool, weight_dtype: torch.dtype) -> None:
    check(judged(rows, 49152, width, dense=dense, weight_dtype=weight_dtype, spread=3, seed=16, steps=2), 2)


def test_peaked_rows_skip_without_loss() -> None:
    """Most tiles of the head weigh nothing here, so they are left out."""
    check(judged(1, 20000, 64, spread=16, seed=19, steps=3), 3)


@pytest.mark.parametrize("dense", [True, False])
def test_large_logits(dense: bool) -> None:
    check(judged(2, 49152, 64, latents=False, dense=dense, seed=17, steps=3), 3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 700),
    width=st.integers(1, 70),
    latents=st.booleans(),
    dense=st.booleans(),
    tied=st.booleans(),
    exact=st.booleans(),
    softcap=st.sampled_from([0.0, 4.0]),
    soft=st.booleans(),
    hard=st.booleans(),
    tau=st.floats(0.05, 10),
    steps=st.integers(0, 5),
    split=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_property(
    rows: int,
    vocabulary: int,
    width: int,
    latents: bool,
    dense: bool,
    tied: bool,
    exact: bool,
    softcap: float,
    soft: bool,
    hard: bool,
    tau: float,
    steps: int,
    split: int,
    seed: int,
) -> None:
    dtype = torch.float64 if exact else torch.float32
    options: dict[str, Any] = {"latents": latents, "dense": dense, "tied": tied, "soft": soft, "hard": hard}
    group = [i // split for i in range(rows)] if split > 1 else None
    problem = make(rows, vocabulary, width, dtype=dtype, softcap=softcap, tau=tau, group=group, seed=seed, **options)
    assume(meant(problem, steps)[3] > (1e-9 if exact else 1e-4))
    # Of few columns, the largest may be what is left when larger numbers cancel.
    check(problem, steps, slack=10.0 if width < 4 else 1.0)


def test_wrong_arguments() -> None:
    problem = make(2, 10, 4)
    with pytest.raises(RuntimeError, match="parameters must have shape"):
        replace(problem, parameters=torch.zeros(2, 5)).run(cpp)
    with pytest.raises(RuntimeError, match="gradient must have shape"):
        replace(problem, gradient=torch.zeros(2, 9)).run(cpp)
    with pytest.raises(RuntimeError, match="tokens must have shape"):
        replace(problem, tokens=torch.zeros(3, dtype=torch.int64)).run(cpp)
    with pytest.raises(TypeError, match="float32 or float64"):
        replace(problem, parameters=problem.parameters.bfloat16()).run(cpp)
    with pytest.raises(TypeError, match="step must be int64"):
        replace(problem, step=problem.step.int()).run(cpp)
    with pytest.raises(ValueError, match="tau must be positive"):
        problem.run(cpp, tau=0.0)
    with pytest.raises(ValueError, match="step must not be negative"):
        replace(problem, step=problem.step - 1).run(cpp)
    for token in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=rf"tokens must be in \[0, 10\), got {token} at 1"):
            replace(problem, tokens=torch.tensor([0, token])).run(cpp)
    with pytest.raises(RuntimeError, match="exp_avg_sq must not share memory with exp_avg"):
        replace(problem, exp_avg_sq=problem.exp_avg).run(cpp)
    with pytest.raises(RuntimeError, match="step must not be expanded"):
        replace(problem, step=problem.step[:1].expand(2)).run(cpp)
    with pytest.raises(ValueError, match="group must ascend"):
        problem.run(cpp, group=torch.tensor([1, 0]))


MEMORY_SCRIPT = """
import resource, torch
from nabla_fast.ops import native
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import Backend, dto_arguments
cpp = Backend("native")
rows, vocabulary, width = 400, 40000, 32
weight = torch.randn(vocabulary, width)
tables = Tables(Head(weight), torch.randn(vocabulary, width), torch.randn(vocabulary, 8), 0.1)
gradient = TokenGradient(torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, 8))
h = torch.randn(rows, width)
tokens = torch.zeros(rows).long()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = [x.clone() for x in (h[:2], h[:2] * 0, h[:2] * 0, tokens[:2] * 0, tokens[:2])]
cpp.dto_step(*dto_arguments(*small, torch.full((5,), 1e-3), gradient.rows(slice(0, 2)), tables, latents=True))
before = peak()
rates = torch.full((5,), 1e-3)
cpp.dto_step(*dto_arguments(h, h * 0, h * 0, tokens * 0, tokens, rates, gradient, tables, latents=True, max_steps=2))
print(peak() - before)
"""


def test_latents_make_no_temporary_over_the_vocabulary() -> None:
    """One (N, V) float32 tensor would be 61 MiB."""
    assert float(run_python("-c", MEMORY_SCRIPT)) < 20


@lesser_instruction_sets
def test_other_instruction_sets(capability: str) -> None:
    repeat_tests(__file__, "steps_match or dtypes or softcap or noise or banned or argmax or strides", capability)
