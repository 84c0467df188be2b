"""The whole of OAL, from the teacher's features to the detector's metrics, against PyTorch.

    python -m benchmarks.run --suite job --output results.json [--frameworks jax,torch]
        [--recipes default,short,reference] [--forms reference,tuned,shortcuts] [--runs 5] [--smoke]
        [--warm-cache] [--device auto]

Every run is a new process that starts with nothing but the package: imports, compilation and data
count. The programs take turns, and every turn has its own seed. One uncounted turn at tiny sizes
comes first. Cases:

    default             configs/fashion.py, and the PyTorch twin with all of our shortcuts
    short               configs/fashion.py with the fewest epochs and teacher views whose validation
                        accuracy and AUROC match those of the reference recipe with seed 0
    reference           configs/fashion_reference.py (the official code's recipe), and the twin that
                        runs it as fast as PyTorch can
    reference-official  the twin that runs it as the official code does

The JAX side ends with stage `evaluate` and the energy score. Beyond the twin's work it computes
outputs for the training and validation sets and checksums of all files, and draws pictures of
sampled latents. Rows have `stages` (name to median seconds), `compile_s` (part of the time) and
`quality` (a value a seed: mean AUROC of the near and of the far sets, and ID accuracy, in percent).
Only with --warm-cache do compiled programs stay on disk between runs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.cases import CONFIGS, load_config, spread
from benchmarks.plots import draw as draw
from benchmarks.run import choose
from benchmarks.timing import Job
from oal_jax.config import Config, Data, benchmarks, flatten, unflatten
from oal_jax.config.smoke import shrink

# Config file of each recipe, and changes to it.
_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "default": ("fashion", {}),
    "short": ("fashion", {"train.epochs": 3, "teacher.views": 2}),
    "reference": ("fashion_reference", {}),
}
# Recipe and case of each form of the twin.
RECIPE = {"reference": "reference", "tuned": "reference", "shortcuts": "default"}
CASE = {"reference": "reference-official", "tuned": "reference", "shortcuts": "default"}

Outputs = dict[tuple[str, str], list[dict[str, Any]]]  # (framework, case) to the JSON of each run


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the processes, print ratios, and return the rows."""
    parser = timing.make_parser("job", __doc__)
    parser.add_argument("--recipes", default=",".join(_CONFIGS), help="of the JAX side")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--warm-cache", action="store_true", help="keep compiled programs")
    args = parser.parse_args(argv)
    names = choose("recipe", args.recipes, _CONFIGS)
    timing.settle(args, ("torch", "timm", "faiss"))
    recipes = configs(smoke=args.smoke)
    outputs: Outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        if "jax" in args.frameworks:
            jobs += [our_job(name, recipes[name], Path(folder), args, outputs) for name in names]
        if "torch" in args.frameworks:
            jobs += [their_job(f, recipes, Path(folder), args, outputs) for f in args.forms]
        rows = timing.measure("job", jobs, args)
    for row in rows:
        row |= summary(outputs[row["framework"], row["case"]][1:])
        print(_line(row), flush=True)
    return rows


def configs(*, smoke: bool) -> dict[str, Config]:
    """Config of each recipe, evaluated with the energy score on the near and far sets."""
    common = {
        "data.csid": ["none"],
        "evaluation.scores": ["energy"],
        "smoke": smoke,
    }
    return {
        recipe: unflatten(flatten(load_config(CONFIGS / f"{name}.py")) | dict(changes) | common)
        for recipe, (name, changes) in _CONFIGS.items()
    }


def our_job(
    recipe: str, config: Config, folder: Path, args: argparse.Namespace, outputs: Outputs
) -> Job:
    """The JAX side of a recipe. Each run appends to `outputs`; the first run is tiny."""
    runs = outputs.setdefault(("jax", recipe), [])

    def job() -> None:
        tiny = {} if runs else {"smoke": True}
        request = {
            "config": flatten(config) | tiny | {"seed": _seed(len(runs))},
            "device": args.device,
        }
        runs.append(_process("benchmarks.job", request, folder, f"jax-{recipe}", args))

    return Job(recipe, "jax", job, fields={"recipe": recipe})


