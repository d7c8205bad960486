"""Rollouts from vLLM. The tokens are its own; the latents come from one prefill of the local language model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.config import VLLM_GPU_MEMORY_UTILIZATION, NablaConfig, Sampling
from nabla_fast.models.backbone import Cache, joined
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.sequence_cache import SequenceCache, extended
from nabla_fast.rollout.base import Rollout, RolloutError, StopRule, no_rollout, unreadable
from nabla_fast.rollout.engine import Completion, Engine, TokenRequest
from nabla_fast.rollout.vllm_engine import VLLMEngine
from nabla_fast.rollout.vllm_server import VLLMServer
from nabla_fast.sequence import Sequence

# Requests that one rollout may take. A second one is only due where vLLM ends an answer sooner than the stop rule does.
_MAX_REQUESTS = 32
_PROBE_TOKENS = 48
# Seconds that a caller waits who wants to be asked about other rollouts meanwhile.
_MOMENT = 0.05


class VLLMRollout:
    """Draws trajectories with a vLLM that serves the language model.

    What ends a response is the stop rule's to say: vLLM's answer is cut at the first token that does, and where vLLM
    ended sooner, a further request goes on. Tokens are a function of (sequence seed, position) and the sampling as far
    as vLLM's own arithmetic is; they are not those that `HFRollout` draws, except greedy ones up to a near-tie.

    Args:
        language_model: computes the latents.
        engine: the server's URL, or a `VLLMServer` or `nabla_fast.rollout.vllm_engine.VLLMEngine`.
        tolerance: nats by which log-probabilities of vLLM's and the language model's may differ on average, see
            `require_same_model`. Half precision took 0.1 with SmolLM2, 4 bits per weight 1.4.

    Raises:
        ValueError: if the URL is none.
        RolloutError: if no vLLM answers there, or it serves another model.
    """

    def __init__(self, language_model: LanguageModel, engine: str | Engine, *, tolerance: float = 0.25) -> None:
        self.language_model = language_model
        self.engine: Engine = VLLMServer(engine) if isinstance(engine, str) else engine
        self.repetition_penalty = 1.0
        require_same_model(self.engine, language_model, tolerance)

    def penalised(self, repetition_penalty: float) -> VLLMRollout:
        """A copy with a repetition penalty, see `TokenRequest`."""
        if repetition_penalty == self.repetition_penalty:
            return self
        other = copy.copy(self)
        other.repetition_penalty = repetition_penalty
        return other

    def open(self, sampling: Sampling, stop: StopRule) -> VLLMStream:
        """See `nabla_fast.rollout.base.RolloutBackend`."""
        return VLLMStream(self, sampling, stop)


def chosen(language_model: LanguageModel, config: NablaConfig) -> VLLMRollout | None:
    """The vLLM that ``config`` asks for; None for rollouts by transformers.

    Raises:
        ValueError, ImportError, RolloutError: if it cannot be had; see `VLLMRollout` and `VLLMEngine`.
    """
    if config.vllm_url is not None:
        server = VLLMServer(
            config.vllm_url, model=config.vllm_model, api_key=config.vllm_api_key, timeout=config.vllm_timeout
        )
        return VLLMRollout(language_model, server)
    if config.rollout_backend != "vllm":
        return None
    path = language_model.model.config.name_or_path
    if not path:
        raise ValueError(
            f"rollout_backend is 'vllm', but {language_model.name} was not loaded from a folder or hub that vLLM could "
            "load it from; give vllm_url, that of a server"
        )
    dtype = str(language_model.head.weight.dtype).removeprefix("torch.")
    return VLLMRollout(language_model, _engine(path, dtype, config.vllm_gpu_memory_utilization))


_ENGINES: dict[tuple[str, str], VLLMEngine] = {}


def _engine(path: str, dtype: str, gpu_memory_utilization: float | None) -> VLLMEngine:
    """One engine per model and process: it takes minutes to start and a share of the GPU. None takes any share.

    Raises:
        ValueError: if it was started with another share.
    """
    if (path, dtype) not in _ENGINES:
        share = VLLM_GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
        _ENGINES[path, dtype] = VLLMEngine(path, dtype=dtype, gpu_memory_utilization=share)
    engine = _ENGINES[path, dtype]
    if gpu_memory_utilization not in (None, engine.gpu_memory_utilization):
        raise ValueError(
            f"vllm_gpu_memory_utilization is {gpu_memory_utilization}, but {engine.name} was started with "
            f"{engine.gpu_memory_utilization} and keeps it; give that, or None, or start a new process"
        )
    return engine


@torch.no_grad()
def require_same_model(engine: Engine, language_model: LanguageModel, tolerance: float) -> None:
    """Compares log-probabilities of token ids from all over the vocabulary, the last one included.

    Every id goes through vLLM's embedding, layers and head, and numbers agree only where all of them do. So this finds
    another model, another order of the tokens, a smaller vocabulary, another scaling of positions. It does not find
    token strings that differ over the same ids (vLLM's stop strings may then end answers too soon, which costs further
    requests and changes nothing), nor weights so close that a rounding to half precision would hide it.

    Raises:
        RolloutError: if they differ by more than ``tolerance`` nats on average.
    """
    size = language_model.vocab_size
    # Steps of the golden ratio fall evenly whatever the size.
    ids = [int(size * (0.61803398875 * n % 1)) for n in range(_PROBE_TOKENS - 1)] + [size - 1]
    tokens = torch.tensor(ids)
    (hidden,), _ = language_model.backbone([None], [language_model.embedding.inputs(tokens)])
    log_pi = language_model.logits(hidden[:-1]).float().log_softmax(-1)
    own = log_pi.cpu().gather(-1, tokens[1:, None])[:, 0]
    served = f"{engine.name} serves {engine.model!r}, which is not {language_model.name}"
    try:
        theirs = torch.tensor(engine.log_probabilities(ids))
    except RolloutError as error:
        raise RolloutError(f"{served}, or cannot tell: {error} (asked about token ids up to {size - 1})") from error
    difference = float((own - theirs).abs().mean())
    if not difference <= tolerance:
        raise RolloutError(
            f"{served}: log-probabilities of the same token ids differ by {difference:.2g} nats on average, at most "
            f"{tolerance:g} is accepted; serve the very model, with its tokenizer, that is the language model here"
        )


@dataclass
class _Progress:
    """A running rollout: the response so far, and how many requests it has taken."""

    sequence: Sequence
    response: tuple[int, ...]
    requests: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.response[len(self.sequence.prefix) :]


class VLLMStream:
    """See `nabla_fast.rollout.base.RolloutStream`."""

    def __init__(self, backend: VLLMRollout, sampling: Sampling, stop: StopRule) -> None:
        self._model, self._engine, self._penalty = backend.language_model, backend.engine, backend.repetition_penalty
        self._sampling, self._stop = sampling, stop
        self._requests = self._engine.open()
        self._keys = itertools.count()
        self._under_way: dict[int, _Progress] = {}
        self._ended: list[tuple[Sequence, Rollout]] = []

    def submit(self, sequence: Sequence) -> None:
        """See `nabla_fast.rollout.base.RolloutStream`.

        Raises:
            RolloutError: if prompt and longest response do not fit vLLM's context.
        """
        if self._stop.ended(sequence, sequence.prefix):
            self._ended.append((sequence, no_rollout(self._model.head.weight)))
            return
        self._require_room(sequence)
        key = next(self._keys)
        self._under_way[key] = _Progress(sequence, sequence.prefix)
        self._send(key, self._under_way[key])

    def collect(self, passes: int | None = None) -> list[tuple[Sequence, Rollout]]:
        while self._under_way and not self._ended:
            complete = []
            for key, completion in self._requests.wait(None if passes is None else _MOMENT):
                progress = self._under_way.get(key)
                if progress is None:
                    continue  # it was dropped, and vLLM answered all the same
                if self._extend(progress, completion):
                    complete.append(self._under_way.pop(key))
                else:
                    self._send(key, progress)
            self._ended += self._rollouts(complete)
            if passes is not None:
                break
        ended, self._ended = self._ended, []
        return ended

    def drop(self, sequence: Sequence) -> None:
        # What vLLM still draws of it is not read.
        self._ended = [(other, rollout) for other, rollout in self._ended if other is not sequence]
        self._under_way = {key: p for key, p in self._under_way.items() if p.sequence is not sequence}

    def close(self) -> None:
        self._under_way.clear()
        self._requests.close()

    def _send(self, key: int, progress: _Progress) -> None:
        progress.requests += 1
        request = TokenRequest.of(progress.sequence, progress.response, self._sampling, self._stop, self._penalty)
        self._requests.send(key, request)

    def _extend(self, progress: _Progress, completion: Completion) -> bool:
        """Appends vLLM's tokens up to the end of the response; returns whether it has ended."""
        for token in completion.tokens:
            if not 0 <= token < self._model.vocab_size:
                raise RolloutError(
                    f"{self._engine.name} gave token {token}; {self._model.name} has tokens 0 to "
                    f"{self._model.vocab_size - 1}"
                )
            progress.response = (*progress.response, token)
            if self._stop.ended(progress.sequence, progress.response):
                return True
        if not completion.tokens or progress.requests >= _MAX_REQUESTS:
            raise RolloutError(
                f"{self._engine.name} gave {len(progress.tokens)} tokens in {progress.requests} requests (the last "
                f"finish_reason was {completion.finish_reason!r}); it must give up to "
                f"{progress.sequence.limit - len(progress.sequence.prefix)} unless the response ends"
            )
        return False

    def _require_room(self, sequence: Sequence) -> None:
        needed = len(sequence.prompt_ids) + sequence.limit
        if needed > self._engine.context_length:
            raise RolloutError(
                f"{self._engine.name} takes {self._engine.context_length} tokens, {self._model.name} "
                f"{self._model.context_length or 'any number'}; a prompt of {len(sequence.prompt_ids)} and a response "
                f"of up to {sequence.limit} need {needed}: raise vLLM's max_model_len or lower max_new_tokens"
            )

    @torch.no_grad()
    def _rollouts(self, complete: Seq[_Progress]) -> list[tuple[Sequence, Rollout]]:
        """The tokens, and latents from one prefill of all together."""
        known = [p.sequence.language_cache or self._model.new_cache(p.sequence.prompt_ids) for p in complete]
        # The last token predicts nothing that is asked for.
        responses = [torch.tensor(p.response[:-1], dtype=torch.long) for p in complete]
        hidden, caches = self._prefill(known, responses) if complete else ([], [])
        rollouts = []
        for progress, rows, cache in zip(complete, hidden, caches, strict=True):
            tokens = torch.tensor(progress.tokens, dtype=torch.long)
            latents = rows[len(rows) - len(tokens) :]
            finite = latents.isfinite().all(-1)
            if not bool(finite.all()):
                position = len(progress.sequence.prefix) + int((~finite).nonzero()[0])
                raise unreadable(self._model.name, position, "hidden states")
            # A pass for each token, and the one here.
            rollouts.append((progress.sequence, Rollout(tokens, latents, cache, calls=len(tokens) + 1)))
        return rollouts

    def _prefill(self, known: Seq[SequenceCache], responses: Seq[Tensor]) -> tuple[list[Tensor], Seq[Cache | None]]:
        """Hidden states (P_b + n_b, d) of each prompt and response, and their caches where the model has any."""
        backbone, table = self._model.backbone, self._model.embedding
        if backbone.cache_kind == "prefix":
            caches = extended(backbone, table, known, responses)
            return [cache.hidden for cache in caches], caches
        whole = [joined([cache.prompt, table.inputs(y)]) for cache, y in zip(known, responses, strict=True)]
        return backbone([None] * len(known), whole)
