"""Functions of constant shapes, captured once and replayed: CUDA graphs on a GPU, traces on a CPU.

A captured function launches all its kernels with one call of the host. What it may do is limited: shapes, addresses and
Python numbers are those of the capture. A trace on a CPU holds the same promises, so that what would go wrong on a GPU
(a number baked in, an output read after another replay has used its memory, a wait for the device) goes wrong there,
where it can be tested. It is for tests alone, and makes nothing faster.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# Traces make nothing faster; tests switch them on.
TRACE_ON_CPU = False
# PyTorch takes one capture at a time in a process.
_capturing = threading.Lock()


def usable(device: torch.device) -> bool:
    """Whether functions on this device are captured."""
    return device.type == "cuda" or (device.type == "cpu" and TRACE_ON_CPU)


_streams: WeakSet[Any] = WeakSet()
_drawing = threading.Lock()


def separate_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a GPU that is none of those given out here before and still held.

    PyTorch gives out 32 in turn, again and again. Matrix products of one stream share scratch memory, whose address a
    graph holds; so what runs beside a graph must be on, or captured on, another stream.
    """
    with _drawing:
        for _ in range(32):
            stream = torch.cuda.Stream(device)
            if stream not in _streams:
                break
        _streams.add(stream)
        return stream


class CaptureError(RuntimeError):
    """A function cannot be captured; the message says why."""


@dataclass
class Counts:
    """Captures, and how long they took."""

    captures: int = 0
    seconds: float = 0.0


class Pool:
    """Memory that several graphs share. Only one of them runs at a time.

    An output of a graph holds until the next call of any graph of the pool.

    Args:
        device: of all tensors of the graphs.
        capture: whether functions are captured at all, or always run as they are.

    Attributes:
        watched: tensors (weights) whose addresses captures hold; where one has moved, a graph is captured anew.
        counts: of all its graphs, those that are given up included.
    """

    def __init__(self, device: torch.device, capture: bool = True) -> None:
        self.device, self.capture = device, capture
        self.watched: tuple[Tensor, ...] = ()
        self.counts = Counts()
        self.lock = threading.RLock()
        self.stream = separate_stream(device) if device.type == "cuda" else None
        self.outputs: list[Tensor] = []
        self.recorded: WeakSet[Any] = WeakSet()

    def spoil(self) -> None:
        """Overwrites the outputs of the last replay, as the next one does on a GPU."""
        for x in self.outputs:
            x.fill_(torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else -(2**31))
        self.outputs = []

    def addresses(self) -> tuple[int, ...]:
        """Where the watched tensors are."""
        return tuple(x.data_ptr() for x in self.watched)


