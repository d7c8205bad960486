"""Times things in turn, and finds out what the device can do at best. Needs torch alone.

CPU: a repeat counts as clean if it had its cores: all threads of the process together waited for one no longer than 3 %
of its time, as the kernel counts it. That is the most by which others can have made it longer. Medians are over clean
repeats. GPU: events around a call, behind a kernel that empties the L2 cache and gives the host time to launch what
follows; and, by `apart`, the device's time without the host's, and both together.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from machine import resident

Call = Callable[[], object]
Clock = Callable[[], float]
Timing = dict[str, Any]

FEWEST_CLEAN = 3
LONGEST_WAIT = 0.03
_MOST_PER_TURN = 8
_FLUSHED = 2**28  # bytes, more than any L2 cache holds
_COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes
_MULTIPLIED = {"cpu": 2048, "cuda": 8192}  # rows and columns
_DEPENDENT = 200  # launches, one behind the other
_GRAIN = 2**15  # entries, the most that PyTorch leaves to one thread of a CPU
_FROM_SYSTEM = 2**16  # bytes
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: of all contenders of a case together; up to three times that until repeats are clean.
        least, most: turns, whatever the seconds.
    """

    seconds: float = 4.0
    least: int = 5
    most: int = 50


class Sample(NamedTuple):
    """One repeat.

    Attributes:
        seconds: of the call.
        switches: involuntary context switches meanwhile; 0 on a GPU, which has its own clock.
        waited: seconds for which threads were ready to run and had no core, added up; None where nobody counts them.
    """

    seconds: float
    switches: int = 0
    waited: float | None = 0.0

    @property
    def clean(self) -> bool:
        """Whether the cores were there; where waiting is not counted, whether no thread was pushed off one."""
        return self.switches == 0 if self.waited is None else self.waited <= LONGEST_WAIT * self.seconds


class Watch:
    """Sees what happens to this process's threads from when it is made."""

    def __init__(self) -> None:
        self._waited = waiting()
        self._switches = _switches()

    def sample(self, seconds: float) -> Sample:
        """The repeat that took ``seconds`` since then."""
        switches, waited = _switches() - self._switches, waiting()
        known = waited is not None and self._waited is not None
        return Sample(seconds, switches, waited - self._waited if known else None)


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def waiting() -> float | None:
    """Seconds for which this process's threads have waited for a core so far; None where Linux does not count them."""
    total = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(thread.read_text().split()[1])
        except FileNotFoundError:  # a thread that has just ended
            continue
        except (OSError, IndexError, ValueError):
            return None
    return total / 1e9 if total else None


