"""The tokens of an answer as the page shows them: their text, what happened to them, and what their card says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nabla_fast.html.words import number, percent, quoted, signed, visible
from nabla_fast.record import Details
from nabla_fast.stats import SequenceStats

STATUSES = {
    "skipped": "The model was certain enough here, or the gradient too small: no other token was looked for.",
    "kept": "Another token was looked for, and this one came out again.",
    "revised": "Another token was tried here, and took the place of the one that was drawn.",
    "rejected": "Another token was tried here; its answer was not better, so this one stayed.",
    "drawn": "As it was drawn: nothing else was looked for, as where no rollouts are left.",
}
"""What can have happened to a token → what the page says of it."""
# Of the tokens that form one character, the one that most happened to decides how it looks.
_NOTABLE = ("revised", "rejected", "kept", "skipped", "drawn")


def statuses(stats: SequenceStats, length: int) -> list[str]:
    """What happened at each of the ``length`` positions of an answer, a key of `STATUSES` each.

    Positions are decided in order: once no rollouts are left, all others stay as they were drawn.
    """
    found = ["drawn"] * length
    tried = set(stats.optimised)
    for position in [p for p in range(length) if p not in tried][: stats.skipped_positions]:
        found[position] = "skipped"
    for position in stats.optimised:
        found[position] = "kept"
    for revision in stats.revisions:
        found[revision.position] = "revised" if revision.accepted else "rejected"
    return found


def shown_tokens(stats: SequenceStats, details: Details) -> list[dict[str, Any]]:
    """An entry for each piece of an answer, in order.

    ``text``, ``status``, ``special`` and ``line`` (whether it breaks one) are how it looks, ``label`` is what a screen
    reader says, ``start`` its first position, ``positions`` all of them, and ``card`` plain data for its card.
    """
    pieces = details.pieces
    happened = statuses(stats, pieces[-1].end if pieces else 0)
    changes = {r.position: row for r, row in zip(stats.revisions, revision_rows(stats, details), strict=True)}
    tried = {r.position: r.old_token if r.accepted else r.new_token for r in stats.revisions}
    shown = []
    for piece in pieces:
        status = min(happened[piece.start : piece.end], key=_NOTABLE.index)
        positions = range(piece.start, piece.end)
        where = f"token {piece.start}" if len(positions) == 1 else f"tokens {piece.start} to {piece.end - 1}"
        own = [changes[p] for p in positions if p in changes]
        told = [] if details.record is None else [_recorded(p, details, tried.get(p)) for p in positions]
        label = f"{where}, {quoted(piece.text)}, {status}"
        label += "".join(f", {change['was']} to {change['now']}" for change in own)
        label += "".join(f", probability {entry['probability']}" for entry in told)
        card = {"token": quoted(piece.text), "where": where, "status": status, "changes": own, "records": told}
        shown.append(
            {
                "text": visible(piece.text),
                "status": status,
                "special": piece.special,
                "line": "\n" in piece.text and not piece.special,
                "label": label,
                "start": piece.start,
                "positions": list(positions),
                "card": card,
            }
        )
    return shown


def revision_rows(stats: SequenceStats, details: Details) -> list[dict[str, str]]:
    """Every proposal in words, in order; each is a rollout behind the first one."""
    odds: Sequence[Sequence[float]] = (
        [()] * len(stats.revisions) if details.record is None else details.record.proposals
    )
    return [
        {
            "rollout": str(rollout),
            "position": str(r.position),
            "was": quoted(details.words[r.old_token]),
            "now": quoted(details.words[r.new_token]),
            "odds": " → ".join(map(percent, probabilities)),
            "before": number(r.old_reward),
            "after": number(r.new_reward),
            "gain": signed(r.new_reward - r.old_reward),
            "verdict": "accepted" if r.accepted else "rejected",
        }
        for rollout, (r, probabilities) in enumerate(zip(stats.revisions, odds, strict=True), start=2)
    ]


def _recorded(position: int, details: Details, other: int | None) -> dict[str, Any]:
    """What the model thought at one position, in words; candidates as (text, probability, share for a bar, role).

    The role is "this" of the answer's token and "other" of ``other``, the one that was tried or was there before.
    """
    assert details.record is not None
    entry, own = details.record.tokens[position], details.tokens[position]
    candidates = [
        (
            quoted(details.words[token]),
            percent(probability),
            round(100 * probability, 2),
            "this" if token == own else "other" if token == other else "",
        )
        for token, probability in entry.candidates
    ]
    return {
        "position": position,
        "probability": percent(entry.probability),
        "entropy": f"{entry.entropy:.3g}",
        "norm": None if entry.gradient_norm is None else f"{entry.gradient_norm:.3g}",
        "candidates": candidates,
    }
