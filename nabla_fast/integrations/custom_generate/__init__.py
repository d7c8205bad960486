"""∇-Reasoner as transformers' ``custom_generate`` by the name of a directory or repository.

``template/`` is such a repository: ``custom_generate/generate.py`` calls `generate` here, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nabla_fast.config import NablaConfig, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from nabla_fast.drop_in import NablaGenerateOutput

# How transformers finds the repository; it hands these on as if they were of the call.
_OF_THE_REPOSITORY = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def generate(
    model: Any,
    *,
    tokenizer: Any = None,
    reward_model: Any = None,
    reward_tokenizer: Any = None,
    nabla_config: NablaConfig | Mapping[str, Any] | None = None,
    messages: Any = None,
    streamer: Any = None,
    **call: Any,
) -> Tensor | NablaGenerateOutput:
    """What ``model.generate(..., custom_generate="DIRECTORY", trust_remote_code=True)`` runs.

    It gives what `nabla_fast.custom_generate` gives, by the same rules. How models fit together is found out once for
    the same model objects, and kept as long as these are.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        reward_model, reward_tokenizer: as in `nabla_fast.generate`.
        nabla_config: settings, a `NablaConfig` or its fields by name; ``rollout`` and ``resample`` may be mappings too.
            None takes the defaults.
        messages, streamer: as in `nabla_fast.custom_generate`.
        call: the other arguments of ``generate``.

    Raises:
        ValueError, TypeError: if ``tokenizer``, ``reward_model`` or ``nabla_config`` cannot be used, and as
            `nabla_fast.custom_generate`.
    """
    # Ended by whoever comes first.
    once = None if streamer is None else SimpleNamespace(put=streamer.put, end=functools.cache(streamer.end))
    try:
        for name, value in (("tokenizer", tokenizer), ("reward_model", reward_model)):
            if value is None:
                raise ValueError(f"{name} is missing; give it to generate: model.generate(..., {name}={name})")
        from nabla_fast.drop_in import decoding
        from nabla_fast.integrations.custom_generate.pairs import kept_pair

        decode = decoding(
            lambda model, config: kept_pair(model, tokenizer, reward_model, reward_tokenizer, config),
            _config(nabla_config),
            once,
            messages,
        )
        own = {name: value for name, value in call.items() if value is not None and name not in _OF_THE_REPOSITORY}
        # Of the class: a model that was loaded from such a repository has this function as its own generate.
        return type(model).generate(model, **own, custom_generate=decode)
    finally:
        # Whoever reads from a streamer waits for its end, also where transformers refuses the call.
        if once is not None:
            once.end()


def _config(given: NablaConfig | Mapping[str, Any] | None) -> NablaConfig:
    if given is None or isinstance(given, NablaConfig):
        return given or NablaConfig()
    if not isinstance(given, Mapping):
        raise TypeError(f"nabla_config must be a NablaConfig or a mapping of its fields, got {given!r}")
    samplings = {
        name: Sampling(**given[name])
        for name in ("rollout", "resample")
        if name in given and isinstance(given[name], Mapping)
    }
    return NablaConfig().replace(**{**given, **samplings})
