"""One self-contained HTML page about a run: numbers, pictures, configuration.

Nothing in it is fetched from anywhere: styles, charts and images are inside the file. Every string
that comes from outside is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oal_jax.artifacts import write_bytes
from oal_jax.evaluation import figures
from oal_jax.evaluation.tables import Row, is_mean

_SCORES_SHOWN = 6  # with pictures; tables show all
_CLASSES_SHOWN = 10
_SAMPLES_SHOWN = 8


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
        ("Feature space", _feature_space(inputs)),
        ("Training", _training(inputs)),
        ("Samples", _samples(inputs)),
        ("Validation sets", _validation(inputs)),
        ("Configuration", _configuration(inputs)),
    ]
    body = "\n".join(
        f"<section id={_slug(title)}><h2>{title}</h2>\n{content}\n</section>"
        for title, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(inputs.run_name)}: OOD report</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{_header(inputs)}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(inputs: ReportInputs) -> str:
    facts = [("Method", inputs.method), ("Seed", inputs.seed), ("Date", inputs.date)]
    facts += inputs.versions.items()
    line = " · ".join(f"<span>{_text(k)} <b>{_text(v)}</b></span>" for k, v in facts)
    tiles = [("ID accuracy", inputs.id_accuracy, "%")]
    if inputs.rows:
        first = inputs.rows[0].score
        for row in inputs.rows:
            if is_mean(row) and row.score == first:
                tiles.append((f"{row.group}-OOD AUROC, {first}", row.auroc, ""))
                tiles.append((f"{row.group}-OOD FPR95, {first}", row.fpr_at_95_ood_tpr, "%"))
    cells = "".join(
        f"<div class=tile><b>{value:.2f}<small>{unit}</small></b><span>{_text(name)}</span></div>"
        for name, value, unit in tiles
    )
    return (
        f"<header>\n<h1>{_text(inputs.run_name)}</h1>\n<p class=facts>{line}</p>\n"
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
    return note + _table(means, _ALL) + "<h3>Each set</h3>" + _table(sets, _SHORT)


_HIGH = {"auroc": "AUROC", "aupr_in": "AUPR<sub>in</sub>", "aupr_out": "AUPR<sub>out</sub>"}
_LOW = {"fpr_at_95_ood_tpr": "FPR<sub>OOD</sub>", "fpr_at_95_id_tpr": "FPR<sub>ID</sub>"}
_ALL = {**_HIGH, **_LOW}
_SHORT = {"auroc": _HIGH["auroc"], **_LOW}


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A line a score; for each set the metrics that `columns` names."""
    cells = {(row.score, row.dataset): row for row in rows}
    scores = list(dict.fromkeys(row.score for row in rows))
    groups = {row.dataset: row.group for row in rows}
    best = {}
    for dataset in groups:
        for metric in columns:
            values = [getattr(r, metric) for (_, d), r in cells.items() if d == dataset]
            best[dataset, metric] = max(values) if metric in _HIGH else min(values)

    def cell(score, dataset, metric, first):
        classes = [name for name, on in (("first", first),) if on]
        row = cells.get((score, dataset))
        if row is None:
            return "<td></td>"
        value = getattr(row, metric)
        if len(scores) > 1 and round(value, 2) == round(best[dataset, metric], 2):
            classes.append("best")
        return f'<td class="{" ".join(classes)}">{value:.2f}</td>'

    top = "".join(
        f'<th class=first colspan={len(columns)}>{_text(d)} <span class="tag {g}">{g}</span></th>'
        for d, g in groups.items()
    )
    names = [f"<th>{name}</th>" for name in columns.values()]
    second = "".join([names[0].replace("<th>", "<th class=first>"), *names[1:]]) * len(groups)
    lines = "".join(
        f"<tr><th>{_text(score)}</th>"
        + "".join(cell(score, d, m, m == next(iter(columns))) for d in groups for m in columns)
        + "</tr>\n"
        for score in scores
    )
    return (
        f"<div class=scroll tabindex=0><table>\n<thead><tr><th rowspan=2>score</th>{top}</tr>"
        f"<tr>{second}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )


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
    note = "<p class=note>The dashed line is the threshold that keeps 95 % of ID validation inputs."
    note += f" {left} more scores are in the table only.</p>" if left else "</p>"
    return note + _grid(charts)


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
    return _grid(charts) if charts else ""


def _samples(inputs: ReportInputs) -> str:
    grids = [("In-distribution", inputs.id_samples), ("Decoded outliers", inputs.outlier_samples)]
    return "".join(
        f"<h3>{title}</h3>{_sample_grid(images, inputs.class_names)}"
        for title, images in grids
        if images is not None
    )


def _sample_grid(images: np.ndarray, class_names: Sequence[str] | None) -> str:
    lines = []
    for index, row in enumerate(np.asarray(images)[:_CLASSES_SHOWN, :_SAMPLES_SHOWN]):
        name = class_names[index] if class_names is not None else f"class {index}"
        uri = figures.strip(row)
        lines.append(
            f'<figure class=strip><figcaption>{_text(name)}</figcaption><img src="{uri}" '
            f'alt="{len(row)} samples of {_text(name)}"></figure>'
        )
    left = len(images) - len(lines)
    note = f"<p class=note>{left} more classes are not shown.</p>" if left > 0 else ""
    return f"<div class=strips>{''.join(lines)}</div>{note}"


def _validation(inputs: ReportInputs) -> str:
    if not inputs.validation_rows:
        return ""
    note = "<p class=note>For choosing hyper-parameters; in no mean above.</p>"
    return note + _table(inputs.validation_rows, _SHORT)


def _configuration(inputs: ReportInputs) -> str:
    lines = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>\n"
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


def _grid(charts: Iterable[str]) -> str:
    return "<div class=charts>" + "".join(f"<figure>{c}</figure>" for c in charts) + "</div>"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _text(value: object) -> str:
    return escape(str(value), quote=True)


_CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ee;
  --page: #ffffff; --card: #f6f8fb; --accent: #2f6fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #2b323d;
  --page: #12161c; --card: #1a2029; --accent: #7fb2f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; border-bottom: 1px solid var(--line);
  padding-bottom: .3rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
.facts, .note { color: var(--soft); font-size: .9rem; margin: .4rem 0 1rem; }
.facts b { color: var(--ink); font-weight: 600; }
.facts span { white-space: nowrap; }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tile { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile small { font-size: .9rem; color: var(--soft); margin-left: .1rem; }
.tile span { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 500; color: var(--soft); }
th[colspan] { text-align: center; color: var(--ink); }
tr > th:first-child:not([colspan]):not(.first) { text-align: left; font-weight: 600;
  position: sticky; left: 0; background: var(--page); color: var(--ink); }
.first { border-left: 1px solid var(--line); }
.best { font-weight: 700; color: var(--accent); }
.tag { font-size: .7rem; padding: .05rem .4rem; border-radius: 1rem; color: #fff; }
.near { background: #b8600f; } .far { background: #b93d39; } .validation { background: #7a4cc4; }
.config td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts figure, .wide { background: var(--card); border-radius: .6rem; padding: .6rem; }
.wide { max-width: 46rem; }
svg { display: block; width: 100%; height: auto; }
.strips { display: grid; gap: .6rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.strip figcaption { color: var(--soft); font-size: .8rem; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: .3rem; }
summary { cursor: pointer; color: var(--soft); }
"""
