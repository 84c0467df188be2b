"""`--compare RUN1 RUN2 ...`: finished runs side by side, seeds of one config grouped.

Runs whose configs differ only in the seed and in paths are one case: mean and sample standard
deviation over its runs. Where a case shares seeds with the first one, their difference is taken
seed by seed, which cancels the effect of the seed on both.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oal_jax.config import Config, flatten
from oal_jax.errors import UserError
from oal_jax.evaluation import headline, tables
from oal_jax.evaluation.tables import OPENOOD, Row
from oal_jax.report import html
from oal_jax.runtime import artifacts, writing
from oal_jax.runtime.command import BareParser

# OpenOOD's names of postprocessors, which are the stems of its files, where ours differ.
_OPENOOD_SCORES = {"ebo": "energy", "mls": "max_logit", "mds": "mahalanobis"}
_PATHS = ("data.root", "train.start")  # another value of these is not another case
_MEASURES = {  # title -> mean row and field of `Row`
    "near-OOD AUROC": ("nearood", "auroc"),
    "far-OOD AUROC": ("farood", "auroc"),
    "near-OOD FPR at 95 % OOD TPR": ("nearood", "fpr_at_95_ood_tpr"),
    "far-OOD FPR at 95 % OOD TPR": ("farood", "fpr_at_95_ood_tpr"),
}


class Run(NamedTuple):
    """A finished run, or a CSV file in OpenOOD's layout, which has no config."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]
    headline: str = ""  # the score that the run chose; empty for an older run


class Case(NamedTuple):
    """A column of the comparison: the runs of one config, or one CSV file."""

    name: str  # a letter
    label: str
    runs: list[Run]


class Cell(NamedTuple):
    """A value of the comparison; `std` is None for a single run."""

    mean: float
    std: float | None
    runs: int


Key = tuple[str, str]  # title of the measure; score, or set
Table = dict[Key, dict[str, Cell]]  # key -> column -> cell


def run(arguments: Sequence[str]) -> None:
    """Parses the command line, prints the comparison and writes `--output`.

    Raises:
      UserError: a path that is not a finished run or is given twice, an unknown flag, an output
        that ends in neither .html nor .csv or can't be written.
    """
    parser = BareParser("python -m oal_jax.main", "Compares finished runs.")
    parser.add_argument("--compare", nargs="*", action="extend", type=Path)
    parser.add_argument("--output", type=Path)
    values, rest = parser.parse_known_args(arguments)
    if rest:
        raise UserError(f"{rest[0]} does not go with --compare, which takes RUN ... and --output")
    output = values.output
    # A device or a pipe without such a name gets CSV.
    if output and output.suffix not in (".html", ".csv") and writing.is_replaced(output):
        raise UserError(f"--output {output} must end in .html or .csv")
    cases = read(values.compare)
    stream = sys.stderr if output and writing.is_stdout(output) else sys.stdout
    print(format_text(cases), file=stream)
    if output:
        _write(output, cases)
        print(f"comparison: {output}", file=stream)


def read(paths: Sequence[Path]) -> list[Case]:
    """The cases: those of runs in the order of their first runs, then the CSV files.

    Raises:
      UserError: see `run`.
    """
    for one, other in itertools.combinations(paths, 2):
        if one.resolve() == other.resolve():
            raise UserError(f"--compare got {other} twice; give each run once")
    files = [path for path in paths if path.suffix == ".csv" and not path.is_dir()]
    grouped: dict[str, list[Run]] = {}
    for path in paths:
        if path not in files:
            finished = _read_run(path)
            grouped.setdefault(_identity(finished.config), []).append(finished)
    if not grouped:
        raise UserError("--compare needs the directory of at least one finished run")
    groups = list(grouped.values())
    for runs in groups:
        _check_group(runs)
    labels = _labels(groups)
    scores = list(dict.fromkeys(row.score for runs in groups for row in runs[0].rows))
    for path in files:
        score = _OPENOOD_SCORES.get(path.stem, path.stem)
        score = score if score in scores else groups[0][0].headline or scores[0]
        rows = [row._replace(score=score) for row in tables.read_openood(path)]
        groups.append([Run(path, {}, rows)])
        labels.append(f"{path}, as score {score}")
    names = (chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(groups)))
    return [Case(*case) for case in zip(names, labels, groups, strict=True)]


