"""`nabla-fast bench`: runs the benchmarks of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

_CHECKOUT = Path(__file__).resolve().parents[2]


def command(context: typer.Context) -> None:
    """Measures the operators, an optimization and a decode against what a user would write, and against the machine.

    Takes the options of benchmarks/run.py in a source checkout, --help among them.
    """
    # A process of its own: nothing that this one has loaded or set weighs on what is measured.
    code = subprocess.run([sys.executable, str(find_runner(_CHECKOUT)), *context.args]).returncode
    # Of a process that a signal ended, as a shell reports it.
    raise typer.Exit(code if code >= 0 else 128 - code)


def find_runner(checkout: Path) -> Path:
    """benchmarks/run.py of a source checkout; raises FileNotFoundError in an installed package, which has none."""
    runner = checkout / "benchmarks" / "run.py"
    if not runner.is_file():
        raise FileNotFoundError(
            f"nabla-fast bench needs a source checkout, and {checkout} has no benchmarks/run.py; clone the repository "
            "and install it with `pip install --no-build-isolation -e .`"
        )
    return runner
