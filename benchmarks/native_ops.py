"""The native (C++ CPU) operators against what a user would write instead, in one process, in turn.

    python benchmarks/native_ops.py --output benchmarks/results/native_ops.json

Every row of the result holds medians over clean repeats (no involuntary context switch while they ran, `repeats` says
how many were clean and how many there were), and the ratio of ours to each baseline. With less than three clean repeats
all are used and `clean` is 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine, resident, write
from torch import Tensor

from nabla_fast.ops import native
from nabla_fast.ops.reference import Head, Tables

ROWS = 200
WIDTH = 576  # of SmolLM2-135M
VOCABULARIES = (49152, 151936)
STEPS = 20  # max_iters of the published settings
Row = dict[str, Any]


def measure(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, Row]:
    """Median seconds of each candidate, called in turn."""
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in candidates}
    for repeat in range(repeats + 2):
        for name, function in candidates.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            if repeat >= 2:
                times[name].append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before))
    result = {}
    for name, samples in times.items():
        clean = [seconds for seconds, switches in samples if switches == 0]
        chosen = clean if len(clean) >= 3 else [seconds for seconds, _ in samples]
        result[name] = {
            "median_ms": statistics.median(chosen) * 1e3,
            "fastest_ms": min(chosen) * 1e3,
            "clean": len(clean) if len(clean) >= 3 else 0,
            "repeats": len(samples),
            "context_switches": sum(switches for _, switches in samples),
        }
    return result


def row(operator: str, dtype: torch.dtype, shape: dict[str, int], timings: dict[str, Row], **more: object) -> Row:
    """One line of the result: the first timing is ours, the others are baselines."""
    ours, *baselines = timings
    ratios = {name: timings[ours]["median_ms"] / timings[name]["median_ms"] for name in baselines}
    print(
        operator, str(dtype), shape, f"{timings[ours]['median_ms']:.3f} ms", {k: round(v, 4) for k, v in ratios.items()}
    )
    return {
        "operator": operator,
        "dtype": str(dtype).removeprefix("torch."),
        **shape,
        "timings": timings,
        "ours_over_baseline": ratios,
        **more,
    }


def textbook_stats(z: Tensor) -> tuple[Tensor, ...]:
    p = torch.softmax(z, dim=-1)
    max_prob, token = p.max(dim=-1)
    return max_prob, token, torch.logsumexp(z, dim=-1), torch.special.entr(p).sum(-1)


def thrifty_stats(z: Tensor) -> tuple[Tensor, ...]:
    """The phrasing with the fewest passes over z."""
    largest, token = z.max(dim=-1)
    x = z - largest[:, None]
    e = x.exp()
    total = e.sum(-1)
    return 1 / total, token, largest + total.log(), total.log() - (e * x).sum(-1) / total


def separate_argmax_stats(z: Tensor) -> tuple[Tensor, ...]:
    """As above; the maximum and its index apart, which the compiler vectorises."""
    largest = z.amax(dim=-1)
    x = z - largest[:, None]
    e = x.exp()
    total = e.sum(-1)
    return 1 / total, z.argmax(-1), largest + total.log(), total.log() - (e * x).sum(-1) / total


def relaxed_stats_rows(repeats: int) -> list[Row]:
    rows = []
    compiled = {
        f"compiled_{f.__name__}": torch.compile(f, dynamic=False)
        for f in (textbook_stats, thrifty_stats, separate_argmax_stats)
    }
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            z = (torch.randn(ROWS, vocabulary) * 3).to(dtype)
            target = torch.empty_like(z)
            timings = measure(
                {
                    "native": lambda z=z: native.relaxed_stats(z),
                    "eager": lambda z=z: textbook_stats(z),
                    "eager_thrifty": lambda z=z: thrifty_stats(z),
                    **{name: lambda z=z, function=function: function(z) for name, function in compiled.items()},
                    "copy": lambda z=z, target=target: target.copy_(z),
                },
                repeats,
            )
            best_compiled = min(timings[name]["median_ms"] for name in compiled)
            # A copy moves every byte twice, one reading moves it once.
            share = timings["copy"]["median_ms"] / 2 / timings["native"]["median_ms"]
            rows.append(
                row(
                    "relaxed_stats",
                    dtype,
                    {"N": ROWS, "V": vocabulary},
                    timings,
                    times_eager=timings["eager"]["median_ms"] / timings["native"]["median_ms"],
                    times_best_eager=min(timings[name]["median_ms"] for name in ("eager", "eager_thrifty"))
                    / timings["native"]["median_ms"],
                    times_best_compiled=best_compiled / timings["native"]["median_ms"],
                    share_of_copy_bandwidth=share,
                )
            )
    return rows


def linear_relaxed_stats_rows(repeats: int) -> list[Row]:
    rows = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            h, weight = (torch.randn(n, WIDTH).to(dtype) for n in (ROWS, vocabulary))
            head, out = Head(weight / 8), torch.empty(ROWS, vocabulary, dtype=dtype)
            timings = measure(
                {
                    "native": lambda h=h, head=head: native.linear_relaxed_stats(h, head),
                    "bare_matmul": lambda h=h, head=head: h @ head.weight.T,
                    "bare_matmul_out": lambda h=h, head=head, out=out: torch.mm(h, head.weight.T, out=out),
                    "bare_matmul_swapped": lambda h=h, head=head: head.weight @ h.T,
                },
                repeats,
            )
            shape = {"N": ROWS, "V": vocabulary, "d": WIDTH}
            rows.append(row("linear_relaxed_stats", dtype, shape, timings))
    return rows


def likelihood_inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = (torch.randn(n, WIDTH).to(dtype) for n in (ROWS, vocabulary))
    return h, weight / 8, torch.randint(0, vocabulary, (ROWS,))


def native_likelihood(h: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return native.log_likelihood_gradient(h, Head(weight), tokens, True)


def eager_likelihood(h: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = h.detach().requires_grad_()
    log_likelihood = F.log_softmax((leaf @ weight.T).float(), dim=-1).gather(-1, tokens[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(log_likelihood.sum(), leaf)
    return log_likelihood.detach(), gradient


LIKELIHOODS = {"native": native_likelihood, "eager": eager_likelihood}


def peak_growth(name: str, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes by which one call raises this process's resident memory at its highest; Linux only.

    For a process of its own: what an allocator kept from earlier calls would hide what a call needs.
    """
    inputs = likelihood_inputs(vocabulary, dtype)
    LIKELIHOODS[name](*(x[:1] for x in inputs[:1]), inputs[1][:64], torch.zeros(1, dtype=torch.int64))  # loads code
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = resident("VmRSS")
    LIKELIHOODS[name](*inputs)
    return resident("VmHWM") - before


