"""The benchmarks: what they time is right, and what they record is what happened."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cases
import measure
import pairs
import pictures
import pytest
import run
import tables
import test_bench_dto
import test_bench_generate
import test_bench_relaxed_stats
import test_bench_rollouts
import test_bench_sampling
import test_bench_vllm
import torch
from rich.console import Console
from shapes import Shape
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import nabla_fast as nf
from nabla_fast import cli
from nabla_fast.cli import bench
from nabla_fast.generate import make_pair
from nabla_fast.rollout.engine import Completion
from nabla_fast.testing.models import tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
SMALL = Shape("small", 517, 24, True, reward_width=16)
CAPPED = Shape("capped", 301, 24, False, softcap=5.0, reward_width=16)


@pytest.fixture
def setting(monkeypatch):
    """Tiny sizes, and ceilings that nobody has to measure."""
    monkeypatch.setattr(cases.Setting, "models", [(SMALL, 5), (CAPPED, 3)])
    monkeypatch.setattr(cases.Setting, "dtypes", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(cases.Setting, "budget", measure.Budget(0.0, 2, 2))
    monkeypatch.setattr(cases, "peak_bytes", lambda call, device: 2**20)
    monkeypatch.setattr(cases, "input_sets", lambda size, device: 2)
    ceiling = {"bytes_per_second": 1e9, "flops_per_second": 1e10, "barrier_seconds": 0.0}
    monkeypatch.setattr(cases.Setting, "ceilings", lambda self, dtype: ceiling)
    return cases.Setting(CPU, quick=True)


def contest(setting, dtype=torch.float32):
    return test_bench_relaxed_stats.contest(setting, SMALL, 5, dtype)


# what is timed


@pytest.mark.parametrize("name", run.SUITES["operators"])
def test_every_contender_of_every_operator_computes_what_the_reference_does(setting, name):
    made = importlib.import_module(f"test_bench_{name}").cases(setting)
    assert made
    for case in made:
        record = case.run()
        ours = {n for n, contender in record["contenders"].items() if contender["ours"]}
        # None of these is an operator that has its back ends.
        others = {"sampling": {tables.OURS}, "linear": {"native"}, "attention": {"native"}}
        assert ours == others[name] if name in others else {"reference", "native"} <= ours <= set(cases.BACKENDS)
        assert "eager" in set(record["contenders"]) - ours
        assert tables.best_of_ours(record)[1]["over_floor"] > 0
        assert record["floor"]["ms"] > 0
        assert "torch.compile" in record["skipped"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: (r[0] * 1.001, *r[1:]),
        lambda r: (*r[:3], r[3] + 1),
        lambda r: (r[0], r[1] * torch.nan, *r[2:]),
        lambda r: r[:3],
    ],
    ids=["inexact", "other tokens", "NaN", "too few results"],
)
def test_a_wrong_contender_is_never_timed(setting, monkeypatch, spoil):
    wrong = contest(setting)
    native = wrong.ours["native"]
    wrong.ours["native"] = lambda z: spoil(native(z))
    monkeypatch.setattr(cases, "in_turn", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match="relaxed_stats"):
        wrong.case(setting).run()


def test_rounded_logits_may_move_a_baselines_tokens_but_not_ours(setting):
    half = contest(setting, torch.bfloat16)
    eager = half.baselines["eager"]
    moved = lambda z: (*eager(z)[:3], eager(z)[3].index_fill(0, torch.tensor([1]), 0))  # noqa: E731
    half.baselines["eager"] = moved
    inputs = half.inputs(0)
    meant = cases.meaning_of(half, inputs)
    assert cases.check(half, "eager", inputs, meant)["rows_with_other_integers"] == pytest.approx(0.2)
    half.ours["native"] = moved
    with pytest.raises(AssertionError):
        cases.check(half, "native", inputs, meant)


@pytest.mark.parametrize("who", [tables.OURS, "eager"])
def test_a_sampler_that_leaves_the_nucleus_is_never_timed(setting, monkeypatch, who):
    wrong = test_bench_sampling.contest(setting, SMALL, 8)
    (wrong.ours if who == tables.OURS else wrong.baselines)[who] = lambda logits, _: logits.argmin(-1)
    monkeypatch.setattr(cases, "in_turn", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=f"{who} is wrong: 8 tokens"):
        wrong.case(setting).run()


# how it is timed


def test_only_clean_repeats_count_where_there_are_three():
    clean = [measure.Sample(seconds, 1, 0.02 * seconds) for seconds in (0.001, 0.002, 0.003)]
    disturbed = measure.Sample(0.009, 3, 0.0009)
    some = measure.timing([*clean, disturbed])
    assert (some["median_ms"], some["clean"], some["repeats"], some["context_switches"]) == (2.0, 3, 4, 6)
    assert some["waited_share"] == pytest.approx(0.02)
    few = measure.timing([*clean[:2], disturbed])
    assert (few["median_ms"], few["fastest_ms"], few["clean"]) == (2.0, 1.0, 0)
    assert measure.timing(clean[:1])["clean"] == 1
    assert measure.timing([disturbed])["clean"] == 0


def test_switches_count_where_nobody_counts_waiting():
    assert measure.Sample(1.0, 0, None).clean
    assert not measure.Sample(1.0, 1, None).clean
    assert measure.timing([measure.Sample(1.0, 0, None)])["waited_share"] is None


@pytest.mark.skipif(measure.waiting() is None, reason="this kernel does not count how long threads wait")
def test_a_repeat_whose_core_was_taken_is_not_clean():
    """Two processes on one core: either waits while the other one runs."""
    (core, *_), allowed = os.sched_getaffinity(0), os.sched_getaffinity(0)
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint('at work', flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        os.sched_setaffinity(0, {core})
        watch, start = measure.Watch(), time.perf_counter()
        while time.perf_counter() - start < 0.3:
            pass
        sample = watch.sample(time.perf_counter() - start)
    finally:
        os.sched_setaffinity(0, allowed)
        other.kill()
        other.wait()
    assert not sample.clean
    assert sample.waited > 0.05


def test_contenders_take_turns_and_rotate_their_inputs():
    order = []
    calls = {name: [lambda x=f"{name}{i}": order.append(x) for i in range(2)] for name in "ab"}
    timings = measure.in_turn(calls, CPU, measure.Budget(0.0, 4, 4))
    measured = order[6:]  # each input once, and one call to see how long it takes
    assert {x[0] for x in measured[:2]} | {x[0] for x in measured[-2:]} == {"a", "b"}
    assert {"a0", "a1", "b0", "b1"} <= set(measured)
    assert all(t["repeats"] >= 4 for t in timings.values())


def test_a_floor_is_the_longer_of_memory_and_arithmetic_and_its_barriers():
    ceiling = {"bytes_per_second": 1e9, "flops_per_second": 1e12, "barrier_seconds": 1e-5}
    sizes = {"bytes": 10**6, "flops": 10**6, "barriers": 0}
    assert measure.floor(10**6, 10**6, ceiling) == {"ms": 1.0, "bound": "memory", **sizes}
    assert measure.floor(0, 10**10, ceiling)["bound"] == "arithmetic"
    assert measure.floor(0, 10**10, ceiling)["ms"] == pytest.approx(10)
    assert measure.floor(10**6, 10**6, ceiling, 20)["ms"] == pytest.approx(1.2)
    assert measure.floor(10**4, 0, ceiling, 20)["bound"] == "barriers"


def test_the_ceilings_of_a_processor_have_a_barrier():
    found = measure.ceilings(CPU, torch.float32)
    assert 0 <= found["barrier_seconds"] < 1e-2
    assert found["bytes_per_second"] > 1e8
    assert found["flops_per_second"] > 1e8


def test_device_and_host_are_told_apart_and_what_cannot_be_captured_says_why(monkeypatch):
    class Graph:
        def replay(self):
            pass

    def captured(call, device):
        call()
        return Graph()

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(measure, "_captured", captured)
    monkeypatch.setattr(measure, "_sample_gpu", lambda call, device: 0.002)
    monkeypatch.setattr(measure, "_sample_wall", lambda call, device: 0.003)
    found = measure.apart({"kernel": [lambda: None], "waits": [waits]}, CPU, measure.Budget(0.0, 2, 2))
    assert found["kernel"] == {"device_ms": 2.0, "wall_ms": 3.0}
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert found["waits"] == {"device_ms": None, "not_captured": reason, "wall_ms": 3.0}


def test_a_table_shows_device_and_host_where_they_are_known(setting):
    record = contest(setting).case(setting).run()
    columns, _ = tables.columns_and_rows([record], "operators")
    assert not {"device", "device/floor", "wall"} & set(columns)
    ours = tables.best_of_ours(record)[1]
    ours |= {"device_ms": 2 * record["floor"]["ms"], "wall_ms": 5.0}
    columns, (row,) = tables.columns_and_rows([record], "operators")
    shown = dict(zip(columns, row, strict=True))
    assert shown["device/floor"] == "2.00"
    assert shown["wall"] == "5 ms"


def test_a_library_that_fails_is_left_out_with_its_error_and_the_case_is_measured(setting):
    def broken(z):
        raise ImportError("no kernel image")

    tried = contest(setting)
    tried.libraries.update({"quack": broken, "Liger-Kernel": lambda z: [x * 2 for x in tried.baselines["eager"](z)]})
    record = tried.case(setting).run()
    assert record["skipped"]["quack"] == "ImportError: no kernel image"
    assert "wrong" in record["skipped"]["Liger-Kernel"]
    assert not {"quack", "Liger-Kernel"} & set(record["contenders"])
    assert "eager" in record["contenders"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_what_a_call_had_at_once():
    def call():
        for _ in range(3):
            torch.ones(2**23)  # 32 MiB, gone before the next

    # What other threads and the system do to the resident memory meanwhile is in it; the lowest of three has the least.
    assert 30 * 2**20 < min(measure.peak_bytes(call, CPU) for _ in range(3)) < 60 * 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_holes_that_earlier_calls_left_are_not_a_calls_memory():
    measure.steady_allocator()
    # Blocks of the heap that are free, each behind a small one that is not.
    blocks = [(torch.ones(2**21), torch.ones(2**8)) for _ in range(16)]
    kept = [small for _, small in blocks]
    del blocks

    def call():
        for size in range(2**19, 2**21, 2**17):  # one after the other, 8 MiB at most
            torch.ones(size)

    assert min(measure.peak_bytes(call, CPU) for _ in range(3)) < 12 * 2**20
    assert len(kept) == 16


# nabla_fast against the published schedule


@functools.cache
def tiny_pair():
    tokenizer = tiny_tokenizer()
    models = tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer
    chat = [{"role": "user", "content": "what is 3 times 4"}]
    return pairs.Loaded("tiny", pairs.Models(*models), make_pair(*models, nf.NablaConfig())), chat


@pytest.mark.parametrize("rows", ["one", "all"])
def test_both_sides_of_an_optimization_do_the_same(setting, monkeypatch, rows):
    monkeypatch.setattr(test_bench_dto, "load", lambda device: tiny_pair())
    record = test_bench_dto.measure_dto(setting, 12, rows)
    ours, published, checked = (record["contenders"][n] for n in (tables.OURS, "published", tables.CHECKPOINTED))
    assert published["error"] < 1e-6
    assert checked["error"] < 1e-6
    assert checked["gradient_evaluations"] == ours["gradient_evaluations"]
    # Fewer where tokens come back to what they were: the cache knows them, and the baseline keeps the last ones only.
    assert 0 < ours["gradient_evaluations"] <= published["gradient_evaluations"]
    assert ours["peak_bytes"] is None  # the quick setting leaves it out
    assert tables.side_cells(record)[0].startswith("DTO")


def test_both_sides_of_a_decode_give_the_same_tokens(setting, monkeypatch):
    loaded, chat = tiny_pair()
    monkeypatch.setattr(test_bench_generate, "load", lambda device: (loaded, chat))
    config = nf.NablaConfig(max_new_tokens=8, max_rollouts=4, max_iters=4, learning_rate=0.2, gradient_threshold=0.3)
    other = [{"role": "user", "content": "12 + 24 ="}]
    record = test_bench_generate.measure_generate(setting, [chat, other], config, {"prompts": 2})
    ours, published, no_cache = (record["contenders"][n] for n in (tables.OURS, "published", tables.NO_CACHE))
    assert published["error"] == no_cache["error"] == 0
    assert ours["rollouts"] == published["rollouts"] == no_cache["rollouts"]
    assert ours["gradient_evaluations"] < no_cache["gradient_evaluations"]
    assert ours["gradient_evaluations"] < published["gradient_evaluations"]
    assert record["shape"] == {"prompts": 2, "tokens": 8, "rollouts": 4}
    assert sum(pictures.phases(published).values()) >= published["median_ms"] / 1e3


def test_models_of_random_weights_decode_random_rollouts():
    layers = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = [dataclasses.replace(shape, layers=layers) for shape in (CAPPED, SMALL)]
    loaded = pairs.random_pair(CPU, *small, dtype=torch.float32)
    assert loaded.pair.language_model.head.weight.shape == (CAPPED.vocabulary, CAPPED.width)
    config = nf.NablaConfig(
        max_new_tokens=6,
        max_rollouts=3,
        max_iters=2,
        confidence_threshold=None,
        gradient_threshold=0.0,
        eos_token_ids=(),
    )
    rollouts = pairs.RandomRollouts(loaded.pair)
    chats = [pairs.numbered_chat(i, words=4) for i in range(2)]
    outcome = test_bench_generate.ours(loaded, chats, config, rollouts)
    assert len(outcome["result"]) == 12
    assert outcome["rollouts"] == 6
    assert outcome["optimised_positions"] >= 4


@pytest.mark.parametrize(("prompts", "checkpointed"), [(4, False), (16, True)])
def test_decodes_on_a_gpu_have_graphs_and_the_largest_batch_is_checkpointed_besides(prompts, checkpointed, monkeypatch):
    loaded, chat = tiny_pair()
    compared = {}
    monkeypatch.setattr(test_bench_generate, "load", lambda device: (loaded, chat))
    monkeypatch.setattr(test_bench_generate, "compare", lambda sides, *_, **__: compared.update(sides) or {})
    on_a_gpu = cases.Setting(torch.device("cuda"))
    (case,) = (case for case in test_bench_generate.cases(on_a_gpu) if case.name == f"generate-batch-{prompts}")
    _, chats, config, which = case.run.args
    assert (len(chats), which) == (prompts, {"prompts": prompts})
    test_bench_generate.measure_generate(on_a_gpu, [chat] * prompts, config, which)
    settings = {name: side.args[2] for name, side in compared.items()}
    assert set(settings) == {tables.OURS, "published"} | ({tables.CHECKPOINTED} if checkpointed else set())
    assert settings[tables.OURS].graphs
    assert not settings[tables.OURS].checkpoint_activations
    if checkpointed:
        assert settings[tables.CHECKPOINTED].checkpoint_activations


class Echo:
    """Stands for vLLM, and for its running requests: each token is that of the prompt's end."""

    def open(self):
        self.sent = {}
        return self

    def send(self, key, request):
        self.sent[key] = Completion(request.prompt_ids[-1:] * request.parameters["max_tokens"], "length")

    def wait(self):
        return [self.sent.popitem()]

    def close(self):
        assert not self.sent


