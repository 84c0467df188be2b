"""Stage `report`: tables, what a detector loads, and a page with tables and pictures."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from oal_jax.errors import UserError
from oal_jax.evaluation import bootstrap, headline, protocol
from oal_jax.evaluation.search import Trial, describe, search, write_search
from oal_jax.evaluation.tables import write_csv
from oal_jax.methods import registry
from oal_jax.report.run_page import ReportInputs, write_report
from oal_jax.runtime import artifacts, processes
from oal_jax.scores import GRIDS
from oal_jax.stages import batches, evaluate, latents, train
from oal_jax.stages.context import Context
from oal_jax.training import log

_SHOWN_OUTLIERS = 400


def run(context: Context) -> list[Path]:
    """Write the tables, the headline score, what detectors load of all scores, and `index.html`."""
    settings = context.config.evaluation
    sets = evaluate.inputs(context)
    params, trials = _search(context, sets)
    result = protocol.evaluate(
        settings.scores,
        **sets._asdict(),
        params=params,
        keep=settings.keep_id,
        batch_size=settings.batch_size,
        mesh=context.mesh,
        leave_out_refused=True,
    )
    written: list[Path] = []
    processes.on_main(lambda: written.extend(_write(context, sets, trials, result)))
    return written


def _write(
    context: Context, sets: evaluate.Sets, trials: list[Trial], result: protocol.Evaluation
) -> list[Path]:
    """Writes the files of the stage from what the devices computed."""
    config, stage = context.config, context.directory("report")
    written = protocol.write_tables(stage, result) + protocol.write_detectors(stage, result)
    chosen = _headline(context, sets, result)
    written.append(headline.write(stage, chosen))
    intervals = [
        interval
        for score, known in result.id_scores.items()
        for interval in bootstrap.intervals(
            score, known, result.ood_scores[score], sets.groups, seed=config.seed
        )
    ]
    written.append(stage / "intervals.csv")
    write_csv(written[-1], intervals, bootstrap.Interval._fields)
    if trials:
        written.append(stage / "search.csv")
        write_search(written[-1], trials)
    facts = {"Method": _method_name(context), "Seed": config.seed}
    facts |= {"Date": datetime.date.today().isoformat(), **artifacts.versions()}
    pictures = latents.pictures(context)
    samples = {"Decoded outliers": pictures["outliers"]} if pictures else {}
    written.append(stage / "index.html")
    write_report(
        written[-1],
        ReportInputs(
            title=f"{'SMOKE: ' * config.smoke}{context.workdir.name}: OOD report",
            facts=facts,
            config=config,
            class_names=context.info.class_names,
            evaluation=result,
            headline=chosen,
            id_test=sets.id_test,
            ood=sets.ood,
            groups=sets.groups,
            intervals=intervals,
            trials=trials,
            log=log.read(context.workdir / log.FILE, "train"),
            outlier_features=_mapped_outliers(context),
            samples=samples,
        ),
    )
    return written


def _headline(
    context: Context, sets: evaluate.Sets, result: protocol.Evaluation
) -> headline.Headline:
    """The headline score, with what speaks against the run."""
    steps = train.make_plan(context.config, context.info.num_train).steps
    accuracy = protocol.accuracy(sets.id_test)
    warnings = headline.run_warnings(accuracy, sets.id_test.labels, steps)
    warnings += headline.fit_warnings(result, sets.id_train)
    return headline.choose(headline.validation_aurocs(result, sets.groups), warnings)


def _search(context: Context, sets: evaluate.Sets) -> tuple[dict[str, Any], list[Trial]]:
    """Parameters of the scores that have a grid, and all trials. Empty without a search."""
    settings = context.config.evaluation
    params: dict[str, Any] = {}
    trials: list[Trial] = []
    validation = {n: data for n, data in sets.ood.items() if sets.groups[n] == "validation"}
    for score in settings.scores if settings.search else ():
        if not GRIDS.get(score):
            continue
        try:
            params[score], tried = search(
                score,
                GRIDS[score],
                sets.id_train,
                sets.id_val,
                validation,
                sets.head,
                sets.forward,
                settings.batch_size,
                context.mesh,
            )
        except UserError as error:
            if not validation:
                raise
            print(f"search: {score} keeps its defaults: {error}", flush=True)
            continue
        trials += tried
        for trial in tried:
            if trial.refusal:
                print(f"search: {describe(trial.params)} left out: {trial.refusal}", flush=True)
    return params, trials


def _method_name(context: Context) -> str:
    objective = registry.recipe_of(context.config).objective(context.config)
    name = context.config.method.name
    return f"{name} ({objective})" if objective else name


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