class Graph:
    """A function of tensors of constant shapes. The first call runs it as it is, the second captures it.

    The first call is what CUDA calls the warm-up: kernels are compiled and workspaces allocated. The function itself is
    given with each call and not kept, so that a graph keeps nothing alive that the function belongs to.

    Args:
        pool: whose memory it uses.
        in_place: how many of the first arguments are captured as they are, not copied (those that the function writes
            to, and large ones); they have to be the same tensors in each call.

    Attributes:
        captures: how often the function was captured.
    """

    def __init__(self, pool: Pool, in_place: int = 0) -> None:
        self.pool, self.in_place = pool, in_place
        self.captures = 0
        self._warm = False
        self._inputs: list[Tensor] = []
        self._outputs: list[Any] = []  # tensors, or None
        self._spec: Any = None
        self._addresses: tuple[int, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """What the function gives. The tensors hold until the pool's next call: clone what is to be kept.

        Args:
            function: the same in each call: tensors in, tensors and None out, in any nesting of tuples and named
                tuples. It reads no tensor on the host, and nothing but its arguments and tensors that stay where they
                are (weights) changes between calls.

        Raises:
            CaptureError: if the function cannot be captured.
            ValueError: if an argument has another shape or dtype than before, or was captured as it is and has moved.
        """
        with self.pool.lock:
            if self._replay is not None and self._addresses != self.pool.addresses():
                self._warm, self._replay, self._outputs = False, None, []
            if not self._warm or not self.pool.capture:
                self._warm = True
                return function(*arguments)
            if self._replay is None:
                self._capture(function, arguments)
            self._fill(arguments)
            assert self._replay is not None
            self._replay()
            return tree_unflatten(self._outputs, self._spec)

    def _fill(self, arguments: tuple[Tensor, ...]) -> None:
        for i, (own, given) in enumerate(zip(self._inputs, arguments, strict=True)):
            if own.shape != given.shape or own.dtype != given.dtype or own.device != given.device:
                raise ValueError(
                    f"argument {i} of a graph must be {own.dtype} of shape {tuple(own.shape)} on {own.device}, got "
                    f"{given.dtype} of shape {tuple(given.shape)} on {given.device}"
                )
            if own.data_ptr() == given.data_ptr() and own.stride() == given.stride():
                continue
            if i < self.in_place:
                raise ValueError(f"argument {i} of a graph was captured as it is, so it must be the same tensor")
            own.copy_(given)

    def _capture(self, function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
        start = time.perf_counter()
        self._addresses = self.pool.addresses()
        self._inputs = [x if i < self.in_place else x.detach().clone() for i, x in enumerate(arguments)]
        try:
            with _capturing:
                self._replay = self._recorded(function) if self.pool.stream is not None else self._traced(function)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CaptureError(f"{type(error).__name__}: {reason[0] if reason else ''}") from error
        self.captures += 1
        self.pool.counts.captures += 1
        self.pool.counts.seconds += time.perf_counter() - start

    def _recorded(self, function: Callable[..., Any]) -> Callable[[], None]:  # pragma: no cover - needs a GPU
        graph = torch.cuda.CUDAGraph()
        # PyTorch has no use for the memory of graphs that are all gone, and refuses it.
        memory = next((other.pool() for other in self.pool.recorded), None)
        # A wait of the host during the capture is an error; other threads may go on.
        with torch.cuda.graph(graph, pool=memory, stream=self.pool.stream, capture_error_mode="thread_local"):
            out = function(*self._inputs)
        self.pool.recorded.add(graph)
        self._outputs, self._spec = tree_flatten(out)
        replay: Callable[[], None] = graph.replay
        return replay

    def _traced(self, function: Callable[..., Any]) -> Callable[[], None]:
        from torch.fx.experimental.proxy_tensor import make_fx

        # Fake tensors hold no data, so that reading one raises, as it would in a CUDA graph.
        traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*self._inputs)
        for node in traced.graph.nodes:
            shape = getattr(node.meta.get("val"), "shape", ())
            if not all(isinstance(size, int) for size in shape):
                raise ValueError(f"the shape of what {node.target} gives depends on data")
        traced.graph.eliminate_dead_code()
        traced.recompile()

        def replay() -> None:
            self.pool.spoil()
            with torch.no_grad():
                self._outputs, self._spec = tree_flatten(traced(*self._inputs))
            own = [x for x in self._outputs if isinstance(x, Tensor)]
            self.pool.outputs = [x for x in own if not any(x is given for given in self._inputs)]

        return replay


class Graphs:
    """Graphs by key, the most recently used ones; on a GPU each holds memory.

    They serve one user at a time, from `begin` to `end`. Between users they refer to nothing of the model.

    Args:
        device: of all their tensors.
        most: how many are kept.
        capture: see `Pool`.

    Attributes:
        memory: tensors that several of them read, by key.
    """

    def __init__(self, device: torch.device, most: int = 24, capture: bool = True) -> None:
        self.pool = Pool(device, capture)
        self.most = most
        self.memory: dict[Hashable, Tensor] = {}
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._left: Any = None

    def begin(self, watched: tuple[Tensor, ...], counts: Counts) -> None:
        """A user begins, with weights that are watched, and counters of its own."""
        self.pool.watched, self.pool.counts = watched, counts
        if self._left is not None:  # pragma: no cover - needs a GPU
            # Which may be another stream than that of the user before.
            torch.cuda.current_stream(self.pool.device).wait_event(self._left)

    def end(self) -> None:
        """The user ends."""
        self.pool.watched, self.pool.counts = (), Counts()
        if self.pool.stream is not None:  # pragma: no cover - needs a GPU
            self._left = torch.cuda.Event()
            self._left.record(torch.cuda.current_stream(self.pool.device))

    def get(self, key: Hashable, in_place: int = 0) -> Graph:
        """The graph of a key, which stands for one function; the least recently used goes where there are too many."""
        with self.pool.lock:
            if key not in self._graphs:
                self._graphs[key] = Graph(self.pool, in_place)
                if len(self._graphs) > self.most:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key]

    def clear(self) -> None:
        """Gives up all graphs."""
        with self.pool.lock:
            self._graphs.clear()

    def __len__(self) -> int:
        return len(self._graphs)


def bucket(size: int, least: int = 16) -> int:
    """The size of the graph that serves ``size``: a multiple of ``least``, at most a quarter above from 64 on, and an
    eighth from 512 on."""
    share = 8 if size >= 512 else 4
    step = max(least, 1 << max(0, (size // share).bit_length() - 1))
    return max(least, -(-size // step) * step)
