"""Suite `job`: the whole of OAL, from the teacher's features to the detector's metrics.

    python -m benchmarks.run --suite job --output results.json [--frameworks jax,torch]
        [--recipes default,short,reference] [--forms reference,tuned,shortcuts] [--runs 5] [--smoke]
        [--warm-cache] [--device auto]

Every run is a process of its own that starts with nothing but the package: imports, compilation
and data count. The programs take turns, every turn with a seed of its own; one turn before the
first, at tiny sizes, fills the files' cache and does not count. Cases:

    default            ours by configs/fashion.py, and the PyTorch twin with all of its shortcuts
    short              ours by configs/fashion.py in the fewest epochs (and views of the teacher)
                       whose accuracy and AUROC on the validation sets were no worse than those of
                       configs/fashion_reference.py with seed 0: the time to its quality
    reference          ours by configs/fashion_reference.py (the official code's recipe), and the
                       twin that does that recipe as fast as PyTorch can
    reference-official the twin that does it as the official code does

Ours goes to the end of stage `evaluate`, and the energy score is computed: beside the twin's work
that is outputs for the training and validation sets, and checksums of all files. It draws no
pictures of latents, as the tuned twin does not, and neither samples latents that its training does
not read. Rows have `stages` (name to median seconds), `compile_s` (within the time) and `quality`,
a value a seed: mean AUROC of the near and of the far sets and ID accuracy, in percent; a compiled
program is found again from one run to the next with --warm-cache alone.
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
from benchmarks.cases import load_config, spread
from benchmarks.plots import draw as draw
from benchmarks.timing import Job
from oal_jax.config import Config, Data, benchmarks, flatten, unflatten
from oal_jax.config.smoke import shrink
from oal_jax.errors import UserError

# Of ours: the config, and what is changed in it.
_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "default": ("fashion", {}),
    "short": ("fashion", {"train.epochs": 3, "teacher.views": 2}),
    "reference": ("fashion_reference", {}),
}
# Of the twin's forms: the recipe, and the case.
RECIPE = {"reference": "reference", "tuned": "reference", "shortcuts": "default"}
_CASE = {"reference": "reference-official", "tuned": "reference", "shortcuts": "default"}


def configs(*, smoke: bool) -> dict[str, Config]:
    """The config of each recipe, evaluated by the energy score on the near and far sets."""
    found = {}
    for recipe, (name, more) in _CONFIGS.items():
        config = load_config(Path("configs") / f"{name}.py")
        less = {"data.csid": ["none"], "evaluation.scores": ["energy"], "latents.pictures": 0}
        changes = {**more, **less, "smoke": smoke}
        found[recipe] = unflatten(flatten(config) | changes)
    return found


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time the processes in turns; print ratios; return the rows."""
    parser = timing.parser("job")
    parser.add_argument("--recipes", default=",".join(_CONFIGS), help="of our side")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--warm-cache", action="store_true", help="compiled programs stay on disk")
    args = parser.parse_args(argv)
    timing.settle(args, ("torch", "timm", "faiss"))
    recipes, chosen = configs(smoke=args.smoke), args.recipes.split(",")
    for name in chosen:
        if name not in recipes:
            raise UserError(f"recipe '{name}' is unknown; known: {', '.join(recipes)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results: dict[tuple[str, str], list[dict[str, Any]]] = {}
        jobs = []
        if "jax" in args.frameworks:
            jobs += [_ours(recipe, recipes[recipe], folder, args, results) for recipe in chosen]
        if "torch" in args.frameworks:
            jobs += [_theirs(form, recipes, folder, args, results) for form in args.forms]
        rows = timing.measure("job", jobs, args)
    for row in rows:
        row |= summary(results[row["framework"], row["case"]][1:])
        print(_stages(row), flush=True)
    return rows


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of the stages and of compilation over runs, and the quality of each run.

    Compilation is within every run here, and not in the first alone.
    """
    stages = {n: float(np.median([f["stages"][n] for f in found])) for n in found[0]["stages"]}
    compile_s = float(np.median([f["compile_s"] for f in found]))
    quality = {
        name: [round(100 * float(np.mean([f["metrics"][s][key] for s in sets])), 2) for f in found]
        for name, (sets, key) in _quality().items()
    }
    return {"stages": stages, "compile_s": compile_s, "quality": quality}


def _quality() -> dict[str, tuple[Sequence[str], str]]:
    """Of each number: the sets whose mean it is, and the metric."""
    sets = benchmarks.resolve(Data().id_set)
    return {
        "near": (sets.near, "auroc"),
        "far": (sets.far, "auroc"),
        "ID acc": (("id",), "accuracy"),
    }


def _stages(row: dict[str, Any]) -> str:
    parts = [f"{name} {seconds:.1f}" for name, seconds in row["stages"].items()]
    rest = row["median_s"] - sum(row["stages"].values())
    line = f"{row['framework']:6s} {row['case']:20s} {', '.join(parts)}, start {rest:.1f}"
    quality = ", ".join(f"{name} {spread(values)}" for name, values in row["quality"].items())
    return f"{line} s; compilation {row['compile_s']:.1f} s of these; {quality}"


def _ours(recipe, config, folder, args, results) -> Job:
    kept = results.setdefault(("jax", recipe), [])

    def job():
        tiny = {"smoke": True} if not kept else {}
        flat = flatten(config) | tiny | _seed(kept)
        order = {"config": flat, "device": args.device}
        kept.append(_process("benchmarks.job", order, folder, f"jax-{recipe}", args))

    return Job(recipe, "jax", job, more={"recipe": recipe})


def _theirs(form, recipes, folder, args, results) -> Job:
    from oal_jax.models.normalise import moments
    from oal_jax.stages import latents

    recipe, case = RECIPE[form], _CASE[form]
    config = recipes[recipe]
    kept = results.setdefault(("torch", case), [])
    more = {"device": args.device, "dtype": args.twin_dtype, "eager": args.twin_eager}

    def job():
        given = config if kept and not args.smoke else shrink(config)
        flat = flatten(given) | {"latents.per_class": latents.per_class(given)} | _seed(kept)
        order = {"config": flat, "moments": moments(given.data.id_set), "form": form, **more}
        kept.append(_process("benchmarks.torch_twin.job", order, folder, f"torch-{form}", args))

    fields = {"recipe": recipe, "form": form}
    against = ("default",) if recipe == "default" else (recipe, "default", "short")
    return Job(case, "torch", job, against=against, more=fields)


def _seed(before: Sequence[Any]) -> dict[str, int]:
    """The seed of the next run; the tiny turn has the first one's."""
    return {"seed": max(0, len(before) - 1)}


def _process(
    module: str, order: dict[str, Any], folder: Path, name: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Run a module on an order, both as files; what it wrote."""
    cache = folder / "cache" if args.warm_cache else Path(tempfile.mkdtemp(dir=folder))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "torch")}
    if args.warm_cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache / "jax")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if "torch" in module:
        environment["USE_FLAX"] = "0"  # or diffusers imports JAX where it is installed
    read, written = folder / f"{name}.json", folder / f"{name}.out.json"
    read.write_text(json.dumps(order))
    timing.python(["-m", module, str(read), str(written)], **environment)
    return json.loads(written.read_text())


def main(argv: Sequence[str]) -> None:
    """Our side of the job, in a process of its own: read JOB.json, run, write OUTPUT.json."""
    import jax

    order = json.loads(Path(argv[1]).read_text())
    if order["device"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from benchmarks.compilation import CompilationTime
    from oal_jax.evaluation import protocol
    from oal_jax.generator import flax_models
    from oal_jax.runtime import artifacts, startup
    from oal_jax.stages import evaluate
    from oal_jax.stages import run as pipeline

    startup.keep_freed_memory()  # as the command does
    flax_models.leave_torch_out()
    spent = CompilationTime()
    config = unflatten(order["config"])
    with tempfile.TemporaryDirectory() as workdir:
        pipeline.run(config, Path(workdir), only="evaluate")
        context = pipeline.resolve(Path(workdir))
        names = [s.name for s in pipeline.plan(config) if (Path(workdir) / s.name).is_dir()]
        manifests = {n: artifacts.read_json(Path(workdir) / n / "manifest.json") for n in names}
        seconds = {name: manifest["seconds"] for name, manifest in manifests.items()}
        start = time.perf_counter()
        found = protocol.evaluate(config.evaluation.scores, **evaluate.inputs(context)._asdict())
        seconds["score"] = time.perf_counter() - start
    metrics = {r.dataset: {"auroc": r.auroc / 100} for r in found.rows}
    metrics["id"] = {"accuracy": found.rows[0].id_accuracy / 100}
    output = {"stages": seconds, "compile_s": spent.seconds, "metrics": metrics}
    Path(argv[2]).write_text(json.dumps(output))


if __name__ == "__main__":
    main(sys.argv)
