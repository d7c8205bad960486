"""Whether a prompt gets the same answer alone and in a batch, by dtype.

    python benchmarks/batch_invariance.py            # SmolLM2-135M in float32 and bfloat16; about ten minutes

Eight prompts are decoded together and one by one, without drafts. In float32 and float64 the answers are the same; in
bfloat16 matrix products of another number of rows round in another order, and sampled tokens may differ. What was
measured goes to results/batch_invariance.json.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from typing import Any

import torch
from machine import commit, machine, versions, write
from run import RESULTS
from test_bench_rollouts import QUESTIONS

import nabla_fast as nf
from nabla_fast.demo import load_smollm2, load_smollm2_reward

CONFIG = nf.NablaConfig(
    max_new_tokens=32, max_rollouts=2, draft_tokens=0, anchor="rollout", learning_rate=0.1, reward_coeff=5.0
)


def compare(dtype: str, prompts: list[str], config: nf.NablaConfig = CONFIG) -> dict[str, Any]:
    """How the answers to ``prompts`` in one batch differ from those to each alone."""
    options = {"device": "cpu", "dtype": dtype}
    models = (*load_smollm2(**options), *load_smollm2_reward(**options))
    together = nf.generate(*models, prompts, config)
    same, first, tokens = 0, [], 0
    reward_difference = 0.0
    for i, prompt in enumerate(prompts):
        alone = nf.generate(*models, [prompt], config)
        a, b = alone.sequences[0].tolist(), together.sequences[i].tolist()
        tokens += len(a)
        if a == b:
            same += 1
            reward_difference = max(reward_difference, abs(alone.rewards[0] - together.rewards[i]))
        else:
            first.append(next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))))
    return {
        "dtype": dtype,
        "prompts": len(prompts),
        "tokens_alone": tokens,
        "same_answers": same,
        "first_difference": sorted(first),
        "largest_reward_difference_of_same_answers": reward_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes to compare")
    dtypes = parser.parse_args().dtype
    torch.set_num_threads(2)
    found = [compare(dtype, list(QUESTIONS)) for dtype in dtypes]
    for one in found:
        print(
            f"{one['dtype']}: {one['same_answers']} of {one['prompts']} answers are the same; the others differ first "
            f"at tokens {one['first_difference']}"
        )
    write(
        RESULTS / "batch_invariance.json",
        {
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "model": "SmolLM2-135M",
            "config": CONFIG.to_dict(),
            "comparisons": found,
        },
    )


if __name__ == "__main__":
    main()
