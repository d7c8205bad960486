"""What the CUDA back end alone has: teams of blocks, what threads keep, anchors' noise, and what goes to Triton.

`test_dto_step.py` and `test_token_diff.py` have the rest, for teams of three blocks that keep their entries in
registers.

Every test runs twice: on a GPU, where there is one, and on the emulated device of tests/ops/cuda_emulation, which
compiles the same kernels for the host. The emulation shows that what they compute is right, and that between every two
threads that touch the same memory there is a barrier; not that they are fast, nor that a barrier does on the GPU what
it says.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import Place, emulate, make_case
from test_decoder import BASE
from test_gpu import require_same_decodes
from torch import Tensor

from nabla_fast.config import Sampling
from nabla_fast.ops import OPERATORS, cuda, reference
from nabla_fast.ops.types import DTOOptions, Head, TokenGradient
from nabla_fast.sampling import anchor_noise, gumbel
from nabla_fast.testing.operators import dto_arguments

NO_GPU = cuda.why_missing()


@pytest.fixture(params=["emulated", "gpu"][: 1 if NO_GPU else 2])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "gpu":
        yield Place(torch.device("cuda", torch.cuda.current_device()))
        return
    place = emulate(monkeypatch)
    yield place
    place.team(3)


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 1000])
@pytest.mark.parametrize(("blocks", "kept"), [(1, True), (4, True), (3, False)])
def test_logits(place: Place, blocks: int, kept: bool, vocabulary: int) -> None:
    place.team(blocks, kept)
    make_case(place, False, vocabulary, weight_decay=0.01, seed=vocabulary).run(place)


@pytest.mark.parametrize(("blocks", "kept", "vocabulary"), [(1, True, 2500), (2, True, 5025), (2, False, 5025)])
def test_logits_rows(place: Place, blocks: int, kept: bool, vocabulary: int) -> None:
    """With more entries than a thread keeps by the smaller kernel, too."""
    place.team(blocks, kept)
    make_case(place, False, vocabulary if place.emulated else 50257, rows=2, noise=False).run(place)


@pytest.mark.parametrize(("blocks", "kept"), [(2, True), (1, False)])
@pytest.mark.parametrize("drop", [-300.0, 300.0])
def test_logits_far_from_where_their_exponentials_began(place: Place, blocks: int, kept: bool, drop: float) -> None:
    """The expected token is not the likeliest one, by far; or all logits fall in one step."""
    place.team(blocks, kept)
    case = make_case(place, False, 60, rows=2, noise=False, max_steps=3)
    if drop < 0:
        case.options["hard_noise"] = torch.zeros(2, 60, device=place.device)
        case.options["hard_noise"][:, 7] = 1000.0
        case.state[0][:, 7] = drop
    else:
        case.rates[:] = drop
        case.state[1][:] = 0.1
        case.state[2][:] = 1e-2
    case.tokens = reference.hard_tokens(case.state[0], case.tables.head, False, case.options.get("hard_noise"))
    if drop > 0:
        case.gradient[:] = 0.0
    before = case.state[3].clone()
    case.run(place, rtol=1e-4, atol=1e-4)
    assert (case.state[3] > before).all()


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [
        (torch.bfloat16, 16),  # a warp a row, eight rows side by side
        (torch.bfloat16, 576),
        (torch.bfloat16, 2304),
        (torch.bfloat16, 3584),
        (torch.float16, 896),
        (torch.float16, 8192),
        (torch.float32, 64),
        (torch.float32, 1500),
        (torch.float32, 2052),
        (torch.float32, 5000),
    ],
)
def test_latents(place: Place, dtype: torch.dtype, hidden: int) -> None:
    make_case(place, True, 101, hidden=hidden, dtype=dtype, max_steps=2, seed=hidden).run(place)


@pytest.mark.parametrize(("blocks", "kept"), [(3, False), (3, True), (4, False)])
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.bfloat16, 72), (torch.float32, 1100), (torch.float16, 4104)])
def test_latents_beside_rings_of_two_three_and_four_tiles(
    place: Place, dtype: torch.dtype, hidden: int, blocks: int, kept: bool
) -> None:
    """More tiles than the ring has, and fewer."""
    place.team(blocks, kept)
    if place.emulated:
        with cuda._device(place.device) as (index, _):
            assert (
                cuda._planned("latents", place.device, 1, 200, cuda._WEIGHT_TYPES[dtype], hidden).stages
                == 2 + index % 3
            )
    for vocabulary in (5, 200 if hidden > 100 else 700):
        make_case(place, True, vocabulary, hidden=hidden, dtype=dtype, max_steps=2, seed=hidden).run(place)


@pytest.mark.parametrize(
    ("dtype", "hidden", "threads"),
    [
        (torch.bfloat16, 3584, 224), (torch.bfloat16, 2304, 160), (torch.bfloat16, 4096, 256),
        (torch.bfloat16, 576, 192), (torch.bfloat16, 5120, 160), (torch.float32, 3584, 224),
        (torch.float16, 8192, 256), (torch.float32, 8192, 256), (torch.bfloat16, 8, 256), (torch.bfloat16, 8200, 0),
    ],
)  # fmt: skip
def test_no_warp_of_a_block_is_idle(place: Place, dtype: torch.dtype, hidden: int, threads: int) -> None:
    """Whole groups of the warps that a row of the head takes, eight warps at most; too long a row is Triton's."""
    plan = cuda._planned("latents", place.device, 1, 1000, cuda._WEIGHT_TYPES[dtype], hidden)
    assert plan.threads == threads


