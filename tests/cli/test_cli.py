"""The command line, as a subprocess: what a user types and sees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import nabla_fast as nf
import nabla_fast.baselines  # before a test takes the place of what it imports
from nabla_fast import cli
from nabla_fast.cli import console, generate, options
from nabla_fast.cli.models import ModelChoice
from nabla_fast.models import loading, pretrained
from nabla_fast.testing.models import save_pair, tiny_process_model, tiny_tokenizer

FAST = ("--max-new-tokens", "6", "--max-rollouts", "2", "--max-iters", "2", "--gradient-threshold", "none")


def run(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "nabla_fast", *map(str, arguments)],
        capture_output=True,
        encoding=(env or {}).get("PYTHONIOENCODING", "utf-8"),
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(env or {})},
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_generate_prints_answer_reward_and_tables(pair):
    done = run("generate", "--model", pair[0], "--reward-model", pair[1], "--prompt", "is it on", *FAST)
    assert done.returncode == 0, done.stderr
    for expected in ("is it on", "∇-Reasoner", "reward", "gradient evaluations", "seconds per phase", "rollout"):
        assert expected in done.stdout
    assert "tokens" in done.stderr, "no progress bar"
    assert "Traceback" not in done.stderr


def test_what_was_decoded_is_shown_when_the_rollouts_are_lost(monkeypatch, capsys):
    from nabla_fast.cli import answers
    from nabla_fast.rollout import ServerLostError

    def lose(*_, **__):
        error = ServerLostError("vllm_url 'x' cannot be reached")
        error.committed, error.responses = ((5, 6), ()), ((5, 6, 7), ())
        raise error

    monkeypatch.setattr(answers, "generate", lose)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ServerLostError):
        answers.answer((None, tokenizer, None, None), ["one", "two"], nf.NablaConfig(), compare_greedy=False)
    shown = capsys.readouterr().err
    assert "2 of 3 tokens are committed" in shown
    assert tokenizer.decode([5, 6, 7]) in shown
    assert "0 of 0 tokens are committed" in shown


# Sends itself a signal when two prompts are answered, as if a user had.
_STOPPED = """
import os, sys, importlib
from nabla_fast import cli
module = importlib.import_module("nabla_fast.generate")
whole, number = module.generate, int(sys.argv.pop(1))
def generate(*arguments, on_answer, **options):
    heard = []
    def hear(i, answer):
        on_answer(i, answer)
        heard.append(i)
        if len(heard) == 2:
            os.kill(os.getpid(), number)
    return whole(*arguments, on_answer=hear, **options)
module.generate = generate
cli.main()
"""


def all_of(terminal):
    """What was written to a terminal that nobody has open any more; a read gives 4 KiB at most."""
    shown = b""
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 2**16):
            shown += more
    return shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_leaves_the_answers_that_are_finished_and_the_cursor(pair, tmp_path, number, as_json):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("is it on\nthe user\nwhat is 3\nwhat is 4\n")
    command = [sys.executable, "-c", _STOPPED, str(int(number)), "generate", "--model", pair[0], "--reward-model"]
    command += [pair[1], "--prompts", prompts, *FAST, "--max-batch-size", "1", *(["--json"] if as_json else [])]
    terminal, theirs = os.openpty()
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    told, shown = done.stdout.decode(), all_of(terminal).decode(errors="replace")
    os.close(terminal)
    assert done.returncode == 128 + number, shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, "the cursor is hidden"
    assert "Traceback" not in shown
    assert "stopped with 2 of 4 answers" in shown
    if as_json:
        told = json.loads(told)
        assert [answer["prompt"] for answer in told["answers"]] == ["is it on", "the user"]
        assert all(answer["stats"]["gradient_evaluations"] for answer in told["answers"])
        assert told["unanswered"] == ["what is 3", "what is 4"]
    else:
        assert told.count("∇-Reasoner ─") == 2
        assert "is it on" in told
        assert "seconds per phase" in told


def test_a_model_that_goes_wrong_leaves_the_answers_before_it(pair, monkeypatch, capsys):
    from nabla_fast.cli import answers
    from nabla_fast.models.loading import load_language_model, load_reward_model

    whole = answers.generate

    def generate(*arguments, on_answer, **options):
        def hear(i, answer):
            on_answer(i, answer)
            raise FloatingPointError("model gave NaN")

        return whole(*arguments, on_answer=hear, **options)

    monkeypatch.setattr(answers, "generate", generate)
    models = (*load_language_model(pair[0]), *load_reward_model(pair[1]))
    config = nf.NablaConfig(max_new_tokens=4, max_rollouts=2, max_iters=2, gradient_threshold=None, max_batch_size=1)
    with pytest.raises(FloatingPointError):
        answers.answer(models, ["is it on", "the user"], config, compare_greedy=True, as_json=True)
    printed = capsys.readouterr()
    (answer,) = json.loads(printed.out)["answers"]
    assert answer["prompt"] == "is it on"
    assert answer["text"] == whole(*models, "is it on", config).texts[0]
    assert answer["greedy"]["stats"]["rollouts"] == 1
    assert "stopped with 1 of 2 answers" in printed.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_anything_is_answered_is_an_exit_code(number):
    script = f"""
