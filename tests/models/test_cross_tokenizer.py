"""Reward models whose tokenizer cuts text otherwise: exact rewards, and gradients by the text that tokens share."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_kinds import MARKED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import nabla_fast as nf
from nabla_fast.models.cross_tokenizer import CrossTokenizer
from nabla_fast.models.language_model import EmbeddingTable, LanguageModel
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.models.reward_model import RewardModel
from nabla_fast.models.vocabulary import align, aligned_table
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    CHAT_TEMPLATE,
    FAMILIES,
    MESSAGES,
    SPECIAL_TOKENS,
    prompt_ids,
    shared_language_model,
    shared_reward_model,
    tiny_process_model,
    tiny_tokenizer,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:reward_tokenizer has .* its gradient is carried over:UserWarning"),
]

FINE_MISSING = [t for t in tiny_tokenizer().get_vocab() if len(t) > 1 and not t.startswith("<|")]
WORDS = tiny_tokenizer()
LETTERS = tiny_tokenizer(missing=FINE_MISSING)
# (language model's, reward model's): one token there is several here, and the other way round.
PAIRS = {
    "finer": (WORDS, tiny_tokenizer(missing=FINE_MISSING, shuffle=3)),
    "coarser": (LETTERS, tiny_tokenizer(shuffle=4)),
}
FINER = PAIRS["finer"][1]
RESPONSES = ("the ans is 12", "it is 36 or 48. what?", "3", " user\n\ntime is 24+12= 36 ")


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reward_of(pair: str, family: str = "qwen3") -> RewardModel:
    tokenizer, theirs = PAIRS[pair]
    language_model = LanguageModel(shared_language_model("llama"), tokenizer)
    eos = [tokenizer.eos_token_id]
    return RewardModel(shared_reward_model(family), theirs, language_model, tokenizer, eos)


def objective_of(pair: str, family: str = "qwen3", **changes: Any) -> Objective:
    tokenizer, _ = PAIRS[pair]
    language_model = LanguageModel(shared_language_model("llama"), tokenizer)
    return Objective(language_model, reward_of(pair, family), nf.NablaConfig(**changes))


def own_reward(model: Any, tokenizer: Any, chat: Any, response: str) -> float:
    whole = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": response}], return_dict=False, return_tensors="pt"
    )
    with torch.no_grad():
        return float(model(input_ids=whole).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", PAIRS)
def test_rewards_equal_the_classifiers_own_of_the_text(pair: str, family: str) -> None:
    tokenizer, theirs = PAIRS[pair]
    ours = reward_of(pair, family)
    assert ours.cross is not None
    frame = ours.chat_frame(MESSAGES)
    for end in ([], [tokenizer.eos_token_id]):
        talks = [ours.conversation(frame, torch.tensor(ids(tokenizer, text) + end)) for text in RESPONSES]
        rewards, _ = ours.rewards(talks)
        expected = [own_reward(shared_reward_model(family), theirs, MESSAGES, text) for text in RESPONSES]
        assert rewards.tolist() == pytest.approx(expected, abs=1e-10)


def shares_by_letters(tokenizer: Any, theirs: Any, response: list[int]) -> Tensor:
    """Share (n, m) of each reward token at each position, letter by letter; every token here is its own text."""
    ours = [tokenizer.decode([i]) for i in response]
    read = ids(theirs, "".join(ours))
    owner = [t for t, text in enumerate(ours) for _ in text]
    reader = [j for j, i in enumerate(read) for _ in theirs.decode([i])]
    share = torch.zeros(len(ours), len(read), dtype=torch.float64)
    for t, j in zip(owner, reader, strict=True):
        share[t, j] += 1 / len(theirs.decode([read[j]]))
    return share


def token_gradient(share: Tensor, gradient: Tensor, pieces: list[list[Tensor]], slots: int) -> Tensor:
    """The gradient (n, V) of swaps, slot by slot."""
    found = torch.zeros(len(share), len(pieces), dtype=torch.float64)
    for t, row in enumerate(share):
        parts = [row[j] * gradient[j] for j in range(len(gradient)) if row[j] > 0]
        for v, own in enumerate(pieces):
            for one, other in zip(parts[: slots - 1], own[: slots - 1], strict=False):
                found[t, v] += one @ other
            if len(parts) >= slots and len(own) >= slots:
                found[t, v] += torch.stack(parts[slots - 1 :]).sum(0) @ torch.stack(own[slots - 1 :]).mean(0)
    return found


def in_one(rows: Tensor, slots: int) -> Tensor:
    """Rows (n, slots * d) with the slots added up."""
    return rows.view(len(rows), slots, -1).sum(1)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_is_that_of_the_shared_letters_and_embeddings_those_of_the_pieces(pair: str, family: str) -> None:
    """Against whole-sequence autograd, from every first position."""
    tokenizer, theirs = PAIRS[pair]
    model = shared_reward_model(family)
    embed = model.get_input_embeddings()
    objective = objective_of(pair, family, reward_coeff=-1.3, gradient_cache=False)
    # Tokens of more letters than there are slots, which the tokenizer itself would cut otherwise.
    long = [tokenizer.get_vocab()[token] for token in ("what", "user") if token in tokenizer.get_vocab()]
    for response in ([*ids(tokenizer, text), *long] for text in RESPONSES):
        text = tokenizer.decode(response)
        share = shares_by_letters(tokenizer, theirs, response)
        opening, closing = prompt_ids(theirs), ids(theirs, "<|end|>\n")
        table = embed(torch.arange(len(theirs)))
        read = table[torch.tensor(ids(theirs, text))].detach().requires_grad_()
        talk = torch.cat([table[torch.tensor(opening)], read, table[torch.tensor(closing)]]).unsqueeze(0)
        (gradient,) = torch.autograd.grad(1.3 * model(inputs_embeds=talk, use_cache=False).logits[0, 0], read)
        texts = [
            "" if tokenizer.convert_ids_to_tokens(v) in SPECIAL_TOKENS else tokenizer.decode([v])
            for v in range(len(tokenizer))
        ]
        pieces = [list(table[torch.tensor(ids(theirs, text), dtype=torch.long)].detach()) for text in texts]
        pieces[tokenizer.eos_token_id] = [table[closing[0]].detach()]
        slots = min(3, max(map(len, pieces)))
        assert slots == (3 if pair == "finer" else 1)
        dense = token_gradient(share, gradient, pieces, slots)
        for start in range(len(response)):
            sequence = Sequence(tuple(prompt_ids(tokenizer)), (), 0, 64, objective.reward_model.chat_frame(MESSAGES))
            (evaluation,) = objective.evaluate([Request(sequence, torch.tensor(response), start)])
            ours = evaluation.factors.reward_embedding @ objective.reward_model.table.weight.T
            torch.testing.assert_close(ours, dense[start:], rtol=0, atol=1e-9)


def test_tokenizers_that_cut_alike_read_alike() -> None:
    """The same vocabulary in another order: what aligning gives, bit for bit."""
    theirs = tiny_tokenizer(shuffle=5)
    size = len(WORDS)
    own = EmbeddingTable(torch.randn(size, 6, dtype=torch.float64), 3.0)
    alignment = align(WORDS, theirs, size, size)
    aligned = aligned_table(alignment, own, WORDS, theirs)
    end, closing = WORDS.eos_token_id, theirs.eos_token_id
    cross = CrossTokenizer(WORDS, theirs, size, own, [end], closing)
    texts = [i for i in range(size) if i == end or WORDS.convert_ids_to_tokens(i) not in SPECIAL_TOKENS]
    assert torch.equal(cross.table.weight[texts], aligned.weight[texts])
    assert cross.table.scale == 3.0
    assert cross.single == pytest.approx(len(texts) / size)
    for text in RESPONSES:
        tokens = torch.tensor([*ids(WORDS, text), end])
        reading = cross.read(tokens)
        assert torch.equal(reading.tokens, alignment.partner[tokens])
        gradient = torch.randn(len(tokens), 6, dtype=torch.float64)
        for position in range(len(tokens)):
            assert reading.first(position) == position
            assert torch.equal(reading.rows(gradient[position:], position, position), gradient[position:])


def test_an_end_token_is_read_as_the_templates_and_special_tokens_are_not() -> None:
    cross = reward_of("finer").cross
    assert cross is not None
    start, end = (WORDS.get_vocab()[t] for t in ("<|start|>", "<|end|>"))
    twelve = ids(WORDS, "12")
    reading = cross.read(torch.tensor([*twelve, start, *twelve, end]))
    letters = ids(FINER, "1212")
    assert reading.tokens.tolist() == [*letters, FINER.eos_token_id]
    rows = in_one(reading.rows(torch.eye(5, dtype=torch.float64), 0, 0), cross.slots)
    expected = [[1, 1, 0, 0, 0], [0] * 5, [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert rows.tolist() == expected
    # In the middle it ends nothing.
    assert cross.read(torch.tensor([end, *twelve])).tokens.tolist() == ids(FINER, "12")


@pytest.mark.parametrize("pair", PAIRS)
def test_cached_prefixes_change_nothing(pair: str) -> None:
    """Responses that grow, branch and shrink, whose last token is read otherwise when the next one is there."""
    tokenizer, _ = PAIRS[pair]
    rng = random.Random(0)
    kept = objective_of(pair, gradient_cache=False)
    assert kept.reward_model.supports_prefix_cache
    frame = kept.reward_model.chat_frame(MESSAGES)

    def new() -> Sequence:
        return Sequence(tuple(prompt_ids(tokenizer)), (), 0, 64, frame)

    sequence = new()
    response = ids(tokenizer, "the ans is 12")
    words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    for _ in range(12):
        cut = rng.randrange(len(response))
        response = [*response[:cut], *rng.choices(words, k=rng.randrange(1, 5))]
        if rng.random() < 0.3:
            response.append(tokenizer.eos_token_id)
        tokens, start = torch.tensor(response), rng.randrange(len(response))
        fresh = objective_of(pair, gradient_cache=False)
        (ours,), (theirs,) = (o.evaluate([Request(s, tokens, start)]) for o, s in ((kept, sequence), (fresh, new())))
        assert ours.reward == pytest.approx(theirs.reward, abs=1e-10)
        torch.testing.assert_close(ours.factors.reward_embedding, theirs.factors.reward_embedding, rtol=0, atol=1e-10)
        candidates = [rng.choices(words, k=3)]
        for prefix in (tokens[:start], tokens):
            one = kept.prefix_rewards([sequence], [prefix], candidates)
            other = fresh.prefix_rewards([new()], [prefix], candidates)
            assert one[0] == pytest.approx(other[0], abs=1e-10)
        response = [i for i in response if i != tokenizer.eos_token_id] or words[:1]


# Byte-level tokenizers, whose tokens can be parts of a character


def byte_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


BYTES = byte_tokenizer([("Ã", "©"), ("c", "a"), ("t", "Ġ"), ("Ġ", "a"), ("ä", "½")])
OTHER_BYTES = byte_tokenizer([("a", "f"), ("Ġ", "c"), ("ä", "½"), ("ä½", "ł"), ("©", "t"), ("a", "t")])
TABLE = EmbeddingTable(torch.randn(len(OTHER_BYTES), 4, dtype=torch.float64), 1.0)
ACROSS = CrossTokenizer(BYTES, OTHER_BYTES, len(BYTES), TABLE, [BYTES.eos_token_id], OTHER_BYTES.eos_token_id)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BYTES) - 1), min_size=1, max_size=12))
def test_every_token_of_any_response_is_shared_out_wholly(tokens: list[int]) -> None:
    """Also of bytes that are no text."""
    reading = ACROSS.read(torch.tensor(tokens))
    assert reading.spans is not None
    text = BYTES.decode(tokens, skip_special_tokens=True)
    ends = tokens[-1] == BYTES.eos_token_id
    assert reading.tokens.tolist() == ids(OTHER_BYTES, text) + [OTHER_BYTES.eos_token_id] * ends
    total = torch.zeros(len(reading.tokens), dtype=torch.float64)
    total.index_add_(0, reading.spans.index.flatten(), reading.spans.share.flatten())
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    firsts = [reading.first(position) for position in range(len(tokens))]
    assert firsts == sorted(firsts)
    gradient = torch.randn(len(reading.tokens), 4, dtype=torch.float64)
    for position, first in enumerate(firsts):
        whole = reading.rows(gradient, 0, 0)[position:]
        assert torch.equal(reading.rows(gradient[first:], position, first), whole)


def test_tokens_of_one_character_share_it_and_those_that_are_none_have_no_embedding() -> None:
    word = [*ids(BYTES, "ca"), *ids(BYTES, "f"), BYTES.get_vocab()["Ã"], BYTES.get_vocab()["©"], *ids(BYTES, "t")]
    reading = ACROSS.read(torch.tensor(word))
    assert [OTHER_BYTES.convert_ids_to_tokens(i) for i in reading.tokens.tolist()] == ["c", "af", "Ã", "©t"]
    rows = in_one(reading.rows(torch.eye(4, dtype=torch.float64), 0, 0), ACROSS.slots)
    expected = [[1, 0.5, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.5, 0.25], [0, 0, 0.5, 0.25], [0, 0, 0, 0.5]]
    assert rows.tolist() == expected
    assert not ACROSS.table.weight[BYTES.get_vocab()["Ã"]].any()
    pieces = TABLE.weight[[OTHER_BYTES.get_vocab()["Ã"], OTHER_BYTES.get_vocab()["©"]]]
    assert torch.equal(ACROSS.table.weight[BYTES.get_vocab()["Ã©"]], pieces.flatten())


# Whole decodes


@pytest.mark.parametrize("proposal", ["dto", "first_order", "prefix_reward", "guided"])
@pytest.mark.parametrize("pair", PAIRS)
def test_answers_have_the_rewards_of_their_text_in_batches_as_alone(pair: str, proposal: str) -> None:
    tokenizer, theirs = PAIRS[pair]
    model, reward = shared_language_model("llama"), shared_reward_model("qwen3")
    chats = [list(MESSAGES), [{"role": "user", "content": "at 3 + 4 = ?"}]]
    config = nf.NablaConfig(
        proposal=proposal, max_new_tokens=10, max_iters=3, entropy_threshold=0.1, confidence_threshold=0.99
    )

    def answers(prompts: Any, **changes: Any) -> nf.NablaOutput:
        return nf.generate(model, tokenizer, reward, theirs, prompts, config.replace(**changes))

    together = answers(chats)
    for chat, text, tokens, value in zip(chats, together.texts, together.sequences, together.rewards, strict=True):
        ends = tokenizer.eos_token_id in tokens.tolist()
        assert ends or len(tokens) == 10
        assert value == pytest.approx(own_reward(reward, theirs, chat, text), abs=1e-9)
    alone = answers(chats[:1])
    assert alone.texts[0] == together.texts[0]
    assert answers(chats, gradient_cache=False).texts == together.texts
    if proposal == "dto":
        assert together.stats.totals.gradient_evaluations > 0


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("insert", [None, "\n"], ids=["text", "inserted"])
def test_process_rewards_equal_those_of_the_text(pair: str, insert: str | None) -> None:
    """Scores of steps are read where the reward model's own tokens end them."""
    tokenizer, theirs = PAIRS[pair]
    model = tiny_process_model("llama")
    separator = "?" if insert else "\n"
    process = nf.ProcessReward(model, separator, aggregation="product", insert_after=insert)
    language_model = LanguageModel(shared_language_model("llama"), tokenizer)
    ours = ProcessRewardModel(process, theirs, language_model, tokenizer, [tokenizer.eos_token_id])
    frame = ours.chat_frame(MESSAGES)
    text = "at 12\nit is 24\n36"
    read = ids(theirs, "at 12\n?it is 24\n?36?" if insert else text + "\n")
    response = torch.tensor([*ids(tokenizer, text), tokenizer.eos_token_id])
    talk = ours.conversation(frame, response)
    assert talk.ids.tolist() == [*prompt_ids(theirs), *read]
    whole = torch.tensor([[*prompt_ids(theirs), *read]])
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0].log_softmax(-1)[:, 1]
    at = [i for i, token in enumerate(whole[0].tolist()) if token == ids(theirs, separator)[0]]
    at = [i for i in at if i >= len(frame.opening)]
    (reward,), _ = ours.rewards([talk])
    assert float(reward) == pytest.approx(float(logits[at].sum().exp()), abs=1e-10)
    reading = ours.reading(response, frame)
    gradient = torch.randn(len(talk), 3, dtype=torch.float64)
    rows = ours.response_rows(reading, talk, gradient, 0, -len(frame.opening))
    assert ours.cross is not None
    assert rows.shape == (len(response), 3 * ours.cross.slots)
    rows = in_one(rows, ours.cross.slots)
    assert not rows[-1].any()
    shown = torch.tensor([i for i in range(len(frame.opening), len(talk)) if not (i in at and (insert or i == at[-1]))])
    share = shares_by_letters(tokenizer, theirs, response[:-1].tolist())
    torch.testing.assert_close(rows[:-1], share @ gradient[shown], rtol=0, atol=1e-12)