def peaks(vocabulary: int, dtype: torch.dtype) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    result = {}
    for name in LIKELIHOODS:
        with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            result[name] = pool.apply(peak_growth, (name, vocabulary, dtype))
    return result


def log_likelihood_gradient_rows(repeats: int) -> list[Row]:
    rows = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = likelihood_inputs(vocabulary, dtype)
            timings = measure({name: lambda f=f, inputs=inputs: f(*inputs) for name, f in LIKELIHOODS.items()}, repeats)
            memory = peaks(vocabulary, dtype)
            print("peak memory", {name: f"{size / 2**20:.1f} MiB" for name, size in memory.items()})
            rows.append(
                row(
                    "log_likelihood_gradient",
                    dtype,
                    {"N": ROWS, "V": vocabulary, "d": WIDTH},
                    timings,
                    peak_bytes=memory,
                    peak_over_eager=memory["native"] / memory["eager"],
                )
            )
    return rows


def dto_call(parameters: Tensor, gradient: Tensor, head: Head, latents: bool, steps: int) -> Callable[[], object]:
    """Makes ``steps`` steps in one call, so small that no token changes."""
    tables = Tables(head, head.weight, head.weight, 1e-3)
    moments = torch.zeros_like(parameters), torch.zeros_like(parameters)
    rates = torch.full((steps,), 1e-7)
    tokens, _ = native.dto_step(
        *(parameters, *moments, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), rates),
        *(gradient, tables),
        latents=latents,
        max_steps=0,
    )

    def call() -> None:
        made = torch.zeros(1, dtype=torch.int64)
        native.dto_step(
            *(parameters, *moments, made, tokens, rates, gradient, tables), latents=latents, max_steps=steps
        )
        assert int(made) == steps

    return call


