"""Requests in OpenAI's form, as what the engine decodes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nabla_fast.config import NablaConfig, Sampling, is_int
from nabla_fast.models.chat import Chat, as_chats
from nabla_fast.server.asks import Ask, Prompt, RequestError
from nabla_fast.server.names import Method, method_of

_COMMON = {
    *("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options"),
    "nabla",
}
_CHAT = {*_COMMON, "messages", "max_completion_tokens", "chat_template_kwargs"}
_COMPLETION = {*_COMMON, "prompt"}
# Of the models and the machine, not of one answer: they are options of the command.
_SERVERS = {
    *("vllm_url", "vllm_model", "vllm_api_key", "vllm_timeout", "vllm_gpu_memory_utilization", "rollout_backend"),
    *("backend", "graphs", "compile", "checkpoint_activations", "max_batch_size", "gradient_cache_bytes"),
    # The reward model is aligned with the end tokens when it is loaded; drafts change speed alone.
    *("eos_token_ids", "draft_tokens"),
}
# One step of a decode cannot be given up, so no client may make it endless.
_MOST = {"max_iters": 1000, "candidates": 256, "max_rollouts": 1024}
_MOST_SEQUENCES = 128
# What a request calls a setting.
_FIELDS = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
# Fields that cannot change an answer.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    # Of tools, which are refused; and of speed.
    *("parallel_tool_calls", "prediction"),
}

_TOOLS = "tools are not supported; the answer is text alone"
_PENALTY = "penalties of a request are not supported; those of the model's generation config always apply"
_LOGPROBS = "log-probabilities are not supported: the answer is refined, not drawn from one distribution"
_AUDIO = "the answer is text alone"

# Another field → the values that ask for nothing, and why others are refused. None asks for nothing anywhere.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), _LOGPROBS),
    "top_logprobs": ((0,), _LOGPROBS),
    "prompt_logprobs": ((), _LOGPROBS),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "response_format": (({"type": "text"},), "no other format than {'type': 'text'} is supported"),
    "logit_bias": (({},), "biases of a request are not supported; those of the model's generation config always apply"),
    "presence_penalty": ((0,), _PENALTY),
    "frequency_penalty": ((0,), _PENALTY),
    "repetition_penalty": ((1,), _PENALTY),
    "min_p": ((0,), "use temperature, top_p and top_k"),
    "modalities": ((["text"],), _AUDIO),
    "audio": ((), _AUDIO),
    "web_search_options": ((), "there is no web search"),
    "reasoning_effort": ((), "use chat_template_kwargs, if the model's template has a switch"),
    "verbosity": ((), "say it in the prompt"),
    "suffix": (("",), "text can only be continued"),
    "echo": ((False,), "the answer is what follows the prompt"),
    "best_of": ((1,), "use the model best-of-n-N/NAME, which takes the answer with the highest reward"),
    "use_beam_search": ((False,), "∇-Reasoner searches by gradients, not by beams"),
    "ignore_eos": ((False,), "an end token ends the answer"),
}
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Served:
    """What requests are answered with.

    Attributes:
        config: settings of a request that says nothing.
        seeded: whether its seed is that of such a request, too, which otherwise gets a fresh one.
        check: raises ValueError for a chat that is none for the models.
    """

    name: str
    config: NablaConfig
    seeded: bool = False
    check: Callable[[Chat], None] = lambda chat: None


@dataclass(frozen=True)
class Request:
    """A request that has been read.

    Attributes:
        chat: whether its answer is a chat's.
        include_usage: whether a stream ends with what it took.
    """

    model: str
    chat: bool
    ask: Ask
    include_usage: bool


def read_request(body: object, served: Served, *, chat: bool) -> Request:
    """Reads the body of a request for chat completions, or for completions.

    Raises:
        RequestError: if it asks for what is not done, or for what makes no sense; the message names the field.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be a JSON object, got {type(body).__name__}")
    _check_fields(body, _CHAT if chat else _COMPLETION)
    said = {name: value for name, value in body.items() if value is not None}
    method = method_of(said.get("model"), served.name)
    prompts = (_chat(said, served),) if chat else _prompts(said)
    config = _config(said, method, served)
    n = _integer(said, "n", 1, _MOST_SEQUENCES, 1)
    if len(prompts) * n * method.samples > _MOST_SEQUENCES:
        raise RequestError(
            f"n is {n}, which makes {len(prompts) * n * method.samples} sequences with {len(prompts)} prompts and "
            f"{method.samples} samples of each; at most {_MOST_SEQUENCES} are decoded for one request",
            "n",
        )
    if n > 1 and config.rollout.temperature == 0:
        raise RequestError(f"n must be 1 where the temperature is 0, got {n}: all answers would be the same", "n")
    stream = _boolean(said, "stream")
    return Request(
        model=said["model"],
        chat=chat,
        ask=Ask(prompts, config, n, method.samples, stream),
        include_usage=_include_usage(said, stream),
    )