def in_turn(
    calls: Mapping[str, Sequence[Call]], device: torch.device, budget: Budget, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Medians of several contenders, called in turn.

    Args:
        calls: contender → the same call on one or more sets of inputs, which are rotated.
        device: whose time it is.
        budget: how long.
        clock: of a CPU; ``time.thread_time`` leaves out what other processes took, and suits calls on one thread.

    Returns:
        contender → what `timing` says.
    """
    once = {name: _warm_up(sets, device, clock) for name, sets in calls.items()}
    slowest = max(once.values())
    # The quick ones get more repeats than the slow ones, at little cost.
    per_turn = {name: min(_MOST_PER_TURN, max(1, int(slowest / t / 4))) for name, t in once.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    start = time.perf_counter()
    gc.disable()
    try:
        for turn in range(budget.most):
            for name, sets in calls.items():
                for extra in range(per_turn[name]):
                    samples[name].append(_sample(sets[(turn + extra) % len(sets)], device, clock))
            spent = time.perf_counter() - start
            enough = all(sum(one.clean for one in taken) >= FEWEST_CLEAN for taken in samples.values())
            if turn + 1 >= budget.least and spent > budget.seconds * (1 if enough else 3):
                break
    finally:
        gc.enable()
    return {name: timing(taken) for name, taken in samples.items()}


def timing(samples: Sequence[Sample]) -> Timing:
    """Figures of repeats.

    Returns:
        ``median_ms`` and ``fastest_ms`` of the clean repeats, ``repeats``, ``clean`` (how many were clean; 0 if fewer
        than three, or than all of one or two, so that all are used), ``context_switches``, ``waited_share`` (median of
        the repeats that are used; None where waiting is not counted), and ``samples_ms`` (those repeats).
    """
    clean = [sample for sample in samples if sample.clean]
    enough = len(clean) >= min(FEWEST_CLEAN, len(samples))
    chosen = clean if enough else samples
    seconds = [sample.seconds for sample in chosen]
    shares = [sample.waited / sample.seconds for sample in chosen if sample.waited is not None]
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "fastest_ms": min(seconds) * 1e3,
        "repeats": len(samples),
        "clean": len(clean) if enough else 0,
        "context_switches": sum(sample.switches for sample in samples),
        "waited_share": statistics.median(shares) if shares else None,
        "samples_ms": [one * 1e3 for one in seconds],
    }


def _warm_up(sets: Sequence[Call], device: torch.device, clock: Clock) -> float:
    """Calls with every set of inputs, once more than there are, and returns the seconds of the last call."""
    for call in sets:
        call()
    return _sample(sets[0], device, clock).seconds


def _sample(call: Call, device: torch.device, clock: Clock) -> Sample:
    if device.type == "cuda":
        return Sample(_sample_gpu(call, device))
    watch = Watch()
    start = clock()
    call()
    return watch.sample(clock() - start)


def _sample_gpu(call: Call, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer(device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def apart(calls: Mapping[str, Sequence[Call]], device: torch.device, budget: Budget) -> dict[str, dict[str, Any]]:
    """A GPU's time of contenders without the host's, and the time that a caller waits for both.

    Returns:
        contender → ``device_ms``, of a CUDA graph of the call that is replayed behind an emptied L2 cache (None, with
        ``not_captured``, where the call cannot be captured); and ``wall_ms``, from the call until the device has
        finished, which was idle before. Where ``wall_ms`` is much the larger, launches take longer than kernels.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, sets in calls.items():
        wall = _repeated(functools.partial(_sample_wall, sets[0], device), budget)
        try:
            graph = _captured(sets[0], device)
        except Exception as error:  # whatever a contender does that a graph cannot hold, it is measured without
            torch.cuda.synchronize(device)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found[name] = {"device_ms": None, "not_captured": reason, "wall_ms": wall}
            continue
        replayed = _repeated(functools.partial(_sample_gpu, graph.replay, device), budget)
        found[name] = {"device_ms": replayed, "wall_ms": wall}
        del graph
    return found


def _repeated(sample: Callable[[], float], budget: Budget) -> float:
    """Median milliseconds."""
    sample()
    return statistics.median(sample() for _ in range(min(budget.most, 20))) * 1e3


def _sample_wall(call: Call, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _captured(call: Call, device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``call``, which was called before; its results stay in the graph's own memory."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            call()
    return graph


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSHED, dtype=torch.uint8, device=device)


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that none is in the last cache when its turn comes; at most eight."""
    return max(1, min(8, -(-2 * last_cache(device) // max(1, bytes_of_one))))


def last_cache(device: torch.device) -> int:
    """Bytes of the GPU's L2 cache, or of the CPU's last level; 0 if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best that the device does: bytes read and written by a copy, and FLOPs of a matrix product, per second.

    ``barrier_seconds`` is what one step takes at least that needs the whole of the step before: on a GPU, the time from
    one kernel to the next in a CUDA graph; on a CPU, to hand work to all threads and wait for them.
    """
    copied, n = _COPIED[device.type], _MULTIPLIED[device.type]
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    calls = {"copy": [lambda: target.copy_(source)], "matmul": [lambda: torch.mm(a, b, out=c)]}
    times = in_turn(calls, device, Budget(1.0, 5, 20))
    return {
        "bytes_per_second": 2 * copied / (times["copy"]["fastest_ms"] / 1e3),
        "flops_per_second": 2 * n**3 / (times["matmul"]["fastest_ms"] / 1e3),
        "barrier_seconds": _barrier_seconds(device),
    }


def _barrier_seconds(device: torch.device) -> float:
    if device.type == "cuda":
        one = torch.zeros(1, device=device)
        graph = _captured(lambda: [one.add_(1) for _ in range(_DEPENDENT)], device)
        return min(_sample_gpu(graph.replay, device) for _ in range(10)) / _DEPENDENT
    shares = (torch.zeros(_GRAIN), torch.zeros(_GRAIN * torch.get_num_threads()))
    calls: dict[str, Sequence[Call]] = {str(i): [functools.partial(share.add_, 1)] for i, share in enumerate(shares)}
    times = in_turn(calls, device, Budget(0.2, 20, 200))
    return max(0.0, times["1"]["fastest_ms"] - times["0"]["fastest_ms"]) / 1e3


def floor(traffic: int, flops: int, ceiling: Mapping[str, float], barriers: int = 0) -> dict[str, Any]:
    """The least time for so many bytes and FLOPs in ``barriers`` + 1 steps of which each needs all of the one before,
    and what sets it.
    """
    shares = {
        "memory": traffic / ceiling["bytes_per_second"],
        "arithmetic": flops / ceiling["flops_per_second"],
        "barriers": barriers * ceiling["barrier_seconds"],
    }
    return {
        "ms": (max(shares["memory"], shares["arithmetic"]) + shares["barriers"]) * 1e3,
        "bound": max(shares, key=lambda name: shares[name]),
        "bytes": traffic,
        "flops": flops,
        "barriers": barriers,
    }


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes by which one call raises the memory in use at its highest; None where the system does not tell.

    On a CPU it is resident memory, so all that other code keeps for later must have been given back before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Blocks of the sizes below come from the heap from here on, whatever the allocator has made of earlier ones.
        steady_allocator()
        with _heap_without_holes():
            _allocator(_MMAP, _FROM_SYSTEM)  # larger blocks come from the system and go back to it at once
            marks.write_text("5")  # the highest mark starts anew
            before = resident("VmRSS")
            call()
            return max(0, resident("VmHWM") - before)
    finally:
        steady_allocator()


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2; ``arena`` is the size of the heap."""

    _fields_: ClassVar = [("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]


@contextlib.contextmanager
def _heap_without_holes() -> Iterator[None]:
    """Holds what is free inside the heap, without touching it.

    glibc uses a hole before it asks the system, and keeps it resident when it is free again, so that the holes that
    earlier calls have left would count as what this one has at once. Where glibc is another or older, nothing is done.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        yield
        return
    libc.mallinfo2.restype = _Mallinfo
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    held = []
    size = 2**24
    while size >= _FROM_SYSTEM:
        heap = libc.mallinfo2().arena
        held.append(libc.malloc(size))
        if libc.mallinfo2().arena > heap:  # the heap grew: it had no hole of this size left
            size //= 2
    try:
        yield
    finally:
        for block in held:
            libc.free(block)


def steady_allocator() -> None:
    """Puts glibc's thresholds where it moves them by itself in time, so that early and late calls are alike."""
    _allocator(_MMAP, 2**25)
    _allocator(_TRIM, 2**26)


def _allocator(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
