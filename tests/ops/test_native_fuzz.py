"""Every operator, native and public, called at random: a right number or one sentence, never a crash.

NABLA_FAST_FUZZ_SEED and NABLA_FAST_FUZZ_CALLS (calls per operator) run others and more.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from native_fuzz import operators
from processes import run_python

SCRIPT = str(Path(__file__).with_name("native_fuzz.py"))


def test_calls_at_random() -> None:
    assert len(operators()) == 39
    seed, calls = os.environ.get("NABLA_FAST_FUZZ_SEED", "0"), os.environ.get("NABLA_FAST_FUZZ_CALLS", "50")
    output = run_python(SCRIPT, seed, calls, OMP_NUM_THREADS="1")
    failures = json.loads(output.splitlines()[-1])
    assert not failures, "\n".join(failures[:20])
