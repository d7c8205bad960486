"""A budget for each problem: what it lets methods do, that it is kept, and what a run with one says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from test_evaluation_methods import CONFIG, PROMPTS, TOKENIZER, batch, outline
from test_evaluation_report import record, rendered
from test_evaluation_runner import make_task, plan_of

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.cli import eval_tables
from nabla_fast.evaluation import methods, report, runner
from nabla_fast.evaluation.budget import Budget
from nabla_fast.evaluation.grading import MathGrader
from nabla_fast.evaluation.journal import Journal
from nabla_fast.evaluation.records import require_records
from nabla_fast.evaluation.runner import Arm, describe, evaluate, make_plan, open_run
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.search_config import SearchConfig
from nabla_fast.testing.models import shared_language_model, shared_reward_model
from nabla_fast.whole_files import write_json

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = SearchConfig(search_separator="", search_tokens=2, search_width=2)
SAMPLED = ("best-of-n", "self-consistency")
MANY = CONFIG.replace(max_rollouts=50)


@pytest.fixture(scope="module")
def loaded():
    return methods.load(shared_language_model("llama"), TOKENIZER, shared_reward_model("qwen3"), TOKENIZER)


def within(loaded, method, text, *, prompts=PROMPTS, size=8, config=MANY):
    own = replace(batch(loaded, prompts, 0, size=size, config=config), budget=Budget.parse(text), search=SEARCH)
    return methods.METHODS[method](own)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("calls=200", "calls", 200.0), ("flops=1e12", "flops", 1e12), (" seconds = 0.5 ", "seconds", 0.5)],
)
def test_a_budget_is_read(text, kind, amount):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "200", "calls", "calls=", "calls=0", "calls=-3", "tokens=3", "flops=inf", "calls=x"]
)
def test_what_is_no_budget_is_an_error(text):
    with pytest.raises(ValueError, match=r"--budget is .*; give calls=N, flops=X or seconds=S"):
        Budget.parse(text)


def test_units_are_begun_while_less_is_spent():
    budget = Budget("calls", 10)
    assert budget.within([]) == 0
    assert budget.within([4, 5, 1, 7]) == 3
    assert budget.within([4, 5, 2, 7]) == 3
    assert budget.within([30, 1]) == 1


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("text", ["calls=1", "calls=30", "flops=3e6"])
def test_samples_are_the_first_ones_that_fit(loaded, method, text):
    """Against as many samples as could be needed, added up one by one."""
    budget = Budget.parse(text)
    scored = method == "best-of-n"
    many = batch(loaded, PROMPTS, 24)
    groups = methods.draw(many, CONFIG, scored=scored)
    for size in (1, 5, 8, 64):
        counts = []
        for i, (answer, group) in enumerate(zip(within(loaded, method, text, size=size), groups, strict=True)):
            kept, spent = 0, 0.0
            while spent < budget.amount:
                one = group.records[kept]
                work = many.flops(i, one, len(group.sequences[kept]), conversations=one.reward_calls)
                kept, spent = kept + 1, spent + (work if budget.kind == "flops" else one.model_calls)
            first = group.first(kept)
            counts.append(kept)
            assert answer.stats.counters() == first.stats.counters()
            if scored:
                assert answer.reward == pytest.approx(first.rewards[baselines.best(first)])
                tokens = first.sequences[baselines.best(first)]
                assert answer.text == loaded.pair.tokenizer.decode(tokens, skip_special_tokens=True)
            cost = answer.flops if budget.kind == "flops" else answer.stats.model_calls
            assert cost == pytest.approx(spent)
        assert text == "calls=1" or max(counts) > 2, "too small a budget to tell anything"


@pytest.mark.parametrize("text", ["calls=60", "flops=4e6"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_an_answer_with_a_budget_does_not_depend_on_the_batch(loaded, method, text):
    together = outline(within(loaded, method, text))
    alone = [outline(within(loaded, method, text, prompts=[prompt]))[0] for prompt in PROMPTS]
    few = outline(within(loaded, method, text, size=2))
    for one, two, three in zip(together, alone, few, strict=True):
        assert one[:2] == two[:2] == three[:2]
        assert one[2] == pytest.approx(two[2]) == pytest.approx(three[2])
        assert one[3] == two[3] == three[3]


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in methods.ONE_N])
@pytest.mark.parametrize("kind", ["calls", "flops"])
def test_more_budget_is_spent_and_rewards_do_not_fall(loaded, method, kind):
    """The most that a unit costs here is known: a sample, a step of 4 candidates and the rest of a response, a
    position whose selection, 3 DTO steps and rollout are one."""
    budgets = (1, 20, 60, 150) if kind == "calls" else (1, 1e6, 3e6, 7e6)
    unit = {
        "calls": {"nabla": 6 + 1 + 4 * 5, "first-order": 6 + 1 + 4, "beam-search": 4 * 3 + 6 + 1}.get(method, 7 + 6)
    }
    before = [(-1.0, -1e9)] * len(PROMPTS)
    for amount in budgets:
        answers = within(loaded, method, f"{kind}={amount}")
        for i, answer in enumerate(answers):
            cost = answer.flops if kind == "flops" else answer.stats.model_calls
            assert cost >= before[i][0]
            if method not in ("self-consistency", "beam-search"):
                assert answer.reward >= before[i][1] - 1e-9
            if kind == "calls":
                assert cost < amount + unit[kind]
            if method in (*SAMPLED, *methods.SEARCHES):
                assert cost >= amount, "there was always more to do"
            before[i] = cost, answer.reward or 0.0
    assert any(cost > budgets[0] for cost, _ in before)


def test_nabla_with_a_budget_is_nabla_cut_short(loaded):
    """A great budget changes nothing, and the least leaves the first response."""
    plain = methods.nabla(batch(loaded, PROMPTS, 50))
    for ours, theirs in zip(within(loaded, "nabla", "calls=1e9"), plain, strict=True):
        assert ours.to_dict() | {"seconds": 0, "phases": 0} == theirs.to_dict() | {"seconds": 0, "phases": 0}
    for ours, theirs in zip(within(loaded, "nabla", "calls=1"), plain, strict=True):
        assert ours.stats.rollouts == 1
        assert ours.stats.gradient_evaluations == 0
        assert ours.reward == pytest.approx(theirs.reward_before)
    assert [a.stats.rollouts for a in within(loaded, "nabla", "calls=1e9", config=CONFIG.replace(max_rollouts=2))] == [
        min(2, a.stats.rollouts) for a in plain
    ]


@pytest.mark.parametrize("method", methods.ONE_N)
def test_what_draws_once_does_so_whatever_the_budget(loaded, method):
    plain = methods.METHODS[method](batch(loaded, PROMPTS, 1, config=MANY))
    assert outline(within(loaded, method, "calls=1000")) == outline(plain)


@pytest.mark.parametrize("method", ["best-of-n", "nabla", "beam-search", "mcts"])
def test_seconds_are_those_of_the_problem(loaded, method):
    (answer,) = within(loaded, method, "seconds=0.2", prompts=PROMPTS[:1])
    (least,) = within(loaded, method, "seconds=1e-6", prompts=PROMPTS[:1])
    assert answer.stats.rollouts > least.stats.rollouts
    if method != "nabla":  # which may have nothing left to try
        assert sum(answer.stats.seconds.values()) >= 0.2
        assert sum(least.stats.seconds.values()) < 0.2


def test_a_plan_with_a_budget_has_arms_without_n():
    budget = Budget("calls", 50)
    names = ["greedy", "best-of-n", "nabla", "guided", "mcts"]
    plan = make_plan(names, None, [0, 1], nf.NablaConfig(), budget=budget)
    assert plan.arms == tuple(Arm(name, int(name in ("greedy", "guided"))) for name in names)
    assert [arm.label for arm in plan.arms] == names
    assert plan.config.max_rollouts == runner.MOST_SAMPLES
    assert plan.runs(1) == list(plan.arms[1:])
    limited = make_plan(["nabla"], None, [0], nf.NablaConfig(), budget=budget, max_rollouts=5)
    assert (limited.arms, limited.config.max_rollouts) == ((Arm("nabla", 0),), 5)
    with pytest.raises(
        ValueError, match=r"--n is 4, 8, but --budget is calls=50, which says how many .*; leave out one"
    ):
        make_plan(names, [4, 8], [0], nf.NablaConfig(), budget=budget)
    with pytest.raises(ValueError, match="--n is empty; give whole numbers"):
        make_plan(names, None, [0], nf.NablaConfig())


def test_a_piece_has_as_many_problems_as_are_decoded_together():
    plan = make_plan(
        ["best-of-n", "beam-search", "mcts"],
        None,
        [0],
        nf.NablaConfig(),
        batch_size=8,
        budget=Budget("calls", 9),
        search=SEARCH,
    )
    assert [plan.sequences(arm) for arm in plan.arms] == [1, 4, 1]
    sizes = Counter(
        (p.arm.method, len(p.problems)) for p in runner.pieces(plan, 0, make_task(list("abcdefgh")).problems, ())
    )
    assert sizes == {("best-of-n", 8): 1, ("beam-search", 2): 4, ("mcts", 8): 1}
    assert [
        plan_of(methods=["beam-search", "mcts", "likeliest"], n=[6]).sequences(Arm(m, 6))
        for m in ("beam-search", "mcts", "likeliest")
    ] == [6, 1, 1]


def test_a_run_with_another_budget_or_other_steps_is_another_run(tmp_path):
    task = make_task(["a"])

    def told(text=None, names=("mcts",), search=SEARCH, **more):
        budget = None if text is None else Budget.parse(text)
        plan = make_plan(names, None if budget else [4], [0], nf.NablaConfig(), budget=budget, search=search, **more)
        return describe(plan, task, {})

    open_run(tmp_path / "a", told("calls=30"), []).close()
    open_run(tmp_path / "a", told("calls=30"), []).close()
    for changed, message in (
        (told("calls=40"), r"budget\.amount was 30\.0, is 40\.0"),
        (told("flops=30"), r'budget\.kind was "calls", is "flops"'),
        (told("calls=30", max_rollouts=3), r"budget\.max_rollouts was 100000, is 3"),
        (told("calls=30", search=SearchConfig(search_width=3)), r"search\.search_separator was"),
        (told(), "budget is left out"),
    ):
        with pytest.raises(ValueError, match=message):
            open_run(tmp_path / "a", changed, [])
    assert "budget" not in told()
    assert "search" not in told("calls=30", names=("nabla",)), "runs of earlier versions could not be continued"


class Interrupted(BaseException):
    """Ends a run as a signal does."""


@pytest.mark.parametrize("budget", [None, Budget("calls", 40)], ids=str)
def test_a_run_that_is_continued_ends_like_one_that_is_not(loaded, tmp_path, budget):
    problems = [Problem(text, ({"role": "user", "content": text},), "1") for text in PROMPTS]
    task = Task("made up", problems, MathGrader(), {"name": "made up", "problems": 3, "fingerprint": "x"})
    names = ("best-of-n", "likeliest", "beam-search", "mcts")
    plan = make_plan(names, None if budget else [3], [0], CONFIG, batch_size=4, budget=budget, search=SEARCH)

    def run(out, on_record=lambda _: None):
        with open_run(out, describe(plan, task, {}), plan.keys(problems)) as journal:
            return evaluate(loaded, task, plan, journal, on_record=on_record)

    def told(records):
        rows = [
            {k: v for k, v in one.items() if k not in ("seconds", "phases", "reward", "reward_before")}
            for one in records
        ]
        return sorted(rows, key=lambda one: (one["method"], one["problem"]))

    whole, left = run(tmp_path / "whole"), 10
    while left:
        heard = []

        def after_five(one, heard=heard):
            heard.append(one)
            if len(heard) == 5:
                raise Interrupted

        try:
            again, left = run(tmp_path / "cut", after_five), 0
        except Interrupted:
            left -= 1
    assert told(again) == told(whole)
    assert len(whole) == 12
    assert all(one["error"] is None for one in whole)
    assert {one.get("budget") for one in whole} == {None if budget is None else "calls=40"}


@pytest.fixture
def finished(tmp_path):
    """A run of three methods on 20 problems, as if its budget had been 50 calls."""
    directory = tmp_path / "run"
    directory.mkdir()
    arms = [Arm("greedy", 1), Arm("best-of-n", 0), Arm("likeliest", 0), Arm("beam-search", 0), Arm("nabla", 0)]
    told = {arm.label: {"method": arm.method, "n": arm.n} for arm in arms}
    task = {"name": "made up", "problems": 20, "fingerprint": "f"}
    config = {"task": task, "arms": told, "seeds": [0], "models": {}, "settings": {}}
    write_json(directory / runner.CONFIG, {**config, "budget": {"kind": "calls", "amount": 50.0}})
    with Journal(directory / runner.RESULTS) as journal:
        for arm in arms:
            more = {"model_calls": 20 + 10 * len(arm.method), "rollouts": 3, "flops": 1e9, "seconds": 0.5}
            if arm.method == "beam-search":
                more |= {"reward_before": None}
            for i in range(20):
                right = i < 10 + (arm.method == "nabla")
                journal.append(record(arm, 0, f"p{i:02d}", right, budget="calls=50", **more))
    return directory


def test_the_report_of_a_budget(finished):
    summary = report.write_report(finished)
    assert summary["budget"] == {"kind": "calls", "amount": 50.0}
    assert summary["arms"]["nabla"]["budget_share"] == pytest.approx(70 / 50)
    assert summary["against_best_of_n"] == {}
    against = summary["against_best_of_n_with_budget"]
    assert set(against) == {"likeliest", "beam-search", "nabla"}
    assert against["nabla"]["mean"] == pytest.approx(0.05)
    assert against["likeliest"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert summary["arms"]["likeliest"]["rejection_rate"] is not None
    assert "rejection_rate" not in summary["arms"]["beam-search"]
    text = rendered(eval_tables.show_summary, summary)
    for expected in ("made up, budget calls=50", "of", "140%", "with the same budget", "+5.0 (", "likeliest"):
        assert expected in text
    assert "equal cost" not in text
    assert all((finished / name).stat().st_size > 5_000 for name in ("accuracy_over_model_calls.png", "reward.png"))


def test_a_budget_that_nobody_wrote_is_no_run_of_ours(finished):
    config = json.loads((finished / runner.CONFIG).read_text())
    for wrong in ("calls=50", {"kind": "calls"}, {"kind": "tokens", "amount": 3}, {"kind": "calls", "amount": 0}):
        write_json(finished / runner.CONFIG, {**config, "budget": wrong})
        with pytest.raises(ValueError, match="did not write"):
            report.read_run(finished)
    with pytest.raises(ValueError, match="has the \"budget\" '3', which is not text"):
        require_records(finished / "x", [record(Arm("nabla", 0), 0, "p", True, budget=3)])


def test_a_proposal_that_vllm_cannot_draw_is_refused_before_anything_runs():
    config = nf.NablaConfig(rollout_backend="vllm")
    plan = partial(make_plan, n=[2], seeds=[0], config=config)
    plan(["likeliest", "nabla"])
    with pytest.raises(ValueError, match="proposal is 'guided'"):
        plan(["guided"])
