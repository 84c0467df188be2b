"""Training methods on the embedded data, compared on the same seeds.

    python -m benchmarks.run --suite methods --output results.json [--seeds 0,1,2]
        [--cases ce,um] [--workdir runs/methods] [--config.a.b=VALUE ...]

Fine-tuning methods start from the case `ce` of their seed and train three more epochs. The control
`ce-more` does the same with cross-entropy. Methods that train from scratch have as many epochs as
`ce`. `ce-20` trains for twenty epochs until the student memorises its images, the regime that
Unleashing Mask is made for; `ce-20-more`, `um-20` and `umap-20` fine-tune it for six epochs.
Outlier images are procedural ones, which are in no test or validation set. The terminal shows four
scores: mean and standard deviation over seeds, and the difference of AUROC from `ce-more` on the
same seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case, Tables, columns, markdown, mean_of, spread

SCORES = ("msp", "odin", "energy", "mahalanobis")
CONTROL = "ce-more"
_SETTINGS = {"evaluation.scores": list(SCORES), "data.csid": ["none"]}
_FINE_TUNING = {"train.epochs": 3, "train.learning_rate": 0.02}
_WITHOUT_IMAGES = {"outliers.image_share": 0.0}  # outliers are features and latents only


def _fine_tuned(name: str, start: str = "ce", **changes: Any) -> Case:
    """Fine-tuning of the case `start`. A double underscore in a key stands for a dot."""
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return Case({"method.name": name, **_FINE_TUNING, **flat}, start)


CASES: Mapping[str, Case] = {
    "ce": Case({"method.name": "ce"}),
    "ce-more": _fine_tuned("ce"),
    "um": _fine_tuned("um"),
    "umap": _fine_tuned("umap", train__learning_rate=0.1),
    "oe": _fine_tuned("oe"),
    "oe+um": _fine_tuned("oe", method__unleash=True),
    "energy": _fine_tuned("energy"),
    "energy+um": _fine_tuned("energy", method__unleash=True),
    "woods": _fine_tuned("woods"),
    "vos": Case({"method.name": "vos"}),
    "npos": Case({"method.name": "npos"}),
    "logitnorm": Case({"method.name": "logitnorm"}),
    "oal": Case({"method.name": "oal", **_WITHOUT_IMAGES}),
    "oal+um": _fine_tuned("oal", method__unleash=True, **_WITHOUT_IMAGES),
    "oal-shapes": Case({"method.name": "oal"}),
    "ce-20": Case({"method.name": "ce", "train.epochs": 20}),
    "ce-20-more": _fine_tuned("ce", "ce-20", train__epochs=6),
    "um-20": _fine_tuned("um", "ce-20", train__epochs=6),
    "umap-20": _fine_tuned("umap", "ce-20", train__epochs=6, train__learning_rate=0.1),
}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed, print the table, and return the rows."""
    study = cases.parse("methods", __doc__, CASES, argv, _SETTINGS)
    scores = study.base.evaluation.scores
    rows, tables = cases.run("methods", CASES, study, scores)
    seconds = {(r["case"], r["seed"]): r["median_s"] for r in rows}
    print(summary(tables, seconds, study.cases, study.seeds, scores))
    return rows


def summary(
    tables: Tables,
    seconds: Mapping[tuple[str, int], float],
    names: Sequence[str],
    seeds: Sequence[int],
    scores: Sequence[str] = SCORES,
) -> str:
    """A Markdown table with a line a case and score."""
    sets = columns(tables[names[0], seeds[0]])
    metrics = {
        "AUPR in": "aupr_in",
        "AUPR out": "aupr_out",
        "FPR95 (OOD)": "fpr_at_95_ood_tpr",
        "FPR95 (ID)": "fpr_at_95_id_tpr",
        "ID acc": "id_accuracy",
    }
    groups = ("near", "far", "all", "validation")

    def over_seeds(name: str, score: str, group: str, metric: str = "auroc") -> list[float]:
        return [
            mean_of([r for r in tables[name, s] if r.score == score], sets[group], metric)
            for s in seeds
        ]

    lines = []
    for name in names:
        for score in scores:
            cells = [spread(over_seeds(name, score, group)) for group in groups]
            if CONTROL in names:
                values, control = (over_seeds(n, score, "all") for n in (name, CONTROL))
                differences = [a - b for a, b in zip(values, control, strict=True)]
                cells.append(spread(differences, "+"))
            cells += [spread(over_seeds(name, score, "all", m)) for m in metrics.values()]
            cells.append(spread([seconds[name, s] for s in seeds]))
            lines.append([name, score, *cells])
    control = [f"all − {CONTROL}"] if CONTROL in names else []
    head = ["case", "score", *(f"AUROC {g}" for g in groups), *control, *metrics, "train s"]
    return markdown(head, lines)
