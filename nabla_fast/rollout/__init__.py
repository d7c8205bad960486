"""Rollout back ends."""

from nabla_fast.rollout.base import (
    Rollout,
    RolloutBackend,
    RolloutError,
    RolloutStream,
    ServerLostError,
    StopRule,
    rollout,
)
from nabla_fast.rollout.hf import HFRollout
from nabla_fast.rollout.vllm import VLLMRollout

__all__ = [
    "HFRollout",
    "Rollout",
    "RolloutBackend",
    "RolloutError",
    "RolloutStream",
    "ServerLostError",
    "StopRule",
    "VLLMRollout",
    "rollout",
]
