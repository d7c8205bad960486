"""Captured functions: what a trace on a CPU holds to, as a CUDA graph does."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nabla_fast.graphs import CaptureError, Counts, Graph, Graphs, Pool, bucket

CPU = torch.device("cpu")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


def test_the_first_call_runs_the_second_captures_and_later_ones_replay() -> None:
    calls = []

    def double(x: Tensor) -> Pair:
        calls.append(1)
        return Pair(2 * x, None)

    graph = Graph(Pool(CPU))
    for n in range(4):
        x = torch.full((3,), float(n))
        out = graph(double, x)
        assert isinstance(out, Pair)
        assert torch.equal(out.first, 2 * x)
        assert out.second is None
    assert (len(calls), graph.captures) == (2, 1)


def test_gradients_inside() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(((leaf @ weight) ** 3).sum(), leaf)[0]

    graph = Graph(Pool(CPU))
    for seed in range(3):
        x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(graph(gradient, x), gradient(x))


def test_an_output_is_gone_with_the_next_replay_of_any_graph_of_the_pool() -> None:
    pool = Pool(CPU)
    graphs = Graph(pool), Graph(pool)

    def add(x: Tensor) -> Any:
        return graphs[0](lambda x: x + 1, x)

    def count(x: Tensor) -> Any:
        return graphs[1](lambda x: x.long(), x)

    for _ in range(2):
        kept, other = add(torch.zeros(2)), count(torch.ones(2))
    kept = add(torch.zeros(2))
    copy = kept.clone()
    assert torch.equal(count(torch.ones(2)), torch.ones(2).long())
    assert bool(kept.isnan().all())
    assert torch.equal(copy, torch.ones(2))
    assert bool((other < 0).all())


def test_a_number_is_that_of_the_capture() -> None:
    factor = [2]
    graph = Graph(Pool(CPU))

    def scaled(x: Tensor) -> Tensor:
        return x * factor[0]

    graph(scaled, torch.ones(1)), graph(scaled, torch.ones(1))
    factor[0] = 3
    assert graph(scaled, torch.ones(1)).item() == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x if bool(x.any()) else -x,
        lambda x: torch.tensor(x.tolist()),
    ],
    ids=["item", "nonzero", "bool", "tolist"],
)
def test_what_reads_a_tensor_on_the_host_cannot_be_captured(function: Any) -> None:
    graph = Graph(Pool(CPU))
    graph(function, torch.ones(2))
    with pytest.raises(CaptureError):
        graph(function, torch.ones(2))


def test_arguments_of_other_shapes_dtypes_and_places_are_refused() -> None:
    graph = Graph(Pool(CPU), in_place=1)

    def add(state: Tensor, x: Tensor) -> Any:
        return graph(Tensor.add_, state, x)

    state = torch.zeros(2)
    for _ in range(3):
        add(state, torch.ones(2))
    assert state.tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"argument 1 .*\(2,\).*\(3,\)"):
        add(state, torch.ones(3))
    with pytest.raises(ValueError, match=r"argument 1 .*float32.*float64"):
        add(state, torch.ones(2).double())
    with pytest.raises(ValueError, match=r"argument 0 .*same tensor"):
        add(state.clone(), torch.ones(2))
    add(state, state)
    assert state.tolist() == [6, 6]


def test_a_weight_that_moved_is_captured_anew() -> None:
    layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    pool = Pool(CPU)
    pool.watched = (layer.weight,)
    graph = Graph(pool)
    x = torch.ones(1, 2)
    for _ in range(3):
        graph(layer, x)
    layer.weight.mul_(2)  # in place: the graph reads what is there now
    torch.testing.assert_close(graph(layer, x), layer(x))
    assert graph.captures == 1
    layer.weight.data = torch.eye(2)

    for _ in range(2):
        torch.testing.assert_close(graph(layer, x), x)
    assert graph.captures == 2


def test_the_least_recently_used_graph_goes() -> None:
    graphs = Graphs(CPU, most=2)
    kept = {key: graphs.get(key) for key in ("a", "b")}
    assert graphs.get("a") is kept["a"]
    graphs.get("c")
    assert graphs.get("a") is kept["a"]
    assert graphs.get("b") is not kept["b"]
    assert len(graphs) == 2
    graphs.clear()
    assert len(graphs) == 0


def test_each_user_counts_its_own_captures() -> None:
    graphs = Graphs(CPU)
    first, second = Counts(), Counts()
    for counts, times in ((first, 2), (second, 3)):
        graphs.begin((), counts)
        for _ in range(times):
            graphs.get("double")(lambda x: 2 * x, torch.ones(1))
        graphs.end()
    assert (first.captures, second.captures) == (1, 0)
    assert first.seconds > 0


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(size >= n and size % 16 == 0 for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert max(size / n for n, size in enumerate(sizes, 1) if n >= 64) < 1.25
    assert max(size / n for n, size in enumerate(sizes, 1) if n >= 512) < 1.13
    assert len(set(sizes)) <= 42
