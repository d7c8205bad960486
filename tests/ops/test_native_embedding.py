"""The native embeddings of relaxed tokens and the gradients through them, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import lesser_instruction_sets, repeat_tests, run_python
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import Backend

if not native.available():
    pytest.skip(f"no native library: {native.why_missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("two_threads")

cpp = Backend("native")

WEIGHT_ROUNDING = 1e-2
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (N, V, d): rows go by panels of 64 and passes of 512, the vocabulary by tiles of 256 entries where they are narrow.
SHAPES = [
    *[(0, 33, 8), (1, 1, 8), (3, 2, 33), (1, 1000, 64), (17, 1000, 33), (3, 33, 64), (150, 77, 5)],
    *[(64, 256, 12), (65, 513, 64), (530, 31, 6)],
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype, tolerance: float = 1e-5, *, weighted: bool = False) -> None:
    """Within ``tolerance`` of the largest entry.

    What is ``weighted`` by a softmax of bfloat16 is so with 8 bits, where the processor multiplies bfloat16.
    """
    if weighted and dtype == torch.bfloat16:
        tolerance = WEIGHT_ROUNDING
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.shape == exact.shape
    scale = float(exact.nan_to_num().abs().max()) if exact.numel() else 1.0
    atol = (1e-12 if dtype == torch.float64 else tolerance) * max(scale, 1e-30)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol, equal_nan=True)


def linear_case(rows: int, vocabulary: int, width: int, dtype: torch.dtype, tied: bool = False, **head: float):  # type: ignore[no-untyped-def]
    weight = (randn(vocabulary, width, seed=1) * 2 / math.sqrt(width)).to(dtype)
    other = weight if tied else randn(vocabulary, 12, seed=2, dtype=dtype)
    tables = [other, randn(vocabulary, 7, seed=3, dtype=dtype)]
    vectors = [randn(rows, table.shape[1], seed=4, dtype=dtype) for table in tables]
    return randn(rows, width, seed=5, dtype=dtype), Head(weight, **head), tables, vectors


def exact_head(head: Head) -> Head:
    return head._replace(weight=head.weight.double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_rows_of_logits(tau: float, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, vocabulary, width = shape
    z = (randn(rows, vocabulary, seed=6) * 3).to(dtype)
    tables = [randn(vocabulary, width, seed=7, dtype=dtype), randn(vocabulary, 3, seed=8, dtype=dtype)]
    vectors = [randn(rows, width, seed=9, dtype=dtype), randn(rows, 3, seed=10, dtype=dtype)]

    embeddings, token = cpp.straight_through_embedding(z, tables, tau)
    exact, _ = reference.straight_through_embedding(z.double(), double(tables), tau)
    is_max = z == (z.amax(-1, keepdim=True) if rows else z)
    assert torch.equal(token, torch.where(is_max, torch.arange(vocabulary), vocabulary).amin(-1))
    for ours, table in zip(embeddings, tables, strict=True):
        assert torch.equal(ours.double(), table[token].double())
    assert len(exact) == 2

    mixture = cpp.soft_embedding(z, tables[0], tau)
    exact_mixture = reference.soft_embedding(z.double(), tables[0].double(), tau)
    close(mixture, exact_mixture, dtype, weighted=True)

    gradient = cpp.relaxed_backward(z, vectors, tables, tau)
    close(gradient, reference.relaxed_backward(z.double(), double(vectors), double(tables), tau), dtype, 3e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [{}, {"scale": 0.7}, {"scale": 1.3, "softcap": 2.0}])
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states(tied: bool, head: dict[str, float], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, output, tables, vectors = linear_case(*shape, dtype, tied, **head)
    exact = exact_head(output)
    tau = 0.8
    z = reference.linear_logits(h.double(), exact)

    embeddings, token = cpp.linear_straight_through_embedding(h, output, tables, tau)
    _, exact_token = reference.straight_through_embedding(z, double(tables), tau)
    if len(z) and z.shape[1] > 1:
        top = z.topk(2, dim=-1).values
        sure = top[:, 0] - top[:, 1] > 1e-5
        assert torch.equal(token[sure], exact_token[sure])
    for ours, table in zip(embeddings, tables, strict=True):
        assert torch.equal(ours.double(), table[token].double())

    mixture = cpp.linear_soft_embedding(h, output, tables[0], tau)
    close(mixture, reference.soft_embedding(z, tables[0].double(), tau), dtype, weighted=True)

    gradient = cpp.linear_relaxed_backward(h, output, vectors, tables, tau)
    meant = reference.linear_relaxed_backward(h.double(), exact, double(vectors), double(tables), tau)
    # Cancellation is judged by the size of what cancels.
    close(gradient, meant, dtype, 5e-5, weighted=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_bfloat16_holds_are_not_rounded(shape: tuple[int, int, int]) -> None:
    """Whole logits to the base 2: nothing is lost, so that nothing else hides behind the tolerance for rounding."""
    rows, vocabulary, width = shape
    tau = 1 / math.log(2)

    def whole(*shape: int, seed: int, most: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-most, most + 1, shape, generator=generator).to(torch.bfloat16)

    h, vectors = whole(rows, width, seed=1), [whole(rows, 12, seed=2)]
    weight, table = whole(vocabulary, width, seed=3), whole(vocabulary, 12, seed=4, most=2)
    exact = Head(weight.double())
    z = reference.linear_logits(h.double(), exact)
    meant = reference.soft_embedding(z, table.double(), tau)
    for mixture in (
        cpp.linear_soft_embedding(h, Head(weight), table, tau),
        cpp.soft_embedding(z.to(torch.bfloat16), table, tau),
    ):
        close(mixture, meant, torch.float32)
    gradient = cpp.linear_relaxed_backward(h, Head(weight), vectors, [table], tau)
    meant = reference.linear_relaxed_backward(h.double(), exact, double(vectors), [table.double()], tau)
    close(gradient, meant, torch.float32, 2e-5)


def test_float32_states_are_not_rounded_to_a_bfloat16_head() -> None:
    h, head, tables, vectors = linear_case(9, 500, 64, torch.bfloat16)
    h = randn(9, 64, seed=11, dtype=torch.float32)
    vectors = [vector.float() for vector in vectors]
    exact = exact_head(head)
    mixture = cpp.linear_soft_embedding(h, head, tables[0], 0.5)
    exact_mixture = reference.linear_soft_embedding(h.double(), exact, tables[0].double(), 0.5)
    close(mixture, exact_mixture, torch.float32)
    gradient = cpp.linear_relaxed_backward(h, head, vectors, tables, 0.5)
    meant = reference.linear_relaxed_backward(h.double(), exact, double(vectors), double(tables), 0.5)
    close(gradient, meant, torch.float32, 5e-5)


@pytest.mark.parametrize("dtypes", [(0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_dtypes_may_differ(dtypes: tuple[int, ...]) -> None:
    """Of the states, the tables, and the gradients that come in."""
    states, where, sent = ((torch.float32, torch.bfloat16)[i] for i in dtypes)
    h, head, tables, vectors = linear_case(70, 300, 40, torch.float64, softcap=4.0)
    h, vectors = h.to(states), [vector.to(sent) for vector in vectors]
    head, tables = head._replace(weight=head.weight.to(where)), [table.to(where) for table in tables]
    exact, exact_tables = exact_head(head), double(tables)
    mixture = cpp.linear_soft_embedding(h, head, tables[0], 0.5)
    exact_mixture = reference.linear_soft_embedding(h.double(), exact, exact_tables[0], 0.5)
    rounds = states == where == torch.bfloat16
    close(mixture, exact_mixture, torch.float32, WEIGHT_ROUNDING if rounds else 2e-6)
    gradient = cpp.linear_relaxed_backward(h, head, vectors, tables, 0.5)
    meant = reference.linear_relaxed_backward(h.double(), exact, double(vectors), exact_tables, 0.5)
    close(gradient, meant, torch.float32, WEIGHT_ROUNDING if rounds else 1e-5)
    z = reference.linear_logits(h.double(), exact).to(states)
    gradient = cpp.relaxed_backward(z, vectors, tables, 0.5)
    meant = reference.relaxed_backward(z.double(), double(vectors), exact_tables, 0.5)
    close(gradient, meant, torch.float32, WEIGHT_ROUNDING if rounds else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_row_as_a_whole_table(dtype: torch.dtype) -> None:
    """Its entries lie on one another in memory."""
    h, vector = randn(5, 8, dtype=dtype), randn(5, 8, dtype=dtype)
    row = randn(1, 8, dtype=dtype)
    table = row.expand(40, 8)
    mixture = cpp.linear_soft_embedding(h, Head(table), table, 1.0)
    close(mixture, row.double().expand(5, 8), torch.float32)
    gradient = cpp.linear_relaxed_backward(h, Head(table), [vector], [table], 1.0)
    close(gradient, torch.zeros(5, 8).double(), dtype)


def test_gradients_of_a_row_that_is_nearly_certain() -> None:
    """They are as small as the other tokens' weights, but as exact as any: Adam follows them however small they are."""
    h = torch.tensor([[20.0, 1.0, -0.5]])
    weight = 0.3 * randn(300, 3)
    weight[:, 0] = 0.0
    weight[211, 0] = 1.0
    head, table, vector = Head(weight.float()), randn(300, 5, seed=1).float(), randn(1, 5, seed=2).float()
    exact = exact_head(head)
    ours = cpp.linear_relaxed_backward(h, head, [vector], [table], 0.8)
    meant = reference.linear_relaxed_backward(h.double(), exact, [vector.double()], [table.double()], 0.8)
    assert float(meant.abs().max()) < 1e-6
    close(ours, meant, torch.float32, 2e-5)


