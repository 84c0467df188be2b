"""What the suites share that train many cases on several seeds: running them, and their tables."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.run import row
from oal_jax.config import Config, flatten, unflatten
from oal_jax.errors import UserError
from oal_jax.evaluation.tables import Row, read_csv
from oal_jax.runtime import artifacts
from oal_jax.stages import run as pipeline
from oal_jax.training.log import read

Tables = dict[tuple[str, int], list[Row]]  # case and seed to near, far and validation rows


class Case(NamedTuple):
    """What a case changes in the config: {"a.b": value}."""

    changes: Mapping[str, Any]
    start: str = ""  # the case whose student of the same seed is the start


class Plan(NamedTuple):
    """What the flags of a suite say."""

    base: Config
    seeds: list[int]
    cases: list[str]
    workdir: Path


def parse(
    suite: str,
    cases: Mapping[str, Case],
    argv: Sequence[str],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """The flags `--config --seeds --cases --workdir --config.a.b=VALUE`.

    `settings` change the config of the file; the flags change both.

    Raises:
      UserError: an unknown case or config key, or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks.run --suite {suite}")
    parser.add_argument("--config", type=Path, default=Path("configs/fashion.py"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cases", default=",".join(cases))
    parser.add_argument("--workdir", type=Path, default=Path("runs") / suite)
    args, overrides = parser.parse_known_args(argv)
    chosen = args.cases.split(",")
    for case in chosen:
        if case not in cases:
            raise UserError(f"case '{case}' is unknown; known: {', '.join(cases)}")
    by_flag = {flag.partition("=")[0].partition("config.")[2] for flag in overrides}
    preset = {key: value for key, value in settings.items() if key not in by_flag}
    base = unflatten(flatten(load_config(args.config, overrides)) | preset)
    return Plan(base, [int(s) for s in args.seeds.split(",")], chosen, args.workdir)


def run(
    suite: str, cases: Mapping[str, Case], plan: Plan, keep: Callable[[Row], bool]
) -> tuple[list[dict[str, Any]], Tables]:
    """Train and evaluate every case for every seed: a row each, and the tables' rows by `keep`.

    Finished runs are skipped, so an interrupted suite goes on where it was. Stages that an earlier
    case of the seed has done on the same inputs are taken from there.
    """
    rows, tables = [], {}
    for seed in plan.seeds:
        done: list[Path] = []
        for name in plan.cases:
            case, workdir = cases[name], plan.workdir / f"seed{seed}" / name
            changes = dict(case.changes) | {"seed": seed}
            if case.start:
                changes["train.start"] = str(plan.workdir / f"seed{seed}" / case.start)
            print(f"--- {name}, seed {seed}", flush=True)
            start = time.monotonic()
            config = unflatten(flatten(plan.base) | changes)
            pipeline.run(config, workdir, reuse=tuple(done))
            seconds = time.monotonic() - start
            done.append(workdir)
            report = workdir / "report"
            table = read_csv(report / "ood.csv") + read_csv(report / "validation.csv")
            tables[name, seed] = [r for r in table if keep(r)]
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


def epoch_seconds(workdir: Path) -> float | None:
    """Median seconds of an epoch of the student's training, without the first; None of only one.

    From the log: validation is in it, compilation is not.
    """
    from tensorboardX.proto.event_pb2 import Event

    ends = {r["step"] for r in read(workdir / "metrics.jsonl", "train") if "val_accuracy" in r}
    times: dict[int, float] = {}
    for path in sorted((workdir / "tensorboard" / "train").glob("events*")):
        data = path.read_bytes()
        while data:  # a record: its length, a checksum, itself, a checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("summary") and event.step in ends:
                times[event.step] = event.wall_time
    each = np.diff([times[step] for step in sorted(times)])
    return float(np.median(each)) if len(each) else None


def columns(table: list[Row]) -> dict[str, list[str]]:
    """Heading to the OOD sets whose mean stands under it."""
    sets = {
        group: list(dict.fromkeys(r.dataset for r in table if r.group == group))[:-1]
        for group in ("near", "far", "validation")
    }
    each = {name: [name] for name in (*sets["near"], *sets["far"])}
    return {
        **each,
        "near": sets["near"],
        "far": sets["far"],
        "all": sets["near"] + sets["far"],
        "validation": sets["validation"],
    }


def mean_of(table: list[Row], sets: list[str], metric: str) -> float:
    """The unweighted mean of a metric over these sets."""
    return float(np.mean([getattr(r, metric) for r in table if r.dataset in sets]))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation, a decimal each."""
    std = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):{sign}.1f} ± {std:.1f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    everything = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in everything)


def load_config(path: Path, flags: Sequence[str] = ()) -> Config:
    """The config of a file under flags `--config.a.b=VALUE`, validated."""
    from oal_jax.config.flags import parse

    return parse(["run", f"--config={path}", *flags]).config
