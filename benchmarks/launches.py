"""Counts the operators that a gradient and a token of a rollout launch, with and without the exchange of layers.

python benchmarks/launches.py    # writes benchmarks/results/launches.json

On a CPU, for models as deep as Qwen2.5-7B and Qwen3-4B; see `nabla_fast.testing.launches`. It says nothing of seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from nabla_fast.testing import launches

OUTPUT = Path(__file__).parent / "results" / "launches.json"


def main() -> None:
    counted = {}
    for name, fused in (("layers as transformers has them", False), ("norms and rotary embeddings fused", True)):
        with launches.as_on_a_gpu(fused=fused):
            gradient, step = launches.of_a_gradient().total(), launches.of_a_rollout_step()
        counted[name] = {"gradient": gradient, "rollout step": step}
        print(f"{name}: {gradient} a gradient, {step:g} a token of a rollout")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    OUTPUT.write_text(json.dumps({"layers": launches.LAYERS, **versions, "operators": counted}, indent=2) + "\n")
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
