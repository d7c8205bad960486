"""What Triton's kernels alone have: blocks of rows, bounded scratch memory, passes that are saved, dtypes refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import test_embedding
import test_gradient_norm
import test_likelihood
import test_stats
import torch
from back_ends import by, hidden_states, integers, near
from dto_cases import build, check

from nabla_fast.ops.triton import _launch as launches
from nabla_fast.ops.triton import _matmul as blocks
from nabla_fast.ops.triton import _row_stats
from nabla_fast.testing.operators import double, logits

every = by("triton")
MIXED = (torch.float32, torch.bfloat16)


def steps():
    """The module; the package's attribute of this name is the operator."""
    return sys.modules["nabla_fast.ops.triton.dto_step"]


@every
@pytest.mark.parametrize("entries", [1, 1000, 2500])
def test_blocks_of_rows(backend, entries):
    h, head = hidden_states(5, 1000, 33, MIXED, 1.0, 5.0)
    vectors, tables = [logits(9, 5, 33)], [logits(8, 1000, 33)]
    with patch.object(blocks, "ENTRIES", entries):
        test_likelihood.require(backend, h, head, integers(1, 1000, 5))
        test_stats.require_linear_stats(backend, h, head)
        test_gradient_norm.require(backend, *test_gradient_norm.build(5, 1000, 33, MIXED, (1.0, 5.0)))
        mixture = backend.linear_soft_embedding(h, head, tables[0])
        gradient = backend.linear_relaxed_backward(h, head, vectors, tables)
    meant = test_embedding.textbook(h, tables, vectors, 1.0, head)
    near(mixture, meant[0], 4e-5)
    near(gradient, meant[1], 1e-5, unit=test_embedding.gradient_unit(vectors, tables, 1.0))


@every
def test_scratch_is_bounded(backend):
    """No tensor is larger than a block of rows may be."""
    h, head = hidden_states(3, 16411, 8, MIXED)
    sizes: list[int] = []
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.numel())
        return out

    with patch.object(torch, "empty", empty), patch.object(blocks, "ENTRIES", 20000):
        test_likelihood.require(backend, h, head, torch.arange(3))
    assert 16411 <= max(sizes) <= 20000


@every
@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_of_a_row_merges_its_parts_in_one_launch(backend, rows):
    """And sets its counter back, so that a launch can be repeated as it was captured."""
    z, real, grids = logits(3, rows, 40000), launches.launch, []

    def launch(kernel, grid, *rest, **options):
        grids.append(grid)
        real(kernel, grid, *rest, **options)

    with patch.object(launches, "_COUNTERS", {}), patch.object(_row_stats, "launch", launch):
        first = test_stats.require_stats(backend, z, 0.7)
        again = test_stats.require_stats(backend, z, 0.7)
        assert not any(counter.any() for counter in launches._COUNTERS.values())
    assert len(grids) == 2
    assert all(grid[0] == rows and grid[1] > 1 for grid in grids)
    near(again, double(first), 0.0)


@every
@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_blocks_of_rows_of_steps(backend, dense, latents, kept):
    """Groups reach over the ends of blocks, and G is kept or made for each block."""
    group = [row // 2 for row in range(8)]
    problem = build(8, 1000, 33, latents=latents, dense=dense, soft=not dense, hard=not dense, group=group, warm=True)
    problem.tokens[1] = (problem.tokens[1] + 1) % 1000
    with patch.object(blocks, "ENTRIES", 3000), patch.object(steps(), "KEPT", kept):
        ours, _, changed = check(backend, problem, 3)
    assert (ours.state[3] > problem.state[3]).any()
    assert changed.any()


def all_stopped(latents):
    problem = build(6, 300, 33, latents=latents, dense=False)
    return replace(problem, tokens=(problem.tokens + 1) % 300)


@every
def test_rows_that_have_all_stopped_cost_no_further_step(backend):
    problem, module = all_stopped(True), steps()
    with patch.object(module, "times_rows", None), patch.object(module, "row_state", wraps=module.row_state) as passes:
        ours, _, changed = check(backend, problem, 5)
    assert passes.call_count == 1
    assert not ours.state[3].any()
    assert changed.all()


@every
def test_a_gradient_that_is_not_kept_is_not_made_for_rows_that_have_stopped(backend):
    module = steps()
    with patch.object(module, "KEPT", 0), patch.object(module, "write_gradient", wraps=module.write_gradient) as made:
        check(backend, all_stopped(False), 5)
    assert made.call_count == 1


@every
def test_dtypes_that_kernels_do_not_compute_in_are_refused(backend):
    with pytest.raises(ValueError, match="computes in float32"):
        backend.relaxed_stats(torch.randn(2, 5, dtype=torch.float64))
    problem = build(1, 300, 33)
    problem.state[:3] = [x.half() for x in problem.state[:3]]
    with pytest.raises(ValueError, match="parameters must be float32"):
        problem.run(backend)
