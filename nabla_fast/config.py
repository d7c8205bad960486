"""The settings of ∇-Reasoner: validated at construction, immutable afterwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeGuard
from urllib.parse import urlsplit

PARAMETERIZATIONS = ("latents", "logits")
ANCHORS = ("argmax", "rollout")
PROPOSALS = ("dto", "first_order", "prefix_reward", "likeliest", "guided")
_WITH_GRADIENTS = ("dto", "first_order")
SCHEDULES = ("cosine", "linear", "constant")
ROLLOUT_BACKENDS = ("auto", "hf", "vllm")
# Arguments of `apply_chat_template` that are no matter of the template's.
_OWN_TEMPLATE_ARGUMENTS = {
    *("conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
BACKENDS = ("auto", "reference", "native", "triton", "cuda")
# Logits divided by less would leave the range of half precision, or of float32 itself.
_LEAST_TEMPERATURE = 1e-4
# The most that C++ takes, and that an operating system waits: a day.
_MOST_BYTES, _MOST_SECONDS = 2**63 - 1, 86400.0
VLLM_GPU_MEMORY_UTILIZATION = 0.4
_SWITCHES = ("update_postfix", "rejection_sampling", "gradient_cache", "checkpoint_activations", "graphs", "compile")


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling: temperature, top-k and top-p.

    Attributes:
        temperature: divides the logits; 0 takes the argmax, and what lies between it and 0.0001 is refused: logits
            divided by it are not finite any more, or nearly.
        top_p: keep the smallest set of tokens whose probability reaches this; None or 1 keeps all.
        top_k: keep this many most probable tokens; None keeps all.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, minimum=0.0)
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {_LEAST_TEMPERATURE:g}, got {self.temperature!r}")
        if self.top_p is not None:
            require_number("top_p", self.top_p, minimum=0.0, maximum=1.0, open_minimum=True)
        if self.top_k is not None:
            require_int("top_k", self.top_k, minimum=1)


@dataclass(frozen=True)
class NablaConfig:
    """All settings of a decode.

    The defaults are what was most accurate where it was measured (`benchmarks/results/quality`): DTO starts at the
    rollout as it was drawn, and moves latents. The rest are the published settings for MATH-500 (arXiv 2603.04948), all
    of which `published` gives.

    Attributes:
        proposal: how a token to try is found: "dto" (published); "first_order", of the likeliest tokens the one with
            the least objective by one gradient; "prefix_reward", the one after which the response so far has the
            highest reward; "likeliest", the likeliest other token; or "guided", which takes the one of the highest
            prefix reward while the only response is drawn.
        candidates: how many of the likeliest tokens "first_order", "prefix_reward" and "guided" choose among.
        max_iters: DTO steps per optimized position (Alg. 2).
        learning_rate: Adam's learning rate at its highest.
        min_lr_ratio: the schedule's decay is cut off at this share of ``learning_rate``.
        lr_schedule: "cosine", "linear" or "constant"; `nabla_fast.dto.learning_rates` has the formulas.
        warmup_iters: steps over which the learning rate first rises linearly, from 0.
        weight_decay: L2 penalty added to the gradient, as in ``torch.optim.Adam``.
        tau: temperature of the softmax relaxation.
        gumbel_noise: scale of the Gumbel noise added to the logits in the relaxation.
        reward_coeff: weight of the reward in the objective (Eq. 2).
        nll_coeff: weight of the language model's negative log-likelihood in the objective (Eq. 2).
        parameterization: what DTO moves, the last hidden states ("latents") or the logits ("logits").
        anchor: the hard tokens that DTO starts from, the "rollout" as it was drawn or "argmax" (published).
        update_postfix: move all rows that are ahead instead of the first alone.
        confidence_threshold: optimize only where the largest probability is at most this; None switches it off.
        entropy_threshold: optimize only where the entropy (nats) is at least this; None switches it off.
        gradient_threshold: optimize only where the token gradient's L2 norm is at least this; None switches it off, as
            do proposals that take no gradient.
        max_rollouts: rollouts per sequence, the first included; 1 is plain sampling. "guided" draws one.
        rejection_sampling: keep a new trajectory only if its reward is higher.
        max_new_tokens: longest response, in tokens.
        max_batch_size: sequences that are decoded together; the next one begins when one has finished.
        rollout_backend: who draws rollouts: the model itself ("hf"), or "vllm" (at ``vllm_url``, else in this process);
            "auto" takes a server where ``vllm_url`` names one, and the model otherwise.
        vllm_url: of a vLLM server that serves the language model, such as ``http://127.0.0.1:8000``.
        vllm_model: the name under which that server serves it; None takes the first that it lists.
        vllm_api_key: of that server; None takes the environment variable ``VLLM_API_KEY``. It is in no result.
        vllm_timeout: seconds in which the next tokens of that server's answer must come.
        vllm_gpu_memory_utilization: share of a GPU's memory, above 0 and at most 1, for vLLM in this process, its
            weights and KV cache together; None is 0.4. A server has its own, ``vllm serve --gpu-memory-utilization``.
        draft_tokens: most draft tokens that a rollout verifies in one forward pass, instead of drawing them one by
            one; the tokens drawn are the same. Drafts are tokens of earlier trajectories, and on a CPU those that a
            float32 model foresees with weights rounded to 8 bits, which take a quarter of its memory besides. Fewer
            where a batch fills the pass; 0 for none.
        stop_strings: a response ends where one of these is complete (the string is kept, as in transformers).
        eos_token_ids: a response ends with one of these; None takes the model's own.
        chat_template_kwargs: further arguments of both tokenizers' chat templates, such as {"enable_thinking": false}.
        rollout: how rollouts are sampled.
        resample: how the optimized position is sampled anew.
        gradient_cache: keep gradients, keyed by the token ids, between DTO runs.
        gradient_cache_bytes: budget of that cache; the least recently used entries go first.
        checkpoint_activations: for long answers: keep only each layer's input for the backward pass, compute the rest
            again.
        graphs: on a GPU, launch a gradient as one CUDA graph, and rollouts as one a token. It takes memory for each
            size of a batch. Models that cannot be captured run as they are, and so do gradients with
            ``checkpoint_activations``, since graphs keep activations. Later calls with the same models use them again
            (`nabla_fast.clear_graphs`). On a CPU it changes nothing.
        compile: compile a decoder layer of each model by ``torch.compile``, for gradients and rewards. It takes from
            seconds to minutes at first; not together with ``checkpoint_activations``.
        backend: which kernels the operators use.
        seed: seed of the noise; a sequence's noise depends on this and on its prompt alone.
    """

    proposal: str = "dto"
    candidates: int = 5
    max_iters: int = 20
    learning_rate: float = 0.01
    min_lr_ratio: float = 0.1
    lr_schedule: str = "cosine"
    warmup_iters: int = 0
    weight_decay: float = 0.0
    tau: float = 1.0
    gumbel_noise: float = 0.0
    reward_coeff: float = 1.0
    nll_coeff: float = 1e-3
    parameterization: str = "latents"
    anchor: str = "rollout"
    update_postfix: bool = False
    confidence_threshold: float | None = 0.97
    entropy_threshold: float | None = None
    gradient_threshold: float | None = 4.0
    max_rollouts: int = 8
    rejection_sampling: bool = True
    max_new_tokens: int = 1024
    max_batch_size: int = 32
    rollout_backend: str = "auto"
    vllm_url: str | None = None
    vllm_model: str | None = None
    vllm_api_key: str | None = field(default=None, repr=False)
    vllm_timeout: float = 120.0
    vllm_gpu_memory_utilization: float | None = None
    draft_tokens: int = 8
    stop_strings: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    rollout: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, top_p=0.95))
    resample: Sampling = field(default_factory=lambda: Sampling(temperature=0.5, top_p=0.95))
    gradient_cache: bool = True
    gradient_cache_bytes: int = 2**30
    checkpoint_activations: bool = False
    graphs: bool = True
    compile: bool = False
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("proposal", self.proposal, PROPOSALS)
        require_int("candidates", self.candidates, minimum=1)
        require_int("max_iters", self.max_iters, minimum=0)
        require_number("learning_rate", self.learning_rate, minimum=0.0)
        require_number("min_lr_ratio", self.min_lr_ratio, minimum=0.0, maximum=1.0)
        _require_choice("lr_schedule", self.lr_schedule, SCHEDULES)
        require_int("warmup_iters", self.warmup_iters, minimum=0)
        if self.warmup_iters > self.max_iters:
            raise ValueError(f"warmup_iters must be at most max_iters ({self.max_iters}), got {self.warmup_iters}")
        require_number("weight_decay", self.weight_decay, minimum=0.0)
        require_number("tau", self.tau, minimum=0.0, open_minimum=True)
        require_number("gumbel_noise", self.gumbel_noise, minimum=0.0)
        require_number("reward_coeff", self.reward_coeff)
        require_number("nll_coeff", self.nll_coeff)
        _require_choice("parameterization", self.parameterization, PARAMETERIZATIONS)
        _require_choice("anchor", self.anchor, ANCHORS)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.compile and self.checkpoint_activations:
            raise ValueError("compile must be False with checkpoint_activations=True, which runs layers once more")
        if self.confidence_threshold is not None:
            require_number("confidence_threshold", self.confidence_threshold, minimum=0.0, maximum=1.0)
        if self.entropy_threshold is not None:
            require_number("entropy_threshold", self.entropy_threshold, minimum=0.0)
        if self.gradient_threshold is not None:
            require_number("gradient_threshold", self.gradient_threshold, minimum=0.0)
        require_int("max_rollouts", self.max_rollouts, minimum=1)
        require_int("max_new_tokens", self.max_new_tokens, minimum=1)
        require_int("max_batch_size", self.max_batch_size, minimum=1)
        require_int("draft_tokens", self.draft_tokens, minimum=0)
        require_int("gradient_cache_bytes", self.gradient_cache_bytes, minimum=0, maximum=_MOST_BYTES)
        _require_choice("backend", self.backend, BACKENDS)
        _require_choice("rollout_backend", self.rollout_backend, ROLLOUT_BACKENDS)
        self._check_server()
        require_int("seed", self.seed)
        for name in ("rollout", "resample"):
            if not isinstance(getattr(self, name), Sampling):
                raise TypeError(f"{name} must be a Sampling, got {getattr(self, name)!r}")
        self._freeze_stops()
        self._check_template_kwargs()

    @property
    def most_rollouts(self) -> int:
        """``max_rollouts``, or what the proposal makes of it."""
        return 1 if self.proposal == "guided" else self.max_rollouts

    @property
    def least_gradient(self) -> float | None:
        """``gradient_threshold`` where the proposal takes gradients, else None."""
        return self.gradient_threshold if self.proposal in _WITH_GRADIENTS else None

    def _check_template_kwargs(self) -> None:
        kwargs = self.chat_template_kwargs
        if kwargs is None:
            return
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise TypeError(f"chat_template_kwargs must be a mapping from names to values or None, got {kwargs!r}")
        taken = sorted(set(kwargs) & _OWN_TEMPLATE_ARGUMENTS)
        if taken:
            raise ValueError(f"chat_template_kwargs cannot hold {', '.join(taken)}, which nabla_fast sets itself")
        object.__setattr__(self, "chat_template_kwargs", dict(kwargs))

    def _check_server(self) -> None:
        self._check_memory_of_vllm()
        if self.proposal == "guided" and (self.rollout_backend == "vllm" or self.vllm_url is not None):
            raise ValueError(
                "proposal is 'guided', which chooses tokens while they are drawn, and vLLM draws them by itself; use "
                "rollout_backend='hf', or another proposal"
            )
        require_number("vllm_timeout", self.vllm_timeout, minimum=0.0, maximum=_MOST_SECONDS, open_minimum=True)
        if self.vllm_model is not None and not (isinstance(self.vllm_model, str) and self.vllm_model):
            raise TypeError(f"vllm_model must be a name or None, got {self.vllm_model!r}")
        if self.vllm_api_key is not None:
            require_api_key("vllm_api_key", self.vllm_api_key)
        if self.vllm_url is None:
            for name in ("vllm_model", "vllm_api_key"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given, but vllm_url is not; it is of the server at vllm_url")
            return
        if not isinstance(self.vllm_url, str):
            raise TypeError(f"vllm_url must be a string or None, got {self.vllm_url!r}")
        require_server_url("vllm_url", self.vllm_url)
        if self.rollout_backend == "hf":
            raise ValueError(f"vllm_url is {self.vllm_url!r}, but rollout_backend is 'hf'; use 'vllm' or 'auto'")

    def _check_memory_of_vllm(self) -> None:
        share = self.vllm_gpu_memory_utilization
        if share is None:
            return
        require_share("vllm_gpu_memory_utilization", share)
        if self.vllm_url is not None:
            raise ValueError(
                f"vllm_gpu_memory_utilization is {share}, but vllm_url is given; a server gets its share where it is "
                f"started: vllm serve --gpu-memory-utilization {share}"
            )
        if self.rollout_backend != "vllm":
            raise ValueError(
                f"vllm_gpu_memory_utilization is {share}, but rollout_backend is {self.rollout_backend!r}; it is of "
                "the vLLM of this process, rollout_backend 'vllm'"
            )

    def _freeze_stops(self) -> None:
        if isinstance(self.stop_strings, str):
            raise TypeError(f"stop_strings must be a list of strings, got the single string {self.stop_strings!r}")
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"stop_strings must hold non-empty strings, got {self.stop_strings!r}")
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if self.eos_token_ids is None:
            return
        if isinstance(self.eos_token_ids, int) or not all(is_int(i) and i >= 0 for i in self.eos_token_ids):
            raise ValueError(f"eos_token_ids must be a list of token ids (>= 0) or None, got {self.eos_token_ids!r}")
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))

    @classmethod
    def published(cls, preset: str, **changes: Any) -> NablaConfig:
        """The published settings for a benchmark, to the letter, with ``changes`` applied.

        All start DTO at the argmax. "math500" and "aime" (2024 and 2025) optimize logits and sample rollouts at
        temperature 0.6 with top-p 0.95, proposals at 0.5 with 0.95; "aime" takes ``gradient_threshold`` 8 and
        ``max_new_tokens`` 3072. "amc" optimizes latents, with rollouts at temperature 0.7, proposals at 0.5, and top-p
        0.8 and top-k 20 for both. Where a script names no top-k, as those for MATH-500 and AIME, the published code
        takes the language model's own: 20 for Qwen2.5-7B-Instruct. Here none is applied unless ``changes`` names one.

        Args:
            preset: "math500", "aime" or "amc".
            changes: fields that are to differ, as in ``published("aime", seed=3)``.

        Raises:
            ValueError: if ``preset`` is another name, or a changed value is out of range.
            TypeError: if ``changes`` names an unknown field.

        Source: ``scripts/qwen_ins_*.sh`` of the published code, and its defaults where they are silent.
        """
        _require_choice("preset", preset, PRESETS)
        return cls(anchor="argmax", **_PUBLISHED[preset]).replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, ``vllm_api_key`` left out: what may be printed and stored."""
        return {name: value for name, value in asdict(self).items() if name != "vllm_api_key"}

    def replace(self, **changes: Any) -> NablaConfig:
        """A copy with ``changes`` applied, validated again; TypeError for an unknown name, with the known ones."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(f"NablaConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return replace(self, **changes)


def require_server_url(name: str, url: str) -> None:
    """Raises ValueError unless ``url`` is the plain address of a server; a password in it is in no message."""
    meant = "it must be like http://127.0.0.1:8000"
    if any(mark in url for mark in "@?#"):
        raise ValueError(
            f"{name} has more than an address, such as a password, which would stand wherever settings do; {meant}, "
            "and a key is given as vllm_api_key or in the environment variable VLLM_API_KEY"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not url.isprintable() or any(map(str.isspace, url)):
        raise ValueError(f"{name} {url!r} is not a URL; {meant}")


def require_api_key(name: str, key: object) -> None:
    """Raises an error that does not hold ``key`` unless a header can: one word of printable ASCII."""
    if not isinstance(key, str):
        raise TypeError(f"{name} must be a string or None, got {type(key).__name__}")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{name} cannot be a key; it must be printable ASCII characters without spaces")


def require_share(name: str, value: object) -> None:
    """Raises an error unless ``value`` is a number above 0 and at most 1."""
    require_number(name, value, minimum=0.0, maximum=1.0, open_minimum=True)


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def require_int(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> None:
    if not is_int(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value!r}")


def require_number(
    name: str,
    value: object,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    open_minimum: bool = False,
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and minimum <= value <= maximum) or (open_minimum and value == minimum):
        lower = f"above {minimum:g}" if open_minimum else f"at least {minimum:g}"
        upper = "finite" if math.isinf(maximum) else f"at most {maximum:g}"
        accepted = "a finite number" if math.isinf(minimum) else f"{lower} and {upper}"
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _require_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


# Benchmark → settings of `NablaConfig.published`.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "math500": {"parameterization": "logits"},
    "aime": {"parameterization": "logits", "gradient_threshold": 8.0, "max_new_tokens": 3072},
    "amc": {"parameterization": "latents", "rollout": Sampling(0.7, 0.8, 20), "resample": Sampling(0.5, 0.8, 20)},
}
PRESETS = tuple(_PUBLISHED)