@pytest.fixture
def vllm_case(monkeypatch):
    loaded, chat = tiny_pair()
    monkeypatch.setattr(test_bench_rollouts, "load", lambda device: (loaded, chat))
    monkeypatch.setattr(test_bench_vllm, "started", lambda device: (Echo(), None))
    other = [{"role": "user", "content": "12 + 24 ="}]
    config = nf.NablaConfig(max_new_tokens=4, eos_token_ids=())
    return functools.partial(test_bench_vllm.measure_vllm, chats=[chat, other], config=config)


def test_rollouts_are_compared_with_vllm(setting, vllm_case, monkeypatch):
    monkeypatch.setattr(test_bench_vllm, "why_not_installed", lambda *_: None)
    record = vllm_case(setting)
    assert {who: figures["tokens"] for who, figures in record["contenders"].items()} == {tables.OURS: 8, "vLLM": 8}
    assert record["shape"] == {"prompts": 2, "tokens": 4}
    row = dict(zip(tables.ROLLOUT_COLUMNS, tables.rollout_cells(record), strict=True))
    assert row["other"] == "vLLM"
    assert float(row["times faster"].rstrip(" *")) > 0


def test_a_missing_vllm_is_told_of(setting, vllm_case, tmp_path):
    record = vllm_case(dataclasses.replace(setting, device=torch.device("cpu")))
    (reason,) = record["skipped"].values()
    assert list(record["contenders"]) == [tables.OURS]
    row = dict(zip(tables.ROLLOUT_COLUMNS, tables.rollout_cells(record), strict=True))
    assert (row["other"], row["time"], row["times faster"]) == (reason, "-", "-")
    (tmp_path / "vllm.json").write_text(json.dumps({"records": [{"case": "vllm-batch-2", **record}]}))
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(tables.overview(tmp_path))
    assert reason in console.export_text()


