"""Where trajectories come from."""

from nabla_fast.rollout.base import Rollout, RolloutBackend, StopRule
from nabla_fast.rollout.hf import HFRollout

__all__ = ["HFRollout", "Rollout", "RolloutBackend", "StopRule"]
