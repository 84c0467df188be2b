"""`--compare RUN1 RUN2 ...`: finished runs side by side, seeds of one config together.

Runs whose configs differ only in the seed, and in where things lie, are one case: mean and sample
standard deviation over its runs. Where two cases share seeds, their difference is taken seed by
seed, which leaves out what the seed does to both.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oal_jax.config import Config, flatten
from oal_jax.errors import UserError
from oal_jax.evaluation import tables
from oal_jax.evaluation.tables import Row
from oal_jax.report import html
from oal_jax.runtime import artifacts

# Names of OpenOOD's postprocessors, which are the stems of its files, where ours are others.
_OPENOOD_SCORES = {"ebo": "energy", "mls": "max_logit", "mds": "mahalanobis"}
_PLACES = ("data.root", "train.start")  # where things lie; other values of them are the same case


class Measure(NamedTuple):
    """A line of the comparison, read from the mean rows of a run."""

    title: str
    dataset: str
    field: str  # of `Row`
    higher: bool  # is better


MEASURES = (
    Measure("near-OOD AUROC", "nearood", "auroc", True),
    Measure("far-OOD AUROC", "farood", "auroc", True),
    Measure("near-OOD FPR at 95 % OOD TPR", "nearood", "fpr_at_95_ood_tpr", False),
    Measure("far-OOD FPR at 95 % OOD TPR", "farood", "fpr_at_95_ood_tpr", False),
)
_ACCURACY = Measure("ID accuracy", "", "id_accuracy", True)


class Run(NamedTuple):
    """What is read of a finished run."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]


class Case(NamedTuple):
    """A column: runs of one config, or a CSV file in OpenOOD's layout."""

    name: str  # a letter
    label: str
    runs: list[Run]  # none for a CSV file
    mean: list[Row]
    std: list[Row]


class Cell(NamedTuple):
    """A number of the table; `std` is NaN where it comes of one run."""

    mean: float
    std: float
    count: int


# (title of the measure, score) -> name of the column -> cell
Table = dict[tuple[str, str], dict[str, Cell]]


def run(arguments: Sequence[str]) -> None:
    """Reads the arguments behind the program's name, prints the comparison, writes `--output`.

    Raises:
      UserError: a path that is no finished run or given twice, an unknown flag, an output whose
        name ends in neither .html nor .csv.
    """
    paths, output = _parse(arguments)
    cases = read(paths)
    table, differences = compare(cases)
    print(format_text(cases, table, differences))
    if output:
        _write(output, cases, table, differences)
        print(f"comparison: {output}")


