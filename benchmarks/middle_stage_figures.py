"""The pictures of suite `middle_stage`, from its rows; no state of `pyplot` is touched."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from oal_jax.data.sources import ImageSet
from oal_jax.report.figures import SERIES
from oal_jax.runtime import artifacts

_ACCURACY, _LOSS, _CROSSING = SERIES[0], SERIES[2], "#555555"
_PANELS = (
    ("near", "auroc", "AUROC, near OOD"),
    ("far", "auroc", "AUROC, far OOD"),
    ("near", "fpr_at_95_id_tpr", "FPR at 95 % ID TPR, near OOD"),
    ("far", "fpr_at_95_id_tpr", "FPR at 95 % ID TPR, far OOD"),
)
_COLUMNS = 8  # of the grid of images


def curves(rows: Sequence[Mapping[str, Any]], best: Mapping[tuple[str, int], int]) -> Figure:
    """Accuracy, loss and constraint against the epoch; beside it AUROC and FPR95 of every score.

    Lines are means over the seeds, bands ± a standard deviation; dotted lines are the epochs where
    a seed's training loss falls below its constraint, stars a seed's best epoch by the validation
    sets, at that seed's value.
    """
    epochs = [r for r in rows if r["case"] == "epoch"]
    ends = [r for r in rows if r["case"] == "constraint"]
    figure = _figure(13, 5.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    axes = left.add_subplot()
    _band(axes, epochs, lambda r: r["id_accuracy"], _ACCURACY, "ID accuracy (test)")
    axes.set(title="Accuracy and training loss", xlabel="epoch")
    axes.set_ylabel("ID accuracy, percent", color=_ACCURACY)
    loss = axes.twinx()
    _band(loss, epochs, lambda r: r["train_loss"], _LOSS, "training loss (no augmentation)")
    constraint = float(np.mean([r["constraint"] for r in ends]))
    loss.axhline(constraint, color=_LOSS, linestyle="--", linewidth=1.2, label="loss constraint")
    for r in ends:
        loss.axhspan(
            r["constraint"] - r["std"],
            r["constraint"] + r["std"],
            color=_LOSS,
            alpha=0.12,
            linewidth=0,
        )
    loss.set_ylabel("cross-entropy, nats", color=_LOSS)
    _mark_crossings(axes, ends)
    handles = [h for a in (axes, loss) for h in a.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    grid = right.subplots(2, 2, sharex=True)
    for panel, (group, metric, title) in zip(grid.flat, _PANELS, strict=True):
        _scores(panel, epochs, best, group, metric)
        panel.set_title(title, fontsize=10)
        _mark_crossings(panel, ends)
    for panel in grid[:, 0]:
        panel.set_ylabel("percent")
    for panel in grid[1]:
        panel.set_xlabel("epoch")
    handles = grid[0, 0].get_legend_handles_labels()[0]
    right.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for panel in (axes, *grid.flat):
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.2, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(panel is axes)
    return figure


def examples(row: Mapping[str, Any], data: ImageSet) -> Figure:
    """Images that the final model has right without a mask: the highest losses under it, others.

    Above each its class, what the masked model says, and the loss under the mask in nats.
    """
    kinds = {
        "atypical": "Atypical: right without the mask, highest loss under it",
        "typical": "Typical: right without the mask, drawn from the half with the lowest loss",
    }
    lines = {kind: -(-len(row[kind]) // _COLUMNS) for kind in kinds}
    figure = _figure(13, 0.8 + 1.9 * sum(lines.values()))
    figure.suptitle(f"Training images, seed {row['seed']}: class, prediction under the mask, loss")
    parts = figure.subfigures(2, 1, height_ratios=list(lines.values()))
    for part, (kind, title) in zip(parts, kinds.items(), strict=True):
        part.suptitle(title, fontsize=11)
        grid = part.subplots(lines[kind], _COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, shown in zip(grid.flat, row[kind], strict=False):
            image = data.images[shown["index"]]
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
            label, said = (data.class_names[shown[k]] for k in ("label", "prediction"))
            arrow = label if label == said else f"{label} → {said}"
            axes.set_title(
                f"{arrow}\n{shown['loss']:.2g}",
                fontsize=9,
                color="black" if label == said else _LOSS,
            )
    return figure


def save(figure: Figure, stem: Path, kinds: Sequence[str]) -> list[Path]:
    """Write the figure as STEM.KIND for each kind, whole or not at all; returns the files."""
    paths = []
    # A fixed salt and no date make the same rows the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "oal_jax"}):
        for kind in kinds:
            data = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(data, format=kind, dpi=110, metadata=metadata)
            paths.append(stem.with_name(f"{stem.name}.{kind}"))
            artifacts.write_bytes(paths[-1], data.getvalue())
    return paths


def _scores(axes, epochs, best, group, metric) -> None:
    """A line a score, and stars for its best epochs."""

    def of(r, score):
        return r["metrics"][score][group][metric]

    for index, score in enumerate(epochs[0]["metrics"]):
        color = SERIES[index % len(SERIES)]
        _band(axes, epochs, lambda r, score=score: of(r, score), color, score)
        stars = [(r["epoch"], of(r, score)) for r in epochs if best[score, r["seed"]] == r["epoch"]]
        style = {"linestyle": "none", "marker": "*", "markersize": 10, "markeredgecolor": "white"}
        axes.plot(*zip(*stars, strict=True), color=color, **style)
    axes.plot(
        [],
        [],
        linestyle="none",
        marker="*",
        markersize=10,
        color="black",
        markeredgecolor="white",
        label="best epoch by validation sets, a seed",
    )


def _band(axes, epochs, value, color, label) -> None:
    """Mean over the seeds against the epoch; the band is ± a standard deviation."""
    steps = sorted({r["epoch"] for r in epochs})
    table = [[value(r) for r in epochs if r["epoch"] == step] for step in steps]
    mean = np.array([np.mean(values) for values in table])
    axes.plot(steps, mean, color=color, linewidth=1.6, marker="o", markersize=2.5, label=label)
    if min(map(len, table)) > 1:
        std = np.array([np.std(values, ddof=1) for values in table])
        axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)


def _mark_crossings(axes, ends) -> None:
    """A dotted line where a seed's training loss falls below its constraint."""
    found = [r["crossing_epoch"] for r in ends if r["crossing_epoch"] is not None]
    for index, epoch in enumerate(sorted(set(found))):
        label = None if index else "loss below constraint, a seed"
        axes.axvline(epoch, color=_CROSSING, linestyle=":", linewidth=1.2, label=label)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
