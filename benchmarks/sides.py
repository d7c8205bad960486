"""nabla_fast against the published schedule: two sides that do the same work, timed in turn."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from cases import Record
from measure import Sample, Watch, peak_bytes, timing
from tables import OURS

Outcome = dict[str, Any]
Side = Callable[[], Outcome]
# What a side tells besides its time; the rest of an outcome is for this module.
_HIDDEN = ("uncharged_seconds", "result")


def compare(sides: Mapping[str, Side], device: torch.device, *, repeats: int, again: bool) -> dict[str, Outcome]:
    """Figures of every side.

    Args:
        sides: name → a run, which returns its counters, ``result`` (a tensor that should be the same for all) and,
            where some of its time is not to be charged, ``uncharged_seconds``.
        repeats: runs of each side, in turn.
        again: whether to run each side once more: on a CPU for its peak memory, on a GPU, which tells that of every
            run, to count how often the host waited for it.

    Returns:
        name → what `measure.timing` gives, the side's own counters, ``error`` (its `difference` from nabla_fast),
        ``peak_bytes`` and ``host_waits`` (None where they were not measured).
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    outcomes: dict[str, Outcome] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            outcomes[name], sample = _timed(side, device)
            samples[name].append(sample)
    extra = {name: _again(side, device) if again else {} for name, side in sides.items()}
    meant = outcomes[OURS]["result"]
    return {
        name: {
            "ours": name.startswith(OURS),
            **timing(samples[name]),
            "error": difference(outcome["result"], meant),
            "peak_bytes": None,
            "host_waits": None,
            **{key: value for key, value in outcome.items() if key not in _HIDDEN},
            **extra[name],
        }
        for name, outcome in outcomes.items()
    }


def side_record(
    suite: str,
    name: str,
    model: str,
    dtype: torch.dtype,
    shape: dict[str, Any],
    figures: Any,
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> Record:
    """The record of a comparison; nothing bounds it but the models. ``skipped``: side → why it was not run."""
    return {
        "suite": suite,
        "name": name,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "floor": None,
        "contenders": figures,
        "skipped": dict(skipped),
    }


def difference(got: torch.Tensor, meant: torch.Tensor) -> float | None:
    """The largest difference over the largest value; the share of tokens that differ; None for other shapes."""
    if got.shape != meant.shape:
        return None
    if not meant.is_floating_point():
        return float((got != meant).double().mean()) if meant.numel() else 0.0
    return float((got.double() - meant.double()).abs().max() / meant.double().abs().max().clamp(min=1e-30))


def _timed(side: Side, device: torch.device) -> tuple[Outcome, Sample]:
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    watch = Watch()
    start = time.perf_counter()
    outcome = side()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start - outcome.get("uncharged_seconds", 0.0)
    if on_gpu:
        return {**outcome, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}, Sample(seconds)
    return outcome, watch.sample(seconds)


def _again(side: Side, device: torch.device) -> Outcome:
    """What is not to be found out while time is taken."""
    if device.type != "cuda":
        return {"peak_bytes": peak_bytes(side, device)}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            side()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"host_waits": sum("synchronizing CUDA operation" in str(warning.message) for warning in heard)}
