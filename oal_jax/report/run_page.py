"""One self-contained HTML page about a run: numbers, pictures, configuration.

Nothing in it is fetched from anywhere: styles, charts and images are inside the file. Every string
that comes from outside is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oal_jax.evaluation.bootstrap import Interval
from oal_jax.evaluation.search import Trial, describe
from oal_jax.evaluation.tables import MEANS, Row, Shifted, is_mean
from oal_jax.report import figures, html
from oal_jax.report.html import text
from oal_jax.runtime.artifacts import write_bytes

_SCORES_SHOWN = 6  # with pictures; tables show all
_CLASSES_SHOWN = 10
_SAMPLES_SHOWN = 8


class Extremes(NamedTuple):
    """The images of a set that a score takes for the most and the least OOD, the extreme first."""

    most: np.ndarray  # (k, h, w, c) uint8
    most_scores: np.ndarray  # (k,)
    least: np.ndarray
    least_scores: np.ndarray


class ReportInputs(NamedTuple):
    """What a report shows. Where an optional field is None, its section is left out."""

    run_name: str
    method: str
    seed: int
    id_accuracy: float  # percent
    date: str
    rows: Sequence[Row]  # near and far, with means; of the first score the headline is made
    config: Mapping[str, object]  # nested mappings are shown with dotted names
    versions: Mapping[str, str]
    validation_rows: Sequence[Row] | None = None
    id_scores: Mapping[str, np.ndarray] | None = None  # score -> (n,) of ID test
    ood_scores: Mapping[str, Mapping[str, np.ndarray]] | None = None  # score -> set -> (m,)
    groups: Mapping[str, str] | None = None  # set -> near, far, validation; goes with ood_scores
    thresholds: Mapping[str, float] | None = None
    id_features: np.ndarray | None = None  # (n, d)
    id_labels: np.ndarray | None = None  # (n,); goes with id_features
    class_names: Sequence[str] | None = None
    ood_features: Mapping[str, np.ndarray] | None = None  # set -> (m, d)
    outlier_features: np.ndarray | None = None  # (k, d): outliers mapped to the student's features
    losses: Mapping[str, np.ndarray] | None = None  # loss term -> (t, 2) of (step, value)
    val_accuracy: np.ndarray | None = None  # (t, 2) of (step, percent)
    id_samples: np.ndarray | None = None  # (n_class, k, h, w, c) uint8
    outlier_samples: np.ndarray | None = None  # (n_class, k, h, w, c) uint8, decoded latents
    intervals: Sequence[Interval] | None = None
    rejected: Mapping[str, Mapping[str, float]] | None = None  # score -> set -> percent called OOD
    keep: float = 0.95  # share of ID validation that the thresholds keep
    csid_rows: Sequence[Shifted] | None = None
    full_spectrum_rows: Sequence[Row] | None = None
    extremes: Mapping[str, Extremes] | None = None  # set -> pictures, for the first score
    trials: Sequence[Trial] | None = None  # of a search


def extremes(scores: np.ndarray, images: np.ndarray, count: int = 8) -> Extremes:
    """The `count` images with the highest ood_scores and those with the lowest.

    A set of fewer than twice as many images is divided, so that none is shown as both.

    Args:
      scores: (n,) ood_scores.
      images: (n, h, w, c) uint8, in the same order.
    """
    order = np.argsort(-scores, kind="stable")
    count = min(count, max(1, len(order) // 2))
    most, least = order[:count], order[::-1][:count]
    return Extremes(images[most], scores[most], images[least], scores[least])


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Writes the page to `path`, atomically. Takes seconds, mostly for the charts.

    Raises:
      ValueError: sample images that are not uint8 (n_class, k, h, w, 1 or 3).
    """
    write_bytes(Path(path), render(inputs).encode())


