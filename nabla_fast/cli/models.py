"""The models that a command names: what is said of them, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_fast.cli.console import print_warning

if TYPE_CHECKING:
    from nabla_fast.config import NablaConfig
    from nabla_fast.demo.pairs import DemoPair
    from nabla_fast.evaluation.tasks import Task

PAIR_NAMES = ("smollm2", "arithmetic", "arithmetic-steps")
# Names of options that ``--pair`` took the place of, until the release after 0.1.
OLD_PAIR_OPTIONS = {"demo": "smollm2", "bundled": "arithmetic"}
# How a process reward model is read.
_STEPS = ("step_separator", "step_aggregation", "step_insert_after")


@dataclass(frozen=True)
class ModelChoice:
    """A language model and a reward model by the options of a command, or a pair of the package by its name.

    Workers on other machines get it and load the models there.
    """

    model: str | None
    reward_model: str | None
    pair: str | None
    device: str
    dtype: str
    attn_implementation: str
    reward_device: str | None = None
    quantization: str = "none"
    adapter: str | None = None
    reward_adapter: str | None = None
    step_separator: str | None = None
    step_aggregation: str | None = None
    step_insert_after: str | None = None

    @property
    def demo(self) -> DemoPair | None:
        """The pair that ``--pair`` names."""
        from nabla_fast.demo.pairs import PAIRS

        return None if self.pair is None else PAIRS[self.pair]

    @property
    def config(self) -> NablaConfig | None:
        """The settings that belong to the pair; None for other models."""
        return None if self.demo is None else self.demo.config

    def require(self) -> None:
        """Raises ValueError unless either both models are named or a pair is."""
        if self.pair:
            if self.model or self.reward_model:
                raise ValueError(
                    f"--pair {self.pair} brings its own models; leave out --model and --reward-model, or leave out "
                    "--pair"
                )
            for name, given in self._given("adapter", "reward_adapter", *_STEPS).items():
                option = f"--{name.replace('_', '-')}"
                if name in _STEPS:
                    raise ValueError(
                        f"{option} is {given!r}, and the reward model of --pair {self.pair} scores whole answers; "
                        "leave it out, or give a process reward model as --reward-model"
                    )
                raise ValueError(
                    f"{option} is {given!r}, and --pair {self.pair} has no adapters to choose from; leave it out"
                )
        for option, value in (("--model", self.model), ("--reward-model", self.reward_model)):
            if not (value or self.pair):
                raise ValueError(
                    f"{option} is missing; give a GGUF file, a safetensors directory or a hub id, or use --pair "
                    f"{' or '.join(PAIR_NAMES)}"
                )

    def describe(self) -> dict[str, str | None]:
        """Where the models come from and how they are run, as two runs must share it to share a directory.

        Raises:
            ValueError: if a device, the dtype, the attention, the quantisation or the aggregation is unknown.
            ImportError: if a package is missing that the quantisation needs.
        """
        from nabla_fast.models.loading import choose_attention, choose_device, choose_dtype
        from nabla_fast.models.quantization import require_quantization
        from nabla_fast.models.steps import require_aggregation

        chosen = choose_device(self.device)
        kind = choose_dtype(self.dtype, chosen)
        # Refused here if it is unknown; what "auto" comes to may differ from one machine of a cluster to another.
        choose_attention(self.attn_implementation, chosen, kind)
        require_quantization(self.quantization, "--quantization")
        own = choose_device(self.device if self.reward_device is None else self.reward_device, "reward_device")
        if self.step_aggregation is not None:
            require_aggregation(self.step_aggregation, "step_aggregation")
        # Left out where it is the same, as runs had it before there were two.
        others = {} if own == chosen else {"reward_device": str(own)}
        if self.quantization != "none":
            others["quantization"] = self.quantization
        return {
            "model": self.pair or self.model,
            "reward_model": self.pair or self.reward_model,
            "device": str(chosen),
            "dtype": str(kind).removeprefix("torch."),
            "attn_implementation": self.attn_implementation,
            **others,
            **self._given("adapter", "reward_adapter", *_STEPS),
        }

    def for_workers(self) -> ModelChoice:
        """As workers take it, whose working directory and processor are others: local paths are absolute (hub ids stay
        as they are), and ``dtype`` is what "auto" comes to here, so that all of them compute alike.
        """
        return replace(
            self,
            model=_absolute(self.model),
            reward_model=_absolute(self.reward_model),
            dtype=self.describe()["dtype"] or self.dtype,
        )

    def load(self) -> tuple[Any, Any, Any, Any]:
        """Language model, its tokenizer, reward model, its tokenizer.

        Raises:
            ValueError: as `require` and `describe`; and as `nabla_fast.models.loading` does.
        """
        self.require()
        if self.demo is not None:
            self._prepare()
            return self.demo.load(**self._where, reward_device=self.reward_device)
        language = self.load_language_model()
        from nabla_fast.models.loading import load_reward_model

        reward = {**self._where, **self._given(*_STEPS), "device": self.reward_device or self.device}
        assert self.reward_model is not None
        rewards = load_reward_model(self.reward_model, **reward, adapter=self.reward_adapter, argument="--reward-model")
        return (*language, *rewards)

    def load_language_model(self) -> tuple[Any, Any]:
        """The language model that ``--model`` names, and its tokenizer. Errors as `load`."""
        self._prepare()
        from nabla_fast.models.loading import load_language_model

        assert self.model is not None
        return load_language_model(self.model, **self._where, adapter=self.adapter, argument="--model")

    def load_task(self, name: str, options: Sequence[str], **more: Any) -> Task:
        """The task of a command, with the parameters that belong to the pair where ``options`` give none.

        Args:
            options: ``NAME=VALUE`` each.
            more: as `nabla_fast.evaluation.tasks.load_task` takes it.

        Raises:
            ValueError: as that does; also if a problem is none for the pair.
        """
        from nabla_fast.evaluation.tasks import GYM_PREFIX, load_task, parse_options

        own = {} if self.demo is None else self.demo.task_options.get(name.removeprefix(GYM_PREFIX), {})
        task = load_task(name, {**own, **parse_options(options)}, **more)
        if self.demo is not None:
            self.demo.require([problem.chat for problem in task.problems])
        return task

    @property
    def _where(self) -> dict[str, str]:
        return self._given("device", "dtype", "attn_implementation", "quantization")

    def _given(self, *names: str) -> dict[str, str]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _prepare(self) -> None:
        # What takes no time: a mistake there should not have to wait for a model.
        self.describe()
        quiet_transformers()


def chosen_models(settings: Mapping[str, Any]) -> ModelChoice:
    """What the options of `nabla_fast.cli.options.with_model_options` say.

    Raises:
        ValueError: for an unknown pair, or for two.
    """
    pair = settings["pair"]
    for old, name in OLD_PAIR_OPTIONS.items():
        if settings[old]:
            print_warning(f"--{old} is deprecated and will be removed in the next release; use --pair {name}")
            if pair not in (None, name):
                raise ValueError(f"--pair is {pair} and {name}; give one of them")
            pair = name
    if pair is not None and pair not in PAIR_NAMES:
        raise ValueError(f"--pair is {pair!r}; use {' or '.join(PAIR_NAMES)}")
    return ModelChoice(pair=pair, **{f.name: settings[f.name] for f in fields(ModelChoice) if f.name != "pair"})


def quiet_transformers() -> None:
    """Leaves the terminal to our own progress display."""
    import warnings

    from transformers.utils import logging

    # Its advice on its own deprecations is for those who call it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
