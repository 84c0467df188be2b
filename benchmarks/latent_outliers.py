"""Suite `latent_outliers`: which outliers help, over seeds and near-OOD problems.

    python -m benchmarks.run --suite latent_outliers --output results.json [--seeds 0,1,2]
        [--cases kd,oal-random] [--problems full,coat] [--control oal-random] [--jobs 2]
        [--size small] [--teachers trained] [--keep False] [--workdir runs/latent_outliers]
        [--config.a.b=VALUE ...]

A problem is the whole ID set with its own near-OOD sets ("full"), or the ID set without one class,
whose images are then near-OOD. Teacher and generator of such a problem are trained without the
class; they, the teacher's outputs, the outliers and the latents are made once a problem and shared
by all seeds and cases (`stages_seed`). Choose by the validation columns: `val_left_out` are the
class's validation images, `left_out` its test images.

`--size small` trains a small student for a short time, `default` as the config says. `--jobs N`
runs N at once, each on its share of the cores: N students on a core each are done sooner than one
on N cores, but compare seconds only among runs of the same N. `--keep False` deletes all of a
finished run but its numbers and its log. Finished runs are skipped, so an interrupted suite goes
on where it was.

On the terminal a table of means, and one of paired differences to the control with 95 % bootstrap
intervals: over seeds on these problems, and over seeds and problems (`benchmarks/paired.py`).
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import cases, paired
from benchmarks.cases import Case, Plan
from benchmarks.latent_outliers_cases import CASES
from benchmarks.latent_outliers_figure import Dot, draw_dots
from benchmarks.latent_outliers_tables import COMPARED, FULL, differences, summary
from benchmarks.run import row
from oal_jax.config import Config, expand, flatten, stages_before, unflatten
from oal_jax.config.smoke import shrink
from oal_jax.errors import TrainingFailed, UserError
from oal_jax.evaluation import protocol
from oal_jax.methods import registry
from oal_jax.runtime import artifacts
from oal_jax.stages import evaluate, latents
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context

SUITE, SCORE = "latent_outliers", "energy"
_RESULT = "result.json"
_KEPT = ("config.json", "metrics.jsonl", _RESULT)
# What the suite needs of every run.
SHARED = {
    "evaluation.scores": [SCORE],
    "data.csid": ["none"],
    "outliers.image_share": 0.0,  # but of the cases that have them
    "stages_seed": 0,
    "train.checkpoint_every": 1000,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    # 12 s of one core a student, evaluation apart (Intel Xeon, 2.3 GHz).
    "small": {
        "data.train_images": 6000,
        "student.width": 8,
        "train.epochs": 4,
        "train.batch_size": 64,
        "teacher.epochs": 4,  # of the problems whose teacher is trained; so is the next
        "generator.diffusion_epochs": 4,
    },
    "default": {},
}


class Task(NamedTuple):
    """A run, or what a problem's runs share, for a process of its own."""

    config: dict[str, Any]
    workdir: Path
    reuse: tuple[Path, ...] = ()
    only: str = ""  # the last stage that is run; empty: a whole run
    keep: bool = True  # all of the run, not its numbers and log alone


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every problem and seed; print the tables; the rows."""
    args, plan = _parse(argv)
    problems = _chosen(plan.base, args.problems, args.teachers)
    shared, tasks = {}, {}
    for problem, changes in problems.items():
        folder = plan.workdir / problem.replace("/", "_")
        configs = {name: config_of(plan.base, changes, CASES[name]) for name in plan.cases}
        shared[problem] = _shared_by(configs, folder / "shared")
        places = tuple(task.workdir for task in shared[problem])
        for seed in plan.seeds:
            for name in plan.cases:
                config = flatten(configs[name]) | {"seed": seed}
                workdir = folder / f"seed{seed}" / name
                tasks[problem, seed, name] = Task(config, workdir, places, keep=args.keep)
    results = {key: found for key, task in tasks.items() if (found := _finished(task))}
    unfinished = {problem for problem, *_ in tasks.keys() - results.keys()}
    cache = plan.workdir.absolute() / "compiled"
    _each(_prepare, {p: shared[p] for p in problems if p in unfinished}, args.jobs, cache)
    # Seed by seed, so that an interrupted suite has whole seeds.
    ordered = sorted(tasks, key=lambda key: plan.seeds.index(key[1]))
    due = {key: tasks[key] for key in ordered if key not in results}
    results |= _each(_run, due, args.jobs, cache)
    rows = [
        row(
            SUITE,
            name,
            [found["train_s"] or 0.0],
            problem=problem,
            seed=seed,
            score=SCORE,
            control=args.control,
            jobs=args.jobs,
            **found,
        )
        for problem, seed, name in ordered
        for found in [results[problem, seed, name]]
    ]
    print(summary(rows))
    return rows


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog=f"benchmarks.run --suite {SUITE}", add_help=False)
    parser.add_argument("--problems", default="")
    parser.add_argument("--control", default="oal-random")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--teachers", default="trained", choices=("trained", "shipped"))
    parser.add_argument("--keep", default="True", choices=("True", "False"))
    args, rest = parser.parse_known_args(argv)
    args.keep = args.keep == "True"
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be 1 or more")
    if args.control not in CASES:
        raise UserError(f"--control '{args.control}' is unknown; known: {', '.join(CASES)}")
    return args, cases.parse(SUITE, CASES, rest, SHARED | dict(SIZES[args.size]))


def _chosen(base: Config, wanted: str, teachers: str) -> dict[str, dict[str, Any]]:
    """Problem to what it changes in the config: the whole ID set, and each class left out."""
    config = expand(base)
    config = shrink(config) if config.smoke else config
    context = Context(config, Path(), None, None)
    names = context.images("validation", limit=1).class_names
    trained = {"teacher.train": True, "generator.train": True} if teachers == "trained" else {}
    known = {FULL: {}} | {name: {"data.leave_out": [name], **trained} for name in names}
    chosen = wanted.split(",") if wanted else list(known)
    for name in chosen:
        if name not in known:
            raise UserError(f"problem '{name}' is unknown; known: {', '.join(known)}")
    return {name: known[name] for name in chosen}


def config_of(base: Config, problem: Mapping[str, Any], case: Case) -> Config:
    """The config of a case on a problem."""
    flat = flatten(base) | dict(problem)
    flat |= {key: value for key, value in case.changes.items() if not callable(value)}
    made = {key: value(flat) for key, value in case.changes.items() if callable(value)}
    return unflatten(flat | made)


def _shared_by(configs: Mapping[str, Config], folder: Path) -> list[Task]:
    """What is made before the students train: a task for all cases that have it in common.

    First those with all that any other reads, so that the others find it done.
    """
    trained = ("method.", "student.", "train.", "evaluation.", "outliers.source", "outliers.image")
    stages = {
        name: [s for s in stages_before(config) if s != "estimate_loss"]
        for name, config in configs.items()
    }
    order = sorted(
        (name for name in configs if stages[name]),
        key=lambda name: (-len(stages[name]), not latents.learns_from_id_latents(configs[name])),
    )
    # By an earlier run of other cases.
    made_before = sorted(path.parent for path in folder.glob("*/config.json"))
    found: dict[str, Task] = {}
    for name in order:
        flat = flatten(configs[name]) | {"seed": 0}
        made = {k: v for k, v in flat.items() if not k.startswith(trained)}
        same = artifacts.fingerprint(made | {"sampled": registry.reads_sampled(configs[name])})
        if same not in found:
            places = dict.fromkeys([*(task.workdir for task in found.values()), *made_before])
            places.pop(folder / name, None)
            found[same] = Task(flat, folder / name, tuple(places), stages[name][-1])
    return list(found.values())


def _each(function: Callable, tasks: Mapping[Any, Any], jobs: int, cache: Path) -> dict[Any, Any]:
    """`function` of every task, `jobs` at once in processes of their own."""
    if not tasks:
        return {}
    spawn, results = multiprocessing.get_context("spawn"), {}
    number = spawn.Value("i", 0)
    with (
        _environment(jobs, cache),
        ProcessPoolExecutor(
            jobs, mp_context=spawn, initializer=_pin, initargs=(number, jobs)
        ) as pool,
    ):
        futures = {pool.submit(function, task): key for key, task in tasks.items()}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done = f"{len(results)} of {len(tasks)}"
                print(f"--- {_said(futures[future])}: done, {done}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _said(key: Any) -> str:
    return key if isinstance(key, str) else "{}, seed {}, {}".format(*key)


@contextlib.contextmanager
def _environment(jobs: int, cache: Path) -> Iterator[None]:
    """What processes that start meanwhile find: where compiled programs are kept; their threads.

    Where nothing in a step is drawn, the seeds of a case are one program.
    """
    wanted = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    if jobs > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        wanted["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _pin(number: Any, jobs: int) -> None:
    """Keep this process on its share of the cores, and end it with the one that started it."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[mine % len(cores) :: jobs] or cores)


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a finished run has its result; what is under way goes on another time


