"""What is found out about tokenizers is kept for as long as they are as they were."""

from __future__ import annotations

import gc

import pytest
import torch
from tokenizers import pre_tokenizers

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models import checks, tokenizer_facts
from nabla_fast.models.tokenizer_facts import remembered, vocabulary_size
from nabla_fast.models.vocabulary import agreement
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model, tiny_tokenizer


def counted(answers: list[int]):
    def find() -> int:
        answers.append(len(answers))
        return answers[-1]

    return find


def test_an_answer_is_kept_until_a_tokenizer_changes() -> None:
    one, other, asked = tiny_tokenizer(), tiny_tokenizer(), []
    find = counted(asked)
    assert [remembered(one, other, "what", find) for _ in range(3)] == [0, 0, 0]
    assert remembered(one, other, "else", find) == 1
    assert remembered(other, one, "what", find) == 2
    other.add_tokens(["qqq"])
    assert remembered(one, other, "what", find) == 3
    one.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert remembered(one, other, "what", find) == 4
    assert remembered(one, other, "what", find) == 4


def test_what_may_change_unseen_is_asked_every_time() -> None:
    class Slow:
        is_fast = False

    find = counted([])
    slow, one = Slow(), tiny_tokenizer()
    assert [remembered(slow, one, "what", find) for _ in range(2)] == [0, 1]
    assert [remembered(one, one, "what", find, keep=lambda found: found > 2) for _ in range(3)] == [2, 3, 3]

    class Rule:
        def pre_tokenize(self, text: object) -> None:
            pass

    one.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Rule())
    assert [remembered(one, one, "what", find) for _ in range(2)] == [4, 5]


def test_it_goes_with_its_tokenizers() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    remembered(one, other, "what", lambda: 0)
    assert len(tokenizer_facts._FOUND[one]) == 1
    del other
    gc.collect()
    assert len(tokenizer_facts._FOUND[one]) == 0


def test_a_new_token_is_counted() -> None:
    tokenizer = tiny_tokenizer()
    before = vocabulary_size(tokenizer)
    assert before == max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens(["qqq"])
    assert vocabulary_size(tokenizer) == before + 1


def test_an_agreement_is_the_callers_own_and_warns_every_time() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    size = len(one)
    agreement(one, other, size, size).partner[0] = -1
    assert agreement(one, other, size, size).identical
    few = tiny_tokenizer(missing=(" a",))
    for _ in range(2):
        with pytest.warns(UserWarning, match="have no partner"):
            agreement(one, few, size, size)


def test_a_second_call_takes_each_fingerprint_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    models = (tiny_language_model("llama"), tokenizer, tiny_reward_model("llama"), other)
    first = make_pair(*models, nf.NablaConfig())
    looked: list[int] = []
    fingerprint = checks.fingerprint
    monkeypatch.setattr(checks, "fingerprint", lambda model: looked.append(id(model)) or fingerprint(model))
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: pytest.fail("the vocabulary is known"))
    second = make_pair(*models, nf.NablaConfig())
    assert len(looked) == len(set(looked)) == 2
    assert torch.equal(first.reward_model.alignment.partner, second.reward_model.alignment.partner)
    # A change between two calls is seen.
    looked.clear()
    with torch.no_grad():
        models[0].get_input_embeddings().weight.mul_(2)
    make_pair(*models, nf.NablaConfig())
    assert len(looked) > 2
