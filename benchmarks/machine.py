"""What the benchmarks record about the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import nabla_fast
from nabla_fast.ops import measured, native
from nabla_fast.whole_files import write_file

_PACKAGE = Path(nabla_fast.__file__).parent
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flashinfer-python",
)


def machine() -> dict[str, Any]:
    """Processor, cores, vector instructions and system, as plain data."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, compute capability, multiprocessors, memory and L2 cache of a GPU, as plain data."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_cache_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, Any]:
    """Of Python, the packages that matter, our kernels, and what the native library was built with."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    built = native.build_info() if native.available() else None
    return {**found, "native": built, "kernels": measured.KERNELS}


def slug(device: torch.device) -> str:
    """The processor's or GPU's name in small letters, digits and hyphens: a directory of results.

    Processors of one name may differ in their vectors, so that other ones than AVX512 stand behind it.
    """
    vectors = torch.backends.cpu.get_cpu_capability()
    named = f"{processor() or platform.machine()}{'' if vectors == 'AVX512' else f' {vectors}'}"
    name = gpu(device)["name"] if device.type == "cuda" else named
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit(where: Path = _PACKAGE) -> str | None:
    """The commit that is checked out at ``where``, that of the package measured unless told otherwise.

    "+" stands behind it where files differ from it; None without git.
    """
    try:
        name = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], cwd=where, text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed.strip() else "")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (now) or VmHWM (highest); Linux only."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def write(path: Path, result: Any) -> None:
    """Replaces the JSON file at once, so that a run that is cut leaves a whole file; links are not written through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())
