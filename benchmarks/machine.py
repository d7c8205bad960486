"""What the benchmarks record about the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


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


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (now) or VmHWM (highest); Linux only."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def write(path: Path, result: dict[str, Any]) -> None:
    """Replaces the JSON file at once, so that a run that is cut leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
