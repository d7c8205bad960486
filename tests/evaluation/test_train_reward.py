"""Training a reward model: what it learns, that it can be stopped anywhere, and what the command leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli
from nabla_fast.cli import train_reward
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.models.loading import load_reward_model
from nabla_fast.reward_training import card, examples, training
from nabla_fast.reward_training.examples import Answer, Example, Swap
from nabla_fast.reward_training.losses import Pointer, Row, accumulate, reward_loss
from nabla_fast.reward_training.training import Recipe, draw_rows, train
from nabla_fast.testing.models import save_pair, shared_language_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
CHAT = ({"role": "user", "content": "what is it"},)
RECIPE = Recipe(steps=40, batch_size=4, learning_rate=1e-2, rank=4)
GOOD, BAD = 9, 10


class Grader:
    """An answer is right if it has an even number of letters."""

    def check(self, problem_id, reference):
        pass

    def answer(self, problem_id, response):
        return response

    def right(self, problem_id, reference, answer):
        return len(answer) % 2 == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny policy on disk."""
    model, _ = save_pair(tmp_path_factory.mktemp("base"), dtype=torch.float32)
    return str(model)


@pytest.fixture(scope="module")
def labelled():
    """Answers that are right if their second token is `GOOD`, wrong if it is `BAD`."""
    found = []
    for i in range(12):
        first, last = 11 + i % 5, 20 + i % 7
        right = i % 2 == 0
        drawn = Answer((first, GOOD if right else BAD, last), right)
        other = Answer((first, BAD if right else GOOD, last), not right, 1)
        found.append(Example(f"p{i}", CHAT, (drawn, other), (Swap(0, 1, (GOOD,), (BAD,)),)))
    return found


def precision(adapter):
    """How often the reward's gradient at the second token points at `GOOD`, and its scores of right and wrong."""
    model, tokenizer = load_reward_model(adapter, dtype="float32")
    table = model.get_input_embeddings().weight
    rows = draw_rows(EXAMPLES, frames(tokenizer), Recipe(batch_size=12, answers=2), 0)
    found, scores = [], {True: [], False: []}
    for row in rows:
        embeds = table[list(row.ids)].detach()[None].requires_grad_()
        score = model(inputs_embeds=embeds).logits[0, 0]
        scores[row.right].append(float(score.detach()))
        (gradient,) = torch.autograd.grad(score, embeds)
        for pointer in row.pointers:
            gains = table[[*pointer.better, *pointer.worse]] @ gradient[0, pointer.position]
            found.append(int(gains.argmax()) < len(pointer.better))
    return sum(found) / len(found), scores


EXAMPLES: list[Example] = []


def frames(tokenizer):
    return {e.problem: training.conversation_frame(tokenizer, e.chat) for e in EXAMPLES}


@pytest.fixture(scope="module")
def trained(base, labelled, tmp_path_factory):
    EXAMPLES[:] = labelled
    steps = {}
    folder = tmp_path_factory.mktemp("trained")
    # As many threads as in the tests, which is not yet so here: sums of another order give other bits.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    adapter = train(base, TOKENIZER, labelled, folder, RECIPE, on_step=steps.__setitem__)
    torch.set_num_threads(before)
    return adapter, steps


def test_it_learns_to_judge_and_to_point(trained):
    adapter, steps = trained
    assert list(steps) == list(range(1, 41))
    assert steps[40].judge < 0.3 * steps[1].judge
    assert steps[40].point < 0.5 * steps[1].point
    assert steps[40].prefix < 0.5 * steps[1].prefix
    pointed, scores = precision(adapter)
    assert pointed == 1
    assert min(scores[True]) > max(scores[False])


def test_without_the_loss_of_the_gradient_nothing_points(base, labelled, tmp_path):
    steps, recipe = {}, Recipe(steps=2, batch_size=4, point=0, prefix=0)
    train(base, TOKENIZER, labelled, tmp_path, recipe, on_step=steps.__setitem__)
    assert {(step.point, step.prefix) for step in steps.values()} == {(None, None)}


def test_a_training_that_is_stopped_comes_to_the_same_weights(trained, base, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)

    class StoppedError(Exception):
        pass

    def stop(step, loss):
        if step == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(base, TOKENIZER, labelled, tmp_path, RECIPE, on_step=stop)
    numbers = []
    adapter = train(base, TOKENIZER, labelled, tmp_path, RECIPE, on_step=lambda step, loss: numbers.append(step))
    assert numbers == list(range(7, 41))  # the seventh was taken, and not kept
    one, other = (torch.load(f.parent / training.STATE)["parameters"] for f in (adapter, trained[0]))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    train(base, TOKENIZER, labelled, tmp_path, RECIPE, on_step=lambda *_: pytest.fail("nothing is left to do"))
    with pytest.raises(ValueError, match="holds a training with steps 40, not 41; use another folder"):
        train(base, TOKENIZER, labelled, tmp_path, replace(RECIPE, steps=41))