# What is told and refused


def test_what_crossing_means_is_told_once() -> None:
    with pytest.warns(
        UserWarning, match=r"has 54.1% of the tokens of tokenizer, which has 100.0% of its .* approximation \("
    ) as told:
        reward_of("finer")
    assert len(told) == 1


def test_tokenizers_that_do_not_say_where_tokens_are_or_lose_text_are_refused() -> None:
    size = len(WORDS)
    own = EmbeddingTable(torch.randn(size, 6, dtype=torch.float64), 1.0)
    slow = tiny_tokenizer()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(ValueError, match="reward_tokenizer is a Slow, which does not tell where"):
        CrossTokenizer(WORDS, slow, size, own, [], 0)
    blind = tiny_tokenizer()
    blind.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match=r"leaves out \d+ of \d+ characters of texts that its own tokens spell"):
        CrossTokenizer(WORDS, blind, size, own, [], 0)


def test_a_reward_tokenizer_without_any_end_is_refused() -> None:
    language_model = LanguageModel(shared_language_model("llama"), WORDS)
    endless = tiny_tokenizer(missing=FINE_MISSING, chat_template=None)
    endless.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an end token"):
        RewardModel(shared_reward_model("qwen3"), endless, language_model, WORDS)


def test_prompts_of_token_ids_are_read_as_text_unless_a_template_wrote_them() -> None:
    ours = reward_of("finer")
    frame = ours.prompt_frame(ids(WORDS, "what is 12"))
    assert frame.opening.ids.tolist() == ids(FINER, "what is 12")
    assert frame.closing.ids.tolist() == ids(FINER, "<|end|>\n")
    # One that no attribute of the tokenizer names, and its end token.
    for token in ("<|start|>", "<|end|>"):
        with pytest.raises(ValueError, match=rf"token ids hold {re.escape(repr(token))}.*as a chat"):
            ours.prompt_frame([*ids(WORDS, "at"), WORDS.get_vocab()[token]])


