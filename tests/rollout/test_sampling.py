import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processed import Processed
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nabla_fast.config import Sampling
from nabla_fast.sampling import Sampler, anchor_noise, draw, gumbel, sequence_seeds, warp
from nabla_fast.sequence import Sequence

CPU = torch.device("cpu")


def theirs(logits, sampling):
    out = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k is not None:
        out = TopKLogitsWarper(sampling.top_k)(None, out)
    if sampling.top_p is not None:
        out = TopPLogitsWarper(sampling.top_p)(None, out)
    return out


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 80),
    temperature=st.floats(0.1, 3.0),
    top_k=st.one_of(st.none(), st.integers(1, 90)),
    top_p=st.one_of(st.none(), st.floats(0.05, 1.0)),
)
@example(seed=0, vocabulary=80, temperature=0.1, top_k=None, top_p=0.9999999999999999)
@example(seed=0, vocabulary=80, temperature=0.1, top_k=None, top_p=0.9999999)
def test_warp_equals_transformers_warpers(seed, vocabulary, temperature, top_k, top_p):
    logits = 4 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature, top_p, top_k)
    torch.testing.assert_close(warp(logits, sampling), theirs(logits, sampling))


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95, 0.999])
def test_a_nucleus_of_any_size_is_transformers_and_its_rows_do_not_mind_each_other(top_p):
    spread = torch.tensor([0.01, 1.0, 3.0, 8.0])  # from nearly all of the tokens to one
    logits = spread[:, None] * torch.randn(4, 3000, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(0.6, top_p)
    warped = warp(logits, sampling)
    torch.testing.assert_close(warped, theirs(logits, sampling))
    sizes = warped.isfinite().sum(-1).tolist()
    assert sizes[0] > 1000 > 256 > sizes[-1], "both ways of finding a nucleus were taken"
    for row in range(4):
        assert torch.equal(warp(logits[row : row + 1], sampling)[0], warped[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nucleus_of_nearly_everything_leaves_out_what_is_less_than_the_rest(dtype):
    logits = torch.tensor([[0.0, 1e-3, 1e-8, 1e-12, 0.0]], dtype=torch.float64)
    logits[0, 0] = 1 - logits.sum()
    logits = logits.log().to(dtype)
    for top_p, size in ((1 - 2**-53, 4), (1 - 1e-10, 3), (1 - 1e-7, 2), (0.99, 1), (1.0, 4)):
        assert int(warp(logits, Sampling(1.0, top_p)).isfinite().sum()) == size, top_p


def test_a_sample_is_the_argmax_of_all_logits_with_all_noise():
    logits = 2 * torch.randn(8, 3000, generator=torch.Generator().manual_seed(5))
    keys = [(seed, 2) for seed in range(8)]
    for sampling in (Sampling(1.0), Sampling(0.6, 0.95), Sampling(1.0, None, 40)):
        warped = warp(logits, sampling)
        assert torch.equal(draw(warped, Sampling(), keys), (warped + gumbel(keys, 3000, CPU)).argmax(-1))


def test_temperature_zero_keeps_the_argmax_alone():
    logits = torch.randn(5, 40)
    keys = [(s, 3) for s in range(5)]
    assert torch.equal(draw(logits, Sampling(temperature=0.0), keys), logits.argmax(-1))


def test_samples_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    draws = 20_000
    keys = [(seed, position) for seed in range(200) for position in range(draws // 200)]
    counts = torch.bincount(draw(logits.expand(draws, -1), Sampling(), keys), minlength=5).double()
    expected = draws * logits.double().softmax(-1)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.47, counts  # 99.9 % quantile at 4 degrees of freedom


def test_noise_is_gumbel_distributed_and_uncorrelated_between_neighbours():
    noise = gumbel([(7, position) for position in range(50)], 4000, CPU).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.01
    between_positions = torch.corrcoef(noise)
    between_tokens = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))
    assert float((between_positions - torch.eye(50)).abs().max()) < 0.08
    assert abs(float(between_tokens[0, 1])) < 0.01
    assert bool(noise.isfinite().all())


def test_noise_depends_on_its_key_and_token_alone():
    keys = [(1, 0), (1, 1), (2**63, 5)]
    together = gumbel(keys, 100, CPU)
    for row, key in enumerate(keys):
        assert torch.equal(together[row], gumbel([key], 100, CPU)[0])
    assert torch.equal(gumbel(keys, 60, CPU), together[:, :60])
    assert not torch.equal(together[0], together[1])


def test_a_prompt_has_the_same_seed_in_any_batch_and_repeats_differ():
    a, b = (1, 2, 3), (1, 2)
    alone = sequence_seeds(0, [b])
    assert sequence_seeds(0, [a, b])[1] == alone[0]
    first, second = sequence_seeds(0, [b, b])
    assert first == alone[0] != second
    assert sequence_seeds(1, [b]) != alone
    assert len({*sequence_seeds(0, [(1, 2), (2, 1), (1,), (), (0,), (0, 0)])}) == 6


@pytest.mark.parametrize("sampling", [Sampling(0.6, 0.8), Sampling(1.3, None, 5), Sampling(0.0), Sampling(1.0)])
def test_anchor_noise_brings_the_draw_back(sampling):
    logits = 3 * torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    keys = [(11, position) for position in range(64)]
    drawn = draw(logits, sampling, keys)
    noise = anchor_noise(logits, sampling, keys)
    assert torch.equal((logits + noise).argmax(-1), drawn)
    if sampling.temperature:
        assert not torch.equal(drawn, logits.argmax(-1)), "the draw never left the argmax, so nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchor_noise_lets_known_tokens_win_whatever_they_are(dtype):
    logits = (100 * torch.randn(64, 50, generator=torch.Generator().manual_seed(2))).to(dtype)
    tokens = torch.randint(50, (64,), generator=torch.Generator().manual_seed(3))
    noise = anchor_noise(logits, Sampling(0.6, 0.5), [(0, p) for p in range(64)], tokens)
    assert torch.equal((logits + noise).argmax(-1), tokens)


def test_processors_run_before_and_after_the_warpers_on_unpadded_ids():
    seen = []

    def forbid_zero(ids, scores):
        seen.append(ids.tolist())
        return scores.index_fill(1, torch.tensor([0]), -torch.inf)

    def only_two(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([2]), 0.0)

    sequences, responses = [Sequence((5, 6), (), 0, 9), Sequence((7,), (), 1, 9)], [(), (1, 2)]
    logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]])
    greedy = Sampling(temperature=0.0)
    assert Processed(before=(forbid_zero,))(logits, greedy, sequences, responses).tolist() == [1, 2]
    assert seen == [[[5, 6]], [[7, 1, 2]]]
    assert Processed(after=(only_two,))(logits, greedy, sequences, responses).tolist() == [2, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_nothing_can_be_drawn_from_are_an_error(bad):
    logits = torch.randn(3, 40)
    logits[1] = bad
    sequences = [Sequence((1,), (), seed, 9) for seed in range(3)]
    for sampling in (Sampling(), Sampling(0.6, 0.9), Sampling(1.0, None, 5), Sampling(0.0)):
        with pytest.raises(FloatingPointError, match="row 1 of the logits"):
            Sampler()(logits, sampling, sequences, [()] * 3)


def test_a_processor_behind_the_warpers_sees_what_they_leave():
    seen = []

    def look(_, scores):
        seen.append(scores.clone())
        return scores

    logits = 3 * torch.randn(4, 400, generator=torch.Generator().manual_seed(6))
    sequences, responses = [Sequence((1,), (), seed, 9) for seed in range(4)], [(), (3,), (), (4, 5)]
    sampling = Sampling(0.7, 0.9, 30)
    drawn = Processed(after=(look,))(logits, sampling, sequences, responses)
    assert torch.equal(torch.cat(seen), warp(logits, sampling))
    assert torch.equal(drawn, Sampler()(logits, sampling, sequences, responses))
