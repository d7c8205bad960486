"""Draws docs/assets/decode.png: one decode of the bundled pair, from the greedy answer to the accepted one.

    python tools/decode_picture.py

The rollouts are those of `nabla_fast.generate` with ``max_rollouts`` 1, 2 and as it is: the noise is fixed by seed and
position, so each run repeats the one before it and goes one proposal further. Bars are the reward's own gradient, taken
by PyTorch through the reward model's input embeddings: what the reward gains, to first order, if a digit stood there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.demo import arithmetic
from nabla_fast.evaluation.plots import NABLA, STYLES

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "assets" / "decode.png"
RIGHT, WRONG, GREY = "#2E7D4F", "#B3261E", "#555555"
DIGITS = "0123456789"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    models = (*arithmetic.load_policy(dtype="float32"), *arithmetic.load_reward(dtype="float32"))
    greedy = baselines.greedy(*models, arithmetic.QUESTION, arithmetic.CONFIG)
    whole = nf.generate(*models, arithmetic.QUESTION, arithmetic.CONFIG)
    runs = [nf.generate(*models, arithmetic.QUESTION, arithmetic.CONFIG.replace(max_rollouts=n)) for n in (1, 2)]
    runs.append(whole)
    revisions = whole.stats.totals.revisions
    if len(revisions) != 2 or not all(revision.accepted for revision in revisions):
        raise SystemExit(f"the picture is of two proposals that are accepted, but the decode made {revisions}")
    gains = [
        digit_gains(models[1], *models[2:], run.sequences[0], revision.position)
        for run, revision in zip(runs, revisions, strict=False)
    ]
    draw(models[1], greedy, runs, revisions, gains, output)
    print(output)


def digit_gains(
    tokenizer: Any, reward_model: Any, reward_tokenizer: Any, response: torch.Tensor, position: int
) -> list[float]:
    """What the reward gains, to first order, if each digit took the place of a response's token."""
    chat = [{"role": "user", "content": arithmetic.QUESTION}]
    chat.append({"role": "assistant", "content": tokenizer.decode(response, skip_special_tokens=True)})
    ids = torch.tensor([reward_tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]])
    before = find(ids[0].tolist(), response[: position + 1].tolist())
    table = reward_model.get_input_embeddings().weight.detach()
    embeds = table[ids].requires_grad_()
    reward_model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    gains = table @ embeds.grad[0, before + position]
    return [float(gains[reward_tokenizer.convert_tokens_to_ids(digit)] - gains[response[position]]) for digit in DIGITS]


def find(text: list[int], part: list[int]) -> int:
    """Where ``part`` begins in ``text``."""
    return next(i for i in range(len(text)) if text[i : i + len(part)] == part)


def draw(tokenizer: Any, greedy: Any, runs: list[Any], revisions: list[Any], gains: Any, output: Path) -> None:
    from matplotlib.figure import Figure

    # White behind everything, so that it can be read on a dark page as well.
    figure = Figure(figsize=(11, 5.3), facecolor="white")
    tops = figure.subplots(2, 4, height_ratios=(1.45, 1), gridspec_kw={"wspace": 0.1, "hspace": 0.18})
    figure.subplots_adjust(left=0.02, right=0.99, top=0.84, bottom=0.1)
    figure.suptitle(f"{arithmetic.QUESTION}   (right: 508)", x=0.02, y=0.97, ha="left", fontsize=13, weight="bold")
    titles = (
        "greedy decoding",
        "∇-Reasoner: rollout 1",
        "rollout 2, from the new token",
        "rollout 3, from the new token",
    )
    changed = (None, None, revisions[0].position, revisions[1].position)
    pointed = (None, revisions[0].position, revisions[1].position, None)
    for axes, title, run, new, old in zip(tops[0], titles, (greedy, *runs), changed, pointed, strict=True):
        axes.axis("off")
        answer(axes, tokenizer, run.sequences[0].tolist(), new, old)
        right = run.texts[0].rstrip().endswith("{508}")
        axes.set_title(title, loc="left", fontsize=11, color=GREY if run is greedy else NABLA, weight="bold")
        verdict = f"reward {run.rewards[0]:+.2f}, {'right' if right else 'wrong'}"
        axes.text(0, -0.6, verdict, fontsize=11, weight="bold", color=RIGHT if right else WRONG, va="center")
    bars = tops[1]
    for axes in (bars[0], bars[3]):
        axes.axis("off")
    for axes, revision, gain in zip(bars[1:3], revisions, gains, strict=True):
        old, new = (tokenizer.decode([token]) for token in (revision.old_token, revision.new_token))
        axes.bar(list(DIGITS), gain, color=[NABLA if d == new else STYLES["greedy"][0] for d in DIGITS], width=0.7)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_yticks([])
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(labelsize=10, length=0)
        axes.set_ylim(1.15 * min(gain), 1.75 * max(gain))
        axes.set_xlabel(f"reward's gradient at this {old}, by digit", fontsize=9)
        change = f"{revision.old_reward:+.2f} → {revision.new_reward:+.2f}"
        said = f"points to {new}: proposed, rolled out,\naccepted ({change})"
        axes.text(1, 1, said, transform=axes.transAxes, ha="right", va="top", fontsize=10, color=NABLA)
    notes = (
        "Marked: the token that is\noptimized, and the one that\ntook its place.",
        "Nothing left to optimize:\nthis is the answer.",
    )
    for axes, note in zip((bars[0], bars[3]), notes, strict=True):
        axes.text(0, 1, note, fontsize=10, va="top", color=GREY)
    figure.savefig(output, dpi=150)


def answer(axes: Any, tokenizer: Any, tokens: list[int], new: int | None, old: int | None) -> None:
    """Writes a response as monospaced lines; the token at ``new`` is framed in green, that at ``old`` in red."""
    axes.set_xlim(0, 22)
    axes.set_ylim(-1.1, 6.1)
    line, column = 0, 0
    for position, token in enumerate(tokens):
        for character in tokenizer.decode([token], skip_special_tokens=True):
            if character == "\n":
                line, column = line + 1, 0
                continue
            frame = None
            if position in (new, old):
                colour = RIGHT if position == new else WRONG
                frame = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": colour, "linewidth": 1.8}
            axes.text(column + 0.5, 5.6 - line, character, family="monospace", fontsize=12, ha="center", va="center",
                bbox=frame)  # fmt: skip
            column += 1


if __name__ == "__main__":
    main()
