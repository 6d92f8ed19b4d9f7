"""Pictures of the command line: lines with error bars, by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import InputError

FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Line:
    """Points of one name, joined in their order; a single one is a mark.

    Attributes:
        errors: half the length of each error bar; None where there is none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float | None]


def check_picture(file: Path, where: str) -> None:
    """Raises InputError where the file's name is of no format that can be drawn."""
    if file.suffix.lower() not in FORMATS:
        given = f"{file.suffix} is" if file.suffix else "without a suffix it is"
        raise InputError(
            f"{given} no picture that can be drawn: {file}",
            where=where,
            remedy=f"name a file that ends with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
        )


def draw_lines(file: Path, lines: Sequence[Line], *, title: str, x: str, y: str) -> None:
    """Draws lines over a logarithmic axis; the same lines give the same SVG.

    Args:
        file: its suffix says the format.
        x: what the logarithmic axis shows; its values are positive.
        y: what the other one shows.
    """
    # It takes a second to import. A Figure of its own needs no display, and leaves nothing behind.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    suffix = file.suffix.lower()
    with matplotlib.rc_context({"svg.hashsalt": "llmtrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for line, mark in zip(lines, "osD^vPX*<>" * len(lines), strict=False):
            errors = [error or 0.0 for error in line.errors]
            axes.errorbar(line.x, line.y, yerr=errors, label=line.name, marker=mark, markersize=5, capsize=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(title, parse_math=False)  # a name may hold a $
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
        # An SVG has the day on which it was drawn, unless that is taken out.
        figure.savefig(file, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
