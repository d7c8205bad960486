"""Arguments of the operators: what is refused, by which sentence, whatever the back end."""

from __future__ import annotations

import math
import re

import pytest
import torch
from back_ends import by

from nabla_fast import ops
from nabla_fast.ops.types import Head, Tables, TokenGradient
from nabla_fast.testing.operators import dto_arguments, logits

every = by("reference", "native", "triton")
on_the_host = pytest.mark.leaves_out(where=lambda backend, **_: backend.endswith("-gpu"))  # where values are looked at
V, D = 257, 8


def zeros(rows, width):
    return torch.zeros(rows, width), torch.zeros(rows, width), torch.zeros(rows, dtype=torch.long)


def step_arguments(rows, latents=True):
    """Of a step that is right."""
    h, weight = logits(1, rows, D if latents else V), logits(2, V, D)
    tables, tokens = Tables(Head(weight), weight, weight, 0.1), torch.zeros(rows, dtype=torch.long)
    return dto_arguments(
        h, *zeros(*h.shape), tokens, torch.full((4,), 0.01), logits(3, rows, V), tables, latents=latents
    )


@every
@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e39])
def test_tau_is_a_positive_number(tau, backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    m, v, step = zeros(2, V)
    tables, tokens, rates = Tables(head, table, table, 0.1), z.argmax(-1), torch.full((1,), 1e-3)
    calls = (
        lambda: ops.relaxed_stats(z, tau, backend=backend.name),
        lambda: ops.linear_relaxed_stats(h, head, tau, backend=backend.name),
        lambda: ops.straight_through_embedding(z, [table], tau=tau, backend=backend.name),
        lambda: ops.linear_straight_through_embedding(h, head, [table], tau=tau, backend=backend.name),
        lambda: ops.soft_embedding(z, table, tau=tau, backend=backend.name),
        lambda: ops.linear_soft_embedding(h, head, table, tau=tau, backend=backend.name),
        lambda: ops.dto_step(
            *dto_arguments(z.clone(), m, v, step, tokens, rates, z, tables, latents=False, tau=tau),
            backend=backend.name,
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="tau must be a finite number above 0"):
            call()


@on_the_host
@every
@pytest.mark.parametrize("bad", [-1, V, -(2**40)])
def test_an_id_outside_the_vocabulary_is_an_index_error(bad, backend):
    h, head = logits(1, 3, D), Head(logits(2, V, D))
    tokens = torch.tensor([1, bad, 2])
    with pytest.raises(IndexError, match=rf"tokens must hold token ids from 0 to {V - 1}, got {bad}"):
        ops.linear_log_likelihood(h, head, tokens, backend=backend.name)
    m, v, step = zeros(3, D)
    tables = Tables(head, head.weight, head.weight, 0.1)
    with pytest.raises(IndexError, match=rf"tokens must hold token ids from 0 to {V - 1}, got {bad}"):
        ops.dto_step(
            *dto_arguments(h, m, v, step, tokens, torch.full((1,), 1e-3), logits(3, 3, V), tables, latents=True),
            backend=backend.name,
        )


@on_the_host
@every
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
        return ops.dto_step(*arguments, backend=backend.name)

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


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_other_dtypes_are_refused_by_name(dtype, backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    other, options = Head(head.weight.to(dtype)), {"backend": backend.name}
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


@every
def test_shapes_that_do_not_fit_and_no_vocabulary_are_refused_by_name(backend):
    z, h, head, table = logits(1, 2, V), logits(2, 2, D), Head(logits(3, V, D)), logits(4, V, D)
    options = {"backend": backend.name}
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


@every
def test_no_rows_give_empty_results(backend):
    z, h, head, table = logits(1, 0, V), logits(2, 0, D), Head(logits(3, V, D)), logits(4, V, D)
    options = {"backend": backend.name}
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


def test_a_step_does_not_write_into_what_wants_a_gradient_or_shares_memory():
    state, *others = step_arguments(3)
    with pytest.raises(RuntimeError, match=r"dto_step writes into state_parameters, .*: pass tensors"):
        ops.dto_step(state._replace(parameters=state.parameters.clone().requires_grad_()), *others)
    shared = state._replace(parameters=torch.zeros(1, D).expand(3, D))
    with pytest.raises(ValueError, match=r"state\.parameters is written to, so its entries must not share memory"):
        ops.dto_step(shared, *others)
    shared = step_arguments(3)[0]._replace(step=torch.zeros(1, dtype=torch.int64).expand(3))
    with pytest.raises(ValueError, match=r"state\.step is written to, so its entries must not share memory"):
        ops.dto_step(shared, *others)


@every
def test_what_a_step_writes_to_shares_no_memory(backend):
    state, *others = step_arguments(3)
    with pytest.raises(ValueError, match=r"state\.exp_avg_sq must not share memory with state\.exp_avg,"):
        ops.dto_step(state._replace(exp_avg_sq=state.exp_avg), *others, backend=backend.name)


def test_what_is_no_tensor_and_no_named_tuple_is_refused_by_name():
    z, h, own, table = logits(1, 3, V), logits(2, 3, D), Head(logits(3, V, D)), logits(4, V, D)
    state, inputs, where, options = step_arguments(3)
    calls = {
        "z must be a tensor, got list": lambda: ops.relaxed_stats([1.0]),
        "z must be a tensor, got NoneType": lambda: ops.relaxed_stats(None),
        "head must be a Head, got Tensor": lambda: ops.linear_relaxed_stats(h, own.weight),
        "head must be a Head, got tuple": lambda: ops.linear_relaxed_stats(h, tuple(own)),
        "tables must be a tensor or a list of tensors, got NoneType": lambda: ops.straight_through_embedding(z, None),
        "tables must hold tensors, got NoneType": lambda: ops.straight_through_embedding(z, [table, None]),
        "tables must be a Tables, got DTOOptions": lambda: ops.dto_step(state, inputs, options, where),
        "inputs.gradient must be a tensor or a TokenGradient, got tuple": lambda: ops.dto_step(
            state, inputs._replace(gradient=(h, h)), where, options
        ),
        "inputs.group must be a tensor or None, got list": lambda: ops.dto_step(
            state, inputs._replace(group=[0, 0, 1]), where, options
        ),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize("latents", [False, True])
def test_rows_of_a_step_are_as_wide_as_the_head_and_their_moments_of_their_dtype(latents):
    state, *others = step_arguments(3, latents=latents)
    width = D if latents else V
    wide = [torch.zeros(3, width + 1) for _ in range(3)]
    with pytest.raises(ValueError, match=rf"state\.parameters must have shape \(3, {width}\), got \(3, {width + 1}\)"):
        ops.dto_step(state._replace(**dict(zip(state._fields[:3], wide, strict=True))), *others)
    with pytest.raises(TypeError, match=r"state\.exp_avg_sq must be a tensor of dtype float32, got torch.float64"):
        ops.dto_step(state._replace(exp_avg_sq=state.exp_avg_sq.double()), *others)


@every
def test_what_is_not_dense_is_refused_by_name(backend):
    h, own, tokens = logits(1, 3, D), Head(logits(2, V, D)), torch.tensor([1, 2, 3])
    sparse = Head(own.weight.to_sparse())
    calls = {
        "h": lambda: ops.linear_relaxed_stats(h.to_sparse(), own, backend=backend.name),
        "head.weight": lambda: ops.linear_relaxed_stats(h, sparse, backend=backend.name),
        "z": lambda: ops.relaxed_stats(h.to_sparse(), backend=backend.name),
        "tokens": lambda: ops.linear_log_likelihood(h, own, tokens.to_sparse(), backend=backend.name),
        "old": lambda: ops.token_diff(
            torch.zeros(2, 2, dtype=torch.long).to_sparse(), tokens[None], backend=backend.name
        ),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got "):
            call()


def test_arguments_are_bound_as_python_binds_them():
    z, table = logits(1, 2, V), logits(2, V, D)
    assert torch.equal(ops.relaxed_stats(z, backend="native", tau=0.7).lse, ops.relaxed_stats(z, 0.7).lse)
    for call in (
        lambda: ops.relaxed_stats(),
        lambda: ops.relaxed_stats(z, temperature=1.0),
        lambda: ops.relaxed_stats(z, z=z),
    ):
        with pytest.raises(TypeError, match=r"relaxed_stats\(\) takes \(z, tau, .*missing, given twice or unknown"):
            call()
    with pytest.raises(TypeError, match="got 6"):
        ops.relaxed_stats(z, 1.0, None, None, "auto", 1)
    with pytest.raises(ValueError, match="tables must hold from 1 to 2 tensors, got 0"):
        ops.straight_through_embedding(z, [])
    with pytest.raises(ValueError, match="vectors and tables must be as many, got 2 and 1"):
        ops.relaxed_backward(z, [logits(3, 2, D)] * 2, [table])
