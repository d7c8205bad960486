"""The C++ tests of csrc/tests under AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOL_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
CMAKE, NINJA = (shutil.which(name, path=TOOL_PATH) for name in ("cmake", "ninja"))
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc" / "tests").is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(CMAKE is None, reason="needs cmake"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.timeout(900),
]

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    # libgomp is not instrumented: ThreadSanitizer sees its threads, but not how they wait for each other.
    "OMP_NUM_THREADS": "1",
}


def build(sanitizers: str) -> Path:
    """Builds what changed since the last time; returns the folder of the executables."""
    folder = ROOT / "build" / f"sanitize_{sanitizers.replace(',', '_')}_torch_{torch.__version__.split('+')[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        str(CMAKE), "-S", str(ROOT), "-B", str(folder),
        f"-DNABLA_FAST_TORCH_DIR={Path(torch.__file__).parent}", f"-DNABLA_FAST_SANITIZE={sanitizers}",
    ]  # fmt: skip
    if NINJA is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once would build into each other
        if subprocess.run(configure, capture_output=True, check=False).returncode:
            # Configured for another path or generator, perhaps.
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
            run(configure)
        run([str(CMAKE), "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / "csrc" / "tests"


def run(command: list[str]) -> str:
    result = subprocess.run(
        command,
        env={**os.environ, **OPTIONS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    return result.stdout


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("name", ["gradient_cache", "draw_token", "linear", "token_layers"])
def test_under_sanitizers(name: str, sanitizers: str) -> None:
    output = run([str(build(sanitizers) / f"{name}_test")])
    assert output == "passed\n"
