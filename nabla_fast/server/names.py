"""The method that a model's name asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nabla_fast.config import Sampling
from nabla_fast.server.asks import RequestError

# Method → the settings that it brings.
_METHODS: dict[str, dict[str, Any]] = {
    "nabla": {},
    "nabla-likeliest": {"proposal": "likeliest"},
    "nabla-first-order": {"proposal": "first_order"},
    "nabla-prefix-reward": {"proposal": "prefix_reward"},
    "nabla-guided": {"proposal": "guided"},
    "greedy": {"max_rollouts": 1, "rollout": Sampling(temperature=0.0), "proposal": "dto"},
}
_BEST_OF = re.compile(r"best-of-n-([1-9]\d?)")
_MOST_SAMPLES = 64
_LISTED_SAMPLES = 8


@dataclass(frozen=True)
class Method:
    """How an answer is found.

    Attributes:
        name: as it stands before the model's.
        changes: settings that it brings.
        samples: answers that are drawn, of which the one with the highest reward is taken.
    """

    name: str
    changes: dict[str, Any]
    samples: int = 1


def model_names(served: str) -> list[str]:
    """The names under which the model called ``served`` is listed; best-of-n takes other numbers, too."""
    *proposals, greedy = _METHODS
    methods = [*proposals, f"best-of-n-{_LISTED_SAMPLES}", greedy]
    return [served, *(f"{method}/{served}" for method in methods)]


def method_of(name: object, served: str) -> Method:
    """The method of a model's ``name``.

    Raises:
        RequestError: if it is none of the names.
    """
    if not isinstance(name, str) or not name:
        raise RequestError(f"model must be a name such as 'nabla/{served}', got {name!r}", "model")
    method, _, rest = (f"nabla/{name}" if name == served else name).partition("/")
    if rest == served and method in _METHODS:
        return Method(method, _METHODS[method])
    best_of = _BEST_OF.fullmatch(method)
    if rest != served or best_of is None or int(best_of[1]) > _MOST_SAMPLES:
        raise RequestError(
            f"the model {name!r} does not exist; use {', '.join(model_names(served))} (best-of-n from 1 to "
            f"{_MOST_SAMPLES})",
            "model",
            "model_not_found",
            status=404,
        )
    # Without the gradient cache, so that a sample costs one reward call whatever the others say, as in
    # `nabla_fast.baselines.sample`.
    return Method(method, {"max_rollouts": 1, "gradient_cache": False, "proposal": "dto"}, int(best_of[1]))