class Calls(TorchDispatchMode):
    """Counts PyTorch's operators, without those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        self.count += not getattr(operator, "is_view", False)
        return result


def test_a_decode_calls_fewer_operators_than_the_published_schedule():
    """On a GPU a decode of one prompt takes as long as launching them does, not as long as they compute."""
    layers = {"intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    shapes = (Shape("l", 301, 32, False, layers=layers), Shape("r", 301, 32, False, layers={**layers, "head_dim": 8}))
    loaded = pairs.random_pair(CPU, *shapes, dtype=torch.float32)
    config = nf.NablaConfig(
        anchor="argmax",
        max_new_tokens=48,
        max_rollouts=6,
        confidence_threshold=None,
        gradient_threshold=0.0,
        eos_token_ids=(),
    )
    sides = {}
    for side in (test_bench_generate.ours, test_bench_generate.published):
        with Calls() as calls:
            outcome = side(loaded, [pairs.numbered_chat(0, words=16)], config, pairs.RandomRollouts(loaded.pair))
        sides[side] = outcome, calls.count
    (ours, our_calls), (published, their_calls) = sides.values()
    assert ours["result"].tolist() == published["result"].tolist()
    assert our_calls / ours["gradient_evaluations"] < 1.25 * their_calls / published["gradient_evaluations"]
    assert our_calls < 0.62 * their_calls


# what a run writes


def test_results_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    first = run.default_output(CPU, False, "2026-01-01")
    assert first.name == "2026-01-01.json"
    measure_dir = first.parent
    measure_dir.mkdir()
    first.write_text("{}")
    assert run.default_output(CPU, False, "2026-01-01").name == "2026-01-01-2.json"
    assert run.default_output(CPU, True, "2026-01-01").name == "2026-01-01-quick.json"


def test_a_run_writes_its_records_and_goes_on_after_a_failure(setting, monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("out of memory")

    made = [cases.Case("broken", broken), contest(setting).case(setting)]
    monkeypatch.setattr(run, "chosen_cases", lambda *_: iter(made))
    output = tmp_path / "deep" / "out.json"
    assert run.main(["--quick", "--device", "cpu", "--threads", "1", "--output", str(output)]) == 1
    written = json.loads(output.read_text())
    assert written["records"][0]["error"] == "RuntimeError: out of memory"
    assert written["records"][1]["contenders"]["native"]["median_ms"] > 0
    assert "samples_ms" not in written["records"][1]["contenders"]["native"]
    assert set(written["ceilings"]) == {"float32", "bfloat16"}
    assert "time/floor" in capsys.readouterr().out


def test_a_run_goes_on_with_what_its_file_lacks(setting, monkeypatch, tmp_path, capsys):
    ran, broken = [], True

    def case(name):
        def measured():
            ran.append(name)
            if name == "second" and broken:
                raise RuntimeError("no memory")
            return contest(setting).case(setting).run()

        return cases.Case(name, measured)

    monkeypatch.setattr(run, "chosen_cases", lambda *_: iter([case("first"), case("second")]))
    output = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--threads", "1", "--output", str(output)]
    assert run.main([*arguments, "--quick"]) == 1
    before, broken = json.loads(output.read_text()), False
    slower = {"bytes_per_second": 1e8, "flops_per_second": 1e9, "barrier_seconds": 0.0}
    monkeypatch.setattr(cases.Setting, "ceilings", lambda self, dtype: self.known_ceilings.get(dtype, slower))
    assert run.main([*arguments, "--quick"]) == 0
    after = json.loads(output.read_text())
    assert ran == ["first", "second", "second"]
    assert [record["case"] for record in after["records"]] == ["first", "second"]
    assert after["records"][0] == before["records"][0]
    assert after["ceilings"] == before["ceilings"]
    assert after["started"] == before["started"]
    assert run.main(arguments) == 2
    assert "its quick is True, here it is False; give a file that does not exist" in capsys.readouterr().out
    assert json.loads(output.read_text()) == after


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_no_runs_is_left_alone(setting, tmp_path, text, capsys):
    (tmp_path / "out.json").write_text(text)
    assert run.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "out.json")]) == 2
    assert "is no file of a run" in capsys.readouterr().out
    assert (tmp_path / "out.json").read_text() == text


@pytest.mark.parametrize("kind", ["link", "folder", "below a file", "full"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch, capsys, kind):
    precious, output = tmp_path / "precious", tmp_path / "[" / "b].json"
    output.parent.mkdir()
    precious.write_text("{}")
    if kind == "link":
        output.symlink_to(precious)
    elif kind == "folder":
        output.mkdir()
    elif kind == "below a file":
        output = precious / "out.json"
    else:
        output = Path("/proc/out.json")
    monkeypatch.setattr(run, "description", lambda *_: {})
    monkeypatch.setattr(run, "rated_dtypes", lambda *_: pytest.fail("something was measured"))
    assert run.main(["--quick", "--device", "cpu", "--output", str(output)]) == 2
    assert " ".join(capsys.readouterr().out.split()).startswith(f"error: --output is {output}, where nothing can be")
    assert precious.read_text() == "{}"


def test_no_case_of_a_name_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(run, "begin", lambda *_: pytest.fail("something was measured"))
    assert run.main(["--quick", "--device", "cpu", "--only", "NOTHING"]) == 2
    assert capsys.readouterr().out == "error: --only is 'NOTHING', which no case has in its name\n"


def test_a_device_that_is_not_here_is_refused(capsys):
    assert run.main(["--device", "tpu"]) == 2
    assert "use auto, cpu, cuda or cuda:N" in capsys.readouterr().out


# commands


def test_bench_hands_its_options_over(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(bench.subprocess, "run", lambda c: commands.append(c) or subprocess.CompletedProcess(c, 3))
    options = ["--suite", "dto", "--suite", "operators", "--only", "x", "--quick", "--threads", "2"]
    result = CliRunner().invoke(cli.app, ["bench", *options, "--output", str(tmp_path / "o.json")])
    assert result.exit_code == 3
    (command,) = commands
    assert command[1] == str(BENCHMARKS / "run.py")
    parsed = run.parse(command[2:])
    assert (parsed.suite, parsed.only, parsed.quick, parsed.threads) == (["dto", "operators"], "x", True, 2)
    assert parsed.output == tmp_path / "o.json"


def test_a_benchmark_that_a_signal_ended_has_the_exit_code_of_a_shell(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, -11))
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 139


def test_bench_needs_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs a source checkout"):
        bench.find_runner(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "invalid choice: 'speed'"),
        (["--threads", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "100000"], "'100000' is not a whole number of at least 1 and at most 1024"),
        (["--threads", "9" * 30], "and at most 1024"),
    ],
)
def test_a_run_that_cannot_be_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        run.parse(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_pytest_benchmark_stores_the_same_samples(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_bench_token_diff.py"]
    command += ["--quick", "--threads", "1", "--bench-device", "cpu", f"--benchmark-json={output}"]
    # pytest-benchmark stores nothing in a worker of pytest-xdist, which this process may be.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(output.read_text())["benchmarks"]
    figures = entry["extra_info"]["contenders"]["native"]
    assert entry["stats"]["median"] == pytest.approx(figures["median_ms"] / 1e3)
    assert entry["stats"]["min"] == pytest.approx(figures["fastest_ms"] / 1e3)


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "benchmarks/gpu.sh DIR"), (["x", "--only", "nothing"], "benchmarks/gpu.sh DIR")]
)
def test_gpu_script_explains_itself(arguments, message):
    done = subprocess.run([BENCHMARKS / "gpu.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stdout


def test_gpu_script_needs_a_gpu(tmp_path):
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
    )
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr


def test_gpu_script_goes_on_with_what_was_not_done(tmp_path):
    """With a stand-in for Python that measures at once, and never the decodes; at first it has no vLLM."""
    stand_in, log, out, vllm = (tmp_path / name for name in ("python", "log", "out", "vllm"))
    stand_in.write_text(
        f"""#!/usr/bin/env bash
