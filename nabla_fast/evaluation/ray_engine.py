"""An evaluation on a Ray cluster: the same pieces as in one process, by as many workers as there is room for."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from nabla_fast.evaluation.batch import Models
from nabla_fast.evaluation.journal import Journal, Record
from nabla_fast.evaluation.records import latest
from nabla_fast.evaluation.runner import left_to_do
from nabla_fast.evaluation.tasks import Task
from nabla_fast.evaluation.worker import Piece, Plan, Worker
from nabla_fast.models.loading import choose_device
from nabla_fast.stopping import kept_handlers

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

    Lines come in the order in which answers are finished, each while others are under way. A lost worker is replaced
    wherever Ray finds room, and what it had not told is run again; a problem that is lost with three workers is
    recorded as failed. ``load`` makes the models; it is called once in each worker, on its machine.

    Raises:
        ImportError: if ray is not installed.
        ValueError: if the cluster has no room for a worker.
        ConnectionError: if there is no cluster at the address.
        WorkerLostError: if workers die one after the other and none finishes anything.
        RuntimeError: if a worker cannot load the models; the message says why.
    """
    with _connected(cluster) as (ray, size, cpus):
        actor = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=1 if cluster.gpu else 0, max_restarts=0)
        shared = ray.put((load, task, plan, cpus))
        todo = left_to_do(plan, task, journal, retry_failed=retry_failed)
        with closing(_results(ray, lambda: actor.remote(shared), size, todo)) as records:
            for record in records:
                journal.append(record)
                if on_record is not None:
                    on_record(record)
    return latest(journal.records)


class _Actor:
    """A `Worker` in a process of its own."""

    def __init__(self, shared: tuple[Callable[[], Models], Task, Plan, int]) -> None:
        import torch

        load, task, plan, cpus = shared
        torch.set_num_threads(cpus)
        self._error: str | None = None
        try:
            self._worker = Worker(load(), task, plan)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"

    def ready(self) -> str | None:
        """Returns when the models are loaded: None, or why they could not be."""
        return self._error

    def run(self, piece: Piece) -> Iterator[Record]:
        """Each record of a piece as soon as it is there."""
        told: SimpleQueue[Record | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._worker.run(piece, told.put)
            except BaseException as error:  # raised where Ray sees it
                told.put(error)
            else:
                told.put(None)

        # The worker calls whoever hears of its records, and Ray asks for them.
        threading.Thread(target=work, daemon=True).start()
        while (one := told.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one


@dataclass
class _Call:
    """What a worker is doing.

    Attributes:
        worker: the actor.
        piece: what it is on; None while it loads its models.
        told: problems of the piece whose records have come.
    """

    worker: Any
    piece: Piece | None = None
    told: set[str] = field(default_factory=set)


class _Deaths:
    """How often workers died, of ``size`` that there are to be, and of what."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lost: Counter[Hashable] = Counter()
        self.forget()

    def forget(self) -> None:
        """Something was finished: problems that workers died on, alone, and deaths while loading count anew."""
        self._suspects: set[str] = set()
        self._unloaded = 0

    def after(self, call: _Call, error: Exception) -> tuple[list[Piece], list[Record]]:
        """What is to be done again after the worker of ``call`` was lost, and what is given up."""
        if call.piece is None:
            self._unloaded += 1
            return [], []
        left = [replace(call.piece, problems=(one,)) for one in call.piece.problems if one.id not in call.told]
        if len(call.piece.problems) > 1 or not left:
            return left, []
        problem = call.piece.problems[0].id
        key = call.piece.arm, call.piece.seed, problem
        self._lost[key] += 1
        self._suspects.add(problem)
        if self._lost[key] < _DEATHS_OF_A_PIECE:
            return left, []
        return [], call.piece.failed(WorkerLostError(f"{self._lost[key]} workers died on it; {error}"))

    def require_hope(self, error: Exception) -> None:
        """Raises WorkerLostError where workers only ever die."""
        if len(self._suspects) >= _PROBLEMS_IN_A_ROW or self._unloaded >= _LOADS_IN_A_ROW * self._size:
            raise WorkerLostError(f"--engine ray: workers die one after the other; the last: {error}") from error


def _results(ray: Any, start: Callable[[], Any], size: int, todo: Iterable[Piece]) -> Generator[Record, None, None]:
    """Records as they come; every free worker gets the next piece, a new worker when its models are loaded."""
    queue = deque(todo)
    deaths = _Deaths(size)
    idle: list[Any] = []
    # What Ray waits for: the answer of a worker that loads, the stream of records of one that is on a piece.
    running: dict[Any, _Call] = {}
    starting = min(size, len(queue))
    try:
        while queue or any(call.piece is not None for call in running.values()):
            for _ in range(starting):
                worker = start()
                running[worker.ready.remote()] = _Call(worker)
            starting = 0
            (waited,), _ = ray.wait(list(running), num_returns=1)
            call = running.pop(waited)
            try:
                told = ray.get(waited if call.piece is None else next(waited))
            except StopIteration:
                idle.append(call.worker)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                starting = 1
                again, failed = deaths.after(call, error)
                queue.extendleft(again)
                yield from failed
                deaths.require_hope(error)
            else:
                if call.piece is not None:
                    deaths.forget()
                    running[waited] = call
                    call.told.add(told["problem"])
                    yield told
                elif told is None:
                    idle.append(call.worker)
                else:
                    raise RuntimeError(f"--engine ray: a worker cannot load the models: {told}")
            while idle and queue:
                worker, piece = idle.pop(), queue.popleft()
                running[worker.run.options(num_returns="streaming").remote(piece)] = _Call(worker, piece)
    finally:
        # Whoever ends early: without a word a worker would first do all that it was given.
        for worker in (*idle, *(call.worker for call in running.values())):
            ray.kill(worker)


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
