"""The picture of suite `latent_outliers`: dots with intervals; no state of `pyplot` is touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.middle_stage_figures import save
from benchmarks.paired import Interval
from oal_jax.report.figures import SERIES

_ZERO = "#888888"
_COLUMNS = 2


class Dot(NamedTuple):
    """A case: the interval over seeds, and the one over seeds and problems."""

    name: str
    seeds: Interval
    crossed: Interval


def draw_dots(panels: Mapping[str, Sequence[Dot]], title: str, stem: Path) -> list[Path]:
    """A panel a metric, a line a case: thick over seeds, thin over seeds and problems.

    Args:
      panels: heading to its dots.
      title: what the axis shows.
      stem: the files are STEM.png and STEM.svg.
    """
    lines, count = -(-len(panels) // _COLUMNS), max(map(len, panels.values()))
    figure = Figure(figsize=(11, lines * (1.1 + 0.28 * count)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: 95 % intervals, thick over seeds, thin over seeds and problems")
    grid = figure.subplots(lines, _COLUMNS, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (heading, dots) in zip(grid.flat, panels.items(), strict=False):
        axes.axvline(0, color=_ZERO, linewidth=1)
        for place, dot in enumerate(dots):
            color = SERIES[place % len(SERIES)]
            for interval, width in ((dot.crossed, 1.2), (dot.seeds, 3.5)):
                ends = (interval.low, interval.high)
                axes.plot(ends, (place, place), color=color, linewidth=width)
            axes.plot(dot.seeds.mean, place, "o", color=color, markersize=6)
        axes.set_yticks(range(len(dots)), [dot.name for dot in dots], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(heading, fontsize=10)
        axes.grid(axis="x", alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, stem, ("png", "svg"))
