"""The page of a run: one HTML file with its numbers, pictures and configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oal_jax.config import Config, flatten
from oal_jax.evaluation import protocol
from oal_jax.evaluation.bootstrap import Interval
from oal_jax.evaluation.headline import Headline
from oal_jax.evaluation.protocol import Evaluation, Inputs
from oal_jax.evaluation.search import Trial, describe
from oal_jax.evaluation.tables import MEANS, Row, is_mean
from oal_jax.report import figures, html
from oal_jax.runtime.artifacts import write_bytes

_SCORES_SHOWN = 6  # with pictures; the tables show all
_CLASSES_SHOWN = 10
_SAMPLES_SHOWN = 8
_EXTREMES_SHOWN = 8
_FEW = 200  # images of a test set; below it an AUROC is uncertain by several points
_METRICS = ("auroc", "aupr_in", "aupr_out", "fpr_at_95_ood_tpr", "fpr_at_95_id_tpr")
_MAIN_METRICS = ("auroc", "fpr_at_95_ood_tpr", "fpr_at_95_id_tpr")


class ReportInputs(NamedTuple):
    """What the page shows. A section without data is left out."""

    title: str
    facts: Mapping[str, object]  # below the title: method, seed, date, versions
    config: Config
    class_names: Sequence[str]
    evaluation: Evaluation
    headline: Headline
    id_test: Inputs
    ood: Mapping[str, Inputs]
    groups: Mapping[str, str]  # set -> near, far, validation or csid
    intervals: Sequence[Interval] = ()
    trials: Sequence[Trial] = ()
    log: Sequence[Mapping[str, Any]] = ()  # rows of metrics.jsonl of the student's training
    outlier_features: np.ndarray | None = None  # (k, d): outliers in the student's feature space
    samples: Mapping[str, np.ndarray] = {}  # title -> (classes, k, h, w, c) uint8


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Writes the page to `path`, atomically. Takes seconds, mostly for the charts.

    Raises:
      ValueError: sample images that are not uint8 (classes, k, h, w, 1 or 3).
    """
    write_bytes(Path(path), render(inputs).encode())


def render(inputs: ReportInputs) -> str:
    """The page as a string."""
    score = inputs.headline.score
    inputs = inputs._replace(evaluation=_headline_first(inputs.evaluation, score))
    result, keep = inputs.evaluation, inputs.config.evaluation.keep_id
    means, sets = _split(result.rows)
    spectrum_means, spectrum_sets = _split(result.full_spectrum_rows)
    accuracy, rejected = protocol.accuracy(inputs.id_test), protocol.rejected(result)
    shown = list(result.thresholds)[:_SCORES_SHOWN]
    return html.render(
        "run_page.html.jinja",
        title=inputs.title,
        facts=inputs.facts,
        tiles=_tiles(accuracy, inputs.headline, means),
        headline=inputs.headline,
        groups=inputs.groups,
        scores_left=len(result.thresholds) - len(shown),
        keep=100 * keep,
        means=_metric_table(means, _METRICS),
        sets=_metric_table(sets, _MAIN_METRICS),
        overview=_overview(means, inputs.intervals),
        has_intervals=bool(inputs.intervals),
        few=_FEW,
        small_sets=_small_sets(inputs),
        distributions=_distributions(inputs, shown),
        rejected=rejected,
        shares=[figures.shares(rejected[s], inputs.groups, 100 * (1 - keep), s) for s in shown],
        csid_rows=result.csid_rows,
        spectrum_means=_metric_table(spectrum_means, _METRICS),
        spectrum_sets=_metric_table(spectrum_sets, _MAIN_METRICS),
        extremes=_extremes(inputs, score),
        projection=_projection(inputs),
        has_outliers=inputs.outlier_features is not None,
        curves=_curves(inputs.log),
        samples=[(title, *_grid(x, inputs.class_names)) for title, x in inputs.samples.items()],
        validation=_metric_table(result.validation_rows, _MAIN_METRICS),
        trials=[(trial, describe(trial.params)) for trial in inputs.trials],
        config=flatten(inputs.config),
    )


