"""Why a response ended: by the stop rule, in a decode, in samples and in the records of an evaluation."""

from __future__ import annotations

import pytest

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.evaluation import methods, records
from nabla_fast.evaluation.grading import MathGrader
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.rollout import StopRule
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model, tiny_tokenizer

CONFIG = nf.NablaConfig(max_new_tokens=4, max_rollouts=2, max_iters=2, gradient_threshold=None)


class Letters:
    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize(
    ("response", "reason"),
    [((), None), ((3, 4), None), ((3, 4, 5), "length"), ((3, 1), "stop"), ((3, 4, 1), "stop"), ((6, 7), "stop")],
)
def test_an_end_token_or_a_stop_string_at_the_limit_is_a_stop(response, reason):
    rule = StopRule(frozenset({1}), ("gh",), Letters())
    sequence = Sequence((9, 9), (), 0, 3)
    assert rule.ended(sequence, response) == (reason is not None)
    assert reason is None or rule.finish_reason(sequence, response) == reason


def test_a_criterion_is_a_stop_and_is_not_asked_for_the_reason():
    asked = []
    rule = StopRule(frozenset(), criteria=(lambda ids: bool(asked.append(ids)) or ids == [9, 2],))
    sequence = Sequence((9,), (), 0, 5)
    assert rule.ended(sequence, (2,))
    assert not rule.ended(sequence, (3,))
    assert rule.finish_reason(sequence, (2,)) == "stop"
    assert asked == [[9, 2], [9, 3]]


@pytest.fixture(scope="module")
def models():
    tokenizer = tiny_tokenizer()
    return tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer


def test_each_sequence_says_why_it_ended(models):
    plain = nf.generate(*models, "is it on", CONFIG)
    (record,) = plain.stats.sequences
    assert record.finish_reason == record.to_dict()["finish_reason"] == "length"
    assert plain.stats.totals.finish_reason is None
    assert "finish_reason" not in record.counters()
    ends = CONFIG.replace(eos_token_ids=(int(plain.sequences[0][0]),), max_rollouts=1)
    cut = nf.generate(*models, "is it on", ends)
    assert len(cut.sequences[0]) == 1
    assert cut.stats.sequences[0].finish_reason == "stop"


def test_the_chosen_sample_says_why_it_ended(models):
    loaded = methods.load(*models, CONFIG)
    problem = Problem("p", ({"role": "user", "content": "is it on"},), "1")
    drawn = baselines.sample(
        loaded.pair, *loaded.pair.prompts([problem.chat], CONFIG), 3, CONFIG, scored=True, batch_size=2
    )
    assert [record.finish_reason for record in drawn[0].records] == ["length"] * 3
    for name, method in methods.METHODS.items():
        batch = methods.make_batch(loaded, [problem], [0], MathGrader(), CONFIG, 2, 2)
        assert method(batch)[0].to_dict()["finish_reason"] == "length", name


def test_a_record_without_a_finish_reason_can_be_read_and_one_with_another_cannot(tmp_path):
    counters = dict.fromkeys((*records.COUNTERS, "flops", "seconds"), 1)
    told = {"method": "greedy", "n": 1, "seed": 0, "problem": "p", "error": None, "right": True, "text": "1"}
    told |= {**counters, "reward": None, "reward_before": None, "phases": {}}
    for reason in ({}, {"finish_reason": None}, {"finish_reason": "stop"}, {"finish_reason": "length"}):
        records.require_records(tmp_path / "r", [told | reason])
    with pytest.raises(ValueError, match='has the "finish_reason" \'abort\', which is not "stop", "length" or null'):
        records.require_records(tmp_path / "r", [told | {"finish_reason": "abort"}])