def test_latents_beside_a_head_of_many_tiles(place: Place) -> None:
    make_case(place, True, 700, hidden=72, dtype=torch.bfloat16, weight_decay=0.01, noise=False).run(place)


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True), (False, 2, False), (True, 3, False)])
def test_rows_stop_each_at_its_own_step(place: Place, latents: bool, blocks: int, kept: bool) -> None:
    """At once, at a change after two steps or four, at the end of the learning rates, and at the end of the call."""
    place.team(blocks, kept)
    rows, most = (4, 6) if latents else (5, 6)
    case = make_case(place, latents, 41, hidden=40, rows=rows, max_steps=most, seed=11)
    case.tokens[0] = (case.tokens[0] + 1) % 41
    case.state[3].copy_(torch.tensor([0, 0, 17, 1, 2][:rows]))
    # Away from the token of the row, by a rate at which it falls behind the next one on the way.
    for row, drop in ((1, 60.0), (4, 20.0))[: rows - 3]:
        case.gradient[row, case.tokens[row]] = drop
    case.rates = torch.linspace(0.08, 0.12, 20, device=place.device)
    before = case.state[3].clone()
    case.run(place, rtol=1e-3, atol=1e-4)
    assert (case.state[3] - before).tolist() == [0, 2, 3, 6, 4][:rows]


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True), (False, 2, False), (True, 3, False)])
def test_many_steps(place: Place, latents: bool, blocks: int, kept: bool) -> None:
    """What the team exchanged two steps ago is written over."""
    place.team(blocks, kept)
    case = make_case(place, latents, 33, hidden=64, max_steps=20, seed=5)
    case.rates *= 0.1
    case.run(place, rtol=1e-4, atol=1e-5)
    assert int(case.state[3]) > 10