def _check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises `RequestError` for the first field that is not known, and asks for something."""
    for name, value in body.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _REFUSED:
            raise RequestError(
                f"{name} is not supported, and it might change the answer; leave it out", name, "unsupported_field"
            )
        neutral, why = _REFUSED[name]
        # True is 1 in Python, and no penalty.
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
            raise RequestError(f"{name} is {_short(value)}: {why}", name, "unsupported_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _config(said: Mapping[str, Any], method: Method, served: Served) -> NablaConfig:
    """The settings of a request: the server's, the method's, and its own."""
    config = _replaced(served.config, method.changes, "model", prefix=f"{said['model']}: ")
    if not served.seeded:
        config = config.replace(seed=secrets.randbits(53))
    changes = _nabla_settings(said.get("nabla", {}), config, method)
    own = _own_settings(said, config)
    for name in own.keys() & changes.keys():
        raise RequestError(f"{_FIELDS.get(name, name)} and nabla.{name} are both given; leave out one", "nabla")
    config = _replaced(config, changes, "nabla", prefix="nabla.")
    rollout = {name: said[name] for name in ("temperature", "top_p", "top_k") if name in said}
    inner = said.get("nabla", {}).get("rollout") or {}
    for name in rollout.keys() & inner.keys():
        raise RequestError(f"{name} and nabla.rollout.{name} are both given; leave out one", "nabla")
    if rollout:
        own = _sampling(rollout, config, method) | own
    if "resample" in changes:
        own.pop("resample", None)
    return _replaced(config, own)


def _nabla_settings(given: object, config: NablaConfig, method: Method) -> dict[str, Any]:
    """The settings in a request's ``nabla``."""
    if not isinstance(given, Mapping):
        raise RequestError(f"nabla must be an object of settings, got {given!r}", "nabla")
    known = {f.name for f in fields(NablaConfig)}
    changes = dict(given)
    for name, value in given.items():
        if name not in known:
            names = ", ".join(sorted(known - _SERVERS))
            raise RequestError(f"nabla.{name} is no setting; settings are {names}", "nabla")
        if name in _SERVERS:
            option = "--" + name.replace("_", "-")
            raise RequestError(f"nabla.{name} is set where the server is started, as {option}", "nabla")
        if name in method.changes:
            raise RequestError(
                f"nabla.{name} is given, and the model's name says {method.name}; leave out one of them", "nabla"
            )
        if name in _MOST and isinstance(value, int) and value > _MOST[name]:
            raise RequestError(f"nabla.{name} must be at most {_MOST[name]} on a server, got {value}", "nabla")
        if name == "stop_strings" and not isinstance(value, list):
            raise RequestError(f"nabla.stop_strings must be a list of strings, got {value!r}", "nabla")
        if name in ("rollout", "resample"):
            changes[name] = _nabla_sampling(name, value, getattr(config, name))
        if name == "chat_template_kwargs" and isinstance(value, Mapping):
            changes[name] = {**(config.chat_template_kwargs or {}), **value}
    return changes


def _nabla_sampling(name: str, value: object, own: Sampling) -> Sampling:
    parts = asdict(own)
    if not isinstance(value, Mapping) or not value.keys() <= parts.keys():
        raise RequestError(f"nabla.{name} must be an object of {', '.join(parts)}, got {value!r}", "nabla")
    try:
        return replace(own, **value)
    except (ValueError, TypeError) as error:
        raise RequestError(f"nabla.{name}: {error}", "nabla") from error


