"""Every example of README.md and docs/ runs with the bundled pair, or tests/docs_examples.py says why it does not."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import make_hub_kernels
import pytest
import typer
import urllib3
from docs_examples import NOT_RUN, PAGES, ROOT, SHELLS, SHOWN, arguments, blocks, examples
from served import serving
from transformers import AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli
from nabla_fast.demo import arithmetic

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

QUESTION = "Compute 64 * 4 + 505 - 34 * 7 - 15."
POLICY, REWARD = arithmetic.POLICY_PATH, arithmetic.REWARD_PATH
SERVER = "http://127.0.0.1:8000"
# What a reader would put in, and sizes at which a page takes seconds.
BOUND = {
    "--model PATH": f"--model {POLICY}",
    "--reward-model PATH --step-separator": "--reward-model process --step-separator",
    "--reward-model PATH": f"--reward-model {REWARD}",
    'load_language_model("PATH or hub id"': f"load_language_model({str(POLICY)!r}",
    'load_reward_model("PATH or hub id")': f"load_reward_model({str(REWARD)!r})",
    '--prompt "..."': "--prompt 'Compute 47 * 8 + 125 - 36 * 4.'",
    "cuda:0": "cpu",
    "cuda:1": "cpu",
    # tests/test_smollm2.py has the other pair.
    "--pair smollm2": "--pair arithmetic",
    "--max-problems 100": "--max-problems 1 --max-new-tokens 24",
    "--split tuning": "--split tuning --max-problems 1 --max-new-tokens 24",
    "--best-of-n 8": "--best-of-n 2",
    "--n 2,4,8": "--n 2",
    "--seeds 0,1,2": "--seeds 0",
    "calls=200": "calls=50",
}
FILES = {
    "my_problems.jsonl": json.dumps({"prompt": QUESTION, "answer": "508"}),
    "FILE": QUESTION,
}
# Blocks that a page tells its reader to save.
SAVED = {"sums.jsonl": ("docs/guides/harness.md", '{"question"'), "sums.yaml": ("docs/guides/harness.md", "task: sums")}


@pytest.fixture(scope="module")
def models():
    return (*arithmetic.load_policy(), *arithmetic.load_reward())


@pytest.fixture(scope="module")
def server(models):
    with serving(models, arithmetic.CONFIG, name="arithmetic") as running:
        yield running


@pytest.fixture
def names(models):
    """What a page takes for granted, as the text around its blocks does."""
    model, tokenizer, reward_model, reward_tokenizer = models
    messages = [{"role": "user", "content": QUESTION}]
    formatted = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return {
        "nf": nf, "model": model, "tokenizer": tokenizer, "reward_model": reward_model,
        "reward_tokenizer": reward_tokenizer, "models": models, "config": arithmetic.CONFIG, "messages": messages,
        "inputs": tokenizer.apply_chat_template(messages, **formatted), "prompts": [QUESTION], "question": QUESTION,
        "path": POLICY, "reward_path": REWARD, "PATH": "process",
    }  # fmt: skip


# Several pages have the same commands, which are run once.
DONE: list[list[str]] = []
RUN = [page for page in PAGES if any(example.reason is None for example in examples(page))]


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run(page, names, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare(page)
    for example in examples(page):
        if example.reason is not None:
            continue
        text = example.text
        for placeholder, value in BOUND.items():
            text = text.replace(placeholder, value)
        if page == "docs/guides/serve.md":
            text = text.replace(SERVER, request.getfixturevalue("server").url)
        try:
            if example.language == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile("\n" * (example.line - 1) + text, str(ROOT / page), "exec"), names)
            elif arguments(text) not in DONE:
                run(arguments(text), monkeypatch)
                DONE.append(arguments(text))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{example.line} fails: {text}") from error


def prepare(page):
    """What the page tells its reader to have."""
    for name, content in FILES.items():
        Path(name).write_text(f"{content}\n", encoding="utf-8")
    for name, (place, begins) in SAVED.items():
        for block in blocks(page):
            if page == place and block.text.startswith(begins):
                Path(name).write_text(block.text, encoding="utf-8")
    if page == "docs/guides/reward_models.md":
        # A process reward model of the first kind, whose head nobody has trained.
        AutoModelForTokenClassification.from_pretrained(
            REWARD, num_labels=2, ignore_mismatched_sizes=True
        ).save_pretrained("process")
        AutoTokenizer.from_pretrained(REWARD).save_pretrained("process")
    if page == "docs/guides/hub_kernels.md":
        for path, content in make_hub_kernels.files().items():
            (Path("build/hub-kernels") / path).parent.mkdir(parents=True, exist_ok=True)
            (Path("build/hub-kernels") / path).write_bytes(content)


def run(command, monkeypatch):
    """Runs the words of a command: those of nabla-fast in this process, which has the models' code loaded."""
    program, *words = command
    if program == "nabla-fast":
        done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    elif program == "curl":
        url, *options = words
        given = dict(zip(options[::2], options[1::2], strict=True))
        name, value = given["-H"].split(": ")
        answer = urllib3.request("POST", url, body=given["-d"], headers={name: value}, retries=False)
        assert answer.status == 200, answer.data
    elif command[:2] == ["python", "-m"]:
        import lm_eval.tasks

        monkeypatch.setattr(sys, "argv", command[2:])
        # lm-eval would read all of its own tasks, some thousand files, for one that is not among them.
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        raise AssertionError(f"tests/docs_examples.py has no reason why {program} is not run, and it cannot be")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_language(page):
    assert {block.language for block in blocks(page)} <= {"python", *SHELLS, *SHOWN}


def test_no_reason_is_left_over():
    assert set(NOT_RUN) <= set(PAGES)
    left_over = {
        (page, start)
        for page, reasons in NOT_RUN.items()
        for start in reasons
        if not any(example.text.startswith(start) for example in examples(page))
    }
    assert left_over == set()
    everything = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [placeholder for placeholder in BOUND if placeholder not in everything] == []


COMMANDS = [example for page in PAGES for example in examples(page) if example.language in SHELLS]


@pytest.mark.parametrize("example", COMMANDS, ids=lambda example: f"{example.page}:{example.line}")
def test_a_command_has_the_options_that_it_is_given(example):
    """Also where it is not run."""
    program, *words = arguments(example.text)
    if program == "nabla-fast":
        parse(words)
    elif program == "make":
        assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python" and words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif "/" in program and "=" not in program:  # else it sets a variable
        assert (ROOT / program).is_file()


def parse(words):
    group = typer.main.get_command(cli.app)
    parent = group.context_class(group, info_name="nabla-fast")
    group.commands[words[0]].make_context(words[0], words[1:], parent=parent)


SPANS = sorted({span for page in PAGES for span in re.findall(r"`nabla-fast ([a-z][^`]*)`", (ROOT / page).read_text())})


@pytest.mark.parametrize("span", SPANS)
def test_what_a_sentence_says_of_the_command_line_is_there(span):
    """Subcommands and options between backticks; their values may be left out there."""
    name, *words = span.split()
    command = typer.main.get_command(cli.app).commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if name != "bench":
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*known, "--help"}