def render(inputs: ReportInputs) -> str:
    """The page as a string; the sections are in the order in which people ask."""
    sections = [
        ("Results", _results(inputs)),
        ("Score distributions", _distributions(inputs)),
        ("Thresholds", _thresholds(inputs)),
        ("Covariate shift", _covariate_shift(inputs)),
        ("Most and least OOD", _extremes(inputs)),
        ("Feature space", _feature_space(inputs)),
        ("Training", _training(inputs)),
        ("Samples", _samples(inputs)),
        ("Validation sets", _validation(inputs)),
        ("Parameter search", _search(inputs)),
        ("Configuration", _configuration(inputs)),
    ]
    body = "\n".join(
        f"<section id={_slug(title)}><h2>{title}</h2>\n{content}\n</section>"
        for title, content in sections
        if content
    )
    body = f"{_header(inputs)}\n<main>\n{body}\n</main>"
    return html.document(f"{inputs.run_name}: OOD report", body)


def _header(inputs: ReportInputs) -> str:
    facts = [("Method", inputs.method), ("Seed", inputs.seed), ("Date", inputs.date)]
    facts += inputs.versions.items()
    line = " · ".join(f"<span>{text(k)} <b>{text(v)}</b></span>" for k, v in facts)
    tiles = [("ID accuracy", inputs.id_accuracy, "%")]
    if inputs.rows:
        first = inputs.rows[0].score
        for row in inputs.rows:
            if is_mean(row) and row.score == first:
                tiles.append((f"{row.group}-OOD AUROC, {first}", row.auroc, ""))
                tiles.append((f"{row.group}-OOD FPR95, {first}", row.fpr_at_95_ood_tpr, "%"))
    cells = "".join(
        f"<div class=tile><b>{value:.2f}<small>{unit}</small></b><span>{text(name)}</span></div>"
        for name, value, unit in tiles
    )
    return (
        f"<header>\n<h1>{text(inputs.run_name)}</h1>\n<p class=facts>{line}</p>\n"
        f"<div class=tiles>{cells}</div>\n</header>"
    )


def _results(inputs: ReportInputs) -> str:
    if not inputs.rows:
        return ""
    note = (
        "<p class=note>Percent. OOD is the positive class. FPR<sub>OOD</sub>: ID rejected when "
        "95 % of OOD is caught (OpenOOD v1.5). FPR<sub>ID</sub>: OOD accepted when 95 % of ID is "
        "kept (the classic FPR95). Means are unweighted over the sets of a group. Best of a column "
        "in bold.</p>"
    )
    means = [row for row in inputs.rows if is_mean(row)]
    sets = [row for row in inputs.rows if not is_mean(row)]
    tables = (
        html.metric_table(means, html.ALL)
        + "<h3>Each set</h3>"
        + html.metric_table(sets, html.SHORT)
    )
    return note + tables + _overview(means, inputs.intervals)


def _overview(means: Sequence[Row], intervals: Sequence[Interval] | None) -> str:
    """AUROC and FPR of all scores at a glance; one score needs no picture."""
    if len({row.score for row in means}) < 2:
        return ""
    charts = []
    # Both pictures in one order: by AUROC on the first group, which is near where there is one.
    means = sorted(means, key=lambda row: (row.group != means[0].group, -row.auroc))
    for metric, title in (("auroc", "AUROC"), ("fpr_at_95_ood_tpr", "FPR at 95 % OOD TPR")):
        values: dict[str, dict[str, float]] = {}
        for row in means:
            values.setdefault(row.score, {})[row.group] = getattr(row, metric)
        ends = {
            (i.score, i.group): (i.low, i.high)
            for i in intervals or ()
            if i.metric == metric and i.dataset == MEANS[i.group]
        }
        charts.append(figures.overview(values, ends, title))
    note = "<p class=note>Bars: 95 % of bootstrap samples of the test inputs.</p>"
    return "<h3>All scores</h3>" + (note if intervals else "") + html.charts(charts)


