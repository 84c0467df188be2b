"""The picture of the suites that compare frameworks, from their rows; ours against PyTorch's forms.

matplotlib is imported on first use, as the suites are also the programs that are timed.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oal_jax.runtime import artifacts

Row = Mapping[str, Any]

# What is drawn of PyTorch, by the form of the twin.
_FORMS = {
    "reference": "PyTorch, as the official code",
    "tuned": "PyTorch, tuned",
    "shortcuts": "PyTorch, our shortcuts",
}
_OURS = "ours (JAX)"
_BAR, _TITLE = 0.27, 0.42  # inches


def draw(rows: Sequence[Row], output: Path) -> list[Path]:
    """OUTPUT.png and .svg beside results.json: medians as bars, least and greatest as whiskers.

    A panel a case of ours that PyTorch has too, in seconds from 0; on PyTorch's bars stands how
    many times ours they take. Cases that are ours alone share the last panel.
    """
    import matplotlib

    paths = []
    # A fixed salt and no date make the same rows the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "oal_jax"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            data = io.BytesIO()
            figure(rows).savefig(data, format=kind, dpi=110, metadata=metadata)
            paths.append(output.with_suffix(f".{kind}"))
            artifacts.write_bytes(paths[-1], data.getvalue())
    return paths


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Case to the rows that are compared with one another, ours first; those alone under ""."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        case = next(iter(row.get("ratios") or {}), row["case"])
        found.setdefault(case, []).append(row)
    alone = [case for case, members in found.items() if len(members) == 1]
    together = {
        case: sorted(members, key=lambda r: r["framework"] != "jax")
        for case, members in found.items()
        if case not in alone
    }
    rest = [found[case][0] for case in alone]
    return together | ({"": rest} if rest else {})


def ratio(row: Row, members: Sequence[Row]) -> tuple[float, float, float] | None:
    """How many times the median of ours a row takes, with least and greatest; None for ours.

    Taken turn by turn where the row says it (`ratios`), else of the medians and extremes.
    """
    ours = [member for member in members if member["framework"] == "jax"]
    if row["framework"] == "jax" or not ours:
        return None
    given = next(iter((row.get("ratios") or {}).values()), None)
    if given:
        return tuple(given)
    (mine,) = ours
    return (
        row["median_s"] / mine["median_s"],
        row["min_s"] / mine["max_s"],
        row["max_s"] / mine["min_s"],
    )


def figure(rows: Sequence[Row]) -> Any:
    """The figure that `draw` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = groups(rows)
    heights = [_TITLE + _BAR * len(members) for members in parts.values()]
    made = Figure(figsize=(9.5, 1.3 + sum(heights)), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(_title(rows), fontsize=10)
    panels = made.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, members) in zip(panels, parts.items(), strict=True):
        _panel(axes, case, members)
    panels[-1].set_xlabel("seconds, median; line: least to greatest", fontsize=9)
    return made


def _title(rows: Sequence[Row]) -> str:
    runs = sorted({row["runs"] for row in rows})
    count = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    plural = "" if runs == [1] else "s"
    return f"Suite {rows[0]['suite']}, {count} run{plural} each: {devices}"


def _panel(axes: Any, case: str, members: Sequence[Row]) -> None:
    from oal_jax.report.figures import INK

    end = max(row["max_s"] for row in members)
    for place, (row, _, color) in enumerate(_bars(members)):
        y = len(members) - 1 - place
        axes.barh(y, row["median_s"], height=0.72, color=color)
        axes.plot([row["min_s"], row["max_s"]], [y, y], color=INK, linewidth=1.1)
        axes.annotate(
            _text(row, ratio(row, members)),
            (max(row["max_s"], row["median_s"]), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"color": "white", "pad": 1},  # no line of the grid through the numbers
        )
    labels = [label for _, label, _ in _bars(members)]
    axes.set_yticks(range(len(members)), [label.replace("$", r"\$") for label in labels[::-1]])
    axes.set_xlim(0, 1.55 * end)  # the numbers stand behind the bars
    axes.set_ylim(-0.6, len(members) - 0.4)
    axes.set_title((case or "ours alone").replace("$", r"\$"), loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)


def _bars(members: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    """Each row with its label and its colour."""
    from oal_jax.report.figures import SERIES

    colors = {_OURS: SERIES[0]}
    colors |= dict(zip(_FORMS.values(), (SERIES[7], SERIES[1], SERIES[3]), strict=True))
    compared = any(row["framework"] != "jax" for row in members)
    for row in members:
        name = _name(row)
        yield row, name if compared else row["case"], colors.get(name, SERIES[7])


def _name(row: Row) -> str:
    if row["framework"] == "jax":
        return _OURS
    if "form" in row:
        return _FORMS[row["form"]]
    if row["suite"] == "scores":  # which compares with libraries, not with the twin
        return "scikit-learn" if row["case"] == "metrics" else "pytorch-ood"
    return "PyTorch"


def _text(row: Row, times: tuple[float, float, float] | None) -> str:
    text = _seconds(row["median_s"])
    if times is None:
        return text
    middle, low, high = times
    spread = f" ({low:.2f} to {high:.2f})" if row["runs"] > 1 else ""
    return f"{text}: {middle:.2f} × ours{spread}"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
