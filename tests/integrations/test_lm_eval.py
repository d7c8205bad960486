"""lm-evaluation-harness with the model `nabla_fast`.

An installation made before the entry point was declared does not have it, so the model is registered by its import
here, and the entry point is read from pyproject.toml.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from itertools import islice
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model, model_registry  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import nabla_fast as nf  # noqa: E402
from nabla_fast import baselines  # noqa: E402
from nabla_fast.demo import arithmetic as bundled  # noqa: E402
from nabla_fast.evaluation import arithmetic  # noqa: E402
from nabla_fast.integrations.lm_eval import NablaLM  # noqa: E402
from nabla_fast.integrations.lm_eval.arguments import read  # noqa: E402
from nabla_fast.integrations.lm_eval.generation import configured  # noqa: E402
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model, tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = list(islice(arithmetic.problems("test"), 8))
BOXED = re.compile(r"\\boxed\{(-?\d+)\}")
# Hot enough that some answers are wrong.
SETTINGS = {"max_rollouts": 2, "rollout_temperature": 0.8, "max_iters": 5}
CONFIG = bundled.CONFIG.replace(max_rollouts=2, rollout=nf.Sampling(0.8, 0.95), max_iters=5)
TASK = r"""
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/sums.jsonl}, cache_dir: DIR/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n\n"], do_sample: false, temperature: 0.0, max_gen_toks: 64}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: '\\boxed\{(-?\d+)\}'}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tasks(tmp_path):
    lines = [json.dumps({"question": problem.question, "answer": str(problem.answer)}) for problem in PROBLEMS]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    (tmp_path / "sums.yaml").write_text(TASK.replace("DIR", str(tmp_path)))
    return tmp_path


@pytest.fixture(scope="module")
def models():
    return (*bundled.load_policy(dtype="float32"), *bundled.load_reward(dtype="float32"))


@pytest.fixture
def tiny():
    tokenizer = tiny_tokenizer()
    models = {"pretrained": tiny_language_model("llama"), "reward": tiny_reward_model("qwen3")}
    settings = {"max_new_tokens": 12, "max_rollouts": 3, "max_iters": 4, "gradient_threshold": "none"}

    def make(**others):
        return NablaLM(**models, tokenizer=tokenizer, reward_tokenizer=tokenizer, **{**settings, **others})

    return make


def evaluate(tasks, model_args, **others):
    return lm_eval.simple_evaluate(
        model="nabla_fast",
        model_args=model_args,
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        **others,
    )


