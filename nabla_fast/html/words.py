"""Numbers and texts as the page writes them."""

from __future__ import annotations

import math
import re

# All but line feed and tab, which a page would drop or turn into something else.
_PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "␡",
    **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd"),
}


def visible(text: str) -> str:
    """Text with a picture in place of every control character, and of what UTF-8 cannot say."""
    return text.translate(_PICTURES)


def quoted(text: str) -> str:
    """The text of a token by itself: spaces at its ends and line breaks are seen."""
    shown = re.sub(r"\A +| +\Z", lambda spaces: "␣" * len(spaces[0]), visible(text))
    return shown.replace("\n", "↵").replace("\t", "⇥")


def number(value: float | None, digits: int = 3) -> str:
    """A reward or a difference of two, with a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference, with its sign."""
    return ("+" if value >= 0 else "") + number(value)


def percent(probability: float) -> str:
    """A probability, to three digits."""
    if probability >= 0.001 or probability == 0:
        return f"{100 * probability:.3g} %"
    return f"{100 * probability:.1e} %".replace("e-0", "e-").replace("-", "−")


def seconds(value: float) -> str:
    """A duration, to three digits."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def count(value: float) -> str:
    """A counter, its thousands apart."""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def counted(amount: int, thing: str) -> str:
    """An amount of a thing, in the plural where there is not one."""
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def excerpt(text: str, length: int = 80) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(visible(text).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