@pytest.mark.parametrize("latents", [False, True])
def test_more_blocks_than_a_warp_has_lanes(place: Place, latents: bool) -> None:
    place.team(33)
    make_case(place, latents, 10 * 33, hidden=40, max_steps=1).run(place)  # so that none is without work


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True), (False, 3, False), (True, 3, False)])
@pytest.mark.parametrize("given", ["hard", "soft", "both"])
def test_noise(place: Place, latents: bool, blocks: int, kept: bool, given: str) -> None:
    """An anchor's noise: the hard token is another one, and never one that sampling had left out."""
    place.team(blocks, kept)
    vocabulary = 300
    case = make_case(place, latents, vocabulary, hidden=48, rows=3, dtype=torch.bfloat16, max_steps=4, noise=False)
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(2, 3, vocabulary, generator=generator).clamp_min(1e-6)
    soft, hard = (-(-uniform.log()).log()).to(place.device)
    head, parameters = case.tables.head, case.state[0]
    plain = case.tokens
    # Row 0 without its best tokens, row 1 with all of the first block's and more gone, row 2 with one token left.
    logits = reference.linear_logits(parameters, head) if latents else parameters
    hard[0, logits[0].topk(100).indices] = -math.inf
    hard[1, :120] = hard[1, 130:200:3] = -math.inf
    hard[2, torch.arange(vocabulary, device=place.device) != 288] = -math.inf
    soft[1, 200:] = -math.inf  # all of the last block's
    if given != "soft":
        case.options["hard_noise"] = hard
        case.tokens = reference.hard_tokens(parameters, head, latents, hard)
        assert (case.tokens != plain)[[0, 2]].all()
        assert int(case.tokens[2]) == 288
    if given != "hard":
        case.options["soft_noise"] = soft
    before = case.state[3].clone()
    token, _ = case.run(place)
    assert (case.state[3] > before).all()
    assert given == "soft" or hard.gather(1, token.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 4, True), (False, 3, False), (True, 3, False)])
def test_anchor_at_the_rollout(place: Place, latents: bool, blocks: int, kept: bool) -> None:
    """The noise that makes what was sampled the hard token, as the decoder gives it, beside Gumbel noise."""
    place.team(blocks, kept)
    case = make_case(place, latents, 250, hidden=56, rows=4, max_steps=5, noise=False)
    logits = reference.linear_logits(case.state[0], case.tables.head) if latents else case.state[0]
    keys = [(seed, 3) for seed in range(4)]
    sampling = Sampling(temperature=0.6, top_k=40)
    case.tokens = logits.topk(3).indices[torch.arange(4), torch.tensor([0, 1, 2, 1])].contiguous()
    case.options["hard_noise"] = anchor_noise(logits, sampling, keys, case.tokens)
    case.options["soft_noise"] = gumbel(keys, 250, place.device)
    assert int(case.options["hard_noise"].isinf().sum()) == 4 * 210
    # Towards the token, so that some rows stay.
    case.gradient[::2].scatter_(1, case.tokens[::2].unsqueeze(1), -5.0)
    before = case.state[3].clone()
    _, changed = case.run(place)
    assert (case.state[3] > before).all()
    assert not changed.all()