import os, sys
from nabla_fast import cli
from nabla_fast.cli.models import ModelChoice
ModelChoice.load = lambda _: os.kill(os.getpid(), {int(number)})
sys.argv = ["nabla-fast", "generate", "--pair=arithmetic"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert done.returncode == 128 + number
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert b"Abort" not in done.stderr


def test_json_holds_what_the_library_returns(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "the user"}]
    prompts.write_text(f'"is it on"\n\n{json.dumps({"messages": chat})}\n')
    options = ("--model", pair[0], "--reward-model", pair[1], "--seed", "3", "--dtype", "float32", "--json")
    done = run("generate", *options, "--prompts", prompts, *FAST)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["config"]["seed"] == 3
    assert told["config"]["gradient_threshold"] is None

    from nabla_fast.models.loading import load_language_model, load_reward_model

    config = nf.NablaConfig(seed=3, max_new_tokens=6, max_rollouts=2, max_iters=2, gradient_threshold=None)
    models = (*load_language_model(pair[0]), *load_reward_model(pair[1]))
    expected = nf.generate(*models, ["is it on", chat], config)
    assert [answer["tokens"] for answer in told["answers"]] == [s.tolist() for s in expected.sequences]
    assert [answer["text"] for answer in told["answers"]] == expected.texts
    assert told["totals"]["model_calls"] == expected.stats.totals.model_calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--model", "/no/such/model", "--reward-model", "/no/such/model", "--prompt", "x"],
            "/no/such/model",
        ),
        (["generate", "--prompt", "x"], "--model is missing"),
        (["generate", "--model", "x"], "no prompt given"),
        (["generate", "--pair=smollm2", "--model", "x"], "--pair smollm2 brings its own models"),
        (["generate", "--prompts", "/no/file.txt", "--pair=smollm2"], "there is no file /no/file.txt"),
        (["generate", "--prompts", "/no/[/b].txt", "--pair=smollm2"], "there is no file /no/[/b].txt"),
        (["generate", "--prompts", "/", "--pair=smollm2"], "--prompts: / is a directory"),
        (
            ["generate", "--pair=smollm2", "--attn-implementation", "foo"],
            "attn_implementation is 'foo'; use one of auto, flash",
        ),
        (
            ["generate", "--pair=arithmetic", "--attn-implementation", "foo"],
            "attn_implementation is 'foo'; use one of auto",
        ),
        (
            ["eval", "--pair=arithmetic", "--out", "/no/out", "--attn-implementation", "foo"],
            "attn_implementation is 'foo'; use",
        ),
        (
            ["generate", "--pair=arithmetic", "--attn-implementation", "foo/bar/baz"],
            "or a kernel of the hub such as kernels-community/flash-attn3",
        ),
        (
            ["generate", "--pair=arithmetic", "--quantization", "int3"],
            "--quantization is 'int3'; use one of none, int8, bnb-8bit, bnb-4bit",
        ),
        (
            ["eval", "--pair=arithmetic", "--out=/no/out", "--reward-adapter", "x"],
            "--reward-adapter is 'x', and --pair arithmetic has no adapters to choose from; leave it out",
        ),
        (["generate", "--pair=arithmetic", "--reward-device", "cuda:99"], "reward_device is 'cuda:99', but torch sees"),
        (["generate", "--pair=arithmetic", "--reward-device", "abacus"], "reward_device is 'abacus', which torch does"),
        (
            ["eval", "--pair=arithmetic", "--out=/no/out", "--engine=ray", "--device=cpu", "--reward-device=meta"],
            "--reward-device is meta and --device cpu, but Ray gives each worker one device",
        ),
        (
            ["generate", "--pair=arithmetic", "--rollout-backend=vllm", "--vllm-gpu-memory-utilization", "1.5"],
            "vllm_gpu_memory_utilization must be above 0 and at most 1, got 1.5",
        ),
        (
            ["generate", "--model=a/b", "--reward-model=c/d", "--prompt=x", "--step-aggregation=max"],
            "step_aggregation is 'max'; use one of min, product, last, mean",
        ),
        (
            ["eval", "--pair=arithmetic", "--out=/no/out", "--step-separator=x"],
            "--step-separator is 'x', and the reward model of --pair arithmetic scores whole answers",
        ),
        (["generate", "--pair=arithmetic", "--prompt", "caf\udce9"], "is not text in this terminal's encoding"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, monkeypatch, capsys):
    # In this process: a new one takes seconds to import torch, and `test_a_bad_setting_names_the_field` has one.
    monkeypatch.setattr(sys, "argv", ["nabla-fast", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert "error:" in err
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("given", [[], ["--reward-device", "meta"]])
@pytest.mark.parametrize("pair_name", [None, "arithmetic"])
def test_each_model_is_loaded_where_and_how_it_was_asked_for(given, pair_name, monkeypatch):
    where = []

    def load(path, *, device, attn_implementation, quantization, **_):
        where.append((device, attn_implementation, quantization))
        if len(where) == 2:
            raise ValueError("both are known")
        return None, None

    monkeypatch.setattr(loading, "load_language_model", load)
    monkeypatch.setattr(loading, "load_reward_model", load)
    models = ["--pair", pair_name] if pair_name else ["--model", "a/b", "--reward-model", "c/d", "--prompt", "x"]
    kernel = "kernels-community/flash-attn3"
    how = ["--device", "cpu", "--attn-implementation", kernel, "--quantization", "int8"]
    run = CliRunner().invoke(cli.app, ["generate", *models, *how, *given])
    assert str(run.exception) == "both are known"
    assert where == [("cpu", kernel, "int8"), (given[-1] if given else "cpu", kernel, "int8")]


def test_a_process_reward_model_is_read_as_the_options_say(pair, tmp_path, capsys, monkeypatch):
    tiny_process_model(dtype=torch.float32).save_pretrained(tmp_path / "process")
    tiny_tokenizer().save_pretrained(tmp_path / "process")
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "is it on", "answer": "12"}))
    models = ["--model", str(pair[0]), "--reward-model", str(tmp_path / "process"), "--device", "cpu", *FAST]

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["nabla-fast", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    code, out, err = called("generate", *models, "--prompt", "is it on")
    assert code == 2
    assert "a token classifier, and where it is to be read it does not say; give step_separator" in err
    steps = ["--step-separator", "\\n", "--step-aggregation", "mean"]
    code, out, err = called("generate", *models, *steps, "--prompt", "is it on", "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert 0 < answer["reward"] < 1
    run_of = ["eval", "--task", str(tmp_path / "task.jsonl"), "--methods", "nabla", "--n", "2", "--out"]
    code, _, err = called(*run_of, str(tmp_path / "run"), *models, *steps)
    assert code == 0, err
    # What is inserted must be one token.
    code, _, err = called(
        "generate", *models, "--step-separator", "the user", "--step-insert-after", "\\n", "--prompt", "x"
    )
    assert code == 2
    assert "separator is 'the user'" in err
    assert "and is to be inserted (insert_after); give a single token" in err
    # A run that is read in another way does not go on in it.
    code, _, err = called(*run_of, str(tmp_path / "run"), *models, *steps[:2])
    assert code == 2, err
    assert "step_aggregation" in err


def test_a_run_says_only_what_is_not_as_usual():
    choice = ModelChoice("a", "b", None, "cpu", "auto", "sdpa")
    assert "reward_device" not in choice.describe()
    assert choice.describe() == dataclasses.replace(choice, reward_device="cpu").describe()
    more = {"quantization": "int8", "adapter": "x", "reward_adapter": "y"}
    assert dataclasses.replace(choice, **more).describe() == choice.describe() | more
    assert dataclasses.replace(choice, reward_device="meta").describe() == {
        **choice.describe(),
        "reward_device": "meta",
    }


def test_workers_compute_in_the_dtype_that_is_recorded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    choice = ModelChoice("here", "hub/id", None, "cpu", "auto", "sdpa")
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        with monkeypatch.context() as processor:
            processor.setattr(pretrained, "multiplies_bfloat16", lambda native=native: native)
            sent, recorded = choice.for_workers(), choice.describe()["dtype"]
        assert sent.dtype == recorded == expected
        assert sent == dataclasses.replace(choice, model=str(tmp_path / "here"), dtype=expected)


def test_a_bad_setting_names_the_field(pair):
    done = run("generate", "--model", pair[0], "--reward-model", pair[1], "--prompt", "x", "--max-rollouts", "0")
    assert done.returncode == 2
    assert "error: max_rollouts must be at least 1, got 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["export-custom-generate", "--help"],
        ["demo", "--help"],
        ["doctor"],
    ],
)
def test_help_and_doctor_load_nothing_heavy(arguments):
    allowed = {"torch"} if arguments == ["doctor"] else set()
    heavy = {"torch", "transformers", "triton", "matplotlib", "torch._dynamo", "peft"} - allowed
    code = (
        "import sys; from nabla_fast.cli import main\n"
        f"sys.argv = ['nabla-fast', *{arguments!r}]\n"
        "try: main()\n"
        f"except SystemExit as end: print(end.code, sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("0 []") or done.stderr.strip().endswith("None []"), done.stderr


def test_the_package_loads_a_name_when_it_is_asked_for():
    code = """if True:
        import sys
        import nabla_fast as nf
        import nabla_fast.config
        assert not {"torch", "transformers", "rich"} & set(sys.modules), "something heavy is imported"
        assert set(nf.__all__) <= set(dir(nf))
        import nabla_fast.generate
        assert callable(nf.generate) and nf.generate is nabla_fast.generate
        assert callable(nf.dto.optimize) and callable(nf.ops.gradient_norm) and callable(nf.decoder.Decoder)
        assert not hasattr(nf, "no_such_name")
        names = {}
        exec("from nabla_fast import *", names)
        assert set(nf.__all__) <= set(names) and names["generate"] is nf.generate
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_version():
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"nabla-fast {nf.__version__}\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_answers_survive_any_encoding(pair, encoding):
    options = ("--model", pair[0], "--reward-model", pair[1], "--prompt", "is it on é 😀 [/b]", "--json", *FAST)
    done = run("generate", *options, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"][0]["prompt"] == "is it on é 😀 [/b]"


def test_panels_and_help_survive_any_encoding(pair, tmp_path):
    named = tmp_path / "m[/b]"
    named.parent.mkdir()
    named.symlink_to(pair[0])
    options = ("--model", named, "--reward-model", pair[1], "--prompt", "is it on 😀 [/b]", *FAST)
    done = run("generate", *options, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert r"is it on \U0001f600 [/b]" in done.stdout
    done = run("--help", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


@pytest.mark.parametrize("command", ["--version", "doctor --json"])
def test_a_reader_that_has_gone_ends_the_command_quietly(command):
    script = f"{sys.executable} -m nabla_fast {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nabla_fast", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch):
    def fail():
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError):
        cli.main()


def test_text_is_not_markup_and_controls_no_terminal(capsys):
    console.print_error("no [/b] \x1b[2J here")
    console.print_warning("[red]:smile:")
    assert capsys.readouterr().err == "error: no [/b] \\x1b[2J here\nwarning: [red]:smile:\n"


def test_doctor_reports_versions_and_back_ends():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for expected in ("torch", "transformers", "native", "reference", "triton", "cuda"):
        assert expected in done.stdout
    told = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout)
    assert told["backends"]["reference"]["available"] is True
    assert told["backends"]["native"]["available"] is True


def test_every_config_field_is_an_option_with_a_description():
    help_text = " ".join(CliRunner().invoke(cli.app, ["generate", "--help"], env={"COLUMNS": "300"}).stdout.split())
    for field in dataclasses.fields(nf.NablaConfig):
        if field.name in ("rollout", "resample"):
            for part in dataclasses.fields(nf.Sampling):
                assert f"--{field.name}-{part.name}".replace("_", "-") in help_text
        else:
            assert "--" + field.name.replace("_", "-") in help_text
    assert "Default: 0.97" in help_text
    assert "--preset" in help_text


def test_options_become_the_config():
    base = nf.NablaConfig(max_rollouts=3, resample=nf.Sampling(0.1, 0.2, 3))
    assert options.configured(base, {"max_rollouts": None, "resample_top_k": None, "stop_strings": []}) == base
    settings = {"max_rollouts": 5, "resample_temperature": 0.0, "stop_strings": ["a", "b"], "update_postfix": True}
    config = options.configured(base, settings)
    assert (config.max_rollouts, config.stop_strings, config.update_postfix) == (5, ("a", "b"), True)
    assert config.resample == nf.Sampling(0.0, 0.2, 3)


def test_a_preset_takes_the_place_of_the_defaults_and_options_override_it():
    base = nf.NablaConfig(max_rollouts=3, max_new_tokens=9)
    assert options.configured(base, {"preset": None, "max_rollouts": None}) == base
    assert options.configured(base, {"preset": "aime"}) == nf.NablaConfig.published("aime")
    config = options.configured(None, {"preset": "amc", "anchor": "rollout", "resample_top_p": 0.7})
    expected = nf.NablaConfig.published("amc", anchor="rollout", resample=nf.Sampling(0.5, 0.7, 20))
    assert config == expected


@pytest.mark.parametrize(
    "command", [["generate", "--pair=arithmetic"], ["eval", "--pair=arithmetic", "--out", "{out}"]]
)
def test_an_unknown_preset_is_refused_with_the_choices(command, tmp_path):
    arguments = [part.format(out=tmp_path / "run") for part in command]
    done = run(*arguments, "--preset", "gsm8k")
    assert done.returncode == 2
    assert "--preset is 'gsm8k'; use one of math500, aime, amc" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"fine"\n{broken\n', "line 2 of .* is not JSON"),
        ("a.jsonl", '{"question": "x"}\n', 'line 1 of .* must be a string, a chat, or an object with "prompt"'),
        ("a.jsonl", "7\n", "line 1"),
        ("a.txt", "\n \n", "holds no prompt"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_line(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        generate.read_prompts(file)


def test_prompt_files_give_lines_or_json_values(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("first\n\n  second\n")
    assert generate.read_prompts(plain) == ["first", "  second"]
    lines = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "x"}]
    lines.write_text(f'"first"\n{{"prompt": "second"}}\n{json.dumps(chat)}\n')
    assert generate.read_prompts(lines) == ["first", "second", chat]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_only_a_line_feed_ends_a_line(tmp_path, start):
    plain = tmp_path / "a.txt"
    plain.write_bytes(start + "one\ftwo\u2028three\x85four\r\nfive".encode())
    assert generate.read_prompts(plain) == ["one\ftwo\u2028three\x85four", "five"]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(start + '"one\u2028two"\r\n"three\ffour\rfive"\n'.encode())
    assert generate.read_prompts(lines) == ["one\u2028two", "three\ffour\rfive"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "fine\ncafé".encode("latin-1"), r"line 2 of .*a\.txt is not UTF-8"),
        ("a.txt", "fine".encode("utf-16"), r"line 1 of .*a\.txt is not UTF-8"),
        ("a.jsonl", b'"fine"\n' + b"[" * 100_000, "line 2 of .* (nested too deeply|is not JSON)"),
        ("a.jsonl", b"9" * 5000, "line 1 of .*a\\.jsonl"),
        ("a.jsonl", rb'"\ud800"', "line 1 of .* has half of a surrogate pair"),
    ],
)
def test_a_prompt_file_that_is_no_text_names_the_line(tmp_path, name, data, message):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        generate.read_prompts(file)
