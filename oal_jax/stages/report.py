"""Stage `report`: `ood.csv`, `validation.csv` and a page with tables and pictures."""

import datetime
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from oal_jax import artifacts
from oal_jax.config import flatten
from oal_jax.evaluation import protocol
from oal_jax.evaluation.metrics import id_accuracy
from oal_jax.evaluation.report import ReportInputs, write_report
from oal_jax.keys import named
from oal_jax.methods.base import apply_group
from oal_jax.models.projector import LatentAdapter, Projector
from oal_jax.outliers.knn import sample_random, unit
from oal_jax.stages import evaluate, latents, outliers, train
from oal_jax.stages.context import Context
from oal_jax.training.log import read

_SHOWN_OUTLIERS = 400


def run(context: Context) -> list[Path]:
    """Write the three files; thresholds of all scores in `thresholds.json`."""
    config, stage = context.config, context.directory("report")
    id_sets, ood = evaluate.outputs(context)
    result = evaluate.protocol_result(context)
    protocol.write_tables(stage, result)
    thresholds = stage / "thresholds.json"
    artifacts.write_json(thresholds, result.thresholds)
    test = id_sets["id_test"]
    logged = read(context.workdir / "metrics.jsonl", "train")
    pictures = latents.pictures(context) if config.method.name in ("oal", "pixel") else {}
    page = stage / "index.html"
    write_report(
        page,
        ReportInputs(
            run_name=context.workdir.name,
            method=_method_name(context),
            seed=config.seed,
            id_accuracy=100 * id_accuracy(test.outputs.logits, test.labels),
            date=datetime.date.today().isoformat(),
            rows=result.rows,
            config=flatten(config),
            versions=artifacts.versions(),
            validation_rows=result.validation_rows,
            id_scores=result.id_scores,
            ood_scores=result.ood_scores,
            groups=evaluate.groups(context),
            thresholds=result.thresholds,
            id_features=test.outputs.features,
            id_labels=test.labels,
            class_names=context.images("validation", limit=1).class_names,
            ood_features={
                name: outputs.features
                for name, outputs in ood.items()
                if evaluate.groups(context)[name] != "validation"
            },
            outlier_features=_mapped_outliers(context),
            losses=_curves(logged),
            val_accuracy=_val_accuracy(logged),
            id_samples=pictures.get("samples"),
            outlier_samples=pictures.get("outliers"),
        ),
    )
    written = [stage / "ood.csv", stage / "validation.csv", thresholds, page]
    return [path for path in written if path.exists()]


def _method_name(context: Context) -> str:
    method = context.config.method
    if method.name != "oal":
        return method.name
    if method.micl != "energy":
        return f"oal ({method.micl})"
    return f"oal (energy, {context.config.outliers.source} outliers)"


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
    """Some outliers where the student's head sees them: through DT, or through the adapter."""
    config = context.config
    if config.method.name != "oal" or config.method.micl != "energy":
        return None
    params, state = train.load(context)
    width = params["student"]["fc"]["kernel"].shape[0]
    feature, latent = train.SOURCES[config.outliers.source]
    count, key = _SHOWN_OUTLIERS, named(context.key, "report")
    mapped = []
    if feature:
        directions = (
            sample_random(key, count, config.teacher.width)
            if feature == "random"
            else outliers.flat(context)[:: max(1, len(outliers.flat(context)) // count)]
        )
        mapped.append(
            apply_group(
                Projector(width), params, state, "projector", unit(directions), train=False
            )[0]
        )
    if latent and latent != "random":
        z = latents.channels_last(context)[:count]
        mapped.append(LatentAdapter(width).apply({"params": params["adapter"]}, jnp.asarray(z)))
    return np.concatenate([np.asarray(m) for m in mapped]) if mapped else None
