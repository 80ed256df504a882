"""A figure with its numbers, how it is saved, and the one palette of all figures."""

from __future__ import annotations

import io
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from das_lm.files import write_text
from das_lm.report.table import Rows
from das_lm.terminal import printable

WIDTH = 8.0  # inches
#: Okabe and Ito's colours, told apart with any colour vision; each with a dash pattern of its own.
STYLES = (
    ("#0072B2", "-"),
    ("#D55E00", (0, (5, 1))),
    ("#009E73", (0, (3, 1, 1, 1))),
    ("#CC79A7", (0, (1, 1))),
    ("#E69F00", (0, (7, 2))),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
)
#: The lower and the upper bound.
BOUNDS = {"naive": ("0.45", "-"), "joint": ("black", "-")}
BETTER, WORSE, INK, GREY = STYLES[0][0], STYLES[1][0], "black", "0.45"
#: Whatever the user's own matplotlibrc says; a `$` in a name is a dollar, and the same run gives the same file.
STYLE = {
    "text.parse_math": False,
    "svg.hashsalt": "das_lm",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass
class Drawing:
    """
    A figure, and its numbers.

    Args:
        name: of its files, without a suffix.
        title: what it shows.
        caption: how it is to be read.
        figure: the figure.
        tables: title -> rows.
        svg: the figure as it goes into a page, see [`inline_svg`]; after [`draw`].
        width: of the figure, in rem.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    tables: dict[str, Rows] = field(default_factory=dict)
    svg: str = ""
    width: float = 0

    def draw(self, name: str) -> str:
        """Make `svg`, all that then remains of the figure; return it as a file of that name."""
        file = io.StringIO()
        with drawing_style():
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        text = printable(file.getvalue())  # comments repeat what is drawn
        self.svg, self.width = inline_svg(text, name), round(6 * self.figure.get_figwidth(), 1)  # 16 px are a rem
        self.figure.clear()
        return text

    def save(self, directory: Path, name: str) -> None:
        """Write `NAME.png` and `NAME.svg`, each whole or not at all, and make `svg`."""
        temporary = directory / f".{name}.{os.getpid()}"
        try:
            with drawing_style():
                self.figure.savefig(temporary, format="png", dpi=150)
                os.replace(temporary, directory / f"{name}.png")
        finally:
            temporary.unlink(missing_ok=True)
        self.figure.set_layout_engine("none")  # it has been laid out
        write_text(directory / f"{name}.svg", self.draw(name))


def drawing_style() -> AbstractContextManager[None]:
    """What figures are made and saved in."""
    return style.context(["default", STYLE])


def inline_svg(text: str, prefix: str) -> str:
    """
    An SVG by matplotlib for a page with others, light or dark.

    Black, white and greys become mixtures of the page's `--ink` and `--paper`, ids begin with `prefix`, and comments
    go, in which matplotlib repeats what it has drawn as glyphs.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")

    def mixture(match: re.Match[str]) -> str:
        return f"color-mix(in srgb, var(--ink) {100 - int(match[1], 16) / 2.55:.0f}%, var(--paper))"

    for colour, name in ((BETTER, "better"), (WORSE, "worse")):  # lighter where the page is dark
        text = text.replace(f": {colour.lower()}", f": var(--{name}, {colour.lower()})")
    return re.sub(r"(?<=: )#([0-9a-f]{2})\1\1\b", mixture, text)
