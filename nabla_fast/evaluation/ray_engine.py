"""An evaluation on a Ray cluster: the same pieces as in one process, by as many workers as there is room for."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nabla_fast.evaluation.journal import Journal, Record
from nabla_fast.evaluation.methods import Models
from nabla_fast.evaluation.records import latest
from nabla_fast.evaluation.runner import Plan, left_to_do
from nabla_fast.evaluation.stopping import kept_handlers
from nabla_fast.evaluation.tasks import Task
from nabla_fast.evaluation.worker import Piece, Worker

# A piece that was running on so many workers when they died is taken to be what kills them.
_DEATHS_OF_A_PIECE = 3
# So many problems may kill their workers, and the whole cluster may die so often while it loads, with nothing finished
# in between.
_PROBLEMS_IN_A_ROW = 3
_LOADS_IN_A_ROW = 3
_CPUS = 4
_CONNECT_SECONDS, _HEALTH_SECONDS = 5.0, 30.0


class WorkerLostError(RuntimeError):
    """A worker's process or machine was lost; Ray's account of it is the message."""


@dataclass(frozen=True)
class Cluster:
    """Where an evaluation runs.

    Attributes:
        address: of a Ray cluster, "auto" for the one this machine belongs to; None starts one on this machine.
        workers: how many; None takes as many as there is room for.
        cpus_per_worker: CPU cores of each; None takes 4, or all there are.
        gpu: whether each has a GPU of its own.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpu: bool = False


def evaluate(
    load: Callable[[], Models],
    task: Task,
    plan: Plan,
    journal: Journal,
    cluster: Cluster,
    *,
    retry_failed: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Does what is left to do on a cluster; results are what `nabla_fast.evaluation.runner.evaluate` gives.

    Lines come in the order in which workers finish. A lost worker is replaced wherever Ray finds room, and its problems
    are run again; a problem that is lost with three workers is recorded as failed.

    Args:
        load: makes the models; called once in each worker, on its machine.
        retry_failed, on_record: as there.

    Returns:
        The latest record of every piece of work.

    Raises:
        ImportError: if ray is not installed.
        ValueError: if the cluster has no room for a worker.
        ConnectionError: if there is no cluster at the address.
        WorkerLostError: if workers die one after the other and none finishes anything.
        RuntimeError: if a worker cannot load the models; the message says why.
    """
    with _connected(cluster) as (ray, size, cpus):
        actor = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=1 if cluster.gpu else 0, max_restarts=0)
        shared = ray.put((load, task, plan.config, plan.batch_size, cpus))
        todo = left_to_do(plan, task, journal, retry_failed=retry_failed)
        for record in _results(ray, lambda: actor.remote(shared), size, todo):
            journal.append(record)
            if on_record is not None:
                on_record(record)
    return latest(journal.records)


class _Actor:
    """A `Worker` in a process of its own."""

    def __init__(self, shared: tuple[Callable[[], Models], Task, Any, int, int]) -> None:
        import torch

        load, task, config, size, cpus = shared
        torch.set_num_threads(cpus)
        self._error: str | None = None
        try:
            self._worker = Worker(load(), task, config, size)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"

    def ready(self) -> str | None:
        """Returns when the models are loaded: None, or why they could not be."""
        return self._error

    def run(self, piece: Piece) -> list[Record]:
        """The records of a piece."""
        records: list[Record] = []
        self._worker.run(piece, records.append)
        return records


def _results(ray: Any, start: Callable[[], Any], size: int, todo: Iterable[Piece]) -> Iterator[Record]:
    """Records as workers finish; every free worker gets the next piece, a new worker when its models are loaded."""
    queue = deque(todo)
    lost: Counter[Hashable] = Counter()
    # Since anything was finished: problems that workers died on, alone, and how often one died while it loaded.
    suspects: set[str] = set()
    unloaded = 0
    idle: list[Any] = []
    # Reference of a call → its worker, and the piece it is on; None while the worker loads its models.
    running: dict[Any, tuple[Any, Piece | None]] = {}
    starting = min(size, len(queue))
    while queue or any(piece is not None for _, piece in running.values()):
        for _ in range(starting):
            worker = start()
            running[worker.ready.remote()] = worker, None
        starting = 0
        (reference,), _ = ray.wait(list(running), num_returns=1)
        worker, piece = running.pop(reference)
        try:
            told = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            starting = 1
            if piece is None:
                unloaded += 1
            elif len(piece.problems) > 1:
                queue.extendleft(piece.split())
            else:
                lost[piece.key] += 1
                suspects.add(piece.problems[0].id)
                if lost[piece.key] < _DEATHS_OF_A_PIECE:
                    queue.appendleft(piece)
                else:
                    yield from piece.failed(WorkerLostError(f"{lost[piece.key]} workers died on it; {error}"))
            if len(suspects) >= _PROBLEMS_IN_A_ROW or unloaded >= _LOADS_IN_A_ROW * size:
                raise WorkerLostError(f"--engine ray: workers die one after the other; the last: {error}") from error
        else:
            if piece is not None:
                suspects.clear()
                unloaded = 0
                yield from told
            elif told is not None:
                raise RuntimeError(f"--engine ray: a worker cannot load the models: {told}")
            idle.append(worker)
        while idle and queue:
            worker, piece = idle.pop(), queue.popleft()
            running[worker.run.remote(piece)] = worker, piece


@contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[Any, int, int]]:
    """Ray, the number of workers, and the cores of each."""
    for option, value in (("--workers", cluster.workers), ("--cpus-per-worker", cluster.cpus_per_worker)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; give at least 1")
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine ray needs ray; run pip install "nabla_fast[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        # A new cluster shows its board and its workers' output only to those who ask for them.
        own: dict[str, Any] = {"include_dashboard": False} if cluster.address is None else {}
        _require_listener(cluster.address)
        try:
            with kept_handlers():
                ray.init(address=cluster.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, TimeoutError, ValueError) as error:
            raise ConnectionError(f"--ray-address is {cluster.address!r}, and no cluster is there: {error}") from error
    try:
        yield ray, *_room(ray.cluster_resources(), cluster)
    finally:
        if ours:
            ray.shutdown()


def _require_listener(address: str | None) -> None:
    """Raises ConnectionError unless a Ray cluster is at ``address``, if that is host and port.

    Ray itself would try for minutes, and write its log to the terminal.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    meant = f"--ray-address is {address!r}, and no cluster is there"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"{meant}: {error}") from error
    if address is not None and not address.startswith("ray://"):
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        try:
            healthy = subprocess.run(command, capture_output=True, timeout=_HEALTH_SECONDS, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            healthy = False
        if not healthy:
            raise ConnectionError(f"{meant}: something else listens, or it does not answer")


def _room(resources: dict[str, float], cluster: Cluster) -> tuple[int, int]:
    cores = int(resources.get("CPU", 0))
    cpus = cluster.cpus_per_worker or max(1, min(_CPUS, cores))
    most = cores // cpus
    if most < 1:
        raise ValueError(f"--cpus-per-worker is {cpus}, and the cluster has {cores} CPU cores; give fewer")
    if cluster.gpu:
        gpus = int(resources.get("GPU", 0))
        if gpus < 1:
            raise ValueError("--device is cuda, and the cluster has no GPU; use --device cpu")
        most = min(most, gpus)
    if cluster.workers is not None and cluster.workers > most:
        raise ValueError(f"--workers is {cluster.workers}, and the cluster has room for {most}; give fewer")
    return cluster.workers or most, cpus
