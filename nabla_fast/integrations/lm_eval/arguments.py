"""What ``--model_args`` says, converted and checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nabla_fast.config import PRESETS, NablaConfig, Sampling
from nabla_fast.demo.pairs import PAIRS
from nabla_fast.evaluation.methods import PROPOSALS
from nabla_fast.models.loading import load_language_model, load_reward_model

METHODS = (*PROPOSALS, "greedy", "best-of-n")
"""What answers requests: methods of `nabla_fast.evaluation.methods`."""
_SAMPLINGS = ("rollout", "resample")
_PARTS = {f"{whole}_{part.name}": (whole, part) for whole in _SAMPLINGS for part in fields(Sampling)}
PASSED_ON = ("add_bos_token", "max_length", "prefix_token_id", "think_end_token")
"""Arguments of lm-eval's own class for Hugging Face models that keep their meaning."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of the model `nabla_fast`.

    Attributes:
        pretrained, reward: paths or hub ids; or transformers models, with ``tokenizer`` and ``reward_tokenizer``.
        reward_base: base model of an adapter given as ``reward``.
        pair: "arithmetic", "arithmetic-steps" or "smollm2", instead of both.
        preset: the published settings that ``config`` starts from.
        method: one of `METHODS`.
        n: samples of "best-of-n"; None takes ``max_rollouts``.
        device, dtype, attn_implementation, quantization: of the models; ``reward_device`` where the reward model's is
            another.
        adapter, reward_adapter: sub-folder of ``pretrained`` or ``reward`` that holds the adapter, of several.
        step_separator, step_aggregation, step_insert_after: how a process reward model is read.
        batch_size: answers that are decoded together; "auto" and None take ``max_batch_size``.
        longest: most tokens of an answer, whatever a task says: those of ``preset`` or ``max_new_tokens``, if given.
        task_sampling: whether a task's do_sample, temperature, top_p and top_k count.
        config: the other settings.
        passed_on: what lm-eval's own class gets, of `PASSED_ON`.
    """

    pretrained: Any = None
    reward: Any = None
    reward_base: str | None = None
    tokenizer: Any = None
    reward_tokenizer: Any = None
    pair: str | None = None
    preset: str | None = None
    method: str = "nabla"
    n: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "auto"
    quantization: str = "none"
    adapter: str | None = None
    reward_adapter: str | None = None
    reward_device: str | None = None
    step_separator: str | None = None
    step_aggregation: str | None = None
    step_insert_after: str | None = None
    batch_size: int | str | None = None
    task_sampling: bool = False
    longest: int | None = None
    config: NablaConfig = field(default_factory=NablaConfig)
    passed_on: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, accepted in (("method", METHODS), ("pair", (*PAIRS, None)), ("preset", (*PRESETS, None))):
            if getattr(self, name) not in accepted:
                known = ", ".join(filter(None, accepted))
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {known}")
        self._require_models()
        if self.n is not None and (self.method != "best-of-n" or self.n < 1):
            raise ValueError(
                f"n is {self.n}, and method is {self.method}; n is the number of samples of best-of-n, at least 1, and "
                "max_rollouts is that of the other methods' rollouts"
            )
        size = self.batch_size
        if (isinstance(size, str) and size.partition(":")[0] != "auto") or (isinstance(size, int) and size < 1):
            raise ValueError(f"batch_size is {size!r}; give a number of answers, at least 1, or auto")

    def _require_models(self) -> None:
        named = {"pretrained": self.pretrained, "reward": self.reward}
        for name, model in named.items():
            if self.pair is None and model is None:
                raise ValueError(
                    f"{name} is missing; give a GGUF file, a safetensors directory or a hub id, or pair="
                    f"{' or pair='.join(PAIRS)} instead of both models"
                )
            if self.pair is not None and model is not None:
                raise ValueError(
                    f"pair is {self.pair}, which brings its own models; leave out {name}, or leave out pair"
                )
        if self.pair is None and not isinstance(self.pretrained, str) and self.tokenizer is None:
            raise ValueError("tokenizer is missing; a model that is no path or hub id needs it")

    def load(self) -> tuple[Any, Any, Any, Any]:
        """Language model, its tokenizer, reward model, its tokenizer."""
        names = ("device", "dtype", "attn_implementation", "quantization")
        where = {name: getattr(self, name) for name in names}
        if self.pair is not None:
            return PAIRS[self.pair].load(**where, reward_device=self.reward_device)
        language = (self.pretrained, self.tokenizer)
        if isinstance(self.pretrained, str):
            model, tokenizer = load_language_model(
                self.pretrained, **where, adapter=self.adapter, argument="pretrained"
            )
            language = (model, self.tokenizer or tokenizer)
        if not isinstance(self.reward, str):
            return (*language, self.reward, self.reward_tokenizer)
        model, tokenizer = load_reward_model(
            self.reward,
            **{**where, "device": self.reward_device or self.device},
            adapter=self.reward_adapter,
            base=self.reward_base,
            step_separator=self.step_separator,
            step_aggregation=self.step_aggregation,
            step_insert_after=self.step_insert_after,
            argument="reward",
        )
        return (*language, model, self.reward_tokenizer or tokenizer)


def read(given: Mapping[str, Any]) -> Arguments:
    """The arguments ``given``, as lm-eval has read them from the command line, or as a caller has typed them.

    Raises:
        ValueError, TypeError: for an unknown name, with those that are accepted, or a value that is none for it.
    """
    own = {f.name: f for f in fields(Arguments) if f.name not in ("longest", "config", "passed_on")}
    settings = {f.name: str(f.type) for f in fields(NablaConfig)}
    accepted = (*own, *PASSED_ON, *settings, *_PARTS)
    for name in given:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            meant = f"; {near[0]} is meant?" if near else "."
            raise ValueError(
                f"model_args has {name!r}, which nabla_fast does not know{meant} It "
                f"takes {', '.join(own)}; of lm-eval's own {', '.join(PASSED_ON)}; and the fields of NablaConfig: "
                f"{', '.join([*settings, *_PARTS])}"
            )
    values = {name: converted(name, given[name], str(own[name].type)) for name in given if name in own}
    for name in ("step_separator", "step_insert_after"):
        if isinstance(values.get(name), str):
            values[name] = values[name].replace("\\n", "\n").replace("\\t", "\t")
    config = _config({**values, **{n: v for n, v in given.items() if n not in own and n not in PASSED_ON}}, settings)
    return Arguments(
        **values,
        longest=config.max_new_tokens if given.get("preset") or "max_new_tokens" in given else None,
        config=config,
        passed_on={name: given[name] for name in PASSED_ON if name in given},
    )


def _config(given: Mapping[str, Any], settings: Mapping[str, str]) -> NablaConfig:
    """What ``preset`` names, else the pair's settings or the defaults, with what is given."""
    pair, preset, method = given.get("pair"), given.get("preset"), given.get("method", "nabla")
    config = PAIRS[pair].config if pair in PAIRS else NablaConfig()
    if preset in PRESETS:
        config = NablaConfig.published(preset)
    changes = {name: converted(name, given[name], kind) for name, kind in settings.items() if name in given}
    for name, (whole, part) in _PARTS.items():
        if name in given:
            old = changes.get(whole, getattr(config, whole))
            changes[whole] = Sampling(**{**vars(old), part.name: converted(name, given[name], str(part.type))})
    batch_size = given.get("batch_size")
    if isinstance(batch_size, int):
        changes.setdefault("max_batch_size", batch_size)
    proposal = PROPOSALS.get(method)
    if proposal is not None:
        if changes.get("proposal", proposal) != proposal:
            raise ValueError(f"method is {method}, and proposal is {changes['proposal']!r}; give one of them")
        changes["proposal"] = proposal
    return config.replace(**changes)