@pytest.mark.parametrize("gap", [10.0, 14.0, 18.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_logits_that_are_nearly_certain(strided: bool, dtype: torch.dtype, gap: float) -> None:
    z = 0.3 * randn(2, 257)
    z[:, 5] = gap
    z, table, vector = z.to(dtype), randn(257, 8, seed=1).to(dtype), randn(2, 8, seed=2).to(dtype)
    if strided:
        z = z.T.contiguous().T
    p, gradient = torch.softmax(z.double(), -1), vector.double() @ table.double().T
    difference = gradient - gradient[:, 5:6]
    meant = p * (difference - (p * difference).sum(-1, keepdim=True))
    ours = cpp.relaxed_backward(z, [vector], [table])
    torch.testing.assert_close(ours.double()[:, 5], meant[:, 5], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("largest", "tau"), [(50.0, 0.05), (1e3, 0.7), (1e4, 0.05), (1e4, 1e-3)])
def test_large_logits_are_normalised_by_their_own_sum(largest: float, tau: float) -> None:
    """A float32 log-sum-exp of such logits is off by more than a gradient may be."""
    z = (randn(64, 1000) * tau).float() + largest
    table, vector = randn(1000, 16, seed=1).float(), randn(64, 16, seed=2).float()
    gradient = vector.double() @ table.double().T
    p = torch.softmax(z.double() / tau, -1)
    meant = p * (gradient - (p * gradient).sum(-1, keepdim=True)) / tau
    ours = cpp.relaxed_backward(z, [vector], [table], tau)
    assert float(((ours.double() - meant).norm(dim=-1) / meant.norm(dim=-1)).max()) < 2e-6


def test_a_gradient_without_a_softmax_is_nan() -> None:
    z = randn(4, 40).float()
    z[0, 7], z[1, 39], z[2] = math.nan, math.inf, -math.inf
    ours = cpp.relaxed_backward(z, [randn(4, 3).float()], [randn(40, 3, seed=1).float()])
    assert ours.isnan().all(-1).tolist() == [True, True, True, False]
    assert ours[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(dtype: torch.dtype) -> None:
    z = randn(300, 24, dtype=dtype).T[::2, 3:-1:2]
    table = randn(6, 2 * z.shape[1], dtype=dtype).T[::2]
    vector = randn(24, 6, dtype=dtype)[::2]
    h, weight = randn(16, 12, dtype=dtype).T, randn(16, z.shape[1], dtype=dtype).T
    dense = [x.contiguous() for x in (z, table, vector, h, weight)]
    # In bfloat16, weights are rounded beside what is dense alone.
    tolerance = WEIGHT_ROUNDING if dtype == torch.bfloat16 else 1e-5
    for ours, expected in zip(results(z, table, vector, h, weight), results(*dense), strict=True):
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * size)


def results(z: Tensor, table: Tensor, vector: Tensor, h: Tensor, weight: Tensor) -> list[Tensor]:
    (hard,), token = cpp.straight_through_embedding(z, [table], 0.7)
    (linear_hard,), linear_token = cpp.linear_straight_through_embedding(h, Head(weight), [table], 0.7)
    return [
        *(hard, token, linear_hard, linear_token),
        cpp.soft_embedding(z, table, 0.7),
        cpp.linear_soft_embedding(h, Head(weight), table, 0.7),
        cpp.relaxed_backward(z, [vector], [table], 0.7),
        cpp.linear_relaxed_backward(h, Head(weight), [vector], [table], 0.7),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 700])
def test_rows_without_a_distribution(at: int, value: float) -> None:
    z = randn(4, 900, dtype=torch.float32)
    z[1, at] = value
    z[2] = -math.inf
    table = randn(900, 6, dtype=torch.float32)
    (hard,), token = cpp.straight_through_embedding(z, [table], 1.0)
    soft = cpp.soft_embedding(z, table, 1.0)
    back = cpp.relaxed_backward(z, [randn(4, 6, dtype=torch.float32)], [table], 1.0)
    assert token[1:3].tolist() == [-1, -1]
    for result in (hard, soft, back):
        assert bool(result[1:3].isnan().all())
        assert bool(result[[0, 3]].isfinite().all())
    h = randn(3, 5, dtype=torch.float32)
    h[1, 2] = value
    head = Head(randn(900, 5, dtype=torch.float32))
    (hard,), token = cpp.linear_straight_through_embedding(h, head, [table], 1.0)
    soft = cpp.linear_soft_embedding(h, head, table, 1.0)
    back = cpp.linear_relaxed_backward(h, head, [randn(3, 6, dtype=torch.float32)], [table], 1.0)
    assert token[1] == -1
    for result in (hard, soft, back):
        assert bool(result[1].isnan().all())
        assert bool(result[[0, 2]].isfinite().all())


def test_masked_entries_take_no_part() -> None:
    z = torch.full((2, 3000), -math.inf)
    z[0, [7, 2900]] = torch.tensor([2.0, 2.0])
    z[1, 2999] = -50.0
    table = randn(3000, 4, dtype=torch.float32)
    (hard,), token = cpp.straight_through_embedding(z, [table], 0.5)
    assert token.tolist() == [7, 2999]
    assert torch.equal(hard, table[token])
    soft = cpp.soft_embedding(z, table, 0.5)
    torch.testing.assert_close(soft, torch.stack([(table[7] + table[2900]) / 2, table[2999]]))
    back = cpp.relaxed_backward(z, [randn(2, 4, dtype=torch.float32)], [table], 0.5)
    assert bool((back[z == -math.inf] == 0).all())
    assert bool(back.isfinite().all())


@pytest.mark.parametrize("tau", [0.05, 10.0])
def test_large_logits_and_far_temperatures(tau: float) -> None:
    z = randn(3, 4000) * 1e4 * tau
    z[1] *= 1e-3
    # The same numbers in both.
    z = z.float().double()
    table = randn(4000, 6)
    exact = reference.soft_embedding(z, table, tau)
    soft = cpp.soft_embedding(z.float(), table.float(), tau)
    close(soft, exact, torch.float32, 3e-5)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 900),
    width=st.integers(1, 40),
    tied=st.booleans(),
    softcap=st.sampled_from([0.0, 3.0]),
    tau=st.floats(0.05, 10),
)
def test_property(rows: int, vocabulary: int, width: int, tied: bool, softcap: float, tau: float) -> None:
    h, head, tables, vectors = linear_case(rows, vocabulary, width, torch.float64, tied, softcap=softcap, scale=0.9)
    z = reference.linear_logits(h, head)
    soft = cpp.linear_soft_embedding(h, head, tables[0], tau)
    exact = reference.soft_embedding(z, tables[0], tau)
    torch.testing.assert_close(soft, exact, rtol=0, atol=1e-11)
    torch.testing.assert_close(cpp.soft_embedding(z, tables[0], tau), exact, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        cpp.linear_relaxed_backward(h, head, vectors, tables, tau),
        reference.linear_relaxed_backward(h, head, vectors, tables, tau),
        rtol=1e-9,
        atol=1e-10 / tau,
    )
    torch.testing.assert_close(
        cpp.relaxed_backward(z, vectors, tables, tau),
        reference.relaxed_backward(z, vectors, tables, tau),
        rtol=1e-9,
        atol=1e-11 / tau,
    )


