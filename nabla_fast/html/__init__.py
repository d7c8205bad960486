"""Answers as a web page: one file that needs nothing else, in light and dark, for wide and for narrow screens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from nabla_fast import __version__
from nabla_fast.html.tokens import STATUSES
from nabla_fast.html.view import method_of, view
from nabla_fast.html.words import counted, visible

if TYPE_CHECKING:
    from nabla_fast.generate import NablaOutput

_HERE = Path(__file__).parent
_FRAME_HEIGHT = 640  # pixels, where a script may not fit a notebook's frame to its page


class Page(str):
    """A web page. A notebook shows it in a frame, where neither's style reaches the other."""

    def _repr_html_(self) -> str:
        style = f"display:block;width:100%;height:{_FRAME_HEIGHT}px;border:0;border-radius:8px;resize:vertical"
        return f'<iframe title="answers" style="{style}" srcdoc="{escape(self)}"></iframe>'

    def __repr__(self) -> str:
        return f"<a page of {len(self):,} characters>"


def page(
    output: NablaOutput,
    *,
    best_of_n: NablaOutput | None = None,
    beside: Mapping[str, NablaOutput] | None = None,
    title: str | None = None,
) -> Page:
    """The page of an output: see `nabla_fast.NablaOutput.to_html`."""
    others, ours = dict(beside or {}), method_of(output)
    if ours in others:
        raise ValueError(f"beside names an output {ours!r}, which is what this one is called; use another name")
    if best_of_n is not None:
        name = method_of(best_of_n) if best_of_n.details else "Best-of-N"
        if name == ours or name in others:
            raise ValueError(f"best_of_n is called {name!r}, as another output is; give it in beside, by another name")
        others[name] = best_of_n
    for name, other in others.items():
        if len(other.texts) != len(output.texts):
            argument = "best_of_n" if other is best_of_n else f"beside[{name!r}]"
            theirs, own = (counted(len(one.texts), "answer") for one in (other, output))
            raise ValueError(f"{argument} has {theirs} and this output {own}; give outputs for the same prompts")
    return Page(_template().render(**view(output, others), title=ours if title is None else visible(title)))


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(version=__version__, statuses=STATUSES)
    for name in ("css", "js"):
        # Ours, and not to be escaped.
        environment.globals[name] = Markup((_HERE / f"page.{name}").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja")
