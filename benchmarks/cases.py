"""What a benchmark case is, and how a case of an operator becomes a record. The operators are in test_bench_*.py."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from measure import Budget, apart, ceilings, floor, in_turn, input_sets, peak_bytes
from shapes import GEMMA2_2B, LLAMA31_8B, QWEN25_05B, QWEN25_7B, SMOLLM2_135M, Shape
from torch import Tensor

from nabla_fast.ops import backends
from nabla_fast.ops.types import Head
from nabla_fast.testing import operators as operator_inputs

BACKENDS = ("reference", "native", "triton", "cuda")
CHECKED_ROWS = 16
# Of the largest value. A baseline in half precision rounds its logits, so half of its argmaxes may be others; ours does
# not.
OUR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.int64: 0.0}
BASELINE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.int64: 0.0}
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        device: where.
        quick: small sizes, few repeats, no compilation; to see that everything works, and roughly how.
        known_ceilings: dtype → what `ceilings` has measured, here or in the run that this one goes on with.
    """

    device: torch.device
    quick: bool = False
    known_ceilings: dict[torch.dtype, dict[str, float]] = field(default_factory=dict, compare=False)

    @property
    def budget(self) -> Budget:
        if self.quick:
            return Budget(0.5, 3, 10)
        return Budget(0.7, 8, 50) if self.device.type == "cuda" else Budget()

    def ceilings(self, dtype: torch.dtype) -> dict[str, float]:
        """See `measure.ceilings`; measured when first asked for, which `run.py` does before anything else."""
        if dtype not in self.known_ceilings:
            self.known_ceilings[dtype] = ceilings(self.device, dtype)
        return self.known_ceilings[dtype]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.device.type == "cuda":
            return (torch.bfloat16,)
        return (torch.float32,) if self.quick else (torch.float32, torch.bfloat16)

    @property
    def models(self) -> list[tuple[Shape, int]]:
        """Models and how many rows (tokens ahead) of each."""
        if self.device.type == "cuda":
            models = [(QWEN25_7B, 1024), (GEMMA2_2B, 256), (LLAMA31_8B, 256)]
        else:
            models = [(SMOLLM2_135M, 32 if self.quick else 256), (QWEN25_05B, 64)]
        return models[:1] if self.quick else models

    @property
    def grid(self) -> Iterator[tuple[Shape, int, torch.dtype]]:
        """Model, rows and dtype of every case of most operators."""
        return ((shape, rows, dtype) for shape, rows in self.models for dtype in self.dtypes)

    def why_not_compiled(self, model: str) -> str | None:
        if self.quick:
            return "--quick compiles nothing"
        if self.device.type == "cuda" and model != self.models[0][0].name:
            return "compiled for the first model alone, to save time on a GPU that is lent"
        return None


class Case(NamedTuple):
    """Something to measure: ``run`` gives its record."""

    name: str
    run: Callable[[], Record]


class Inputs(NamedTuple):
    """Arguments of a call: what has a row per row of the result, and what all rows share."""

    rows: tuple[Tensor, ...]
    shared: tuple[Any, ...]


@dataclass
class Contest:
    """One operator at one size, and who computes it.

    Attributes:
        operator: its name, or a variant's.
        shape: sizes by name.
        inputs: draws arguments from a seed.
        meaning: what every contender must return, computed in float64.
        ours, baselines: contender → function of the arguments; each returns one or more tensors with a row per row.
        libraries: baselines of others, which are left out with their error where they do not work here.
        skipped: contender → why it is not measured.
        traffic, flops: the least that any implementation needs.
        barriers: how often it must wait for all of what it has done so far; see `measure.floor`.
        checked: takes the place of `check`, for what has more than one right result.
    """

    operator: str
    model: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[int], Inputs]
    meaning: Callable[..., Any]
    ours: dict[str, Callable[..., Any]]
    baselines: dict[str, Callable[..., Any]]
    traffic: int
    flops: int
    skipped: dict[str, str] = field(default_factory=dict)
    barriers: int = 0
    libraries: dict[str, Callable[..., Any]] = field(default_factory=dict)
    checked: Callable[[Contest, str, Inputs, Sequence[Tensor]], dict[str, float]] | None = None

    def case(self, setting: Setting) -> Case:
        sizes = "x".join(str(n) for n in self.shape.values())
        operator = self.operator.replace(",", "").replace(" ", "_")
        name = f"{operator}-{self.model}-{sizes}-{_dtype_name(self.dtype)}"
        return Case(name, functools.partial(measure_contest, self, setting))


def measure_contest(contest: Contest, setting: Setting) -> Record:
    """Checks every contender against the meaning, then times them in turn and takes their memory.

    Raises:
        AssertionError: if a contender computes something else; nothing wrong is timed.
    """
    first = contest.inputs(0)
    contenders = {**contest.ours, **contest.baselines, **contest.libraries}
    meant = meaning_of(contest, first)
    errors: dict[str, dict[str, float]] = {}
    skipped = dict(contest.skipped)
    for name in contenders:
        try:
            errors[name] = (contest.checked or check)(contest, name, first, meant)
        except Exception as error:
            if name not in contest.libraries:
                raise
            skipped[name] = f"{type(error).__name__}: {error}"
    contenders = {name: contenders[name] for name in errors}
    del meant
    count = input_sets(sum(x.nbytes for x in _tensors(first)), setting.device)
    sets = [first, *(contest.inputs(seed) for seed in range(1, count))]
    calls = {name: [functools.partial(f, *one.rows, *one.shared) for one in sets] for name, f in contenders.items()}
    timings = in_turn(calls, setting.device, setting.budget)
    divided = apart(calls, setting.device, setting.budget) if setting.device.type == "cuda" else {}
    rated = contest.dtype if contest.dtype.is_floating_point else torch.float32
    least = floor(contest.traffic, contest.flops, setting.ceilings(rated), contest.barriers)
    return {
        "suite": "operators",
        "name": contest.operator,
        "model": contest.model,
        "dtype": _dtype_name(contest.dtype),
        "shape": contest.shape,
        "input_sets": count,
        "floor": least,
        "contenders": {
            name: {
                "ours": name in contest.ours,
                **timing,
                **divided.get(name, {}),
                "over_floor": timing["median_ms"] / least["ms"],
                "peak_bytes": peak_bytes(calls[name][0], setting.device),
                **errors[name],
            }
            for name, timing in timings.items()
        },
        "skipped": skipped,
    }