def compare(cases: Sequence[Case]) -> tuple[Table, Table]:
    """The table of all cases, and the paired differences to the first case.

    The second table has a column for each further case that shares a seed with the first.
    """
    published = {case.runs[0].rows[0].score for case in cases if not case.runs[0].config}
    columns = {c.name: [_measures(run.rows, published) for run in c.runs] for c in cases}
    first, *others = cases
    base, differences = _by_seed(first, columns[first.name]), {}
    for case in others:
        pairs = [
            (values, base[seed])
            for seed, values in _by_seed(case, columns[case.name]).items()
            if seed in base
        ]
        if pairs:
            differences[f"{case.name}-{first.name}"] = [
                {key: a[key] - b[key] for key in a if key in b} for a, b in pairs
            ]
    return _tabulate(columns), _tabulate(differences)


def best(key: Key, table: Table) -> set[str]:
    """Columns with the best value of a line, to two decimals.

    In a table of one column, a line competes with the other lines of its measure.
    """
    rivals = [table[key]]
    if len(_columns(table)) == 1:
        rivals = [cells for (title, _), cells in table.items() if title == key[0]]
    values = [round(cell.mean, 2) for cells in rivals for cell in cells.values()]
    top = min(values) if "FPR" in key[0] else max(values)
    return {n for n, cell in table[key].items() if round(cell.mean, 2) == top and len(values) > 1}


def format_text(cases: Sequence[Case]) -> str:
    """The comparison for the terminal, with a `*` behind the best values of each line."""
    lines = [f"{case.name}  {case.label}" for case in cases]
    lines += [f"note: {note}" for note in _notes(cases)]
    lines += ["", "percent, mean ± sample standard deviation over runs; * marks the best of a line"]
    for heading, columns, body in _sections(cases):
        grid = [["", *(f"{name}  " for name in columns)]]
        grid += [
            [label, *(text + (" *" if top else "  ") for text, top in cells)]
            for _, label, cells in body
        ]
        head, *rest = (line.rstrip() for line in tables.aligned(grid))
        lines += ["", heading, head] if heading else ["", head]
        for title, group in itertools.groupby(zip(body, rest, strict=True), lambda x: x[0][0]):
            lines += ["", title, *(line for _, line in group)]
    return "\n".join(lines) + "\n"


def format_page(cases: Sequence[Case]) -> str:
    """The comparison as one HTML page."""
    return html.render(
        "compare.html.jinja",
        title="Comparison of runs",
        cases=cases,
        notes=_notes(cases),
        sections=_sections(cases),
    )


def _read_run(path: Path) -> Run:
    file, table = path / "config.json", path / "report" / "ood.csv"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; it is not the directory of a run")
    config = artifacts.read_json(file, "run its --config with --force again")
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged; run its --config with --force again")
    if not table.is_file():
        raise UserError(f"run {path} is not finished: {table} is missing; start it again to go on")
    rows = tables.read_csv(table)
    if not rows:
        raise UserError(f"{table} has no rows: {path} has no near- or far-OOD sets to compare on")
    chosen = headline.read(table.parent)
    # Keys that are newer than the run have their defaults.
    return Run(path, flatten(Config()) | config, rows, chosen.score if chosen else "")


def _identity(config: Mapping[str, Any]) -> str:
    """What the runs of a case have in common."""
    fixed = {key: value for key, value in config.items() if key not in ("seed", *_PATHS)}
    # A start is part of a case, but each seed may start from a run of its own.
    return json.dumps(fixed | {"train.start": bool(config["train.start"])}, sort_keys=True)