@pytest.mark.parametrize("kept", [True, False])
def test_logits_ties_and_infinities(place: Place, kept: bool) -> None:
    """The lowest index of equals; entries at -inf do not move, whatever their gradient."""
    place.team(2, kept)
    case = make_case(place, False, 1400, noise=False, max_steps=1)
    case.state[0][0, [3, 700, 1399]] = 9.0
    case.state[0][0, [0, 2, 1398]] = -math.inf
    case.gradient[0, 2] = math.inf
    case.options["max_steps"] = 0
    token, _ = case.call(place)
    assert token.tolist() == [3]
    case.tokens, case.options["max_steps"] = token, 1
    case.run(place)
    assert case.state[0][0, 2] == -math.inf


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True)])
@pytest.mark.parametrize("kind", ["nan", "+inf", "-inf"])
@pytest.mark.parametrize("name", ["soft_noise", "hard_noise"])
@pytest.mark.parametrize(("made", "max_steps"), [(0, 2), (0, 0), (20, 2)])
def test_a_row_with_noise_without_meaning_makes_no_step(
    place: Place, latents: bool, blocks: int, kept: bool, kind: str, name: str, made: int, max_steps: int
) -> None:
    """Token -1 and no step, as for parameters without meaning, also where the row has no steps left."""
    place.team(blocks, kept)
    case = make_case(place, latents, 61, hidden=24, rows=3, max_steps=max_steps)
    case.state[3].fill_(made)
    noise = case.options[name]
    if kind == "-inf":
        noise[1] = -math.inf
    else:
        noise[1, 60] = math.nan if kind == "nan" else math.inf
    before = [x.clone() for x in case.state]
    token, changed = case.run(place)
    assert token[1] == -1
    assert changed[1]
    for x, was in zip(case.state, before, strict=True):
        assert torch.equal(x[1], was[1])
    assert (token[[0, 2]] >= 0).all()


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True)])
def test_a_row_at_a_token_outside_the_vocabulary_makes_no_step(
    place: Place, latents: bool, blocks: int, kept: bool
) -> None:
    """On a GPU nobody looks before the kernels do. Such a row has changed, even where it has no token either."""
    place.team(blocks, kept)
    for outside in ([-1, 40, 2**40, -(2**62)], [-1, 2**63 - 1, -(2**63), 2**32 + 3]):
        case = make_case(place, latents, 40, hidden=24, rows=4, noise=False)
        case.tokens = torch.tensor(outside, device=place.device)
        case.options["hard_noise"] = torch.zeros(4, 40, device=place.device)
        case.options["hard_noise"][0, 5] = math.nan
        before = [x.clone() for x in case.state]
        token, changed = case.run(place)
        assert (token >= 0).tolist() == [False, True, True, True]
        assert changed.all()
        for x, was in zip(case.state, before, strict=True):
            assert torch.equal(x, was)


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True)])
@pytest.mark.parametrize("gap", [10.0, 14.0, 18.0])
def test_the_gradient_of_a_nearly_certain_token(
    place: Place, latents: bool, blocks: int, kept: bool, gap: float
) -> None:
    """As exact, relative to its own size, as any: Adam follows it however small it is. Beside a bfloat16 head."""
    place.team(blocks, kept)
    case = make_case(place, latents, 300, hidden=16, dtype=torch.bfloat16, noise=False, max_steps=1, tau=1.0)
    parameters, weight = case.state[0], case.tables.head.weight
    parameters *= 0.1
    if latents:
        parameters[:, 0], weight[:, 0], weight[277, 0] = 1.0, 0.0, gap + 6
    else:
        parameters[:, 277] = gap + 6
    case.tokens.fill_(277)
    case.gradient += 3
    case.rates.fill_(1e-3)
    for x in case.state[1:]:
        x.zero_()
    z = (parameters.double() @ weight.double().T) if latents else parameters.double()
    p, difference = torch.softmax(z, -1), case.gradient.double() - case.gradient[:, 277:278].double()
    meant = p * (difference - (p * difference).sum(-1, keepdim=True))
    case.call(place)
    ours = 10 * case.state[1].double()
    if latents:
        meant = meant @ weight.double()
    else:
        assert abs(float(ours[0, 277] / meant[0, 277]) - 1) < 2e-5
    assert float((ours - meant).norm() / meant.norm()) < 2e-5


@pytest.mark.parametrize(("latents", "blocks", "kept"), [(False, 3, True)])
def test_large_logits_lose_nothing_beside_a_small_tau(place: Place, latents: bool, blocks: int, kept: bool) -> None:
    """1e4 / 0.05 is rounded to more than a hundredth; what the softmax needs of it is a difference."""
    place.team(blocks, kept)
    case = make_case(place, latents, 200, hidden=16, noise=False, max_steps=1, tau=0.05)
    parameters, weight = case.state[0], case.tables.head.weight
    if latents:
        parameters[:, 0] = 1.0
        weight.mul_(0.2).mul_(32).round_().div_(32)
        weight[:, 0] = 8192.0
        parameters.mul_(32).round_().div_(32)
    else:
        parameters.mul_(0.05).add_(1e4)
    for x in case.state[1:]:
        x.zero_()
    case.tokens = reference.hard_tokens(parameters, case.tables.head, latents)
    case.gradient *= 0.01
    tables = case.tables._replace(head=Head(weight.double()))
    exact = [*(x.double() for x in case.state[:3]), case.state[3].clone()]
    reference.dto_step(
        *dto_arguments(*exact, case.tokens, case.rates.double(), case.gradient.double(), tables, **case.options)
    )
    case.call(place)
    # The first entry of h is a difference of sums of 8192.
    ours, meant = (x[:, int(latents) :] for x in (case.state[1], exact[1]))
    assert float((ours - meant).norm() / meant.norm()) < 1e-4