def meaning_of(contest: Contest, inputs: Inputs) -> list[Tensor]:
    """What the first rows of a contest's results must be, in float64."""
    few = tuple(x[:CHECKED_ROWS] for x in inputs.rows)
    return _flat(contest.meaning(*operator_inputs.double(few), *operator_inputs.double(inputs.shared)))


def check(contest: Contest, name: str, inputs: Inputs, meant: Sequence[Tensor]) -> dict[str, float]:
    """Holds a contender's first rows against ``meant``.

    Returns:
        ``error``, the largest as a share of the largest value; ``rows_with_other_integers``, a share.

    Raises:
        AssertionError: if it is more than `OUR_TOLERANCE` or `BASELINE_TOLERANCE` allow, or NaN.
    """
    function = {**contest.ours, **contest.baselines, **contest.libraries}[name]
    got = _flat(function(*(x.clone() for x in inputs.rows), *inputs.shared))
    if len(got) != len(meant):
        raise AssertionError(f"{contest.operator}: {name} is wrong: {len(got)} results, not {len(meant)}")
    pairs = [(one[: len(other)], other) for one, other in zip(got, meant, strict=True) if one is not None]
    # A row whose token is another one has another embedding too; how many there may be is looked at by itself.
    same = torch.ones(len(meant[0]), dtype=torch.bool, device=meant[0].device)
    for one, other in pairs:
        if not other.is_floating_point():
            same &= one == other
    differ = int((~same).sum())
    ours = name in contest.ours
    most = (OUR_TOLERANCE if ours else BASELINE_TOLERANCE)[contest.dtype]
    most_rows = max(1, len(same) // 2) if not ours and contest.dtype == torch.bfloat16 else 0
    if differ == len(same):  # one row, whose numbers are looked at all the same
        same |= True
    floats = [(one[same].double(), other) for one, other in pairs if other.is_floating_point()]
    errors = [(x - y[same]).abs().max() / y.abs().max().clamp(min=1e-30) for x, y in floats]
    error = float(torch.stack(errors).max()) if errors else 0.0  # unlike Python's, this max keeps NaN
    if not (error <= most and differ <= most_rows):
        raise AssertionError(
            f"{contest.operator} {contest.model} {contest.dtype}: {name} is wrong: error {error:.2g} (at most {most}), "
            f"the integers of {differ} of {len(same)} rows differ (at most {most_rows})"
        )
    return {"error": error, "rows_with_other_integers": differ / len(same)}


def backends_of(
    operator: str, device: torch.device, function: Callable[..., Any]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """``function(..., backend=name)`` of every back end that can run ``operator`` here, and why the others cannot."""
    reasons = {name: backends.why_not(operator, name, device.type) for name in BACKENDS}
    if device.type == "cuda":  # not meant to be fast, and a GPU is lent for minutes
        reasons["reference"] = "it says what is right; eager is what a user would write"
    usable = {n: functools.partial(function, backend=n) for n, reason in reasons.items() if reason is None}
    return usable, {n: reason for n, reason in reasons.items() if reason is not None}


def with_compiled(
    eager: Callable[..., Any], setting: Setting, model: str
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """``eager`` as it is and compiled, and why it is not compiled."""
    reason = setting.why_not_compiled(model)
    if reason is not None:
        return {"eager": eager}, {"torch.compile": reason}
    return {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}, {}


def why_not_installed(package: str, name: str, device: torch.device) -> str | None:
    """Why a library of GPU kernels cannot be compared with; None if it can."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    return None if importlib.util.find_spec(package) else f"{name} is not installed"


def libraries_of(
    known: dict[str, tuple[str, Callable[..., Any]]], device: torch.device
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Of name → (package, function) the libraries that are here, and why the others are not."""
    reasons = {name: why_not_installed(package, name, device) for name, (package, _) in known.items()}
    usable = {name: function for name, (_, function) in known.items() if reasons[name] is None}
    return usable, {name: reason for name, reason in reasons.items() if reason is not None}


def head_of(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Head:
    """An output head of a model's size, whose logits have a standard deviation of 3 where latents have one of 1."""
    scale = 3 / shape.width**0.5
    weight = operator_inputs.randn(shape.vocabulary, shape.width, dtype=dtype, seed=seed, scale=scale, device=device)
    return Head(weight, 1.0, shape.softcap)


def capped(z: Tensor, softcap: float) -> Tensor:
    """Logits after the final softcap, as a user writes it."""
    return softcap * torch.tanh(z / softcap) if softcap else z


def _flat(result: Any) -> list[Any]:
    return [result] if isinstance(result, Tensor) else list(result)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
