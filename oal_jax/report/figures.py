"""The pictures of the report, as strings for its HTML.

Charts are SVG with text as text and lines in `currentColor`, so they follow the light or dark
scheme of the page. Samples are PNG data. matplotlib is imported on first use, `pyplot` never.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from oal_jax.evaluation.metrics import curve

INK = "#010203"  # stands for currentColor while matplotlib draws
ID_COLOR = "#4c8bd6"
GROUP_COLORS = {"near": "#f28e2b", "far": "#d9534f", "validation": "#9c6ade", "csid": "#3fa796"}
# Readable on white and on near-black. Colours repeat after the last one.
SERIES = ("#4c8bd6", "#f28e2b", "#d9534f", "#3fa796", "#9c6ade", "#b8892b", "#d16ba5", "#7a8899")
_CURVE_POINTS = 300
_DOTS = 1200  # points per cloud of the projection; more would hide each other
_CLASSES_NAMED = 10  # a longer legend would fill the picture
_SPIKE = 8  # ratio of peaks from which a linear axis would hide the lower histogram
_FIT_ROWS = 1000  # features used to fit the projection


def histograms(
    id_scores: Float[np.ndarray, " n"],
    groups: Mapping[str, Float[np.ndarray, " m"]],
    threshold: float | None,
    title: str,
) -> str:
    """Densities of the ood_scores of ID test and of each group of OOD sets, and the threshold.

    The axis spans the middle 99 % of all scores, and beyond the ID scores at most four times their
    own span, so that a heavy tail does not squeeze the rest. Scores outside are in the outer bins.
    """
    figure, axes = _figure()
    everything = np.concatenate([id_scores, *groups.values()]).astype(np.float64)
    low, high = np.percentile(everything, [0.5, 99.5])
    first, last = np.percentile(id_scores.astype(np.float64), [0.5, 99.5])
    if last > first:
        low, high = max(low, first - 4 * (last - first)), min(high, last + 4 * (last - first))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, 41)
    series = [("ID test", id_scores, ID_COLOR)]
    series += [(f"{name} OOD", s, GROUP_COLORS[name]) for name, s in groups.items()]
    peaks = []
    for name, scores, color in series:
        scores = np.clip(scores.astype(np.float64), low, high)
        weights = np.full(len(scores), 1 / (len(scores) * (bins[1] - bins[0])))
        style = {"histtype": "stepfilled", "alpha": 0.35, "color": color}
        heights, _, _ = axes.hist(scores, bins, weights=weights, label=name, **style)
        peaks.append(heights.max())
        axes.hist(scores, bins, weights=weights, histtype="step", color=color, linewidth=1.2)
    if threshold is not None and low <= threshold <= high:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label="threshold")
    if max(peaks) > _SPIKE * min(peaks):
        axes.set_yscale("function", functions=(np.sqrt, np.square))
        axes.set_ylabel("density (root scale)")
    else:
        axes.set_ylabel("density")
    axes.set(title=title, xlabel="ood_score (higher = more OOD)", yticks=[], xlim=(low, high))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _svg(figure, f"Histogram of ood_scores: {title}")


def roc(
    id_scores: Float[np.ndarray, " n"],
    sets: Mapping[str, Float[np.ndarray, " m"]],
    title: str,
) -> str:
    """ROC curves, one per OOD set. OOD is the positive class."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.3)
    for index, (name, scores) in enumerate(sets.items()):
        c = curve(id_scores, scores)
        # Points evenly spaced along the staircase keep its corners where the curve is steep.
        length = c.id_rate + c.ood_rate
        pick = np.searchsorted(length, np.linspace(0, 2, _CURVE_POINTS)).clip(0, len(length) - 1)
        style = {"color": SERIES[index % len(SERIES)], "linewidth": 1.4}
        axes.plot(c.id_rate[pick], c.ood_rate[pick], label=name, **style)
    axes.axhline(0.95, color=INK, linestyle=":", linewidth=0.8, alpha=0.6)
    axes.set(title=title, xlabel="ID called OOD", ylabel="OOD caught", xlim=(0, 1), ylim=(0, 1.01))
    _legend(axes, loc="lower right")
    return _svg(figure, f"ROC curves: {title}")