def test_what_does_not_fit_the_reward_model_is_left_out_with_a_warning() -> None:
    ours = reward_of("finer")
    frame = ours.chat_frame(MESSAGES)
    ours.context_length = len(frame.opening) + len(frame.closing) + 4
    tokens = torch.tensor(ids(WORDS, "the ans"))
    with pytest.warns(UserWarning, match=r"a response of 3 tokens has 7 in the reward model, which has room for 4"):
        reading = ours.reading(tokens, frame)
    assert reading.tokens.tolist() == ids(FINER, "the ")
    rows = reading.rows(torch.eye(4, dtype=torch.float64), 0, 0)
    assert rows.sum(1).tolist() == [3, 1, 0]
    assert len(ours.conversation(frame, reading)) == ours.context_length
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.reading(tokens[:2], frame)


def test_a_marked_reward_tokenizer_of_another_vocabulary_is_aligned_where_it_can_be() -> None:
    """Nine tenths are enough for tokens to be read one by one."""
    language_model = LanguageModel(shared_language_model("llama"), WORDS)
    ours = RewardModel(shared_reward_model("qwen3"), MARKED, language_model, WORDS)
    assert ours.cross is None
    assert ours.reading_table is ours.table


def test_the_order_of_pieces_counts_and_the_last_slot_has_the_mean_of_the_rest() -> None:
    theirs = PAIRS["finer"][1]
    own = EmbeddingTable(torch.randn(len(theirs), 4, dtype=torch.float64), 1.0)
    cross = CrossTokenizer(WORDS, theirs, len(WORDS), own, [], theirs.eos_token_id)
    slots = cross.table.weight.view(len(WORDS), 3, 4)
    letter = {c: own.weight[theirs.get_vocab()[c]] for c in "what2"}
    two, what = slots[WORDS.get_vocab()["2"]], slots[WORDS.get_vocab()["what"]]
    assert torch.equal(two, torch.stack([letter["2"], *torch.zeros(2, 4, dtype=torch.float64)]))
    torch.testing.assert_close(what, torch.stack([letter["w"], letter["h"], (letter["a"] + letter["t"]) / 2]))
