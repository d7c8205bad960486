"""`draw_token` by every back end against a draw in float64 over all tokens."""

from __future__ import annotations

import pytest
import torch
from back_ends import DTYPES, FLOATS, KINDS, by, each_view, few, integers, lowest_argmax
from hypothesis import given
from hypothesis import strategies as st

from nabla_fast.ops import draw_token, noise
from nabla_fast.ops.warp import NEARLY_ALL
from nabla_fast.testing.operators import Backend, logits

every = by("reference", "native")
# A token that reaches top-p to so much, or a score that reaches the best one, may be rounded to either side.
CLOSE = 2e-6
top_ks = st.sampled_from([None, 1, 2, 20, 300, 10**6])
top_ps = st.sampled_from([None, 1.0, 1e-3, 0.3, 0.9, 0.95, 0.999, 1 - 1e-5, 1 - 1e-10, 1 - 2**-53])
temperatures = st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.7])


def key_words(seed, rows):
    return integers(seed, 2**32, rows), integers(seed + 1, 2**32, rows)


def kept_by_hand(x, top_k, rest):
    """Which tokens of x (V,), float64, top-k keeps, and then top-p = 1 - ``rest``, summed up from the least likely."""
    size = len(x)
    kept = x >= x.sort(descending=True).values[min(top_k or size, size) - 1]
    if rest <= 0:
        return kept
    p = x.masked_fill(~kept, -torch.inf).softmax(0)
    order = torch.arange(size).flip(0)
    order = order[x.flip(0).sort(stable=True).indices]  # of equals the lowest comes last
    outside = p[order].cumsum(0) <= rest
    outside[-1] = False
    return kept & ~torch.zeros(size, dtype=torch.bool).scatter(0, order, outside)


def drawn_by_hand(z, low, high, temperature, top_k, top_p):
    """The tokens (at least one) that may be drawn from each row, where a last digit decides."""
    if temperature == 0:
        return [{token} for token in lowest_argmax(z).tolist()]
    x = ((z if z.dtype in (torch.float32, torch.float64) else z.float()) / temperature).double()
    noises = noise.gumbel(low[:, None], high[:, None], torch.arange(z.shape[1])[None])
    rest = 1 - (top_p or 1.0)
    slack = CLOSE if 1 - rest <= NEARLY_ALL else 1e-4 * rest
    drawn = []
    for row, own in zip(x, noises, strict=True):
        tokens = set()
        for moved in {rest} if rest == 0 else {rest - slack, rest, rest + slack}:
            kept = kept_by_hand(row, top_k, moved)
            score = (row + own.double()).masked_fill(~kept, -torch.inf)
            best = score.amax()
            if not best.isfinite():
                tokens.add(-1)
            else:
                tokens.update((score >= best - CLOSE * (1 + best.abs())).nonzero()[:, 0].tolist())
        drawn.append(tokens)
    return drawn


def require(backend, z, seed=0, temperature=1.0, top_k=None, top_p=None):
    low, high = key_words(seed, len(z))
    tokens = backend.draw_token(z, low, high, temperature, top_k, top_p)
    assert tokens.dtype == torch.int64
    meant = drawn_by_hand(z, low, high, temperature, top_k, top_p)
    for token, may in zip(tokens.tolist(), meant, strict=True):
        assert token in may, (token, may)
    return tokens


@every
@few(30, 100)
@given(
    st.sampled_from([(0, 5), (1, 1), (3, 2), (5, 33), (4, 257), (6, 700), (2, 20000)]), st.sampled_from(KINDS),
    st.sampled_from(DTYPES), temperatures, top_ks, top_ps, st.integers(0, 999),
)  # fmt: skip
def test_draws(backend, shape, kind, dtype, temperature, top_k, top_p, seed):
    require(backend, logits(seed, *shape, kind, dtype), seed, temperature, top_k, top_p)


@every
@pytest.mark.parametrize("vocabulary", [49152, 151936])
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_draws_from_real_vocabularies(backend, vocabulary, spread):
    """Nuclei of nearly all tokens, and of a few."""
    z = spread * logits(vocabulary, 2, vocabulary)
    for temperature, top_k, top_p in ((0.6, None, 0.95), (1.0, None, 0.95), (0.6, 20, None), (1.0, 50, 0.95)):
        require(backend, z, 1, temperature, top_k, top_p)
    require(backend, z, 1, 1.0, 3000, 0.95)
    require(backend, z, 1)


def test_close_calls_are_few():
    """What the other tests leave open."""
    z = logits(5, 200, 700)
    for top_k, top_p in ((None, 0.95), (20, None), (None, None), (None, 1 - 1e-5)):
        drawn = drawn_by_hand(z, *key_words(5, 200), 0.6, top_k, top_p)
        assert sum(len(tokens) > 1 for tokens in drawn) == 0


@every
@each_view
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_draws_from_views(backend, dtype, view):
    z = view(logits(3, 5, 1000, dtype=dtype))
    for settings in ((1.0, None, None), (0.7, 20, None), (0.7, None, 0.9), (0.0, None, None)):
        require(backend, z, 3, *settings)