def answers(results):
    samples = sorted(results["samples"]["sums"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def requests(contexts, **gen_kwargs):
    return [Instance("generate_until", {}, (context, gen_kwargs), i) for i, context in enumerate(contexts)]


def test_a_task_is_answered_and_graded_as_generate_answers_it(tasks, models):
    results = evaluate(tasks, "pair=arithmetic," + ",".join(f"{name}={value}" for name, value in SETTINGS.items()))
    out = nf.generate(*models, [problem.question for problem in PROBLEMS], CONFIG)
    assert answers(results) == out.texts
    found = [BOXED.search(text) for text in out.texts]
    right = [hit is not None and int(hit[1]) == p.answer for hit, p in zip(found, PROBLEMS, strict=True)]
    assert 0 < sum(right) < len(right), "all answers are alike, so grading is not tested"
    assert results["results"]["sums"]["exact_match,boxed"] == pytest.approx(sum(right) / len(right))
    told = results["config"]["nabla_fast"]
    assert told["counters"] == out.stats.totals.counters()
    assert told["settings"]["rollout"]["temperature"] == 0.8
    assert results["config"]["model_num_parameters"] == models[0].num_parameters()


@pytest.mark.parametrize("method", ["greedy", "best-of-n", "likeliest"])
def test_other_methods_answer_as_they_do_elsewhere(tasks, models, method):
    chosen = {"method": method, **({"n": 3} if method == "best-of-n" else {})}
    results = evaluate(tasks, {"pair": "arithmetic", **SETTINGS, **chosen}, limit=4, batch_size=2)
    prompts = [problem.question for problem in PROBLEMS[:4]]
    if method == "greedy":
        expected = baselines.greedy(*models, prompts, CONFIG)
    elif method == "best-of-n":
        expected = baselines.best_of_n(*models, prompts, 3, CONFIG)
    else:
        expected = nf.generate(*models, prompts, CONFIG.replace(proposal="likeliest"))
    assert answers(results) == expected.texts
    assert results["config"]["nabla_fast"]["counters"] == expected.stats.totals.counters()


def test_greedy_is_greedy_whatever_the_proposal(tasks, models):
    # "guided" would choose tokens by the reward of prefixes, which is no greedy decoding.
    prompts = [problem.question for problem in PROBLEMS[:4]]
    plain = baselines.greedy(*models, prompts, CONFIG)
    results = evaluate(tasks, {"pair": "arithmetic", **SETTINGS, "method": "greedy", "proposal": "guided"}, limit=4)
    assert answers(results) == plain.texts
    told = results["config"]["nabla_fast"]
    assert told["method"] == "greedy"
    assert told["counters"] == plain.stats.totals.counters()
    assert told["counters"]["gradient_evaluations"] == told["counters"]["rejections"] == 0


def test_answers_are_kept_in_lm_evals_cache(tasks):
    arguments = {"pair": "arithmetic", **SETTINGS}
    first = evaluate(tasks, arguments, limit=2, use_cache=str(tasks / "kept"))
    again = evaluate(tasks, arguments, limit=2, use_cache=str(tasks / "kept"))
    assert answers(again) == answers(first)
    assert again["config"]["nabla_fast"]["counters"]["rollouts"] == 0


def test_the_real_command_line(tasks):
    command = [sys.executable, "-m", "nabla_fast.integrations.lm_eval", "run", "--model", "nabla_fast"]
    command += ["--model_args", "pair=arithmetic,max_rollouts=2", "--tasks", "sums", "--include_path", str(tasks)]
    command += ["--apply_chat_template", "--batch_size", "4", "--limit", "3", "--output_path", str(tasks / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tasks, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "|sums" in result.stdout
    (file,) = (tasks / "out").rglob("results_*.json")
    told = json.loads(file.read_text())["config"]["nabla_fast"]
    assert told["settings"]["max_batch_size"] == 4
    assert told["counters"]["rollouts"] >= 3
    assert "nabla: 3 answers took" in result.stderr


def test_lm_eval_finds_the_model_by_name_and_by_the_entry_point(monkeypatch):
    assert get_model("nabla_fast") is NablaLM
    text = (ROOT / "pyproject.toml").read_text()
    value = re.search(r'\[project.entry-points."lm_eval.models"\]\nnabla_fast = "(.+)"\n', text)[1]
    point = EntryPoint("nabla_fast", value, "lm_eval.models")
    assert point.load() is NablaLM
    # As releases of lm-eval that read entry points have it before the module is imported.
    monkeypatch.setitem(model_registry._objs, "nabla_fast", point)
    importlib.reload(sys.modules["nabla_fast.integrations.lm_eval"])
    assert get_model("nabla_fast") is NablaLM


def test_importing_nabla_fast_does_not_import_lm_eval():
    code = "import sys, nabla_fast, nabla_fast.integrations; nabla_fast.generate; sys.exit('lm_eval' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_batches_give_what_single_requests_give_in_the_order_asked(tiny):
    contexts = ["what is 3 times 4", "is", "the user = 12 +", "on it"]
    own = [{"max_gen_toks": 9}, {"max_gen_toks": 5}, {"max_gen_toks": 9}, {"max_gen_toks": 5}]
    asked = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(zip(contexts, own, strict=True))]
    lm = tiny(batch_size=4)
    together = lm.generate_until(asked)
    alone = [tiny(batch_size=1).generate_until([request])[0] for request in asked]
    assert together == alone
    assert len(set(together)) == len(together)
    assert lm.totals.counters() == nf.Stats(lm.records).totals.counters()


def test_a_chat_reaches_the_reward_model_as_it_is(tiny):
    chat = [{"role": "system", "content": "use 12"}, {"role": "user", "content": "what is 3 times 4"}]
    lm = tiny()
    context = lm.apply_chat_template(chat)
    (text,) = lm.generate_until(requests([context]))
    arguments = lm.arguments
    expected = nf.generate(
        arguments.pretrained, arguments.tokenizer, arguments.reward, arguments.reward_tokenizer, [chat], lm.settings
    )
    assert text == expected.texts[0]
    ids, frame = lm._prompt(context)
    assert frame.opening.ids.tolist() == list(ids)
    # For another tokenizer the chat is formatted anew, and not the prompt's ids looked up.
    other = NablaLM(
        pretrained=arguments.pretrained, tokenizer=arguments.tokenizer, reward=arguments.reward,
        reward_tokenizer=tiny_tokenizer(shuffle=3, missing=("tim",)),
    )  # fmt: skip
    assert len(other._prompt(other.apply_chat_template(chat))[1].opening.ids) > len(ids)


def test_raw_text_is_continued(tiny):
    lm = tiny()
    ids, frame = lm._prompt("is it 12")
    assert lm.tokenizer.decode(ids) == "is it 12"
    assert frame.opening.ids.tolist() == list(ids)
    assert lm._prompt("")[0] == (lm.prefix_token_id,)


def test_special_tokens_are_added_to_raw_text_alone(tiny):
    lm = tiny()
    start = lm.tokenizer.convert_tokens_to_ids("<|start|>")
    processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", start)])
    lm.tokenizer.backend_tokenizer.post_processor = processor
    chat = lm.apply_chat_template([{"role": "user", "content": "is it 12"}])
    assert lm._prompt("is it 12")[0][0] == start
    assert lm.tokenizer.decode(lm._prompt(chat)[0]) == chat


def test_stop_strings_end_an_answer_and_are_cut_off(tiny):
    (free,) = tiny().generate_until(requests(["what is 3 times 4"]))
    stop = free[3:5]
    assert free.index(stop) <= 3
    lm = tiny()
    (text,) = lm.generate_until(requests(["what is 3 times 4"], until=[stop, "never"]))
    assert text == free[: free.index(stop)]
    assert lm.records[0].finish_reason == "stop"
    assert lm.settings.stop_strings == ()
    asked = requests(["is"], until=stop)
    lm.generate_until(asked)
    assert asked[0].args[1] == {"until": stop}, "the request itself was changed"


def test_thoughts_are_cut_off(tiny):
    asked = requests(["what is 3 times 4"])
    (free,) = tiny().generate_until(asked)
    tokens = tiny().tokenizer(free, add_special_tokens=False)["input_ids"]
    assert tokens[3] not in tokens[4:], "the fourth token is not the last of its kind"
    rest = tiny().tokenizer.decode(tokens[4:]).lstrip()
    for mark in (tokens[3], str(tokens[3])):
        assert tiny(think_end_token=mark).generate_until(asked) == [rest]
    text = tiny().tokenizer.decode(tokens[3:5])
    assert tiny(think_end_token=text).generate_until(asked) == [free.split(text)[-1].lstrip()]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens"])
def test_lengths_are_obeyed(tiny, name):
    lm = tiny(max_rollouts=1)
    lm.generate_until(requests(["what is 3 times 4"], **{name: 3}))
    lm.generate_until(requests(["what is 3 times 4"]))
    lm.generate_until(requests(["what is 3 times 4"], **{name: 4000}))
    assert [record.generated_tokens for record in lm.records] == [3, 12, 12]
    assert read({"pair": "arithmetic", "preset": "aime"}).longest == 3072
    assert read({"pair": "arithmetic"}).longest is None


def test_repeats_get_noise_of_their_own(tiny):
    (request,) = requests(["what is 3 times 4"])
    assert len(set(tiny(rollout_temperature=2).generate_until([request] * 3))) == 3


def test_log_likelihoods_are_those_of_lm_evals_own_model(tiny):
    lm = tiny()
    hf = HFLM(pretrained=lm.arguments.pretrained, tokenizer=lm.arguments.tokenizer)
    pairs = [("what is", " 12"), ("what is", " a user"), ("", "is")]
    choices = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    texts = [Instance("loglikelihood_rolling", {}, ("what is 3 times 4",), 0)]
    assert lm.loglikelihood(choices) == hf.loglikelihood(choices)
    assert lm.loglikelihood_rolling(texts) == hf.loglikelihood_rolling(texts)


def test_sampling_is_the_settings_unless_the_task_is_to_count():
    config = nf.NablaConfig()
    greedy = {"do_sample": False, "temperature": 0.0}
    assert configured(config, greedy, task_sampling=False).rollout == config.rollout
    for said in (greedy, {"do_sample": False, "temperature": 0.7}, {"temperature": 0}, {}):
        own = configured(config, said, task_sampling=True)
        assert own.rollout == own.resample == nf.Sampling(temperature=0.0)
    hot = configured(config, {"temperature": 0.9, "top_k": 0, "top_p": 0.8}, task_sampling=True)
    assert hot.rollout == nf.Sampling(temperature=0.9, top_p=0.8)
    assert hot.resample == config.resample
    with pytest.raises(ValueError, match="do_sample is True, and temperature is 0"):
        configured(config, {"do_sample": True, "temperature": 0.0}, task_sampling=True)
    with pytest.raises(ValueError, match=r"num_beams is 4 in the task's generation_kwargs.*use until, max_gen_toks"):
        configured(config, {"num_beams": 4}, task_sampling=False)


def test_arguments_are_converted():
    given = {"pretrained": 7, "reward": "r", "preset": "aime", "seed": "3", "learning_rate": 1, "batch_size": "auto"}
    read_in = read(
        {
            **given, "confidence_threshold": "none", "stop_strings": "END", "eos_token_ids": 2, "compile": "true",
            "chat_template_kwargs": '{"enable_thinking": false}', "resample": {"temperature": 0.2}, "rollout_top_k": 5,
            "step_separator": "\\n", "think_end_token": "</think>",
        }
    )  # fmt: skip
    config = read_in.config
    assert (read_in.pretrained, read_in.step_separator) == ("7", "\n")
    assert (config.gradient_threshold, config.max_new_tokens, config.max_batch_size) == (8.0, 3072, 32)
    assert (config.seed, config.confidence_threshold, config.compile) == (3, None, True)
    assert (config.stop_strings, config.eos_token_ids) == (("END",), (2,))
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert (config.rollout, config.resample) == (nf.Sampling(0.6, 0.95, 5), nf.Sampling(0.2))
    assert read_in.passed_on == {"think_end_token": "</think>"}
    assert read({"pair": "arithmetic", "batch_size": 6}).config == bundled.CONFIG.replace(max_batch_size=6)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"max_iter": 3}, ValueError, "max_iter'.*max_iters is meant.*pretrained, reward.*max_rollouts.*rollout_top_p"),
        ({"zzz": 3}, ValueError, r"'zzz', which nabla_fast does not know\. It takes pretrained"),
        ({"max_iters": "many"}, TypeError, "max_iters must be int, got 'many'"),
        ({"seed": True}, TypeError, "seed must be int, got True"),
        ({"task_sampling": 1}, TypeError, "task_sampling must be bool, got 1"),
        ({"max_iters": -1}, ValueError, "max_iters must be at least 0"),
        ({"method": "beam"}, ValueError, "method is 'beam'; use one of nabla, likeliest"),
        ({"preset": "gsm8k"}, ValueError, "preset is 'gsm8k'; use one of math500, aime, amc"),
        ({"pair": "llama"}, ValueError, "pair is 'llama'; use one of smollm2, arithmetic"),
        ({"pretrained": "x"}, ValueError, "pair is arithmetic, which brings its own models; leave out pretrained"),
        ({"n": 4}, ValueError, "n is 4, and method is nabla"),
        ({"method": "guided", "proposal": "dto"}, ValueError, "method is guided, and proposal is 'dto'"),
        ({"batch_size": 0}, ValueError, "must be at least 1, got 0"),
        ({"batch_size": "big"}, ValueError, "batch_size is 'big'; give a number of answers"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        read({"pair": "arithmetic", **wrong})


def test_missing_models_are_named():
    with pytest.raises(ValueError, match="pretrained is missing; give a GGUF file"):
        read({})
    with pytest.raises(ValueError, match="reward is missing"):
        read({"pretrained": "x"})


def test_the_bundled_pair_is_asked_for_arithmetic_alone():
    lm = NablaLM(pair="arithmetic")
    with pytest.raises(ValueError, match="was not trained for 'Who are you"):
        lm.generate_until(requests([lm.apply_chat_template([{"role": "user", "content": "Who are you?"}])]))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2; the model nabla_fast runs in one process"):
        NablaLM(pair="arithmetic")
