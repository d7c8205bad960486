"""What Triton's kernels alone have: blocks of rows, bounded scratch memory, passes that are saved, dtypes refused."""

from __future__ import annotations

import itertools
import math
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
from dto_cases import Problem, build, check
from torch.utils._pytree import tree_map

from nabla_fast.ops import triton as ops
from nabla_fast.ops.triton import _launch as launches
from nabla_fast.ops.triton import _matmul as blocks
from nabla_fast.ops.triton import _row_stats
from nabla_fast.ops.triton._dto_watch import LAG, Watch
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
@pytest.mark.parametrize("kept", [0, 4])
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
def test_rows_that_have_all_stopped_cost_no_further_step_than_the_host_lags_behind(backend):
    """What is multiplied for them meanwhile changes nothing, be there NaN in the memory that it reads."""
    problem, module = all_stopped(True), steps()

    def empty(*shape, **options):
        return (
            torch.full(shape, math.nan, **options)
            if options.get("dtype", torch.float32).is_floating_point
            else real(*shape, **options)
        )

    real = torch.empty
    with patch.object(module, "row_state", wraps=module.row_state) as passes, patch.object(torch, "empty", empty):
        ours, _, changed = check(backend, problem, 6)
    assert passes.call_count == LAG
    assert not ours.state[3].any()
    assert changed.all()


@every
def test_a_gradient_that_is_not_kept_is_not_made_for_rows_that_have_stopped(backend):
    module = steps()
    with patch.object(module, "KEPT", 0), patch.object(module, "write_gradient", wraps=module.write_gradient) as made:
        check(backend, all_stopped(False), 6)
    assert made.call_count == 2 * LAG  # for the row's statistics, and for its step


@every
@pytest.mark.parametrize("latents", [True, False])
def test_blocks_that_have_stopped_are_passed_over(backend, latents):
    """Of two blocks one stops at once; the other makes all steps."""
    problem = build(6, 300, 33, latents=latents, warm=True, seed=1)
    problem.rates = problem.rates * 1e-3
    problem.tokens[:3] = (problem.tokens[:3] + 1) % 300
    module = steps()
    with (
        patch.object(blocks, "ENTRIES", 900),
        patch.object(module, "row_state", wraps=module.row_state) as passes,
    ):
        ours, *_ = check(backend, problem, 5)
    assert (ours.state[3] - problem.state[3]).tolist() == [0, 0, 0, 5, 5, 5]
    assert passes.call_count == (6 + LAG if latents else 12)


@every
def test_the_products_of_a_step(backend):
    """Beside a bfloat16 head: logits from 16 bits of each latent, weights of 8 bits in one product."""
    problem, module = build(6, 300, 32, table=torch.bfloat16, warm=True), steps()
    with patch.object(module, "times_rows", wraps=module.times_rows) as products:
        check(backend, problem, 3)
    assert products.call_count == 3
    for call in products.call_args_list:
        (weights,), head, _ = call.args
        assert weights.dtype == head.dtype == torch.bfloat16


def test_triton_scratch_follows_the_memory_of_the_gpu():
    """Powers of two within bounds, and less where little is free."""
    gib = 2**30
    least, most = blocks.ENTRIES, blocks.MOST_ENTRIES
    for memory, free, entries in (
        (141 * gib, 120 * gib, most), (80 * gib, 70 * gib, most), (40 * gib, 30 * gib, most // 2),
        (24 * gib, 20 * gib, least), (8 * gib, gib, least), (141 * gib, 8 * gib, most // 2), (141 * gib, gib, least),
    ):  # fmt: skip
        assert blocks.entries_within(memory, free) == entries


def test_a_triton_call_that_is_captured_looks_at_nothing_on_the_host(monkeypatch):
    """On tensors without memory, which raise where their numbers are asked for, with launches left out."""
    for module in ("_dto_rows", "_dto_one_row", "_softmax", "stats"):
        monkeypatch.setattr(sys.modules[f"nabla_fast.ops.triton.{module}"], "launch", lambda *_, **__: None)
    launched = []
    rows = sys.modules["nabla_fast.ops.triton._dto_rows"].Rows
    monkeypatch.setattr(rows, "decide", lambda *_, **__: launched.append("step"))
    for latents, count, dense in itertools.product((True, False), (1, 9), (True, False)):
        problem = build(count, 60, 8, latents=latents, dense=dense, group=[0] * count, soft=True)
        meta = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, vars(problem))
        with patch.object(steps(), "KEPT", 0):
            Problem(**meta).run(ops, max_steps=4)
        assert launched == ["step"] * 5
        launched.clear()


def test_a_triton_watch_is_blind_while_a_graph_is_captured(monkeypatch):
    class OnTheGpu:
        is_meta, is_cuda = False, True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watch = Watch(OnTheGpu())
    for made in range(5):
        assert watch.moving(made)
        watch.note(made)


@every
def test_dtypes_that_kernels_do_not_compute_in_are_refused(backend):
    with pytest.raises(ValueError, match="computes in float32"):
        backend.relaxed_stats(torch.randn(2, 5, dtype=torch.float64))
    problem = build(1, 300, 33)
    problem.state[:3] = [x.half() for x in problem.state[:3]]
    with pytest.raises(ValueError, match="parameters must be float32"):
        problem.run(backend)