@every
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize(("place", "vocabulary"), [(0, 1), (0, 20480), (41, 20480), (20479, 20480), (32, 33)])
def test_rows_without_meaning(backend, place, vocabulary, bad):
    """Whatever else is in the row; the others know nothing of it."""
    for dtype in DTYPES:
        z = logits(4, 6, vocabulary, dtype=dtype)
        z[2:4] = -torch.inf
        z[4] = torch.finfo(dtype).max
        z[[1, 3, 4], place] = bad
        good = z[[0, 5]]
        low, high = key_words(4, 6)
        for settings in ((1.0, None, None), (0.7, 20, None), (0.7, 20, 0.9), (0.7, None, 0.9), (0.0, None, None)):
            tokens = backend.draw_token(z, low, high, *settings)
            alone = backend.draw_token(good, low[[0, 5]], high[[0, 5]], *settings)
            assert tokens.tolist() == [alone[0], -1, -1, -1, -1, alone[1]], settings
        assert backend.draw_token(z, low, high, 1.0, None, 1 - 1e-6).tolist()[1:5] == [-1] * 4


@every
def test_logits_that_the_temperature_makes_infinite(backend):
    z = torch.tensor([[1e38, 0.0], [-1e38, 0.0], [-1e38, -1e38]])
    assert backend.draw_token(z, *key_words(0, 3), 1e-4).tolist() == [-1, 1, -1]


@every
def test_ties(backend):
    """Of what equals the last one top-k keeps all, and top-p the lowest; equal scores give the lowest."""
    z = torch.full((1, 5000), -3.0)
    z[0, [4, 30, 700, 4999]] = 2.0
    drawn = {"top-k": set(), "top-p": set()}
    for seed in range(200):
        low, high = key_words(seed, 1)
        drawn["top-k"].add(int(backend.draw_token(z, low, high, 1.0, 2)))
        drawn["top-p"].add(int(backend.draw_token(z, low, high, 0.01, None, 0.45)))
    assert drawn == {"top-k": {4, 30, 700, 4999}, "top-p": {4, 30}}
    # The scores are so large that float32 sees no noise in them.
    assert backend.draw_token(1e9 * z, *key_words(0, 1)).tolist() == [4]
    assert backend.draw_token(z, *key_words(0, 1), 0.0).tolist() == [4]
    assert backend.draw_token(z.neg(), *key_words(0, 1), 0.0).tolist() == [0]


@every
def test_logits_that_are_equal_after_the_division(backend):
    """The larger temperature rounds neighbours to the same score, and top-k keeps both."""
    z = torch.full((1, 600), -50.0)
    z[0, 3], z[0, 400] = 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    temperature = next(t / 100 for t in range(101, 200) if (z / (t / 100)).unique().numel() == 2)
    drawn = {int(backend.draw_token(z, *key_words(seed, 1), temperature, 1)) for seed in range(60)}
    assert drawn == {3, 400}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_drawn_alike_alone_and_in_a_batch_by_any_number_of_threads(backend, dtype):
    z = 2 * logits(6, 5, 70000, dtype=dtype)
    low, high = key_words(6, 5)
    threads = torch.get_num_threads()
    for settings in ((1.0, None, None), (0.6, None, 0.95), (1.0, 20, 0.9), (0.0, None, None)):
        together = backend.draw_token(z, low, high, *settings)
        try:
            torch.set_num_threads(1)
            for row in range(5):
                one = slice(row, row + 1)
                assert torch.equal(backend.draw_token(z[one], low[one], high[one], *settings), together[one])
        finally:
            torch.set_num_threads(threads)


@by("native")
def test_back_ends_draw_the_same_tokens(backend):
    """Logits as peaked as a model's, of which no cumulative probability is near top-p by chance."""
    z = 5 * logits(7, 400, 3000)
    low, high = key_words(7, 400)
    for settings in ((0.6, None, 0.95), (1.0, None, 0.95), (1.0, 50, 0.95), (0.6, 20, None), (1.0, None, None)):
        ours, meant = (b.draw_token(z, low, high, *settings) for b in (backend, Backend("reference")))
        assert torch.equal(ours, meant), settings


@every
def test_what_no_draw_can_be_made_with_is_refused(backend):
    z, (low, high) = logits(8, 2, 5), key_words(8, 2)
    for settings in ((-1.0,), (float("nan"),), (1e-300,), (1.0, 0), (1.0, None, 0.0), (1.0, None, 1.5)):
        with pytest.raises(ValueError, match=r"temperature|top_k|top_p"):
            draw_token(z, low, high, *settings, backend=backend.name)
        if backend.name == "native":
            with pytest.raises(ValueError, match=r"temperature|top_k|top_p"):
                backend.draw_token(z, low, high, *settings)
    with pytest.raises((ValueError, RuntimeError), match="low"):
        draw_token(z, low[:1], high, backend=backend.name)
    with pytest.raises(TypeError, match="high"):
        draw_token(z, low, high.int(), backend=backend.name)
