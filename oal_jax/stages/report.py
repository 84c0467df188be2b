"""Stage `report`: tables, what a detector loads, and a page with tables and pictures."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from oal_jax.config import Evaluation, flatten
from oal_jax.evaluation import bootstrap, protocol
from oal_jax.evaluation.search import Trial, describe, search, write_search
from oal_jax.methods import registry
from oal_jax.report.run_page import ReportInputs, extremes, write_report
from oal_jax.runtime import artifacts, processes
from oal_jax.scores import GRIDS
from oal_jax.stages import batches, evaluate, latents, train
from oal_jax.stages.context import Context
from oal_jax.training.log import read

_SHOWN_OUTLIERS = 400


def run(context: Context) -> list[Path]:
    """Write the tables, the thresholds, parameters and states of all scores, and `index.html`."""
    settings = context.config.evaluation
    sets = evaluate.inputs(context)
    params, trials = _search(settings, sets)
    result = protocol.evaluate(
        settings.scores,
        **sets._asdict(),
        params=params,
        keep=settings.keep_id,
        batch_size=settings.batch_size,
    )
    written: list[Path] = []
    processes.on_main(lambda: written.extend(_write(context, sets, trials, result)))
    return written


def _write(
    context: Context, sets: evaluate.Sets, trials: list[Trial], result: protocol.Evaluation
) -> list[Path]:
    """All files of the stage, from what was computed on the devices."""
    config, stage = context.config, context.directory("report")
    settings = config.evaluation
    written = protocol.write_tables(stage, result) + protocol.write_detectors(stage, result)
    intervals = [
        interval
        for score in settings.scores
        for interval in bootstrap.intervals(
            score, result.id_scores[score], result.ood_scores[score], sets.groups, seed=config.seed
        )
    ]
    written.append(stage / "intervals.csv")
    bootstrap.write_intervals(written[-1], intervals)
    if trials:
        written.append(stage / "search.csv")
        write_search(written[-1], trials)
    logged = read(context.workdir / "metrics.jsonl", "train")
    pictures = latents.pictures(context)
    written.append(stage / "index.html")
    write_report(
        written[-1],
        ReportInputs(
            run_name=context.workdir.name,
            method=_method_name(context),
            seed=config.seed,
            id_accuracy=protocol.accuracy(sets.id_test),
            date=datetime.date.today().isoformat(),
            rows=result.rows,
            config=flatten(config),
            versions=artifacts.versions(),
            validation_rows=result.validation_rows,
            id_scores=result.id_scores,
            ood_scores=result.ood_scores,
            groups=sets.groups,
            thresholds=result.thresholds,
            id_features=sets.id_test.outputs.features,
            id_labels=sets.id_test.labels,
            class_names=context.info.class_names,
            ood_features={
                name: data.outputs.features
                for name, data in sets.ood.items()
                if sets.groups[name] in ("near", "far") and data.outputs.features is not None
            },
            outlier_features=_mapped_outliers(context),
            losses=_curves(logged),
            val_accuracy=_val_accuracy(logged),
            id_samples=pictures.get("samples"),
            outlier_samples=pictures.get("outliers"),
            intervals=intervals,
            rejected=protocol.rejected(result),
            keep=settings.keep_id,
            csid_rows=result.csid_rows,
            full_spectrum_rows=result.full_spectrum_rows,
            extremes=_extremes(settings.scores[0], sets, result),
            trials=trials,
        ),
    )
    return written


def _search(settings: Evaluation, sets: evaluate.Sets) -> tuple[dict[str, Any], list[Trial]]:
    """Parameters of the scores that have a grid, and all that was tried; empty where not asked."""
    params: dict[str, Any] = {}
    trials: list[Trial] = []
    validation = {n: data for n, data in sets.ood.items() if sets.groups[n] == "validation"}
    for score in settings.scores if settings.search else ():
        if not GRIDS.get(score):
            continue
        params[score], tried = search(
            score,
            GRIDS[score],
            sets.id_train,
            sets.id_val,
            validation,
            sets.head,
            sets.forward,
            settings.batch_size,
        )
        trials += tried
        for trial in tried:
            if trial.refusal:
                print(f"search: {describe(trial.params)} left out: {trial.refusal}", flush=True)
    return params, trials


def _extremes(score: str, sets: evaluate.Sets, result: protocol.Evaluation):
    """The most and least OOD images of each set that has images, ID test first."""
    named = {"ID test": (sets.id_test, result.id_scores[score])}
    scored = {**result.csid_scores[score], **result.ood_scores[score]}
    named |= {name: (sets.ood[name], values) for name, values in scored.items()}
    return {
        name: extremes(values, data.images())
        for name, (data, values) in named.items()
        if data.images is not None
    }


def _method_name(context: Context) -> str:
    objective = registry.recipe_of(context.config).objective(context.config)
    name = context.config.method.name
    return f"{name} ({objective})" if objective else name


def _curves(rows: list[dict]) -> dict[str, np.ndarray]:
    names = [k for k in rows[0] if k not in ("stage", "step") and "norm" not in k] if rows else []
    return {
        name: np.array([(row["step"], row[name]) for row in rows if name in row])
        for name in names
        if "accuracy" not in name
    }


def _val_accuracy(rows: list[dict]) -> np.ndarray | None:
    points = [(r["step"], 100 * r["val_accuracy"]) for r in rows if "val_accuracy" in r]
    return np.array(points) if points else None


def _mapped_outliers(context: Context) -> np.ndarray | None:
    """Some outliers as student features (n, d), where the method maps them; else None."""
    map_outliers = registry.recipe_of(context.config).map_outliers(context.config)
    if map_outliers is None:
        return None
    params, state = train.load(context)
    width = params["student"]["fc"]["kernel"].shape[0]
    outliers = batches.some_outliers(context, _SHOWN_OUTLIERS)
    features, latents = outliers.get("outlier"), outliers.get("outlier_latent")
    mapped = map_outliers(width, params, state, features, latents)
    return np.concatenate([np.asarray(m) for m in mapped.values()]) if mapped else None