def converted(name: str, value: Any, kind: str) -> Any:
    """``value`` as the type annotation ``kind`` of the field ``name`` has it, where it says the same in other words.

    Raises:
        TypeError: if it does not.
    """
    if kind == "Any":
        # lm-eval has read a path of digits as a number.
        return str(value) if isinstance(value, int | float) else value
    plain = kind.split(" | ")
    if "None" in plain and (value is None or value == "none"):
        return None
    for read_as in plain:
        try:
            if not isinstance(value, bool) or read_as == "bool":
                return _READERS[read_as](value)
        except (ValueError, KeyError, TypeError):
            continue
    raise TypeError(f"{name} must be {kind.replace(' | ', ' or ')}, got {value!r}")


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        raise ValueError
    return str(value)


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return list(json.loads(value)) if value.startswith("[") else [value]
    return [value] if isinstance(value, int) else list(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": float,
    "bool": lambda value: {"true": True, "false": False}[str(value).lower()],
    "str": _text,
    "tuple[int, ...]": lambda value: tuple(map(int, _several(value))),
    "tuple[str, ...]": lambda value: tuple(_several(value)),
    "dict[str, Any]": _mapping,
    "Sampling": lambda value: value if isinstance(value, Sampling) else Sampling(**_mapping(value)),
}
