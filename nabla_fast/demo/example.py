"""The question that the demo answers, and the settings it answers it with."""

from nabla_fast.config import NablaConfig

QUESTION = "Solve the following multiplication: 6 * 9. Give only the result as your final answer."

# Short answers, and a reward whose gradient is smaller than those of the published models: thresholds to match.
CONFIG = NablaConfig(max_new_tokens=32, gradient_threshold=0.1)
