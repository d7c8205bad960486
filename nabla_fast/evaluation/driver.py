"""Prepares and runs an evaluation: where it runs, what it is profiled to, what is written at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from nabla_fast import profiling
from nabla_fast.config import NablaConfig
from nabla_fast.evaluation import ray_engine, report, runner
from nabla_fast.evaluation.batch import Models
from nabla_fast.evaluation.journal import Journal, Record
from nabla_fast.evaluation.ray_engine import Cluster
from nabla_fast.evaluation.runner import Plan
from nabla_fast.evaluation.tasks import Task
from nabla_fast.models.loading import choose_device


def choose_cluster(
    engine: str,
    address: str | None,
    workers: int | None,
    cpus_per_worker: int | None,
    device: str,
    reward_device: str | None = None,
) -> Cluster | None:
    """Where ``engine`` ("local" or "ray") runs; None for this process.

    Raises:
        ValueError: for another engine, an option that means nothing to a local one, or a device that Ray cannot give.
    """
    options = {"--ray-address": address, "--workers": workers, "--cpus-per-worker": cpus_per_worker}
    if engine == "local":
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option} is {value}, but --engine is local; give --engine ray, or leave it out")
        return None
    if engine != "ray":
        raise ValueError(f"--engine is {engine!r}; use local or ray")
    chosen = choose_device(device)
    if reward_device is not None and choose_device(reward_device, "--reward-device") != chosen:
        raise ValueError(
            f"--reward-device is {reward_device} and --device {device}, but Ray gives each worker one device; leave "
            "out --reward-device, or use --engine local"
        )
    if chosen.type == "cuda" and chosen.index:
        raise ValueError(f"--device is {device}, but Ray gives each worker a GPU of its own; use --device cuda")
    return Cluster(address, workers, cpus_per_worker, chosen.type == "cuda")


def prepare_profile(profile: Path | None, cluster: Cluster | None) -> None:
    """Finds a mistake in --profile before anything is loaded. Errors as `nabla_fast.profiling.prepare`."""
    if profile is not None and cluster is not None:
        raise ValueError(
            f"--profile is {profile}, but --engine is ray; a trace is of one process, so use --engine local"
        )
    if profile is not None:
        profiling.prepare(profile)


def with_key(config: NablaConfig) -> NablaConfig:
    """The key of the environment in its place: workers on other machines have an environment of their own."""
    key = os.environ.get("VLLM_API_KEY")
    return config.replace(vllm_api_key=key) if key and config.vllm_url and config.vllm_api_key is None else config


def make_engine(
    load: Callable[[], Models],
    task: Task,
    plan: Plan,
    journal: Journal,
    *,
    cluster: Cluster | None = None,
    profile: Path | None = None,
    announce: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Callable[..., list[Record]]:
    """What does the run, ready to begin; takes ``retry_failed`` and ``on_record`` of `runner.evaluate`.

    Args:
        load: makes the models, in this process or in each worker of ``cluster``.
        profile: a directory for a trace of the first problems, taken here.
        announce: a context for what takes a while, by its name.
    """
    if cluster is not None:
        return partial(ray_engine.evaluate, load, task, plan, journal, cluster)
    with announce("loading the models"):
        models = load()
    if profile is not None:
        with announce("profiling the first problems"):
            runner.trace(models, task, plan, profile)
    return partial(runner.evaluate, models, task, plan, journal)


def write(out: Path, records: Sequence[Record], profile: Path | None = None) -> dict[str, Any]:
    """Writes what a finished run says, and returns its summary: that, plots, and to ``profile`` seconds per phase.

    Warns:
        UserWarning: if matplotlib, which draws the plots, is not installed.
    """
    if profile is not None:
        profiling.write(profile / profiling.PHASE_TABLE, runner.phase_tables(records))
    return report.write_report(out)