@contextlib.contextmanager
def _to(log: Path) -> Iterator[None]:
    """What is printed goes to a file: several processes would talk at once."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _prepare(tasks: Sequence[Task]) -> None:
    """Run what a problem's runs share."""
    for task in tasks:
        with _to(task.workdir.with_suffix(".log")):
            pipeline.run(unflatten(task.config), task.workdir, only=task.only, reuse=task.reuse)
        jax.clear_caches()


def _finished(task: Task) -> dict[str, Any] | None:
    """The numbers of a run that is done.

    Raises:
      UserError: another config's run is there.
    """
    path = task.workdir / _RESULT
    if not path.exists():
        return None
    found = artifacts.read_json(path, "delete it for the run to be made anew")
    if found["config"] != task.config:
        raise UserError(f"{task.workdir} was made by another config; give another --workdir")
    return found["row"]


def _run(task: Task) -> dict[str, Any]:
    """Train and evaluate; the numbers of a row.

    A training that fails has numbers too: none, and why.
    """
    config, start = unflatten(task.config), time.monotonic()
    with _to(task.workdir.with_suffix(".log")):
        try:
            pipeline.run(config, task.workdir, only="evaluate", reuse=task.reuse)
            found = _numbers(task.workdir)
        except TrainingFailed as error:
            found = dict.fromkeys(("train_s", "epoch_s", "outlier_s", "metrics"))
            found |= {"failed": str(error)}
    found["total_s"] = round(time.monotonic() - start, 2)
    artifacts.write_json(task.workdir / _RESULT, {"config": task.config, "row": found})
    jax.clear_caches()
    if not task.keep:
        for entry in task.workdir.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _KEPT:
                entry.unlink()
    return found


