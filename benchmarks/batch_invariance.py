"""Whether a prompt gets the same answer alone and in a batch, by dtype.

    python benchmarks/batch_invariance.py            # the bundled arithmetic pair, on the CPU

Problems of the bundled task are decoded all together and one by one, without drafts. In float32 and float64 the answers
are the same; in bfloat16 matrix products of another number of rows round differently, and tokens may differ. The
figures go to results/batch_invariance.json.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import torch
from machine import commit, machine, versions, write
from run import RESULTS, positive

import nabla_fast as nf
from nabla_fast.demo import arithmetic
from nabla_fast.evaluation.arithmetic import problems

CONFIG = arithmetic.CONFIG.replace(draft_tokens=0)
DTYPES = ("float32", "bfloat16")


def compare(dtype: str, prompts: list[str]) -> dict[str, Any]:
    """How the answers to ``prompts`` in one batch differ from those to each alone."""
    models = (*arithmetic.load_policy(device="cpu", dtype=dtype), *arithmetic.load_reward(device="cpu", dtype=dtype))
    config = CONFIG.replace(max_batch_size=len(prompts))
    together = nf.generate(*models, prompts, config).sequences
    alone = [nf.generate(*models, prompt, config).sequences[0] for prompt in prompts]
    pairs = [(a.tolist(), b.tolist()) for a, b in zip(alone, together, strict=True)]
    first = [next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1) for a, b in pairs if a != b]
    return {
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens_alone": sum(len(a) for a, _ in pairs),
        "same_answers": sum(a == b for a, b in pairs),
        "first_different_token": sorted(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=positive, default=100, help="problems of the test split")
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = [problem.question for problem in islice(problems("test"), options.problems)]
    found = [compare(dtype, prompts) for dtype in DTYPES]
    for one in found:
        print(f"{one['dtype']}: {one['same_answers']} of {one['prompts']} answers are the same alone and in a batch")
    result = {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "pair": "arithmetic",
        "config": CONFIG.to_dict(),
        "comparisons": found,
    }
    write(RESULTS / "batch_invariance.json", result)


if __name__ == "__main__":
    main()