echo "$*" >> {log}
[[ "$*" == *run.py* ]] && echo "{{}}" > "${{@: -1}}"
[[ "$*" != *"--suite generate"* ]] && [[ "$*" != *find_spec* || -e {vllm} ]]
"""
    )
    stand_in.chmod(0o755)

    def run_parts(*only):
        log.write_text("")
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in)}
        done = subprocess.run([BENCHMARKS / "gpu.sh", out, *only], env=environment, capture_output=True, text=True)
        measured = [Path(line.split()[-1]).stem for line in log.read_text().splitlines() if "--suite" in line]
        return done.returncode, measured

    assert run_parts() == (1, ["gradients", "rollouts", "generate", "operators", "dto"])
    lines = [line.split("\t")[:2] for line in (out / "status.tsv").read_text().splitlines()]
    failed = "failed, exit status 1"
    assert dict(lines) == {
        **dict.fromkeys(["build", "test", "ops", "gradients", "dto", "rollouts"], "ok"),
        **dict.fromkeys(["sanitize", "generate"], failed),
        "vllm": "not run: vllm is not installed",
    }
    assert run_parts("--only", "vllm") == (0, [])
    vllm.touch()
    measured = out / "operators.json"
    measured.write_text("kept")
    assert run_parts() == (1, ["generate", "vllm"])
    assert run_parts() == (1, ["generate"])
    assert measured.read_text() == "kept"
    assert run_parts("--only", "ops") == (0, ["operators"])
    assert measured.read_text() == "{}\n", "asked for although it was done: from the beginning"