def extreme_rows(scores: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Indices of the `count` most and least OOD inputs, the extreme first, no input in both."""
    order = np.argsort(-scores, kind="stable")
    count = min(count, max(1, len(order) // 2))
    return {"most": order[:count], "least": order[::-1][:count]}


def short(value: float) -> str:
    """A number in few letters: three significant digits, from 100,000 on as 1.23e5."""
    if value and not 1e-4 <= abs(value) < 1e5:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _headline_first(result: Evaluation, score: str) -> Evaluation:
    """The same evaluation; all tables begin with the headline score."""

    def ordered(rows):
        return sorted(rows, key=lambda row: row.score != score)

    return result._replace(
        rows=ordered(result.rows),
        validation_rows=ordered(result.validation_rows),
        full_spectrum_rows=ordered(result.full_spectrum_rows),
        csid_rows=ordered(result.csid_rows),
        thresholds={score: result.thresholds[score], **result.thresholds},
    )


def _small_sets(inputs: ReportInputs) -> dict[str, int]:
    """The test sets with few images, and how many they have."""
    score = inputs.headline.score
    sets = {"ID test": inputs.evaluation.id_scores[score]}
    for name, values in inputs.evaluation.ood_scores[score].items():
        if inputs.groups[name] != "validation":
            sets[name] = values
    return {name: len(values) for name, values in sets.items() if len(values) < _FEW}


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The mean rows and the rows of single sets."""
    return [row for row in rows if is_mean(row)], [row for row in rows if not is_mean(row)]


def _tiles(
    accuracy: float, headline: Headline, means: Sequence[Row]
) -> list[tuple[str, float, str]]:
    """(name, value, unit) of the numbers on top, those of the headline score."""
    tiles = [("ID accuracy", accuracy, "%")]
    for row in means:
        if row.score == headline.score:
            tiles.append((f"{row.group}-OOD AUROC", row.auroc, ""))
            tiles.append((f"{row.group}-OOD FPR at 95 % OOD TPR", row.fpr_at_95_ood_tpr, "%"))
    if headline.validation_auroc is not None:
        tiles.append(("validation-OOD AUROC, against ID validation", headline.validation_auroc, ""))
    return tiles


def _metric_table(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """One line per score; for each set, the values of `metrics` and whether they are best."""
    values = {(row.score, row.dataset, m): getattr(row, m) for row in rows for m in metrics}
    scores = list(dict.fromkeys(row.score for row in rows))
    columns = [(d, m) for d in dict.fromkeys(row.dataset for row in rows) for m in metrics]
    best = {}
    for dataset, metric in columns:
        column = [round(values[s, dataset, metric], 2) for s in scores]
        best[dataset, metric] = min(column) if "fpr" in metric else max(column)
    return {
        "metrics": metrics,
        "groups": {_title(row): row.group for row in rows},
        "lines": {
            score: [
                (values[score, *c], len(scores) > 1 and round(values[score, *c], 2) == best[c])
                for c in columns
            ]
            for score in scores
        },
    }


def _title(row: Row) -> str:
    """The set of a row in words."""
    if not is_mean(row):
        return row.dataset
    return "mean, validation" if row.group == "validation" else f"mean, {row.group}-OOD"


def _overview(means: Sequence[Row], intervals: Sequence[Interval]) -> list[str]:
    """AUROC and FPR of all scores at a glance. A single score needs no picture."""
    if len({row.score for row in means}) < 2:
        return []
    charts = []
    # Both pictures have one order: by AUROC on the first group.
    means = sorted(means, key=lambda row: (row.group != means[0].group, -row.auroc))
    for metric, title in (("auroc", "AUROC"), ("fpr_at_95_ood_tpr", "FPR at 95 % OOD TPR")):
        values: dict[str, dict[str, float]] = {}
        for row in means:
            values.setdefault(row.score, {})[row.group] = getattr(row, metric)
        ends = {
            (i.score, i.group): (i.low, i.high)
            for i in intervals
            if i.metric == metric and i.dataset == MEANS[i.group]
        }
        charts.append(figures.overview(values, ends, title))
    return charts


def _distributions(inputs: ReportInputs, scores: Sequence[str]) -> list[str]:
    """A histogram and ROC curves per score, of `_shown_groups`."""
    charts, result, shown = [], inputs.evaluation, _shown_groups(inputs)
    for score in scores:
        by_group: dict[str, dict[str, np.ndarray]] = {}
        for name, values in result.ood_scores[score].items():
            if inputs.groups[name] in shown:
                by_group.setdefault(inputs.groups[name], {})[name] = values
        if by_group:
            pooled = {group: np.concatenate(list(x.values())) for group, x in by_group.items()}
            sets = {name: values for x in by_group.values() for name, values in x.items()}
            known = result.id_scores[score]
            charts.append(figures.histograms(known, pooled, result.thresholds[score], score))
            charts.append(figures.roc(known, sets, score))
    return charts


def _shown_groups(inputs: ReportInputs) -> set[str]:
    """Groups of OOD sets in the pictures: near and far, or validation where there are no others."""
    return {"near", "far"} & {inputs.groups[name] for name in inputs.ood} or {"validation"}


def _extremes(inputs: ReportInputs, score: str) -> dict[str, list[tuple]]:
    """Set -> (kind, picture, scores as text) of its most and least OOD images, ID test first."""
    result = inputs.evaluation
    scores = {"ID test": result.id_scores[score]}
    scores |= result.csid_scores[score] | result.ood_scores[score]
    extremes = {}
    for name, values in scores.items():
        data = inputs.id_test if name == "ID test" else inputs.ood[name]
        if data.images is not None:
            images = data.images()
            extremes[name] = [
                (kind, figures.strip(images[rows]), [short(value) for value in values[rows]])
                for kind, rows in extreme_rows(values, _EXTREMES_SHOWN).items()
            ]
    return extremes


def _projection(inputs: ReportInputs) -> str:
    """The picture of the feature space; empty for a classifier without features."""
    if inputs.id_test.outputs.features is None:
        return ""
    shown = _shown_groups(inputs)
    return figures.projection(
        inputs.id_test.outputs.features,
        inputs.id_test.labels,
        inputs.class_names,
        {
            name: data.outputs.features
            for name, data in inputs.ood.items()
            if inputs.groups[name] in shown and data.outputs.features is not None
        },
        inputs.outlier_features,
    )


def _curves(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss terms, and the accuracy on ID validation, over the steps of training."""

    def series(name: str, scale: float = 1.0) -> np.ndarray:
        return np.array([(row["step"], scale * row[name]) for row in log if name in row])

    names = [name for name in log[0] if name not in ("stage", "step")] if log else []
    losses = {name: series(name) for name in names if "norm" not in name and "accuracy" not in name}
    charts = [figures.curves(losses, "Loss terms", "loss")] if losses else []
    accuracy = series("val_accuracy", 100)
    if len(accuracy):
        curve = {"ID validation": accuracy}
        charts.append(figures.curves(curve, "ID validation accuracy", "percent"))
    return charts


def _grid(images: np.ndarray, class_names: Sequence[str]) -> tuple[list[tuple[str, str]], int]:
    """(class, picture) of the first classes, and how many classes are left."""
    rows = images[:_CLASSES_SHOWN, :_SAMPLES_SHOWN]
    strips = [(name, figures.strip(row)) for name, row in zip(class_names, rows, strict=False)]
    return strips, len(images) - len(strips)
