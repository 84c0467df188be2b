"""OAL's objectives and outlier sources on the embedded data, compared on the same seeds.

    python -m benchmarks.run --suite ablation --output results.json [--seeds 0,1,2]
        [--cases kd,oal-random] [--workdir runs/ablation] [--config.a.b=VALUE ...]

All cases train the same number of steps on the same images. A row holds the metrics of one case and
seed on every OOD set. The terminal shows mean and standard deviation over seeds, and the
differences from `kd` on the same seed. Finished runs are skipped.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case, Tables, columns, markdown, mean_of, spread

SCORE = "energy"
BASELINE = "kd"


def _oal(source: str = "knn", objective: str = "energy", image_share: float = 0.0) -> Case:
    outliers = {"outliers.source": source, "outliers.image_share": image_share}
    return Case({"method.name": "oal", "method.oal.objective": objective, **outliers})


CASES = {
    "ce": Case({"method.name": "ce"}),
    "kd": Case({"method.name": "kd"}),
    "oal-club": _oal(objective="club"),
    "oal-club-alternate": _oal(objective="club_alternate"),
    "oal-knn": _oal("knn"),
    "oal-diffusion": _oal("diffusion"),
    "oal-random": _oal("random"),
    "oal-random-shapes": _oal("random", image_share=0.125),
    "oal-none-shapes": _oal("none", image_share=0.125),
    "pixel": Case({"method.name": "pixel"}),
}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed, print the tables, and return the rows."""
    study = cases.parse("ablation", __doc__, CASES, argv)
    rows, tables = cases.run("ablation", CASES, study, [SCORE])
    print(summary(tables, study.cases, study.seeds))
    return rows


def summary(tables: Tables, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown tables: AUROC, FPR95 and accuracy, then differences of AUROC from `BASELINE`."""
    sets = columns(tables[names[0], seeds[0]])
    metrics = {
        "FPR95 (OOD), all": "fpr_at_95_ood_tpr",
        "FPR95 (ID), all": "fpr_at_95_id_tpr",
        "ID acc": "id_accuracy",
    }

    def over_seeds(name: str, members: Sequence[str], metric: str = "auroc") -> list[float]:
        return [mean_of(tables[name, seed], members, metric) for seed in seeds]

    lines = [
        [
            name,
            *(spread(over_seeds(name, members)) for members in sets.values()),
            *(spread(over_seeds(name, sets["all"], metric)) for metric in metrics.values()),
        ]
        for name in names
    ]
    title = f"AUROC of the score `{SCORE}`, mean ± std over seeds {seeds}"
    text = [title, "", markdown(["case", *sets, *metrics], lines)]
    if BASELINE in names:
        lines = []
        for name in names:
            if name == BASELINE:
                continue
            cells = []
            for members in sets.values():
                pairs = zip(over_seeds(name, members), over_seeds(BASELINE, members), strict=True)
                differences = [ours - baseline for ours, baseline in pairs]
                each = " ".join(f"{difference:+.1f}" for difference in differences)
                cells.append(f"{spread(differences, '+')} ({each})")
            lines.append([name, *cells])
        title = f"AUROC minus `{BASELINE}` of the same seed: mean ± std (each seed)"
        text += ["", title, "", markdown(["case", *sets], lines)]
    return "\n".join(text)
