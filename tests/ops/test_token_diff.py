"""`token_diff` by every back end against a comparison of token after token."""

from __future__ import annotations

import pytest
import torch
from back_ends import by, few, integers, transposed
from hypothesis import given
from hypothesis import strategies as st

every = by("reference", "native", "triton", "cuda")


def by_hand(old, new):
    differ = [[i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b] for x, y in zip(old, new, strict=True)]
    return [d[0] if d else old.shape[1] for d in differ], [len(d) for d in differ]


def require(backend, old, new):
    first, count = backend.token_diff(old, new)
    meant = by_hand(old.cpu(), new.cpu())
    assert first.dtype == count.dtype == torch.int64
    assert (first.tolist(), count.tolist()) == meant


@every
@few(20)
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 5, 40, 600, 1100]), st.integers(0, 3), st.integers(0, 99))
def test_first_change_and_number_of_changes(backend, rows, length, changes, seed):
    """Ids that differ in their high halves alone."""
    old = integers(seed, 2**40, rows, length)
    new = old.clone()
    if rows and length:
        for place in integers(seed, length, changes).tolist():
            new[seed % rows, place] += 2**33
    require(backend, old, new)
    require(backend, transposed(old), new)


@every
@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (90, 400)])
def test_many_changes(backend, shape):
    old, new = integers(1, 2, *shape), integers(2, 2, *shape)
    new[0] = old[0]
    new[-1, -1] = old[-1, -1] + 1
    require(backend, old, new)
    require(backend, old.repeat(1, 2)[:, : shape[1]], transposed(new))


@every
def test_tokens_with_gaps_between_them(backend):
    old, new = integers(3, 3, 5, 70), integers(4, 3, 5, 70)
    wide = torch.zeros(10, 210, dtype=torch.long)
    wide[::2, ::3] = old
    require(backend, wide[::2, ::3], new)


@by("native")
def test_other_shapes_and_dtypes_are_refused(backend):
    """By the kernels themselves, whose pointers know neither; those for a GPU are below the operator's checks."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for other in (ids[:1], ids[:, :2]):
        with pytest.raises(RuntimeError, match=r"\(2, 3\)"):
            backend.token_diff(ids, other)
    with pytest.raises(TypeError, match="int64"):
        backend.token_diff(ids, ids.int())
    with pytest.raises(RuntimeError, match=r"\(B, m\)"):
        backend.token_diff(ids[0], ids[0])
