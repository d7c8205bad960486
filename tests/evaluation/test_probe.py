"""The probe: every candidate is what a decode would come to with it, and the figures are what the forks say."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli
from nabla_fast.evaluation import methods, probe_report
from nabla_fast.evaluation.grading import GradingError
from nabla_fast.evaluation.probe import Candidate, Drawn, Fork, Probe, probe
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.generate import run, stop_rule
from nabla_fast.models.chat import as_chats
from nabla_fast.testing.models import save_pair, shared_language_model, shared_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
PROMPTS = ["what is 3 times 4", "is it on", "the user", "what is it"]
CONFIG = nf.NablaConfig(
    max_new_tokens=8,
    max_iters=3,
    learning_rate=3.0,
    reward_coeff=10.0,
    candidates=3,
    gradient_threshold=None,
    entropy_threshold=None,
    confidence_threshold=None,
    rollout=nf.Sampling(temperature=1.0),
    resample=nf.Sampling(temperature=1.0),
    seed=3,
)


class Grader:
    """An answer is right if it has an even number of letters."""

    def check(self, problem_id, reference):
        pass

    def answer(self, problem_id, response):
        return response

    def right(self, problem_id, reference, answer):
        return len(answer) % 2 == 0


@pytest.fixture(scope="module")
def models():
    return methods.load(shared_language_model("llama"), TOKENIZER, shared_reward_model("qwen3"), TOKENIZER)


def task(prompts=PROMPTS):
    problems = [Problem(text, tuple(as_chats(text)[0]), "1") for text in prompts]
    return Task("tiny", problems, Grader(), {"name": "tiny"})


@pytest.mark.parametrize("proposal", ["dto", "first_order", "prefix_reward", "likeliest"])
def test_a_choice_is_rolled_out_as_a_decode_does(models, proposal):
    """The first fork of an answer is where a decode with two rollouts makes its only proposal, if any."""
    found = probe(models, task(), CONFIG, forks=1)
    config = CONFIG.replace(proposal=proposal, max_rollouts=2)
    ids, frames = models.pair.prompts([problem.chat for problem in task().problems], config)
    decoded = run(models.pair, ids, frames, config, stop_rule(models.pair, config))
    assert [fork.problem for fork in found.forks] == PROMPTS
    tried = 0
    for fork, stats, drawn in zip(found.forks, decoded.stats.sequences, found.answers, strict=True):
        chosen = fork.of(proposal)
        first = next((r for r in stats.revisions), None)
        if first is None or first.position != fork.position:
            assert chosen.token == fork.present.token
            continue
        tried += 1
        assert (first.old_token, first.new_token) == (fork.present.token, chosen.token)
        assert first.old_reward == pytest.approx(fork.present.reward) == pytest.approx(drawn.reward)
        assert first.new_reward == pytest.approx(chosen.reward)
    assert tried, "no proposal had another token"


def test_candidates_are_the_present_token_the_likeliest_and_what_was_chosen(models):
    found = probe(models, task(), CONFIG, forks=2)
    assert len(found.forks) > len(PROMPTS)
    for fork in found.forks:
        tokens = [candidate.token for candidate in fork.candidates]
        assert len(set(tokens)) == len(tokens) >= 4
        assert set(fork.chosen.values()) <= set(tokens)
        others = [candidate.log_prob for candidate in fork.candidates[1:4]]
        assert others == sorted(others, reverse=True)
        assert fork.chosen["likeliest"] == tokens[1]
        assert max(candidate.log_prob for candidate in fork.candidates) == pytest.approx(
            torch.tensor(fork.confidence).log().item(), abs=1e-5
        )
        assert fork.calls["likeliest"] == 0
        assert fork.calls["first_order"] == 4  # one gradient
        assert fork.calls["dto"] >= 4
        assert 3 <= fork.calls["prefix_reward"] <= 4  # the likeliest three and the present token
        for candidate in fork.candidates[1:]:
            assert candidate.right is not None
            assert 0 <= candidate.tokens < CONFIG.max_new_tokens


def test_the_batch_size_changes_nothing(models):
    one, four = (probe(models, task(), CONFIG, forks=2, batch_size=size) for size in (1, 4))
    found = {(fork.problem, fork.position): fork for fork in four.forks}
    assert len(one.forks) == len(found)
    for fork in one.forks:
        other = found[fork.problem, fork.position]
        assert fork.chosen == other.chosen
        assert [c.token for c in fork.candidates] == [c.token for c in other.candidates]
        assert [c.reward for c in fork.candidates] == pytest.approx([c.reward for c in other.candidates])


def test_without_labels_the_grader_is_not_asked(models):
    class Silent:
        def __getattr__(self, name):
            raise AssertionError(name)

    asked = task()
    found = probe(models, Task(asked.name, asked.problems, Silent(), {}), CONFIG, forks=1, labels=False)
    assert {candidate.right for fork in found.forks for candidate in fork.candidates} == {None}
    told = probe_report.figures(found, labels=False)
    assert told["accuracy"] is None
    assert told["concordance"]["reward"] is None
    assert told["recommendation"]["why"].endswith("what the reward likes, not what is right.")


def test_an_answer_that_cannot_be_graded_counts_as_wrong_and_ends_nothing(models):
    class Fails(Grader):
        def right(self, problem_id, reference, answer):
            raise GradingError("no")

    asked = task()
    with pytest.warns(UserWarning, match="counts as wrong: no"):
        found = probe(models, Task(asked.name, asked.problems, Fails(), {}), CONFIG, forks=1)
    assert {candidate.right for fork in found.forks for candidate in fork.candidates} == {False}


def test_numbers_below_one_are_refused(models):
    with pytest.raises(ValueError, match="forks must be at least 1, got 0"):
        probe(models, task(), CONFIG, forks=0)


def fork(problem, present, others, chosen, calls=None):
    """A fork from (reward, right, prefix reward) of the present token 0 and of the others 1, 2, …"""
    candidates = [
        Candidate(i, -float(i + 1), prefix, reward, right, (i,), 5 * (i > 0))
        for i, (reward, right, prefix) in enumerate([present, *others])
    ]
    names = ("likeliest", "prefix_reward", "first_order", "dto")
    return Fork(
        problem, 2, 10, 0.4, tuple(candidates), dict(zip(names, chosen, strict=True)),
        calls or {"likeliest": 0, "prefix_reward": 3, "first_order": 4, "dto": 8}, dict.fromkeys(names, 0.5),
    )  # fmt: skip


def test_figures_by_hand():
    forks = [
        # Wrong; token 2 mends it and its reward is higher, token 1 does neither.
        fork("a", (0.0, False, 0.0), [(-1.0, False, 0.5), (1.0, True, 1.0)], (1, 2, 2, 0)),
        # Right; token 1 spoils it, which the reward sees; token 2 spoils it, which the reward does not see.
        fork("b", (0.0, True, 0.0), [(-1.0, False, 0.5), (1.0, False, 1.0)], (1, 2, 0, 1)),
        # Wrong, and nothing mends it.
        fork("b", (0.0, False, 0.0), [(-1.0, False, 0.5), (1.0, False, 1.0)], (1, 2, 0, 1)),
    ]
    answers = [Drawn("a", 0.0, False, (), 1), Drawn("b", 0.0, True, (), 2), Drawn("c", 0.0, False, (), 0)]
    told = probe_report.figures(Probe(answers, forks), labels=True)
    assert told["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert (told["forks"], told["mendable_forks"]) == (3, 1)
    mean = {name: own["precision_at_1"]["mean"] for name, own in told["proposals"].items()}
    assert mean == {"likeliest": 0, "prefix_reward": 1, "first_order": 1, "dto": 0, "guided": 1}
    # A problem counts once: "b" has lost half an answer a fork where the reward was wrong.
    gain = {name: own["gain"]["mean"] for name, own in told["proposals"].items()}
    assert gain == {"likeliest": 0, "prefix_reward": 0.25, "first_order": 0.5, "dto": 0, "guided": 0.25}
    over = {name: own["gain_over_control"]["mean"] for name, own in told["proposals"].items()}
    assert over == gain
    assert told["proposals"]["first_order"]["proposed"] == pytest.approx(1 / 3)
    # Four for the gradient, and for one proposal in three five tokens and a reward.
    assert told["proposals"]["first_order"]["model_calls"] == pytest.approx(4 + 6 / 3)
    assert told["proposals"]["guided"]["model_calls"] == 3
    assert told["mistakes"]["wrong_answers"] == 2
    assert told["mistakes"]["of_them_mendable"] == 1
    # Rewards: the pairs of "a" (1 of 2 tokens right) agree, of "b" one does and one does not.
    assert told["concordance"]["reward"]["mean"] == pytest.approx((1 + 0.5) / 2)


def test_guided_takes_what_the_reward_would_reject():
    forks = [fork("a", (2.0, True, 0.0), [(1.0, False, 1.0)], (1, 1, 0, 0))]
    told = probe_report.figures(Probe([Drawn("a", 2.0, True, (), 1)], forks), labels=True)
    assert told["proposals"]["prefix_reward"]["gain"]["mean"] == 0
    assert told["proposals"]["guided"]["gain"]["mean"] == -1


def many(chosen, judges=True):
    """Twenty wrong answers that token 2 mends."""
    good, bad = (1.0, -1.0) if judges else (-1.0, 1.0)
    forks = [fork(f"p{i}", (0.0, False, 0.0), [(bad, False, 0.5), (good, True, 1.0)], chosen) for i in range(20)]
    answers = [Drawn(f"p{i}", 0.0, False, (), 1) for i in range(20)]
    return probe_report.figures(Probe(answers, forks), labels=True)["recommendation"]


def test_recommendations():
    assert many((2, 2, 2, 2))["proposal"] == "likeliest"
    assert many((1, 2, 2, 2))["proposal"] == "prefix_reward", "the cheapest of those that gain as much"
    assert many((1, 0, 2, 2))["proposal"] == "first_order"
    assert many((1, 0, 0, 2))["proposal"] == "dto"
    assert many((1, 2, 2, 2), judges=False)["proposal"] is None
    assert "+100.0 points" in many((1, 0, 2, 2))["why"]
    assert probe_report.figures(Probe([], []), labels=True)["recommendation"]["proposal"] is None


def test_a_certain_difference_is_needed():
    """One fork in twenty at which the gradient is better says nothing."""
    forks = [fork(f"p{i}", (0.0, False, 0.0), [(1.0, True, 0.5), (1.0, True, 1.0)], (1, 1, 2, 2)) for i in range(19)]
    forks.append(fork("p19", (0.0, False, 0.0), [(-1.0, False, 0.5), (1.0, True, 1.0)], (1, 1, 2, 2)))
    found = probe_report.figures(Probe([Drawn(f.problem, 0, False, (), 1) for f in forks], forks), labels=True)
    assert found["proposals"]["first_order"]["gain_over_control"]["mean"] == pytest.approx(0.05)
    assert found["recommendation"]["proposal"] == "likeliest"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model, reward_model = save_pair(tmp_path_factory.mktemp("pair"), dtype=torch.float64)
    return "--model", str(model), "--reward-model", str(reward_model), "--dtype", "float64"


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["probe", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command(pair, tmp_path):
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"what is {i}", "answer": i}) + "\n" for i in range(4)))
    fast = ("--max-new-tokens", 5, "--max-iters", 2, "--confidence-threshold", "none", "--entropy-threshold", "none")
    arguments = (*pair, "--task", problems, *fast, "--forks", 1)
    shown = invoke(*arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    output = " ".join(shown.output.split())  # whatever the terminal's width
    for words in ("likeliest", "prefix_reward", "first_order", "dto", "guided", "4 forks of 4 answers"):
        assert words in output
    written = json.loads((tmp_path / "out" / probe_report.RESULTS).read_text())
    assert len(written["all_forks"]) == 4
    assert (tmp_path / "out" / probe_report.PLOT).stat().st_size > 5_000
    printed = invoke(*arguments, "--json")
    told = json.loads(printed.stdout)
    assert told["proposals"].keys() == written["proposals"].keys()
    assert told["settings"]["max_new_tokens"] == 5
    again = invoke(*arguments, "--out", tmp_path / "out")
    assert "holds a probe already" in str(again.exception)


def test_a_task_is_needed(pair):
    assert "--task is missing" in str(invoke(*pair).exception)