def _numbers(workdir: Path) -> dict[str, Any]:
    context = pipeline.resolve(workdir)
    sets = evaluate.inputs(context)
    result = protocol.evaluate((SCORE,), **sets._asdict())
    seconds = {
        path.parent.name: artifacts.read_json(path)["seconds"]
        for path in workdir.glob("*/manifest.json")
    }
    arrays = registry.METHODS[context.config.method.name].arrays(context.config)
    each = None
    if "knn" in arrays.values() or registry.reads_sampled(context.config):
        classes = len(sets.head.bias)
        sampled = seconds["outliers"] + seconds.get("latents", 0) + seconds.get("adapter", 0)
        count = classes * latents.per_class(context.config)
        each = sampled / count if count else None
    return {
        "train_s": round(seconds["train"], 2),
        "epoch_s": cases.epoch_seconds(workdir),
        "outlier_s": each,
        "metrics": [r._asdict() for r in result.rows + result.validation_rows],
    }


def draw(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """Dots with intervals beside the rows: PNG and SVG; returns the files."""
    control = rows[0]["control"]
    names = [n for n in dict.fromkeys(r["case"] for r in rows) if n != control]
    panels: dict[str, list[Dot]] = {}
    for heading, left_out, field in COMPARED:
        found = [(name, differences(rows, name, left_out, field)) for name in names]
        dots = [
            Dot(name, paired.paired_interval(v, "seeds"), paired.paired_interval(v, "crossed"))
            for name, v in found
            if v is not None
        ]
        if dots:
            panels[heading] = dots
    stem = output.with_suffix("")
    return draw_dots(panels, f"Minus {control}, points", stem) if panels else []
