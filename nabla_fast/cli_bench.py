"""`nabla-fast bench`: runs the benchmarks of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

_CHECKOUT = Path(__file__).resolve().parents[1]
_SUITES = ("operators", "dto", "generate")

_Suite = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(_SUITES)}; give the option again for another one. Default: all.", metavar="SUITE"),
]
_Only = Annotated[str | None, typer.Option(help="Cases with TEXT in their names.", metavar="TEXT")]
_Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, few repeats, no torch.compile.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: as many as torch takes.", min=1)]
_Output = Annotated[
    Path | None,
    typer.Option(help="Default: benchmarks/results/<machine>/<date>.json.", metavar="FILE"),
]


def bench(
    suite: _Suite = None,
    only: _Only = None,
    quick: _Quick = False,
    device: _Device = "auto",
    threads: _Threads = None,
    output: _Output = None,
) -> None:
    """Measures the operators, an optimisation and a decode against what a user would write, and against the machine.

    Needs a source checkout: benchmarks and tests are not part of an installed package.
    """
    unknown = [name for name in suite or () if name not in _SUITES]
    if unknown:
        raise ValueError(f"--suite is {unknown[0]!r}; use {', '.join(_SUITES)}")
    # A process of its own: nothing that this one has loaded or set weighs on what is measured.
    command = [sys.executable, str(find_runner(_CHECKOUT)), "--device", device, *(["--quick"] if quick else ())]
    for name in suite or ():
        command += ["--suite", name]
    for option, value in (("--only", only), ("--threads", threads), ("--output", output)):
        if value is not None:
            command += [option, str(value)]
    raise typer.Exit(subprocess.run(command).returncode)


def find_runner(checkout: Path) -> Path:
    """benchmarks/run.py of a source checkout.

    Raises:
        FileNotFoundError: if there is none, as in an installed package.
    """
    runner = checkout / "benchmarks" / "run.py"
    if not runner.is_file() or not (checkout / "tests" / "operator_inputs.py").is_file():
        raise FileNotFoundError(
            f"nabla-fast bench needs a source checkout, and {checkout} has no benchmarks/run.py; clone the repository "
            "and install it with `pip install --no-build-isolation -e .`"
        )
    return runner
