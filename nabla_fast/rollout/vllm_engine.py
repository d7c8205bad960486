"""vLLM in this process, for `nabla_fast.rollout.vllm.VLLMRollout`."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Sequence
from time import monotonic
from typing import Any

from nabla_fast.config import VLLM_GPU_MEMORY_UTILIZATION, require_share
from nabla_fast.rollout.base import RolloutError
from nabla_fast.rollout.engine import Completion, TokenRequest


class VLLMEngine:
    """A ``vllm.LLM``, which decodes all requests under way together, a token each at a time.

    Args:
        model: folder or name of the language model, as vLLM loads it.
        gpu_memory_utilization: share of the GPU's memory, above 0 and at most 1, that vLLM takes for itself: for the
            language model's weights, which it loads a second time, and for its KV cache. The language model and the
            reward model of this process live in the rest, with all that gradients need.
        options: of ``vllm.LLM``, such as ``dtype`` or ``max_model_len``.

    Attributes:
        name, model, context_length: see `nabla_fast.rollout.engine.Engine`.
        gpu_memory_utilization: as given.
        params: ``vllm.SamplingParams``.
        ids: numbers of requests.
        answers: of any stream, by the name of the request, until they are taken.

    Raises:
        ValueError, TypeError: if ``gpu_memory_utilization`` is no such share.
        ImportError: if vLLM is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        gpu_memory_utilization: float = VLLM_GPU_MEMORY_UTILIZATION,
        **options: Any,
    ) -> None:
        require_share("gpu_memory_utilization", gpu_memory_utilization)
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed; run pip install vllm, or give the vllm_url of a running server instead"
            ) from error
        self.model = os.fspath(model)
        self.gpu_memory_utilization = gpu_memory_utilization
        self.name = f"the vLLM of this process ({self.model})"
        self.params = vllm.SamplingParams
        self._llm: Any = vllm.LLM(self.model, gpu_memory_utilization=gpu_memory_utilization, **options)
        # vLLM's own threads would notice the end of their processes while the interpreter ends, and abort it.
        self._end = weakref.finalize(self, self._llm.llm_engine.engine_core.shutdown)
        self.context_length = int(self._llm.model_config.max_model_len)
        self.ids = itertools.count()
        self.answers: dict[str, Completion] = {}

    def open(self) -> EngineRequests:
        return EngineRequests(self)

    def close(self) -> None:
        """Ends vLLM's processes, as the end of the interpreter would, and frees their memory; nothing runs after it."""
        self._end()

    def log_probabilities(self, token_ids: Sequence[int]) -> list[float]:
        """See `nabla_fast.rollout.engine.Engine`."""
        params = self.params(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        try:
            (answer,) = self._llm.generate([{"prompt_token_ids": list(token_ids)}], params, use_tqdm=False)
        except Exception as error:
            raise RolloutError(f"{self.name} refuses {len(token_ids)} token ids ({error})") from error
        return [float(answer.prompt_logprobs[i][token].logprob) for i, token in enumerate(token_ids) if i]

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls vLLM's own engine, which may have died."""
        try:
            return getattr(self._llm.llm_engine, method)(*arguments)
        except Exception as error:
            raise RolloutError(f"{self.name} failed in {method}: {error}") from error


class EngineRequests:
    """See `nabla_fast.rollout.engine.Requests`."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self._keys: dict[str, int] = {}

    def send(self, key: int, request: TokenRequest) -> None:
        name = f"nabla-fast-{next(self._engine.ids)}"
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self._engine.call("add_request", name, prompt, self._engine.params(**request.parameters))
        self._keys[name] = key

    def wait(self, seconds: float | None = None) -> list[tuple[int, Completion]]:
        end, answers = None if seconds is None else monotonic() + seconds, self._engine.answers
        while True:
            # First, since another's steps may have brought the answers.
            if answered := [name for name in self._keys if name in answers]:
                return [(self._keys.pop(name), answers.pop(name)) for name in answered]
            if end is not None and monotonic() >= end:
                return []
            for output in self._engine.call("step"):
                if output.finished:
                    answer = output.outputs[0]
                    answers[output.request_id] = Completion(tuple(answer.token_ids), str(answer.finish_reason))

    def close(self) -> None:
        if self._keys:
            # An engine that has died has told so before.
            with contextlib.suppress(RolloutError):
                self._engine.call("abort_request", list(self._keys))
            for name in self._keys:
                self._engine.answers.pop(name, None)
            self._keys.clear()
