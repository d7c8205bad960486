"""Profiles of a decode or an evaluation: a trace, seconds per phase, and PyTorch's operators."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from nabla_fast.generate import NablaOutput
from nabla_fast.stats import STEPS
from nabla_fast.whole_files import part_of, require_own_files, write_file

TRACE, PHASE_TABLE, OPERATOR_TABLE = "trace.json.gz", "phases.txt", "operators.txt"
_OPERATORS = 40  # rows of the table


def prepare(directory: Path) -> None:
    """Makes the directory of a profile.

    Raises:
        NotADirectoryError: if there is a file of that name.
        PermissionError: if nothing can be written there.
        ValueError: if a link is where a file of the profile is to be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"--profile: {directory} is not a directory and cannot be made one") from None
    except OSError as error:
        why = f"{directory} cannot be made here ({error.strerror}); name a directory of your own"
        raise PermissionError(f"--profile: {why}") from None
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"--profile: {directory} cannot be written to; name a directory of your own")
    whole = [directory / name for name in (TRACE, PHASE_TABLE, OPERATOR_TABLE)]
    require_own_files([*whole, *map(part_of, whole)])


def profile(directory: Path, method: Callable[..., NablaOutput], *arguments: Any, **options: Any) -> NablaOutput:
    """Calls ``method``, and writes its trace and operators (see `tracing`) and seconds per phase to ``directory``."""
    with tracing(directory):
        output = method(*arguments, **options)
    write(directory / PHASE_TABLE, phase_table(output.stats.totals.seconds))
    return output


@contextmanager
def tracing(directory: Path) -> Iterator[None]:
    """Writes a profile of what happens in its block to ``directory``.

    ``trace.json.gz`` is for Perfetto or chrome://tracing; in it the phases have the names of `nabla_fast.stats.STEPS`.
    ``operators.txt`` has PyTorch's operators by the time that each takes itself.
    """
    # Kineto announces each profile on stderr, in the middle of a progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    with TemporaryDirectory() as elsewhere:
        made = Path(elsewhere) / TRACE
        profiler.export_chrome_trace(str(made))
        write_file(directory / TRACE, made.read_bytes())
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    write(directory / OPERATOR_TABLE, profiler.key_averages().table(sort_by=order, row_limit=_OPERATORS) + "\n")


def write(file: Path, table: str) -> None:
    """Writes a table to a file of a profile."""
    write_file(file, table.encode())


def phase_table(seconds: Mapping[str, float]) -> str:
    """Seconds and share of every phase, as text; of a profiled run, the profiler's own work is in them."""
    total = sum(seconds.values())
    lines = [f"{'phase':<12}{'seconds':>10}{'share':>8}"]
    lines += [f"{STEPS[phase]:<12}{own:>10.3f}{own / total if total else 0:>8.1%}" for phase, own in seconds.items()]
    return "\n".join([*lines, f"{'total':<12}{total:>10.3f}"]) + "\n"
