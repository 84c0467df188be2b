"""Training and evaluating many configs on several seeds, and the tables of the results."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.run import choose, row
from oal_jax.config import Config, flatten, unflatten
from oal_jax.evaluation.tables import Row, read_csv
from oal_jax.runtime import artifacts
from oal_jax.runtime.command import BareParser
from oal_jax.stages import run as pipeline

CONFIGS = Path(__file__).parents[1] / "configs"

Tables = dict[tuple[str, int], list[Row]]  # (case, seed) to near, far and validation rows


class Case(NamedTuple):
    """What a case changes in the config: {"a.b": value}."""

    changes: Mapping[str, Any]
    start: str = ""  # case of the same seed whose student is `train.start`


class Study(NamedTuple):
    """The cases and seeds to train, as the flags of a suite give them."""

    base: Config
    seeds: list[int]
    cases: list[str]
    workdir: Path


def parse(
    suite: str,
    doc: str,
    cases: Mapping[str, Case],
    argv: Sequence[str],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Study:
    """Parse the flags `--config --seeds --cases --workdir --config.a.b=VALUE`.

    Args:
      suite: name of the suite.
      doc: text of `--help`.
      cases: all cases of the suite.
      argv: the flags.
      settings: the suite's changes to the config of the file. Flags override them.

    Raises:
      UserError: an unknown case or config key, or a value of the wrong type.
    """
    parser = BareParser(f"benchmarks.run --suite {suite}", doc)
    parser.add_argument("--config", type=Path, default=CONFIGS / "fashion.py")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cases", default=",".join(cases))
    parser.add_argument("--workdir", type=Path, default=Path("runs") / suite)
    args, overrides = parser.parse_known_args(argv)
    names = choose("case", args.cases, cases)
    by_flag = {flag.partition("=")[0].partition("config.")[2] for flag in overrides}
    defaults = {key: value for key, value in settings.items() if key not in by_flag}
    base = unflatten(flatten(load_config(args.config, overrides)) | defaults)
    return Study(base, [int(s) for s in args.seeds.split(",")], list(names), args.workdir)


def load_config(path: Path, flags: Sequence[str] = ()) -> Config:
    """The config of a file, changed by flags `--config.a.b=VALUE`, and validated."""
    from oal_jax.config.flags import parse

    return parse(["run", f"--config={path}", *flags]).config


def run(
    suite: str, cases: Mapping[str, Case], study: Study, scores: Collection[str]
) -> tuple[list[dict[str, Any]], Tables]:
    """Train and evaluate every case for every seed.

    Finished runs are skipped, so an interrupted suite resumes. Cases of a seed share the stages
    that have the same inputs.

    Returns:
      A row a run, with all metrics, and tables with the metrics of these scores.
    """
    rows, tables = [], {}
    for seed in study.seeds:
        finished: list[Path] = []
        for name in study.cases:
            case, workdir = cases[name], study.workdir / f"seed{seed}" / name
            changes = dict(case.changes) | {"seed": seed}
            if case.start:
                changes["train.start"] = str(study.workdir / f"seed{seed}" / case.start)
            print(f"--- {name}, seed {seed}", flush=True)
            start = time.monotonic()
            config = unflatten(flatten(study.base) | changes)
            pipeline.run(config, workdir, reuse=tuple(finished))
            seconds = time.monotonic() - start
            finished.append(workdir)
            report = workdir / "report"
            table = read_csv(report / "ood.csv") + read_csv(report / "validation.csv")
            tables[name, seed] = [r for r in table if r.score in scores]
            manifest = artifacts.read_json(workdir / "train" / "manifest.json")
            rows.append(
                row(
                    suite,
                    name,
                    [manifest["seconds"]],
                    seed=seed,
                    seconds_of_this_call=round(seconds, 1),
                    metrics=[r._asdict() for r in table],
                )
            )
    return rows, tables


def columns(table: Sequence[Row]) -> dict[str, list[str]]:
    """Column heading to the OOD sets whose mean the column shows."""
    # The last set of a group is the group's mean.
    near, far, validation = (
        list(dict.fromkeys(r.dataset for r in table if r.group == group))[:-1]
        for group in ("near", "far", "validation")
    )
    each = {name: [name] for name in (*near, *far)}
    return {**each, "near": near, "far": far, "all": near + far, "validation": validation}


def mean_of(table: Sequence[Row], sets: Collection[str], metric: str) -> float:
    """Unweighted mean of a metric over OOD sets."""
    return float(np.mean([getattr(r, metric) for r in table if r.dataset in sets]))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation, "1.2 ± 0.3"."""
    std = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):{sign}.1f} ± {std:.1f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