def _check_group(runs: Sequence[Run]) -> None:
    """Checks that the runs of a case differ and have rows of the same scores and sets."""
    for one, other in itertools.combinations(runs, 2):
        if one.config == other.config:
            raise UserError(
                f"{one.path} and {other.path} are the same run: one config, one seed; give one"
            )
        differing = {row[:2] for row in one.rows} ^ {row[:2] for row in other.rows}
        if differing:
            score, dataset = min(differing)
            raise UserError(
                f"only one of {one.path} and {other.path} has a row of score {score} on {dataset};"
                " give runs of the same scores and sets"
            )


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Settings that differ between cases, seeds and paths of each case."""
    configs = [runs[0].config for runs in groups]
    keys = [key for key in dict.fromkeys(itertools.chain(*configs)) if key != "data.root"]
    varied = [k for k in keys if k != "seed" and len({str(c.get(k)) for c in configs}) > 1]
    labels = []
    for runs in groups:
        settings = ", ".join(f"{key}={runs[0].config.get(key)}" for key in varied)
        seeds = " ".join(str(run.config["seed"]) for run in runs)
        paths = ", ".join(str(run.path) for run in runs)
        word = "seed" if len(runs) == 1 else "seeds"
        chosen = ", ".join(dict.fromkeys(run.headline for run in runs if run.headline))
        chosen = f"; headline {chosen}" if chosen else ""
        labels.append(f"{settings}{'; ' * bool(settings)}{word} {seeds} ({paths}){chosen}")
    return labels


def _measures(rows: Sequence[Row], published: set[str]) -> dict[Key, float]:
    """Values of a run: means of all scores, accuracy, and each set for `published` scores."""
    values = {
        (title, row.score): getattr(row, field)
        for title, (dataset, field) in _MEASURES.items()
        for row in rows
        if row.dataset == dataset
    }
    values["ID accuracy", ""] = rows[-1].id_accuracy  # the same in all rows
    return values | {
        (f"{name} of each set ({row.score})", row.dataset.lower()): getattr(row, field)
        for name, field in OPENOOD.items()
        for row in rows
        if row.score in published and name != "ACC"
    }


def _by_seed(case: Case, values: Sequence[Any]) -> dict[int, Any]:
    """`values` of the case's runs by seed. Seeds that the case has twice are left out."""
    seeds = [run.config.get("seed") for run in case.runs]
    pairs = zip(seeds, values, strict=True)
    return {seed: v for seed, v in pairs if seed is not None and seeds.count(seed) == 1}


def _tabulate(columns: Mapping[str, Sequence[Mapping[Key, float]]]) -> Table:
    """Mean and deviation of each value over the runs of a column, lines of a measure together."""
    table: Table = {}
    for name, runs in columns.items():
        for key in runs[0]:
            values = [run[key] for run in runs]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            table.setdefault(key, {})[name] = Cell(float(np.mean(values)), std, len(values))
    titles = list(dict.fromkeys(title for title, _ in table))
    return dict(sorted(table.items(), key=lambda item: titles.index(item[0][0])))


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for cells in table.values() for name in cells))


def _notes(cases: Sequence[Case]) -> list[str]:
    """What a reader must know about the numbers; the same in the terminal and on the page."""
    ours = [case for case in cases if case.runs[0].config]
    notes = []
    if len({frozenset(row.dataset for row in case.runs[0].rows) for case in ours}) > 1:
        notes.append("these runs were tested on different sets; do not compare their means")
    if smoke := [case.name for case in ours if case.runs[0].config["smoke"]]:
        notes.append(f"SMOKE: the runs of {', '.join(smoke)} had tiny sizes and mean nothing")
    if single := [case.name for case in ours if len(case.runs) == 1]:
        notes.append(f"{', '.join(single)}: one seed, so no deviation")
    first, *others = [(case, _by_seed(case, case.runs)) for case in ours]
    for case, seeds in others:
        shared = len(seeds.keys() & first[1].keys())
        counts = {len(case.runs), len(first[0].runs)}
        if counts != {shared}:
            notes.append(
                f"{case.name} shares {shared} seed{'s' * (shared != 1)} with {first[0].name}, of"
                f" {len(case.runs)} and {len(first[0].runs)} runs; differences are over these"
            )
    return notes


def _sections(cases: Sequence[Case]) -> list[tuple]:
    """(heading, columns, lines) of each table; a line is (measure, label, [(text, is best)])."""
    table, differences = compare(cases)
    headings = ("", f"Difference to {cases[0].name}, seed by seed")
    sections = []
    for heading, content, sign in zip(headings, (table, differences), ("", "+"), strict=True):
        columns, lines = _columns(content), []
        for key, cells in content.items():
            marked = best(key, content) if content is table else set()
            texts = [_text(cells.get(name), sign) for name in columns]
            marks = [name in marked for name in columns]
            lines.append((*key, list(zip(texts, marks, strict=True))))
        sections.append((heading, columns, lines))
    return [section for section in sections if section[2]]


def _text(cell: Cell | None, sign: str) -> str:
    if cell is None:
        return "-"
    return f"{cell.mean:{sign}.2f}" + ("" if cell.std is None else f" ± {cell.std:.2f}")


def _write(output: Path, cases: Sequence[Case]) -> None:
    if output.suffix == ".html":
        artifacts.write_output(output, format_page(cases).encode())
        return
    lines = [
        (name, score, title, *cell)
        for table in compare(cases)
        for (title, score), cells in table.items()
        for name, cell in cells.items()
    ]
    columns = ("case", "score", "measure", "mean", "std", "runs")
    artifacts.write_output(output, tables.csv_bytes(lines, columns))
