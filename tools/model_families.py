"""Checks every family of causal language models in transformers and writes what came out to docs/model_families.md.

    python tools/model_families.py            all families; goes on where an earlier run stopped
    python tools/model_families.py --only llama,mamba --fresh
    python tools/model_families.py --table    the table alone, from the results there are

Each family runs in a process of its own, with limits on its time and memory. `tests/models/families.py` makes the
models, `tests/models/family_checks.py` says what is checked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "model_families.json"
PAGE = ROOT / "docs" / "model_families.md"
SECONDS = 240
BYTES = 6 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="checks again what has a result already")
    parser.add_argument("--table", action="store_true", help="writes the table and checks nothing")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text())["families"] if RESULTS.exists() else {}
    if not arguments.table:
        for family in arguments.only.split(",") if arguments.only else _families():
            if family not in results or arguments.fresh:
                results[family] = outcome_of(family)
                print(family, *results[family].values(), sep=" | ", flush=True)
                _save(results)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(_page(json.loads(RESULTS.read_text())))


def _families() -> list[str]:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from families import families

    return families()


def outcome_of(family: str) -> dict[str, str]:
    """What came out of a family, checked in a process of its own; `family_checks.check` says what."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import family_checks  # noqa: F401, loaded once for all processes

    # Forked, since loading torch and transformers takes longer than most families.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_check, args=(family, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"loads": f"not checked: took longer than {SECONDS} s"}
        outcome: dict[str, str] = receiver.recv()
        return outcome
    except EOFError:
        process.join()
        return {"loads": f"crashed: the process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send_check(family: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sender.send(_check(family))


def _check(family: str) -> dict[str, str]:
    import torch
    from families import tiny_model, tiny_reward_model
    from family_checks import check

    torch.set_num_threads(1)
    try:
        model = tiny_model(family)
    except Exception as error:
        return {"loads": _no_model(error)}
    try:
        reward_model, missing = tiny_reward_model(family), {}
    except Exception as error:
        reward_model, missing = None, {"reward": _no_model(error)}
    return check(model, reward_model) | missing


def _no_model(error: Exception) -> str:
    return f"not checked: no tiny model ({type(error).__name__}: {' '.join(str(error).split())[:160]})"


def _save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers")}
    content = {"versions": versions, "families": dict(sorted(results.items()))}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _page(content: dict[str, Any]) -> str:
    families: dict[str, dict[str, str]] = content["families"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    rows = [[f"`{name}`", *(_cell(outcome.get(part, "")) for part in _PARTS)] for name, outcome in families.items()]
    counts = _counts(families)
    head = f"| family | how it runs | gradients | greedy | decode | as reward model |\n{'| --- ' * 6}|"
    return _TEXT.format(
        versions=versions,
        counts="\n".join(f"| {what} | {number} |" for what, number in counts.items()),
        table="\n".join([head, *("| " + " | ".join(row) + " |" for row in rows)]),
    )


def _cell(outcome: str) -> str:
    return {"": "", "none": "no such class"}.get(outcome, outcome.replace("|", "\\|"))


def _counts(families: dict[str, dict[str, str]]) -> dict[str, int]:
    def verdict(outcome: dict[str, str]) -> str:
        language = [outcome.get(part, "") for part in ("loads", "gradients", "greedy", "decode")]
        for word in ("wrong", "crashed", "not checked", "refused"):
            if any(value.startswith(word) for value in language):
                return word
        return "right"

    found = [verdict(outcome) for outcome in families.values()]
    return {word: found.count(word) for word in ("right", "refused", "not checked", "crashed", "wrong")}


_PARTS = ("loads", "gradients", "greedy", "decode", "reward")
_TEXT = """# Model families

Every family of causal language models that transformers has, as a tiny model with random weights in float64 that has
each of the family's kinds of layers ({versions}). `python tools/model_families.py` makes this page again.

| as a language model | families |
| --- | --- |
{counts}

* **how it runs**: in batches behind keys and values of prefixes, which is fastest; one sequence at a time behind the
  cache that the model makes itself, as recurrent layers need it, and then without drafts; gradients over whole
  sequences where several tokens behind that cache give something else than the whole sequence; or nothing but whole
  sequences.
* **gradients**: of the log-likelihood of a response, at three positions of it, with respect to one-hot tokens, against
  autograd through the whole model's own forward pass. They flow through the input embeddings. Where a model has more
  embeddings (Gemma 3n and 4 have some in every layer), those follow the hard tokens and have no part in the gradient.
* **greedy**: `nabla_fast.generate` for two prompts together, with drafts where there are some, against the argmax of
  the model's own forward pass without a cache.
* **decode**: three rollouts with DTO at every position give the same answers for two prompts together as for each
  alone.
* **as reward model**: the family's sequence classifier against its own forward pass.

"refused" is an error in one sentence when the model is loaded. "not checked" says that no tiny model could be made
here, mostly because the configuration is one of several models with images or sounds; such a model is checked like
every other when it is loaded.

{table}
"""


if __name__ == "__main__":
    main()
