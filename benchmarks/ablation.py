"""Suite `ablation`: every method and every outlier source on the embedded data, paired by seed.

    python -m benchmarks.run --suite ablation --output results.json [--seeds 0,1,2]
        [--cases kd,oal-random] [--workdir runs/ablation] [--config.a.b=VALUE ...]

All cases train the same number of steps on the same images. A row a case and seed, with every
metric of every OOD set; on the terminal mean +- std over the seeds, and the paired differences
to `kd`. Finished runs are skipped, so an interrupted suite goes on where it was.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import row
from oal_jax import pipeline
from oal_jax.config import Config, flatten, unflatten, unknown_key
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import Row, read_csv

SCORE = "energy"
BASELINE = "kd"


def _case(name: str, micl: str = "energy", source: str = "knn") -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        method = dataclasses.replace(config.method, name=name, micl=micl)
        outliers = dataclasses.replace(config.outliers, source=source)
        return dataclasses.replace(config, method=method, outliers=outliers)

    return change


CASES: dict[str, Callable[[Config], Config]] = {
    "ce": _case("ce"),
    "kd": _case("kd"),
    "oal-reference": _case("oal", "reference"),
    "oal-alternate": _case("oal", "alternate"),
    "oal-knn": _case("oal", source="knn"),
    "oal-diffusion": _case("oal", source="diffusion"),
    "oal-random": _case("oal", source="random"),
    "oal-mixed": _case("oal", source="mixed"),
    "pixel": _case("pixel"),
}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed; print the tables; return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite ablation")
    parser.add_argument("--config", type=Path, default=Path("configs/fashion.py"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"))
    args, overrides = parser.parse_known_args(argv)
    seeds, cases = [int(s) for s in args.seeds.split(",")], args.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise UserError(f"case '{case}' is unknown; known: {', '.join(CASES)}")
    base = _with_overrides(_load(args.config), overrides)
    rows, tables = [], {}
    for seed in seeds:
        first: Path | None = None
        for case in cases:
            config = CASES[case](dataclasses.replace(base, seed=seed))
            workdir = args.workdir / f"seed{seed}" / case
            print(f"--- {case}, seed {seed}", flush=True)
            start = time.monotonic()
            pipeline.run(config, workdir, reuse=first)
            seconds = time.monotonic() - start
            if config.method.name in ("oal", "pixel"):
                first = workdir  # it has every stage that another case could need
            elif first is None and config.method.name == "kd":
                first = workdir
            table = read_csv(workdir / "report" / "ood.csv")
            validation = read_csv(workdir / "report" / "validation.csv")
            tables[case, seed] = [r for r in table + validation if r.score == SCORE]
            metrics = [r._asdict() for r in table + validation]
            manifest = pipeline.artifacts.read_json(workdir / "train" / "manifest.json")
            rows.append(
                row(
                    "ablation",
                    case,
                    [manifest["seconds"]],
                    seed=seed,
                    seconds_of_this_call=round(seconds, 1),
                    metrics=metrics,
                )
            )
    print(summary(tables, cases, seeds))
    return rows


def summary(tables: dict[tuple[str, int], list[Row]], cases: list[str], seeds: list[int]) -> str:
    """Markdown: mean +- std of AUROC, FPR95 and accuracy; then paired AUROC differences to kd."""
    columns = _columns(tables[cases[0], seeds[0]])
    head = ["case", *columns, "FPR95 (OOD), all", "FPR95 (ID), all", "ID acc"]
    lines = [f"AUROC of the score `{SCORE}`, mean ± std over seeds {seeds}", "", _line(head)]
    lines.append(_line(["---"] * len(head)))
    for case in cases:
        cells = [
            _spread([_value(tables[case, s], sets, "auroc") for s in seeds])
            for sets in columns.values()
        ]
        for metric in ("fpr_at_95_ood_tpr", "fpr_at_95_id_tpr", "id_accuracy"):
            values = [_value(tables[case, s], columns["all"], metric) for s in seeds]
            cells.append(_spread(values))
        lines.append(_line([case, *cells]))
    if BASELINE in cases:
        lines += ["", f"AUROC minus `{BASELINE}` of the same seed: mean ± std (each seed)", ""]
        lines += [_line(["case", *columns]), _line(["---"] * (1 + len(columns)))]
        for case in cases:
            cells = []
            for sets in columns.values():
                d = [
                    _value(tables[case, s], sets, "auroc")
                    - _value(tables[BASELINE, s], sets, "auroc")
                    for s in seeds
                ]
                cells.append(f"{_spread(d, '+')} ({' '.join(f'{x:+.1f}' for x in d)})")
            if case != BASELINE:
                lines.append(_line([case, *cells]))
    return "\n".join(lines)


def _columns(table: list[Row]) -> dict[str, list[str]]:
    """Heading to the OOD sets whose mean stands under it."""
    sets = {g: [r.dataset for r in table if r.group == g][:-1] for g in ("near", "far")}
    validation = [r.dataset for r in table if r.group == "validation"][:-1]
    each = {name: [name] for name in (*sets["near"], *sets["far"])}
    return {**each, **sets, "all": sets["near"] + sets["far"], "validation": validation}


def _value(table: list[Row], sets: list[str], metric: str) -> float:
    return float(np.mean([getattr(r, metric) for r in table if r.dataset in sets]))


def _spread(values: list[float], sign: str = "") -> str:
    std = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):{sign}.1f} ± {std:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _load(path: Path) -> Config:
    from oal_jax.main import parse

    return parse(["run", f"--config={path}"]).config


def _with_overrides(config: Config, overrides: list[str]) -> Config:
    flat = flatten(config)
    for item in overrides:
        key, _, value = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or key not in flat:
            raise UserError(unknown_key(key))
        kind = type(flat[key])
        try:
            flat[key] = value == "True" if kind is bool else kind(value)
        except ValueError:
            wanted = f"wants a value of type {kind.__name__}, got '{value}'"
            raise UserError(f"config key '{key}' {wanted}") from None
    return unflatten(flat)
