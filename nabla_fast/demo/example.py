"""What SmolLM2 with its reward model is asked, and the settings that belong to the pair."""

from nabla_fast.config import NablaConfig

QUESTION = "Solve the following multiplication: 6 * 9. Give only the result as your final answer."

# Short answers, and a reward whose gradient is smaller than those of the published models: thresholds to match.
CONFIG = NablaConfig(max_new_tokens=32, gradient_threshold=0.1)

# The reasoning-gym tasks that the reward model is trained and measured on, of sizes at which SmolLM2-135M-Instruct is
# neither always right nor always wrong.
TASKS: dict[str, dict[str, int]] = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
