"""Suite `methods`: the training methods of both papers and of those they compare with.

    python -m benchmarks.run --suite methods --output results.json [--seeds 0,1,2]
        [--cases ce,um] [--workdir runs/methods] [--config.a.b=VALUE ...]

Fine-tuning methods start from the `ce` case of their seed and train three epochs more; `ce-more`
is the control that does so by cross-entropy alone. Methods that train from scratch have the epochs
of `ce`. `ce-20` trains on for twenty epochs, until it has memorised what it can: the regime that
Unleashing Mask is made for. `ce-20-more`, `um-20` and `umap-20` fine-tune it for six. Outlier
images are the procedural ones (`oal_jax/data/procedural.py`), which are neither in a test nor in
a validation set. One table for four scores: mean +- std over the seeds of the means over all near
and far sets, and the difference of AUROC to `ce-more` on the same seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case, Tables, columns, markdown, mean_of, spread

SCORES = ("msp", "odin", "energy", "mahalanobis")
CONTROL = "ce-more"
_FINE = {"train.epochs": 3, "train.learning_rate": 0.02}

_LATENT = {"outliers.image_share": 0.0}  # outliers are features and latents


def _tuned(name: str, start: str = "ce", **more: Any) -> Case:
    """Fine-tuning of a plain classifier by a method."""
    changes = {key.replace("__", "."): value for key, value in more.items()}
    return Case({"method.name": name, **_FINE, **changes}, start)


CASES: Mapping[str, Case] = {
    "ce": Case({"method.name": "ce"}),
    "ce-more": _tuned("ce"),
    "um": _tuned("um"),
    "umap": _tuned("umap", train__learning_rate=0.1),
    "oe": _tuned("oe"),
    "oe+um": _tuned("oe", method__um=True),
    "energy": _tuned("energy"),
    "energy+um": _tuned("energy", method__um=True),
    "woods": _tuned("woods"),
    "vos": Case({"method.name": "vos"}),
    "npos": Case({"method.name": "npos"}),
    "logitnorm": Case({"method.name": "logitnorm"}),
    "oal": Case({"method.name": "oal", **_LATENT}),
    "oal+um": _tuned("oal", method__um=True, **_LATENT),
    "oal-shapes": Case({"method.name": "oal"}),
    "ce-20": Case({"method.name": "ce", "train.epochs": 20}),
    "ce-20-more": _tuned("ce", "ce-20", train__epochs=6),
    "um-20": _tuned("um", "ce-20", train__epochs=6),
    "umap-20": _tuned("umap", "ce-20", train__epochs=6, train__learning_rate=0.1),
}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed; print the table; return the rows."""
    plan = cases.parse("methods", CASES, argv)
    settings = {"evaluation.scores": SCORES, "data.csid": ("none",)}
    chosen = {name: CASES[name]._replace(changes=CASES[name].changes | settings) for name in CASES}
    rows, tables = cases.run("methods", chosen, plan, lambda row: row.score in SCORES)
    seconds = {(r["case"], r["seed"]): r["median_s"] for r in rows}
    print(summary(tables, seconds, plan.cases, plan.seeds))
    return rows


def summary(
    tables: Tables,
    seconds: Mapping[tuple[str, int], float],
    names: Sequence[str],
    seeds: Sequence[int],
) -> str:
    """Markdown: a line a case and score."""
    sets = columns(tables[names[0], seeds[0]])
    metrics = {
        "AUPR in": "aupr_in",
        "AUPR out": "aupr_out",
        "FPR95 (OOD)": "fpr_at_95_ood_tpr",
        "FPR95 (ID)": "fpr_at_95_id_tpr",
        "ID acc": "id_accuracy",
    }
    groups = ("near", "far", "all", "validation")

    def of(name, seed, score):
        return [r for r in tables[name, seed] if r.score == score]

    lines = []
    for name in names:
        for score in SCORES:
            cells = [
                spread([mean_of(of(name, s, score), sets[g], "auroc") for s in seeds])
                for g in groups
            ]
            if CONTROL in names:
                differences = [
                    mean_of(of(name, s, score), sets["all"], "auroc")
                    - mean_of(of(CONTROL, s, score), sets["all"], "auroc")
                    for s in seeds
                ]
                cells.append(spread(differences, "+"))
            cells += [
                spread([mean_of(of(name, s, score), sets["all"], metric) for s in seeds])
                for metric in metrics.values()
            ]
            time = spread([seconds[name, s] for s in seeds])
            lines.append([name, score, *cells, time])
    control = [f"all − {CONTROL}"] if CONTROL in names else []
    head = ["case", "score", *(f"AUROC {g}" for g in groups), *control, *metrics, "train s"]
    return markdown(head, lines)