def test_wrong_arguments() -> None:
    z, table = torch.randn(2, 9), torch.randn(9, 3)
    with pytest.raises(RuntimeError, match=r"table must have shape \(9, d_k\)"):
        cpp.soft_embedding(z, table[1:], 1.0)
    with pytest.raises(ValueError, match="tau must be positive"):
        cpp.soft_embedding(z, table, 0.0)
    with pytest.raises(RuntimeError, match=r"tables.0. must have shape \(9, d_k\)"):
        cpp.straight_through_embedding(z, [table[1:]], 1.0)
    with pytest.raises(RuntimeError, match=r"vectors.0. must have shape \(2, 3\)"):
        cpp.relaxed_backward(z, [torch.zeros(2, 4)], [table], 1.0)


MEMORY_SCRIPT = """
import resource, torch
from nabla_fast.ops.types import Head
from nabla_fast.testing.operators import Backend
cpp = Backend("native")
rows, vocabulary, width = 400, 40000, 32
head, table = Head(torch.randn(vocabulary, width)), torch.randn(vocabulary, 16)
h, vector = torch.randn(rows, width), torch.randn(rows, 16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def work(h, vector):
    cpp.linear_straight_through_embedding(h, head, [table], 1.0)
    cpp.linear_soft_embedding(h, head, table, 1.0)
    cpp.linear_relaxed_backward(h, head, [vector], [table], 1.0)
work(h[:2], vector[:2])
before = peak()
work(h, vector)
print(peak() - before)
"""


def test_linear_operators_make_no_temporary_over_the_vocabulary() -> None:
    """One (N, V) float32 tensor would be 61 MiB."""
    assert float(run_python("-c", MEMORY_SCRIPT)) < 20


@lesser_instruction_sets
def test_other_instruction_sets(capability: str) -> None:
    repeat_tests(__file__, "not memory", capability)
