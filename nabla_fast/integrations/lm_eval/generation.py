"""What a task says of generation, as settings of ∇-Reasoner."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from nabla_fast.config import NablaConfig, Sampling

# Below lm-eval's own logger, which has a handler and a level.
logger = logging.getLogger("lm_eval.nabla_fast")

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
_ACCEPTED = ("until", *_LENGTHS, *_SAMPLING)
# What changes nothing: how lm-eval's tasks say "no beams", and speed.
_IDLE = {"num_beams": (1,), "use_cache": (True, False)}


def configured(
    config: NablaConfig, gen_kwargs: Mapping[str, Any], *, task_sampling: bool, longest: int | None = None
) -> NablaConfig:
    """``config`` with what a task's ``generation_kwargs`` say.

    ``until`` is added to ``config.stop_strings``. The first of max_gen_toks, max_new_tokens, max_tokens and
    max_completion_tokens that is there is ``max_new_tokens``, ``longest`` at the most; without any, ``config``'s own
    counts, where lm-eval's Hugging Face models take 256. With ``task_sampling``, do_sample, temperature, top_p and
    top_k are those of the rollouts, and without sampling nothing is sampled; else they are left out.

    Raises:
        ValueError: for what ∇-Reasoner does not do.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    for name, value in given.items():
        if name not in _ACCEPTED and value not in _IDLE.get(name, ()):
            raise ValueError(
                f"{name} is {value!r} in the task's generation_kwargs or in --gen_kwargs, and cannot be used with the "
                f"model nabla_fast; use {', '.join(_ACCEPTED)}"
            )
    changes: dict[str, Any] = {"stop_strings": (*_stop_strings(given.get("until")), *config.stop_strings)}
    length = next((name for name in _LENGTHS if name in given), None)
    if length is not None:
        changes["max_new_tokens"] = int(given[length])
        if longest is not None and changes["max_new_tokens"] > longest:
            changes["max_new_tokens"] = longest
            warn_once(
                f"the task's {length}={given[length]} is cut to the {longest} that preset or max_new_tokens in "
                "--model_args allows"
            )
    if task_sampling:
        changes |= _sampling(config, given)
    elif any(name in given for name in _SAMPLING):
        said = ", ".join(f"{name}={given[name]}" for name in _SAMPLING if name in given)
        warn_once(
            f"the task's {said} does not count: rollouts are sampled by the model's own settings "
            f"({_told(config.rollout)}); task_sampling=true in --model_args lets the task's count"
        )
    return config.replace(**changes)


def _stop_strings(until: Any) -> tuple[str, ...]:
    if until is None:
        return ()
    listed = [until] if isinstance(until, str) else list(until)
    return tuple(stop for stop in listed if stop)


def _sampling(config: NablaConfig, given: Mapping[str, Any]) -> dict[str, Sampling]:
    # As lm-eval reads them for Hugging Face models: nothing said means greedy.
    sample = given.get("do_sample", float(given.get("temperature", 0.0)) > 0)
    if not sample:
        return dict.fromkeys(("rollout", "resample"), Sampling(temperature=0.0))
    own = {"temperature": float, "top_p": float, "top_k": int}
    settings = {name: kind(given[name]) for name, kind in own.items() if name in given}
    if settings.get("temperature") == 0:
        raise ValueError("do_sample is True, and temperature is 0; give a temperature above 0, or do_sample=False")
    if settings.get("top_k", 1) < 1:  # Hugging Face's way of saying "all", and vLLM's
        settings["top_k"] = None
    return {"rollout": Sampling(**{**vars(config.rollout), **settings})}


def _told(sampling: Sampling) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(sampling).items() if value is not None)


@functools.cache
def warn_once(message: str) -> None:
    """Warns with this message, once."""
    logger.warning(message)