def read(paths: Sequence[Path]) -> list[Case]:
    """The cases in the order in which their first runs are given.

    Raises:
      UserError: see `run`.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"--compare got {path} twice; give each run once")
        seen[path.resolve()] = path
    runs = [_read_run(path) for path in paths if path.suffix != ".csv" or path.is_dir()]
    if not runs:
        raise UserError("--compare wants the directory of at least one finished run")
    grouped: dict[str, list[Run]] = {}
    for item in runs:
        grouped.setdefault(_identity(item.config), []).append(item)
    for members in grouped.values():
        _check_apart(members)
    varied = _varied([members[0].config for members in grouped.values()])
    cases = []
    for members in grouped.values():
        mean, std = tables.aggregate([item.rows for item in members])
        cases.append(Case(_letter(len(cases)), _label(members, varied), members, mean, std))
    for path in paths:
        if path.suffix == ".csv" and not path.is_dir():
            score, rows = _read_published(path, cases)
            label = f"{path}, as score {score}"
            empty = [row._replace(**dict.fromkeys(Row._fields[3:], np.nan)) for row in rows]
            cases.append(Case(_letter(len(cases)), label, [], rows, empty))
    return cases


def compare(cases: Sequence[Case]) -> tuple[Table, Table]:
    """The table over all cases, and that of paired differences to the first one.

    The second has a column for each further case that shares a seed with the first.
    """
    table: Table = {}
    for case in cases:
        spreads = _cells(case.std)
        for key, value in _cells(case.mean).items():
            cell = Cell(value, spreads[key], max(1, len(case.runs)))
            table.setdefault(key, {})[case.name] = cell
    differences: Table = {}
    first, *others = cases
    base = _by_seed(first)
    for case in others:
        theirs = _by_seed(case)
        shared = [seed for seed in base if seed in theirs]
        for key in _cells(case.mean) if shared else ():
            pairs = [(theirs[s].get(key), base[s].get(key)) for s in shared]
            if any(value is None for pair in pairs for value in pair):
                continue
            values = [a - b for a, b in pairs]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
            cell = Cell(float(np.mean(values)), std, len(values))
            differences.setdefault(key, {})[f"{case.name}-{first.name}"] = cell
    return _ordered(table), _ordered(differences)


def best(key: tuple[str, str], table: Table) -> set[str]:
    """Columns that are best in a line, to two decimals; of a single column, whether it is so in it.

    A line with one cell is compared with the other scores of the same measure.
    """
    higher = {measure.title: measure.higher for measure in (*MEASURES, _ACCURACY)}[key[0]]
    line = {name: round(cell.mean, 2) for name, cell in table[key].items()}
    rivals = list(line.values())
    if len(_names(table)) == 1:
        rivals = [
            round(cell.mean, 2) for k, c in table.items() if k[0] == key[0] for cell in c.values()
        ]
    if len(rivals) < 2:
        return set()
    top = max(rivals) if higher else min(rivals)
    return {name for name, value in line.items() if value == top}


def format_text(cases: Sequence[Case], table: Table, differences: Table) -> str:
    """The comparison for the terminal; a `*` is behind the best of each line."""
    lines = [f"{case.name}  {case.label}" for case in cases]
    if len({_sets(case) for case in cases if case.runs}) > 1:
        lines.append("note: these runs were tested on different sets; their means do not compare")
    lines += ["", "percent, mean ± standard deviation over runs; * best of a line"]
    lines += _blocks(table, [case.name for case in cases], lambda key: best(key, table), "")
    if differences:
        names = _names(differences)
        lines += ["", f"difference to {cases[0].name}, seed by seed"]
        lines += _blocks(differences, names, lambda key: set(), "+")
    for case in cases:
        if not case.runs:
            score = case.mean[0].score
            ours = tables.as_openood(cases[0].mean, score)
            lines += ["", f"{case.name} -> {cases[0].name}, set by set, score {score}"]
            lines += tables.difference(ours, tables.as_openood(case.mean, score))
    return "\n".join(lines) + "\n"


def format_page(cases: Sequence[Case], table: Table, differences: Table) -> str:
    """The comparison as one HTML page."""
    legend = "".join(
        f"<tr><th>{html.text(case.name)}</th><td>{html.text(case.label)}</td></tr>"
        for case in cases
    )
    parts = [
        f"<table class=config><tbody>{legend}</tbody></table>",
        "<p class=note>Percent, mean ± sample standard deviation over the runs of a case. Best of "
        "a line in bold.</p>",
        _html(table, [case.name for case in cases], lambda key: best(key, table), ""),
    ]
    if differences:
        names = _names(differences)
        parts.append(f"<h2>Difference to {cases[0].name}, seed by seed</h2>")
        parts.append(_html(differences, names, lambda key: set(), "+"))
    for case in cases:
        if not case.runs:
            score = case.mean[0].score
            ours = tables.as_openood(cases[0].mean, score)
            lines = tables.difference(ours, tables.as_openood(case.mean, score))
            heading = f"{case.name} to {cases[0].name}, set by set, score {score}"
            items = "".join(f"<li>{html.text(line)}</li>" for line in lines)
            parts.append(f"<h2>{html.text(heading)}</h2><ul>{items}</ul>")
    return html.document("Comparison of runs", "<h1>Comparison of runs</h1>\n" + "\n".join(parts))


def _parse(arguments: Sequence[str]) -> tuple[list[Path], str]:
    paths, output, given = [], "", list(arguments)
    while given:
        name, equals, value = given.pop(0).partition("=")
        if name == "--output":
            output = value if equals else given.pop(0) if given else ""
            if not output or output.startswith("--"):
                raise UserError("--output wants a file name that ends in .html or .csv")
        elif name == "--compare":
            paths += [Path(value)] if value else []
        elif name.startswith("-"):
            raise UserError(f"{name} does not go with --compare, which takes RUN ... and --output")
        else:
            paths.append(Path(name + equals + value))
    if output and Path(output).suffix not in (".html", ".csv"):
        raise UserError(f"--output {output} must end in .html or .csv")
    return paths, output


def _read_run(path: Path) -> Run:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; it is not the directory of a run")
    config = artifacts.read_json(path / "config.json", "run its --config with --force once more")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} is damaged; run its --config with --force again")
    table = path / "report" / "ood.csv"
    if not table.is_file():
        raise UserError(f"run {path} is not finished: {table} is missing; start it again to go on")
    rows = tables.read_csv(table)
    if not rows:
        raise UserError(f"{table} has no rows; delete {table.parent} and run the stage report")
    # Keys that came after the run was made have their defaults.
    return Run(path, flatten(Config()) | config, rows)


def _read_published(path: Path, cases: Sequence[Case]) -> tuple[str, list[Row]]:
    """The score that a file stands for, by its name or else the first one, and its rows."""
    scores = list(dict.fromkeys(row.score for case in cases for row in case.mean))
    named = _OPENOOD_SCORES.get(path.stem, path.stem)
    score = named if named in scores else scores[0]
    lines = tables.read_openood(path)
    if not lines:
        raise UserError(f"{path} has no lines below its header")
    groups = {row.dataset.lower(): row.group for case in cases for row in case.mean}
    rows, group = [], "near"
    for line in lines:
        # Near sets come first and end with their mean.
        group = groups.get(line.dataset.lower(), group)
        metrics = (line.auroc, line.aupr_in, line.aupr_out, line.fpr95, np.nan, line.accuracy)
        rows.append(Row(score, line.dataset, group, *metrics))
        if line.dataset == tables.MEANS["near"]:
            group = "far"
    return score, rows


def _identity(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in ("seed", *_PLACES)}
    # Whether there is a start matters; which of several seeds' runs it is does not.
    kept["train.start"] = bool(config["train.start"])
    return json.dumps(kept, sort_keys=True)


def _check_apart(members: Sequence[Run]) -> None:
    known: dict[str, Run] = {}
    for item in members:
        config = json.dumps(item.config, sort_keys=True)
        if config in known:
            raise UserError(
                f"{known[config].path} and {item.path} are the same run: one config, one seed;"
                " give one of them"
            )
        known[config] = item


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    ignored = ("seed", "data.root")
    return [
        key
        for key in keys
        if key not in ignored and any(c.get(key) != configs[0].get(key) for c in configs)
    ]


def _label(members: Sequence[Run], varied: Sequence[str]) -> str:
    settings = ", ".join(f"{key}={members[0].config.get(key)}" for key in varied)
    seeds = " ".join(str(item.config["seed"]) for item in members)
    paths = ", ".join(str(item.path) for item in members)
    count = "seed" if len(members) == 1 else "seeds"
    return f"{settings}{'; ' * bool(settings)}{count} {seeds} ({paths})"


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"#{index + 1}"


def _sets(case: Case) -> tuple[str, ...]:
    return tuple(sorted({row.dataset for row in case.mean}))


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    cells = {}
    for row in rows:
        for measure in MEASURES:
            if row.dataset == measure.dataset:
                cells[measure.title, row.score] = getattr(row, measure.field)
        cells[_ACCURACY.title, ""] = row.id_accuracy  # of the classifier, whatever the score
    return cells


def _by_seed(case: Case) -> dict[int, dict[tuple[str, str], float]]:
    seeds = [item.config["seed"] for item in case.runs]
    return {
        seed: _cells(item.rows)
        for seed, item in zip(seeds, case.runs, strict=True)
        if seeds.count(seed) == 1
    }


def _names(table: Table) -> list[str]:
    return list(dict.fromkeys(name for cells in table.values() for name in cells))


def _ordered(table: Table) -> Table:
    titles = [measure.title for measure in (*MEASURES, _ACCURACY)]
    return dict(sorted(table.items(), key=lambda item: titles.index(item[0][0])))


def _shown(cell: Cell | None, sign: str) -> str:
    if cell is None:
        return "-"
    spread = "" if np.isnan(cell.std) else f" ± {cell.std:.2f}"
    return f"{cell.mean:{sign}.2f}{spread}"


def _blocks(table: Table, names: Sequence[str], top: Callable, sign: str) -> list[str]:
    """A block of lines a measure, the columns aligned over all of them."""
    grid = [
        [key[1], *(_shown(cells.get(n), sign) + (" *" if n in top(key) else "  ") for n in names)]
        for key, cells in table.items()
    ]
    head = ["", *(f"{name}  " for name in names)]
    widths = [max(len(line[i]) for line in [head, *grid]) for i in range(len(head))]
    lines, title = [], None
    for (measure, _), cells in zip(table, grid, strict=True):
        if measure != title:
            lines += ["", measure, _aligned(head, widths)] if title is None else ["", measure]
            title = measure
        lines.append(_aligned(cells, widths))
    return lines


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _html(table: Table, names: Sequence[str], top: Callable, sign: str) -> str:
    lines, title = [], None
    for (measure, score), cells in table.items():
        if measure != title:
            lines.append(f"<tr><th colspan={len(names) + 1}>{html.text(measure)}</th></tr>")
            title = measure
        marked = top((measure, score))
        columns = "".join(
            f"<td{' class=best' if name in marked else ''}>{_shown(cells.get(name), sign)}</td>"
            for name in names
        )
        lines.append(f"<tr><th>{html.text(score)}</th>{columns}</tr>\n")
    head = "".join(f"<th>{html.text(name)}</th>" for name in names)
    return html.table(f"<th></th>{head}", "".join(lines))


def _write(output: str, cases, table: Table, differences: Table) -> None:
    try:
        if output.endswith(".html"):
            artifacts.write_bytes(Path(output), format_page(cases, table, differences).encode())
            return
        lines = [("case", "score", "measure", "mean", "std", "runs")]
        for (measure, score), cells in [*table.items(), *differences.items()]:
            lines += [
                (name, score, measure, f"{c.mean:.4f}", _number(c.std), str(c.count))
                for name, c in cells.items()
            ]
        tables.write_lines(output, lines)
    except (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"--output {output} can't be written ({error})") from None


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"