def _distributions(inputs: ReportInputs) -> str:
    if inputs.id_scores is None or inputs.ood_scores is None or inputs.groups is None:
        return ""
    shown = list(inputs.id_scores)[:_SCORES_SHOWN]
    charts = []
    for score in shown:
        sets = {
            name: values
            for name, values in inputs.ood_scores[score].items()
            if inputs.groups[name] in ("near", "far")
        }
        if not sets:
            return ""
        pooled = {
            group: np.concatenate([v for name, v in sets.items() if inputs.groups[name] == group])
            for group in ("near", "far")
            if group in {inputs.groups[name] for name in sets}
        }
        threshold = (inputs.thresholds or {}).get(score)
        charts.append(figures.histograms(inputs.id_scores[score], pooled, threshold, score))
        charts.append(figures.roc(inputs.id_scores[score], sets, score))
    left = len(inputs.id_scores) - len(shown)
    kept = f"{100 * inputs.keep:g} %"
    note = (
        f"<p class=note>The dashed line is the threshold that keeps {kept} of ID validation inputs."
    )
    note += f" {left} more scores are in the table only.</p>" if left else "</p>"
    return note + html.charts(charts)


def _thresholds(inputs: ReportInputs) -> str:
    if not inputs.rejected:
        return ""
    groups = inputs.groups or {}
    sets = list(next(iter(inputs.rejected.values())))
    head = "".join(f"<th>{text(name)}{html.tag(groups.get(name, ''))}</th>" for name in sets)
    lines = "".join(
        f"<tr><th>{text(score)}</th>"
        + "".join(f"<td>{shares[name]:.2f}</td>" for name in sets)
        + "</tr>\n"
        for score, shares in inputs.rejected.items()
    )
    wanted = 100 * (1 - inputs.keep)
    note = (
        f"<p class=note>Percent of each set called OOD. A threshold gives away {wanted:g} % of ID "
        "validation; ID test should be near that, OOD sets near 100.</p>"
    )
    charts = [
        figures.shares(inputs.rejected[score], groups, wanted, score)
        for score in list(inputs.rejected)[:_SCORES_SHOWN]
    ]
    return note + html.table(f"<th>score</th>{head}", lines) + html.charts(charts)


def _covariate_shift(inputs: ReportInputs) -> str:
    if not inputs.csid_rows:
        return ""
    lines = "".join(
        f"<tr><th>{text(r.score)}</th><td>{text(r.dataset)}</td><td>{r.id_accuracy:.2f}</td>"
        f"<td>{r.rejected:.2f}</td></tr>\n"
        for r in inputs.csid_rows
    )
    head = "<th>score</th><th>set</th><th>ID accuracy</th><th>called OOD</th>"
    found = (
        "<p class=note>Percent. These sets hold the ID classes under a shift: a detector should "
        "keep what its classifier still gets right.</p>"
    )
    means = [row for row in inputs.full_spectrum_rows or () if is_mean(row)]
    sets = [row for row in inputs.full_spectrum_rows or () if not is_mean(row)]
    found += html.table(head, lines)
    if not means:
        return found
    note = "<p class=note>ID test and all shifted sets together are the ID side.</p>"
    tables = html.metric_table(means, html.ALL) + html.metric_table(sets, html.SHORT)
    return f"{found}<h3>Full spectrum</h3>{note}{tables}"


def _extremes(inputs: ReportInputs) -> str:
    if not inputs.extremes:
        return ""
    groups = inputs.groups or {}
    score = inputs.rows[0].score if inputs.rows else "the first score"
    blocks = []
    for name, pictures in inputs.extremes.items():
        strips = "".join(
            f"<figure class=strip><figcaption>{kind} OOD</figcaption>"
            f'<img src="{figures.strip(images)}" alt="{kind} OOD images of {text(name)}">'
            f'<div class=values style="grid-template-columns: repeat({len(values)}, 1fr)">'
            + "".join(f"<span>{value:.3g}</span>" for value in values)
            + "</div></figure>"
            for kind, images, values in (
                ("most", pictures.most, pictures.most_scores),
                ("least", pictures.least, pictures.least_scores),
            )
        )
        blocks.append(f"<h3>{text(name)}{html.tag(groups.get(name, ''))}</h3>{strips}")
    note = f"<p class=note>Below each image its ood_score, {text(score)}; higher is more OOD.</p>"
    return note + "<div class=strips>" + "".join(f"<div>{b}</div>" for b in blocks) + "</div>"


