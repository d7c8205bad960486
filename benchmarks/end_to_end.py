"""nabla_fast against the published schedule on SmolLM2-135M and its reward model: everything but rollouts.

    python benchmarks/end_to_end.py --output benchmarks/results/end_to_end.json --plot benchmarks/results/end_to_end.png

Both sides get the same rollouts, drawn once and replayed, and their time is left out. The sides run in turn, prompt by
prompt, in one process, another one first each time; a finished prompt is written at once. `published` relaxes all rows
ahead in every step, as the published code does; `published_moving` only the row that moves.

The published code knows the anchor "argmax" alone; under "rollout" its schedule is run with our anchor.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import machine, write
from pairs import Replay
from published_schedule import Models, PublishedSchedule, State
from rich.console import Console
from rich.table import Table

import nabla_fast as nf
from nabla_fast import decoder
from nabla_fast.demo import load_smollm2, load_smollm2_reward
from nabla_fast.generate import Pair, make_pair, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.objective import Conversation, Objective
from nabla_fast.ops import native
from nabla_fast.rollout import HFRollout
from nabla_fast.sampling import Sampler, sequence_seeds
from nabla_fast.stats import PHASES, SequenceStats

# To each of these SmolLM2 writes an answer of 256 tokens and more.
PROMPTS = (
    "A train leaves at 9:40 and travels 210 km at 60 km/h. It then waits 25 minutes and travels another 90 km at "
    "45 km/h. When does it arrive? Explain every step.",
    "Three friends share a bill of 96 dollars. Maria pays twice as much as Ben, and Ben pays twice as much as Carl. "
    "How much does each pay? Explain every step in detail.",
    "A water tank is filled by two pipes, one in 6 hours and the other in 3 hours. How long do both take together? "
    "Explain in detail and check your answer.",
    "Explain step by step how to find the greatest common divisor of 84 and 126, and check the result.",
    "Write a detailed solution: the sum of three consecutive whole numbers is 72. Which numbers are they?",
)
ANCHORS = ("argmax", "rollout")
RELAXED = {"ahead": ("published",), "moving": ("published_moving",), "both": ("published", "published_moving")}
CHARGED = tuple(phase for phase in PHASES if phase != "rollout")
Row = dict[str, Any]


@dataclasses.dataclass
class Bench:
    """The models, ready for both sides, and what one prompt's runs share."""

    models: Models
    pair: Pair
    replay: Replay

    def ours(self, prompt: str, config: nf.NablaConfig) -> tuple[torch.Tensor, float, SequenceStats, Row]:
        """`nabla_fast.generate` with the replayed rollouts: tokens, reward, counters, nothing more."""
        chat = [{"role": "user", "content": prompt}]
        ids = tuple(generation_prompt_ids(self.pair.tokenizer, chat))
        conversation = Conversation(ids, self.pair.reward_model.chat_frame(chat), config.max_new_tokens)
        sequence = decoder.Sequence(0, conversation, sequence_seeds(config.seed, [ids])[0])
        objective = Objective(self.pair.language_model, self.pair.reward_model, config)
        stop = stop_rule(self.pair, config)
        decoder.Decoder(objective, self.replay, Sampler(), stop).decode([sequence])
        return sequence.current.tokens, sequence.current.reward, sequence.stats, {}

    def published(
        self, prompt: str, config: nf.NablaConfig, relaxed: str
    ) -> tuple[torch.Tensor, float, SequenceStats, Row]:
        """The baseline with the replayed rollouts, and how many gradients its selections took."""
        schedule = PublishedSchedule(self.models, self.replay, config, stop_rule(self.pair, config), relaxed)
        state: State = schedule.decode([{"role": "user", "content": prompt}])
        more = {"selections": state.selections, "selection_evaluations": state.selection_evaluations}
        return state.trajectory.tokens, state.trajectory.reward, state.stats, more

    def side(self, name: str, prompt: str, config: nf.NablaConfig) -> Callable[[], tuple[Any, ...]]:
        """The run that goes by ``name`` in the result."""
        if name.startswith("published"):
            return lambda: self.published(prompt, config, "moving" if name.endswith("moving") else "ahead")
        return lambda: self.ours(prompt, config.replace(gradient_cache=name == "ours"))


def timed(run: Callable[[], tuple[Any, ...]]) -> tuple[Row, list[int]]:
    """One run's figures, and its tokens. Seconds outside all phases are ``other``."""
    gc.collect()
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    tokens, reward, stats, more = run()
    wall = time.perf_counter() - start
    seconds = {phase: stats.seconds[phase] for phase in CHARGED}
    seconds["other"] = wall - sum(stats.seconds.values())
    figures = {
        "seconds": seconds,
        "everything_but_rollouts": wall - stats.seconds["rollout"],
        "reward": reward,
        "response_tokens": len(tokens),
        **stats.counters(),
        **more,
        "context_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches,
    }
    return figures, tokens.tolist()


def measure_prompt(bench: Bench, prompt: str, config: nf.NablaConfig, names: Sequence[str]) -> Row:
    """All sides on one prompt, in the order of ``names``."""
    runs, tokens = {}, {}
    for name in names:
        runs[name], tokens[name] = timed(bench.side(name, prompt, config))
        print(f"{config.anchor} {name}: {runs[name]['everything_but_rollouts']:.1f} s", flush=True)
    return {
        "text": bench.pair.tokenizer.decode(tokens["ours"], skip_special_tokens=True),
        "runs": dict(sorted(runs.items())),
        "tokens_equal": {name: tokens[name] == tokens["ours"] for name in sorted(names)},
        "ours_over": ratios(runs),
    }


