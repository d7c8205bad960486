"""Whole decodes with the Triton back end, in the interpreter; tests/test_gpu.py has them on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoder import BASE
from test_gpu import require_same_decodes


@pytest.mark.parametrize(
    "variant",
    [
        {"parameterization": "logits", "anchor": "rollout"},
        {"update_postfix": True, "max_new_tokens": 6, "gumbel_noise": 0.5, "gradient_threshold": 0.3},
    ],
    ids=str,
)
def test_a_decode_gives_the_tokens_of_the_other_back_ends(variant: dict[str, Any]) -> None:
    require_same_decodes(("reference", "triton"), torch.device("cpu"), BASE.replace(max_rollouts=3, **variant))
