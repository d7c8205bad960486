"""Loads the models that a command names."""

from __future__ import annotations

from typing import Any


def load_models(
    model: str | None, reward_model: str | None, demo: bool, device: str, dtype: str, attn_implementation: str
) -> tuple[Any, Any, Any, Any]:
    """Language model, its tokenizer, reward model, its tokenizer; the demo's pair with ``demo``.

    Raises:
        ValueError: if a model is not named, or named besides ``demo``; and as `nabla_fast.models.loading` does.
    """
    require_models(model, reward_model, demo)
    quiet_transformers()
    if demo:
        from nabla_fast import demo as bundled

        pair = {"device": device, "dtype": dtype}
        return (*bundled.load_smollm2(**pair), *bundled.load_smollm2_reward(**pair))
    from nabla_fast.models.loading import load_language_model, load_reward_model

    assert model is not None
    assert reward_model is not None
    common: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    return (*load_language_model(model, **common), *load_reward_model(reward_model, **common))


def require_models(model: str | None, reward_model: str | None, demo: bool) -> None:
    """Raises ValueError unless either both models are named or ``demo`` is set."""
    if demo and (model or reward_model):
        raise ValueError("--demo brings its own models; leave out --model and --reward-model, or leave out --demo")
    for option, value in (("--model", model), ("--reward-model", reward_model)):
        if not (value or demo):
            raise ValueError(
                f"{option} is missing; give a GGUF file, a safetensors directory or a hub id, or use --demo"
            )


def quiet_transformers() -> None:
    """Leaves the terminal to our own progress display."""
    import warnings

    from transformers.utils import logging

    # Its advice on its own deprecations is for those who call it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