def test_what_the_kernels_do_not_take_goes_to_triton(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[DTOOptions] = []
    stand_in = types.ModuleType("triton")
    stand_in.dto_step = lambda *arguments: calls.append(arguments[-1])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nabla_fast.ops.triton", stand_in)
    monkeypatch.setattr("nabla_fast.ops.triton", stand_in, raising=False)
    case = make_case(place, True, 30, hidden=16, rows=2)
    weight = case.tables.head.weight
    factors = TokenGradient(*(case.state[0].clone() for _ in range(3)))

    def call(
        state: list[Tensor] = case.state, gradient: Any = case.gradient, w: Tensor = weight, **options: Any
    ) -> None:
        tables = case.tables._replace(head=Head(w))
        cuda.dto_step(*dto_arguments(*state, case.tokens, case.rates, gradient, tables, **case.options | options))

    call(gradient=factors)
    call(group=torch.zeros(2, dtype=torch.int64, device=place.device))
    call(state=[*(x.double() for x in case.state[:3]), case.state[3]])
    call(state=[*(x.T.contiguous().T for x in case.state[:3]), case.state[3]])
    call(w=weight.double())
    call(w=weight.T.contiguous().T)
    call(w=torch.randn(30, 17, device=place.device)[:, 1:])
    assert len(calls) == 7
    many = make_case(place, True, 30, rows=5)
    cuda.dto_step(*many.arguments)
    assert len(calls) == 8
    assert calls[1].max_steps == 3


@pytest.mark.parametrize("variant", [{}, {"parameterization": "logits", "anchor": "rollout"}], ids=str)
def test_a_decode(place: Place, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the reference; on the emulated device, in place of the back end for a CPU."""
    config = BASE.replace(max_rollouts=3, **variant)
    if not place.emulated:
        require_same_decodes(("reference", "cuda"), place.device, config)
        return
    calls = dict.fromkeys(("dto_step", "token_diff"), 0)

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return getattr(cuda, name)(*arguments, **options)

        return call

    for name in calls:
        monkeypatch.setattr(OPERATORS[name], "native", counted(name))
    require_same_decodes(("reference", "native"), place.device, config)
    assert min(calls.values()) > 10


@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(50257, 768), (49152, 576), (151936, 3584)])
@pytest.mark.parametrize("latents", [False, True])
def test_real_sizes_on_a_gpu(latents: bool, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    place = Place(torch.device("cuda", torch.cuda.current_device()))
    for rows in (1, 3):
        case = make_case(place, latents, vocabulary, hidden=hidden, rows=rows, dtype=dtype, max_steps=10)
        case.run(place, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
@pytest.mark.parametrize("latents", [False, True])
def test_in_a_cuda_graph_of_a_gpu(latents: bool) -> None:
    place = Place(torch.device("cuda", torch.cuda.current_device()))
    case = make_case(place, latents, 1000, hidden=64, noise=False)
    start = [x.clone() for x in case.state]
    expected = case.call(place)
    meant = [x.clone() for x in case.state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, changed = cuda.dto_step(*case.arguments)
    for x, was in zip(case.state, start, strict=True):
        x.copy_(was)
    graph.replay()
    assert torch.equal(token, expected[0])
    assert torch.equal(changed, expected[1])
    for x, was in zip(case.state, meant, strict=True):
        torch.testing.assert_close(x, was)


@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
@pytest.mark.parametrize("latents", [False, True])
def test_all_rows_in_a_cuda_graph_of_a_gpu(latents: bool) -> None:
    """By Triton, with a group that stops on the way: outside of a graph the host may not wait for the last launch."""
    place = Place(torch.device("cuda", torch.cuda.current_device()))
    case = make_case(place, latents, 1000, hidden=64, rows=12, dtype=torch.bfloat16, noise=False, max_steps=6)
    case.options["group"] = torch.arange(12, device=place.device) // 4
    case.gradient[0, case.tokens[0]] = 60.0
    start = [x.clone() for x in case.state]
    expected = case.call(place)
    meant = [x.clone() for x in case.state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, changed = cuda.dto_step(*case.arguments)
    for x, was in zip(case.state, start, strict=True):
        x.copy_(was)
    graph.replay()
    assert torch.equal(token, expected[0])
    assert torch.equal(changed, expected[1])
    for x, was in zip(case.state, meant, strict=True):
        torch.testing.assert_close(x, was)
