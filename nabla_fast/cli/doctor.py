"""`nabla-fast doctor`: what this installation can do and what it cannot."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from nabla_fast.cli.console import OUT, print_json, print_table
from nabla_fast.cli.options import AsJson
from nabla_fast.config import VLLM_GPU_MEMORY_UTILIZATION


def command(
    as_json: AsJson = False,
    vllm_gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of each GPU that vLLM in this process would take, above 0 and at most 1.")
    ] = VLLM_GPU_MEMORY_UTILIZATION,
) -> None:
    """Shows versions, devices, which back ends are built, why one is missing, and what fits on a GPU beside vLLM."""
    from nabla_fast import environment

    (print_json if as_json else _show)(environment.report(vllm_gpu_memory_utilization))


def _show(report: dict[str, Any]) -> None:
    backends, operators = report["backends"], report["operators"]
    print_table("versions", ("package", "version"), list(report["versions"].items()), text=["version"])
    print_table("devices", ("device", "what"), _devices(report["devices"]), text=["what"])
    _show_available("back ends", backends)
    marks = [(operator, *(_mark(why[name] is None) for name in backends)) for operator, why in operators.items()]
    print_table("operators", ("operator", *backends), marks)
    for operator, reasons in operators.items():
        for name, reason in reasons.items():
            # What is true of the whole back end stands in its own table.
            if reason is not None and backends[name]["available"]:
                OUT.print(f"{operator}, {name}: {reason}")
    _show_measured(report["measured"])
    _show_available("demo", report["demo"])
    _show_vllm(report["vllm"])


def _show_measured(entries: list[dict[str, Any]]) -> None:
    """Where "auto" has a choice on a GPU: the measured back end first, else cuda before triton."""
    rows = [
        (x["gpu"], x["case"], x["fastest"], x["commit"], f"no: {x['reason']}" if x["reason"] else "yes")
        for x in entries
    ]
    heads = ("GPU", "case", "fastest", "commit", "decides")
    print_table('measured back ends ("auto": cuda before triton where none decides)', heads, rows, text=[*heads[1:]])


def _show_vllm(vllm: dict[str, Any]) -> None:
    rows = [
        (f"cuda:{index}", *(f"{gpu[part] / 2**30:.1f} GiB" for part in ("memory_bytes", "vllm_bytes", "left_bytes")))
        for index, gpu in enumerate(vllm["gpus"])
    ]
    title = f"vLLM in this process, with {vllm['gpu_memory_utilization']:g} of a GPU"
    print_table(title, ("GPU", "memory", "vLLM", "left"), rows or [("CUDA", "no GPU is visible to torch", "", "")])
    for need in vllm["needs"]:
        OUT.print(need)


def _devices(devices: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = devices["cpu"]
    half = "; multiplies bfloat16, which --dtype auto takes" if cpu["multiplies_bfloat16"] else ""
    rows = [("CPU", f"{cpu['architecture']}, {cpu['threads']} threads, {cpu['vector_instructions']}{half}")]
    for gpu in devices["cuda"]:
        capability = gpu["compute_capability"].replace(".", "")
        rows.append((gpu["name"], f"sm_{capability}, {gpu['memory_bytes'] / 2**30:.0f} GiB"))
    return rows if devices["cuda"] else [*rows, ("CUDA", "no GPU is visible to torch")]


def _show_available(title: str, entries: dict[str, dict[str, Any]]) -> None:
    rows = [(name, _mark(entry["available"]), entry["reason"] or "") for name, entry in entries.items()]
    print_table(title, ("name", "available", "why not"), rows, text=["available", "why not"])


def _mark(available: bool) -> Text:
    return Text("yes", "green") if available else Text("no", "yellow")
