"""The question that the demo answers, and the settings it answers it with."""

from nabla_fast.config import NablaConfig

QUESTION = "Solve the following multiplication: 7 * 8. Give only the result as your final answer."

# Short answers and a reward whose gradient is smaller than the published models' have: thresholds to match.
CONFIG = NablaConfig(max_new_tokens=48, gradient_threshold=0.1)
