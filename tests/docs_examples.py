"""The examples of README.md and docs/: blocks of code in their order, and what is not run of them, with the reason.

Whatever has no reason here is run by tests/test_docs_examples.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site include these two as they are.
INCLUDED = (ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
PAGES = tuple(
    page.relative_to(ROOT).as_posix() for page in (ROOT / "README.md", *INCLUDED, *(ROOT / "docs").rglob("*.md"))
)
SHELLS = ("sh", "bash", "shell", "console")
# What is read, not run.
SHOWN = ("json", "yaml", "mermaid")

_INSTALLS = "installs packages from a network; tests/test_packaging.py looks the extras up that it names"
_MAKE = "sets up environments and runs for minutes; that the target exists is checked"
_STAYS = "runs until it is stopped"

NOT_RUN = {
    "README.md": {"pip install": _INSTALLS},
    "CONTRIBUTING.md": {
        "pip install": _INSTALLS,
        "make ": _MAKE,
        "nabla-fast bench": "measures for minutes; tests/benchmarks/test_benchmarks.py runs the command in small",
        "python benchmarks/": "measures, or needs results to compare; tests/benchmarks has each script",
        "benchmarks/gpu.sh": "needs a GPU",
    },
    "docs/index.md": {"pip install": _INSTALLS},
    "docs/questions.md": {"pip install": _INSTALLS},
    "docs/theory.md": {"python examples/theory.py": "tests/test_theory.py runs it"},
    "docs/speed.md": {
        "python benchmarks/improvement.py": "builds two revisions of the history and measures for minutes"
    },
    "docs/quality.md": {
        "python tools/train_ordinary_rewards.py": "trains for a quarter of an hour",
        "python benchmarks/quality_proposals.py": "measures for hours, with the rewards of the line above",
    },
    "docs/releasing.md": {
        "mkdir build/arm64": "needs the library that make test-arm64 cross-builds",
        "NABLA_FAST_LIBRARIES=": "packs that library; tests/test_packaging.py packs one in the same way",
        "python -m auditwheel": "repairs that wheel; make wheels does it for the machine's own",
    },
    "docs/guides/custom_generate.md": {"hf upload": "uploads"},
    "docs/guides/evaluation.md": {
        "nabla-fast eval --compare": "runs/gcd-other-settings is the reader's; tests/evaluation compares runs",
    },
    "docs/guides/gpu.md": {"pip install": _INSTALLS},
    "docs/guides/harness.md": {
        "pip install": _INSTALLS,
        "python -m nabla_fast.integrations.lm_eval run --model nabla_fast --apply_chat_template": "downloads GSM8K",
        "import lm_eval": "downloads GSM8K; tests/integrations/test_lm_eval.py makes the call for a task of its own",
        "nabla-fast serve": _STAYS,
        "lm-eval run": "downloads GSM8K",
        "export LOCAL_BASE_URL": "of Inspect, which is not among the packages for tests",
        "inspect eval": "Inspect is not among the packages for tests",
        "lighteval endpoint": "lighteval is not among the packages for tests, and GSM8K is downloaded",
    },
    "docs/guides/hub_kernels.md": {"make ": _MAKE},
    "docs/guides/look.md": {"pip install": _INSTALLS, "nabla-fast demo": f"{_STAYS}; tests/cli/test_demo_page.py"},
    "docs/guides/quantised.md": {
        "nabla-fast generate --model PATH --adapter": "needs adapters; tests/models/test_adapters.py has some",
        'model, tokenizer = load_language_model("PATH or hub id", adapter': "needs adapters, as above",
    },
    "docs/guides/reward_models.md": {
        "nabla-fast train-reward": "trains for an hour; tests/evaluation/test_train_reward.py trains tiny models",
        "nabla-fast generate --model PATH --reward-model runs/reward/adapter": "needs what the command above trains",
    },
    "docs/guides/serve.md": {"nabla-fast serve": f"{_STAYS}; the requests below are sent to a server in this process"},
    "docs/guides/vllm.md": {
        "vllm serve": "vLLM takes an environment of its own: make test-vllm",
        "nabla-fast generate": "needs the vLLM server above",
    },
}
"""Page → how a command, or a block of Python, begins → why it is not run here. Each must begin one."""


class Example(NamedTuple):
    """A block of Python, or one command of a block for a shell."""

    page: str
    line: int
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        begins = [reason for start, reason in NOT_RUN.get(self.page, {}).items() if self.text.startswith(start)]
        return begins[0] if begins else None


def blocks(page: str) -> list[Example]:
    """All fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)(`{3,}|~{3,})[ ]*(\S*)[^\n]*\n(.*?)^\1\2 *$", text, re.MULTILINE | re.DOTALL)
    return [
        Example(
            page, text.count("\n", 0, block.start(4)) + 1, block[3], re.sub(f"^{block[1]}", "", block[4], flags=re.M)
        )
        for block in found
    ]


def examples(page: str) -> list[Example]:
    """The blocks of Python and the commands of a page, in their order."""
    found: list[Example] = []
    for block in blocks(page):
        if block.language in SHELLS:
            found += [block._replace(line=block.line + at, text=text) for at, text in _commands(block.text)]
        elif block.language == "python":
            found.append(block)
    return found


def _commands(block: str) -> list[tuple[int, str]]:
    """(line, command): a command ends with its line, unless that ends with a backslash or within quotes."""
    found: list[tuple[int, str]] = []
    begun, first = "", 0
    for at, line in enumerate(block.splitlines()):
        first = at if not begun else first
        begun += line.removeprefix("$ ") + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation is open
            continue
        if words:
            found.append((first, re.sub(r"\\\n\s*", "", begun).strip()))
        begun = ""
    assert not begun, f"a command does not end: {begun}"
    return found


def arguments(command: str) -> list[str]:
    """The words of a command, without its comment."""
    return shlex.split(command, comments=True)