def dto_latents_rows(repeats: int) -> list[Row]:
    """One row; `spread` is the standard deviation of its logits: 1 is flat, 8 has one token with most of the weight."""
    rows = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            weight = (torch.randn(vocabulary, WIDTH) / WIDTH**0.5).to(dtype)
            gradient = torch.randn(1, vocabulary)
            for spread in (1, 3, 8):
                h = torch.randn(1, WIDTH) * spread
                vector, line = h[0].to(dtype), h.to(dtype)
                timings = measure(
                    {
                        f"native_{STEPS}_steps": dto_call(h, gradient, Head(weight), True, STEPS),
                        "native_1_step": dto_call(h, gradient, Head(weight), True, 1),
                        "bare_h_w": lambda line=line, weight=weight: line @ weight.T,
                        "bare_w_h": lambda vector=vector, weight=weight: weight @ vector,
                    },
                    repeats,
                )
                rows.append(
                    dto_row("dto_step_latents", dtype, {"V": vocabulary, "d": WIDTH, "spread": spread}, timings)
                )
    return rows


def dto_logits_rows(repeats: int) -> list[Row]:
    rows = []
    for vocabulary in VOCABULARIES:
        z, gradient = torch.randn(1, vocabulary) * 2, torch.randn(1, vocabulary)
        parameter = z.clone().requires_grad_()
        optimizer = torch.optim.Adam([parameter], lr=1e-7)

        @torch.no_grad()
        def eager(parameter: Tensor = parameter, gradient: Tensor = gradient, optimizer: Any = optimizer) -> Tensor:
            p = torch.softmax(parameter, dim=-1)
            weighted = p * gradient
            parameter.grad = weighted - p * weighted.sum(-1, keepdim=True)
            optimizer.step()
            return parameter.argmax(-1)

        head = Head(torch.zeros(vocabulary, 1))
        timings = measure(
            {
                f"native_{STEPS}_steps": dto_call(z, gradient, head, False, STEPS),
                "native_1_step": dto_call(z, gradient, head, False, 1),
                "eager": eager,
            },
            4 * repeats,
        )
        rows.append(dto_row("dto_step_logits", torch.float32, {"V": vocabulary}, timings))
    return rows


def dto_row(operator: str, dtype: torch.dtype, shape: dict[str, int], timings: dict[str, Row]) -> Row:
    """A line with the time of one of many steps, and of a call of one, as shares of every baseline."""
    many, one, *baselines = timings
    per_step = {name: timings[many]["median_ms"] / STEPS / timings[name]["median_ms"] for name in baselines}
    single = {name: timings[one]["median_ms"] / timings[name]["median_ms"] for name in baselines}
    print(operator, "per step", {name: round(share, 4) for name, share in per_step.items()})
    return row(operator, dtype, {"N": 1, **shape}, timings, per_step_over=per_step, one_step_call_over=single)


OPERATORS: dict[str, Callable[[int], list[Row]]] = {
    "relaxed_stats": relaxed_stats_rows,
    "linear_relaxed_stats": linear_relaxed_stats_rows,
    "log_likelihood_gradient": log_likelihood_gradient_rows,
    "dto_step_latents": dto_latents_rows,
    "dto_step_logits": dto_logits_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--operator", choices=OPERATORS, action="append", help="measure this one only; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not native.available():
        raise SystemExit(f"nothing to measure: {native.why_missing()}")
    result = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **native.build_info()},
        "threads": arguments.threads,
        "load_average_before": os.getloadavg(),
        "rows": [line for name in arguments.operator or OPERATORS for line in OPERATORS[name](arguments.repeats)],
        "load_average_after": os.getloadavg(),
    }
    if arguments.output:
        write(arguments.output, result)


if __name__ == "__main__":
    main()
