"""A bar chart of the rows of a suite that compares frameworks.

matplotlib is imported on first use, because the suites are also the programs that are timed.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oal_jax.runtime import artifacts

Row = Mapping[str, Any]

# Labels of the PyTorch twin's forms.
_FORMS = {
    "reference": "PyTorch, as the official code",
    "tuned": "PyTorch, tuned",
    "shortcuts": "PyTorch, our shortcuts",
}
_OURS = "ours (JAX)"
_BAR, _TITLE = 0.27, 0.42  # inches


def draw(rows: Sequence[Row], output: Path) -> list[Path]:
    """Write the chart as PNG and SVG beside results.json, and return the two paths."""
    import matplotlib

    paths = []
    # A fixed salt and no date make the bytes of the same rows equal.
    with matplotlib.rc_context({"svg.hashsalt": "oal_jax"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            data = io.BytesIO()
            figure(rows).savefig(data, format=kind, dpi=110, metadata=metadata)
            paths.append(output.with_suffix(f".{kind}"))
            artifacts.write_bytes(paths[-1], data.getvalue())
    return paths


def figure(rows: Sequence[Row]) -> Any:
    """Medians as bars, least and greatest as whiskers, a panel a case, in seconds.

    Beside a PyTorch bar stands its time as a multiple of ours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = groups(rows)
    heights = [_TITLE + _BAR * len(members) for members in panels.values()]
    chart = Figure(figsize=(9.5, 1.3 + sum(heights)), layout="constrained")
    FigureCanvasAgg(chart)
    runs = sorted({row["runs"] for row in rows})
    count = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    chart.suptitle(f"Suite {rows[0]['suite']}, runs: {count}, on {devices}", fontsize=10)
    axes = chart.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (case, members) in zip(axes, panels.items(), strict=True):
        _panel(panel, case, members)
    axes[-1].set_xlabel("seconds, median; line: least to greatest", fontsize=9)
    return chart


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Case of ours to the rows that are compared with it, ours first.

    Rows that are compared with none share the group "", the last one.
    """
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        case = next(iter(row.get("ratios") or {}), row["case"])
        by_case.setdefault(case, []).append(row)
    compared = {
        case: sorted(members, key=lambda row: row["framework"] != "jax")
        for case, members in by_case.items()
        if len(members) > 1
    }
    alone = [members[0] for members in by_case.values() if len(members) == 1]
    return compared | ({"": alone} if alone else {})


def _panel(axes: Any, case: str, members: Sequence[Row]) -> None:
    from oal_jax.report.figures import INK, SERIES

    colors = dict(zip((_OURS, *_FORMS.values()), (SERIES[i] for i in (0, 7, 1, 3)), strict=True))
    compared = any(row["framework"] != "jax" for row in members)
    labels = []
    for place, row in enumerate(members):
        y = len(members) - 1 - place
        name = _name(row)
        labels.append(name if compared else row["case"])
        axes.barh(y, row["median_s"], height=0.72, color=colors.get(name, SERIES[7]))
        axes.plot([row["min_s"], row["max_s"]], [y, y], color=INK, linewidth=1.1)
        axes.annotate(
            _text(row),
            (max(row["max_s"], row["median_s"]), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"color": "white", "pad": 1},  # hides the grid behind the numbers
        )
    axes.set_yticks(range(len(members)), [label.replace("$", r"\$") for label in labels[::-1]])
    axes.set_xlim(0, 1.55 * max(row["max_s"] for row in members))  # room for the numbers
    axes.set_ylim(-0.6, len(members) - 0.4)
    axes.set_title((case or "ours alone").replace("$", r"\$"), loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)


def _name(row: Row) -> str:
    if row["framework"] == "jax":
        return _OURS
    if "form" in row:
        return _FORMS[row["form"]]
    return row.get("library", "PyTorch")


def _text(row: Row) -> str:
    seconds = row["median_s"]
    text = f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.4g} s"
    ratios = row.get("ratios")
    if row["framework"] == "jax" or not ratios:
        return text
    median, low, high = next(iter(ratios.values()))
    interval = f" ({low:.2f} to {high:.2f})" if row["runs"] > 1 else ""
    return f"{text}: {median:.2f} × ours{interval}"