def _own_settings(said: Mapping[str, Any], config: NablaConfig) -> dict[str, Any]:
    """The settings that OpenAI's own fields say, but for those of sampling."""
    own: dict[str, Any] = {}
    lengths = [name for name in ("max_completion_tokens", "max_tokens") if name in said]
    if len(lengths) == 2 and said["max_tokens"] != said["max_completion_tokens"]:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    if lengths:
        own["max_new_tokens"] = _integer(said, lengths[0], 1, 2**31 - 1, 1)
    if "seed" in said:
        own["seed"] = _integer(said, "seed", -(2**63), 2**63 - 1, 0)
    if stops := said.get("stop"):
        own["stop_strings"] = (stops,) if isinstance(stops, str) else stops
        if not isinstance(stops, (str, list)) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop must be a string or a list of strings that are not empty, got {stops!r}", "stop")
    if "chat_template_kwargs" in said:
        kwargs = said["chat_template_kwargs"]
        if not isinstance(kwargs, Mapping):
            raise RequestError(f"chat_template_kwargs must be an object, got {kwargs!r}", "chat_template_kwargs")
        own["chat_template_kwargs"] = {**(config.chat_template_kwargs or {}), **kwargs}
    return own


def _sampling(said: dict[str, Any], config: NablaConfig, method: Method) -> dict[str, Any]:
    """How rollouts are sampled by OpenAI's fields; at temperature 0 nothing is, as in `nabla_fast.custom_generate`."""
    if method.name == "greedy":
        temperature = said.get("temperature", 0)
        if temperature != 0:
            raise RequestError(f"temperature must be 0 or left out with greedy, got {temperature!r}", "temperature")
        return {}
    if said.get("top_k") in (0, -1):  # vLLM's ways of saying "all"
        said = {**said, "top_k": None}
    rollout = config.rollout
    for name, value in said.items():
        try:
            rollout = replace(rollout, **{name: value})
        except (ValueError, TypeError) as error:
            raise RequestError(str(error), name) from error
    if rollout.temperature == 0:
        greedy = Sampling(temperature=0.0)
        return {"rollout": greedy, "resample": greedy} if "temperature" in said else {"rollout": greedy}
    return {"rollout": rollout}


def _replaced(
    config: NablaConfig, changes: Mapping[str, Any], param: str | None = None, prefix: str = ""
) -> NablaConfig:
    try:
        return config.replace(**changes)
    except (ValueError, TypeError) as error:
        name = str(error).split(maxsplit=1)[0]
        raise RequestError(f"{prefix}{error}", param or (name if name in changes else None)) from error


def _chat(said: Mapping[str, Any], served: Served) -> Prompt:
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list of messages that is not empty, got {messages!r}", "messages")
    try:
        (chat,) = as_chats([[_message(message, i) for i, message in enumerate(messages)]])
        served.check(chat)
    except (ValueError, TypeError) as error:
        raise RequestError(str(error).replace("prompts[0]", "messages"), "messages") from error
    return chat


def _message(message: object, i: int) -> dict[str, str]:
    """A message as chat templates take it."""
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {message!r}", "messages")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r}", "messages")
    asked = [name for name, value in message.items() if name not in ("role", "content", "name") and value]
    if asked:
        raise RequestError(f"{where}.{asked[0]} is not supported; messages are text", "messages")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) < len(content):
            raise RequestError(f"{where} has a part that is no text; images and audio are not supported", "messages")
        content = "".join(text if isinstance(text, str) else "" for text in texts)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string, got {content!r}", "messages")
    # Chat templates do not know OpenAI's newer name of it.
    told = {"role": "system" if role == "developer" else role, "content": content}
    if isinstance(message.get("name"), str):
        told["name"] = message["name"]
    return told


def _prompts(said: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """The prompts of a request for completions: text without a template, or token ids."""
    prompt = said.get("prompt")
    several: list[Any] = prompt if isinstance(prompt, list) and not all(map(is_int, prompt)) else [prompt]
    if not all(one and (isinstance(one, str) or (isinstance(one, list) and all(map(is_int, one)))) for one in several):
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists, none of them "
            "empty",
            "prompt",
        )
    return tuple(one if isinstance(one, str) else tuple(one) for one in several)


def _include_usage(said: Mapping[str, Any], stream: bool) -> bool:
    options = said.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options is given, but stream is not true", "stream_options")
    known = ("include_usage", "include_obfuscation")
    if not isinstance(options, Mapping) or not all(name in known for name in options):
        raise RequestError(f"stream_options must be an object with include_usage, got {options!r}", "stream_options")
    return _boolean(options, "include_usage")


def _integer(said: Mapping[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = said.get(name, default)
    if not is_int(value) or not least <= value <= most:
        raise RequestError(f"{name} must be an integer from {least} to {most}, got {value!r}", name)
    return int(value)


def _boolean(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {value!r}", name)
    return value
