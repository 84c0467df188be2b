"""What HTML pages are made of: styles, escaping, tables, the document around a body.

Nothing in a page is fetched from anywhere, so it opens with no network.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from oal_jax.evaluation.tables import Row


def document(title: str, body: str) -> str:
    """A whole page; `title` is escaped here, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Any value as text that HTML takes as nothing but text."""
    return escape(str(value), quote=True)


_HIGH = {"auroc": "AUROC", "aupr_in": "AUPR<sub>in</sub>", "aupr_out": "AUPR<sub>out</sub>"}
_LOW = {"fpr_at_95_ood_tpr": "FPR<sub>OOD</sub>", "fpr_at_95_id_tpr": "FPR<sub>ID</sub>"}
ALL = {**_HIGH, **_LOW}
SHORT = {"auroc": _HIGH["auroc"], **_LOW}


def metric_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
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
        f"<th class=first colspan={len(columns)}>{text(d)}{tag(g)}</th>" for d, g in groups.items()
    )
    names = [f"<th>{name}</th>" for name in columns.values()]
    second = "".join([names[0].replace("<th>", "<th class=first>"), *names[1:]]) * len(groups)
    lines = "".join(
        f"<tr><th>{text(score)}</th>"
        + "".join(cell(score, d, m, m == next(iter(columns))) for d in groups for m in columns)
        + "</tr>\n"
        for score in scores
    )
    return table(f"<th rowspan=2>score</th>{top}</tr><tr>{second}", lines)


def table(head: str, lines: str) -> str:
    """A table that scrolls on its own where the window is narrow; both are the HTML of rows."""
    return (
        f"<div class=scroll tabindex=0><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{lines}</tbody></table></div>"
    )


def tag(group: str) -> str:
    """A coloured mark with the name of a group of sets; nothing for ID sets, which have none."""
    return f' <span class="tag {group}">{group}</span>' if group else ""


def charts(pictures: Iterable[str]) -> str:
    """SVG pictures side by side, below one another on a phone."""
    return "<div class=charts>" + "".join(f"<figure>{c}</figure>" for c in pictures) + "</div>"


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
.scroll + .scroll { margin-top: 1rem; }
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
.csid { background: #24786a; }
.config td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; }
.charts { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts figure, .wide { background: var(--card); border-radius: .6rem; padding: .6rem; }
.wide { max-width: 46rem; }
svg { display: block; width: 100%; height: auto; }
.strips { display: grid; gap: .6rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.strip figcaption { color: var(--soft); font-size: .8rem; }
.strip { margin-bottom: .4rem; }
.values { display: grid; font-size: .65rem; text-align: center; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.values span { overflow: hidden; }
.left { text-align: left; white-space: normal; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: .3rem; }
summary { cursor: pointer; color: var(--soft); }
"""
