"""Loads the models that a command names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_fast.config import NablaConfig


def load_models(
    model: str | None, reward_model: str | None, pair: str | None, device: str, dtype: str, attn_implementation: str
) -> tuple[Any, Any, Any, Any]:
    """Language model, its tokenizer, reward model, its tokenizer.

    Args:
        pair: "demo" (SmolLM2) or "bundled" (arithmetic); None takes the models that are named.

    Raises:
        ValueError: if a model is not named, or named besides ``pair``; and as `nabla_fast.models.loading` does.
    """
    require_models(model, reward_model, pair)
    from nabla_fast.models.loading import (
        choose_attention,
        choose_device,
        choose_dtype,
        load_language_model,
        load_reward_model,
    )

    # First what takes no time: a mistake there should not have to wait for a model.
    chosen = choose_device(device)
    choose_attention(attn_implementation, chosen, choose_dtype(dtype, chosen))
    quiet_transformers()
    where = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    if pair == "demo":
        from nabla_fast import demo

        return (*demo.load_smollm2(**where), *demo.load_smollm2_reward(**where))
    if pair == "bundled":
        from nabla_fast.demo import arithmetic

        return (*arithmetic.load_policy(**where), *arithmetic.load_reward(**where))
    assert model is not None
    assert reward_model is not None
    return (
        *load_language_model(model, **where, argument="--model"),
        *load_reward_model(reward_model, **where, argument="--reward-model"),
    )


def choose_pair(demo: bool, bundled: bool) -> str | None:
    """What ``--demo`` and ``--bundled`` ask for; ValueError for both."""
    if demo and bundled:
        raise ValueError("--demo and --bundled are two pairs of models; leave out one of them")
    return "demo" if demo else "bundled" if bundled else None


def pair_defaults(pair: str | None) -> tuple[NablaConfig | None, str | None]:
    """The settings that belong to a pair, and the question it answers where none is asked; None for other models."""
    if pair == "demo":
        from nabla_fast.demo import example

        return example.CONFIG, example.QUESTION
    if pair == "bundled":
        from nabla_fast.demo import arithmetic

        return arithmetic.CONFIG, arithmetic.QUESTION
    return None, None


def require_models(model: str | None, reward_model: str | None, pair: str | None) -> None:
    """Raises ValueError unless either both models are named or ``pair`` is."""
    if pair and (model or reward_model):
        raise ValueError(f"--{pair} brings its own models; leave out --model and --reward-model, or leave out --{pair}")
    for option, value in (("--model", model), ("--reward-model", reward_model)):
        if not (value or pair):
            raise ValueError(
                f"{option} is missing; give a GGUF file, a safetensors directory or a hub id, or use --demo or "
                "--bundled"
            )


def quiet_transformers() -> None:
    """Leaves the terminal to our own progress display."""
    import warnings

    from transformers.utils import logging

    # Its advice on its own deprecations is for those who call it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
