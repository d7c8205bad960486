"""Where trajectories come from."""

from nabla_fast.rollout.base import Rollout, RolloutBackend, RolloutStream, Start, StopRule, rollout
from nabla_fast.rollout.hf import HFRollout

__all__ = ["HFRollout", "Rollout", "RolloutBackend", "RolloutStream", "Start", "StopRule", "rollout"]