def overview(
    values: Mapping[str, Mapping[str, float]],
    intervals: Mapping[tuple[str, str], tuple[float, float]],
    title: str,
) -> str:
    """One line per score, the first on top, with one dot per group (near, far), in percent.

    A bar through a dot shows the ends that `intervals` has for (score, group).
    """
    order = list(values)[::-1]
    figure, axes = _figure(height=0.9 + 0.24 * len(order))
    for group in dict.fromkeys(group for score in order for group in values[score]):
        color = GROUP_COLORS[group]
        for place, score in enumerate(order):
            if (score, group) in intervals:
                axes.plot(intervals[score, group], [place, place], color=color, alpha=0.45)
        dots = [(values[s][group], place) for place, s in enumerate(order) if group in values[s]]
        style = {"linestyle": "none", "marker": "o", "markersize": 5.5, "color": color}
        axes.plot(*zip(*dots, strict=True), **style, label=f"{group} OOD")
    axes.set(title=title, xlabel="percent", yticks=range(len(order)))
    axes.set_yticklabels([_plain(score) for score in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    _legend_below(figure, axes)
    return _svg(figure, title)


def shares(
    percent: Mapping[str, float], groups: Mapping[str, str], expected: float, title: str
) -> str:
    """Horizontal bars: percent of each set called OOD. Sets without a group are ID.

    The dashed line is at `expected`, the percent of ID inputs that the threshold rejects.
    """
    figure, axes = _figure(height=0.9 + 0.24 * len(percent))
    names = list(percent)[::-1]
    colors = [GROUP_COLORS[groups[name]] if name in groups else ID_COLOR for name in names]
    axes.barh(range(len(names)), [percent[name] for name in names], color=colors, height=0.7)
    for place, name in enumerate(names):
        inside = percent[name] > 85  # a number beside a long bar would leave the picture
        axes.annotate(
            f"{percent[name]:.1f}",
            (percent[name], place),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color=INK,
            fontsize=8,
        )
    axes.axvline(expected, color=INK, linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="called OOD, percent", xlim=(0, 100), yticks=range(len(names)))
    axes.set_yticklabels([_plain(name) for name in names])
    return _svg(figure, f"Share of each set called OOD: {title}")


def pca(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and the two leading principal axes (d, 2) of `features`, with unique signs.

    The fit uses at most 1000 rows, evenly spaced. Features of one dimension or one row have no
    second axis: it is zero.
    """
    rows = np.asarray(features, np.float64)[:: -(-len(features) // _FIT_ROWS)]
    mean = rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axes = np.concatenate([axes[:2], np.zeros((2, rows.shape[1]))])[:2]
    signs = np.sign(axes[np.arange(2), np.argmax(np.abs(axes), axis=1)])
    return mean, (axes * np.where(signs == 0, 1.0, signs)[:, None]).T


def projection(
    id_features: Float[np.ndarray, "n d"],
    id_labels: np.ndarray,
    class_names: Sequence[str],
    ood_features: Mapping[str, Float[np.ndarray, "m d"]],
    outlier_features: Float[np.ndarray, "k d"] | None,
) -> str:
    """First two principal components of all features, fitted on ID features.

    Colours are ID classes, markers are OOD sets, crosses are mapped outliers. The axes span the
    middle 99 % of the points, so that a few far ones do not squeeze the classes.
    """
    figure, axes = _figure(height=4.0)
    mean, directions = pca(id_features)

    def thin(x, dots=_DOTS):
        return np.asarray(x)[:: max(1, -(-len(x) // dots))]

    def place(x):
        return (x.astype(np.float64) - mean) @ directions

    points, labels = place(thin(id_features)), thin(id_labels)
    clouds = [points]
    style = {"linestyle": "none", "markeredgewidth": 0}
    # OOD sets are drawn first, below the classes. Hues are for classes, so sets differ by marker.
    for index, (name, features) in enumerate(ood_features.items()):
        clouds.append(place(thin(features, _DOTS // 2)))
        axes.plot(
            *clouds[-1].T,
            **style,
            marker="^vDs<>ph"[index % 8],
            markersize=3.5,
            color="#8a8f98",
            alpha=0.6,
            label=name,
        )
    hues = _hues(len(class_names))
    if len(class_names) <= _CLASSES_NAMED:
        for index, name in enumerate(class_names):
            axes.plot(
                *points[labels == index].T,
                **style,
                marker="o",
                markersize=3,
                color=hues[index],
                alpha=0.7,
                label=name,
            )
    else:
        axes.scatter(*points.T, s=9, c=hues[labels], linewidths=0, alpha=0.7)
    if outlier_features is not None and len(outlier_features):
        clouds.append(place(thin(outlier_features)))
        axes.plot(
            *clouds[-1].T,
            linestyle="none",
            marker="x",
            markersize=4,
            color=INK,
            alpha=0.6,
            label="mapped outliers",
        )
    low, high = np.percentile(np.concatenate(clouds), [0.5, 99.5], axis=0)
    margin = 0.08 * (high - low) + 1e-6
    axes.set(
        xlim=(low[0] - margin[0], high[0] + margin[0]),
        ylim=(low[1] - margin[1], high[1] + margin[1]),
        xticks=[],
        yticks=[],
        xlabel="first principal component",
        ylabel="second",
    )
    _legend_below(figure, axes)
    return _svg(figure, "Principal components of the features")


def curves(series: Mapping[str, Float[np.ndarray, "t 2"]], title: str, unit: str) -> str:
    """Lines over training steps from (step, value) pairs; long series are averaged in chunks."""
    figure, axes = _figure()
    for index, (name, values) in enumerate(series.items()):
        values = np.asarray(values, np.float64)
        parts = np.array_split(values, min(_CURVE_POINTS, max(1, len(values))))
        values = np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2)
        marker = "o" if len(values) < 20 else None
        axes.plot(
            *values.T,
            color=SERIES[index % len(SERIES)],
            linewidth=1.4,
            label=name,
            marker=marker,
            markersize=3,
        )
    last = [abs(np.asarray(values)[-1, 1]) for values in series.values()]
    first = [abs(np.asarray(values)[0, 1]) for values in series.values()]
    if max(first) > 20 * np.median(last):
        # On a linear axis one large early value would flatten all other lines.
        axes.set_yscale("symlog", linthresh=1.0)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    _legend(axes)
    return _svg(figure, f"Training curves: {title}")


def strip(images: UInt8[np.ndarray, "k h w c"], size: int = 48) -> str:
    """One row of images as a PNG data URI, each reduced to at most `size` pixels a side.

    Args:
      images: uint8, with 1 channel (grey), 3 (RGB) or 4 (opacity is left out).
      size: larger images are averaged down by whole factors.

    Raises:
      ValueError: not uint8, not four axes, or another number of channels.
    """
    from PIL import Image

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        form = f"{images.dtype} {images.shape}"
        raise ValueError(f"images must be uint8 (k, h, w, 1, 3 or 4): {form}")
    images = images[..., :3]
    k, h, w, c = images.shape
    factor = -(-max(h, w) // size)
    h, w = h // factor * factor, w // factor * factor
    blocks = images[:, :h, :w].reshape(k, h // factor, factor, w // factor, factor, c)
    small = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    row = np.concatenate(list(small), axis=1)
    data = io.BytesIO()
    Image.fromarray(row[:, :, 0] if c == 1 else row).save(data, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _hues(n: int) -> Float[np.ndarray, "n 3"]:
    """n colours around the colour circle."""
    from matplotlib.colors import hsv_to_rgb

    return hsv_to_rgb(np.array([(i / max(n, 1), 0.65, 0.85) for i in range(n)]).reshape(-1, 3))


def _figure(width: float = 4.6, height: float = 3.1):
    """A transparent figure, about as wide as a phone so that its text stays legible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.5)
    axes.tick_params(color=INK, labelcolor=INK, labelsize=8)
    axes.title.set(color=INK, fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=9)
    return figure, axes


def _legend(axes, loc: str = "best") -> None:
    axes.legend(loc=loc, frameon=False, fontsize=8, labelcolor=INK)


def _legend_below(figure, axes) -> None:
    handles = axes.get_legend_handles_labels()
    if handles[0]:
        longest = max(map(len, handles[1]))
        figure.legend(
            *handles,
            loc="outside lower center",
            ncols=max(1, min(3, 60 // (longest + 4))),  # about 60 letters fit into a line
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handletextpad=0.2,
            columnspacing=1.0,
        )


def _plain(name: str) -> str:
    """`name` with dollar signs escaped, which start a formula in matplotlib."""
    return name.replace("$", r"\$")


def _svg(figure, description: str) -> str:
    """The figure as an `<svg>` element for HTML, without prologue, metadata and namespace URLs."""
    import matplotlib

    text = io.StringIO()
    # Text as text is small and searchable. A fixed salt makes the bytes reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "oal_jax"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(INK, "currentColor")
    label = html.escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