def ratios(runs: dict[str, Row]) -> Row:
    """Of ours to each other side: seconds but for rollouts, and gradient evaluations."""
    ours = runs["ours"]
    measures = ("everything_but_rollouts", "gradient_evaluations")
    return {
        name: {measure: ours[measure] / run[measure] if run[measure] else None for measure in measures}
        for name, run in sorted(runs.items())
        if name != "ours"
    }


def totals(prompts: Sequence[Row], anchor: str) -> Row:
    """Sums over the finished prompts, and the ratios of the sums."""
    finished = [prompt["anchors"][anchor] for prompt in prompts]
    runs = {}
    for name, first in finished[0]["runs"].items():
        rows = [one["runs"][name] for one in finished]
        runs[name] = {key: sum(row[key] for row in rows) for key in first if key not in ("seconds", "reward")}
        runs[name]["seconds"] = {phase: sum(row["seconds"][phase] for row in rows) for phase in first["seconds"]}
        runs[name]["mean_reward"] = sum(row["reward"] for row in rows) / len(rows)
    return {
        "runs": runs,
        "prompts_with_equal_tokens": {name: sum(one["tokens_equal"][name] for one in finished) for name in runs},
        "ours_over": ratios(runs),
    }


def show(console: Console, anchor: str, total: Row, prompts: int) -> None:
    """Prints seconds per phase of every side and how many times ours the published schedule takes."""
    runs = total["runs"]
    others = [name for name in runs if name != "ours"]
    table = Table(title=f'{prompts} prompts, anchor "{anchor}": seconds without rollouts')
    table.add_column("phase")
    for name in ("ours", *others):
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("published / ours", justify="right")
    baseline = next(name for name in runs if name.startswith("published"))

    def line(label: str, values: dict[str, float], style: str) -> None:
        ratio = f"{values[baseline] / values['ours']:.2f}" if values["ours"] else "-"
        table.add_row(label, *(format(values[name], style) for name in ("ours", *others)), ratio)

    for phase in (*CHARGED, "other"):
        line(phase, {name: run["seconds"][phase] for name, run in runs.items()}, ".2f")
    table.add_section()
    line("total", {name: run["everything_but_rollouts"] for name, run in runs.items()}, ".2f")
    table.add_section()
    for counter in ("gradient_evaluations", "dto_iterations", "optimised_positions", "rollouts", "rejections"):
        line(counter.replace("_", " "), {name: run[counter] for name, run in runs.items()}, "d")
    console.print(table)
    equal = ", ".join(f"{name} {n}" for name, n in total["prompts_with_equal_tokens"].items() if name != "ours")
    console.print(f"prompts with the tokens of ours, of {prompts}: {equal}")


def description(arguments: argparse.Namespace, config: nf.NablaConfig) -> Row:
    """What was run, and on what."""
    settings = dataclasses.asdict(config)
    for varied in ("anchor", "gradient_cache"):
        del settings[varied]
    return {
        "machine": machine(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "native": native.build_info() if native.available() else None,
        },
        "threads": arguments.threads,
        "models": {"language_model": "SmolLM2-135M-Instruct", "reward_model": "its bundled adapter"},
        "dtype": "float32",
        "config": settings,
        "load_average_before": os.getloadavg(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="take this many of the prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-rollouts", type=int, default=8)
    parser.add_argument("--gradient-threshold", type=float, default=4.0)
    parser.add_argument("--anchor", choices=(*ANCHORS, "both"), default="both")
    parser.add_argument("--relaxed", choices=RELAXED, default="ahead", help="rows that the baseline holds densely")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load(threads: int, config: nf.NablaConfig) -> Bench:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # it warns of padding, and there is none
    loaded = (*load_smollm2(device="cpu", dtype="float32"), *load_smollm2_reward(device="cpu", dtype="float32"))
    pair = make_pair(*loaded, config)
    return Bench(Models(*loaded), pair, Replay(HFRollout(pair.language_model)))


def main() -> None:
    arguments, console = parse(), Console(highlight=False)
    config = nf.NablaConfig(
        confidence_threshold=0.97,
        gradient_threshold=arguments.gradient_threshold,
        max_iters=20,
        max_new_tokens=arguments.max_new_tokens,
        max_rollouts=arguments.max_rollouts,
        seed=0,
    )
    bench = load(arguments.threads, config)
    anchors = ANCHORS if arguments.anchor == "both" else (arguments.anchor,)
    names = ("ours", *RELAXED[arguments.relaxed], "ours_without_cache")
    short = config.replace(max_new_tokens=8, max_rollouts=2, gradient_threshold=None)
    for name in names:  # first calls load code and choose kernels
        timed(bench.side(name, "Say hello.", short))
    result = description(arguments, config)
    result["prompts"] = []
    for index, prompt in enumerate(PROMPTS[: arguments.prompts]):
        # Rollouts are shared by all sides and anchors of a prompt, and never by two prompts.
        bench.replay.drawn.clear()
        order = names[index % len(names) :] + names[: index % len(names)]
        measured = {anchor: measure_prompt(bench, prompt, config.replace(anchor=anchor), order) for anchor in anchors}
        result["prompts"].append({"prompt": prompt, "order": order, "anchors": measured})
        result["totals"] = {anchor: totals(result["prompts"], anchor) for anchor in anchors}
        result["load_average_after"] = os.getloadavg()
        write(arguments.output, result)
        console.print(f"{index + 1} of {arguments.prompts} prompts done")
    for anchor, total in result["totals"].items():
        show(console, anchor, total, len(result["prompts"]))
    if arguments.plot:
        from end_to_end_plot import draw

        draw(result["totals"], arguments.plot)


if __name__ == "__main__":
    main()