def test_the_pointing_loss_is_the_first_order_gain_of_the_score():
    """In float64: its value by hand, and its derivative by the parameters by finite differences."""
    torch.manual_seed(0)
    # Not Llama, whose norms are in float32 whatever the weights are.
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, num_labels=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config._attn_implementation = "eager"
    model = GPT2ForSequenceClassification(config).double().eval()
    sharpness = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    rows = [
        Row((3, 4, 5, 6, 7), True, None, (Pointer(2, (8,), (5, 9)),)),
        Row((3, 4, 9), False, 2),
    ]
    loss = reward_loss(model, rows, sharpness=sharpness, prefix=0.7, point=0.9)
    table = model.get_input_embeddings().weight
    embeds = table[[3, 4, 5, 6, 7]].detach()[None].requires_grad_()
    score = model.score(model.transformer(inputs_embeds=embeds).last_hidden_state)[0, -1, 0]
    (gradient,) = torch.autograd.grad(score, embeds)
    gains = (table[[8, 5, 9]] @ gradient[0, 2]).detach() * sharpness.detach().exp()
    assert float(loss.point) == pytest.approx(float(-gains.log_softmax(0)[0]), rel=1e-10)
    assert float(loss.total) == pytest.approx(float(loss.judge + 0.7 * loss.prefix + 0.9 * loss.point), rel=1e-6)
    weight = model.transformer.h[0].attn.c_proj.weight
    (derivative,) = torch.autograd.grad(loss.point, weight)
    step = 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[1, 2] += sign * step
            with torch.enable_grad():
                values.append(float(reward_loss(model, rows, sharpness=sharpness, prefix=0, point=1).point))
            weight[1, 2] -= sign * step
    assert float(derivative[1, 2]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(base, labelled, at_once):
    torch.manual_seed(0)
    model, tokenizer = training._adapted(base, RECIPE, "cpu")
    model.double().eval()
    chats = {e.problem: training.conversation_frame(tokenizer, e.chat) for e in labelled}
    rows = draw_rows(labelled, chats, Recipe(batch_size=4, answers=2), 0)
    rows.insert(0, Row(rows[0].ids, False))
    assert not rows[0].pointers
    assert rows[1].pointers
    parameters = [p for p in model.parameters() if p.requires_grad]
    sharpness = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    whole = reward_loss(model, rows, sharpness=sharpness, prefix=0.7, point=0.9)
    expected = torch.autograd.grad(whole.total, [*parameters, sharpness])
    found = accumulate(model, rows, sharpness=sharpness, prefix=0.7, point=0.9, at_once=at_once)
    for parameter, gradient in zip([*parameters, sharpness], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)  # Llama's norms are float32
    for name in ("total", "judge", "prefix", "point"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name).detach(), rtol=1e-5, atol=1e-6)


def test_examples_are_what_the_grader_says_and_are_kept(tmp_path):
    config = nf.NablaConfig(
        max_new_tokens=6,
        entropy_threshold=None,
        confidence_threshold=None,
        candidates=3,
        rollout=nf.Sampling(temperature=1.0),
    )
    chats = [({"role": "user", "content": text},) for text in ("what is 3", "is it on", "the user")]
    task = Task("tiny", [Problem(f"p{i}", chat, "1") for i, chat in enumerate(chats)], Grader(), {})
    model = shared_language_model("llama")
    told = []
    found = examples.collect(model, TOKENIZER, task, config, tmp_path, forks=2, batch_size=2, on_problems=told.append)
    assert told == [0, 2, 1]
    swaps = 0
    for example in found:
        for answer in example.answers:
            text = TOKENIZER.decode(list(answer.tokens), skip_special_tokens=True)
            assert answer.right == (len(text) % 2 == 0)
        labels = {(a.fork, a.tokens[a.fork]): a.right for a in example.answers[1:]}
        drawn = example.answers[0]
        for swap in example.swaps:
            swaps += 1
            labels[swap.position, drawn.tokens[swap.position]] = drawn.right
            assert {labels[swap.position, token] for token in swap.better} == {True}
            assert {labels[swap.position, token] for token in swap.worse} == {False}
    assert swaps
    # A line that was cut off is drawn anew; the others stay.
    file = tmp_path / examples.EXAMPLES
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:40])
    told.clear()
    again = examples.collect(model, TOKENIZER, task, config, tmp_path, forks=2, batch_size=2, on_problems=told.append)
    assert told == [2, 1]
    assert again == found
    other = Task("tiny", [Problem("p0", chats[1], "1")], Grader(), {})
    with pytest.raises(ValueError, match="none of this task"):
        examples.collect(model, TOKENIZER, other, config, tmp_path, forks=2)
    # Examples that were drawn in another way are not taken for these.
    with pytest.raises(ValueError, match="drawn with forks 2, not 3"):
        examples.collect(model, TOKENIZER, task, config, tmp_path, forks=3)
    with pytest.raises(ValueError, match="drawn with max_new_tokens 6, not 7"):
        examples.collect(model, TOKENIZER, task, config.replace(max_new_tokens=7), tmp_path, forks=2)


