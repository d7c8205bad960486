"""The operators as PyTorch sees them: schemas, autograd, torch.compile, the choice of a back end."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nabla_fast import ops
from nabla_fast.ops.types import Head, TokenGradient
from nabla_fast.testing import operators as operator_inputs
from nabla_fast.testing.operators import dto_arguments, native_rounds, randn, step_state

V, D, DR = 37, 8, 6
CPU_BACKENDS = ("reference", "native")


def head(dtype=torch.float32, scale=1.0, softcap=0.0):
    return operator_inputs.head(V, D, dtype=dtype, scale=scale, softcap=softcap)


def tables(dtype=torch.float32):
    return operator_inputs.tables(V, D, DR, head(dtype), dtype=dtype)


def factors(rows, dtype=torch.float32):
    return operator_inputs.factors(rows, D, DR, dtype=dtype)


def step_arguments(rows, dtype=torch.float32, latents=True, dense=True, **options):
    parameters = randn(rows, D if latents else V, dtype=dtype)
    gradient = randn(rows, V, dtype=dtype, seed=7) if dense else factors(rows, dtype)
    state = step_state(parameters, head(dtype), latents=latents)
    return dto_arguments(*state, torch.full((4,), 0.01), gradient, tables(dtype), latents=latents, **options)


def calls(rows, dtype, backend):
    """One call of every operator, as (operator, positional arguments) below its Python wrapper."""
    z, h = randn(rows, V, dtype=dtype), randn(rows, D, dtype=dtype, seed=8)
    first, second = randn(V, D, dtype=dtype, seed=2), randn(V, DR, dtype=dtype, seed=3)
    own = Head(head(dtype).weight, 1.5, 4.0)
    vectors = [randn(rows, D, dtype=dtype, seed=9), randn(rows, DR, dtype=dtype, seed=10)]
    pair = [first, second]
    tokens = torch.arange(rows) % V
    old, new = torch.arange(3 * rows).view(rows, 3), torch.arange(3 * rows).view(rows, 3) // 2
    steps = [step_arguments(rows, dtype, dense=d, tau=0.7, weight_decay=0.1, max_steps=2) for d in (True, False)]
    values = {
        "relaxed_stats": (z, 0.7, 0.5, 0.9),
        "linear_relaxed_stats": (h, own, 0.7, None, 0.9),
        "straight_through_embedding": (z, pair, 0.7),
        "straight_through_embedding (one table)": (z, [first], 0.7),
        "linear_straight_through_embedding": (h, own, pair, 0.7),
        "soft_embedding": (z, first, 0.7),
        "linear_soft_embedding": (h, own, first, 0.7),
        "relaxed_backward": (z, vectors, pair, 0.7),
        "linear_relaxed_backward": (h, own, vectors, pair, 0.7),
        "log_likelihood_gradient": (h, own, tokens, True),
        "gradient_norm": (factors(rows, dtype), tables(dtype)),
        "dto_step": steps[0],
        "dto_step (factors)": steps[1],
        "token_diff": (old, new),
        "draw_token": (z, torch.arange(rows), torch.arange(rows) + 7, 0.7, 20, 0.9),
        "draw_token (from all)": (z, torch.arange(rows), torch.arange(rows) + 7, 1.0, None, None),
    }
    names = {name: name.split(" ")[0] for name in values}
    return {
        name: (getattr(torch.ops.nabla_fast, names[name]), (*ops.OPERATORS[names[name]].flat(one), backend))
        for name, one in values.items()
    }


NAMES = list(calls(1, torch.float32, "reference"))
DIFFERENTIABLE = {
    "straight_through_embedding",
    "straight_through_embedding (one table)",
    "linear_straight_through_embedding",
    "soft_embedding",
    "linear_soft_embedding",
    "log_likelihood_gradient",
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes(name, backend):
    operator, arguments = calls(3, torch.float32, backend)[name]
    if name in DIFFERENTIABLE:
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_fake_kernels_shapes_and_dtypes(name, dtype, backend):
    for rows in (0, 1, 5):
        operator, arguments = calls(rows, dtype, backend)[name]
        if name.startswith("dto_step"):  # parameters and moments are float32 or float64
            master = torch.float64 if dtype == torch.float64 else torch.float32
            arguments = (*(a.to(master) for a in arguments[:3]), *arguments[3:])
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            expected = operator(*fakes)
        got = operator(*arguments)
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, expected)), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASTERS = FLOATS[:2]
# Which operands of an operator may have a dtype of their own, by their positions, and what it may be.
OPERANDS = {
    "relaxed_stats": [((0,), FLOATS)],
    "linear_relaxed_stats": [((0,), FLOATS), ((1,), FLOATS)],
    "straight_through_embedding": [((0,), FLOATS), ((1,), FLOATS), ((2,), FLOATS)],
    "straight_through_embedding (one table)": [((0,), FLOATS), ((1,), FLOATS)],
    "linear_straight_through_embedding": [((0,), FLOATS), ((1,), FLOATS), ((4,), FLOATS), ((5,), FLOATS)],
    "soft_embedding": [((0,), FLOATS), ((1,), FLOATS)],
    "linear_soft_embedding": [((0,), FLOATS), ((1,), FLOATS), ((4,), FLOATS)],
    "relaxed_backward": [((0,), FLOATS), ((1, 2), FLOATS), ((3, 4), FLOATS)],
    "linear_relaxed_backward": [((0,), FLOATS), ((1,), FLOATS), ((4, 5), FLOATS), ((6, 7), FLOATS)],
    "log_likelihood_gradient": [((0,), FLOATS), ((1,), FLOATS)],
    "gradient_norm": [((0,), FLOATS), ((1, 2), FLOATS), ((3,), FLOATS), ((6, 7), FLOATS)],
    "dto_step": [((0, 1, 2), MASTERS), ((5,), MASTERS), ((6,), FLOATS), ((12,), FLOATS)],
    "dto_step (factors)": [((0, 1, 2), MASTERS), ((6, 7, 8), FLOATS), ((12,), FLOATS), ((15, 16), FLOATS)],
    "token_diff": [],
    "draw_token": [((0,), FLOATS)],
    "draw_token (from all)": [((0,), FLOATS)],
}


def with_dtypes(name, rows, chosen, backend):
    """A call whose operands have the dtypes ``chosen``, and its copy in float64."""
    operator, arguments = calls(rows, torch.float32, backend)[name]
    mixed, wide = list(arguments), list(arguments)
    for (positions, _), dtype in zip(OPERANDS[name], chosen, strict=True):
        for i in positions:
            mixed[i] = arguments[i].to(dtype)
            wide[i] = mixed[i].to(torch.float64)
    # A step writes into its arguments.
    return operator, copy.deepcopy(mixed), copy.deepcopy(wide)


def all_dtypes(name):
    return itertools.product(*(dtypes for _, dtypes in OPERANDS[name]))


def rounds_factors(backend, chosen):
    """Whether weights are rounded beside a table: of logits or hidden states in bfloat16, where `native_rounds`."""
    return backend == "native" and native_rounds() and chosen[0] == torch.bfloat16 and torch.bfloat16 in chosen[1:]


def fake_results(operator, arguments):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        results = operator(*fakes)
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_as_the_fake_kernel_says_for_all_dtypes_and_as_exact_as_their_dtype(name, backend):
    for chosen in all_dtypes(name):
        operator, mixed, wide = with_dtypes(name, 3, chosen, backend)
        expected = fake_results(operator, mixed)
        got, exact = operator(*mixed), operator(*wide)
        got, exact = ((r,) if isinstance(r, torch.Tensor) else r for r in (got, exact))
        for one, fake, truth in zip(got, expected, exact, strict=True):
            assert (one.shape, one.dtype, one.device, one.stride()) == (
                fake.shape,
                fake.dtype,
                fake.device,
                fake.stride(),
            ), chosen
            if one.is_floating_point() and one.dtype == torch.float32 and rounds_factors(backend, chosen):
                torch.testing.assert_close(one.double(), truth.double(), rtol=1e-2, atol=1e-2)
            elif one.is_floating_point():
                tolerance = {torch.float64: 1e-9, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(one.dtype, 2e-4)
                torch.testing.assert_close(one.double(), truth.double(), rtol=tolerance, atol=tolerance)
        if name.startswith("dto_step"):
            tolerance = 1e-9 if chosen[0] == torch.float64 else 2e-3
            for one, truth in zip(mixed[:3], wide[:3], strict=True):
                torch.testing.assert_close(one.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_fake_kernels_strides_for_inputs_of_any_strides(name, backend):
    operator, arguments = calls(3, torch.float32, backend)[name]

    def transposed(x):
        return x.t().contiguous().t() if isinstance(x, torch.Tensor) and x.ndim == 2 else x

    arguments = [transposed(x) for x in arguments]
    expected, got = fake_results(operator, arguments), operator(*arguments)
    for one, fake in zip((got,) if isinstance(got, torch.Tensor) else got, expected, strict=True):
        assert one.stride() == fake.stride()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiled_results_beside_a_float64_head_are_the_eager_ones(backend):
    own, table, tokens = head(torch.float64), randn(V, DR, dtype=torch.float64, seed=3), torch.arange(3)

    def run(h, z):
        stats, soft = ops.linear_relaxed_stats(h, own, backend=backend), ops.soft_embedding(z, table, backend=backend)
        return stats.lse * 2 + 1, ops.linear_log_likelihood(h, own, tokens, backend=backend) * 2 + 1, soft + 1

    h, z = randn(3, D, seed=8), randn(3, V)
    for one, other in zip(torch.compile(run, fullgraph=True)(h, z), run(h, z), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def first_derivatives(backend):
    """The differentiable operators as functions of their first argument, which they are given in float64."""
    own = head(torch.float64, 1.3, 4.0)
    table, tokens = randn(V, D, dtype=torch.float64, seed=2), torch.arange(3)
    z, h = randn(3, V, dtype=torch.float64), randn(3, D, dtype=torch.float64, seed=8)
    options = {"backend": backend}
    return {
        "soft_embedding": (lambda x: ops.soft_embedding(x, table, **options), z),
        "linear_soft_embedding": (lambda x: ops.linear_soft_embedding(x, own, table, **options), h),
        "straight_through_embedding": (lambda x: ops.straight_through_embedding(x, [table], **options)[0][0], z),
        "linear_straight_through_embedding": (
            lambda x: ops.linear_straight_through_embedding(x, own, [table], **options)[0][0],
            h,
        ),
        "linear_log_likelihood": (lambda x: ops.linear_log_likelihood(x, own, tokens, **options), h),
    }


ONCE = list(first_derivatives("reference"))


@pytest.fixture
def compiles():
    """Each case compiles the same lines anew, which torch would call too often."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_an_error_and_never_zero(name, backend):
    function, x = first_derivatives(backend)[name]
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"no second derivative of {name}: .*create_graph"):
        torch.autograd.grad(gradient.sum(), x)
    compiled = torch.compile(lambda x: function(x).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|no second derivative"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ONCE)
def test_forward_mode_and_function_transforms_are_errors_and_never_zero(name, backend):
    function, x = first_derivatives(backend)[name]

    def loss(x):
        return function(x).pow(2).sum()

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            return loss(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

    def jvp(x):
        return torch.func.jvp(loss, (x,), (torch.ones_like(x),))

    def jvp_of_vmap(x):
        return torch.func.jvp(torch.vmap(loss), (x[None],), (torch.ones_like(x[None]),))

    transforms = (dual, jvp, jvp_of_vmap, torch.func.hessian(loss), torch.func.grad(loss), torch.func.jacfwd(loss))
    for transform in transforms:
        with pytest.raises(RuntimeError, match=rf"differentiates {name} once and in reverse mode"):
            transform(x)
    with pytest.raises(RuntimeError, match="once and in reverse mode"):
        dual(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="once and in reverse mode"):
        torch.compile(jvp, backend="aot_eager")(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ONCE)
def test_vmap_is_a_loop(name, backend):
    function, x = first_derivatives(backend)[name]
    xs = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(function)(xs), torch.stack([function(x), function(2 * x)]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_step_writes_is_known_to_autograd(compiled, backend):
    def run(*arguments):
        return ops.dto_step(*arguments, backend=backend)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    arguments = step_arguments(3)
    state = arguments[0][:4]
    factor = torch.ones(3, D, requires_grad=True)
    losses = [(factor * written).sum() for written in state[:3]]
    versions = [written._version for written in state]
    run(*arguments)
    assert all(written._version > before for written, before in zip(state, versions, strict=True))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_operator_compiles_in_one_graph_for_any_number_of_rows(backend):
    own, where = head(), tables()
    table = randn(V, DR, seed=3)

    def everything(z, h, tokens):
        stats = ops.relaxed_stats(z, 0.7, 0.5, 0.9, backend=backend)
        linear = ops.linear_relaxed_stats(h, own, backend=backend)
        (hard,), token = ops.straight_through_embedding(z, [table], backend=backend)
        (linear_hard,), _ = ops.linear_straight_through_embedding(h, own, [table], backend=backend)
        soft = ops.soft_embedding(z, table, backend=backend) + ops.linear_soft_embedding(h, own, table, backend=backend)
        likelihood = ops.linear_log_likelihood(h, own, tokens, backend=backend)
        norm = ops.gradient_norm(TokenGradient(h, h, h[:, :DR]), where, backend=backend)
        drawn = ops.draw_token(z, tokens, token, 0.7, 20, 0.9, backend=backend)
        first, count = ops.token_diff(drawn.unsqueeze(0), token.unsqueeze(0), backend=backend)
        loss = (hard + linear_hard + soft).sum() + likelihood.sum()
        return loss, stats.entropy, linear.mask, norm, first, count

    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 9):
        z, h = randn(rows, V).requires_grad_(), randn(rows, D, seed=8).requires_grad_()
        tokens = torch.arange(rows)
        expected, got = everything(z, h, tokens), compiled(z, h, tokens)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        grads = torch.autograd.grad(got[0], (z, h)), torch.autograd.grad(expected[0], (z, h))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_compiled_step_updates_in_place(backend):
    def run(*arguments):
        return ops.dto_step(*arguments, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    before, eager, own = (step_arguments(3, max_steps=3) for _ in range(3))
    expected, got = run(*eager), compiled(*own)
    assert not torch.equal(eager[0].parameters, before[0].parameters), "nothing moved"
    for one, other in zip((*got, *own[0]), (*expected, *eager[0]), strict=True):
        torch.testing.assert_close(one, other)


# calls that go to the native kernel at once


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the operators whose calls go through the dispatcher, as they come."""
    seen = []

    class Watched:
        def __init__(self, name, overload):
            self.name, self.overload = name, overload

        def __call__(self, *flat):
            seen.append(self.name)
            return self.overload(*flat)

        def __getattr__(self, name):
            return getattr(self.overload, name)

    for operator in ops.OPERATORS.values():
        monkeypatch.setattr(operator, "_overload", Watched(operator.name, operator._overload))
    return seen


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is b is None


@pytest.mark.parametrize("name", calls(1, torch.float32, "native"))
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_that_only_the_kernel_sees_is_as_through_the_dispatcher(name, rows, dtype, dispatched):
    given = calls(rows, torch.float32 if name.startswith("dto_step") else dtype, "native")
    operator, (*flat, _) = ops.OPERATORS[name.split(" ")[0]], given[name][1]
    values = operator._whole(flat)
    through = operator._results(operator._overload(*(copy.deepcopy(x) for x in flat), "native"))
    dispatched.clear()
    assert same(operator(*values, "native"), through)
    assert not dispatched


def test_a_call_that_others_must_see_goes_through_the_dispatcher(dispatched):
    class Other(torch.Tensor):
        pass

    z, table = randn(2, V), randn(V, D, seed=2)
    with FlopCounterMode(display=False):
        ops.relaxed_stats(z)
    ops.relaxed_stats(z.as_subclass(Other))
    ops.straight_through_embedding(z.requires_grad_(), [table]).embeddings[0].sum().backward()
    assert dispatched == [
        "relaxed_stats",
        "relaxed_stats",
        "straight_through_embedding",
    ]  # its backward has no derivative
    with torch.no_grad():
        ops.straight_through_embedding(z, [table])
    ops.relaxed_stats(z)  # it has no derivative
    assert len(dispatched) == 3


def test_a_step_past_the_dispatcher_tells_autograd_what_it_writes(dispatched):
    state, inputs, where, options = step_arguments(3, max_steps=2)
    versions = [written._version for written in state[:4]]
    ops.dto_step(state, inputs, where, options)
    assert not dispatched
    assert all(written._version > before for written, before in zip(state[:4], versions, strict=True))