def their_job(
    form: str,
    recipes: Mapping[str, Config],
    folder: Path,
    args: argparse.Namespace,
    outputs: Outputs,
) -> Job:
    """The PyTorch twin in a form. Each run appends to `outputs`; the first run is tiny."""
    from oal_jax.models.normalise import moments

    recipe, case = RECIPE[form], CASE[form]
    runs = outputs.setdefault(("torch", case), [])
    options = {"device": args.device, "dtype": args.twin_dtype, "eager": args.twin_eager}

    def job() -> None:
        config = recipes[recipe]
        if not runs or args.smoke:
            config = shrink(config)
        request = {
            "config": flatten(config) | {"seed": _seed(len(runs))},
            "moments": moments(config.data.id_set),
            "form": form,
            **options,
        }
        runs.append(_process("benchmarks.torch_twin.job", request, folder, f"torch-{form}", args))

    against = ("default",) if recipe == "default" else (recipe, "default", "short")
    return Job(case, "torch", job, against, {"recipe": recipe, "form": form})


def _seed(finished_runs: int) -> int:
    """Seed of the next run. The tiny run and the first counted one both have seed 0."""
    return max(0, finished_runs - 1)


def _process(
    module: str, request: dict[str, Any], folder: Path, name: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Run `python -m MODULE REQUEST.json OUTPUT.json` and return the output."""
    cache = folder / "cache" if args.warm_cache else Path(tempfile.mkdtemp(dir=folder))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "torch")}
    if args.warm_cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache / "jax")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if "torch" in module:
        environment["USE_FLAX"] = "0"  # or diffusers imports JAX where it is installed
    request_path, output_path = folder / f"{name}.json", folder / f"{name}.out.json"
    request_path.write_text(json.dumps(request))
    timing.python(["-m", module, str(request_path), str(output_path)], **environment)
    return json.loads(output_path.read_text())


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median seconds of stages and compilation over runs, and the quality of each run.

    This `compile_s` replaces that of `timing.measure`, because every run compiles.
    """
    stages = {n: float(np.median([run["stages"][n] for run in runs])) for n in runs[0]["stages"]}
    compile_s = float(np.median([run["compile_s"] for run in runs]))
    sets = benchmarks.resolve(Data().id_set)
    aurocs = {
        name: [[run["metrics"][s]["auroc"] for s in members] for run in runs]
        for name, members in (("near", sets.near), ("far", sets.far))
    }
    accuracy = [[run["metrics"]["id"]["accuracy"]] for run in runs]
    quality = {
        name: [round(100 * float(np.mean(values)), 2) for values in per_run]
        for name, per_run in (aurocs | {"ID acc": accuracy}).items()
    }
    return {"stages": stages, "compile_s": compile_s, "quality": quality}


def _line(row: Mapping[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items())
    rest = row["median_s"] - sum(row["stages"].values())
    quality = ", ".join(f"{name} {spread(values)}" for name, values in row["quality"].items())
    name = f"{row['framework']:6s} {row['case']:20s}"
    return f"{name} {stages}, start {rest:.1f} s; {row['compile_s']:.1f} s compile; {quality}"


def main(argv: Sequence[str]) -> None:
    """Run the JAX side once: read REQUEST.json (`argv[1]`), write OUTPUT.json (`argv[2]`)."""
    import jax

    request = json.loads(Path(argv[1]).read_text())
    if request["device"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from benchmarks.compilation import CompilationTime
    from oal_jax.evaluation import protocol
    from oal_jax.runtime import artifacts, startup
    from oal_jax.stages import evaluate
    from oal_jax.stages import run as pipeline

    startup.keep_freed_memory()  # as the command does
    compilation = CompilationTime()
    config = unflatten(request["config"])
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        pipeline.run(config, workdir, only="evaluate")
        stages = [s.name for s in pipeline.plan(config) if (workdir / s.name).is_dir()]
        seconds = {s: artifacts.read_json(workdir / s / "manifest.json")["seconds"] for s in stages}
        start = time.perf_counter()
        sets = evaluate.inputs(pipeline.resolve(workdir))
        evaluation = protocol.evaluate(config.evaluation.scores, **sets._asdict())
        seconds["score"] = time.perf_counter() - start
    metrics = {row.dataset: {"auroc": row.auroc / 100} for row in evaluation.rows}
    metrics["id"] = {"accuracy": evaluation.rows[0].id_accuracy / 100}
    output = {"stages": seconds, "compile_s": compilation.seconds, "metrics": metrics}
    Path(argv[2]).write_text(json.dumps(output))


if __name__ == "__main__":
    main(sys.argv)
