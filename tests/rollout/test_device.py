"""Rollouts by captured steps: the tokens of the usual path, whatever the batch, the draft or the end."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from processed import Processed

import nabla_fast as nf
from nabla_fast import graphs
from nabla_fast import sampling as drawing
from nabla_fast.config import Sampling
from nabla_fast.decoder import Decoder
from nabla_fast.generate import make_pair
from nabla_fast.models import kept, slots
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.objective import Objective
from nabla_fast.ops import noise as noise_hash
from nabla_fast.ops import warp
from nabla_fast.processors import model_sampler
from nabla_fast.rollout import HFRollout, StopRule, device, draws, hf, rollout
from nabla_fast.rollout.device import DeviceStream
from nabla_fast.rollout.device_step import SlotState
from nabla_fast.sampling import Sampler
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import CONTEXT, FAMILIES, tiny_language_model, tiny_reward_model, tiny_tokenizer
from nabla_fast.testing.operators import logits as random_logits

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A stream that goes on without graphs says so.
    pytest.mark.filterwarnings("error::UserWarning"),
]

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
NEVER = StopRule(frozenset())
ENDS = StopRule(frozenset({3, 4, 5, 30, 31}))


def sequences(limit=24):
    prompts = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15, 16), (20, 21), (8,)]
    responses = [(), (30, 31), (), (8,), ()]
    return [Sequence(p, r, seed, limit) for seed, (p, r) in enumerate(zip(prompts, responses, strict=True))]


def language_model(family="llama", **options):
    """One that a test may change."""
    return LanguageModel(tiny_language_model(family, **options), tiny_tokenizer())


@functools.cache
def shared(family="llama", dtype=torch.float64):
    """One with the graphs that earlier tests have captured."""
    return language_model(family, dtype=dtype)


def plain(model, given, sampling=SAMPLING, stop=NEVER, **options):
    return rollout(HFRollout(model, **options), given, sampling, stop)


class OnDevice(HFRollout):
    """An `HFRollout` that replays graphs, or the test fails."""

    def __init__(self, model, draft_tokens=0):
        super().__init__(model, draft_tokens=draft_tokens, graphs=True)

    def open(self, sampling, stop):
        stream = super().open(sampling, stop)
        assert isinstance(stream, DeviceStream)
        return stream


def on_device(model, given, sampling=SAMPLING, stop=NEVER, **options):
    return rollout(OnDevice(model, **options), given, sampling, stop)


def tokens_of(drawn):
    return [r.tokens.tolist() for r in drawn]


def left(model):
    """The slots that streams have left for the next one, the last first."""
    shelf = kept._SHELVES.get(model.model)
    return [] if shelf is None else [slots for key, slots in reversed(shelf.idle) if key[0] == "rollouts"]


def captures(model):
    """Of the graphs that are left."""
    return sum(graph.captures for slots in left(model) for graph in slots.graphs._graphs.values())


def assert_same(ours, theirs, tolerance=1e-9):
    assert tokens_of(ours) == tokens_of(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=tolerance, atol=tolerance)
        assert (a.cache is None) == (b.cache is None)
        if a.cache is not None:
            torch.testing.assert_close(a.cache.hidden, b.cache.hidden, rtol=tolerance, atol=tolerance)
            for x, y in zip((*a.cache.keys, *a.cache.values), (*b.cache.keys, *b.cache.values), strict=True):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def with_caches(model, given):
    for sequence in given:
        sequence.language_cache = model.new_cache(sequence.prompt_ids)
    return given


@pytest.fixture
def room(monkeypatch):
    """For drafts, in batches too."""
    monkeypatch.setitem(hf.TOKENS_PER_PASS, "cpu", 64)


# Models and batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_hidden_states_and_caches_are_those_of_the_usual_path(family, dtype):
    model = shared(family, dtype)
    meant = plain(model, with_caches(model, sequences(10)[:4]))
    drawn = on_device(model, with_caches(model, sequences(10)[:4]))
    assert_same(drawn, meant, 1e-4 if dtype == torch.float32 else 1e-9)
    assert [(r.calls, r.drafted, r.accepted) for r in drawn] == [(len(r.tokens), 0, 0) for r in drawn]
    assert captures(model) > 0


def test_prefixes_go_on_from_caches_and_leave_them_alone():
    model = shared()
    prompt = (5, 6, 7, 8)
    (first,) = on_device(model, with_caches(model, [Sequence(prompt, (), 0, 9)]))
    cache = model.new_cache(prompt)
    cache.keep(first.tokens[:-1], first.cache)
    before = cache.tokens.clone(), cache.cache, cache.cache.hidden.clone(), cache.cache.keys[1].clone()
    response = (*first.tokens[:3].tolist(), 40)
    (resumed,) = on_device(model, [Sequence(prompt, response, 0, 9, language_cache=cache)])
    assert_same([resumed], plain(model, with_caches(model, [Sequence(prompt, response, 0, 9)])))
    assert torch.equal(cache.tokens, before[0])
    assert cache.cache is before[1]
    assert torch.equal(cache.cache.hidden, before[2])
    assert torch.equal(cache.cache.keys[1], before[3])


def test_rollouts_end_where_the_context_does(room):
    model = shared("gpt2")  # a position behind its last one would raise
    meant = plain(model, sequences_to_the_end())
    known = sequences_to_the_end()
    for sequence, drawn in zip(known, meant, strict=True):
        sequence.drawn = [tuple(drawn.tokens.tolist())]
    drawn = on_device(model, known, draft_tokens=8)
    assert_same(drawn, meant)
    assert all(len(r.tokens) + len(s.prompt_ids) == CONTEXT for r, s in zip(drawn, known, strict=True))


def sequences_to_the_end():
    prompts = [tuple(range(8, 8 + n % 60)) for n in (118, 115)]
    return [Sequence(prompt * 2, (), seed, CONTEXT - 2 * len(prompt)) for seed, prompt in enumerate(prompts)]


def test_rows_join_and_leave_at_different_times():
    model = language_model("gemma3")
    limits = (3, 18, 7, 12, 18, 5, 18, 9)
    many = [Sequence((5 + i,) * (1 + i % 3), (), i, limit) for i, limit in enumerate(limits)]
    meant = plain(model, [Sequence(s.prompt_ids, (), s.seed, s.limit) for s in many], stop=ENDS)
    stream = OnDevice(model).open(SAMPLING, ENDS)
    waiting, ended, together = list(many), {}, set()
    for _ in range(5):
        stream.submit(waiting.pop(0))
    while len(ended) < len(many):
        together.add(len(stream.rows))
        ended.update(stream.collect())
        if waiting:
            stream.submit(waiting.pop(0))
    assert_same([ended[s] for s in many], meant)
    assert stream.collect() == []
    stream.close()
    assert len(together) > 2
    assert len({key[0] for key in left(model)[0].graphs._graphs}) > 2, "the number of slots never changed"


def test_sequences_beyond_the_slots_wait(monkeypatch):
    monkeypatch.setattr(device, "_SLOTS", 2)
    model = language_model()
    assert_same(on_device(model, sequences(9)), plain(model, sequences(9)))
    assert left(model)[0].state.size == 2


def test_slots_grow_with_the_sequences(monkeypatch, room):
    monkeypatch.setattr(device, "_COLUMNS", 24)
    model = language_model("gemma2")
    meant = plain(model, sequences(60))
    known = sequences(60)
    for sequence, drawn in zip(known, meant, strict=True):
        sequence.drawn = [(*sequence.prefix, *drawn.tokens.tolist())]
    seen = set()
    stream = OnDevice(model, 4).open(SAMPLING, NEVER)
    for sequence in known:
        stream.submit(sequence)
    ended = {}
    launch = stream._launch
    stream._launch = lambda: (launch(), seen.add(stream._state.columns))[0]
    while len(ended) < len(known):
        ended.update(stream.collect())
    assert_same([ended[s] for s in known], meant)
    assert len(seen) > 1
    assert max(seen) < 96
    assert sum(r.accepted for r in ended.values()) > 3 * sum(r.calls for r in ended.values()), "drafts ended early"


def test_another_stream_uses_slots_and_graphs_again(room):
    model = language_model()
    prompts = [(5, 6, 7), (10, 11, 12)]

    def two(limit, drawn=()):
        return [Sequence(p, (), seed, limit, drawn=list(drawn)) for seed, p in enumerate(prompts)]

    for _ in range(2):
        on_device(model, two(20, [(9,) * 20]), draft_tokens=4)
    before, made = left(model)[0], captures(model)
    assert_same(on_device(model, two(9), draft_tokens=4), plain(model, two(9)))
    assert left(model) == [before]
    assert captures(model) == made, "captured again"
    with torch.no_grad():
        model.model.base_model.norm.weight.mul_(0.5)
    assert_same(on_device(model, two(9)), plain(model, two(9)))
    assert before not in left(model), "the model has changed"


def test_two_streams_at_once_have_slots_of_their_own():
    model = language_model()
    one, two = (OnDevice(model).open(SAMPLING, NEVER) for _ in range(2))
    first, second = sequences(9)[:2], sequences(16)[:2]
    for a, b in zip(first, second, strict=True):
        one.submit(a)
        two.submit(b)
    ended = {}
    while len(ended) < 4:
        ended.update(two.collect())
        ended.update(one.collect())
    meant = [*plain(model, sequences(9)[:2]), *plain(model, sequences(16)[:2])]
    assert_same([ended[s] for s in (*first, *second)], meant)


def test_inference_mode_leaves_nothing_that_later_calls_cannot_use():
    model = language_model()
    with torch.inference_mode():
        drawn = on_device(model, sequences(9))
    assert_same(drawn, plain(model, sequences(9)))
    assert_same(on_device(model, sequences(9)), plain(model, sequences(9)))


def test_a_batch_has_one_capture_for_each_number_of_slots_and_tokens(room):
    model = language_model()
    on_device(model, [Sequence((5, 6, 7), (), seed, 24, drawn=[(9,) * 24]) for seed in range(3)], draft_tokens=3)
    found = left(model)[0].graphs
    assert {(4, 5, 3), (4, 1, 0)} <= {key[:3] for key in found._graphs}
    assert {graph.captures for graph in found._graphs.values()} <= {0, 1}
    assert captures(model) > 0


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.3, top_k=20, top_p=0.8),
        Sampling(temperature=1.0, top_k=10**6, top_p=1.0),
        Sampling(temperature=1.0, top_p=1 - 1e-5),
    ],
    ids=["greedy", "plain", "top_k", "top_k and top_p", "all", "nearly all"],
)
def test_every_kind_of_sampling_draws_the_usual_tokens(sampling):
    model = shared("qwen3", torch.float32)
    meant = plain(model, sequences(12)[:4], sampling)
    assert_same(on_device(model, sequences(12)[:4], sampling), meant, 1e-4)


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_the_host_draws_what_the_device_declines_to(draft_tokens, monkeypatch, room):
    monkeypatch.setattr(warp, "LIKELIEST", 3)
    asked = []
    own = Sampler.__call__

    def call(self, logits, *others):
        asked.append(len(logits))
        return own(self, logits, *others)

    model = language_model()
    stop = StopRule(frozenset({3, 4}), ("user",), tiny_tokenizer())
    meant = plain(model, sequences(12)[:4], stop=stop)
    known = sequences(12)[:4]
    for sequence, drawn in zip(known, meant, strict=True):
        sequence.drawn = [(*sequence.prefix, *drawn.tokens.tolist()[:7], 9, 9)]
    monkeypatch.setattr(Sampler, "__call__", call)
    drawn = on_device(model, known, stop=stop, draft_tokens=draft_tokens)
    assert_same(drawn, meant)
    assert 0 < len(asked) < sum(len(r.tokens) for r in drawn)
    assert set(asked) == {1}
    assert all(r.calls + r.accepted == len(r.tokens) for r in drawn)


def test_the_noise_is_that_of_the_host():
    seeds, positions = (0, 1, 11, 2**63 - 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0), (0, 1, 77, 10**6)
    keys = [(seed, position) for seed in seeds for position in positions]
    ours = draws.words(torch.tensor([draws.mixed(s) for s, _ in keys]), torch.tensor([p for _, p in keys]))
    theirs = noise_hash.key_words(keys, torch.device("cpu"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("kind", ["random", "ties", "minus infinity", "dominant", "huge", "all equal"])
def test_draws_are_those_of_the_sampler_or_declined(kind, noise, monkeypatch):
    if not noise:  # so that scores tie, too; a kernel would have its own
        monkeypatch.setenv("NABLA_FAST_BACKEND", "reference")
        monkeypatch.setattr(
            noise_hash, "gumbel", lambda low, high, token: torch.zeros(torch.broadcast_shapes(low.shape, token.shape))
        )
    keys = [(seed, seed * 7) for seed in range(12)]
    low, high = noise_hash.key_words(keys, torch.device("cpu"))
    settings = [(None, None), (None, 0.9), (None, 0.3), (40, None), (40, 0.9), (None, 1 - 1e-5), (None, 1e-3)]
    drawn = 0
    for dtype in (torch.float32, torch.float64):
        z = random_logits(3, len(keys), 700, kind, dtype)
        for sampling in [Sampling(temperature=0.0)] + [Sampling(0.8, top_k=k, top_p=p) for k, p in settings]:
            tokens, wide = draws.draw(z, sampling, low, high)
            warped = drawing.warp(z, sampling)
            assert torch.equal(tokens[~wide], drawing.draw(warped, Sampling(), keys)[~wide]), sampling
            likely = (warped != -torch.inf).sum(-1)
            # Declined: more than the likeliest are kept, or it is a matter of index which of equals are.
            least = warped.masked_fill(warped == -torch.inf, torch.inf).amin(-1)
            tied = least == warped.new_tensor([sorted(row)[-warp.LIKELIEST] for row in (z / 0.8).tolist()])
            assert bool(((likely >= warp.LIKELIEST) | tied)[wide].all()), sampling
            drawn += int((~wide).sum())
    assert drawn > 24


# Drafts


def earlier_responses(drawn):
    """Of each sequence: nonsense, what it drew with a hole in it, nothing, what it drew, what it drew one later."""
    right = [tuple(r.tokens.tolist()) for r in drawn]
    hole = (30, 31, *right[1][:5], 9, *right[1][6:])
    return [((8, 9, 8, 9, 8, 9), right[0]), (hole,), (), ((8, *right[3]),), ((9, *right[4]),)]


@pytest.mark.parametrize(
    ("family", "sampling", "draft_tokens"),
    [("llama", SAMPLING, 2), ("llama", Sampling(temperature=0.0), 8), ("gemma3", SAMPLING, 8)],
    ids=["llama", "llama-greedy", "gemma3"],
)
def test_drafts_change_the_number_of_calls_and_nothing_else(family, draft_tokens, sampling, room):
    model = shared(family)
    stop = StopRule(frozenset({3, 4}))
    meant = plain(model, with_caches(model, sequences(22)), sampling, stop)
    known = with_caches(model, sequences(22))
    for sequence, earlier in zip(known, earlier_responses(meant), strict=True):
        sequence.drawn = list(earlier)
    drawn = on_device(model, known, sampling, stop, draft_tokens=draft_tokens)
    assert_same(drawn, meant)
    for r in drawn:
        # Each call gives one token of its own besides the draft tokens that proved right.
        assert r.calls + r.accepted == len(r.tokens)
        assert r.drafted <= draft_tokens * r.calls
    assert sum(r.drafted for r in drawn) > sum(r.accepted for r in drawn) > 0
    assert drawn[3].accepted >= len(drawn[3].tokens) - -(-len(drawn[3].tokens) // (draft_tokens + 1))


def test_after_a_mismatch_the_longest_known_end_leads_on(room):
    model = shared()
    (meant,) = plain(model, [Sequence((5, 6), (), 0, 40)])
    right = meant.tokens.tolist()
    # The same text from another position on: what follows a mismatch has to be looked up.
    moved = Sequence((5, 6), (), 0, 40, drawn=[(*right[:10], 9, 9, 9, *right[10:])])
    (drawn,) = on_device(model, [moved], draft_tokens=8)
    assert drawn.tokens.tolist() == right
    assert drawn.accepted > 20, "only the first ten tokens were foreseen"


def test_a_wrong_draft_is_given_up(room):
    model = shared()
    (drawn,) = on_device(model, [Sequence((5, 6), (), 0, 30, drawn=[(7,) * 30])], draft_tokens=4)
    assert 0 < drawn.drafted < 60


def test_a_row_whose_draft_was_wrong_drafts_no_more_beside_one_whose_draft_is_right(room, monkeypatch):
    monkeypatch.setattr(DeviceStream, "_expect", lambda *_: None)  # nothing else to follow
    model = shared()
    (meant,) = plain(model, [Sequence((5, 6), (), 0, 20)])
    right = Sequence((5, 6), (), 0, 20, drawn=[tuple(meant.tokens.tolist())])
    wrong = Sequence((5, 6), (), 1, 20, drawn=[(7,) * 20])
    drawn = on_device(model, [right, wrong], draft_tokens=4)
    assert drawn[0].accepted == 16
    assert drawn[1].drafted == 4


def test_nothing_of_the_row_before_is_left_in_a_slot():
    (first,) = on_device(shared(), with_caches(shared(), [Sequence((5, 6, 7, 8), (), 0, 9)]))
    cache = first.cache
    used, fresh = (SlotState.empty(cache, 2, 32) for _ in range(2))
    used.put(1, cache, list(range(12)), 4, 20, 7, [9] * 10)
    used.ended[1] = True
    for state in (used, fresh):
        state.put(1, cache.crop(3), [5, 6, 7, 8], 3, 16, 8, [9, 9])
    for name, ours, theirs in zip(SlotState._fields, used, fresh, strict=True):
        written = (slice(None), slice(None), slice(None), slice(None), slice(3))
        if name == "kv":  # columns behind a row's end are written before they are seen
            assert torch.equal(ours[written], theirs[written])
        else:
            assert torch.equal(ours[:, :3] if name == "hidden" else ours, theirs[:, :3] if name == "hidden" else theirs)


def test_a_large_batch_leaves_no_room_for_drafts():
    model = shared()
    many = [Sequence((5, 6), (), seed, 6, drawn=[(7,) * 6]) for seed in range(2)]
    assert sum(r.drafted for r in on_device(model, many, draft_tokens=8)) == 0
    assert on_device(model, many[:1], draft_tokens=8)[0].drafted > 0


# Ends


@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_a_stop_string_that_the_host_finds_late_ends_the_response(draft_tokens, room):
    tokenizer = tiny_tokenizer()
    model = shared()
    free = plain(model, sequences(20))
    stop = StopRule(frozenset({3}), tuple(tokenizer.decode(r.tokens[4:7]) for r in free), tokenizer)
    meant = plain(model, with_caches(model, sequences(20)), stop=stop)
    known = with_caches(model, sequences(20))
    for sequence, drawn in zip(known, free, strict=True):
        sequence.drawn = [(*sequence.prefix, *drawn.tokens.tolist())]
    drawn = on_device(model, known, stop=stop, draft_tokens=draft_tokens)
    assert_same(drawn, meant)
    assert max(len(r.tokens) for r in drawn) <= 7
    for r in drawn:
        assert len(r.latents) == len(r.tokens)
        assert r.calls + r.accepted == len(r.tokens), "what was drawn behind the end was counted"
    if draft_tokens:
        assert sum(r.calls for r in drawn) < sum(len(r.tokens) for r in drawn)


def test_a_slot_that_a_late_stop_has_left_is_clean_for_the_next_row():
    tokenizer = tiny_tokenizer()
    model = language_model()
    (free,) = plain(model, [Sequence((5, 6), (), 0, 20)])
    stop = StopRule(frozenset(), (tokenizer.decode(free.tokens[2:5]),), tokenizer)
    given = [Sequence((5, 6), (), 0, 20), *sequences(20)[:2]]
    again = [Sequence(s.prompt_ids, s.prefix, s.seed, s.limit) for s in given]
    stream = OnDevice(model).open(SAMPLING, stop)
    ended = {}
    for sequence in given:
        stream.submit(sequence)
        ended.update(stream.collect())
    assert_same([ended[s] for s in given], plain(model, again, stop=stop))
    assert left(model) == []
    assert stream._state.size == 1


def test_criteria_are_asked_once_for_each_token_in_order():
    model = shared()
    asked = []
    for draw in (plain, on_device):
        seen = []
        stop = StopRule(frozenset(), criteria=(lambda ids, seen=seen: bool(seen.append(ids)) or len(ids) == 9,))
        (drawn,) = draw(model, [Sequence((5, 6), (), 0, 20)], stop=stop)
        assert len(drawn.tokens) == 7
        asked.append(seen)
    assert asked[0] == asked[1]


def test_a_limit_of_no_tokens_draws_one_as_the_usual_path_does():
    model = shared()

    def given():
        return [Sequence(prompt, (), 0, 0) for prompt in ((5,), (5, 6, 7))]

    assert_same(on_device(model, given()), plain(model, given()))


def test_a_response_that_has_ended_is_left_as_it_is():
    model = shared()
    ended = [Sequence((5,), (3,), 0, 8), Sequence((5,), tuple(range(10, 18)), 0, 8)]
    for drawn in on_device(model, ended, stop=StopRule(frozenset({3}))):
        assert drawn.tokens.shape == (0,)
        assert drawn.latents.shape == (0, 24)


def test_a_stream_begins_with_empty_slots():
    model = shared()
    stream = OnDevice(model).open(SAMPLING, NEVER)
    stream.submit(Sequence((5, 6), (), 0, 2))
    stream.submit(Sequence((5, 6, 7), (), 1, 30))
    stream.collect()
    stream.close()
    stream.close()
    slots = left(model)[0]
    assert not bool(slots.state.ended.all())
    slots.begin(model, graphs.Counts())
    assert bool(slots.state.ended.all())
    assert not bool(slots.state.kv.any())
    assert_same(on_device(model, sequences(9)), plain(model, sequences(9)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unreadable_logits_are_an_error_that_names_the_position(value):
    model = language_model(tied=False)
    (drawn,) = plain(model, [Sequence((5, 6), (), 0, 20)])
    place = next(i for i in range(3, 20) if drawn.tokens[i] not in drawn.tokens[:i])
    with torch.no_grad():
        model.model.get_input_embeddings().weight[drawn.tokens[place]] = value
    for graphed in (False, True):
        stream = HFRollout(model, graphs=graphed).open(SAMPLING, NEVER)
        assert isinstance(stream, DeviceStream) == graphed
        stream.submit(Sequence((5, 6), (), 0, 20))
        with pytest.raises(FloatingPointError, match=f"logits at response position {place + 1};"):
            stream.collect()
        stream.close()
    # What is left of NaN in the slots is not for another stream.
    with torch.no_grad():
        model.model.get_input_embeddings().weight.data[drawn.tokens[place]] = 0.0
    assert len(left(model)) == 1
    assert_same(on_device(model, sequences(16)), plain(model, sequences(16)))


# Graphs


def test_what_another_replay_has_overwritten_is_not_read(monkeypatch):
    model = language_model()
    meant = plain(model, sequences(16))
    assert tokens_of(on_device(model, sequences(16))) == tokens_of(meant)
    # Read without a copy, a report is that of no step.
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **_: x)
    stream = OnDevice(model).open(SAMPLING, NEVER)
    for sequence in sequences(16):
        stream.submit(sequence)
    with pytest.raises(AssertionError, match="a step left a rollout where it was"):
        stream.collect()


def test_a_whole_decode_comes_to_the_same_answers(room):
    config = nf.NablaConfig(
        max_rollouts=4,
        max_iters=4,
        learning_rate=0.2,
        gradient_threshold=None,
        confidence_threshold=0.99,
        rollout=Sampling(temperature=1.0, top_p=0.95),
        graphs=False,
    )
    model, tokenizer = tiny_language_model("llama"), tiny_tokenizer()
    pair = make_pair(model, tokenizer, tiny_reward_model("qwen3"), tokenizer, config)
    frame = pair.reward_model.chat_frame([{"role": "user", "content": "is"}])
    decoded = []
    for graphed in (False, True):
        given = [Sequence((5, 6, 7 + i), (), i, 10, frame, index=i) for i in range(3)]
        backend = HFRollout(pair.language_model, draft_tokens=4, graphs=graphed)
        objective = Objective(pair.language_model, pair.reward_model, config)
        Decoder(objective, backend, Sampler(), StopRule(frozenset({3}))).decode(given)
        decoded.append(given)
    assert captures(pair.language_model) > 0
    for usual, ours in zip(*decoded, strict=True):
        assert ours.current.tokens.tolist() == usual.current.tokens.tolist()
        assert ours.current.reward == pytest.approx(usual.current.reward)
        assert [r.new_token for r in ours.stats.revisions] == [r.new_token for r in usual.stats.revisions]
        assert ours.stats.rollout_calls + ours.stats.accepted_draft_tokens == ours.stats.generated_tokens
    assert sum(len(s.stats.revisions) for s in decoded[0]) > 0


# What keeps the usual path


def usual(model, sampling=SAMPLING, stop=NEVER, sampler=None):
    return isinstance(HFRollout(model, sampler or Sampler(), graphs=True).open(sampling, stop), hf._Stream)


def test_settings_that_need_the_host_keep_the_usual_path():
    model = language_model()

    class Own(Sampler):
        def __call__(self, logits, *_):
            return logits.argmax(-1)

    class Stop(StopRule):
        pass

    def nothing(ids, scores):
        return scores

    assert not usual(model)
    assert not usual(model, sampler=model_sampler(model.model, [3], model.vocab_size))
    assert usual(model, sampler=Processed(before=(nothing,)))
    assert usual(model, sampler=Own())
    assert usual(model, stop=Stop(frozenset()))
    assert not usual(model, Sampling(top_k=300)), "no more than the vocabulary"
    model.model.generation_config.repetition_penalty = 1.5
    assert usual(model, sampler=model_sampler(model.model, [3], model.vocab_size))
    assert isinstance(HFRollout(model).open(SAMPLING, NEVER), hf._Stream)


def test_a_top_k_beyond_the_tokens_looked_at_keeps_the_usual_path(monkeypatch):
    monkeypatch.setattr(warp, "LIKELIEST", 16)
    model = language_model()
    assert usual(model, Sampling(top_k=17))
    assert not usual(model, Sampling(top_k=16))
    sampling = Sampling(top_k=16)
    assert_same(on_device(model, sequences(9), sampling), plain(model, sequences(9), sampling))


def test_a_model_that_runs_alone_keeps_its_own_path():
    model = language_model()
    model.backbone.cache_kind = "state"
    assert isinstance(HFRollout(model, graphs=True).open(SAMPLING, NEVER), hf._SequentialStream)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_computes_something_else_in_slots_keeps_the_usual_path(family, monkeypatch):
    model = language_model(family)
    own = slots.attention_masks

    def without_windows(config, first, queries, columns, dtype):
        masks = own(config, first, queries, columns, dtype)
        if not isinstance(masks, dict):
            return torch.zeros_like(masks)
        return dict.fromkeys(masks, masks["full_attention"])

    monkeypatch.setattr(slots, "attention_masks", without_windows)
    with pytest.warns(UserWarning, match=r"without graphs, slower: hidden states of passes over slots are"):
        assert usual(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usual(model)


def test_a_model_that_raises_in_slots_keeps_the_usual_path(monkeypatch):
    model = language_model()

    def refuse(*_):
        raise TypeError("no mask of four dimensions")

    monkeypatch.setattr(slots, "attention_masks", refuse)
    with pytest.warns(UserWarning, match="a pass over slots raises TypeError"):
        assert usual(model)


def going_on(model, given, draft_tokens=0, **options):
    """Rollouts that a warning interrupts."""
    with pytest.warns(UserWarning, match="without graphs, slower") as told:
        drawn = on_device(model, given, draft_tokens=draft_tokens, **options)
    assert len(told) == 1
    return drawn


def test_a_step_that_waits_for_the_device_is_not_captured_and_no_row_is_lost():
    model = language_model()
    meant = plain(model, with_caches(model, sequences(16)), stop=ENDS)
    # The first call of a step is no capture yet.
    model.model.base_model.layers[0].register_forward_hook(lambda *a: float(a[2].sum()) and None)
    drawn = going_on(model, with_caches(model, sequences(16)), stop=ENDS)
    assert_same(drawn, meant)
    assert all(r.calls == len(r.tokens) for r in drawn)
    assert usual(model), "asked again"


@pytest.mark.parametrize("room_for", [0, 1])
def test_out_of_memory_goes_on_without_graphs_and_is_forgotten(room_for, monkeypatch, room):
    monkeypatch.setattr(device, "_COLUMNS", 16)
    model = language_model()
    stop = StopRule(frozenset({3, 4}))
    meant = plain(model, sequences(40), stop=stop)
    known = sequences(40)
    for sequence, drawn in zip(known, meant, strict=True):
        sequence.drawn = [(*sequence.prefix, *drawn.tokens.tolist()[:20], 9)]
    empty, made = device.SlotState.empty, []

    def allocate(*arguments):
        made.append(arguments)
        if len(made) > room_for:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")
        return empty(*arguments)

    monkeypatch.setattr(device.SlotState, "empty", allocate)
    drawn = going_on(model, known, draft_tokens=4, stop=stop)
    assert_same(drawn, meant)
    assert all(r.calls + r.accepted == len(r.tokens) for r in drawn)
    monkeypatch.setattr(device.SlotState, "empty", empty)
    assert_same(on_device(model, sequences(9)), plain(model, sequences(9)))


def test_what_is_submitted_after_a_failure_is_drawn_too(monkeypatch):
    model = language_model()

    def refuse(*_):
        raise graphs.CaptureError("not now")

    stream = OnDevice(model).open(SAMPLING, NEVER)
    given = sequences(9)
    monkeypatch.setattr(graphs.Graph, "_capture", refuse)
    for sequence in given[:2]:
        stream.submit(sequence)
    with pytest.warns(UserWarning, match="not now"):
        ended = dict(stream.collect())
    for sequence in given[2:]:
        stream.submit(sequence)
    while len(ended) < len(given):
        ended.update(stream.collect())
    assert_same([ended[s] for s in given], plain(model, sequences(9)))
    assert stream.collect() == []
    stream.close()