def test_answers_of_one_kind_are_refused(base, labelled, tmp_path):
    right = [Example(e.problem, e.chat, (Answer((5,), True),), ()) for e in labelled]
    with pytest.raises(ValueError, match="all answers are right"):
        train(base, TOKENIZER, right, tmp_path, RECIPE)


def test_a_step_has_right_and_wrong_answers(labelled):
    answers = (*labelled[0].answers, *(Answer((11, BAD, i), False, 1) for i in range(20, 26)))
    (example,) = [Example("p", CHAT, answers, labelled[0].swaps)]
    frame = training.conversation_frame(TOKENIZER, CHAT)
    rows = draw_rows([example], {"p": frame}, Recipe(answers=3), 0)
    assert [row.right for row in rows] == [True, False, False]
    opening = len(frame.opening)
    assert rows[0].pointers == (Pointer(opening + 1, (GOOD,), (BAD,)),)
    assert [row.prefix for row in rows] == [None, opening + 1, opening + 1]
    assert rows[0].ids == (*frame.opening, 11, GOOD, 20, *frame.closing)


def test_the_command(base, tmp_path):
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"what is {i}", "answer": "1"}) + "\n" for i in range(6)))

    def invoke(*arguments):
        return CliRunner().invoke(cli.app, ["train-reward", *map(str, arguments)], env={"COLUMNS": "200"})

    found = invoke("--model", base, "--task", problems, "--out", tmp_path / "out", "--problems", 6)
    assert "give fewer" in str(found.exception)
    found = invoke(
        *("--model", base, "--task", problems, "--out", tmp_path / "out", "--problems", 4, "--validation", 2),
        *("--steps", 1, "--max-new-tokens", 4),
    )  # fmt: skip
    # Nothing that a tiny model writes is right.
    assert "all answers are wrong" in str(found.exception)
    assert "--model is missing" in str(invoke("--task", problems, "--out", tmp_path / "other").exception)
    problems.write_text(problems.read_text().splitlines(keepends=True)[0] * 6)
    found = invoke(
        *("--model", base, "--task", problems, "--out", tmp_path / "same", "--problems", 4, "--validation", 2),
    )
    assert "all 2 after them ask what is trained on" in str(found.exception)


def test_the_command_leaves_an_adapter_with_a_card(base, tmp_path, monkeypatch):
    texts = ("what is 3", "is it on", "the user", "what is it", "what is 3")  # one is asked twice
    chats = [({"role": "user", "content": text},) for text in texts]
    whole = Task("tiny", [Problem(f"p{i}", chat, "1") for i, chat in enumerate(chats)], Grader(), {"name": "tiny"})
    monkeypatch.setattr("nabla_fast.evaluation.tasks.load_task", lambda *_, **__: whole)
    arguments = [
        *("train-reward", "--model", base, "--task", "tiny", "--out", tmp_path, "--problems", 3, "--validation", 2),
        *("--steps", 2, "--rows", 2, "--max-new-tokens", 6, "--confidence-threshold", "none", "--max-iters", 1),
    ]  # fmt: skip
    found = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert found.exit_code == 0, (found.output, found.exception)
    output = " ".join(found.output.split())  # whatever the terminal's width
    assert "use it as --reward-model" in output
    assert "since the same is asked in training: 1 problem" in output
    adapter = tmp_path / training.ADAPTER
    model, _ = load_reward_model(adapter)
    assert model.config.num_labels == 1
    figures = json.loads((adapter / card.FIGURES).read_text())
    assert figures["before"] is None
    assert figures["after"]["answers"] == 1
    assert figures["after"]["recommendation"]["why"] in output
    text = (adapter / card.CARD).read_text()
    for part in (
        "base_model:",
        "| precision at 1 of likeliest |",
        figures["after"]["recommendation"]["why"],
        '"steps": 2',
    ):
        assert part in text
    # Again, with a reward model to compare with: nothing is drawn, trained or probed anew.
    before = (tmp_path / examples.EXAMPLES).read_text()
    again = [*arguments, "--reward-model", adapter]
    probed = []
    original = train_reward._figures
    monkeypatch.setattr(train_reward, "_figures", lambda *given: probed.append(given[0][2]) or original(*given))
    found = CliRunner().invoke(cli.app, list(map(str, again)), env={"COLUMNS": "200"})
    assert found.exit_code == 0, (found.output, found.exception)
    assert len(probed) == 1
    assert json.loads((adapter / card.FIGURES).read_text())["after"] == figures["after"]
    # With another setting both are.
    found = CliRunner().invoke(cli.app, [*map(str, again), "--forks", "1"], env={"COLUMNS": "200"})
    assert "drawn with forks 3, not 1" in str(found.exception)
    found = CliRunner().invoke(cli.app, [*map(str, again), "--reward-coeff", "2"], env={"COLUMNS": "200"})
    assert found.exit_code == 0, (found.output, found.exception)
    assert len(probed) == 3
    assert (tmp_path / examples.EXAMPLES).read_text() == before
    assert "| figure | before | trained |" in (adapter / card.CARD).read_text()