def _feature_space(inputs: ReportInputs) -> str:
    if inputs.id_features is None or inputs.id_labels is None:
        return ""
    names = inputs.class_names
    if names is None:
        names = [str(i) for i in range(int(np.max(inputs.id_labels)) + 1)]
    chart = figures.projection(
        inputs.id_features,
        inputs.id_labels,
        names,
        inputs.ood_features or {},
        inputs.outlier_features,
    )
    note = (
        "<p class=note>Two principal components, fitted on ID features. Colour: ID class; grey: "
        "OOD; crosses: outliers as the student sees them.</p>"
    )
    return f"{note}<figure class=wide>{chart}</figure>"


def _training(inputs: ReportInputs) -> str:
    charts = []
    if inputs.losses:
        charts.append(figures.curves(inputs.losses, "Loss terms", "loss"))
    if inputs.val_accuracy is not None:
        accuracy = {"ID validation": inputs.val_accuracy}
        charts.append(figures.curves(accuracy, "ID validation accuracy", "percent"))
    return html.charts(charts) if charts else ""


def _samples(inputs: ReportInputs) -> str:
    grids = [("In-distribution", inputs.id_samples), ("Decoded outliers", inputs.outlier_samples)]
    return "".join(
        f"<h3>{title}</h3>{_sample_grid(images, inputs.class_names)}"
        for title, images in grids
        if images is not None and images.shape[1]
    )


def _sample_grid(images: np.ndarray, class_names: Sequence[str] | None) -> str:
    lines = []
    for index, row in enumerate(np.asarray(images)[:_CLASSES_SHOWN, :_SAMPLES_SHOWN]):
        name = class_names[index] if class_names is not None else f"class {index}"
        uri = figures.strip(row)
        lines.append(
            f'<figure class=strip><figcaption>{text(name)}</figcaption><img src="{uri}" '
            f'alt="{len(row)} samples of {text(name)}"></figure>'
        )
    left = len(images) - len(lines)
    note = f"<p class=note>{left} more classes are not shown.</p>" if left > 0 else ""
    return f"<div class=strips>{''.join(lines)}</div>{note}"


def _validation(inputs: ReportInputs) -> str:
    if not inputs.validation_rows:
        return ""
    note = "<p class=note>For choosing hyper-parameters; in no mean above.</p>"
    return note + html.metric_table(inputs.validation_rows, html.SHORT)


def _search(inputs: ReportInputs) -> str:
    if not inputs.trials:
        return ""
    lines = "".join(
        f"<tr><th>{text(t.score)}</th><td class=left>{text(describe(t.params))}</td>"
        + (f"<td class=left>{text(t.refusal)}</td>" if t.auroc is None else "")
        + ("" if t.auroc is None else f"<td{' class=best' * t.chosen}>{t.auroc:.2f}</td>")
        + "</tr>\n"
        for t in inputs.trials
    )
    head = "<th>score</th><th>parameters</th><th>AUROC</th>"
    note = (
        "<p class=note>Mean AUROC of the validation OOD sets against ID validation, percent. Each "
        "line was fitted anew; the bold one of a score is used above.</p>"
    )
    return (
        f"{note}<details><summary>{len(inputs.trials)} values</summary>"
        f"{html.table(head, lines)}</details>"
    )


def _configuration(inputs: ReportInputs) -> str:
    lines = "".join(
        f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>\n"
        for name, value in _flat(inputs.config)
    )
    return (
        "<details><summary>All fields</summary><div class=scroll><table class=config>"
        f"<tbody>\n{lines}</tbody></table></div></details>"
    )


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
