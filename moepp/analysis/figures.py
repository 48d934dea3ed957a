"""Figures for pages that are read in light and dark, on a phone and on a wide screen.

A figure is drawn twice by matplotlib: as SVG whose colours are CSS variables of the page, and as PNG on white. Colours
of the SVG are placeholders while it is drawn, because matplotlib knows no variables.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Variable of the page -> (placeholder, colour of the PNG). The series are told apart with the usual kinds of colour
# blindness (Okabe and Ito); style.css has their values for both schemes.
_COLOURS = {
    "ink": ("#010203", "#1b1f24"),
    "muted": ("#010204", "#59636e"),
    "grid": ("#010205", "#d1d9e0"),
    "series-1": ("#010211", "#0072b2"),
    "series-2": ("#010212", "#d55e00"),
    "series-3": ("#010213", "#009e73"),
    "series-4": ("#010214", "#cc79a7"),
    "series-5": ("#010215", "#b8860b"),
    "series-6": ("#010216", "#56b4e9"),
    "series-7": ("#010217", "#7b3294"),
    "series-8": ("#010218", "#59636e"),
}
NUM_SERIES = 8
DASHES = ("-", "--", ":", "-.")
_FEW = 6  # things in a drawing that are told apart at a glance
_INCHES = (5.4, 3.7)  # 389 pixels wide at 72 per inch: no smaller on a phone


@dataclass(frozen=True)
class Palette:
    """Colours of one of the two drawings."""

    placeholders: bool

    def __getitem__(self, name: str) -> str:
        return _COLOURS[name][0 if self.placeholders else 1]

    def series(self, number: int) -> str:
        """Colour of the n-th series, from 0."""
        return self[f"series-{number % NUM_SERIES + 1}"]

    def line(self, number: int) -> dict[str, Any]:
        """Colour and dashes of the n-th line: colours repeat, the pair does not for 32 lines."""
        return {"color": self.series(number), "linestyle": DASHES[number // NUM_SERIES % len(DASHES)]}


Draw = Callable[["Axes", Palette], None]


@dataclass(frozen=True)
class Figure:
    """A drawing with what is said about it; it is drawn when it is first asked for.

    Attributes:
        name: of its file, and unique on a page.
        title: its heading.
        caption: what to conclude from it.
        draw: draws it into axes.
        header, rows: the same numbers as a table, for those who do not see the drawing.
        source: where the numbers come from: keys of metrics.jsonl, or a file of the run.
    """

    name: str
    title: str
    caption: str
    draw: Draw
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    source: str = ""

    @cached_property
    def svg(self) -> str:
        """The drawing, in colours of the page."""
        return _svg(self.name, self.title, self.caption, self.draw)

    @cached_property
    def png(self) -> bytes:
        """The drawing, on white."""
        return _png(self.draw)


@contextmanager
def _drawing(draw: Draw, palette: Palette, name: str) -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    ink, grid = palette["ink"], palette["grid"]
    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,  # the same drawing has the same bytes
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": palette["muted"],
        "ytick.color": palette["muted"],
        "grid.color": grid,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,  # names of runs, data and tokens may hold dollars
    }
    with matplotlib.rc_context(settings):
        figure = MplFigure(figsize=_INCHES, layout="constrained")
        FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
        axes = figure.subplots()
        axes.grid(alpha=1, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, palette)
        yield figure


def _png(draw: Draw) -> bytes:
    stream = io.BytesIO()
    with _drawing(draw, Palette(placeholders=False), "png") as figure:
        figure.savefig(stream, format="png", dpi=150, facecolor="white")
    return stream.getvalue()


def _svg(name: str, title: str, caption: str, draw: Draw) -> str:
    stream = io.StringIO()
    with _drawing(draw, Palette(placeholders=True), name) as figure:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for variable, (placeholder, _) in _COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    # A page holds several of them: names must differ, and its width decides theirs.
    text = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text)
    label = html.escape(f"{title}. {caption}", quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def compact(value: float, digits: int = 3) -> str:
    """Write a count in few characters, to ``digits`` digits: 1.2 M, 3.4e21."""
    for bound, unit in ((1e18, ""), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= bound:
            return f"{value:.{digits - 1}e}" if not unit else f"{value / bound:.{digits}g}{unit}"
    return f"{value:.{digits + 1}g}"


def distinct_counts(values: Sequence[float]) -> list[str]:
    """Return the values as :func:`compact` does, with as many digits as different values need to read differently."""
    texts: list[str] = []
    for digits in range(3, 16):
        texts = [compact(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def format_counts(axis: Any, whole: bool = False) -> None:
    """Write an axis's ticks as :func:`distinct_counts` does; ``whole``: at integers alone."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    class Counts(FuncFormatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return distinct_counts([float(value) for value in values])

    axis.set_major_locator(MaxNLocator(5, integer=whole))
    axis.set_major_formatter(Counts(lambda value, _: compact(value)))


def label_of(text: str) -> str:
    """Return a name as the label of something drawn: matplotlib keeps labels with an underscore first to itself."""
    return f" {text}" if text.startswith("_") else text


def log_scale(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import LogFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def legend(axes: Axes) -> None:
    """Put a legend above the axes, where there is more than one thing to tell apart; the drawing grows by it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    size = 9 if len(handles) <= _FEW else 8
    shown = [shorten(label) for label in labels]
    width = 72 * _INCHES[0] - 30  # points
    columns = int(width // (32 + 0.58 * size * max(map(len, shown))))  # a handle and gaps; a letter is about so wide
    columns = max(1, min(columns, len(handles), 3))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(handles, shown, **place, ncols=columns, fontsize=size, handlelength=1.8, columnspacing=1.2)
    grow(axes, (-(-len(handles) // columns) - 2) * size * 1.45 / 72)


def grow(axes: Axes, inches: float) -> None:
    """Make the drawing higher; nothing where ``inches`` is not above 0."""
    if inches > 0:
        figure: Any = axes.figure
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + inches)


def bar_labels(axes: Axes, names: Sequence[str]) -> None:
    """Name bars below each other, the first on top; the drawing grows with their number."""
    many = len(names) > _FEW
    axes.set_yticks(range(len(names)), [shorten(name, 36) for name in names], fontsize=8 if many else None)
    axes.set_ylim(len(names) - 0.3, -0.7)
    grow(axes, 0.17 * (len(names) - 12))


def shorten(text: str, length: int = 60) -> str:
    """Return a label without its middle where it is long: its ends tell it from others."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
